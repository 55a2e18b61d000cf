"""Sliced equals masked-dense on the device at hand, at the widths that the GPU suite times.

A step compiled by `sparselora_fx` chooses channels. The reference algorithm (eager, with exact
gradients: `benchmarks.support.reference`) then takes the same step of the same model on the same
channels. Compared: the loss, and every adapter gradient. In fp32 the difference is bounded itself;
in bf16 both steps are compared with the reference's in fp32, and ours may be that far off by a
factor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import sparselora_fx as slx
from benchmarks.support import reference
from benchmarks.support.peers import dense, random_estimator, takes
from benchmarks.support.presets import Level, Preset
from benchmarks.support.stepping import Peer
from benchmarks.support.suite_presets import preset_of

# name of a preset, dtype of the base, and the bound: in fp32 of the relative difference, in bf16 of
# our error over the eager step's own
CHECKS = (
    ("8b-math10k", torch.bfloat16, 1.5),
    ("8b-math10k", torch.float32, 1e-4),
    ("1b-default", torch.bfloat16, 1.5),
)
LAYERS = 4  # fewer are not compiled in pieces


def checks(tiny: bool, backend: str) -> Iterator[dict[str, Any]]:
    """One finding for each of `CHECKS`."""
    for name, dtype, bound in CHECKS:
        preset = replace(preset_of(name, LAYERS, tiny=tiny), dtype=dtype)
        error, where = difference(preset, backend)
        yield {
            "what": f"sliced == masked-dense, {name}, {str(dtype)[6:]}, {LAYERS} layers",
            "error": float(f"{error:.3g}"), "bound": bound, "where": where,
            "passed": error <= bound,
        }  # fmt: skip
        torch.compiler.reset()


def difference(preset: Preset, backend: str) -> tuple[float, str]:
    """The largest difference among the loss and the gradients, as `CHECKS` bounds it, and where it
    is."""
    model = dense(preset)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    estimator = random_estimator(model)
    batch = {**preset.batches(1)[0], "use_cache": False}
    options = {"verify_speed": False} if takes("verify_speed") else {}
    slx.compile(model, estimator, plan=preset.plan(), backend=backend, **options)
    with slx.record(model) as record:
        got = _step(Peer("ours", model, autocast=preset.autocast), batch)
    slx.restore(model)
    if not record.sites:
        raise RuntimeError("no linear was sliced: the check shows nothing")
    levels = _sliced(preset, record)

    def expected(autocast: torch.dtype | None) -> dict[str, Tensor]:
        shared = reference.apply(model, estimator.factors, levels, fixed=record.selections)
        found = _step(Peer("reference", model, autocast=autocast), batch)
        shared.restore()
        return found

    eager = expected(preset.autocast)
    if preset.dtype == torch.float32:
        return max((relative(got[name], value), name) for name, value in eager.items())
    model.float()
    exact = expected(None)
    return max(
        (relative(got[name], value) / max(relative(eager[name], value), 1e-3), name)
        for name, value in exact.items()
    )


def _sliced(preset: Preset, record: slx.Recording) -> list[Level]:
    """The sparsity of each layer, 0 where the compiler left a region dense."""
    regions = tuple(record.selections)
    return [
        (
            ffn if any(name.endswith(f"layers.{i}.mlp") for name in regions) else 0.0,
            attention if any(name.endswith(f"layers.{i}.self_attn") for name in regions) else 0.0,
        )
        for i, (ffn, attention) in enumerate(preset.levels())
    ]


def _step(peer: Peer, batch: dict[str, Any]) -> dict[str, Tensor]:
    peer.model.zero_grad(set_to_none=True)
    loss = peer.forward(batch)
    loss.backward()
    found = {n: p.grad for n, p in peer.model.named_parameters() if p.grad is not None}
    peer.model.zero_grad(set_to_none=True)
    return {"loss": loss.detach(), **found}


def relative(got: Tensor, expected: Tensor) -> float:
    """``|got - expected| / |expected|``; NaN counts as infinite."""
    error = float((got.double() - expected.double()).norm() / expected.double().norm())
    return error if error == error else float("inf")
