"""Commonsense and translation: WordNet's glosses and a FreeDict dictionary as multiple choice.

Both are files of Debian packages; ``SPARSELORA_EVIDENCE_DATA`` names the folder that holds them
where they are not installed (the packages may be unpacked there: ``dpkg -x``).
"""

from __future__ import annotations

import functools
import gzip
import itertools
import os
import re
from pathlib import Path

from benchmarks.evidence.items import Item, check_split, multiple_choice, split_of

WORDNET = ("usr/share/wordnet/data.noun", "wordnet-base")
COUNTS = ("usr/share/wordnet/cntlist.rev", "wordnet-base")
FREEDICT = ("usr/share/dictd/freedict-eng-spa.dict.dz", "dict-freedict-eng-spa")
GLOSS = "Which word is meant?\nMeaning: {text}\nWords: {options}\nAnswer:"
WORD = "Translate the word into Spanish.\nEnglish: {text}\nSpanish words: {options}\nAnswer:"


def data_file(path: str, package: str) -> Path:
    """A file of a Debian package; ends the program with what to do where it is missing."""
    root = Path(os.environ.get("SPARSELORA_EVIDENCE_DATA", "/"))
    found = root / path
    if not found.exists():
        raise SystemExit(
            f"{found} is missing: it is in the Debian package {package}. Install it, or unpack it "
            "into a folder and set SPARSELORA_EVIDENCE_DATA to that folder (docs/evidence.md)"
        )
    return found


@functools.cache
def glosses() -> tuple[tuple[str, str], ...]:
    """``(gloss, noun)`` of the nouns of one plain word that occur in WordNet's tagged texts,
    in the file's order."""
    counts = data_file(*COUNTS).read_text(encoding="utf-8").splitlines()
    common = {line.partition("%1:")[0] for line in counts if "%1:" in line}
    found = []
    for line in data_file(*WORDNET).read_text(encoding="utf-8").splitlines():
        head, _, gloss = line.partition("|")
        fields = head.split()
        if line.startswith(" ") or len(fields) < 5:
            continue
        noun, text = fields[4], gloss.split(";")[0].strip()
        plain = re.fullmatch(r"[a-z]{4,12}", noun) is not None
        if plain and noun in common and 20 <= len(text) <= 90 and noun not in text.lower():
            found.append((text, noun))
    return tuple(found)


@functools.cache
def translations() -> tuple[tuple[str, str], ...]:
    """``(English word, Spanish word)`` where the dictionary has exactly one of one word."""
    with gzip.open(data_file(*FREEDICT), "rt", encoding="utf-8") as file:
        lines = file.read().splitlines()
    found = {}
    for head, meaning in itertools.pairwise(lines):
        word = re.fullmatch(r"([a-z]{3,14}) /.*/", head)
        if word and re.fullmatch(r"[a-záéíóúñü]{3,14}", meaning):
            found[word[1]] = meaning
    return tuple(sorted(found.items()))


def commonsense(split: str, count: int, seed: int) -> list[Item]:
    """The noun of a gloss, among four; nouns are split."""
    check_split(split)
    pairs = [pair for pair in glosses() if split_of(pair[1]) == split]
    return _spaced(multiple_choice(pairs, split, count, seed, GLOSS))


def spanish(split: str, count: int, seed: int) -> list[Item]:
    """The translation of an English word, among four; English words are split."""
    check_split(split)
    pairs = [pair for pair in translations() if split_of(pair[0]) == split]
    return _spaced(multiple_choice(pairs, split, count, seed, WORD))


def _spaced(items: list[Item]) -> list[Item]:
    """Answers as they follow a prompt: after a space."""
    return [
        Item(item.prompt, " " + item.answer, tuple(" " + option for option in item.options))
        for item in items
    ]
