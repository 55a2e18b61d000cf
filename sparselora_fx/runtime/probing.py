"""One dense forward beside a sparse step: the loss it would have had, and by region what the
skipped channels would have added.

Everything here runs in plain PyTorch, without gradients: nothing is compiled for it. A region is
judged on what it reads in the *dense* run: there it runs a second time, with the channels set to
zero that the sparse step left out. So the errors of earlier regions are not counted against it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparselora_fx._torch import in_backward
from sparselora_fx.compiler.report import GraphReport
from sparselora_fx.model.frozen_weights import FrozenWeight, canonical_path
from sparselora_fx.model.preserve import RandomState, kept_buffers, kept_random_numbers
from sparselora_fx.runtime.masking import is_grid, maskable, masked
from sparselora_fx.runtime.outcomes import common_module
from sparselora_fx.runtime.runtime import Runtime

_REENTRANT = "None of the inputs have requires_grad"


@dataclass
class Chosen:
    """What a sparse step chose in one region: by frozen linear, the role and the kept channels."""

    where: str  # the region's module
    kind: str
    sites: dict[str, tuple[str, Tensor]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The region's name for people, and in a plan."""
        return canonical_path(self.where)


@dataclass
class Choices:
    """A recorder of the choices of one call, which stay on their device.

    A region that is computed several times in a call is left out: its module has no one choice.
    """

    regions: dict[str, Chosen] = field(default_factory=dict)
    repeated: set[str] = field(default_factory=set)

    def add(
        self,
        report: GraphReport,
        args: tuple[object, ...],
        extra: Sequence[Tensor],
        runtime: Runtime,
    ) -> None:
        """Take over what one graph chose; see `Runtime.recorders`."""
        if in_backward():
            return
        for region in report.regions:
            names = [runtime.name_of(args[site.weight]) for site in region.sites]
            known = [name for name in names if name is not None]
            chosen = Chosen(common_module(known), region.kind)
            for name, site in zip(names, region.sites, strict=True):
                if name is not None and site.rows is not None:
                    chosen.sites[name] = (site.role, extra[site.rows].detach().clone())
            key = chosen.name
            if key in self.regions and self.regions[key].kind != chosen.kind:
                key = f"{key} [{chosen.kind}]"
            if key in self.regions:
                self.repeated.add(key)
            self.regions[key] = chosen


@dataclass
class DenseRun:
    """What the dense forward gave: the model's output, errors by region, and the regions whose
    output is not finite when sparse, or also when dense."""

    output: object = None
    errors: dict[str, float] = field(default_factory=dict)
    broken_sparse: list[str] = field(default_factory=list)
    broken_dense: list[str] = field(default_factory=list)


def run_dense(
    runtime: Runtime,
    forward: Callable[[], object],
    choices: Choices,
    sparse: Tensor | None,
    state: RandomState,
    samples: int,
) -> DenseRun:
    """Run the model's own forward, and each region on what it reads there a second time, masked.

    Args:
        forward: the micro-batch's call of the model's original forward.
        sparse: bool[B, L], the tokens that were sparse; None: all.
        state: random numbers as they stood when the sparse call began.
        samples: so many tokens are compared.
    """
    done = DenseRun()
    found: dict[str, list[Tensor]] = {}
    usable = {
        name: chosen
        for name, chosen in choices.regions.items()
        if name not in choices.repeated and maskable(runtime, chosen.sites)
    }
    ours = {id(buffer) for buffer in runtime.attached.own_buffers()}
    with (
        kept_random_numbers(runtime.model),
        kept_buffers(runtime.model, ours),
        torch.no_grad(),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message=_REENTRANT)
        tokens = _sampled(sparse, samples)
        handles = [
            handle
            for name, chosen in usable.items()
            for handle in _watch_region(runtime, name, chosen, sparse, tokens, state, found)
        ]
        state.put()
        try:
            done.output = forward()
        finally:
            for handle in handles:
                handle.remove()
    _read(found, done)
    return done


