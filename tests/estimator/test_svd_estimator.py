"""The randomised SVD, the estimator's file, and the refusal of foreign models and damaged files."""

import functools
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sparselora_fx.errors import EstimatorError
from sparselora_fx.estimator.low_rank import factor_group, groups_of, low_rank
from sparselora_fx.estimator.svd_estimator import SVDEstimator
from sparselora_fx.model.frozen_weights import frozen_weights


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The exact factorisations to compare with are small; on busy cores threads slow them down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


LORA = LoraConfig(target_modules=["q_proj", "up_proj"])


def llama(seed: int = 0, *, layers: int = 2, hidden: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=hidden,
        intermediate_size=80,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


@functools.cache
def spectrum(n: int, k: int, power: float, seed: int = 0) -> torch.Tensor:
    """An ``[n, k]`` matrix with singular values ``i ** -power``, like those of trained weights."""
    gen = torch.Generator().manual_seed(seed)
    size = min(n, k)
    u, _ = torch.linalg.qr(torch.randn(n, size, generator=gen, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(k, size, generator=gen, dtype=torch.float64))
    s = torch.arange(1, size + 1, dtype=torch.float64) ** -power
    return (u * s) @ v.t()


def best_error(w: torch.Tensor, rank: int) -> float:
    """Frobenius error of the exact truncated SVD: by Eckart-Young no factors do better."""
    return float(torch.linalg.svdvals(w.double())[rank:].norm())


# ------------------------------------------------------------------------------ low_rank


@pytest.mark.parametrize(("n", "k"), [(300, 120), (120, 300), (200, 200)])
@pytest.mark.parametrize("power", [0.3, 0.7, 1.5])
@pytest.mark.parametrize("rank", [2, 8, 32])
def test_error_is_within_three_percent_of_the_exact_svd(
    n: int, k: int, power: float, rank: int
) -> None:
    w = spectrum(n, k, power)
    a, b = low_rank(w, rank, generator=torch.Generator().manual_seed(1))
    exact = best_error(w, rank)
    assert exact * (1 - 1e-9) <= float((w - a @ b).norm()) <= 1.03 * exact


def test_error_on_a_gaussian_matrix_the_hardest_case() -> None:
    w = torch.randn(256, 192, dtype=torch.float64)
    a, b = low_rank(w, 8)
    assert float((w - a @ b).norm()) <= 1.01 * best_error(w, 8)


def test_factors_are_balanced_as_us_and_vh() -> None:
    w = spectrum(90, 70, 1.0)
    a, b = low_rank(w, 6)
    s = torch.linalg.svdvals(w)[:6]
    torch.testing.assert_close(b @ b.t(), torch.eye(6, dtype=b.dtype), atol=1e-10, rtol=0)
    torch.testing.assert_close(a.norm(dim=0), s, rtol=1e-3, atol=0)
    assert float((a.t() @ a - torch.diag(a.norm(dim=0) ** 2)).abs().max()) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_kept_and_small_weights_are_exact(dtype: torch.dtype) -> None:
    w = torch.randn(12, 9).to(dtype)
    a, b = low_rank(w, 9)
    assert a.dtype == b.dtype == dtype and a.shape == (12, 9) and b.shape == (9, 9)
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(a.double() @ b.double(), w.double(), atol=tolerance, rtol=tolerance)


def test_a_low_rank_weight_is_recovered_and_zero_is_allowed() -> None:
    w = torch.randn(150, 4, dtype=torch.float64) @ torch.randn(4, 100, dtype=torch.float64)
    a, b = low_rank(w, 8)
    torch.testing.assert_close(a @ b, w)
    a, b = low_rank(torch.zeros(150, 100), 8)
    assert not (a @ b).any()


def test_same_seed_same_factors_and_a_batch_equals_its_members() -> None:
    stack = torch.stack([spectrum(80, 60, 0.5, seed) for seed in range(3)])
    a, b = low_rank(stack, 4, generator=torch.Generator().manual_seed(3))
    for i in range(3):
        one_a, one_b = low_rank(stack[i], 4, generator=torch.Generator().manual_seed(3))
        again = low_rank(stack[i], 4, generator=torch.Generator().manual_seed(3))
        assert torch.equal(one_a, again[0]) and torch.equal(one_b, again[1])
        torch.testing.assert_close(a[i] @ b[i], one_a @ one_b)


@pytest.mark.parametrize("rank", [0, -1, 7, True, 2.0, None])
def test_low_rank_clamps_nothing(rank: object) -> None:
    with pytest.raises(EstimatorError, match="allows an int from 1 to 6"):
        low_rank(torch.randn(6, 9), rank)  # type: ignore[arg-type]


def test_threads_are_restored() -> None:
    torch.set_num_threads(2)
    try:
        low_rank(torch.randn(64, 64), 4)
        with pytest.raises(EstimatorError, match="inf or NaN"):
            low_rank(torch.full((64, 64), torch.nan), 4)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


# ------------------------------------------------------------------------------ build


def test_build_covers_every_frozen_weight_and_only_reads() -> None:
    model = get_peft_model(llama(), LORA)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    estimator = SVDEstimator.build(model, 4, progress=False)
    weights = frozen_weights(model)
    assert list(estimator.factors) == [w.canonical for w in weights] == list(estimator.fingerprint)
    for w in weights:
        a, b = estimator.factors[w.canonical]
        assert a.shape == (w.out_features, 4) and b.shape == (4, w.in_features)
        assert not a.requires_grad and a.is_contiguous() and b.is_contiguous()
        error = float((w.logical() - a @ b).double().norm())
        assert error <= 1.02 * best_error(w.logical().detach(), 4)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_build_on_conv1d_factors_the_logical_weight() -> None:
    config = GPT2Config(
        vocab_size=48,
        n_positions=16,
        n_embd=32,
        n_layer=1,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).requires_grad_(False)
    a, b = SVDEstimator.build(model, 32, progress=False).factors["transformer.h.0.mlp.c_fc"]
    assert a.shape == (128, 32) and b.shape == (32, 32)
    torch.testing.assert_close((a @ b).t(), model.transformer.h[0].mlp.c_fc.weight.data)


def test_seed_and_rank_per_layer() -> None:
    model = llama().requires_grad_(False)
    ranks = {"mlp": 6, "layers.1.mlp.up_proj": 2, "self_attn": 3}
    one, two = (SVDEstimator.build(model, ranks, progress=False, seed=5) for _ in range(2))
    for name, (a, b) in one.factors.items():
        expected = 2 if name.endswith("1.mlp.up_proj") else 6 if "mlp" in name else 3
        assert b.shape[0] == a.shape[1] == expected
        assert torch.equal(a, two.factors[name].a) and torch.equal(b, two.factors[name].b)
    partial = SVDEstimator.build(model, {"layers.0": 2}, progress=False)
    assert partial.factors["model.layers.1.mlp.up_proj"].b.shape[0] == 8


def test_a_weight_smaller_than_the_rank_is_clamped_to_its_size() -> None:
    model = llama().requires_grad_(False)  # k_proj and v_proj are 16 x 32, q_proj 32 x 32
    factors = SVDEstimator.build(model, 24, progress=False).factors
    assert factors["model.layers.0.self_attn.k_proj"].b.shape == (16, 32)
    assert factors["model.layers.0.self_attn.q_proj"].b.shape == (24, 32)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "rank is 0; allowed: a positive int"),
        (-3, "rank is -3"),
        (True, "rank is True"),
        (8.0, "rank is 8.0"),
        (33, "rank 33 exceeds every weight it applies to; allowed: up to 32"),
        ({"k_proj": 17}, "rank 17 exceeds every weight it applies to; allowed: up to 16"),
        ({"mpl": 4}, "the rank for 'mpl' matches no frozen weight"),
        ({"mlp": 0}, "rank is 0 for 'mlp'"),
    ],
)
def test_bad_ranks(rank: object, message: str) -> None:
    with pytest.raises(EstimatorError, match=message):
        SVDEstimator.build(llama().requires_grad_(False), rank, progress=False)  # type: ignore[arg-type]


