"""The forward and backward graphs of a rewritten model, captured without weights and without code.

Everything is on the meta device: tensors have shapes and no memory. Token lists are counted from
real labels first. A graph is run once, node by node, which is where it is counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from functorch.compile import (
    aot_module_simplified,
    make_boxed_func,
    min_cut_rematerialization_partition,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from benchmarks.support.published import LORA_RANK, LORA_TARGETS
from sparselora_fx import SparsityPlan
from sparselora_fx.compiler.pipeline import run
from sparselora_fx.ir import autograd, ops, score_ops
from sparselora_fx.ir.token_lists import (
    TokenLists,
    Tokens,
    count,
    list_lengths,
    place,
    token_lists,
)
from sparselora_fx.lowering.inductor_backend import saving_less
from sparselora_fx.model.frozen_weights import frozen_weights
from sparselora_fx.passes import PIPELINE, WHOLE_GRAPH
from sparselora_fx.plan import score
from sparselora_fx.rewrite.rewrite import Options
from sparselora_fx.runtime.runtime import Runtime
from sparselora_fx.runtime.token_policy import split_tokens

assert autograd.LIBRARY is not None  # importing it registers the derivatives
SCORE = score.parse_score(score.DEFAULT)  # that of factors without calibration
TOPK = ops.OPS.topk_channels.default
ATTENTION = torch.ops.aten._scaled_dot_product_efficient_attention


def _attention_backward(
    grad: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    """Two products for each of the forward's."""
    batch, heads, length, dim = query
    return 2 * 2 * batch * heads * length * key[2] * (dim + value[3])


_FORMULAS = {torch.ops.aten._scaled_dot_product_efficient_attention_backward: _attention_backward}

# On the meta device PyTorch finds a kernel of its own for this composite op, and none for autograd:
# it would warn, and take the same steps.
_NLL_LOSS = torch.ops.aten.nll_loss.default
_NLL_LOSS.py_impl(torch._C.DispatchKey.AutogradMeta)(_NLL_LOSS.decompose)


