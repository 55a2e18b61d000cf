"""The same general rules on other structures: sliced equals masked-dense, and regions are found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparselora_fx as slx
from tests.support import oracle
from tests.support.slow import slow

V = oracle.VOCABULARY
COMMON: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": V, "pad_token_id": 0, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "n_embd": 48, "n_layer": 1, "n_head": 6, "vocab_size": V, "resid_pdrop": 0.0,
    "attn_pdrop": 0.0, "embd_pdrop": 0.0,
}  # fmt: skip
NO_GROUPS = {key: value for key, value in COMMON.items() if key != "num_key_value_heads"}


def gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2))


def qwen3() -> nn.Module:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(head_dim=8, **COMMON))


def phi3() -> nn.Module:
    return hf.Phi3ForCausalLM(hf.Phi3Config(**COMMON))


def gpt_neox() -> nn.Module:
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**NO_GROUPS))


def falcon() -> nn.Module:
    config = hf.FalconConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=6, num_kv_heads=2, alibi=False,
        new_decoder_architecture=True, vocab_size=V,
    )  # fmt: skip
    return hf.FalconForCausalLM(config)


def gemma2() -> nn.Module:
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(head_dim=8, **COMMON))


def llama4() -> nn.Module:
    config = hf.Llama4TextConfig(
        head_dim=8, num_local_experts=2, intermediate_size_mlp=112, moe_layers=[], **COMMON
    )
    return hf.Llama4ForCausalLM(config)


def bert() -> nn.Module:
    config = hf.BertConfig(**NO_GROUPS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return hf.BertForMaskedLM(config)


def t5() -> nn.Module:
    config = hf.T5Config(
        d_model=48, d_ff=112, num_layers=2, num_heads=6, d_kv=8, dropout_rate=0.0, vocab_size=V,
        decoder_start_token_id=0,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config)


def bart() -> nn.Module:
    config = hf.BartConfig(
        d_model=48, encoder_ffn_dim=112, decoder_ffn_dim=112, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=6, decoder_attention_heads=6, dropout=0.0, vocab_size=V,
        pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return hf.BartForConditionalGeneration(config)


# builder, regions that must be found (FFN and attention together)
MODELS: list[tuple[Callable[[], nn.Module], int]] = [
    (gpt2, 2), (qwen3, 4), (phi3, 4), (gpt_neox, 4), (falcon, 4), (gemma2, 4), (llama4, 4),
    (bert, 4), (t5, 10), (bart, 5),
]  # fmt: skip


# Weights stored the other way round, fused projections, two kinds of attention, an encoder.
QUICK = (gpt2, falcon, gemma2, bert)


def adapted(build: Callable[[], nn.Module]) -> nn.Module:
    """LoRA on every linear; fan_in_fan_out is what PEFT wants for Conv1D."""
    torch.manual_seed(0)
    conv = build is gpt2
    targets: Any = ["c_attn", "c_proj", "c_fc"] if conv else "all-linear"
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=conv)
    return oracle.randomise(get_peft_model(build(), lora)).double().train()


@pytest.mark.parametrize("lora_branch", ["dense", slow("sparse")])
@pytest.mark.parametrize(
    ("build", "regions"),
    [pair if pair[0] in QUICK else slow(*pair) for pair in MODELS],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_regions_are_found_and_equal_masked_dense(
    build: Callable[[], nn.Module], regions: int, lora_branch: str
) -> None:
    model = adapted(build)
    data = oracle.batch()
    got = oracle.run_compiled(model, data, oracle.plan_of(0.5), "eager", lora_branch=lora_branch)
    assert len(got.record.selections) == regions, sorted(got.record.selections)
    with oracle.masked_reference(model, got.record, lora_branch):
        expected = oracle.step(model, data)
    assert abs(float(got.loss - expected.loss)) <= 1e-9
    for name, gradient in expected.gradients.items():
        assert oracle.difference(got.gradients[name], gradient) <= 1e-9, name


def test_phi3_rows_of_fused_projections_follow_the_selection() -> None:
    got = oracle.run_compiled(adapted(phi3), oracle.batch(), oracle.plan_of(0.5), "eager")
    prefix = "base_model.model.model.layers.1"
    chosen = got.record.selections[f"{prefix}.mlp"]["ffn"]
    _, rows = got.record.sites[f"{prefix}.mlp.gate_up_proj.base_layer"]
    assert torch.equal(rows, torch.cat([chosen, chosen + 112]))
    qk, v = (got.record.selections[f"{prefix}.self_attn"][key] for key in ("qk", "v"))
    _, rows = got.record.sites[f"{prefix}.self_attn.qkv_proj.base_layer"]
    head, channel = qk // 8, qk % 8
    queries = torch.cat([(head * 3 + g) * 8 + channel for g in range(3)])
    assert torch.equal(rows, torch.cat([queries, 48 + qk, 64 + v]))


class HandLora(nn.Module):
    """A frozen weight with a LoRA branch written by hand, in several spellings."""

    def __init__(self, n: int, k: int, style: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n, k) * 0.15, requires_grad=False)
        self.bias = nn.Parameter(torch.randn(n) * 0.1, requires_grad=False)
        self.a = nn.Parameter(torch.randn(3, k) * 0.2)
        self.b = nn.Parameter(torch.randn(n, 3) * 0.2)
        self.style = style

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "matmul":
            return x @ self.weight.T + self.bias + (x @ self.a.t()) @ self.b.t() * 0.5
        if self.style == "einsum":
            low = torch.einsum("blk,rk->blr", x, self.a)
            base = torch.einsum("blk,nk->bln", x, self.weight)
            return base + self.bias + torch.einsum("blr,nr->bln", low, self.b) * 0.5
        if self.style == "ellipsis":
            low = torch.einsum("...k,rk->...r", x, self.a)
            base = torch.einsum("nk,...k->...n", self.weight, x)
            return base + self.bias + torch.einsum("...r,nr->...n", low, self.b) * 0.5
        low = F.linear(x, self.a)
        base = F.linear(x, self.weight, self.bias)
        if self.style == "addmm":
            base, low = base.flatten(0, 1), low.flatten(0, 1)
            return torch.addmm(base, low, self.b.T, alpha=0.5).view(*x.shape[:-1], -1)
        if self.style == "baddbmm":
            return torch.baddbmm(base, low, self.b.T.expand(len(x), -1, -1), alpha=0.5)
        up = F.linear(low, self.b)
        if self.style == "alpha":
            return torch.add(base, up, alpha=0.5)
        if self.style == "difference":
            return base - up * -0.5
        if self.style == "augmented":
            base += up * 0.5
            return base
        if self.style == "in place":
            base.add_(up, alpha=0.5)
            return base
        return base + up * 0.5


class HandBlock(nn.Module):
    def __init__(self, style: str) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (HandLora(24, 24, style) for _ in range(4))
        self.up, self.gate, self.down = (
            HandLora(n, k, style) for n, k in ((40, 24), (40, 24), (24, 40))
        )

    def forward(self, x: Tensor) -> Tensor:
        h = F.layer_norm(x, (24,))
        q, k, v = (p(h).unflatten(-1, (3, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, dim=-1)
        x = x + self.o((weights @ v).transpose(1, 2).flatten(2))
        h = F.layer_norm(x, (24,))
        return x + self.down(F.relu(self.gate(h)) ** 2 * torch.tanh(self.up(h)))


class HandModel(nn.Module):
    def __init__(self, style: str, checkpointing: bool = False) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.embed = nn.Embedding(V, 24)
        self.blocks = nn.ModuleList(HandBlock(style) for _ in range(2))
        self.head = nn.Linear(24, V)
        self.embed.requires_grad_(False)
        self.head.requires_grad_(False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return self.head(x)


def _masked_hand(layer: HandLora, role: str, chosen: Tensor) -> Callable[[Tensor], Tensor]:
    mask = torch.zeros(layer.weight.shape[0 if role == "out" else 1], dtype=layer.weight.dtype)
    mask[chosen] = 1

    def forward(x: Tensor) -> Tensor:
        branch = (x @ layer.a.T) @ layer.b.T * 0.5
        if role == "out":
            return (x @ layer.weight.T) * mask + layer.bias + branch
        return (x * mask) @ layer.weight.T + layer.bias + branch

    return forward


STYLES = [
    "linear", "matmul", "einsum", "ellipsis", "addmm", "baddbmm", "alpha", "difference",
    "augmented", "in place",
]  # fmt: skip


FEW = ("in place",)


@pytest.mark.parametrize("style", [style if style in FEW else slow(style) for style in STYLES])
def test_a_hand_written_transformer_with_hand_written_lora(style: str) -> None:
    torch.manual_seed(0)
    check_hand_written(HandModel(style), "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_inductor_keeps_fp64(checkpointing: bool) -> None:
    """The models of transformers normalise and compute the loss in fp32, whatever their dtype. This
    one is fp64 throughout, so that compiled code can be held to fp64 as well."""
    torch.manual_seed(0)
    check_hand_written(HandModel("linear", checkpointing), "inductor")


def check_hand_written(model: HandModel, backend: str) -> None:
    model.double().train()
    ids = oracle.batch()["input_ids"]
    slx.compile(model, oracle.estimator_of(model), plan=oracle.plan_of(0.5), backend=backend)
    with slx.record(model) as record:
        loss = model(ids).square().mean()
    loss.backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert len(record.sites) == 14, slx.explain(model, verbose=True)
    slx.restore(model)
    for name, (role, chosen) in record.sites.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, HandLora)
        layer.forward = _masked_hand(layer, role, chosen)  # type: ignore[method-assign]
    model.zero_grad()
    expected = model(ids).square().mean()
    expected.backward()
    assert abs(float(loss.detach() - expected.detach())) <= 1e-9
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert oracle.difference(got[name], parameter.grad) <= 1e-9, name
