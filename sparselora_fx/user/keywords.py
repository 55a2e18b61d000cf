"""Keywords that `compile` does not have, and where to find what they mean."""

from __future__ import annotations

from collections.abc import Iterable

from sparselora_fx.errors import KeywordError

ALLOWED = (
    "plan", "backend", "dynamic", "lora_branch", "compile_eval", "regional", "precompile",
    "trim_logits", "shift", "cuda_graphs", "verify_speed", "watch", "strict",
)  # fmt: skip
_INDUCTOR = (
    "is a word of torch.compile, which sparselora_fx.compile calls itself; set Inductor's options "
    "in torch._inductor.config before the first step instead (torch._inductor.config.max_autotune "
    "= True is what mode='max-autotune' sets)"
)
_TORCH = {
    "mode": _INDUCTOR,
    "options": _INDUCTOR,
    "fullgraph": (
        "is a word of torch.compile; graph breaks are allowed here and stay right: leave it out, "
        "and let torch._logging.set_logs(graph_breaks=True) list them"
    ),
    "disable": "is a word of torch.compile; call sparselora_fx.restore(model) to switch it off",
}


def refuse_unknown(keywords: Iterable[str]) -> None:
    """Raise `KeywordError` for the first of some keywords that `compile` does not have."""
    for name in keywords:
        why = _TORCH.get(name, "is no keyword of it")
        raise KeywordError(f"compile({name}=...): {name} {why}; allowed are {', '.join(ALLOWED)}")
