"""Batches of any shape: as many graphs as plain torch.compile, and a word where it is otherwise."""

from __future__ import annotations

import random
import re
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._guards import TracingContext
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
    free_symbols,
)

import sparselora_fx as slx
from sparselora_fx import _torch
from sparselora_fx.compiler.recompiles import Recompiles
from sparselora_fx.ir.ops import OPS
from sparselora_fx.lowering import inductor_backend

WIDTH, VOCABULARY = 16, 31
Batch = dict[str, Tensor]


class Lora(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs, bias=False).requires_grad_(False)
        self.a = nn.Linear(inputs, 2, bias=False)
        self.b = nn.Linear(2, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (Lora(WIDTH, WIDTH) for _ in range(4))
        self.gate, self.up, self.down = Lora(WIDTH, 32), Lora(WIDTH, 32), Lora(32, WIDTH)
        self.before, self.between = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.before(x)
        samples, length, _ = h.shape
        q, k, v = (
            part(h).view(samples, length, 2, -1).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.o(mixed.transpose(1, 2).reshape(samples, length, -1))
        h = self.between(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    """A causal model that pads its labels to shift them, as transformers does."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH).requires_grad_(False)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False).requires_grad_(False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        x, length = self.embed(input_ids), input_ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        mask = mask & attention_mask.bool()[:, None, None, :]
        for layer in self.layers:
            x = layer(x, mask)
        shifted = F.pad(labels, (0, 1), value=-100)[..., 1:]
        return F.cross_entropy(self.head(x).flatten(0, 1), shifted.flatten())


class Feed(nn.Module):
    """One feed-forward block, quick to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH).requires_grad_(False)
        self.up, self.down = Lora(WIDTH, 32), Lora(32, WIDTH)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        return self.down(self.up(self.embed(input_ids)).relu()).square().mean()


def batch(samples: int, length: int, *, prompt: int = 2, padding: int = 0) -> Batch:
    ids = torch.randint(1, VOCABULARY, (samples, length))
    mask = torch.ones_like(ids)
    if padding:
        mask[-1, -padding:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def random_batches(count: int) -> list[Batch]:
    numbers = random.Random(0)
    made = []
    for _ in range(count):
        length = numbers.randint(4, 60)
        prompt, padding = numbers.randint(0, length - 1), numbers.randint(0, length // 2)
        padding *= numbers.random() < 0.6
        made.append(batch(numbers.randint(1, 6), length, prompt=prompt, padding=padding))
    return made


# No padding, another length, padding, few sparse tokens, one sample, no padding again.
FEW = [
    batch(2, 11), batch(2, 20), batch(3, 14, padding=5), batch(4, 9, prompt=0), batch(1, 7),
    batch(2, 33, prompt=30),
]  # fmt: skip


def compiled(model: nn.Module, backend: str = "eager", **options: Any) -> nn.Module:
    words = {key: options.pop(key) for key in ("score", "tokens") if key in options}
    # Calls with few sparse tokens stay sparse: a dense call is a kind of call of its own.
    plan = slx.SparsityPlan(0.5, start_step=0, channel_multiple=1, min_sparse=0.0, **words)
    return slx.compile(
        model, slx.SVDEstimator.build(model, rank=2), plan=plan, backend=backend, **options
    )


def graphs(run: Any, batches: list[Batch], *, backward: bool = True) -> int:
    counters.clear()
    for data in batches:
        loss = run(**data)
        if backward:
            loss.backward()
    assert not counters["graph_break"]
    return int(counters["stats"]["unique_graphs"])


def plain_graphs(
    layers: int, batches: list[Batch], *, dynamic: bool | None, regional: bool, **how: Any
) -> int:
    model = Model(layers)
    options: dict[str, Any] = {"backend": how["backend"], "dynamic": dynamic}
    if regional:
        for layer in model.layers:
            layer.compile(**options)
        return graphs(model, batches, backward=how["backward"])
    return graphs(torch.compile(model, **options), batches, backward=how["backward"])


def check_as_plain(
    layers: int,
    batches: list[Batch],
    *,
    more: int,
    backend: str = "eager",
    backward: bool = True,
    **options: Any,
) -> None:
    """At most so many graphs more than plain torch.compile, no graph break, and no warning."""
    dynamic, regional = options.get("dynamic"), options.get("regional", False)
    allowed = more + plain_graphs(
        layers, batches, dynamic=dynamic, regional=regional, backend=backend, backward=backward
    )
    torch.compiler.reset()
    model = compiled(Model(layers), backend, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The .grad attribute")  # torch's, of blocks' inputs
        warnings.filterwarnings("ignore", ".* would be sparse")  # a batch without any prompt
        assert graphs(model, batches, backward=backward) <= allowed


@pytest.mark.slow
def test_pieces_have_as_many_graphs_as_plain() -> None:
    """The second batch without padding makes sizes dynamic; the first with padding adds token
    lists, and one graph."""
    check_as_plain(3, FEW, more=1)


@pytest.mark.slow
def test_blocks_have_as_many_graphs_as_plain() -> None:
    """Token lists that no batch had before (with padding, without), a batch without sparse tokens,
    a single sample: each block compiled by itself is what plain torch.compile is asked for, too."""
    check_as_plain(2, FEW, more=2, regional=True)


def test_sizes_seen_in_dense_steps_are_known_in_sparse_ones() -> None:
    """Token lists come with the first sparse step; they do not fix the sizes of the batch."""
    model, counted = Feed(), []
    plan = slx.SparsityPlan(0.5, start_step=2, channel_multiple=1)
    slx.compile(model, slx.SVDEstimator.build(model, rank=2), plan=plan, backend="eager")
    for n, (samples, length) in enumerate([(2, 9), (3, 12), (2, 11), (4, 17), (5, 8)]):
        slx.step(model, n, 9)
        counted.append(graphs(model, [batch(samples, length, prompt=5)]))
    assert counted == [1, 1, 1, 0, 0]


@pytest.mark.slow
def test_dynamic_from_the_first_batch() -> None:
    """Numbers on modules are symbols then; AOTAutograd must know them again in the pieces."""
    check_as_plain(3, FEW[2:4], more=0, dynamic=True, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "regional", "dynamic", "score"),
    [
        (2, False, True, "pooled"),
        (8, False, None, "tokens+weighted+normalised"),
        (2, True, None, "tokens+weighted+normalised"),
        (3, True, True, None),
    ],
)
def test_two_hundred_batches(
    layers: int, regional: bool, dynamic: bool | None, score: str | None
) -> None:
    """Each depth, way of compiling, kind of sizes and score at least once; `FEW` has the default
    score on whole models. With ``regional`` plain torch.compile compiles each block by itself, too.
    Backwards of "eager" compile nothing, so they are left out."""
    options = {"regional": regional, "dynamic": dynamic, "score": score}
    check_as_plain(layers, random_batches(200), more=2, backward=False, **options)


def symbolic(*shape: int) -> Tensor:
    """A fake tensor whose sizes are symbols, but for the last of two or more."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    kinds = [DimDynamic.DYNAMIC] * len(shape)
    if len(shape) > 1:
        kinds[-1] = DimDynamic.STATIC
    return mode.from_tensor(
        torch.randn(shape), symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds)
    )


@pytest.mark.parametrize("name", ["sample_tokens", "channel_energy", "low_rank_energy"])
def test_a_rule_for_tracing_reads_no_size(name: str) -> None:
    """Neither a guard nor a number where there was a symbol."""
    x = symbolic(3, 7, WIDTH)
    env = x.fake_mode.shape_env  # type: ignore[attr-defined]
    with x.fake_mode:  # type: ignore[attr-defined]
        a, offset = torch.randn(9, WIDTH), torch.randn(9)
        arguments: dict[str, tuple[Any, ...]] = {
            "sample_tokens": (x, None, 64),
            "channel_energy": (x, None, None, True),
            "low_rank_energy": (x, a, offset, None, None, True),
        }
        getattr(OPS, name)(*arguments[name])
    assert not env.guards
    assert free_symbols(x.shape)


def shape_guards(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The functions of ours, passes included, that add a guard on sizes from now on."""
    found: set[str] = set()
    inner = ShapeEnv._log_guard
    ours = Path(slx.__file__).parent

    def logged(self: ShapeEnv, *args: Any, **options: Any) -> None:
        frames = [(Path(f.filename), f.name) for f in traceback.extract_stack()]
        own = [(path, name) for path, name in frames if ours in path.parents]
        # Under `forward` without any other of ours, the user's code is traced.
        found.update(name for path, name in own[-1:] if path.name != "forward.py")
        inner(self, *args, **options)

    monkeypatch.setattr(ShapeEnv, "_log_guard", logged)
    return found


def guarded(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """What values graphs are guarded by from now on: the last word of each, by kind of guard."""
    found: dict[str, set[str]] = {kind: set() for kind in BEYOND_PLAIN}
    inner = inductor_backend.backend_compile

    def noted(*args: Any, **options: Any) -> Any:
        for guard in TracingContext.get().guards_context.dynamo_guards:
            if guard.create_fn_name() in found:
                found[guard.create_fn_name()].update(re.findall(r"\w+", guard.name)[-1:])
        return inner(*args, **options)

    monkeypatch.setattr(inductor_backend, "backend_compile", noted)
    return found


TOKEN_LISTS = set("012345678")  # places in the list that hooks read, dynamic in their length
MARKS = {"a", "b", "statistics", "param", "spec", "cell_contents"}  # what hooks hold of a module
BEYOND_PLAIN = {
    "TENSOR_MATCH": TOKEN_LISTS
    | {"_sparselora_a_weight", "_sparselora_b_weight", "_sparselora_norms_weight"},
    "CONSTANT_MATCH": MARKS
    | {"_sparselora_spec_weight", "grad", "DENSE", "OBSERVED", "_compiled_call_impl"},
    "EQUALS_MATCH": {"cell_contents"},
    "SEQUENCE_LENGTH": {"tokens", "0", "statistics", "cell_contents"}
    | {"_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"},
}


def test_guards_beyond_those_of_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """What may make a batch compile again that plain torch.compile would not."""
    found, sizes = guarded(monkeypatch), shape_guards(monkeypatch)

    def plain(gm: Any, inputs: Any) -> Any:
        return inductor_backend.backend_compile("eager", gm, inputs, rewritten=False)

    graphs(torch.compile(Model(2), backend=plain, dynamic=True), FEW[2:3])
    known = {kind: set(names) for kind, names in found.items()}
    torch.compiler.reset()
    graphs(compiled(Model(2), dynamic=True), FEW[2:3])
    assert sizes <= {"agree"}  # token lists have the grid of the batch
    for kind, expected in BEYOND_PLAIN.items():
        assert found[kind] - known[kind] == expected, kind


def lengths(count: int) -> list[Batch]:
    return [batch(2, 9 + n, padding=1) for n in range(count)]


def test_recompiles_are_told_once() -> None:
    """Fixed sizes, other lengths: one warning at the fourth recompile, and none before."""
    model = compiled(Feed(), dynamic=False, tokens="all")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graphs(model, lengths(4))
    with pytest.warns(UserWarning) as told:
        graphs(model, lengths(6)[4:])
    (text,) = [str(warning.message) for warning in told]
    assert "compiled again 4 times" in text
    assert "input_ids from int64[2, 12] to int64[2, 13]" in text
    assert "dynamic=True" in text and "pad_to_multiple_of" in text


def test_the_limit_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond torch's limit calls run dense: a warning says so."""
    monkeypatch.setattr(_torch, "_RECOMPILES", 2)
    model = compiled(Feed(), dynamic=False, tokens="all")
    batches = lengths(4)
    for data in batches[:2]:
        model(**data)
    with pytest.warns(UserWarning) as told:
        for data in batches[2:]:
            model(**data)
    (text,) = [str(warning.message) for warning in told]
    assert "limit of recompiles" in text and "DENSE" in text and "size mismatch" in text


@pytest.mark.parametrize(
    ("passed", "said"),
    [
        ([{"x": n} for n in range(6)], ["x from 3 to 4", "same kind of argument"]),
        ([{}, {}, {}, {}, {"x": None}], ["x from absent to None", "same kind of argument"]),
        ([{}] * 5, ["nothing in the call's arguments", "keep what the model reads fixed"]),
    ],
    ids=["number", "absent", "nothing"],
)
def test_what_changed_is_said(passed: list[dict[str, Any]], said: list[str]) -> None:
    recompiles = Recompiles()
    with pytest.warns(UserWarning) as told:
        for arguments in passed:
            with recompiles.watching("sparse", arguments):
                recompiles.graphs += 1
    assert len(told) == 1
    assert all(words in str(told[0].message) for words in said)


def test_other_kinds_of_call_are_no_recompiles() -> None:
    """Each level of a schedule has a graph of its own."""
    recompiles = Recompiles()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for level in range(20):
            for _ in range(3):
                with recompiles.watching(level, {"x": 1}):
                    recompiles.graphs += 1
