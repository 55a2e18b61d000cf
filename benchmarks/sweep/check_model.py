"""Check one tiny model: is it trained, what is rewritten, and is that right?"""

from __future__ import annotations

import contextlib
import inspect
import re
import traceback
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import sparselora_fx as slx
from benchmarks.sweep import tiny_models
from sparselora_fx.runtime.runtime import get_runtime

SPARSITY = 0.5
BOUND = 1e-9
# Some models compute parts in fp32 whatever their dtype; their sums agree to fp32 only.
FP32_BOUND = 1e-4
_TIMES_NOISE = 20
# PEFT refuses an adapter there: the fused kernels of these models read the weight themselves.
_NO_OUT_PROJ = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
_ATTENTION = re.compile(r"attn|attend|attention")
_STATE = re.compile(r"mamba|ssm|recurrent|temporal_block|linear_attn|conv|lstm|delta|rnn|mixer|lru")
_OTHER = re.compile(
    r"router|gate$|gate\.wg|indexer|pooler|classifier|score|lm_head|embed|head$|hyper|per_layer|altup"
    r"|visual|_hc\.|bias$|scale$|coefs|adapter"
)


@dataclass
class Step:
    """Loss and adapter gradients of one training step."""

    loss: Tensor
    gradients: dict[str, Tensor]


def check(
    task: str, model_type: str, *, backend: str = "aot_eager", quick: bool = False
) -> dict[str, Any]:
    """One row of the table.

    What the model itself cannot do is under ``error`` or, if it is torch.compile that cannot, under
    ``plain``; what this library fails at is under ``sparse``. A quick check leaves plain
    `torch.compile` out where the sparse step succeeds and the step of sparsity 0 is the model's own
    eager one, bit for bit: then it trains, and to the same bits.
    """
    warnings.filterwarnings("ignore")
    row: dict[str, Any] = {"class": tiny_models.model_types(task)[model_type], "backend": backend}
    try:
        dtype = tiny_models.dtype_of(task, model_type)
        base = tiny_models.build(task, model_type).to(dtype).train()
        data = tiny_models.batch(task, model_type, base)
        row["experts"] = _expert_stacks(base)
        model = adapted(base, plain_linears(base, data))
        if tiny_models.overrides(task, model_type).get("_grad_inputs"):
            model.enable_input_require_grads()  # type: ignore[operator]
        with called(model) as used:
            eager = step(model, data)
        if not all(torch.isfinite(t).all() for t in (eager.loss, *eager.gradients.values())):
            return row | {"error": "loss or gradients of the model's own step are not finite"}
    except Exception as error:
        return row | {"error": said(error)}
    try:
        row |= _sparse(model, data, backend, used)
    except Exception as error:
        row |= {"sparse": said(error), "right": None}
    if quick and "sparse" not in row and _zero(model, data, backend, eager):
        return row | {"zero": True}
    try:
        plain = compiled_step(model, data, backend)
        row["plain"] = "trains"
        row["plain_difference"] = worst(plain, eager)[0]
    except Exception as error:
        return row | {"plain": said(error)}
    if "sparse" not in row:
        row["zero"] = _zero(model, data, backend, plain)
    return row