def _read(found: Mapping[str, list[Tensor]], done: DenseRun) -> None:
    """All errors in one read from the device."""
    if not found:
        return
    parts = [torch.stack(three) for three in found.values()]
    rows = torch.stack([part.to(parts[0].device) for part in parts])
    for name, (error, sparse_ok, dense_ok) in zip(found, rows.tolist(), strict=True):
        done.errors[name] = error
        if not dense_ok:
            done.broken_dense.append(name)
        elif not sparse_ok:
            done.broken_sparse.append(name)


def _sampled(sparse: Tensor | None, samples: int) -> Tensor | None:
    """Flat indices of evenly spaced sparse tokens; None where every token is sparse."""
    if sparse is None:
        return None
    flat = sparse.flatten().nonzero()[:, 0]
    if len(flat) <= samples:
        return flat
    places = torch.arange(samples, device=flat.device) * len(flat) // samples
    return flat[places]


def _watch_region(
    runtime: Runtime,
    name: str,
    chosen: Chosen,
    sparse: Tensor | None,
    tokens: Tensor | None,
    state: RandomState,
    found: dict[str, list[Tensor]],
) -> Iterator[RemovableHandle]:
    """Hooks on a region's module: note the random numbers, and run it again behind itself."""
    module = runtime.model.get_submodule(chosen.where)
    states: list[RandomState] = []
    inside = [False]
    weights = {w.name: w for w in runtime.frozen}

    def before(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if not inside[0]:
            states.append(state.now())

    def after(
        module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object
    ) -> None:
        if inside[0]:
            return
        entered = states.pop()
        dense = _first_tensor(output)
        if dense is None or name in found or not _plain((args, kwargs)):
            return
        inside[0], later = True, entered.now()
        try:
            pair = _both(module, args, kwargs, dense, chosen, weights, sparse, tokens, entered)
        finally:
            inside[0] = False
            later.put()
        found[name] = _compared(*pair)

    yield module.register_forward_pre_hook(before, with_kwargs=True)
    yield module.register_forward_hook(after, with_kwargs=True)


def _both(
    module: nn.Module,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    dense: Tensor,
    chosen: Chosen,
    weights: Mapping[str, FrozenWeight],
    sparse: Tensor | None,
    tokens: Tensor | None,
    entered: RandomState,
) -> tuple[Tensor, Tensor]:
    """The dense and the masked output at the sampled tokens, ``[tokens, D]`` each."""
    gathered = chosen.kind == "ffn" and not kwargs and len(args) == 1
    if gathered and tokens is not None and is_grid(args[0], sparse) and is_grid(dense, sparse):
        # A feed-forward works token by token: the sampled ones are enough.
        args = (_tensor(args[0]).flatten(0, 1)[tokens][None],)
        entered.put()
        dense = _tensor(module(*args))
        sparse = tokens = None
    entered.put()
    with masked(chosen.sites, weights, sparse):
        sliced = _tensor(module(*args, **kwargs))
    picked = [t.flatten(0, -2) for t in (dense, sliced)]
    if tokens is not None and is_grid(dense, sparse):
        picked = [t[tokens] for t in picked]
    return picked[0], picked[1]


def _compared(dense: Tensor, masked: Tensor) -> list[Tensor]:
    """The relative error, and whether the masked and the dense output are finite."""
    dense, masked = dense.float(), masked.float()
    error = (masked - dense).norm() / dense.norm().clamp(min=1e-30)
    return [error, masked.isfinite().all().float(), dense.isfinite().all().float()]


def _first_tensor(output: object) -> Tensor | None:
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) and first.dim() >= 2 else None


def _tensor(output: object) -> Tensor:
    found = _first_tensor(output)
    assert found is not None, "a module that returned a tensor returns none the second time"
    return found


def _plain(value: object) -> bool:
    """Whether arguments hold tensors and plain values only: nothing that a second run changes, as
    it would a KV cache."""
    if isinstance(value, tuple | list):
        return all(map(_plain, value))
    if isinstance(value, Mapping):
        return type(value) is dict and all(map(_plain, value.values()))
    return value is None or isinstance(value, Tensor | bool | int | float | str)
