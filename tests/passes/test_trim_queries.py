"""Queries of the last attention for labelled tokens only: nothing that trains changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, fx, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from sparselora_fx.ir.ops import OPS
from sparselora_fx.passes.hoist_token_gathers import hoist_token_gathers
from sparselora_fx.passes.trim_queries import trim_queries
from sparselora_fx.rewrite.rewrite import Rewrite
from tests.support import oracle
from tests.support.labelled_models import SPARSE, Block, Plain, compare, plan_of
from tests.support.rewritten_graphs import rewritten
from tests.support.small_graphs import (
    Small,
    after,
    changes_nothing,
    keeps_values,
    list_values,
    shown,
    text,
)
from tests.support.token_batches import ragged

TAKEN = torch.tensor([[False, False, True, False], [False, True, True, False]])


def last_attention(change: Any = None, also: Any = None) -> Rewrite:
    """A fused attention of which the rows of one list are read. ``change``: of the queries;
    ``also``: what else is made of them."""
    small = Small()
    x = small.input("x", 2, 4, 8, trains=True)
    lists = small.lists("o", 6, 2, 4)
    q, k, v = (small.linear(x, small.input(f"w{name}", 8, 8, trains=True)) for name in "qkv")
    whole = q
    heads = [small.call("transpose", small.call("view", t, 2, 4, 2, 4), 1, 2) for t in (q, k, v)]
    if change is not None:
        heads = change(small, *heads)
    mixed = small.call(F.scaled_dot_product_attention, *heads)
    merged = small.call("reshape", small.call("transpose", mixed, 1, 2), 2, 4, 8)
    if also is not None:
        merged = also(small, merged, whole)
    return small.rewrite(small.call(OPS.gather_tokens.default, merged, *lists))


def test_queries_of_one_list() -> None:
    rewrite = last_attention()
    assert keeps_values(rewrite, trim_queries, **list_values("o", TAKEN, 6)) == 1
    assert text(rewrite) == shown("""
        v0 = linear(x, wq, None)
        v1 = gather_tokens(v0, o_idx, o_pos)
        v2 = linear(x, wk, None)
        v3 = linear(x, wv, None)
        v4 = scatter_tokens(v1, o_idx, o_pos)
        v5 = ge(o_pos, 0)
        v6 = unsqueeze(v5, -1)
        v7 = narrow(v1, 0, 0, 1)
        v8 = detach(v7)
        v9 = where(v6, v4, v8)
        v10 = view(v9, 2, 4, 2, 4)
        v11 = transpose(v10, 1, 2)
        v12 = view(v2, 2, 4, 2, 4)
        v13 = transpose(v12, 1, 2)
        v14 = view(v3, 2, 4, 2, 4)
        v15 = transpose(v14, 1, 2)
        v16 = scaled_dot_product_attention(v11, v13, v15)
        v17 = transpose(v16, 1, 2)
        v18 = reshape(v17, 2, 4, 8)
        v19 = gather_tokens(v18, o_idx, o_pos)
        return (v19)
    """)
    changes_nothing(rewrite, trim_queries)


def test_a_second_run_with_the_hoist_between_changes_nothing() -> None:
    """The hoist moves the take past the projection; then the queries are those of the list."""
    rewrite = last_attention()
    given = list_values("o", TAKEN, 6)
    assert keeps_values(rewrite, trim_queries, hoist_token_gathers, **given) > 0
    (projection,) = (n for n in rewrite.graph.nodes if n.args[1:2] and str(n.args[1]) == "wq")
    assert projection.args[0].target is OPS.gather_tokens.default
    before = text(rewrite)
    after(rewrite, trim_queries, hoist_token_gathers)
    assert text(rewrite) == before


@pytest.mark.parametrize(
    "options",
    [
        {"change": lambda s, q, k, v: (q, q, v)},
        {"change": lambda s, q, k, v: (s.call("cumsum", q, 2), k, v)},
        {"also": lambda s, a, q: s.call(torch.mul, a, s.call("mean", q, 1, keepdim=True))},
        {"also": lambda s, a, q: s.call(torch.add, a, s.call("roll", a, 1, 1))},
    ],
    ids=["keys are the queries", "queries are mixed", "a mean of queries", "rows are mixed"],
)  # fmt: skip
def test_what_others_read_stays(options: dict[str, Any]) -> None:
    changes_nothing(last_attention(**options), trim_queries)


LAST = {"layers.0": 0.5}


class Attention(Block):
    """The block with its attention written out, or with something else that reads its queries."""

    kind = ""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        whole = self.q(y)
        q, k, v = (p.unflatten(-1, (4, 8)).transpose(1, 2) for p in (whole, self.k(y), self.v(y)))
        if self.kind == "unit norm":
            q = q / q.norm(dim=-1, keepdim=True)
        if self.kind == "shared":
            k = q
        mask = torch.full((x.shape[1],) * 2, float("-inf"), dtype=x.dtype).triu(1)
        scores = (q @ k.transpose(-1, -2)) * 8**-0.5 + mask
        mixed = F.dropout(scores.softmax(-1), 0.1, self.training) @ v
        mixed = mixed.transpose(1, 2).reshape(x.shape)
        if self.kind == "gated by all":
            mixed = mixed * whole.mean(dim=1, keepdim=True).sigmoid()
        if self.kind == "gated":
            mixed = mixed * whole.sigmoid()
        x = x + self.o(mixed)
        y = self.second(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def model_of(kind: str) -> nn.Module:
    """Two blocks in fp64 throughout, with LoRA on q, k, v and o."""
    torch.manual_seed(0)
    inner = Plain()
    inner.layers = nn.ModuleList(Attention() for _ in range(2))
    for block in inner.layers:
        block.kind = kind
    lora = oracle.lora_config(("q", "k", "v", "o"))
    lora.task_type = None
    return oracle.randomise(get_peft_model(inner, lora)).double().train()


def trimmed(monkeypatch: pytest.MonkeyPatch, model: nn.Module, plan: Any = LAST) -> int:
    """How many queries the passes trim."""
    _, report = rewritten(monkeypatch, model, ragged(), plan_of(plan), trim_logits=True)
    return report.counts["trim_queries"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("", 1),
        ("unit norm", 1),
        ("gated", 1),
        ("gated by all", 0),
        ("shared", 0),
    ],
)
def test_nothing_changes(kind: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients are the untrimmed model's, where the queries are trimmed and where not."""
    assert trimmed(monkeypatch, model_of(kind)) == count
    compare(model_of(kind), ragged(), plan_of(LAST), 1e-9)