def plain_linears(base: nn.Module, data: dict[str, Any]) -> dict[str, nn.Module]:
    """The linears that PEFT can wrap: what they return is their input times their weight (a router
    that is a linear by class may return a tuple, a linear by groups another shape)."""
    linears = {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    odd: set[nn.Module] = set()

    def look(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        rows, columns = module.weight.shape[:: -1 if isinstance(module, Conv1D) else 1]  # type: ignore[operator,union-attr]
        known = isinstance(out, Tensor) and args and args[0].shape == (*out.shape[:-1], columns)
        if not known or out.shape[-1] != rows:
            odd.add(module)

    handles = [module.register_forward_hook(look) for module in linears.values()]
    try:
        with torch.no_grad():
            base(**data, **no_cache(base))
    finally:
        for handle in handles:
            handle.remove()
    return {name: module for name, module in linears.items() if module not in odd}


def adapted(base: nn.Module, linears: dict[str, nn.Module]) -> nn.Module:
    """LoRA on these linears of a model but its output head; no term is zero by accident."""
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    names = [n for n, m in linears.items() if m is not head]
    names = [n for n in names if not any(p.requires_grad is False for p in linears[n].parameters())]
    conv = any(isinstance(linears[n], Conv1D) for n in names)
    if base.config.model_type in _NO_OUT_PROJ:
        names = [n for n in names if not n.endswith("out_proj")]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=names, fan_in_fan_out=conv)
    model = get_peft_model(base, config)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name.endswith("bias"):
                parameter.normal_(std=0.05)
            elif "lora" not in name and parameter.dim() >= 2:
                parameter.normal_(std=0.08)
            elif "norm" in name:
                parameter.uniform_(0.7, 1.3)
    return model.to(base.dtype).train()


def step(model: nn.Module, data: dict[str, Any]) -> Step:
    """One forward and backward."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    loss = model(**data, **no_cache(model)).loss
    loss.backward()
    gradients = {
        name: parameter.grad.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return Step(loss.detach().clone(), gradients)


def no_cache(model: nn.Module) -> dict[str, bool]:
    """``use_cache=False`` for the models that know it."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    known = inspect.signature(base.forward).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
    takes = "use_cache" in known or (open_ended and hasattr(base.config, "use_cache"))
    return {"use_cache": False} if takes else {}


def compiled_step(model: nn.Module, data: dict[str, Any], backend: str) -> Step:
    """The step under plain `torch.compile`."""
    torch.compiler.reset()
    model.__dict__["forward"] = torch.compile(model.forward, backend=backend)
    try:
        return step(model, data)
    finally:
        del model.__dict__["forward"]
        torch.compiler.reset()


def _sparse(model: nn.Module, data: dict[str, Any], backend: str, used: set[str]) -> dict[str, Any]:
    torch.compiler.reset()
    plan = slx.SparsityPlan(SPARSITY, tokens="all", start_step=0, channel_multiple=1)
    estimator = estimator_of(model)
    slx.compile(model, estimator, plan=plan, backend=backend)
    try:
        with slx.record(model) as record:
            got = step(model, data)
        found = _regions(model, used)
    finally:
        slx.restore(model)
    with masked(model, record):
        expected = step(model, data)
        error, where = worst(got, expected)
        noise = _noise(model, data, expected) if error > BOUND else 0.0
    bound = max(BOUND, min(_TIMES_NOISE * noise, FP32_BOUND))
    right = error <= bound and got.gradients.keys() == expected.gradients.keys()
    return found | {"difference": error, "where": where, "noise": noise, "right": right}


def _zero(model: nn.Module, data: dict[str, Any], backend: str, plain: Step) -> bool:
    """Whether sparsity 0 gives what another step gave, bit for bit."""
    torch.compiler.reset()
    estimator = estimator_of(model)
    slx.compile(model, estimator, plan=slx.SparsityPlan(0.0, start_step=0), backend=backend)
    try:
        got = step(model, data)
    finally:
        slx.restore(model)
    same = got.gradients.keys() == plain.gradients.keys() and torch.equal(got.loss, plain.loss)
    return same and all(torch.equal(g, plain.gradients[n]) for n, g in got.gradients.items())


def estimator_of(model: nn.Module) -> slx.SVDEstimator:
    """Factors of rank 4, or less where no weight is that large."""
    linears = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    sizes = [min(weight.shape) for weight in linears if not weight.requires_grad]
    return slx.SVDEstimator.build(model, rank=min(4, max(sizes, default=4)), progress=False)


@contextlib.contextmanager
def called(model: nn.Module) -> Iterator[set[str]]:
    """Names of the modules that run in the block (a decoder without an encoder has idle ones)."""
    names: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: names.add(name))
        for name, module in model.named_modules()
    ]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


def _regions(model: nn.Module, used: set[str]) -> dict[str, Any]:
    """Rewritten and all frozen linears of each kind that ran, and why the others are dense."""
    state = get_runtime(model)
    done: dict[str, int] = defaultdict(int)
    total: dict[str, int] = defaultdict(int)
    reasons: dict[str, dict[str, list[str]]] = {}
    regions = set()
    for weight in state.frozen:
        if weight.name not in used:
            continue
        kind = kind_of(weight.canonical, weight.out_features)
        total[kind] += 1
        seen = state.seen.get(weight.name)
        if seen is not None and seen.report.role != "dense":
            done[kind] += 1
            regions.add(f"{seen.region} [{seen.kind}]")
            continue
        reason = seen.report.reason if seen is not None else "not in any compiled graph"
        reasons.setdefault(kind, {}).setdefault(reason, []).append(weight.canonical)
    kinds = {kind: [done[kind], count] for kind, count in total.items()}
    return {
        "linears": kinds,
        "attentions": _attentions(model, used),
        "regions": sorted(regions),
        "dense": reasons,
        "graphs": state.graphs,
    }


