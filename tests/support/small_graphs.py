"""Graphs of a few nodes, built by hand, for tests of single passes and analyses.

Every node holds the example value that its op gives on fake tensors, as in a graph from Dynamo.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from sparselora_fx.ir import autograd  # noqa: F401 - registers derivatives
from sparselora_fx.ir.markers import SiteSpec
from sparselora_fx.ir.ops import OPS
from sparselora_fx.rewrite.rewrite import Options, Rewrite
from tests.support.ffn_example import text_of

F64 = torch.float64
HALF = SiteSpec(0.5, 0.5).encode()
Pass = Callable[[Rewrite], int]


class Small:
    """A graph that grows call by call."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode()
        self.gm = fx.GraphModule({}, fx.Graph())
        self.graph = self.gm.graph

    def input(
        self, name: str, *shape: int, dtype: torch.dtype = F64, trains: bool = False
    ) -> fx.Node:
        """An input of the graph; those that come late are put behind the others, as Dynamo does."""
        inputs = self.graph.find_nodes(op="placeholder")
        first = next(iter(self.graph.nodes), None) if not inputs else inputs[-1].next
        with self.graph.inserting_before(first):
            node = self.graph.placeholder(name)
        with self.mode:
            value = torch.empty(shape, dtype=dtype, requires_grad=trains)
        node.meta["example_value"] = value
        return node

    def weight(self, name: str, *shape: int) -> fx.Node:
        """An input that holds a parameter, as `is_weight` asks for."""
        node = self.input(name, *shape)
        with self.mode:
            node.meta["example_value"] = torch.nn.Parameter(torch.empty(shape, dtype=F64), False)
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of a function, or, for a string, of a method."""
        kind = "call_method" if isinstance(target, str) else "call_function"
        node = self.graph.create_node(kind, target, args, kwargs)
        given, named = fx.map_arg((args, kwargs), lambda n: n.meta["example_value"])
        with self.mode:
            made = (
                getattr(given[0], target)(*given[1:], **named)
                if isinstance(target, str)
                else target(*given, **named)
            )
        node.meta["example_value"] = made
        return node

    def linear(self, x: fx.Node, weight: fx.Node, bias: fx.Node | None = None) -> fx.Node:
        return self.call(torch.nn.functional.linear, x, weight, bias)

    def marked(
        self, x: fx.Node, weight: fx.Node, *, spec: str = HALF, tokens: tuple[fx.Node, ...] = ()
    ) -> fx.Node:
        """x behind the marker of a frozen weight, with factors of rank 2."""
        n, k = weight.meta["example_value"].shape
        factors = (self.input(f"{weight.name}_fa", n, 2), self.input(f"{weight.name}_fb", 2, k))
        return self.call(OPS.site.default, x, weight, *factors, list(tokens), spec)

    def site(
        self, x: fx.Node, name: str, out: int, *, bias: bool = False, **options: Any
    ) -> fx.Node:
        """A marked frozen linear ``[out, width of x]``, which is named like its weight."""
        weight = self.input(name, out, x.meta["example_value"].shape[-1])
        added = self.input(f"{name}_bias", out) if bias else None
        return self.linear(self.marked(x, weight, **options), weight, added)

    def lora(self, x: fx.Node, name: str, out: int, rank: int = 2) -> fx.Node:
        """A LoRA branch whose matrices are ``name_A`` and ``name_B``."""
        down = self.input(f"{name}_A", rank, x.meta["example_value"].shape[-1], trains=True)
        up = self.input(f"{name}_B", out, rank, trains=True)
        return self.linear(self.linear(x, down), up)

    def lists(self, name: str, size: int, samples: int, length: int) -> tuple[fx.Node, fx.Node]:
        """A token list and its inverse."""
        idx = self.input(f"{name}_idx", size, dtype=torch.int64)
        return idx, self.input(f"{name}_pos", samples, length, dtype=torch.int64)

    def rewrite(self, *returned: Any, **fields: Any) -> Rewrite:
        """The graph, which returns these values, ready for passes."""
        self.graph.output(returned)
        self.gm.recompile()
        options = fields.pop("options", Options(channel_multiple=1))
        return Rewrite(self.gm, options, **fields)


def fresh(rewrite: Rewrite) -> Rewrite:
    """A graph that passes have changed, as if it came to them for the first time."""
    return Rewrite(rewrite.gm, rewrite.options)


def after(rewrite: Rewrite, *passes: Pass) -> int:
    """Run passes in turn; what the last one changed. The graph must be well formed then."""
    changes = 0
    for step in passes:
        changes = step(rewrite)
        rewrite.graph.lint()
    rewrite.gm.recompile()
    return changes


def text(rewrite: Rewrite) -> str:
    """One line for each call."""
    return text_of(rewrite.graph)


def text_after_choice(rewrite: Rewrite) -> str:
    """The calls behind the first choice of channels: what is computed with it."""
    lines = text(rewrite).splitlines()
    chosen = next(i for i, line in enumerate(lines) if "topk_channels" in line)
    return "\n".join(lines[chosen + 1 :])


def shown(expected: str) -> str:
    """An expected graph as it is written in a test."""
    return "\n".join(line.strip() for line in expected.strip().splitlines())


def values_of(rewrite: Rewrite, seed: int = 0, **given: Tensor) -> list[Any]:
    """What the graph returns, and the gradients of all that trains, for random inputs."""
    rewrite.gm.recompile()
    generator = torch.Generator().manual_seed(seed)
    inputs: list[Tensor] = []
    for node in rewrite.graph.nodes:
        if node.op != "placeholder":
            continue
        example = node.meta["example_value"]
        value = given.get(node.name)
        if value is None:
            value = torch.randn(example.shape, generator=generator, dtype=F64).to(example.dtype)
        inputs.append(value.clone().requires_grad_(example.requires_grad))
    torch.manual_seed(seed)  # for what the graph draws
    outputs = rewrite.gm(*inputs)
    results = [out for out in outputs if isinstance(out, Tensor)]
    training = [t for t in inputs if t.requires_grad]
    ends = [out for out in results if out.requires_grad]
    if training and ends:
        total = torch.stack([(out * out.detach().cos()).sum() for out in ends]).sum()
        results += torch.autograd.grad(total, training, allow_unused=True)
    return results


def changes_nothing(rewrite: Rewrite, step: Pass) -> None:
    """A pass that finds nothing: what comes of a second run, and of a near miss."""
    before = text(rewrite)
    assert after(rewrite, step) == 0
    assert text(rewrite) == before


def keeps_values(rewrite: Rewrite, *passes: Pass, **given: Tensor) -> int:
    """Run passes that may change no result and no gradient; what the last one changed."""
    expected = values_of(rewrite, **given)
    changes = after(rewrite, *passes)
    got = values_of(rewrite, **given)
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert (one is None) == (other is None)
        if one is None:  # the gradient of an input that nothing reads
            continue
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    return changes


def list_values(name: str, taken: Tensor, size: int) -> dict[str, Tensor]:
    """A list of the tokens ``taken[B, L]``, padded with -1 to a size, as inputs for `values_of`."""
    flat = taken.flatten()
    idx = torch.full((size,), -1)
    held = flat.nonzero().flatten()
    idx[: held.numel()] = held
    pos = torch.where(flat, flat.cumsum(0) - 1, -1).view(taken.shape)
    return {f"{name}_idx": idx, f"{name}_pos": pos}
