"""The result of `sensitivity`: what each region's sparsity costs in loss and saves in work."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparselora_fx.errors import SensitivityError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FORMAT = "sparselora_fx.sensitivity"


@dataclass(frozen=True)
class Measurement:
    """One region at one level, everything else dense.

    Attributes:
        region: canonical name of the region's module.
        kind: "ffn" or "attention".
        level: the fraction of its channels that was skipped, in (0, 1).
        loss: mean loss over the batches, in the unit of the model's loss.
        loss_change: ``loss`` minus the dense loss on the same batches.
        saved: multiply-adds of frozen linears that one sparse token no longer costs.
        keys: the keys by which a plan names exactly this region.
    """

    region: str
    kind: str
    level: float
    loss: float
    loss_change: float
    saved: int
    keys: tuple[str, ...]


@dataclass(frozen=True)
class SensitivityTable:
    """Loss change and saved work of every region at every level.

    Attributes:
        rows: by region in the order of the model, then by level.
        dense_loss: mean loss of the dense model on the same batches.
        base_flops: multiply-adds of all frozen linears for one token.
        sparse_tokens: the share of the batches' real tokens that the token policy made sparse.
        tokens: the token policy that was measured; None for a user's function.
        channel_multiple: as in the plan.
        graphs: how many graphs were compiled for it.
    """

    rows: tuple[Measurement, ...]
    dense_loss: float
    base_flops: int
    sparse_tokens: float
    tokens: str | None
    channel_multiple: int
    graphs: int = 0

    def share_saved(self, row: Measurement) -> float:
        """The share of the base FLOPs of a sparse token that a row saves."""
        return row.saved / self.base_flops

    def __str__(self) -> str:
        heads = ("region", "kind", "level", "loss", "loss change", "base FLOPs saved")
        cells = [
            (r.region, r.kind, f"{r.level:g}", f"{r.loss:.5f}", f"{r.loss_change:+.5f}",
             f"{self.share_saved(r):.2%}")
            for r in self.rows
        ]  # fmt: skip
        widths = [max(len(row[i]) for row in [heads, *cells]) for i in range(len(heads))]
        lines = [
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in [heads, *cells]
        ]
        lines.append(
            f"dense loss {self.dense_loss:.5f}; {self.sparse_tokens:.0%} of the tokens are sparse; "
            f"{self.graphs} graphs compiled"
        )
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON; `load` reads it back equal. `SensitivityError` if it cannot."""
        data = {"format": _FORMAT, **asdict(self)}
        try:
            Path(path).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise SensitivityError(f"cannot write the table to {str(path)!r}: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SensitivityTable:
        """Read what `save` wrote. `SensitivityError`: no such file, or no such table in it."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data.pop("format") != _FORMAT:
                raise KeyError("format")
            rows = [Measurement(**{**row, "keys": tuple(row["keys"])}) for row in data.pop("rows")]
            return cls(tuple(rows), **data)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SensitivityError(
                f"{str(path)!r} is no readable sensitivity table ({error!r}); "
                "expected a file written by SensitivityTable.save"
            ) from error

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the loss changes as a picture: one panel a kind, regions across, levels upwards.

        Raises:
            SensitivityError: matplotlib is not installed, or the file cannot be written.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise SensitivityError(
                "drawing the table needs matplotlib, which is not installed; "
                "install it with: pip install 'sparselora_fx[plot]'"
            ) from error
        kinds = list(dict.fromkeys(row.kind for row in self.rows))
        most = max(len({r.region for r in self.rows if r.kind == kind}) for kind in kinds)
        figure = Figure(figsize=(max(5.0, 2.5 + 0.5 * most), 3.2 * len(kinds)))
        panels = figure.subplots(len(kinds), 1, squeeze=False)[:, 0]
        worst = max([abs(row.loss_change) for row in self.rows] + [1e-12])
        for panel, kind in zip(panels, kinds, strict=True):
            self._draw(figure, panel, kind, worst)
        figure.tight_layout()
        try:
            figure.savefig(Path(path), dpi=120, format="png")
        except OSError as error:
            raise SensitivityError(f"cannot write the plot to {str(path)!r}: {error}") from error

    def _draw(self, figure: Figure, panel: Axes, kind: str, worst: float) -> None:
        rows = [row for row in self.rows if row.kind == kind]
        regions = list(dict.fromkeys(row.region for row in rows))
        levels = sorted({row.level for row in rows})
        grid = [[float("nan")] * len(regions) for _ in levels]
        for row in rows:
            grid[levels.index(row.level)][regions.index(row.region)] = row.loss_change
        image = panel.imshow(
            grid, origin="lower", aspect="auto", cmap="RdBu_r", vmin=-worst, vmax=worst
        )
        panel.set_xticks(range(len(regions)), [_short(name) for name in regions], rotation=60)
        panel.set_yticks(range(len(levels)), [f"{level:g}" for level in levels])
        panel.set_ylabel("channels skipped")
        panel.set_title(f"{kind}: loss change when only this region is sparse")
        figure.colorbar(image, ax=panel)


def _short(name: str) -> str:
    """The last three parts of a module's name: ``"layers.3.mlp"``."""
    return ".".join(name.split(".")[-3:])
