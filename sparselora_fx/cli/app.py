"""``sparselora-fx``: what the library does, from a shell. Heavy imports wait for their command.

Exit codes: 0 done; 1 `doctor` found trouble, or the work failed; 2 the command line or the
configuration is at fault. Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sparselora_fx.errors import SparseLoraError

if TYPE_CHECKING:
    from torch import nn

OK, FAILED, MISUSED = 0, 1, 2

app = typer.Typer(
    name="sparselora-fx",
    help="Fine-tune with SparseLoRA. CONFIG is a YAML file, or the name of a recipe.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a value: --set train.steps=20."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]


def _complete_recipes(incomplete: str) -> list[str]:
    from sparselora_fx.cli.config import recipes

    return [name for name in recipes() if name.startswith(incomplete)]


_Config = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG", help="YAML file, or a recipe's name.", autocompletion=_complete_recipes
    ),
]


@app.command(epilog="Example: sparselora-fx doctor --json")
def doctor(as_json: _Json = False) -> None:
    """Versions, GPUs, compilers, what would run where, and known trouble (exit code 1)."""
    with _one_line():
        from sparselora_fx.cli.doctor import examine

        found = examine()
    rows = [("version of " + name, value or "not installed") for name, value in
            found["versions"].items()]  # fmt: skip
    rows += [("compiler " + name, path or "none") for name, path in found["compilers"].items()]
    rows += [("setting " + name, value) for name, value in found["settings"].items()]
    rows += [("runs on " + name, how) for name, how in found["runs"].items()]
    rows += [("trouble", text) for text in found["trouble"]] or [("trouble", "none known")]
    _show(found, rows, as_json)
    raise typer.Exit(FAILED if found["trouble"] else OK)


@app.command(epilog="Example: sparselora-fx recipes")
def recipes(as_json: _Json = False) -> None:
    """The recipes that come with the package."""
    from sparselora_fx.cli.config import RECIPES
    from sparselora_fx.cli.config import recipes as names

    found = {name: str(RECIPES / f"{name}.yaml") for name in names()}
    _show(found, list(found.items()), as_json)


@app.command(epilog="Example: sparselora-fx estimate run.yaml --out estimator.safetensors")
def estimate(
    config: _Config,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("estimator.safetensors"),
    override: _Set = None,
    as_json: _Json = False,
) -> None:
    """Build the estimator once and keep it: say estimator.file in the YAML to use it."""
    with _one_line():
        from sparselora_fx.cli.config import read_config
        from sparselora_fx.cli.models import estimator_of, load

        loaded = load(read_config(config, override or ()))
        estimator = estimator_of(loaded, progress=_progress(as_json))
        estimator.save(out)
    found = {
        "file": str(out),
        "weights": len(estimator.factors),
        "calibrated": estimator.calibrated,
    }
    _show(found, [(key, str(value)) for key, value in found.items()], as_json)


@app.command(epilog="Example: sparselora-fx sensitivity run.yaml --batches 4 --out table.json")
def sensitivity(
    config: _Config,
    batches: Annotated[int, typer.Option(min=1, help="Batches to measure on.")] = 4,
    level: Annotated[
        list[float] | None, typer.Option("--level", help="Share of channels to skip.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the table here, as JSON.")] = None,
    override: _Set = None,
    as_json: _Json = False,
) -> None:
    """What each region's sparsity costs in loss, when it alone is sparse."""
    with _one_line():
        from sparselora_fx.cli.config import read_config
        from sparselora_fx.cli.models import estimator_of, load
        from sparselora_fx.user.sensitivity import LEVELS
        from sparselora_fx.user.sensitivity import sensitivity as measure

        loaded = load(read_config(config, override or ()))
        show = _progress(as_json)
        table = measure(
            loaded.model, estimator_of(loaded, progress=show), loaded.batches(batches),
            level or LEVELS, backend=loaded.config.compile.backend, progress=show,
        )  # fmt: skip
        if out is not None:
            table.save(out)
    rows = [{**vars(row), "keys": list(row.keys)} for row in table.rows]
    found = {"dense_loss": table.dense_loss, "sparse_tokens": table.sparse_tokens, "rows": rows}
    print(json.dumps(found, indent=1) if as_json else table)


