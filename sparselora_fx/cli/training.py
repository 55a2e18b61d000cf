"""``sparselora-fx train``: one YAML in; an adapter, a report and the costs out."""

from __future__ import annotations

import importlib.util
import json
import re
import time
from pathlib import Path
from typing import Any

from sparselora_fx.cli.config import Config, ConfigError
from sparselora_fx.cli.models import Loaded, estimator_of, load
from sparselora_fx.runtime.runtime import get_runtime
from sparselora_fx.runtime.step_cost import traced_flops, verified_times
from sparselora_fx.runtime.tracing import trace
from sparselora_fx.user.cost import bill
from sparselora_fx.user.explain import explain, explain_trace
from sparselora_fx.user.explanation import Explanation
from sparselora_fx.user.report import write_report


def train(config: Config, *, resume: bool, progress: bool) -> dict[str, Any]:
    """Fine-tune as the configuration says.

    Writes into its ``output``: ``adapter/`` (a standard PEFT adapter), ``report.html``,
    ``explain.txt``, ``explain.json`` and ``costs.json``, which is also returned.

    Args:
        resume: go on from the last checkpoint in ``output``.
        progress: show progress bars.

    Raises:
        ConfigError: something that the configuration names is not there, or there is no checkpoint
            to resume from.
    """
    checkpoint = _last_checkpoint(Path(config.output)) if resume else None
    began = time.perf_counter()
    loaded = load(config)
    after_load = time.perf_counter()
    estimator = estimator_of(loaded, progress=progress)
    after_estimate = time.perf_counter()
    model: Any = loaded.compile(estimator)  # a PEFT model, which can save itself
    trainer = _trainer(loaded, progress=progress)
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    ended = time.perf_counter()
    folder = Path(config.output)
    model.save_pretrained(folder / "adapter")
    loaded.tokenizer.save_pretrained(folder / "adapter")
    # What ran, and what a step on the first batch would be: the latter has the FLOPs.
    traced = trace(get_runtime(model), next(loaded.batches(1)), texts=True)
    runtime = traced.runtime
    said, ahead = explain(model), explain_trace(runtime, traced)
    write_report(ahead, traced, folder / "report.html")
    worth = ahead.worth | {"sparse_tokens": said.worth["sparse_tokens"]}
    costs = {
        "output": str(folder / "adapter"),
        "steps": int(trainer.state.global_step),
        "resumed_from": None if checkpoint is None else checkpoint.name,
        "loss": round(float(result.training_loss), 6),
        "seconds": {
            "loading": round(after_load - began, 3),
            "estimator": round(after_estimate - after_load, 3),
            "training": round(ended - after_estimate, 3),
            "of that compiling": round(worth["compile_seconds"] or 0.0, 3),
        },
        "worth": worth,
        "cost": bill(runtime, traced_flops(traced), verified_times(runtime)).to_json(),
        "verdict": worth["verdict"],
    }
    _write(folder, said, costs)
    return costs


def _write(folder: Path, said: Explanation, costs: dict[str, Any]) -> None:
    """What ran, for people and programs, and what it cost."""
    (folder / "explain.txt").write_text(f"{said}\n", encoding="utf-8")
    (folder / "explain.json").write_text(said.to_json() + "\n", encoding="utf-8")
    (folder / "costs.json").write_text(json.dumps(costs, indent=1) + "\n", encoding="utf-8")


def _last_checkpoint(folder: Path) -> Path:
    numbered = [
        (int(found[1]), path)
        for path in folder.glob("checkpoint-*")
        if (found := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    if not numbered:
        raise ConfigError(
            f"--resume: {str(folder)!r} holds no checkpoint; train with train.save_steps set first"
        )
    return max(numbered)[1]


def _trainer(loaded: Loaded, *, progress: bool) -> Any:
    import torch
    from transformers import Trainer, TrainingArguments

    from sparselora_fx.user.trainer import SparsityCallback

    section = loaded.config.train
    steps = section.steps or _steps(loaded)
    arguments = TrainingArguments(
        loaded.config.output,
        max_steps=steps,
        per_device_train_batch_size=section.batch_size,
        gradient_accumulation_steps=section.accumulation,
        learning_rate=section.learning_rate,
        lr_scheduler_type=section.schedule,
        warmup_steps=round(section.warmup_ratio * steps),
        weight_decay=section.weight_decay,
        bf16=section.precision == "bf16",
        use_cpu=not torch.accelerator.is_available(),  # which alone lets bf16 run on a CPU
        gradient_checkpointing=section.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=section.logging_steps,
        save_strategy="steps" if section.save_steps else "no",
        save_steps=section.save_steps or 500,
        seed=section.seed,
        report_to="tensorboard" if importlib.util.find_spec("tensorboard") else "none",
        disable_tqdm=not progress,
    )
    return Trainer(
        loaded.model, arguments, loaded.collator(), loaded.data, callbacks=[SparsityCallback()]
    )


def _steps(loaded: Loaded) -> int:
    """Optimizer steps in the epochs asked for."""
    section = loaded.config.train
    batch = section.batch_size * section.accumulation
    return max(1, round(section.epochs * -(-len(loaded.data) // batch)))