def rows_of(graph: fx.Graph, name: str) -> list[int]:
    """The rank of what each matmul with one of layer 1's frozen weights reads: 2 is a list of
    tokens."""
    ending = (
        f"layers_modules_1_modules_self_attn_modules_{name}_modules_base_layer_parameters_weight_"
    )
    weights = [n for n in graph.find_nodes(op="placeholder") if n.name.endswith(ending)]
    assert len(weights) == 1
    return [user.args[0].meta["example_value"].dim() for user in weights[0].users]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rotations_and_norms_are_passed(
    family: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The projection itself runs on a token list; keys and values on every token."""
    shape = {
        "hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": oracle.VOCABULARY,
        "attn_implementation": attention,
    }  # fmt: skip
    build = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**shape)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**shape)),
    }[family]

    def make() -> nn.Module:
        torch.manual_seed(0)
        lora = oracle.lora_config(oracle.ATTENTION_TARGETS)
        return oracle.randomise(get_peft_model(build(), lora)).double().train()

    plan = plan_of(SPARSE)
    whole = ragged(samples=1)  # no padding, which would put the others on a list too
    graph, report = rewritten(monkeypatch, make(), whole, plan, trim_logits=True)
    assert report.counts["trim_queries"] == 1
    assert rows_of(graph, "q_proj") == [2]
    assert rows_of(graph, "v_proj") == [3]
    compare(make(), ragged(), plan)


def test_without_trimming_every_query_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = oracle.llama(layers=2, dtype=torch.float64)
    _, report = rewritten(monkeypatch, model, ragged(), plan_of(SPARSE))
    assert report.counts["trim_queries"] == 0
