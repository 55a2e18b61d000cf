"""How well scores choose the channels of feed-forward regions, measured on real activations.

Scores are computed by the library itself: `ScoreGraph` traces a region, lets the passes insert the
predictor, and keeps the nodes that lead to its scores. A selection is judged by the region's own
dense activations.

Shape letters: B samples, L their length, T tokens that are no padding, K input channels, N hidden
channels, M outputs of the region.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

import sparselora_fx as slx
from benchmarks.support.activations import FeedForward, Seen
from sparselora_fx.estimator.low_rank import Factors
from sparselora_fx.ir.score_ops import channel_energy
from sparselora_fx.model.attributes import buffer_name
from sparselora_fx.model.frozen_weights import frozen_weights
from sparselora_fx.passes import PIPELINE
from sparselora_fx.plan.plan import Sparsity
from sparselora_fx.plan.score import Score
from sparselora_fx.rewrite.rewrite import Options, Rewrite
from sparselora_fx.runtime.runtime import Runtime

_CHOOSING = [step.__name__ for step in PIPELINE].index("insert_predictor") + 1


class Judged(NamedTuple):
    """A selection on one batch: shares of the true top k, relative errors of the output."""

    overlap: float
    error: float
    token_error: float


class Ffn(nn.Module):
    """A feed-forward region as a module: linears that share the model's weights."""

    def __init__(self, region: FeedForward) -> None:
        super().__init__()
        self.producers = nn.ModuleList(_linear(w, b) for w, b in region.producers.values())
        self.combine = region.combine
        self.consumer = _linear(region.consumer, None)
        self.names = {f"producers.{i}": name for i, name in enumerate(region.producers)}
        self.names["consumer"] = region.consumer_name  # own name -> the weight's in the model

    def forward(self, x: Tensor) -> Tensor:
        return self.consumer(self.combine(*(linear(x) for linear in self.producers)))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    linear.out_features, linear.in_features = weight.shape
    return linear


class ScoreGraph:
    """The score of a region's channels as a function of input, weights and factors.

    Traced on one region with one estimator; `__call__` serves all regions of the same structure,
    and estimators of any rank that know the same things, since all of these are graph inputs.

    Attributes:
        run: the graph itself, a function of `arguments`, returning ``([N] scores,)``.
        inputs: what its arguments are: names of parameters and buffers, "x", "counted".
    """

    def __init__(self, region: FeedForward, estimator: slx.SVDEstimator, score: Score) -> None:
        self.score = score
        self.inputs: list[str] = []
        self.run: Callable[..., Any]
        module = Ffn(region)
        frozen = frozen_weights(module)
        plan = slx.SparsityPlan(0.5, tokens="all", start_step=0, channel_multiple=1)
        state = Runtime(module, plan, {w.name: Sparsity(0.5, 0.5) for w in frozen}, frozen)
        factors, vectors = _parts(module, estimator, score)
        state.attached.mark(factors, vectors)
        state.set_sparsity_scale(1.0)
        x = torch.zeros(3, 5, region.producers[next(iter(region.producers))][0].shape[1])
        counted = torch.ones(3, 5, dtype=torch.bool)
        state.trace_inputs.tokens = [counted]
        held = {id(t): name for name, t in (*module.named_parameters(), *module.named_buffers())}
        held |= {id(x): "x", id(counted): "counted"}
        torch.compiler.reset()
        with torch.no_grad():
            torch.compile(module.forward, backend=self._backend(held), dynamic=False)(x)
        state.attached.unmark()

    def _backend(self, held: dict[int, str]) -> Callable[..., Any]:
        def backend(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
            rewrite = Rewrite(gm, Options(1, score=self.score))
            for step in PIPELINE[:_CHOOSING]:
                step(rewrite)
            (region,) = rewrite.regions
            chosen = region.choices[0].selection
            assert chosen is not None
            gm.graph.output_node().args = ((chosen.args[0],),)
            gm.graph.eliminate_dead_code()
            gm.recompile()
            self.run = gm

            def first_call(*args: Tensor) -> Any:
                self.inputs = [held[id(arg)] for arg in args]
                return gm(*args)

            return first_call

        return backend

    @torch.no_grad()
    def __call__(self, estimator: slx.SVDEstimator, region: FeedForward, seen: Seen) -> Tensor:
        """``[N]`` scores for one batch that the region saw."""
        scores: Tensor = self.run(*self.arguments(estimator, region, seen))[0]
        return scores

    def arguments(
        self, estimator: slx.SVDEstimator, region: FeedForward, seen: Seen
    ) -> list[Tensor]:
        """What `run` takes for one batch of one region."""
        module = Ffn(region)
        held: dict[str, Tensor] = dict(module.named_parameters())
        factors, vectors = _parts(module, estimator, self.score)
        for name, (a, b) in factors.items():
            held |= {f"{name}.{buffer_name('weight', 'a')}": a}
            held |= {f"{name}.{buffer_name('weight', 'b')}": b}
        for name, known in vectors.items():
            held |= {
                f"{name}.{buffer_name('weight', word)}": value for word, value in known.items()
            }
        held |= {"x": seen.x, "counted": seen.mask}
        return [held[name] for name in self.inputs]


def _parts(
    module: Ffn, estimator: slx.SVDEstimator, score: Score
) -> tuple[dict[str, Factors], dict[str, dict[str, Tensor]]]:
    """Factors and vectors of a model's estimator under the region's own names."""
    named = slx.SVDEstimator(
        {own: estimator.factors[name] for own, name in module.names.items()},
        {},
        statistics={
            own: estimator.statistics[name]
            for own, name in module.names.items()
            if name in estimator.statistics
        },
    )
    return named.factors, named.vectors(frozen_weights(module), score)


def true_scores(region: FeedForward, seen: Seen, *, weighted: bool = True) -> Tensor:
    """``[N]``: what each channel of the dense hidden state adds to the output, squared and alone:
    ``mean_t h_tn^2``, times the squared column norm of the consumer if ``weighted``."""
    energy = channel_energy(seen.hidden, None, None, False)
    return energy * region.consumer.square().sum(dim=0) if weighted else energy


@torch.no_grad()
def judge(
    scores: Tensor, region: FeedForward, seen: Seen, kept: Sequence[int], truth: Tensor
) -> list[Judged]:
    """The selections of the ``kept`` best channels (each count), by scores ``[N]``.

    With y = W h of the dense hidden state (before the consumer's bias) and y_C that of the kept
    channels: ``error = |y_C - y| / |y|`` in the Frobenius norm over all tokens, ``token_error`` the
    mean over tokens of the same. ``overlap`` is with the channels of largest ``truth`` ``[N]``.
    """
    order = scores.argsort(descending=True, stable=True)
    best = truth.argsort(descending=True, stable=True)
    weight = region.consumer.t()
    rest = seen.hidden @ weight
    size = rest.norm(dim=1).clamp(min=torch.finfo(rest.dtype).tiny)
    found: dict[int, Judged] = {}
    at = 0
    for k in sorted(kept):  # selections are nested: only what is new is multiplied
        rows, at = order[at:k], k
        rest -= seen.hidden[:, rows] @ weight[rows]
        lost = rest.norm(dim=1)
        overlap = torch.isin(order[:k], best[:k]).double().mean()
        shares = (overlap, lost.norm() / size.norm(), (lost / size).mean())
        found[k] = Judged(*(share.item() for share in shares))
    return [found[k] for k in kept]
