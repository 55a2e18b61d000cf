"""Plans: reading, checking, matching of keys, and the structural default."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparselora_fx.errors import PlanError
from sparselora_fx.model.frozen_weights import frozen_weights
from sparselora_fx.plan.plan import Sparsity, SparsityPlan


def llama(layers: int = 3) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config)


def adapted(layers: int = 3) -> nn.Module:
    return get_peft_model(llama(layers), LoraConfig(target_modules=["q_proj", "up_proj"]))


def resolve(plan: SparsityPlan, model: nn.Module) -> dict[str, Sparsity]:
    """The resolved plan by canonical name."""
    frozen = frozen_weights(model)
    result = plan.resolve(frozen, [name for name, _ in model.named_modules()])
    assert list(result) == [w.name for w in frozen]
    return {w.canonical: result[w.name] for w in frozen}


def test_one_number_applies_everywhere() -> None:
    assert set(resolve(SparsityPlan(0.5), adapted()).values()) == {Sparsity(0.5, 0.5)}
    assert set(resolve(SparsityPlan(0), adapted()).values()) == {Sparsity(0.0, 0.0)}


@pytest.mark.parametrize("model", [adapted(), llama().requires_grad_(False)])
def test_the_deepest_key_wins(model: nn.Module) -> None:
    plan = SparsityPlan(
        {
            "layers.1.mlp.up_proj": 0.1,
            "layers.1": 0.2,
            "mlp": 0.3,
            "layers.1.mlp": 0.4,
            "q_proj": 0.5,
        }
    )
    got = resolve(plan, model)
    for name, value in got.items():
        if name.endswith("q_proj"):
            expected = 0.5
        elif name.endswith("1.mlp.up_proj"):
            expected = 0.1
        elif ".1.mlp" in name:
            expected = 0.4  # the same module as "mlp" names, by a longer key
        elif ".mlp" in name:
            expected = 0.3
        else:
            expected = 0.2 if ".1." in name else 0.0
        assert value == Sparsity(expected, expected), name


def test_order_of_keys_does_not_matter() -> None:
    table = {"layers.1": 0.2, "mlp": 0.3, "layers.1.mlp": 0.4, "up_proj": 0.5}
    backwards = dict(reversed(table.items()))
    model = adapted()
    assert resolve(SparsityPlan(table), model) == resolve(SparsityPlan(backwards), model)


def test_suffixes_match_whole_components() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(12))})
    model["xlayers"] = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    got = resolve(SparsityPlan({"layers.1": 0.5}), model.requires_grad_(False))
    assert [name for name, value in got.items() if value.ffn] == ["layers.1"]


def test_a_shared_weight_is_reached_by_any_of_its_names() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    got = resolve(SparsityPlan({"b": 0.5}), model.requires_grad_(False))
    assert got == {"a": Sparsity(0.5, 0.5)}


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("layers.1.mpl", "matches no module of this model; did you mean 'layers.1.mlp'"),
        ("layers.7.mlp", r"matches no module.*'layers\.\d\.mlp'"),
        ("self_atn", "did you mean 'self_attn'"),
        ("embed_tokens", "a module that holds no frozen weight"),
        ("layers.0.mlp.act_fn", "a module that holds no frozen weight"),
        ("zzz", "allowed: "),
    ],
)
def test_a_key_that_covers_nothing_names_the_nearest(key: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        resolve(SparsityPlan({"layers.0.mlp": 0.5, key: 0.5}), adapted())


def test_a_model_without_frozen_weights() -> None:
    with pytest.raises(PlanError, match="attach LoRA"):
        resolve(SparsityPlan({"mlp": 0.5}), llama())
    assert resolve(SparsityPlan(0.5), llama()) == {}


@pytest.mark.parametrize(
    "value",
    [1, 1.0, 1.5, -0.1, True, False, math.nan, math.inf, "0.5", None, [0.5], 1 - 1e-20, 0.5j],
)
def test_sparsity_must_be_a_number_from_zero_up_to_one(value: object) -> None:
    if isinstance(value, str):
        with pytest.raises(PlanError, match="cannot read the plan"):
            SparsityPlan(value)
    else:
        with pytest.raises(PlanError, match=r"allowed: a number in \[0, 1\)"):
            SparsityPlan(value)  # type: ignore[arg-type]
    with pytest.raises(
        PlanError, match=r"the sparsity of 'mlp' is .*allowed: a number in \[0, 1\)"
    ):
        SparsityPlan({"mlp": value})  # type: ignore[dict-item]


def test_numbers_of_other_kinds_become_floats() -> None:
    plan = SparsityPlan({"a": np.float32(0.5), "b": Fraction(1, 4), "c": 0})  # type: ignore[dict-item]
    assert plan.sparsity == {"a": 0.5, "b": 0.25, "c": 0.0}
    assert all(type(value) is float for value in plan.to_dict()["sparsity"].values())


@pytest.mark.parametrize("key", ["", "a..b", ".a", 3])
def test_keys_must_be_dotted_names(key: object) -> None:
    with pytest.raises(PlanError, match="is no module name"):
        SparsityPlan({key: 0.5})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": "contxt"}, "did you mean 'context'"),
        ({"tokens": 3}, "allowed: 'all', 'context'"),
        ({"start_step": -1}, "start_step is -1"),
        ({"start_step": 1.0}, "start_step is 1.0"),
        ({"start_step": True}, "start_step is True"),
        ({"start_step": math.nan}, "start_step is nan"),
        ({"end_step": 1.5}, "end_step is 1.5"),
        ({"start_step": 10, "end_step": 5}, "comes before start_step"),
        ({"start_step": 0.5, "end_step": 0.25}, "comes before start_step"),
        ({"channel_multiple": 0}, "channel_multiple is 0; allowed: a positive int"),
        ({"channel_multiple": 2.0}, "channel_multiple is 2.0"),
        ({"channel_multiple": True}, "channel_multiple is True"),
        ({"rank": 0}, "rank is 0"),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        SparsityPlan(0.5, **settings)  # type: ignore[arg-type]


def test_defaults_and_immutability() -> None:
    table = {"mlp": 0.5}
    plan = SparsityPlan(table)
    assert (plan.tokens, plan.start_step, plan.end_step) == ("context", 0.05, None)
    assert (plan.channel_multiple, plan.rank) == (16, None)
    table["mlp"] = 0.9
    assert plan.sparsity == {"mlp": 0.5}
    with pytest.raises(AttributeError):
        plan.tokens = "context"  # type: ignore[misc]


@pytest.mark.parametrize(
    "plan",
    [
        SparsityPlan(0.25, tokens="context", start_step=0.05, end_step=1.0, channel_multiple=1),
        SparsityPlan({"layers.1.mlp": 0.99, "self_attn": 0}, start_step=10, end_step=20, rank=8),
        SparsityPlan.default(),
    ],
)
def test_round_trips(plan: SparsityPlan, tmp_path: Path) -> None:
    plan.to_yaml(tmp_path / "plan.yaml")
    assert SparsityPlan.from_yaml(tmp_path / "plan.yaml") == plan
    assert SparsityPlan(str(tmp_path / "plan.yaml")) == plan
    assert SparsityPlan(**plan.to_dict()) == plan
    changed = SparsityPlan(tmp_path / "plan.yaml", channel_multiple=3)
    assert changed.channel_multiple == 3 and changed.sparsity == plan.sparsity
    with pytest.raises(PlanError, match="cannot write"):
        plan.to_yaml(tmp_path / "no" / "plan.yaml")


REFERENCE = """
#* General Settings
start_step: 0.05
mode: "svd_8"
skip_output_tokens: True
ffn_sparsity: "ffn=0.99x1"
qkvo_sparsity: "qkv=0.75x1"
#* Layer-wise Sparsity
sparsity:
  layers.0.mlp: 0
  layers.0.self_attn: 0
  layers.1.mlp: 0.99
  layers.1.self_attn: 0.75
  layers.2.mlp: 0
  layers.2.self_attn: 0"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    return path