def test_models_that_cannot_be_factored() -> None:
    with pytest.raises(EstimatorError, match="attach LoRA"):
        SVDEstimator.build(llama(), progress=False)
    with torch.device("meta"):
        empty = llama().requires_grad_(False)
    with pytest.raises(EstimatorError, match="on the meta device"):
        SVDEstimator.build(empty, progress=False)
    broken = llama().requires_grad_(False)
    broken.model.layers[1].mlp.up_proj.weight[3, 2] = torch.inf
    with pytest.raises(EstimatorError, match=r"layers\.1\.mlp\.up_proj.*inf or NaN"):
        SVDEstimator.build(broken, progress=False)


def test_grouping_by_shape_gives_the_same_factors() -> None:
    weights = frozen_weights(llama().requires_grad_(False))
    ranks = {w.canonical: 4 for w in weights}
    groups = list(groups_of(weights, ranks, torch.device("cuda")))
    assert sorted(w.name for group in groups for w in group) == sorted(w.name for w in weights)
    assert len(groups) == 4  # q+o, k+v, gate+up, down
    cpu = torch.device("cpu")
    for group in groups:
        for w, (a, b) in zip(group, factor_group(group, 4, cpu, seed=0), strict=True):
            (single,) = factor_group((w,), 4, None, seed=0)
            torch.testing.assert_close(a @ b, single.a @ single.b)


