"""What a marker carries is read back as it was written."""

from __future__ import annotations

import pytest

from sparselora_fx.ir.markers import DENSE, MarkedTokens, SiteSpec, TokenList

LISTS = [TokenList(f"idx{i}", f"pos{i}") for i in range(4)]


@pytest.mark.parametrize(
    ("tokens", "tensors"),
    [
        (MarkedTokens[str](), 0),
        (MarkedTokens("counted"), 1),
        (MarkedTokens("counted", *LISTS[:2]), 5),
        (MarkedTokens("counted", *LISTS), 9),
    ],
)
def test_token_lists(tokens: MarkedTokens[str], tensors: int) -> None:
    carried = tokens.encode()
    assert len(carried) == len(set(carried)) == tensors
    assert MarkedTokens.decode(carried) == tokens
    assert MarkedTokens.decode(tuple(carried)) == tokens


def test_half_a_list_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        MarkedTokens.decode(["counted", "idx"])


@pytest.mark.parametrize(
    "spec",
    [
        SiteSpec(0.0, 0.0),
        SiteSpec(0.1 + 0.2, 1 / 3),
        SiteSpec(0.5, 0.25, ("norms", "prior"), kn=True),
    ],
)
def test_specs(spec: SiteSpec) -> None:
    assert SiteSpec.decode(spec.encode()) == spec
    assert (spec.encode() == DENSE) == (max(spec.ffn, spec.attention) == 0)
