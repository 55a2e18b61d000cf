"""The feed-forward example of ARCHITECTURE.md: its graph before and after the passes.

`python -m tests.support.ffn_example` prints both; with ``--write`` it puts them into the page.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import sparselora_fx as slx
from sparselora_fx.compiler import backend


class Linear(nn.Module):
    """A frozen linear ``[N, K]`` with a LoRA branch of rank 2, if it is to have one."""

    def __init__(self, inputs: int, outputs: int, *, lora: bool) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs, bias=False).requires_grad_(False)
        self.A = nn.Parameter(torch.randn(2, inputs)) if lora else None
        self.B = nn.Parameter(torch.randn(outputs, 2)) if lora else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self.A is None or self.B is None:
            return y
        return y + F.linear(F.linear(x, self.A), self.B)


class FeedForward(nn.Module):
    """``down(silu(gate(x)) * up(x))`` with 16 channels, LoRA on up and down."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Linear(8, 16, lora=False)
        self.up = Linear(8, 16, lora=True)
        self.down = Linear(16, 8, lora=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


def graphs() -> tuple[str, str]:
    """The graph of a training step at sparsity 0.5, as Dynamo made it and as the passes left it."""
    torch.manual_seed(0)
    model = FeedForward()
    found: list[str] = []
    run = backend.run

    def spy(gm: fx.GraphModule, *args: Any) -> Any:
        found.append(text_of(gm.graph))
        report = run(gm, *args)
        found.append(text_of(gm.graph))
        return report

    plan = slx.SparsityPlan(0.5, tokens="all", start_step=0, channel_multiple=1)
    estimator = slx.SVDEstimator.build(model, rank=2, progress=False)
    slx.compile(model, estimator, plan=plan, backend="eager")
    with mock.patch.object(backend, "run", spy):
        model(torch.randn(2, 3, 8)).sum().backward()
    slx.restore(model)
    before, after = found
    return before, after


def text_of(graph: fx.Graph) -> str:
    """One line for each call, with the inputs by their names on the model."""
    names: dict[fx.Node, str] = {}
    lines = []
    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = _short(str(node.target))
        elif node.op == "output":
            lines.append(f"return {_shown(node.args[0], names)}")
        else:
            names[node] = f"v{len(lines)}"
            given = ", ".join([_shown(a, names) for a in node.args])
            given += "".join(f", {k}={_shown(v, names)}" for k, v in node.kwargs.items())
            lines.append(f"{names[node]} = {_called(node)}({given})")
    return "\n".join(lines)


def _short(target: str) -> str:
    """``L_self_modules_up_modules_base_parameters_weight_`` -> ``up.base.weight``"""
    name = re.sub(r"^L_self_modules_|^L_|_$", "", target, flags=re.IGNORECASE)
    name = re.sub(r"_modules_|_parameters_|_buffers_", ".", name)
    return re.sub(r"_?sparselora_([a-z]+)_weight", r"factor_\1", name).strip("_")


def _called(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet)).rpartition(".")[2]


def _shown(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, tuple | list):
        inner = ", ".join(_shown(v, names) for v in value)
        return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
    return repr(value)


PAGE = Path(__file__).resolve().parents[2] / "ARCHITECTURE.md"


def page(text: str, before: str, after: str) -> str:
    """The page with both graphs in their places."""
    for name, graph in (("before", before), ("after", after)):
        block = f"<!-- {name} -->\n" + "".join(f"    {line}\n" for line in graph.splitlines())
        pattern = rf"<!-- {name} -->\n(?:    .*\n)*"
        text = re.sub(pattern, lambda _, block=block: block, text)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    made = page(PAGE.read_text(encoding="utf-8"), *graphs())
    if "--write" in sys.argv:
        PAGE.write_text(made, encoding="utf-8")
    else:
        print(made[made.index("<!-- before -->") : made.index("## The passes")])