@pytest.mark.gpu
def test_gpu_and_cpu_agree() -> None:
    model = llama().requires_grad_(False)
    on_gpu = SVDEstimator.build(model, 4, device="cuda", progress=False)
    on_cpu = SVDEstimator.build(model, 4, device="cpu", progress=False)
    for name, (a, b) in on_cpu.factors.items():
        got = on_gpu.factors[name]
        torch.testing.assert_close(got.a @ got.b, a @ b, atol=1e-4, rtol=1e-3)


# ------------------------------------------------------------------------------ save, load, check


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "estimator.safetensors"
    SVDEstimator.build(get_peft_model(llama(), LORA), 4, progress=False, seed=7).save(path)
    return path


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    model = llama().to(dtype).requires_grad_(False)
    built = SVDEstimator.build(model, {"mlp": 5}, progress=False, seed=3)
    built.save(tmp_path / "e.safetensors")
    loaded = SVDEstimator.load(tmp_path / "e.safetensors")
    assert loaded.fingerprint == built.fingerprint and loaded.seed == 3 and loaded.complete
    assert list(loaded.factors) == list(built.factors)
    for name, (a, b) in built.factors.items():
        assert loaded.factors[name].a.dtype == dtype
        assert torch.equal(loaded.factors[name].a, a) and torch.equal(loaded.factors[name].b, b)
    assert [p.name for p in tmp_path.iterdir()] == ["e.safetensors"]
    loaded.check(model)


def test_a_truncated_file_is_refused(saved: Path) -> None:
    data = saved.read_bytes()
    for size in (0, 1, 7, 8, 20, len(data) // 2, len(data) - 1):
        saved.write_bytes(data[:size])
        with pytest.raises(EstimatorError, match="build"):
            SVDEstimator.load(saved)


def test_random_bytes_and_flipped_bytes_are_refused(saved: Path) -> None:
    data = saved.read_bytes()
    rng = random.Random(0)
    saved.write_bytes(rng.randbytes(4096))
    with pytest.raises(EstimatorError):
        SVDEstimator.load(saved)
    for at in [rng.randrange(len(data)) for _ in range(60)]:
        saved.write_bytes(data[:at] + bytes([data[at] ^ 0x15]) + data[at + 1 :])
        try:
            loaded = SVDEstimator.load(saved)
        except EstimatorError:
            continue
        assert loaded.seed == 7 and len(loaded.factors) == 14  # padding: nothing was lost
        loaded.check(get_peft_model(llama(), LORA))


def test_missing_files_and_other_formats_are_refused(saved: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(EstimatorError, match="cannot read the estimator"):
            SVDEstimator.load(path)
    other = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2, 2)}, other)
    with pytest.raises(EstimatorError, match="no estimator file"):
        SVDEstimator.load(other)
    with pytest.raises(EstimatorError, match="cannot write"):
        SVDEstimator.load(saved).save(tmp_path / "no" / "such" / "folder" / "e")