class Counted(fx.Interpreter):
    """Runs a graph on meta tensors and counts the FLOPs of each node by shapes, with torch's
    formulas (2 per multiply-add of every matmul and attention; pointwise work counts nothing, and
    neither does what a fused attention's backward computes again).

    An op of ours is counted through its eager body, which is its meaning.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.flops: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
            result = super().run_node(n)
        self.flops[n] = counter.get_total_flops()
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if getattr(target, "namespace", "") == "sparselora":
            name = target._opname
            target = getattr(ops, name, None) or getattr(score_ops, name)
        return super().call_function(target, args, kwargs)

    def total(self) -> int:
        """FLOPs of the whole graph."""
        return sum(self.flops.values())

    def serving(self) -> set[fx.Node]:
        """The nodes that serve nothing but the choice of channels."""
        serving: set[fx.Node] = set()
        for node in reversed(list(self.module.graph.nodes)):
            if node.target is TOPK or (node.users and all(u in serving for u in node.users)):
                serving.add(node)
        return {node for node in serving if node.op != "placeholder"}

    def estimator(self) -> int:
        """FLOPs that serve nothing but the choice of channels."""
        return sum(self.flops.get(node, 0) for node in self.serving())

    def attention(self) -> int:
        """FLOPs of attention products: fused ones, or the batched matmuls they fall apart into."""
        words = ("scaled_dot_product", "aten.bmm")  # the latter in attention written out
        return sum(f for n, f in self.flops.items() if any(w in str(n.target) for w in words))

    def held(self) -> int:
        """Bytes of what the graph returns, to its caller or to the backward: each storage once,
        inputs (weights among them) not."""
        roots = {_root(node) for node in self.module.graph.output_node().all_input_nodes}
        values = (node.meta["val"] for node in roots if node.op != "placeholder")
        return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))

    def of_size(self, size: int) -> int:
        """FLOPs of the matmuls that read or make a tensor with a dimension of ``size``."""
        return sum(
            flops
            for node, flops in self.flops.items()
            if flops and any(size in _shape(n) for n in (node, *node.all_input_nodes))
        )


def _root(node: fx.Node) -> fx.Node:
    """What a view is a view of."""
    while getattr(node.target, "is_view", False) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def llama(
    shape: dict[str, Any], layers: int, *, classify: bool = False, rank: int = LORA_RANK
) -> nn.Module:
    """A LoRA Llama (targets of the reference) on the meta device, bf16."""
    config = LlamaConfig(**{**shape, "num_hidden_layers": layers}, use_cache=False, pad_token_id=0)
    with torch.device("meta"):
        kind = LlamaForSequenceClassification if classify else LlamaForCausalLM
        base = kind(config)
        lora = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=list(LORA_TARGETS),
            task_type="SEQ_CLS" if classify else "CAUSAL_LM",
        )
        return get_peft_model(base, lora).to(torch.bfloat16).train()


def batch_of(samples: int, length: int, outputs: int) -> dict[str, Tensor]:
    """Token ids and labels (on the CPU) whose last ``outputs`` tokens of each sample carry loss."""
    ids = torch.ones(samples, length, dtype=torch.int64)
    labels = ids.clone()
    labels[:, : length - outputs] = -100
    return {"input_ids": ids, "labels": labels}


def capture(
    model: nn.Module,
    batch: dict[str, Tensor],
    plan: SparsityPlan | None,
    *,
    rank: int,
    trim_logits: bool = False,
    lean: bool = False,
    partition: Callable[..., Any] = min_cut_rematerialization_partition,
) -> tuple[list[Counted], list[Counted]]:
    """Trace, rewrite and run one training step on meta tensors.

    Args:
        model: parameters on the meta device.
        batch: on the CPU; ``labels[B]`` stand for classes, ``labels[B, L]`` for tokens.
        plan: None: plain dense LoRA, nothing rewritten.
        rank: of the estimator's factors.
        trim_logits: as in `sparselora_fx.compile`.
        lean: hold as little for the backward as rewritten graphs do; a part of a model that has
            sparse layers elsewhere is in one graph with these.

    Returns:
        The forward graphs and the backward graphs, each counted.
    """
    forwards: list[Counted] = []
    backwards: list[Counted] = []

    def counting(into: list[Counted]) -> Callable[..., Any]:
        def compiler(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
            into.append(Counted(gm))
            return make_boxed_func(into[-1].run)

        return compiler

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        options = Options(plan.channel_multiple if plan else 16, score=SCORE)
        report = run(gm, inputs, options, PIPELINE, WHOLE_GRAPH)
        passed = report.passed if report else tuple
        _fuse_attention(gm)
        with saving_less() if report or lean else contextlib.nullcontext():
            compiled = aot_module_simplified(
                gm,
                list(passed(inputs)),
                fw_compiler=counting(forwards),
                bw_compiler=counting(backwards),
                partition_fn=partition,
            )
        extra = report.extra if report else 0
        return lambda *args: compiled(*passed(args))[: -extra or None]

    inputs = {name: value.to("meta") for name, value in batch.items()}
    state = _marked(model, batch, plan, rank) if plan else None
    if state is not None and trim_logits:
        state.attached.mark_model(model.get_output_embeddings())  # type: ignore[operator]
        state.trace_inputs.labels = _label_list(state, batch, inputs["labels"])
    try:
        torch.compiler.reset()
        step = torch.compile(model.forward, backend=backend, dynamic=False)
        step(**inputs).loss.backward()
    finally:
        if state is not None:
            state.attached.unmark()
        torch.compiler.reset()
    return forwards, backwards


def _fuse_attention(gm: fx.GraphModule) -> None:
    """Let attention be one kernel, as on a GPU. On the meta device PyTorch would write it out, with
    the probabilities held for the backward."""
    for node in gm.graph.nodes:
        if node.target is torch.nn.functional.scaled_dot_product_attention:
            node.target = _fused
    gm.recompile()


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    if attn_mask is not None:
        shape = (*query.shape[:3], key.shape[2])
        attn_mask = attn_mask.to(query.dtype).expand(shape)  # its values count nothing
    return ATTENTION(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


def _marked(model: nn.Module, batch: dict[str, Tensor], plan: SparsityPlan, rank: int) -> Runtime:
    """Mark a model as `compile` does, with factors and norms that have shapes only."""
    frozen = frozen_weights(model)
    sparsity = plan.resolve(frozen, [name for name, _ in model.named_modules()])
    state = Runtime(model, plan, sparsity, frozen)
    factors = {
        w.canonical: (
            torch.empty(w.out_features, rank, device="meta"),
            torch.empty(rank, w.in_features, device="meta"),
        )
        for w in frozen
    }
    norms = {w.canonical: {"norms": torch.empty(w.in_features, device="meta")} for w in frozen}
    state.attached.mark(factors, norms)
    tokens = split_tokens(plan, batch, shift=True)
    assert tokens is not None
    state.set_sparsity_scale(1.0)
    state.trace_inputs.tokens = [
        tensor.to("meta") for tensor in _lists(tokens, batch).tokens.encode()
    ]
    return state


def _label_list(state: Runtime, batch: dict[str, Tensor], labels: Tensor) -> list[Tensor]:
    """What the marker before the logits carries; one list with the output tokens if they agree."""
    tokens = split_tokens(state.plan, batch, shift=True)
    assert tokens is not None
    lists = _lists(tokens, batch)
    assert lists.labelled is not None
    if lists.labelled is lists.tokens.dense:
        return [labels, *state.trace_inputs.tokens[3:5]]
    return [labels, *(tensor.to("meta") for tensor in lists.labelled)]


def _lists(tokens: Tokens, batch: dict[str, Tensor]) -> TokenLists:
    placed, totals = place(tokens)
    counts = count(totals)
    grid = tokens.sparse.shape
    lengths = list_lengths(counts, grid, split=tokens.split, padded=False, labelled=True)
    return token_lists(tokens, placed, lengths, labelled=True, unlike=counts.unlike)
