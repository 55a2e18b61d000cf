"""Sweep every architecture of transformers' auto-mappings: ``python -m
benchmarks.architectures``.

Each model runs in a process of its own, so that a crash or a hang is a row with its reason. Rows
are kept in ``out/architectures.jsonl`` and are not computed again unless the library has changed
(or ``--fresh`` asks for it). ``--json`` writes the result file, ``--page`` the page made from it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "out" / "architectures.jsonl"
RESULT = ROOT / "benchmarks" / "results" / "architectures.json"
PAGE = ROOT / "docs" / "architectures.md"
TIMEOUT = 240


def main() -> None:
    """Parse the command line, run what is missing, write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--task", action="append", help="one of the five mappings; default: all")
    parser.add_argument("--only", action="append", help="model types; default: all")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds per model")
    parser.add_argument("--backend", default="aot_eager", choices=("aot_eager", "eager"))
    parser.add_argument("--quick", action="store_true", help="two compilations a model, not three")
    parser.add_argument("--fresh", action="store_true", help="compute finished rows again")
    parser.add_argument("--keep", action="store_true", help="keep rows of older code too")
    parser.add_argument("--failed", action="store_true", help="only rows with an error or a miss")
    parser.add_argument("--json", action="store_true", help=f"write {RESULT.relative_to(ROOT)}")
    parser.add_argument("--page", action="store_true", help="write the page from the result file")
    args = parser.parse_args()
    if not args.page or args.json:
        sweep(args)
    if args.json:
        write_json()
    if args.page:
        from benchmarks.sweep.architectures_page import page

        PAGE.write_text(page(json.loads(RESULT.read_text())))


def sweep(args: argparse.Namespace) -> None:
    """Run every model that has no row yet, with progress on standard output."""
    from benchmarks.sweep import tiny_models

    _warm_up(args.backend)
    code = code_key()
    rows = read_rows()
    todo = [
        (task, model)
        for task in args.task or tiny_models.TASKS
        for model in tiny_models.model_types(task)
        if (not args.only or model in args.only)
        and (args.fresh or _is_stale(rows.get((task, model)), code, args))
    ]
    print(f"{len(todo)} models to run, {len(rows)} rows known, code {code}", flush=True)
    start = time.perf_counter()
    for done, row in enumerate(_run_all(todo, args), start=1):
        row["code"] = code
        with ROWS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        left = (time.perf_counter() - start) / done * (len(todo) - done)
        print(f"[{done}/{len(todo)}, {left / 60:.0f} min left] {line_of(row)}", flush=True)


def _is_stale(row: dict[str, Any] | None, code: str, args: argparse.Namespace) -> bool:
    if row is None:
        return True
    if args.failed:
        return (
            bool(row.get("error") or row.get("sparse"))
            or row.get("right") is False
            or not _all_done(row)
        )
    return not args.keep and row["code"] != code


def _all_done(row: dict[str, Any]) -> bool:
    counts = row.get("linears", {})
    return all(
        done == total for done, total in (counts.get(k, (0, 0)) for k in ("ffn", "attention"))
    )


def read_rows() -> dict[tuple[str, str], dict[str, Any]]:
    """The latest row of every model."""
    ROWS.parent.mkdir(exist_ok=True)
    lines = ROWS.read_text().splitlines() if ROWS.exists() else []
    return {(r["task"], r["model"]): r for r in map(json.loads, lines)}


def line_of(row: dict[str, Any]) -> str:
    """A row in one line, for progress."""
    counts = " ".join(f"{k} {a}/{b}" for k, (a, b) in sorted(row.get("linears", {}).items()))
    plain = "" if row.get("plain") in ("trains", None) else f"plain: {row['plain']}"
    state = "; ".join(filter(None, (row.get("error"), row.get("sparse"), plain)))
    right = {True: "right", False: f"WRONG {row.get('difference')}"}.get(row.get("right"), "-")
    zero = "" if row.get("zero") in (True, None) else " ZERO DIFFERS"
    return f"{row['task']}/{row['model']} {row['seconds']:.0f}s {right}{zero} {counts} {state}"


def code_key() -> str:
    """A hash of the library's sources and of the sweep's own."""
    folders = ("sparselora_fx", "passes", "benchmarks/sweep")
    digest = hashlib.sha256()
    for file in sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py")):
        digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def _warm_up(backend: str) -> None:
    """Import and compile something here, so that the children need not."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch
    import transformers

    from benchmarks.sweep.check_model import check

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    check("causal-lm", "llama", backend=backend, quick=True)
    torch.compiler.reset()


def _run_all(todo: list[tuple[str, str]], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows as they finish; at most ``jobs`` children at a time."""
    fork = multiprocessing.get_context("fork")
    waiting, running = list(reversed(todo)), []
    while waiting or running:
        while waiting and len(running) < args.jobs:
            key = waiting.pop()
            ours, theirs = fork.Pipe(duplex=False)
            child = fork.Process(target=_child, args=(*key, args, theirs))
            child.start()
            theirs.close()
            running.append((key, child, ours, time.perf_counter()))
        time.sleep(0.05)
        for entry in list(running):
            row = _finished(*entry, timeout=args.timeout)
            if row is not None:
                running.remove(entry)
                yield row


def _finished(
    key: tuple[str, str], child: Any, pipe: Any, start: float, *, timeout: float
) -> dict[str, Any] | None:
    seconds = time.perf_counter() - start
    row: dict[str, Any] | None = None
    if pipe.poll():
        try:
            row = pipe.recv()
        except EOFError:
            child.join()
            row = {"error": f"crashed with exit code {child.exitcode}"}
    elif seconds > timeout:
        child.kill()
        row = {"error": f"no answer in {timeout:.0f} s"}
    if row is None:
        return None
    child.join()
    return {"task": key[0], "model": key[1], "seconds": round(seconds, 1)} | row


def _child(task: str, model: str, args: argparse.Namespace, pipe: Any) -> None:
    from benchmarks.sweep.check_model import check

    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        pipe.send(check(task, model, backend=args.backend, quick=args.quick))


def write_json() -> None:
    """The result file: every row, one a line, and the versions that they were made with."""
    import peft
    import torch
    import transformers

    rows = [json.dumps(_short(row), sort_keys=True) for _, row in sorted(read_rows().items())]
    versions = json.dumps({m.__name__: m.__version__ for m in (torch, transformers, peft)})
    body = ",\n".join(rows)
    RESULT.write_text(f'{{"versions": {versions}, "rows": [\n{body}\n]}}\n')


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """A row with counts where the working file has names."""
    short = {k: v for k, v in row.items() if k != "where"}
    if "dense" in row:
        short["dense"] = {
            kind: {reason: len(names) for reason, names in reasons.items()}
            for kind, reasons in row["dense"].items()
        }
        short["regions"] = len(row["regions"])
    return short


if __name__ == "__main__":
    main()
