"""The result of `sensitivity` on several kinds of data: a table for each, and their worst case."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sparselora_fx.errors import SensitivityError
from sparselora_fx.plan.sensitivity_table import Measurement, SensitivityTable


@dataclass(frozen=True)
class DomainTables(Mapping[str, SensitivityTable]):
    """A `SensitivityTable` for each domain, by its name; all measure the same regions and levels.

    Attributes:
        tables: in the order in which the domains were given; at least one.
    """

    tables: dict[str, SensitivityTable]

    def __getitem__(self, domain: str) -> SensitivityTable:
        return self.tables[domain]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tables)

    def __len__(self) -> int:
        return len(self.tables)

    def worst_case(self) -> SensitivityTable:
        """One table with, for each region and level, the loss change of the domain that it harms
        most (by absolute value, as budgets count).

        Choices whose changes sum to a budget here stay within it in every domain.
        """
        first = next(iter(self.tables.values()))
        rows = [
            max((table.rows[i] for table in self.tables.values()), key=_harm)
            for i in range(len(first.rows))
        ]
        share = min(table.sparse_tokens for table in self.tables.values())
        return replace(first, rows=tuple(rows), sparse_tokens=share)

    def __str__(self) -> str:
        return "\n\n".join(f"[{domain}]\n{table}" for domain, table in self.tables.items())

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``<domain>.json`` for each domain; `SensitivityError` if that cannot be done."""
        for domain, path in self._paths(folder, "json").items():
            self.tables[domain].save(path)

    def plot(self, folder: str | os.PathLike[str]) -> None:
        """Draw ``<domain>.png`` for each domain; see `SensitivityTable.plot`."""
        for domain, path in self._paths(folder, "png").items():
            self.tables[domain].plot(path)

    def _paths(self, folder: str | os.PathLike[str], ending: str) -> dict[str, Path]:
        root = Path(folder)
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SensitivityError(f"cannot make the folder {str(root)!r}: {error}") from error
        return {domain: root / f"{domain}.{ending}" for domain in self.tables}


def check_domains(domains: Mapping[str, object]) -> None:
    """`SensitivityError` unless there are domains, with names that can be those of files."""
    wrong = [
        name for name in domains if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name)
    ]
    if wrong or not domains:
        raise SensitivityError(
            f"domains are named {list(domains)!r}; give at least one, each named by letters, "
            "digits, '.', '_' and '-', such as {'en': batches, 'code': batches}"
        )


def _harm(row: Measurement) -> float:
    """How much a row costs; one that is not a number most of all."""
    change = abs(row.loss_change)
    return change if change == change else float("inf")
