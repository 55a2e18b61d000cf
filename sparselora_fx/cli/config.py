"""The YAML that the command line takes: its sections, read with the line of each mistake."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from sparselora_fx.errors import PlanError, SparseLoraError
from sparselora_fx.plan.plan import SparsityPlan
from sparselora_fx.plan.suggestions import nearest
from sparselora_fx.watch.settings import Watch

RECIPES = Path(__file__).parents[1] / "recipes"


class ConfigError(SparseLoraError):
    """A configuration is malformed; the message names file, line and key."""


def _choice(default: str, *allowed: str) -> Any:
    return field(default=default, metadata={"allowed": allowed})


def _at_least(default: Any, least: float) -> Any:
    return field(default=default, metadata={"least": least})


@dataclass(frozen=True)
class ModelSection:
    """``path``: a local folder with a causal language model and its tokenizer. ``quantisation``:
    how bitsandbytes stores the base, "-double" with its scales quantised as well."""

    path: str
    dtype: str = _choice("auto", "auto", "float32", "bfloat16", "float16")
    quantisation: str = _choice("none", "none", "nf4", "nf4-double", "fp4", "fp4-double", "int8")
    trust_remote_code: bool = False


@dataclass(frozen=True)
class LoraSection:
    """As in PEFT's LoraConfig; ``targets``: "all-linear", or module names joined by commas."""

    rank: int = _at_least(16, 1)
    alpha: float = _at_least(32, 0)
    dropout: float = _at_least(0.0, 0)
    targets: str = "all-linear"


@dataclass(frozen=True)
class DataSection:
    """``train``: a .json, .jsonl or .parquet file; see `data.read_records` for its forms."""

    train: str
    max_length: int = _at_least(512, 2)
    prompt: str = "{instruction}\n{input}"


@dataclass(frozen=True)
class EstimatorSection:
    """``file``: written by ``sparselora-fx estimate``; empty: built from the weights.
    ``calibration``: so many batches of the training data go into it."""

    file: str = ""
    rank: int = _at_least(8, 1)
    calibration: int = _at_least(0, 0)


@dataclass(frozen=True)
class CompileSection:
    """As in `sparselora_fx.compile`."""

    backend: str = _choice("inductor", "inductor", "aot_eager", "eager")
    lora_branch: str = _choice("dense", "dense", "sparse")
    trim_logits: bool = False
    regional: bool = False
    precompile: bool = False


@dataclass(frozen=True)
class TrainSection:
    """As in transformers' TrainingArguments. ``steps`` 0: as many as ``epochs`` take;
    ``save_steps`` 0: no checkpoints."""

    epochs: float = _at_least(1.0, 0)
    steps: int = _at_least(0, 0)
    batch_size: int = _at_least(8, 1)
    accumulation: int = _at_least(1, 1)
    learning_rate: float = _at_least(3e-4, 0)
    schedule: str = _choice("cosine", "cosine", "linear", "constant")
    warmup_ratio: float = _at_least(0.04, 0)
    weight_decay: float = _at_least(0.0, 0)
    precision: str = _choice("fp32", "fp32", "bf16")
    gradient_checkpointing: bool = False
    logging_steps: int = _at_least(10, 1)
    save_steps: int = _at_least(0, 0)
    seed: int = _at_least(0, 0)


@dataclass(frozen=True)
class WatchSection:
    """As in `sparselora_fx.Watch`; ``mode`` "off": nobody watches."""

    mode: str = _choice("off", "off", "observe", "adapt", "stop")
    every: int = _at_least(Watch.every, 1)
    tolerance: float = _at_least(Watch.tolerance, 0)


@dataclass(frozen=True)
class Config:
    """Everything. ``plan``: "auto", or what `SparsityPlan` takes: a number, "default", a file, or a
    mapping of its attributes; ``output``: the folder to write to."""

    model: ModelSection
    data: DataSection
    plan: SparsityPlan
    lora: LoraSection = field(default_factory=LoraSection)
    estimator: EstimatorSection = field(default_factory=EstimatorSection)
    compile: CompileSection = field(default_factory=CompileSection)
    train: TrainSection = field(default_factory=TrainSection)
    watch: WatchSection = field(default_factory=WatchSection)
    output: str = "out"


_SECTIONS: dict[str, type[Any]] = {
    "model": ModelSection, "data": DataSection, "lora": LoraSection, "train": TrainSection,
    "estimator": EstimatorSection, "compile": CompileSection, "watch": WatchSection,
}  # fmt: skip
_REQUIRED = ("model", "data")
_Section = TypeVar("_Section")


def recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_config(name: str, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, or a recipe by its name.

    Args:
        name: of the file or the recipe.
        overrides: ``section.key=value`` each, in place of what the file says.

    Raises:
        ConfigError: it cannot be read, or something in it is not as it should be: the message names
            the line and the key.
    """
    path = Path(name) if Path(name).is_file() or name not in recipes() else RECIPES / f"{name}.yaml"
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        hint = nearest(name, recipes())
        raise ConfigError(f"cannot read {name!r}: {error}; or a recipe: {hint}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark is not None else name
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{where}: not YAML: {problem}") from error
    return _Reader(name, root, _parsed_overrides(overrides)).config()


def _parsed_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    found = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        section, dot, inner = key.partition(".")
        known = section in _SECTIONS and dot and inner in _names(_SECTIONS[section])
        if not equals or not (known or key in ("plan", "output")):
            allowed = [f"{s}.{n}" for s, kind in _SECTIONS.items() for n in _names(kind)]
            hint = nearest(key, [*allowed, "plan", "output"])
            raise ConfigError(f"--set {text!r}: expected section.key=value; {hint}")
        found[key] = yaml.safe_load(value)
    return found


def _names(kind: type[Any]) -> list[str]:
    return [item.name for item in fields(kind)]


class _Reader:
    """Reads one document; knows the line of everything in it."""

    def __init__(self, name: str, root: yaml.Node | None, overrides: dict[str, Any]) -> None:
        self.name, self.root, self.overrides = name, root, overrides

    def fail(self, node: yaml.Node | None, key: str, text: str) -> ConfigError:
        where = self.name if node is None else f"{self.name}:{node.start_mark.line + 1}"
        return ConfigError(f"{where}: {key}: {text}")

    def config(self) -> Config:
        top = self._mapping(self.root, "the file")
        allowed = [*_SECTIONS, "plan", "output"]
        for key, (node, _) in top.items():
            if key not in allowed:
                raise self.fail(node, key, f"unknown key; {nearest(key, allowed)}")
        values: dict[str, Any] = {"plan": self._plan(top.get("plan"))}
        for key, kind in _SECTIONS.items():
            values[key] = self._section(key, kind, top.get(key))
        output = self.overrides.get("output", _value(top, "output", "out"))
        if not isinstance(output, str) or not output:
            raise self.fail(_node(top, "output"), "output", f"must be a folder, got {output!r}")
        return Config(**values, output=output)

    def _mapping(self, node: yaml.Node | None, key: str) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        if node is None or (isinstance(node, yaml.ScalarNode) and node.value == ""):
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise self.fail(node, key, "must be a mapping of keys to values")
        found: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for name, value in node.value:
            if name.value in found:
                raise self.fail(name, name.value, "stands here twice")
            found[name.value] = (name, value)
        return found

    def _section(
        self, key: str, kind: type[_Section], found: tuple[yaml.Node, yaml.Node] | None
    ) -> _Section:
        inside = self._mapping(found[1] if found else None, key)
        known = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
        for name, (node, _) in inside.items():
            if name not in known:
                raise self.fail(node, f"{key}.{name}", f"unknown key; {nearest(name, known)}")
        values: dict[str, Any] = {}
        for name, item in known.items():
            full = f"{key}.{name}"
            if full in self.overrides:
                values[name] = self._checked(None, full, self.overrides[full], item)
            elif name in inside:
                node = inside[name][1]
                values[name] = self._checked(node, full, _plain(node), item)
            elif key in _REQUIRED and name in ("path", "train"):
                where = found[0] if found else None
                raise self.fail(where, full, f"is missing; say it here or with --set {full}=...")
        return kind(**values)

    def _checked(self, node: yaml.Node | None, key: str, value: Any, item: Any) -> Any:
        kinds = {"str": str, "int": int, "float": float, "bool": bool}
        kind = kinds[item.type]
        if kind is float and isinstance(value, str):
            value = _number(value)  # YAML 1.1 takes 3e-4 for a string
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.fail(node, key, f"must be {_WORDS[item.type]}, got {value!r}")
        allowed, least = item.metadata.get("allowed"), item.metadata.get("least")
        if allowed and value not in allowed:
            raise self.fail(node, key, f"is {value!r}; allowed: {', '.join(allowed)}")
        if least is not None and not value >= least:
            raise self.fail(node, key, f"is {value!r}; allowed: {least} or more")
        return value

    def _plan(self, found: tuple[yaml.Node, yaml.Node] | None) -> SparsityPlan:
        node = found[1] if found and "plan" not in self.overrides else None
        value = self.overrides.get("plan", _plain(node) if node is not None else "auto")
        try:
            if value == "auto":
                return SparsityPlan.auto()
            if isinstance(value, dict) and "sparsity" in value:
                return SparsityPlan(**value)
            return SparsityPlan(value)
        except PlanError as error:
            raise self.fail(node, "plan", str(error)) from error


_WORDS = {
    "str": "text", "int": "a whole number", "float": "a number", "bool": "true or false",
}  # fmt: skip


def _plain(node: yaml.Node) -> Any:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _node(top: dict[str, tuple[yaml.Node, yaml.Node]], key: str) -> yaml.Node | None:
    return top[key][0] if key in top else None


def _value(top: dict[str, tuple[yaml.Node, yaml.Node]], key: str, default: Any) -> Any:
    return _plain(top[key][1]) if key in top else default
