"""The predictor finds channels that matter on the shipped model, far better than chance."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparselora_fx as slx
from benchmarks.word_problems import generate, prompt_of

MODEL = Path(__file__).resolve().parents[1] / "benchmarks" / "demo_model"
SPARSITY = 0.9


def _inputs_of_down(model: nn.Module) -> tuple[dict[str, Tensor], list[object]]:
    seen: dict[str, Tensor] = {}
    handles: list[object] = []
    for name, module in model.named_modules():
        if name.endswith("mlp.down_proj"):
            region = name.rpartition(".")[0]
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, key=region: seen.__setitem__(key, args[0].detach())
                )
            )
    return seen, handles


def test_overlap_with_the_true_top_channels_beats_chance() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    ).train()
    rows = [tokenizer(prompt_of(p))["input_ids"][:24] for p in generate("test", 32, seed=0)]
    length = min(len(row) for row in rows)
    ids = torch.tensor([row[:length] for row in rows])
    seen, handles = _inputs_of_down(model)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()  # type: ignore[attr-defined]
    estimator = slx.SVDEstimator.build(model, rank=8, progress=False)
    plan = slx.SparsityPlan(
        {f"layers.{i}.mlp": SPARSITY for i in range(5)}, tokens="all", start_step=0
    )
    slx.compile(model, estimator, plan=plan, backend="eager")
    with slx.record(model) as record:
        model(input_ids=ids)
    overlaps, chances = [], []
    for region, hidden in seen.items():
        chosen = record.selections[region]["ffn"]
        best = hidden.flatten(0, -2).norm(dim=0).topk(len(chosen)).indices
        overlaps.append(torch.isin(chosen, best).double().mean().item())
        chances.append(len(chosen) / hidden.shape[-1])
    mean, chance = sum(overlaps) / len(overlaps), sum(chances) / len(chances)
    print("overlap by layer:", [f"{o:.2f}" for o in overlaps], f"chance {chance:.2f}")
    assert mean > 1.7 * chance