def test_missing_tensors_and_versions_are_refused(saved: Path) -> None:
    tensors = load_file(saved)
    size = int.from_bytes(saved.read_bytes()[:8], "little")
    text = json.loads(saved.read_bytes()[8 : 8 + size])["__metadata__"]["sparselora_fx"]
    first = next(iter(tensors))
    fewer = {key: value.clone() for key, value in tensors.items() if key != first}
    save_file(fewer, saved, metadata={"sparselora_fx": text})
    with pytest.raises(EstimatorError, match=f"lacks the tensors '{first}'"):
        SVDEstimator.load(saved)
    all_of_them = {key: value.clone() for key, value in tensors.items()}
    save_file(
        all_of_them, saved, metadata={"sparselora_fx": text.replace('"version": 1', '"version": 9')}
    )
    with pytest.raises(EstimatorError, match="format version 9"):
        SVDEstimator.load(saved)
    save_file(
        all_of_them, saved, metadata={"sparselora_fx": text.replace('"seed": 7', '"seed": 8')}
    )
    with pytest.raises(EstimatorError, match="damaged"):
        SVDEstimator.load(saved)


def test_check_accepts_the_same_base_in_any_dress(saved: Path) -> None:
    estimator = SVDEstimator.load(saved)
    estimator.check(llama().requires_grad_(False))
    estimator.check(llama().to(torch.bfloat16).requires_grad_(False))
    estimator.check(get_peft_model(llama(), LoraConfig(target_modules="all-linear")))
    relayout = llama().requires_grad_(False)
    for w in frozen_weights(relayout):
        w.weight.data = w.weight.data.t().contiguous().t()
    estimator.check(relayout)


def test_check_refuses_foreign_models(saved: Path) -> None:
    estimator = SVDEstimator.load(saved)
    longer = llama(layers=3)
    longer.load_state_dict(llama().state_dict(), strict=False)
    cases: list[tuple[nn.Module, str]] = [
        (llama(seed=1), r"layers\.0\.self_attn\.q_proj has other values.*and 11 more"),
        (longer, r"model\.layers\.2\.self_attn\.q_proj is not in the estimator"),
        (llama(hidden=64), r"q_proj is 64x64, the estimator has 32x32"),
        (nn.Sequential(nn.Linear(4, 4)), "0 is not in the estimator"),
    ]
    for model, message in cases:
        with pytest.raises(EstimatorError, match=message) as caught:
            estimator.check(model.requires_grad_(False))
        assert "SVDEstimator.build(model)" in str(caught.value)


