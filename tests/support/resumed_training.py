"""What tests share: resumed training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import sparselora_fx as slx
from tests.support import oracle


def trainer_of(model: Any, folder: Path, callback: slx.SparsityCallback | None = None) -> Trainer:
    data = [
        {key: value[0] for key, value in oracle.batch(1, 12, padding=0, seed=seed).items()}
        for seed in range(24)
    ]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=2, save_steps=1,
        gradient_accumulation_steps=2, report_to=[], logging_steps=1, seed=7, use_cpu=True,
        disable_tqdm=True, learning_rate=1e-2, lr_scheduler_type="constant",
    )  # fmt: skip
    callback = callback or slx.SparsityCallback()
    return Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback])


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
