"""What the library must compute, written plainly: models, batches and the masked-dense reference.

The reference runs the user's eager model. A producer keeps only the recorded rows of its frozen
product, a consumer reads only the recorded columns; biases and LoRA branches stay at full width
(or, with ``lora_branch="sparse"``, are cut to the same channels). Gradients are autograd's.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import sparselora_fx as slx

VOCABULARY = 97
PADDING = 0
ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
MIXED = {
    "layers.0.mlp": 0.75,
    "layers.0.self_attn": 0.25,
    "layers.1.mlp": 0.6,
    "layers.1.self_attn": 0.5,
}


def llama(
    *,
    layers: int = 1,
    targets: str | tuple[str, ...] = "all-linear",
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    bias: bool = False,
    hidden: int = 48,
    kv_heads: int = 2,
    seed: int = 0,
) -> nn.Module:
    """A tiny Llama with grouped-query attention (6 query heads) and non-zero LoRA."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=112,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=kv_heads,
        head_dim=8,
        vocab_size=VOCABULARY,
        attention_bias=bias,
        mlp_bias=bias,
        pad_token_id=PADDING,
        attn_implementation=attention,
    )
    torch.manual_seed(seed)
    base = LlamaForCausalLM(config)
    model = get_peft_model(base, lora_config(targets, dropout))
    return randomise(model).to(dtype).train()


def lora_config(targets: str | tuple[str, ...] = "all-linear", dropout: float = 0.0) -> LoraConfig:
    """Rank-4 LoRA for a causal language model."""
    chosen = targets if isinstance(targets, str) else list(targets)
    return LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules=chosen, task_type="CAUSAL_LM"
    )