@app.command(epilog="Example: sparselora-fx explain run.yaml --verbose")
def explain(
    config: _Config,
    verbose: Annotated[bool, typer.Option(help="One line for each frozen linear.")] = False,
    override: _Set = None,
    as_json: _Json = False,
) -> None:
    """What a sparse step would do, why the rest is dense, and does it pay. Nothing is trained."""
    with _one_line():
        from sparselora_fx.user.explain import explain as look

        said = look(*_compiled(config, override, as_json), verbose=verbose)
    print(said.to_json() if as_json else said)


@app.command(epilog="Example: sparselora-fx report run.yaml --out report.html")
def report(
    config: _Config,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("report.html"),
    override: _Set = None,
    as_json: _Json = False,
) -> None:
    """The same as one HTML file: map, graphs, what each pass changed. Nothing is trained."""
    with _one_line():
        from sparselora_fx.user.report import report as write

        write(*_compiled(config, override, as_json), out)
    found = {"file": str(out)}
    _show(found, list(found.items()), as_json)


@app.command(epilog="Example: sparselora-fx bench run.yaml --pairs 20")
def bench(
    config: _Config,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of steps, dense and sparse.")] = 10,
    override: _Set = None,
    as_json: _Json = False,
) -> None:
    """Time a training step here, dense and sparse in turn, forward and backward."""
    with _one_line():
        from sparselora_fx.cli.benching import bench as measure
        from sparselora_fx.cli.config import read_config

        found = measure(read_config(config, override or ()), pairs, progress=_progress(as_json))
    rows = [(k, f"{v:.3f}" if isinstance(v, float) else str(v)) for k, v in found.items()]
    _show(found, rows, as_json)


@app.command(epilog="Example: sparselora-fx train run.yaml --set train.steps=200 --resume")
def train(
    config: _Config,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint.")] = False,
    override: _Set = None,
    as_json: _Json = False,
) -> None:
    """Fine-tune a local model with the HF Trainer: an adapter, a report and the costs."""
    with _one_line():
        from sparselora_fx.cli.config import read_config
        from sparselora_fx.cli.training import train as run
        from sparselora_fx.user.worth import worth_lines

        found = run(read_config(config, override or ()), resume=resume, progress=_progress(as_json))
    rows = [
        (key, str(value)) for key, value in found.items() if key not in ("seconds", "worth", "cost")
    ]
    rows += [(f"seconds, {key}", f"{value:.1f}") for key, value in found["seconds"].items()]
    rows += worth_lines(found["worth"])
    _show(found, rows, as_json)


def _compiled(
    config: str, override: list[str] | None, as_json: bool
) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a configuration, compiled without native code, and its first batch."""
    from sparselora_fx.cli.config import read_config
    from sparselora_fx.cli.models import estimator_of, load

    loaded = load(read_config(config, override or ()))
    model = loaded.compile(estimator_of(loaded, progress=_progress(as_json)), "eager")
    return model, next(loaded.batches(1))


def _progress(as_json: bool) -> bool:
    """Whether progress bars are shown: to people at a terminal."""
    return not as_json and sys.stderr.isatty()


def _show(found: dict[str, Any], rows: list[tuple[str, str]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found, indent=1))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    Console(soft_wrap=False, highlight=False, markup=False).print(table)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Errors that a user can cause are one line on stderr; so are warnings. Anything printed
    meanwhile (progress of libraries) goes to stderr, too."""
    from sparselora_fx.cli.config import ConfigError

    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    shown = warnings.showwarning
    warnings.showwarning = _warn  # type: ignore[assignment]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except SparseLoraError as error:
        text = " ".join(str(error).split())
        print(f"sparselora-fx: error: {text}", file=sys.stderr)
        code = MISUSED if isinstance(error, ConfigError) else FAILED
        raise typer.Exit(code) from None
    finally:
        warnings.showwarning = shown


def _warn(message: Warning | str, category: type[Warning], *_: Any) -> None:
    if issubclass(category, UserWarning):
        print(f"sparselora-fx: warning: {' '.join(str(message).split())}", file=sys.stderr)
