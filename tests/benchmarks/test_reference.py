"""The eager peer of the benchmarks computes what the compiler does."""

import pytest
import torch

from benchmarks.support import reference
from tests.support import oracle
from tests.support.slow import slow

LEVELS = [(0.75, 0.25), (0.6, 0.5)]


@pytest.mark.parametrize("targets", [slow(oracle.ATTENTION_TARGETS), "all-linear"])
def test_reference_equals_sliced(targets: str | tuple[str, ...]) -> None:
    """On the same channels, loss and every adapter gradient agree."""
    model = oracle.llama(layers=2, targets=targets, dtype=torch.float64, bias=True)
    data = oracle.batch(padding=0)
    got = oracle.run_compiled(model, data)
    assert len(got.record.sites) == 14
    shared = reference.apply(
        model, oracle.estimator_of(model).factors, LEVELS, tokens="all", multiple=1,
        fixed=got.record.selections,
    )  # fmt: skip
    oracle.assert_close(oracle.step(model, {**data, "use_cache": False}), got, 1e-9)
    shared.restore()


def test_cut_gradients_are_wrong_and_the_loss_is_not() -> None:
    model = oracle.llama(layers=2, targets=oracle.ATTENTION_TARGETS, dtype=torch.float64)
    data = {**oracle.batch(padding=0), "use_cache": False}
    data["labels"][:, :6] = -100
    steps = []
    for cut in (False, True):
        factors = oracle.estimator_of(model).factors
        shared = reference.apply(model, factors, LEVELS, multiple=1, cut_gradients=cut)
        steps.append(oracle.step(model, data))
        assert shared.split == 5
        shared.restore()
    exact, cut_ = steps
    assert oracle.difference(cut_.loss, exact.loss) == 0
    assert oracle.worst_difference(cut_, exact)[0] > 1e-3


def test_restore_leaves_the_model_dense() -> None:
    model, data = oracle.llama(layers=2), {**oracle.batch(padding=0), "use_cache": False}
    before = oracle.step(model, data)
    factors = oracle.estimator_of(model).factors
    shared = reference.apply(model, factors, LEVELS, tokens="all", multiple=1)
    assert oracle.worst_difference(oracle.step(model, data), before)[0] > 1e-3
    shared.restore()
    oracle.assert_identical(oracle.step(model, data), before)
