"""The repeated blocks of a model, by the names of its frozen weights."""

from __future__ import annotations

from collections import defaultdict

from sparselora_fx.model.frozen_weights import FrozenWeight


def block_positions(weights: list[FrozenWeight]) -> dict[str, tuple[int, int]]:
    """Position of each weight's block and the number of blocks, by ``FrozenWeight.name``.

    Weights outside the repeated blocks (see `block_names`) are left out.
    """
    blocks = {name: block.rpartition(".") for name, block in block_names(weights).items()}
    members: dict[str, set[int]] = defaultdict(set)
    for prefix, _, number in blocks.values():
        members[prefix].add(int(number))
    return {
        name: (sorted(members[prefix]).index(int(number)), len(members[prefix]))
        for name, (prefix, _, number) in blocks.items()
    }


def block_names(weights: list[FrozenWeight]) -> dict[str, str]:
    """Name of the repeated block that holds each weight ("model.layers.3"), by
    ``FrozenWeight.name``.

    A block is a member of a numbered list of modules. Of several nested lists the longest counts.
    A list that holds most of the model's weights goes before the others, so that a list inside one
    block (experts) is not taken for the stack of blocks. Weights outside any such list are left
    out.
    """
    members: dict[str, set[int]] = defaultdict(set)
    counts: dict[str, int] = defaultdict(int)
    lists = {w.name: _numbered_lists(w.place) for w in weights}
    for found in lists.values():
        for prefix, number in found.items():
            members[prefix].add(number)
            counts[prefix] += 1
    main = {prefix for prefix, count in counts.items() if 2 * count > len(weights)}
    result = {}
    for name, found in lists.items():
        usable = [prefix for prefix in found if not main or prefix in main]
        if usable:
            best = max(usable, key=lambda prefix: len(members[prefix]))
            result[name] = f"{best}.{found[best]}".lstrip(".")
    return result


def _numbered_lists(name: str) -> dict[str, int]:
    """``"model.layers.3.mlp" -> {"model.layers": 3}``, outermost first."""
    parts = name.split(".")
    return {".".join(parts[:i]): int(p) for i, p in enumerate(parts) if p.isascii() and p.isdigit()}
