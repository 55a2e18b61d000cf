"""Read the predictor files ``*_low_rank_{a,b}.pt`` of SparseLoRA's reference implementation.

Each pair of files factors the *transposed* weight, ``W.T = A @ B`` with ``A = U sqrt(S)`` of
``[K, r]`` and ``B = sqrt(S) Vh`` of ``[r, N]``. ``layers.N.mlp`` stacks gate (index 0) and up
(index 1): ``[2, K, r]`` and ``[2, r, N]``. ``layers.N.self_attn_q`` (``_k``, ``_v``) is not
stacked. There are no files for o_proj and down_proj.
"""

from __future__ import annotations

from pathlib import Path

import torch

from sparselora_fx.errors import EstimatorError
from sparselora_fx.model.frozen_weights import FrozenWeight, canonical_path, suffix_distance

_SITES = {
    "mlp.gate_proj": ("mlp", "layers.{}.mlp", 0),
    "mlp.up_proj": ("mlp", "layers.{}.mlp", 1),
    "self_attn.q_proj": ("attn", "layers.{}.self_attn_q", None),
    "self_attn.k_proj": ("attn", "layers.{}.self_attn_k", None),
    "self_attn.v_proj": ("attn", "layers.{}.self_attn_v", None),
}


def read_spft(
    directory: Path, weights: list[FrozenWeight], layers: list[str] | None = None
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Factors ``a`` ``[N, r]`` and ``b`` ``[r, K]`` by canonical name.

    Rescaled to ``a = U * S``, ``b = Vh``; in the dtype of the weight.

    Args:
        directory: holds the files directly or in ``mlp/`` and ``attn/``.
        weights: the frozen weights of a model whose layers are named as in Llama
            (``layers.N.mlp.gate_proj``, ...).
        layers: module suffixes to read (``"layers.3.mlp"``); None: all.

    Raises:
        EstimatorError: see ``SVDEstimator.from_spft``.
    """
    sites = [(w, *found) for w in weights if _wanted(w, layers) and (found := _site(w)) is not None]
    if not sites:
        raise EstimatorError(
            "the model has no frozen layers.N.mlp.{gate,up}_proj or "
            "layers.N.self_attn.{q,k,v}_proj to match the files with"
        )
    for key in layers or ():
        if all(suffix_distance(key, w.name) is None for w, *_ in sites):
            raise EstimatorError(f"layers names {key!r}, which holds no weight that has such files")
    if not directory.is_dir():
        raise EstimatorError(
            f"{str(directory)!r} is no folder; expected the folder of one model and rank, '.../r_8'"
        )
    files = {
        (folder, f"{stem}_low_rank_{part}.pt") for _, folder, stem, _ in sites for part in "ab"
    }
    paths = {name: _find(directory, folder, name) for folder, name in files}
    missing = sorted(name for name, path in paths.items() if path is None)
    if missing:
        raise EstimatorError(
            f"{len(missing)} of {len(files)} predictor files are missing in {str(directory)!r}: "
            f"{', '.join(missing)}; add them, or name the layers to read: "
            "from_spft(directory, model, layers=['layers.3.mlp', ...])"
        )
    cache = {name: _load(path) for name, path in paths.items() if path is not None}
    return {
        w.canonical: _factors(
            w, cache[f"{stem}_low_rank_a.pt"], cache[f"{stem}_low_rank_b.pt"], stem, index
        )
        for w, _, stem, index in sites
    }


def _wanted(weight: FrozenWeight, layers: list[str] | None) -> bool:
    return layers is None or any(suffix_distance(key, weight.name) is not None for key in layers)


def _site(weight: FrozenWeight) -> tuple[str, str, int | None] | None:
    parts = canonical_path(weight.name).split(".")
    if len(parts) < 4 or parts[-4] != "layers" or not parts[-3].isdigit():
        return None
    found = _SITES.get(".".join(parts[-2:]))
    return None if found is None else (found[0], found[1].format(parts[-3]), found[2])


def _find(directory: Path, folder: str, name: str) -> Path | None:
    return next((p for p in (directory / folder / name, directory / name) if p.is_file()), None)


def _load(path: Path) -> torch.Tensor:
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise almost anything
        raise EstimatorError(
            f"cannot read {str(path)!r}: {error}; download the file again"
        ) from error
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        raise EstimatorError(
            f"{str(path)!r} holds {type(value).__name__}; expected one floating tensor"
        )
    return value.detach()


def _factors(
    weight: FrozenWeight, first: torch.Tensor, second: torch.Tensor, stem: str, index: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    n, k = weight.out_features, weight.in_features
    rank = first.shape[-1] if first.dim() else 0
    lead = () if index is None else (2,)
    if (
        first.shape != (*lead, k, rank)
        or second.shape != (*lead, rank, n)
        or not 1 <= rank <= min(n, k)
    ):
        raise EstimatorError(
            f"{stem}_low_rank_{{a,b}}.pt are {tuple(first.shape)} and {tuple(second.shape)}; "
            f"{weight.canonical} ({n} x {k}) needs {(*lead, k, 'r')} and {(*lead, 'r', n)}: "
            "the files belong to another model"
        )
    a_in, b_out = (first, second) if index is None else (first[index], second[index])
    exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
    right, left = a_in.to(exact), b_out.to(exact)
    scale = right.norm(dim=0).clamp_min(torch.finfo(exact).tiny)
    dtype = weight.dtype
    return (left.t() * scale).to(dtype).contiguous(), (right / scale).t().to(dtype).contiguous()
