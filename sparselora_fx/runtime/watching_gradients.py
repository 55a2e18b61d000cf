"""The gradients of a probed micro-batch: whether they are finite, and not all zero."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from sparselora_fx.runtime.runtime import Runtime
from sparselora_fx.watch.probe import Probe
from sparselora_fx.watch.state import WatchState


def watch_gradients(runtime: Runtime, state: WatchState) -> None:
    """Note the norm of every gradient that the coming backward makes; nothing waits for it.

    Gradients of fp16 training are scaled, and infinite now and then: they are not watched.
    """
    device = next(runtime.model.parameters()).device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
        return
    state.norms = {}
    for name, parameter in runtime.model.named_parameters():
        if parameter.requires_grad:
            hook = partial(_note, state.norms, name)
            state.handles.append(parameter.register_post_accumulate_grad_hook(hook))


def _note(norms: dict[str, Tensor], name: str, parameter: Tensor) -> None:
    if parameter.grad is not None:
        norms.setdefault(name, parameter.grad.detach().float().norm())


def read_gradients(state: WatchState) -> Probe:
    """Take the hooks off, and say what is wrong with the gradients; without faults: nothing.

    Read once, when the next call or step begins.
    """
    for handle in state.handles:
        handle.remove()
    state.handles, norms = [], dict(state.norms)
    state.norms = {}
    step = state.last or 0
    if not norms:
        return Probe(step, None, {})
    values = dict(zip(norms, torch.stack(list(norms.values())).tolist(), strict=True))
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    if broken:
        # A backward runs from the last region to the first: the last one broke first.
        where = list(dict.fromkeys(_regions_of(state, broken)))
        named = where[-1] if where else broken[-1]
        text = (
            f"{len(broken)} of {len(values)} gradients of step {step} are not finite, the "
            f"first of the backward in {named}"
        )
        return Probe(step, None, {}, [text], where[-1:] or list(state.sites))
    if not any(values.values()):
        text = f"all {len(values)} gradients of step {step} are zero, in every graph"
        return Probe(step, None, {}, [text])
    return Probe(step, None, {})


def _regions_of(state: WatchState, parameters: list[str]) -> list[str]:
    """The regions beside whose linears these parameters are, in the model's order."""
    owners: dict[str, str] = {}
    for region, sites in state.sites.items():
        for site in sites:
            owners[site.removesuffix(".base_layer")] = region
    found = [_owner(owners, name) for name in parameters]
    return [region for region in found if region is not None]


def _owner(owners: dict[str, str], parameter: str) -> str | None:
    return next((r for site, r in owners.items() if parameter.startswith(f"{site}.")), None)
