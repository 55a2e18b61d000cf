"""Labels everywhere: hardly a token is sparse, so the step runs dense and says so."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest

import sparselora_fx as slx
from sparselora_fx.runtime.runtime import get_runtime
from tests.support import oracle
from tests.support.tiny_models import tiny


def labelled(prompt: int = 0, length: int = 40) -> dict[str, Any]:
    data = oracle.batch(2, length, padding=0)
    data["labels"][:, :prompt] = -100
    return data


def messages(model: Any, *batches: dict[str, Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for data in batches:
            model(**data).loss.backward()
    return [str(w.message) for w in caught if "would be sparse" in str(w.message)]


def compiled(**plan: Any) -> Any:
    model = tiny()
    sparsity = slx.SparsityPlan(0.5, start_step=0, channel_multiple=1, **plan)
    return slx.compile(
        model, oracle.estimator_of(model), plan=sparsity, backend="eager", shift=True
    )


def test_labels_everywhere_run_dense_with_one_warning_and_explain_agrees() -> None:
    data, plain = labelled(), tiny()
    expected = oracle.step(plain, data)
    model = compiled()
    with slx.record(model) as record:
        told = messages(model, data, data)
    assert record.sites == {}
    assert len(told) == 1 and "2 of the 80 tokens" in told[0] and "2.5%" in told[0]
    oracle.assert_close(oracle.step(model, data), expected, 1e-5)
    table = slx.explain(model, verbose=True)
    assert "0 of 3 frozen linears rewritten" in table and "not traced" not in table
    assert sum("dense:" in line and "min_sparse" in line for line in table.splitlines()) == 3
    assert "0.0% of 240 tokens in 3 calls were sparse; 3 of these calls ran dense" in table


def test_sparse_and_dense_steps_are_counted_in_one_place() -> None:
    model = compiled()
    assert len(messages(model, labelled(prompt=20), labelled(), labelled(prompt=30))) == 1
    assert get_runtime(model).graphs == 2
    said = slx.explain(model, verbose=True)
    assert "\ntokens: 41.7% of 240 tokens in 3 calls were sparse; 1 of these" in said


def test_the_share_is_the_plans() -> None:
    model = compiled()
    state = get_runtime(model)
    for least, dense in [(0.0, False), (0.02, False), (0.03, True)]:
        state.plan = replace(state.plan, min_sparse=least)
        with slx.record(model) as record:
            model(**labelled())
        assert (record.sites == {}) is dense, least


@pytest.mark.parametrize("bad", [-0.1, 1.0, "few", True])
def test_a_share_out_of_range_is_refused(bad: Any) -> None:
    with pytest.raises(slx.PlanError, match="min_sparse"):
        slx.SparsityPlan(0.5, min_sparse=bad)