def test_check_matches_looks_at_the_named_weights_only() -> None:
    model = llama().requires_grad_(False)
    estimator = SVDEstimator.build(model, 4, progress=False)
    model.model.layers[1].mlp.up_proj.weight += 0.1
    estimator.check_matches(model, ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"])
    with pytest.raises(EstimatorError, match=r"layers\.1\.mlp\.up_proj has other values"):
        estimator.check_matches(model, ["model.layers.1.mlp.up_proj"])
    with pytest.raises(EstimatorError, match=r"no frozen weight 'model\.layers\.9\.mlp'"):
        estimator.check_matches(model, ["model.layers.9.mlp"])
    adapted = get_peft_model(model, LORA)
    names = [w.name for w in frozen_weights(adapted) if "layers.0" in w.name]
    estimator.check_matches(adapted, names)


# ------------------------------------------------------------------------------ reference files


def write_spft(
    folder: Path, model: LlamaForCausalLM, rank: int = 4, *, nested: bool = True
) -> None:
    """Files in the reference implementation's layout: factors of W.T with sqrt(S) on both sides."""

    def halves(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        u, s, vh = torch.linalg.svd(weight.detach().float().t(), full_matrices=False)
        root = s[:rank].sqrt()
        return u[:, :rank] * root, root[:, None] * vh[:rank]

    mlp, attn = (folder / "mlp", folder / "attn") if nested else (folder, folder)
    mlp.mkdir(parents=True, exist_ok=True)
    attn.mkdir(parents=True, exist_ok=True)
    for i, layer in enumerate(model.model.layers):
        pairs = zip(
            halves(layer.mlp.gate_proj.weight), halves(layer.mlp.up_proj.weight), strict=True
        )
        for part, (gate, up) in zip("ab", pairs, strict=True):
            torch.save(torch.stack([gate, up]), mlp / f"layers.{i}.mlp_low_rank_{part}.pt")
        for letter in "qkv":
            weight = getattr(layer.self_attn, f"{letter}_proj").weight
            for part, half in zip("ab", halves(weight), strict=True):
                torch.save(half, attn / f"layers.{i}.self_attn_{letter}_low_rank_{part}.pt")


@pytest.mark.parametrize("nested", [True, False])
def test_reference_files_give_the_same_approximation(tmp_path: Path, nested: bool) -> None:
    write_spft(tmp_path, llama(), nested=nested)
    model = get_peft_model(llama(), LORA)
    estimator = SVDEstimator.from_spft(tmp_path, model)
    assert len(estimator.factors) == 10 and not estimator.complete
    weights = {w.canonical: w for w in frozen_weights(model)}
    for name, (a, b) in estimator.factors.items():
        u, s, vh = torch.linalg.svd(weights[name].logical().detach(), full_matrices=False)
        torch.testing.assert_close(a @ b, (u[:, :4] * s[:4]) @ vh[:4], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(b @ b.t(), torch.eye(4), atol=1e-5, rtol=0)
    estimator.check(model)
    estimator.save(tmp_path / "e")
    assert not SVDEstimator.load(tmp_path / "e").complete


def test_reference_files_that_are_missing_are_all_listed(tmp_path: Path) -> None:
    model = llama().requires_grad_(False)
    write_spft(tmp_path, model)
    gone = ["attn/layers.0.self_attn_k_low_rank_b.pt", "mlp/layers.1.mlp_low_rank_a.pt"]
    for name in gone:
        (tmp_path / name).unlink()
    with pytest.raises(EstimatorError) as caught:
        SVDEstimator.from_spft(tmp_path, model)
    assert all(Path(name).name in str(caught.value) for name in gone)
    layers = ["layers.0.mlp", "layers.1.self_attn"]
    assert len(SVDEstimator.from_spft(tmp_path, model, layers=layers).factors) == 5
    with pytest.raises(EstimatorError, match=r"layers\.5\.mlp"):
        SVDEstimator.from_spft(tmp_path, model, layers=["layers.5.mlp", "layers.0.mlp"])
    with pytest.raises(EstimatorError, match="is no folder"):
        SVDEstimator.from_spft(tmp_path / "none", model)


class Payload:
    """Unpickling this would run code; weights_only must refuse it."""


def test_reference_files_that_are_wrong_are_refused(tmp_path: Path) -> None:
    model = llama().requires_grad_(False)
    write_spft(tmp_path, model)
    with pytest.raises(EstimatorError, match="belong to another model"):
        SVDEstimator.from_spft(tmp_path, llama(hidden=64).requires_grad_(False))
    with pytest.raises(EstimatorError, match="to match"):
        SVDEstimator.from_spft(tmp_path, nn.Sequential(nn.Linear(4, 4)).requires_grad_(False))
    victim = tmp_path / "attn" / "layers.0.self_attn_q_low_rank_a.pt"
    good = victim.read_bytes()
    for data in (b"", good[: len(good) // 2], random.Random(1).randbytes(500)):
        victim.write_bytes(data)
        with pytest.raises(EstimatorError, match="cannot read"):
            SVDEstimator.from_spft(tmp_path, model)
    torch.save(Payload(), victim)
    with pytest.raises(EstimatorError, match="cannot read"):
        SVDEstimator.from_spft(tmp_path, model)
    torch.save({"a": torch.zeros(2)}, victim)
    with pytest.raises(EstimatorError, match="expected one floating tensor"):
        SVDEstimator.from_spft(tmp_path, model)
