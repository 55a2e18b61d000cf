"""Training data from local files, as token ids with labels on the answers alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from sparselora_fx.cli.config import ConfigError, DataSection
from sparselora_fx.ir.token_lists import IGNORED

_FORMS = (
    "the instruction form {'instruction': ..., 'input': ... (may be left out), 'output': ...} or "
    "the chat form {'messages': [{'role': 'user', 'content': ...}, {'role': 'assistant', ...}]}"
)
_ROLES = ("system", "user", "assistant")


class Tokenizer(Protocol):
    """What is asked of a tokenizer of transformers."""

    eos_token_id: int | None

    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, list[int]]: ...

    def apply_chat_template(
        self,
        conversation: list[Mapping[str, object]],
        *,
        add_generation_prompt: bool,
        tokenize: bool,
        return_dict: bool,
    ) -> Iterable[int]: ...


def read_records(path: str) -> list[dict[str, object]]:
    """The records of a .json (a list), .jsonl (one a line) or .parquet file (which needs pyarrow).

    Raises:
        ConfigError: it cannot be read, is empty, or a record has neither of the two forms; the
            message names file and record.
    """
    file = Path(path)
    readers = {".json": _read_json, ".jsonl": _read_lines, ".parquet": _read_parquet}
    if file.suffix not in readers:
        raise ConfigError(f"{path}: expected a file that ends in {', '.join(readers)}")
    try:
        records = readers[file.suffix](file)
    except OSError as error:
        raise ConfigError(f"data.train: cannot read {path!r}: {error}") from error
    if not records:
        raise ConfigError(f"{path}: holds no record")
    for number, record in enumerate(records, start=1):
        why = _fault(record)
        if why:
            raise ConfigError(f"{path}: record {number}: {why}; expected {_FORMS}")
    return [record for record in records if isinstance(record, dict)]


def _read_json(file: Path) -> list[object]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON: {error}") from error
    if not isinstance(found, list):
        raise ConfigError(f"{file}: expected a list of records, got {type(found).__name__}")
    return found


def _read_lines(file: Path) -> list[object]:
    found: list[object] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise ConfigError(f"{file}:{number}: not JSON: {error}") from error
    return found


def _read_parquet(file: Path) -> list[object]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"{file}: parquet files need pyarrow (pip install pyarrow); or give JSON or JSONL"
        ) from error
    try:
        return list(pyarrow.parquet.read_table(file).to_pylist())
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{file}: not Parquet: {error}") from error


def _fault(record: object) -> str:
    """What is wrong with a record; "" for nothing."""
    if not isinstance(record, Mapping):
        return f"is no mapping but {type(record).__name__}"
    if "messages" in record:
        messages = record["messages"]
        if not isinstance(messages, list) or not messages:
            return "'messages' is no list with something in it"
        for message in messages:
            role = message.get("role") if isinstance(message, Mapping) else None
            if role not in _ROLES or not isinstance(message.get("content"), str):
                return f"a message has the role {role!r} (allowed: {', '.join(_ROLES)}) or no text"
        if all(message["role"] != "assistant" for message in messages):
            return "no message is the assistant's, so nothing would be learnt"
        return ""
    for key in ("instruction", "output"):
        if not isinstance(record.get(key), str):
            return f"{key!r} is {record.get(key)!r}"
    return ""


def encode(
    records: Iterable[Mapping[str, object]], tokenizer: Tokenizer, section: DataSection
) -> list[dict[str, list[int]]]:
    """``input_ids`` and ``labels`` of each record: -100 on everything but answers, so that the rest
    is sparse. Records whose answer does not begin within ``max_length`` tokens are left out.

    Raises:
        ConfigError: all are, or the prompt's template names what no record has.
    """
    found = []
    for record in records:
        if "messages" in record and getattr(tokenizer, "chat_template", None):
            ids, labels = _by_template(_messages(record), tokenizer)
        else:
            ids, labels = _by_parts(_parts(record, section.prompt), tokenizer)
        ids, labels = ids[: section.max_length], labels[: section.max_length]
        if any(label != IGNORED for label in labels[1:]):
            found.append({"input_ids": ids, "labels": labels})
    if not found:
        raise ConfigError(
            f"no record's answer begins within data.max_length={section.max_length} tokens"
        )
    return found


def _messages(record: Mapping[str, object]) -> list[Mapping[str, str]]:
    """A record's conversation; `_fault` has looked at it."""
    messages = record["messages"]
    assert isinstance(messages, list)
    return messages


def _by_template(
    messages: list[Mapping[str, str]], tokenizer: Tokenizer
) -> tuple[list[int], list[int]]:
    """A conversation as the tokenizer's own chat template writes it."""

    def written(count: int, *, prompt: bool = False) -> list[int]:
        found = tokenizer.apply_chat_template(
            list(messages[:count]), add_generation_prompt=prompt, tokenize=True, return_dict=False
        )
        return list(found)

    ids: list[int] = []
    labels: list[int] = []
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            before, ids = written(place, prompt=True), written(place + 1)
            pairs = enumerate(zip(before, ids, strict=False))
            shared = next((i for i, (a, b) in pairs if a != b), min(len(before), len(ids)))
            labels += [IGNORED] * (shared - len(labels))
            labels = labels[:shared] + ids[shared:]
    return ids, labels


def _by_parts(parts: list[tuple[str, bool]], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text, learnt in parts:
        tokens = tokenizer(text, add_special_tokens=not ids)["input_ids"]
        tokens = [*tokens, *end] if learnt else tokens
        ids += tokens
        labels += tokens if learnt else [IGNORED] * len(tokens)
    return ids, labels


def _parts(record: Mapping[str, object], prompt: str) -> list[tuple[str, bool]]:
    """The texts of a record in their order, and whether each is learnt."""
    if "messages" in record:
        return [
            (m["content"] if m["role"] == "assistant" else f"{m['role']}: {m['content']}\n",
             m["role"] == "assistant")
            for m in _messages(record)
        ]  # fmt: skip
    fields = {key: value for key, value in record.items() if isinstance(value, str)}
    try:
        text = prompt.format(**({"input": ""} | fields)).strip()
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(
            f"data.prompt is {prompt!r}, and a record has no {error}; it has {sorted(fields)}"
        ) from error
    return [(text + "\n", False), (fields["output"], True)]
