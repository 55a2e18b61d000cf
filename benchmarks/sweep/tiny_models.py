"""A tiny random model of any architecture that transformers ships, and a batch for it.

Sizes are set by general rules over the names of a configuration's fields; what the rules cannot
know is in `OVERRIDES`. Layers are picked so that every kind of layer that the default configuration
has appears at least once.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from benchmarks.sweep.tiny_overrides import OVERRIDES

TASKS = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "sequence-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "image-classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}
VOCABULARY = 160
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 48, 6, 2, 8, 80
_MAX_LAYERS = 6

# A field of one of these names gets this value, if the default configuration has the field.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim_model", "emb_dim", "embed_dim", "lru_width",
         "attention_hidden_size", "word_embed_proj_dim", "input_embedding_size",
         "output_embedding_size", "projection_dim", "hidden_dim", "width", "ple_embed_dim"),
        HIDDEN,
    ),
    **dict.fromkeys(("embedding_size",), 32),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
         "decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads",
         "swa_num_attention_heads", "linear_num_heads"),
        HEADS,
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads",
                     "multi_query_group_num", "num_global_key_value_heads"), KV_HEADS),
    **dict.fromkeys(("head_dim", "dim_head", "attention_head_size", "kv_channels", "d_kv",
                     "swa_head_dim", "linear_head_dim", "global_head_dim", "attention_head_dim",
                     "query_pre_attn_scalar"), HEAD_DIM),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size",
         "dim_ff", "dff", "n_inner", "d_ff", "feed_forward_size", "d_inner", "mlp_dim",
         "dense_intermediate_size", "intermediate_size_mlp", "inner_dim"),
        FFN,
    ),
    **dict.fromkeys(
        ("moe_intermediate_size", "expert_ffn_hidden_size", "shared_intermediate_size",
         "shared_expert_intermediate_size", "shared_experts_intermediate_size",
         "moe_shared_expert_intermediate_size", "expert_ffn_dim"),
        32,
    ),
    **dict.fromkeys(
        ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4
    ),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2
    ),
    **dict.fromkeys(("topk_group", "n_group", "num_expert_group", "n_groups", "mamba_n_groups",
                     "n_shared_experts", "num_shared_experts", "moe_num_shared_experts",
                     "first_k_dense_replace", "num_dense_layers", "zero_expert_num"), 1),
    **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "qk_head_dim": 12, "v_head_dim": 8,
       "kv_lora_rank": 16, "q_lora_rank": 24, "index_head_dim": 8, "index_n_heads": 2,
       "index_topk": 4, "rotary_dim": 4, "gated_norm_rank": 4},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
       "linear_value_head_dim": 8},
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state", "time_step_rank",
                     "mamba_dt_rank"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 12),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("sliding_window", "attention_window_size", "local_attention", "window_size",
                     "attention_chunk_size", "sliding_window_size"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len",
                     "context_length", "max_sequence_length", "max_source_positions",
                     "max_target_positions"), 64),
    **dict.fromkeys(("attn_layer_period", "expert_layer_period", "decoder_sparse_step"), 2),
    **dict.fromkeys(("attn_layer_offset", "expert_layer_offset"), 1),
    "num_nextn_predict_layers": 0,
    "type_vocab_size": 2,
    "image_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
_NEVER_NONE = ("head_dim", "num_key_value_heads")
_LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
    "num_decoder_layers", "num_encoder_layers", "num_decoder_layers",
)  # fmt: skip


def model_types(task: str) -> dict[str, str]:
    """Every model type of a task, with the name of its class."""
    names = getattr(modeling_auto, TASKS[task])
    return {key: cls if isinstance(cls, str) else cls[0] for key, cls in names.items()}


def build(task: str, model_type: str) -> nn.Module:
    """A tiny random model; raises whatever its configuration or class raises."""
    if reason := overrides(task, model_type).get("_untrainable"):
        raise ValueError(reason)
    cls = getattr(transformers, model_types(task)[model_type])
    config = tiny_config(model_type, task)
    wanted = getattr(cls, "config_class", None)
    if wanted is not None and not isinstance(config, wanted):  # a text model of a larger whole
        parts = [part for part in vars(config).values() if isinstance(part, wanted)]
        config = parts[0] if parts else config
    for name in ("pad_token_id", "decoder_start_token_id"):
        for part in (config, config.get_text_config()):
            if getattr(part, name, None) is None:
                setattr(part, name, _SIZES[name])
    torch.manual_seed(0)
    model: nn.Module = cls(config)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")  # grouped matmuls have no fp64
    return model


def tiny_config(model_type: str, task: str = "causal-lm") -> Any:
    """The default configuration, shrunk."""
    fields = {k: v for k, v in overrides(task, model_type).items() if not k.startswith("_")}
    alike = 1 if task == "sequence-classification" else 2  # their bodies are in other tasks too
    return _shrunk(CONFIG_MAPPING[model_type], fields, alike)


def overrides(task: str, model_type: str) -> dict[str, Any]:
    """What is known of this model beyond the rules."""
    return {**OVERRIDES.get(model_type, {}), **OVERRIDES.get(f"{task}/{model_type}", {})}


def dtype_of(task: str, model_type: str) -> torch.dtype:
    """fp64, where the model can run in it."""
    return getattr(torch, overrides(task, model_type).get("_dtype", "float64"))


def _shrunk(cls: Any, given: dict[str, Any], alike: int) -> Any:
    default = cls()
    fields: dict[str, Any] = {}
    held = {k: v for k, v in vars(default).items() if not k.startswith("_")}
    held |= {k: getattr(default, k, None) for k in getattr(default, "attribute_map", {})}
    for name, value in held.items():
        if hasattr(value, "to_dict"):
            fields[name] = _shrunk(type(value), given.get(name, {}), alike)
        elif name in _SIZES and (value is not None or name in _NEVER_NONE):
            fields[name] = _like(value, _SIZES[name])
        elif "drop" in name and isinstance(value, float):
            fields[name] = 0.0
        elif "vocab_size" in name and isinstance(value, int) and value > VOCABULARY:
            fields[name] = VOCABULARY
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int):
            fields[name] = min(value, VOCABULARY - 1 - len(name) % 8)
    fields |= _layers(held, alike)
    if held.get("kv_lora_rank"):  # low-rank keys and values: one kv head per head
        fields |= {"num_key_value_heads": HEADS, "head_dim": _SIZES["qk_rope_head_dim"]}
        fields = {k: v for k, v in fields.items() if k in held}
    fields |= {k: v for k, v in given.items() if not _is_nested(held.get(k))}
    mapped = getattr(default, "attribute_map", {})
    fields = {k: v for k, v in fields.items() if not _is_property(cls, mapped.get(k, k))}
    fields = {k: v for k, v in fields.items() if mapped.get(k, k) == k or mapped[k] not in fields}
    return cls(**fields)


def _is_property(cls: Any, name: str) -> bool:
    return isinstance(getattr(cls, name, None), property)


def _is_nested(value: Any) -> bool:
    return hasattr(value, "to_dict")


def _like(value: Any, size: Any) -> Any:
    """A size, repeated where the default repeats one for each layer; stages keep their own."""
    if not isinstance(value, list | tuple):
        return size
    return type(value)([size] * len(value)) if len(set(value)) == 1 else value


def _layers(held: dict[str, Any], alike: int) -> dict[str, Any]:
    """Fewer layers, among them one of every kind that the lists per layer tell apart; ``alike``
    layers if there is one kind."""
    counts = {name: held[name] for name in _LAYERS if isinstance(held.get(name), int)}
    if not counts:
        return {}
    total = held.get("num_hidden_layers", max(counts.values()))
    lists = {
        name: value
        for name, value in held.items()
        if isinstance(value, list | tuple) and len(value) == total and total > 2
    }
    seen: set[Any] = set()
    picked = []
    for layer in range(total if lists else 0):
        kinds = {(name, repr(value[layer])) for name, value in lists.items() if _names(value)}
        if kinds - seen and len(picked) < _MAX_LAYERS:
            picked.append(layer)
            seen |= kinds
    picked = picked if len(picked) > 1 else list(range(min(alike, total)))
    few = {name: type(value)(value[layer] for layer in picked) for name, value in lists.items()}
    return {**dict.fromkeys(counts, len(picked)), **few}


def _names(values: Any) -> bool:
    return len(set(map(repr, values))) < 8


def batch(task: str, model_type: str, model: nn.Module) -> dict[str, Any]:
    """Inputs and labels of a training step: two samples, the second with padding at its end."""
    given = overrides(task, model_type)
    generator = torch.Generator().manual_seed(1)
    extra = dict(given.get("_extra", {}))
    data: dict[str, Any] = {"labels": torch.tensor([0, 1])}
    data |= {name: torch.tensor(values) for name, values in given.get("_inputs", {}).items()}
    if task == "image-classification" and "_tokens" not in given:
        extra.setdefault("pixel_values", _image_shape(model.config))
    else:
        padding = given.get("_padding", 3)
        top = min(VOCABULARY, getattr(model.config, "vocab_size", None) or VOCABULARY) // 2
        ids = torch.randint(3, top, (2, given.get("_length", 12)), generator=generator)
        mask = torch.ones_like(ids)
        mask[-1, ids.shape[1] - padding :] = 0
        ids = ids.masked_fill(mask == 0, 0)
        ids[0, -1] = ids[1, -1 - padding] = _SIZES["eos_token_id"]
        if "classification" not in task:
            data["labels"] = ids.masked_fill(mask == 0, -100)
        data |= {"input_ids": ids, "attention_mask": mask}
        if "_codebooks" in given:  # a sample is one row of tokens per codebook
            count = given["_codebooks"]
            data["input_ids"] = ids.repeat_interleave(count, dim=0)
            data["labels"] = data["labels"][..., None].expand(-1, -1, count).contiguous()
    for name, shape in extra.items():
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        data[name] = values.to(dtype_of(task, model_type))
    known = inspect.signature(model.forward).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
    return {k: v for k, v in data.items() if k in known or open_ended}


def _image_shape(config: Any) -> tuple[int, int, int, int]:
    held = getattr(config, "vision_config", config)
    size = getattr(held, "image_size", None) or 32
    size = size if isinstance(size, int) else size[0]
    return 2, getattr(held, "num_channels", 3) or 3, size, size
