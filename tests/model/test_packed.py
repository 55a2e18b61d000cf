"""Which quantised linears are understood."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from sparselora_fx.model.frozen_weights import frozen_weights
from sparselora_fx.model.opaque import opaque_by
from sparselora_fx.model.packed import packed_of, why_not


def four_bits(k: int, device: str = "cpu") -> nn.Module:
    linear = bnb.nn.Linear4bit(k, 32, bias=False, compress_statistics=False, quant_type="nf4")
    return linear.to(device)


def test_nothing_is_copied() -> None:
    linear = four_bits(128)
    packed = packed_of(linear)
    assert packed is not None and packed.quantiser == "bitsandbytes nf4"
    assert packed.storage.data_ptr() == linear.weight.data_ptr()
    assert packed.held[1] is linear.weight.quant_state.absmax
    (weight,) = frozen_weights(nn.Sequential(linear))
    assert (weight.out_features, weight.in_features) == (32, 128)
    assert weight.logical().shape == (32, 128) and weight.dtype == torch.float32


@pytest.mark.parametrize("k", [96, 128])
def test_blocks_that_cross_rows_are_not_understood_on_a_cpu(k: int) -> None:
    """On some CPUs (with AVX512) bitsandbytes itself reads wrong scales there, so that the same
    model would be sliced on one machine and not on another."""
    linear = four_bits(k)
    state = linear.weight.quant_state
    rows = bnb.functional.dequantize_4bit(linear.weight.data, state)
    state.shape = torch.Size([32 * k])
    flat = bnb.functional.dequantize_4bit(linear.weight.data, state).view(32, k)
    state.shape = torch.Size([32, k])
    assert k == 96 or torch.equal(rows, flat)
    assert (packed_of(linear) is not None) == (k == 128)
    why = "in_features 96 is no multiple of the block, 64, and some CPUs misread its scales"
    assert opaque_by(linear) == (None if k == 128 else (f"bitsandbytes (Params4bit; {why})", False))


def test_a_linear_that_is_not_quantised_yet_is_not_understood() -> None:
    linear = bnb.nn.Linear4bit(64, 32, bias=False)
    assert packed_of(linear) is None and packed_of(nn.Linear(64, 32)) is None
    assert "not quantised yet" in why_not(linear) and why_not(nn.Linear(64, 32)) == ""


def test_a_weight_that_was_stored_anew_for_evaluation_says_so() -> None:
    """On a CPU with bfloat16 products, bitsandbytes does so; here its mark is set by hand."""
    linear = four_bits(128)
    linear.weight.quant_state.packing_format_for_cpu = True  # type: ignore[union-attr]
    assert packed_of(linear) is None
    found = opaque_by(linear)
    assert found is not None and "it was evaluated, which stored it anew" in found[0]
