"""What tests share: trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments

import sparselora_fx as slx
from tests.support import oracle


def _trainer(model: Any, folder: Path, steps: int = 6) -> Trainer:
    data = [
        {key: value[0] for key, value in oracle.batch(1, 12, padding=0, seed=seed).items()}
        for seed in range(24)
    ]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, save_steps=3,
        gradient_accumulation_steps=2, report_to=[], logging_steps=1, seed=7, use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    return Trainer(
        model=model, args=arguments, train_dataset=data, callbacks=[slx.SparsityCallback()]
    )
