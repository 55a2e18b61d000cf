"""What the general rules of `tiny_models` cannot know: fields of single configurations.

Names with a leading underscore are about the batch: ``_length`` tokens, ``_padding`` of them in the
last sample, ``_dtype`` where fp64 cannot run (masks of the smallest number, made in fp32),
``_extra`` further random inputs with their shapes, ``_inputs`` further inputs with their values,
``_tokens`` where images are tokens, ``_codebooks`` rows of tokens a sample, ``_grad_inputs`` where
a model trains only with gradients at its input, ``_untrainable`` why it cannot be trained alone.
"""

from __future__ import annotations

from typing import Any

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_QSA = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}  # fmt: skip
_ASSISTANT = "it has no loss, and reads the keys and values of another model"
_SWIN = {"image_size": 64, "window_size": 4, "depths": [1, 1], "num_heads": [2, 4]}

# model type, or "task/model type" -> fields; a nested configuration is a nested dict.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "vocab_size": 260, "patcher_config": {"vocab_size": 260}, "_length": 16,
        "encoder_hash_byte_group_vocab": 160, "encoder_hash_byte_group_size": [3, 4],
        "global_config": {"hidden_size": 96, "num_attention_heads": 12},
        "decoder_config": {"hidden_size_global": 96},
    },
    "canine": {"_dtype": "float32"},
    "codegen": {"n_embd": 64, "n_head": 8, "n_inner": 80},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
        "num_hidden_layers": 2,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "moe_intermediate_size": 32,
              "n_shared_experts": 1},
    "dots3_note": {
        "audio_config": {"adapter_input_size": 48, "adapter_out_dim": 48},
        "vision_config": {"adapter_in_dim": 48, "adapter_out_dim": 48},
    },
    "donut-swin": _SWIN,
    "efficientnet": {"hidden_dim": 2560},
    "esm": {"vocab_size": 160},
    "esmc": {"num_key_value_heads": 6},
    "falcon_h1": {"mamba_d_ssm": 96},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [80] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "fsmt": {"_dtype": "float32"},
    "git": {"_extra": {"pixel_values": (2, 3, 32, 32)}, "vision_config": {"patch_size": 16}},
    "gemma4_assistant": {"_untrainable": _ASSISTANT},
    "gemma4_unified_assistant": {"_untrainable": _ASSISTANT},
    "imagegpt": {"_tokens": True},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "inkling2_text": {"_dtype": "float32"},
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "led": {"_padding": 0, "_dtype": "float32"},
    "longformer": {"_padding": 0, "_dtype": "float32"},
    "mamba2": {"num_heads": 12, "head_dim": 8},
    "mimo_v2_flash": {"num_attention_heads": 12},
    "mistral4": {"head_dim": 12},
    "mobilebert": {"intra_bottleneck_size": 48},
    "mobilevitv2": {"image_size": 64},
    "mra": {"_dtype": "float32"},
    "neomme": {"head_dim": 16},
    "causal-lm/musicgen": {"_codebooks": 4},
    "causal-lm/musicgen_melody": {"_codebooks": 4},
    "nemo_speechlm": {
        "audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 48}}}
    },
    "perceiver": {"_length": 64},
    "pp_lcnet": {"_untrainable": "no loss"},
    "prophetnet": {"_padding": 0, "_dtype": "float32"},
    "qwen4_exp": {"text_config": _QSA},
    "qwen4_exp_text": _QSA,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "attn_layers": ["local", "local"], "axial_pos_shape": (4, 4),
        "axial_pos_embds_dim": (16, 32),
        "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 4, "_length": 16,
        "_grad_inputs": True,
    },
    "causal-lm/reformer": {"is_decoder": True},
    "squeezebert": {"embedding_size": 48},
    "shieldgemma2": {"_untrainable": "its probabilities have no loss"},
    "siglip2": {
        "_extra": {"pixel_values": (2, 4, 768)},
        "_inputs": {"pixel_attention_mask": [[1] * 4] * 2, "spatial_shapes": [[2, 2]] * 2},
    },
    "swin": _SWIN,
    "voxtral_realtime": {"_extra": {"encoder_inputs_embeds": (2, 48, 48)}},
    "xglm": {"_dtype": "float32"},
    "xlstm": {"chunk_size": 16, "_length": 16, "mode": "train"},
    "xmod": {"languages": ("en_XX", "de_DE"), "default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 96, "attention_head_dim": 16,
    },
    "zamba2": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 96, "attention_head_dim": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