def _attentions(model: nn.Module, used: set[str]) -> list[int]:
    """How many attention modules have an attention region, of how many there are."""
    state = get_runtime(model)
    found: dict[str, bool] = {}
    for weight in state.frozen:
        name = weight.canonical
        if weight.name in used and kind_of(name, weight.out_features) == "attention":
            group = attention_module(name)
            seen = state.seen.get(weight.name)
            sliced = seen is not None and seen.kind == "attention"
            found[group] = found.get(group, False) or sliced
    return [sum(found.values()), len(found)]


def attention_module(name: str) -> str:
    """The outermost module in a name that is an attention by its own name."""
    parts = name.split(".")
    end = next(i for i, part in enumerate(parts) if _ATTENTION.search(part.lower())) + 1
    numbered = end < len(parts) and parts[end].isdigit()
    return ".".join(parts[: end + numbered])


def kind_of(name: str, out_features: int) -> str:
    """What a linear is part of, by its name: only the table of results needs to know."""
    parts = name.lower().split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    inside = ".".join(parts[first - 1 :])
    if first == 0 or _OTHER.search(inside) or out_features < 3:
        return "other"
    if "experts" in inside and "shared" not in inside:
        return "experts"
    if _STATE.search(inside):
        return "state"
    return "attention" if _ATTENTION.search(inside) else "ffn"


def _expert_stacks(model: nn.Module) -> int:
    """Weights that hold one matrix per expert: no linear, so they stay dense."""
    return sum(
        p.dim() == 3 and "conv" not in n and min(p.shape) > 1 for n, p in model.named_parameters()
    )


@contextlib.contextmanager
def masked(model: nn.Module, record: slx.Recording) -> Iterator[None]:
    """Let frozen linears compute the masked-dense step: producers without the other rows, consumers
    without the other columns. Biases and LoRA branches are untouched."""
    handles = []
    for name, (role, chosen) in record.sites.items():
        module = model.get_submodule(name)
        weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
        mask = torch.zeros(weight.shape[0 if role == "out" else 1], dtype=weight.dtype)
        mask[chosen] = 1
        if role == "in":
            hook: Any = lambda module, args, mask=mask: (args[0] * mask.to(args[0].dtype),)  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
        else:
            bias = getattr(module, "bias", None)
            handles.append(module.register_forward_hook(_row_mask(mask, bias)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _row_mask(mask: Tensor, bias: Tensor | None) -> Any:
    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        kept = out * mask.to(out.dtype)
        return kept if bias is None else kept + bias * (1 - mask)

    return hook


def _noise(model: nn.Module, data: dict[str, Any], expected: Step) -> float:
    """How far the step moves when adapters change by their last digit: large where a model computes
    in fp32 inside."""
    trained = [p for p in model.parameters() if p.requires_grad]
    unit = 1e-15 if trained[0].dtype == torch.float64 else 1e-7
    with torch.no_grad():
        kept = [p.clone() for p in trained]
        for p in trained:
            p.mul_(1 + unit * torch.randn_like(p))
        torch.manual_seed(7)
    moved = step(model, data)
    with torch.no_grad():
        for p, value in zip(trained, kept, strict=True):
            p.copy_(value)
    return worst(moved, expected)[0]


def worst(got: Step, expected: Step) -> tuple[float, str]:
    """The largest relative difference among the loss and the gradients that both have."""
    pairs = {n: (got.gradients[n], g) for n, g in expected.gradients.items() if n in got.gradients}
    pairs["loss"] = (got.loss, expected.loss)
    scale = max((float(g.double().norm()) for _, g in pairs.values()), default=1.0)
    return max((_difference(a, b, scale), name) for name, (a, b) in pairs.items())


def _difference(got: Tensor, expected: Tensor, scale: float) -> float:
    """Relative to the tensor, or to a billionth of the largest gradient if the tensor is smaller
    than that (an adapter that hardly matters has no digits to compare)."""
    got, expected = got.double(), expected.double()
    floor = max(1e-9 * scale, 1e-30)
    error = float((got - expected).norm() / expected.norm().clamp(min=floor))
    return error if error == error else float("inf")


def said(error: BaseException) -> str:
    """The kind of an error, its first words, and where it was raised."""
    text = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "sparselora_fx" in f.filename or "passes/" in f.filename]
    where = f" [{ours[-1].name}]" if ours else ""
    return f"{type(error).__name__}: {text[:160]}{where}"
