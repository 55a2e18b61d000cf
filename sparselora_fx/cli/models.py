"""A model, its data and its estimator, as a configuration asks for them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparselora_fx.cli.config import Config, ConfigError, ModelSection
from sparselora_fx.cli.data import encode, read_records
from sparselora_fx.estimator.svd_estimator import SVDEstimator
from sparselora_fx.user.compile import compile
from sparselora_fx.watch.settings import Watch

_MULTIPLE = 16  # lengths are padded to multiples: fewer sizes, fewer graphs


@dataclass
class Loaded:
    """A PEFT model in training mode, its tokenizer, and its encoded training data."""

    config: Config
    model: nn.Module
    tokenizer: Any
    data: list[dict[str, list[int]]]

    def collator(self) -> Any:
        """Pads a list of records to a batch."""
        from transformers import DataCollatorForSeq2Seq

        return DataCollatorForSeq2Seq(self.tokenizer, pad_to_multiple_of=_MULTIPLE)

    def batches(self, count: int) -> Iterator[dict[str, Any]]:
        """The first batches of the training data, on the model's device."""
        collate, size = self.collator(), self.config.train.batch_size
        device = next(self.model.parameters()).device
        for start in range(0, min(len(self.data), count * size), size):
            batch = collate(self.data[start : start + size])
            yield {key: value.to(device) for key, value in batch.items()}

    def compile(self, estimator: SVDEstimator, backend: str | None = None) -> nn.Module:
        """Compile the model as the configuration says."""
        options = dict(vars(self.config.compile))
        options["backend"] = backend or options["backend"]
        section = self.config.watch
        watch = None if section.mode == "off" else Watch(**vars(section))
        return compile(self.model, estimator, plan=self.config.plan, watch=watch, **options)


def load(config: Config) -> Loaded:
    """Load everything from local files. Raises `ConfigError` with the key that is at fault."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer

    records = read_records(config.data.train)
    section = config.model
    if not Path(section.path).is_dir():
        raise ConfigError(f"model.path: {section.path!r} is no folder; give a local model's")
    options = {"local_files_only": True, "trust_remote_code": section.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(section.path, **options)
        options |= _quantisation(section)
        base = AutoModelForCausalLM.from_pretrained(section.path, dtype=section.dtype, **options)
    except (OSError, ValueError, ImportError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"model.path: cannot load {section.path!r}: {first}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    quantised = section.quantisation != "none"
    if quantised:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    torch.manual_seed(config.train.seed)
    targets: Any = [name.strip() for name in config.lora.targets.split(",")]
    targets = "all-linear" if targets == ["all-linear"] else targets
    lora = LoraConfig(
        r=config.lora.rank, lora_alpha=config.lora.alpha, lora_dropout=config.lora.dropout,
        target_modules=targets, task_type="CAUSAL_LM",
    )  # fmt: skip
    try:
        model = get_peft_model(base, lora)
    except ValueError as error:
        raise ConfigError(f"lora.targets: {error}") from error
    if torch.cuda.is_available() and not quantised:
        model.to("cuda")
    return Loaded(config, model.train(), tokenizer, encode(records, tokenizer, config.data))


def _quantisation(section: ModelSection) -> dict[str, Any]:
    """What `from_pretrained` is told of a quantised base; nothing of a plain one."""
    if section.quantisation == "none":
        return {}
    from transformers import BitsAndBytesConfig

    place = {"": 0} if torch.cuda.is_available() else "cpu"
    kind, _, double = section.quantisation.partition("-")
    if kind == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": place}
    dtype = "bfloat16" if section.dtype == "auto" else section.dtype
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=bool(double),
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": place}


def estimator_of(loaded: Loaded, *, progress: bool) -> SVDEstimator:
    """The estimator of a configuration: from its file, or built."""
    section = loaded.config.estimator
    if section.file:
        return SVDEstimator.load(section.file)
    calibration = list(itertools.islice(loaded.batches(section.calibration), section.calibration))
    return SVDEstimator.build(
        loaded.model, section.rank, calibration=calibration or None, progress=progress
    )
