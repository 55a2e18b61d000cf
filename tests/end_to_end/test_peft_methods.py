"""The table of docs/peft_methods.md, against the installed PEFT; and what is said and done where
nothing can be sliced."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import sparselora_fx as slx
from sparselora_fx.runtime.runtime import get_runtime
from tests.support import oracle
from tests.support.slow import slow

TARGETS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
TABLE = Path(__file__).parents[2] / "docs" / "peft_methods.md"

METHODS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: peft.LoraConfig(r=4, target_modules=TARGETS),
    "rsLoRA": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, use_rslora=True),
    "DoRA": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "AdaLoRA": lambda: peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, target_modules=TARGETS
    ),
    "IA3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "LoHa": lambda: peft.LoHaConfig(r=4, target_modules=TARGETS),
    "LoKr": lambda: peft.LoKrConfig(r=4, target_modules=TARGETS),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=8, target_modules=TARGETS),
    "aLoRA": lambda: peft.LoraConfig(
        r=4, target_modules=TARGETS, alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM"
    ),
    "target_parameters": lambda: peft.LoraConfig(
        r=4, target_modules=[], target_parameters=[f"{name}.weight" for name in TARGETS]
    ),
}


def model_with(config: Any) -> nn.Module:
    base = oracle.llama().unload()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base, config).train()


def compiled(model: nn.Module, plan: Any, steps: int | None = None) -> tuple[nn.Module, list[str]]:
    """The model after some steps (one, unless it is known from the start that nothing can be
    sliced), and what was warned of."""
    torch.compiler.reset()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        estimator = oracle.estimator_of(model)
        slx.compile(model, estimator, plan=oracle.plan_of(plan), backend="eager")
        for _ in range(not get_runtime(model).given_up if steps is None else steps):
            oracle.step(model, oracle.batch())
    return model, [str(w.message) for w in caught if "linears are sparse" in str(w.message)]


def rows() -> dict[str, str]:
    """Of each method in the table, whether it is sliced."""
    found = re.findall(r"^\| ([^|]+) \| ([^|]+) \|", TABLE.read_text(), re.MULTILINE)
    return {method.strip("` "): sliced.strip() for method, sliced in found}


def test_the_table_has_every_method_tested() -> None:
    assert set(METHODS) == set(rows()) - {"method", "---"}


SLOW = ("OFT", "AdaLoRA", "rsLoRA", "IA3", "VeRA")


@pytest.mark.parametrize("method", [slow(m) if m in SLOW else m for m in METHODS])
def test_the_table_is_true(method: str) -> None:
    """Sliced or not, as the table says; and where nothing is, one warning names the adapter, and so
    does every line of `explain`."""
    model, warned = compiled(model_with(METHODS[method]()), 0.5)
    table, lines = slx.explain(model, verbose=True), slx.explain(model, verbose=True).splitlines()
    sliced = int(re.search(r"(\d+) of \d+ frozen linears rewritten", table)[1])  # type: ignore[index]
    said = rows()[method]
    assert (sliced == 7, sliced == 0) == (said == "yes", said == "no"), table
    assert len(warned) == (said == "no"), warned
    if said == "no":
        assert warned[0].startswith("0 of 7 linears are sparse") and method in warned[0]
        assert sum(method in line for line in lines) == 7, table
    slx.restore(model)


FEED_FORWARD = TARGETS[4:]
DENSE = {
    "known from the start": peft.LoHaConfig(r=4, target_modules=FEED_FORWARD),
    "seen in a graph": peft.OFTConfig(r=0, oft_block_size=8, target_modules=["down_proj"]),
    "seen after a call": peft.LoHaConfig(r=4, target_modules=["down_proj"]),
}


@pytest.mark.parametrize(
    "config", [v if k == "seen in a graph" else slow(v) for k, v in DENSE.items()], ids=DENSE
)
def test_later_steps_are_plain(config: Any) -> None:
    """Where nothing is sliced, steps compute what they did, with no more graphs than plain
    `torch.compile` has, unless only a whole call could tell: then those come on top once."""
    model, data, graphs = model_with(config), {**oracle.batch(), "use_cache": False}, 0

    def count(gm: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return gm.forward

    torch.compiler.reset()
    model.__dict__["forward"] = torch.compile(model.forward, backend=count)
    plain = [oracle.step(model, data) for _ in range(2)]
    del model.__dict__["forward"]
    model, warned = compiled(model, {"mlp": 0.5}, steps=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = [oracle.step(model, data) for _ in range(2)]
        before = get_runtime(model).graphs
        oracle.step(model, data)
    warned += [str(w.message) for w in caught if "linears are sparse" in str(w.message)]
    assert len(warned) == 1 and warned[0].startswith("0 of 3 linears are sparse, because")
    assert get_runtime(model).graphs == before
    if config is not DENSE["seen after a call"]:
        assert before <= graphs
        assert not any(module._forward_pre_hooks for module in model.modules())
    for got, expected in zip(done, plain, strict=True):
        oracle.assert_identical(got, expected)
    slx.restore(model)