def test_reference_files_load_as_they_are(tmp_path: Path) -> None:
    plan = SparsityPlan.from_yaml(written(tmp_path, REFERENCE))
    assert (plan.rank, plan.tokens, plan.start_step, plan.end_step) == (8, "context", 0.05, None)
    got = resolve(plan, adapted())
    assert got["model.layers.1.mlp.up_proj"] == Sparsity(0.99, 0.99)
    assert got["model.layers.1.self_attn.o_proj"] == Sparsity(0.75, 0.75)
    assert sum(value.ffn > 0 for value in got.values()) == 7
    all_tokens = REFERENCE.replace("skip_output_tokens: True", "skip_output_tokens: False")
    assert SparsityPlan.from_yaml(written(tmp_path, all_tokens)).tokens == "all"


def test_reference_mode_dense_is_all_zero(tmp_path: Path) -> None:
    plan = SparsityPlan.from_yaml(written(tmp_path, REFERENCE.replace("svd_8", "dense")))
    assert plan.rank is None
    assert set(resolve(plan, adapted()).values()) == {Sparsity(0.0, 0.0)}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("start_step", "strat_step", "unknown key 'strat_step'; did you mean 'start_step'"),
        ("sparsity:\n", "sparsty:\n", "unknown key 'sparsty'; did you mean 'sparsity'"),
        ("svd_8", "svd_x", "mode is 'svd_x'"),
        ("svd_8", "svd_0", "mode is 'svd_0'"),
        ("tokens: True", "tokens: maybe", "skip_output_tokens is 'maybe'"),
        ("0.99\n", "99\n", "the sparsity of 'layers.1.mlp' is 99"),
        ("start_step", "tokens: all\nstart_step", "contradicts tokens"),
        ("start_step: 0.05", "start_step: [", "cannot read the plan"),
    ],
)
def test_files_with_mistakes(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in REFERENCE
    with pytest.raises(PlanError, match=message):
        SparsityPlan.from_yaml(written(tmp_path, REFERENCE.replace(old, new, 1)))


@pytest.mark.parametrize("text", ["", "- 1\n", "tokens: all\n", "0.5\n"])
def test_files_that_are_no_plan(tmp_path: Path, text: str) -> None:
    with pytest.raises(PlanError, match="is no plan"):
        SparsityPlan.from_yaml(written(tmp_path, text))
    (tmp_path / "plan.yaml").write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(PlanError, match="cannot read the plan"):
        SparsityPlan.from_yaml(tmp_path / "plan.yaml")


@pytest.mark.parametrize(
    ("layers", "sparse"),
    [(1, []), (2, []), (3, [1]), (8, [2, 3, 4, 5, 6]), (12, [3, 4, 5, 6, 7, 8, 9, 10])],
)
def test_default_by_position(layers: int, sparse: list[int]) -> None:
    got = resolve(SparsityPlan.default(), adapted(layers))
    found = {
        int(name.split(".")[2]) for name, value in got.items() if value == Sparsity(0.75, 0.25)
    }
    assert sorted(found) == sparse
    assert set(got.values()) <= {Sparsity(0.75, 0.25), Sparsity(0.0, 0.0)}


def test_default_outside_and_without_blocks() -> None:
    block = nn.ModuleDict({"up": nn.Linear(2, 2), "down": nn.Linear(2, 2)})
    assert set(resolve(SparsityPlan.default(), block.requires_grad_(False)).values()) == {
        Sparsity(0.5, 0.0)
    }
    stack = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(5))})
    stack["top"] = nn.Linear(2, 2)
    got = resolve(SparsityPlan.default(), stack.requires_grad_(False))
    assert got["top"] == Sparsity(0.0, 0.0) and got["layers.2"] == Sparsity(0.75, 0.25)


def test_yaml_of_a_plan_is_plain(tmp_path: Path) -> None:
    SparsityPlan({"mlp": np.float64(0.5)}).to_yaml(tmp_path / "p.yaml")
    assert yaml.safe_load((tmp_path / "p.yaml").read_text())["sparsity"] == {"mlp": 0.5}


def test_resolving_leaves_the_model_alone() -> None:
    model = adapted()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(PlanError):
        resolve(SparsityPlan({"mpl": 0.5}), model)
    resolve(SparsityPlan.default(), model)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
