"""The shipped model, with adapters."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, set_seed

MODEL = Path(__file__).resolve().parent / "model"
RANK = 8
SPARSITY = {
    "layers.0.mlp": 0.5,
    "layers.1.mlp": 0.9,
    "layers.2.mlp": 0.9,
    "layers.3.mlp": 0.9,
    "layers.4.mlp": 0.75,
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def load_model(seed: int) -> PeftModel:
    """The shipped model in fp32 with fresh LoRA adapters (rank 16) on its attention linears."""
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS, task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def renew_adapters(model: PeftModel, seed: int) -> None:
    """Fresh adapters in the place of the trained ones: what is compiled stays."""
    set_seed(seed)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for adapter in module.active_adapters:
                module.reset_lora_parameters(adapter, init_lora_weights=True)