def randomise(model: nn.Module) -> nn.Module:
    """Give every LoRA B matrix and every bias values, so that no term is zero by accident."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name.endswith("bias"):
                parameter.normal_(std=0.05)
            elif "norm" in name:
                parameter.uniform_(0.7, 1.3)
            elif "lora" not in name:
                parameter.normal_(std=0.08)
    return model


def batch(samples: int = 2, length: int = 13, *, padding: int = 3, seed: int = 1) -> dict[str, Any]:
    """Token ids, right padding in the last sample, and labels that ignore it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (samples, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding:
        mask[-1, -padding:] = 0
    ids = ids.masked_fill(mask == 0, PADDING)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


class Behind(nn.Module):
    """A projection with a function behind it."""

    def __init__(self, inner: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = inner
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.inner(x))


@dataclass
class Step:
    """What one forward and backward gave."""

    loss: Tensor
    gradients: dict[str, Tensor]
    record: slx.Recording = field(default_factory=slx.Recording)


def step(model: nn.Module, data: dict[str, Any], *, seed: int = 5) -> Step:
    """One training step without an optimizer, on clean gradients and a fixed seed."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss = model(**data).loss
    loss.backward()
    gradients = {
        name: parameter.grad.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return Step(loss.detach().clone(), gradients)


def plan_of(sparsity: Any, multiple: int = 1) -> slx.SparsityPlan:
    """A plan in which every token is sparse from the first step."""
    return slx.SparsityPlan(sparsity, tokens="all", start_step=0, channel_multiple=multiple)


def mixed(model: nn.Module) -> dict[str, float]:
    """`MIXED`, for the layers that the model has."""
    names = [name for name, _ in model.named_modules()]
    return {key: s for key, s in MIXED.items() if any(name.endswith(key) for name in names)}


def estimator_of(model: nn.Module, rank: int = 4) -> slx.SVDEstimator:
    """Factors of rank 4."""
    return slx.SVDEstimator.build(model, rank=rank, progress=False)


def run_compiled(
    model: nn.Module,
    data: dict[str, Any],
    plan: Any = None,
    backend: str = "eager",
    *,
    lora_branch: str = "dense",
    seed: int = 5,
    restore: bool = True,
    **options: Any,
) -> Step:
    """Compile, take one recorded step and (unless told otherwise) restore the model. What passes
    make of a graph is the same under every backend; tests of AOTAutograd name it."""
    plan = plan_of(mixed(model)) if plan is None else plan
    options |= {"backend": backend, "lora_branch": lora_branch}
    slx.compile(model, estimator_of(model), plan=plan, **options)
    with slx.record(model) as record:
        done = step(model, data, seed=seed)
    done.record = record
    if restore:
        slx.restore(model)
    return done


@contextlib.contextmanager
def masked_reference(
    model: nn.Module, record: slx.Recording, lora_branch: str = "dense"
) -> Iterator[nn.Module]:
    """Patch the frozen linears of an eager model so that it computes the masked-dense forward."""
    patched: list[nn.Module] = []

    def patch(module: nn.Module, forward: Any) -> None:
        module.forward = forward
        patched.append(module)

    for name, (role, chosen) in record.sites.items():
        linear = model.get_submodule(name)
        width = _logical(linear).shape[0 if role == "out" else 1]
        mask = torch.zeros(width, dtype=linear.weight.dtype)
        mask[chosen] = 1
        patch(linear, _masked(linear, role, mask))
        if lora_branch == "sparse":
            owner = model.get_submodule(name.rpartition(".")[0])
            part = getattr(owner, "lora_B" if role == "out" else "lora_A", None)
            for adapter in part.values() if part is not None else ():
                patch(adapter, _masked(adapter, role, mask))
    try:
        yield model
    finally:
        for module in patched:
            module.__dict__.pop("forward", None)


def _logical(linear: nn.Module) -> Tensor:
    return linear.weight.t() if isinstance(linear, Conv1D) else linear.weight


def _masked(linear: nn.Module, role: str, mask: Tensor) -> Any:
    def forward(x: Tensor) -> Tensor:
        weight, kept = _logical(linear), mask.to(x.dtype)
        if role == "in":
            return F.linear(x * kept, weight, linear.bias)
        out = F.linear(x, weight) * kept
        return out if linear.bias is None else out + linear.bias

    return forward


def reference_step(
    model: nn.Module,
    data: dict[str, Any],
    record: slx.Recording,
    *,
    lora_branch: str = "dense",
    seed: int = 5,
) -> Step:
    """The masked-dense step with the recorded channels."""
    with masked_reference(model, record, lora_branch):
        return step(model, {**data, "use_cache": False}, seed=seed)


def difference(got: Tensor, expected: Tensor) -> float:
    """``|got - expected| / |expected|``, in fp64; NaN and infinity count as infinite."""
    got, expected = got.double(), expected.double()
    error = float((got - expected).norm() / expected.norm().clamp(min=1e-30))
    return error if error == error else float("inf")


def worst_difference(got: Step, expected: Step) -> tuple[float, str]:
    """The largest relative difference among the loss and every gradient, and where it is."""
    assert got.gradients.keys() == expected.gradients.keys()
    pairs = {name: (got.gradients[name], expected.gradients[name]) for name in got.gradients}
    pairs["loss"] = (got.loss, expected.loss)
    return max((difference(*pair), name) for name, pair in pairs.items())


def assert_close(got: Step, expected: Step, bound: float) -> None:
    """Loss and every gradient agree to a relative bound, and there are gradients to compare."""
    assert got.gradients and torch.isfinite(expected.loss)
    error, where = worst_difference(got, expected)
    assert error <= bound, f"{where} differs by {error:.3e}, more than {bound:.0e}"


def assert_identical(got: Step, expected: Step) -> None:
    """Loss and every gradient agree bit for bit."""
    assert torch.equal(got.loss, expected.loss), (got.loss.item(), expected.loss.item())
    assert got.gradients.keys() == expected.gradients.keys()
    unequal = [n for n, g in got.gradients.items() if not torch.equal(g, expected.gradients[n])]
    assert not unequal, unequal


def assert_rewrote(record: slx.Recording, model: nn.Module, plan: dict[str, float]) -> None:
    """Every frozen linear that the plan names was sliced."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    wanted = {
        n for n in names for key, s in plan.items() if f"{key}." in n and s and "lora" not in n
    }
    assert wanted and set(record.sites) == wanted, wanted ^ set(record.sites)


def plain_compiled_step(model: nn.Module, data: dict[str, Any], backend: str) -> Step:
    """The step under `torch.compile` alone."""
    torch.compiler.reset()
    model.__dict__["forward"] = torch.compile(model.forward, backend=backend)
    try:
        return step(model, data)
    finally:
        del model.__dict__["forward"]
        torch.compiler.reset()


def marks(model: nn.Module) -> dict[str, Any]:
    """What hangs on a model's modules: attributes, buffers, hooks."""
    found: dict[str, Any] = {"forward": model.forward, "keys": list(model.state_dict())}
    for name, module in model.named_modules():
        found[name] = (
            type(module),
            sorted(module.__dict__),
            list(module._buffers),
            sorted(module._non_persistent_buffers_set),
            {key: list(value) for key, value in module.__dict__.items() if key.endswith("_hooks")},
        )
    return found


def assert_untouched(model: nn.Module, before: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """The model carries the marks and the weights that it carried before."""
    after = marks(model)
    assert after.keys() == before.keys()
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    assert not changed, changed
    state = model.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], value) for name, value in weights.items())


def copy_of_weights(model: nn.Module) -> dict[str, Tensor]:
    """Clones of every entry of the state dict."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
