"""Compile time: ours beside plain torch.compile, over depth, cold and warm.

Every figure is taken in a fresh process with caches of its own. The clock is CPU seconds of the
process and its children (tracing, passes, code generation, the C++ compiler), so that a busy
machine does not show as slow compilation; Inductor compiles in the process itself. A figure is
what the first step (forward and backward) costs beyond the second.

    python -m benchmarks.compile_time --json benchmarks/results/compile_time.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def cpu_seconds() -> float:
    """CPU time of this process and of its finished children."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def build(layers: int) -> Any:
    """A small Llama with LoRA on every linear; widths divide into channel multiples of 16."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128,
    )  # fmt: skip
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config), lora).train()


def measure(variant: str, layers: int) -> dict[str, Any]:
    """Runs in a process of its own: compile by one step, then take a second one."""
    import torch

    import sparselora_fx as slx
    from sparselora_fx.runtime.runtime import get_runtime

    torch.set_num_threads(1)
    model = build(layers)
    state = None
    if variant == "plain":
        model.forward = torch.compile(model.forward)
    else:
        estimator = slx.SVDEstimator.build(model, rank=4, progress=False)
        plan = slx.SparsityPlan({"mlp": 0.75, "self_attn": 0.5}, start_step=0)
        slx.compile(model, estimator, plan=plan, regional=variant == "regional")
        state = get_runtime(model)
    ids = torch.randint(0, 128, (2, 48))
    labels = ids.clone()
    labels[:, :32] = -100

    def step() -> float:
        start = cpu_seconds()
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        return cpu_seconds() - start

    torch.compile(lambda x: x + 1)(torch.ones(2))  # start the compiler before the clock runs
    first, second = step(), step()
    return {"seconds": first - second, "graphs": state.graphs if state is not None else 1}


def fresh(variant: str, layers: int, caches: str) -> dict[str, Any]:
    """`measure` in a new process whose compiler caches live under ``caches``."""
    settings = {
        "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor", "TRITON_CACHE_DIR": f"{caches}/triton",
        "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "benchmarks.compile_time",
        "--one",
        variant,
        str(layers),
    ]
    done = subprocess.run(command, env={**os.environ, **settings}, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{variant}, {layers} layers: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"variant": variant, "layers": layers}


def run(depths: Sequence[int]) -> dict[str, Any]:
    """Plain `torch.compile` and ours over depth, cold; ours warm at the middle one; the same block
    by block (``regional=True``) for the first and the last.

    ``cold_ratio`` and ``warm_over_cold`` are those of the middle depth.
    """
    import peft
    import torch
    import transformers

    rows = []
    seconds: dict[tuple[str, int, str], float] = {}

    def figure(variant: str, layers: int, *, warm: bool = False) -> None:
        with tempfile.TemporaryDirectory() as caches:
            for kind in ("cold", "warm") if warm else ("cold",):
                rows.append(fresh(variant, layers, caches) | {"cache": kind})
                seconds[variant, layers, kind] = float(rows[-1]["seconds"])
                print(rows[-1], flush=True)

    shallow, middle, deep = depths
    for layers in depths:
        figure("plain", layers)
        figure("whole", layers, warm=layers == middle)
    figure("regional", shallow, warm=True)
    figure("regional", deep)
    ratios = {n: seconds["whole", n, "cold"] / seconds["plain", n, "cold"] for n in depths}
    found = {
        "cold_ratio": ratios[middle],
        "cold_ratio_by_layers": ratios,
        f"depth_ratio_{deep}_over_{shallow}": (
            seconds["whole", deep, "cold"] / seconds["whole", shallow, "cold"]
        ),
        "warm_over_cold": seconds["whole", middle, "warm"] / seconds["whole", middle, "cold"],
        "regional": {
            "cold_ratio": seconds["regional", shallow, "cold"] / seconds["plain", shallow, "cold"],
            "depth_ratio": (
                seconds["regional", deep, "cold"] / seconds["regional", shallow, "cold"]
            ),
            "warm_over_cold": (
                seconds["regional", shallow, "warm"] / seconds["regional", shallow, "cold"]
            ),
        },
    }
    return found | {
        "layers": middle,
        "rows": rows,
        "clock": "CPU seconds",
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": 1},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__,
                     "peft": peft.__version__},
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="result file")
    parser.add_argument("--depths", nargs=3, type=int, default=(8, 16, 32), help="layers")
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "LAYERS"), help="one figure, here")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]))))
        return
    results = run(args.depths)
    text = json.dumps(results, indent=1) + "\n"
    print(text)
    if args.json:
        Path(args.json).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
