"""What tests share: rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sparselora_fx.analysis import padding_proof
from sparselora_fx.analysis.token_liveness import LiveRows

REAL = ("real tokens",)
BATCH, LENGTH, WIDTH, WORDS = 2, 5, 6, 11
SHOWN = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
Function = Callable[..., Tensor]


def captured(fn: Function, *args: Tensor) -> tuple[fx.GraphModule, list[Any]]:
    """The graph that Dynamo makes of a call, and its inputs."""
    found: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        found.append((gm, inputs))
        return gm.forward

    torch.compiler.reset()
    torch.compile(fn, backend=backend, fullgraph=True)(*args)
    return found[0]


def random(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


W, HEAD, BIAS = random(WIDTH, WIDTH), random(WORDS, WIDTH), random(2 * BATCH, 1, LENGTH)


def additive(mask: Tensor) -> Tensor:
    """``[B, 1, L, L]``: 0, or a large negative number for later tokens and for padding."""
    shown = mask[:, None, None, :] & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    return torch.where(shown, 0.0, -1e30).to(torch.float64)


def heads(x: Tensor) -> list[Tensor]:
    return [F.linear(x, w).view(BATCH, LENGTH, 2, 3).transpose(1, 2) for w in (W, W.mT, W @ W)]


def written_with(change: Callable[[Tensor, Tensor], Tensor]) -> Function:
    """Attention written out; ``change`` makes masked scores of scores and the mask."""

    def attend(x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = heads(x)
        return change(q @ k.mT, mask).softmax(-1) @ v

    return attend


EARLIER = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


def proves(fn: Function, x: Tensor, mask: Tensor, labels: Tensor) -> bool:
    """Whether no row of padding in x is found to reach the loss."""

    def call(x: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        return loss_of(fn, x, attention_mask, labels) + 0 * attention_mask.sum()

    gm, inputs = captured(call, x, mask, labels)
    arguments = {"attention_mask": mask, "labels": labels}
    placeholders = {str(node.target): node for node in gm.graph.find_nodes(op="placeholder")}
    proof = padding_proof._Proof(gm, inputs, placeholders["L_attention_mask_"], arguments, True)
    needs = dict(zip(placeholders, proof.read(gm, None), strict=True))
    return needs["L_x_"] == LiveRows(0, 1, REAL)


def loss_of(fn: Function, x: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    mixed = x + fn(x, mask).transpose(1, 2).reshape(BATCH, LENGTH, WIDTH)
    logits = F.linear(F.rms_norm(mixed, (WIDTH,)), HEAD)
    targets = F.pad(labels, (0, 1), value=-100)[..., 1:].reshape(-1)
    return F.cross_entropy(logits.view(-1, WORDS), targets)


def labels_of() -> Tensor:
    labels = torch.randint(0, WORDS, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2))
    return labels.masked_fill(~SHOWN, -100)
