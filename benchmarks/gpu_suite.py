"""One command where a GPU is at hand: correctness, then what a step costs, within some minutes.

    python -m benchmarks.gpu_suite --minutes 8 --out DIR
    python -m benchmarks.gpu_suite --minutes 8 --out DIR --presets 8b-math10k 1b-default \
        --options ours ours+trim ours+whole ours+whole+trim ours+cudagraphs
    python -m benchmarks.gpu_suite --tiny --minutes 3 --out DIR          on a CPU: toy
    sizes

1. Correctness (`benchmarks.support.suite_correctness`, and tests marked gpu), while
2. every preset compiles its peers in a process of its own, side by side. Then
3. the presets are timed in turn, one process on the device at a time
(`benchmarks.support.suite_case`):
   peers in turns A B A B, `ratio` the median over turns of the baseline's time over the peer's.

Steps run as `benchmarks.support.stepping` says: under autocast, fused AdamW, no waiting inside a
turn. ``busy_ms`` is the time in which the GPU does something, ``launches`` what it is given, both a
step; ``host_ms`` the time to issue forward and backward; ``tflops_4n`` counts every token at 4
FLOPs for each parameter of a dense matmul, whoever computes it. ``flop_ratio`` is by formula. Peers
that cannot run here say why. ``compiling_beside`` tells how many other processes were still
compiling.

``DIR/gpu_suite.json`` and ``gpu_suite.md`` are written after every row, so what was measured is
kept when the time is up. The exit status is 1 if a check failed or was not made.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.support import measuring
from benchmarks.support.peers import OPTIONS
from benchmarks.support.suite_case import MARK
from benchmarks.support.suite_jobs import BASELINE, BASELINES, TESTS, Job, compile_until, jobs_of
from benchmarks.support.suite_presets import SUITE
from benchmarks.support.suite_tables import tables


class Suite:
    """The processes, what they have said, and the time that is left."""

    def __init__(self, arguments: argparse.Namespace, jobs: list[Job]) -> None:
        self.arguments, self.jobs = arguments, jobs
        self.start = time.time()
        self.end = self.start + 60 * arguments.minutes
        self.heard: queue.Queue[tuple[Job, str | None]] = queue.Queue()
        self.memory = device_memory()
        arguments.out.mkdir(parents=True, exist_ok=True)
        self.log = (arguments.out / "gpu_suite.log").open("w", encoding="utf-8")

    def run(self) -> dict[str, Any]:
        """Run until all have ended or the time is up; returns what is written."""
        try:
            while any(job.alive or job.state == "waiting" for job in self.jobs):
                if time.time() >= self.end:
                    break
                self.begin()
                self.grant()
                self.listen(min(1.0, max(0.05, self.end - time.time())))
        finally:
            self.stop()
            self.write()
        return self.result()

    def begin(self) -> None:
        """Start what the device's memory has room for; checks first."""
        for job in self.jobs:
            used = sum(other.need for other in self.jobs if other.alive)
            idle = not any(other.alive for other in self.jobs)
            if job.state == "waiting" and (idle or used + job.need <= self.memory):
                self.launch(job)

    def launch(self, job: Job) -> None:
        """Start a process, in a session of its own so that it can be ended with its workers."""
        cores = max(1, (os.cpu_count() or 1) // max(1, len(self.jobs)))
        settings = {"TORCHINDUCTOR_COMPILE_THREADS": str(cores + 1), "PYTHONUNBUFFERED": "1"}
        job.process = subprocess.Popen(
            job.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True, env={**os.environ, **settings},
        )  # fmt: skip
        job.state = "compiling"
        threading.Thread(target=self._read, args=(job,), daemon=True).start()

    def _read(self, job: Job) -> None:
        assert job.process is not None and job.process.stdout is not None
        for line in job.process.stdout:
            self.heard.put((job, line))
        self.heard.put((job, None))

    def grant(self) -> None:
        """Give the device to the next preset that is ready, once nobody else compiles or the time
        for it is over."""
        if any(job.state == "timing" for job in self.jobs):
            return
        compiling = [job for job in self.jobs if job.state == "compiling"]
        ready = [job for job in self.jobs if job.state == "ready"]
        full = any(job.state == "waiting" for job in self.jobs)  # memory is: room must be made
        if ready and (not compiling or full or time.time() >= self.compile_until):
            job = ready[0]
            job.state, job.found["compiling_beside"] = "timing", len(compiling)
            assert job.process is not None and job.process.stdin is not None
            job.process.stdin.write("go\n")
            job.process.stdin.flush()

    @property
    def compile_until(self) -> float:
        """When compiling has to end, so that every preset can be timed."""
        return compile_until(self.start, self.end, sum(not job.checks for job in self.jobs))

    def listen(self, seconds: float) -> None:
        """Take in what the processes say."""
        try:
            job, line = self.heard.get(timeout=seconds)
        except queue.Empty:
            return
        if line is None:
            assert job.process is not None
            code = job.process.wait()
            finished = job.state == "done" or (job.name == TESTS and code == 0)
            job.state = "done" if finished else "failed"
            if job.name == TESTS:
                job.found["checks"] = [tests_outcome(code, job.found.get("tail", []))]
        elif line.startswith(MARK):
            self.take(job, json.loads(line.removeprefix(MARK)))
        else:
            self.log.write(f"{job.name}: {line}")
            job.found["tail"] = [*job.found.get("tail", []), line.rstrip()][-8:]
            return
        self.write()

    def take(self, job: Job, said: dict[str, Any]) -> None:
        """One finding of a process."""
        kind = said.pop("kind")
        print(f"{time.time() - self.start:5.0f} s  {job.name}: {kind} {brief(said)}", flush=True)
        if kind == "check":
            job.found.setdefault("checks", []).append(said)
        elif kind == "preset":
            job.found["preset"] = said
        elif kind == "peer":
            job.found.setdefault("rows", []).append(said)
        elif kind == "rows":
            job.found["rows"] = said["rows"]
        elif kind == "ready":
            job.state = "ready"
        elif kind == "done":
            job.state = "done"

    def stop(self) -> None:
        """End our processes, each with the workers it started."""
        for job in self.jobs:
            if job.process is not None and job.process.poll() is None:
                os.killpg(job.process.pid, signal.SIGKILL)
                job.process.wait()
            if job.state not in ("done", "failed"):
                job.state = f"out of time while {job.state}"
        self.log.flush()

    def result(self) -> dict[str, Any]:
        """All that is known."""
        checks = [check for job in self.jobs for check in job.found.get("checks", [])]
        checked = all(job.state == "done" for job in self.jobs if job.checks)
        presets = {
            job.name: {"state": job.state, **{k: v for k, v in job.found.items() if keep(job, k)}}
            for job in self.jobs
            if not job.checks
        }
        return {
            "machine": measuring.machine("wall"),
            "versions": measuring.versions(),
            "minutes": self.arguments.minutes,
            "seconds_taken": round(time.time() - self.start, 1),
            "tiny": self.arguments.tiny,
            "correct": bool(checks) and checked and all(check["passed"] for check in checks),
            "checks": checks,
            "checks_state": {job.name: job.state for job in self.jobs if job.checks},
            "presets": presets,
        }

    def write(self) -> None:
        """Write both files."""
        found = self.result()
        text = json.dumps(found, indent=1) + "\n"
        (self.arguments.out / "gpu_suite.json").write_text(text, encoding="utf-8")
        (self.arguments.out / "gpu_suite.md").write_text(tables(found), encoding="utf-8")


def keep(job: Job, key: str) -> bool:
    """The last lines of a process are of interest if it failed."""
    return key != "tail" or job.state == "failed"


def brief(said: dict[str, Any]) -> str:
    """A finding on one line."""
    if "rows" in said:
        return ", ".join(f"{r['peer']} {r['ratio']}" for r in said["rows"] if "ratio" in r)
    return json.dumps(said)[:160]


def tests_outcome(code: int, tail: list[str]) -> dict[str, Any]:
    """What pytest's exit status and last line say, as a check."""
    last = tail[-1] if tail else f"exit status {code}"
    return {"what": TESTS, "passed": code == 0, "error": None, "bound": None, "where": last}


def device_memory() -> float:
    """GiB that the processes may take together."""
    if not torch.cuda.is_available():
        return float("inf")
    return 0.95 * torch.cuda.get_device_properties(0).total_memory / 2**30


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="all in all")
    parser.add_argument("--out", type=Path, required=True, help="folder for JSON, tables and log")
    parser.add_argument("--presets", nargs="+", choices=list(SUITE), default=list(SUITE))
    parser.add_argument(
        "--options", nargs="+", metavar="OURS",
        help="ours with any of +trim +whole +apart +cudagraphs +verify, for every preset",
    )  # fmt: skip
    parser.add_argument(
        "--baselines", nargs="*", choices=BASELINES,
        help=f"peers beside {BASELINE}, compiled after ours, for every preset",
    )  # fmt: skip
    parser.add_argument("--layers", type=int, help="in place of each preset's own number")
    parser.add_argument("--backend", help="of torch.compile; inductor")
    parser.add_argument("--tiny", action="store_true", help="toy sizes on a CPU, aot_eager")
    arguments = parser.parse_args(words)
    for name in arguments.options or ():
        base, *options = name.split("+")
        if base != "ours" or not set(options) <= set(OPTIONS):
            parser.error(
                f"--options: got {name!r}; allowed: ours, with any of +{' +'.join(OPTIONS)}"
            )
    return arguments


def main(words: list[str] | None = None) -> int:
    """Run the suite; 0 if every check passed."""
    arguments = parsed(words)
    if not arguments.tiny and not torch.cuda.is_available():
        raise SystemExit("there is no NVIDIA GPU here: not measured (--tiny runs on a CPU)")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that `stop` ends our processes
    found = Suite(arguments, jobs_of(arguments)).run()
    print(tables(found))
    return 0 if found["correct"] else 1


if __name__ == "__main__":
    sys.exit(main())
