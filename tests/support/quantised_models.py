"""Quantised models as transformers and PEFT load them, and the plain fp64 models that say what
they must compute."""

import copy
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from tests.support import oracle

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FP4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
DOUBLE = {**NF4, "bnb_4bit_use_double_quant": True}
BYTES = {"load_in_8bit": True}


def saved_llama(
    folder: Path, *, layers: int = 1, hidden: int = 64, width: int = 192, bias: bool = False
) -> LlamaConfig:
    """A random Llama in a folder, in fp32, with grouped-query attention (4 heads on 2)."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=oracle.VOCABULARY,
        attention_bias=bias,
        mlp_bias=bias,
        pad_token_id=oracle.PADDING,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    oracle.randomise(model).save_pretrained(folder)
    return config


def quantised_llama(
    folder: Path,
    words: dict[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    targets: str | tuple[str, ...] = "all-linear",
    dropout: float = 0.0,
    **sizes: Any,
) -> nn.Module:
    """A random Llama with LoRA on a quantised base, on the CPU and in training mode."""
    saved_llama(folder, **sizes)
    if "load_in_4bit" in words:
        words = {"bnb_4bit_compute_dtype": dtype, **words}
    base = LlamaForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=BitsAndBytesConfig(**words), device_map="cpu"
    )
    torch.manual_seed(1)
    model = get_peft_model(base, oracle.lora_config(targets, dropout))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model.train()


def values_of(linear: nn.Module) -> Tensor:
    """What a quantised linear's weight means, as the quantiser itself says, in fp32."""
    weight: Any = linear.weight
    if hasattr(weight, "quant_state"):
        state = copy.deepcopy(weight.quant_state)
        state.dtype = torch.float32
        return bnb.functional.dequantize_4bit(weight.data, state)
    if hasattr(weight, "qdata"):
        return weight.dequantize()
    scales = linear.state.SCB if weight.SCB is None else weight.SCB  # type: ignore[union-attr]
    return bnb.functional.int8_vectorwise_dequant(weight.data, scales)


def dequantised(model: nn.Module) -> nn.Module:
    """The same model with plain weights of the same values, in fp64 and eager."""
    base: Any = model.get_base_model()  # type: ignore[operator]
    config = LlamaConfig.from_dict(
        {k: v for k, v in base.config.to_dict().items() if k != "quantization_config"}
    )
    config._attn_implementation = base.config._attn_implementation
    plain = get_peft_model(
        LlamaForCausalLM(config).double(), copy.deepcopy(model.peft_config["default"])
    )
    set_peft_model_state_dict(plain, get_peft_model_state_dict(model))
    with torch.no_grad():
        for name, module in plain.named_modules():
            twin = model.get_submodule(name)
            if isinstance(module, nn.Linear) and type(twin.weight) is not nn.Parameter:
                module.weight.copy_(values_of(twin))
                if module.bias is not None:
                    module.bias.copy_(twin.bias)
            else:
                for key, value in module.named_parameters(recurse=False):
                    value.copy_(twin.get_parameter(key))
    return plain.train()
