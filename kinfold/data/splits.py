# SPDX-License-Identifier: Apache-2.0
"""Which split a file or folder belongs to, and which one a person means."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePath

from kinfold.errors import UserError

_WORDS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
}
# Hugging Face's name for a shard: the split, the shard, how many there are, sometimes a hash.
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}(-[0-9a-f]+)?")


class NoSuchSplit(UserError):
    """Images are there, but none in a split of that name."""


def split_of_word(word: str) -> str | None:
    """Give the split ("train", "validation", "test") that a word names; None where it names none."""
    return _WORDS.get(word.lower())


def split_of_file(path: str) -> str:
    """Tell the split from a name, `validation-00000-of-00004.parquet`, `my_test.parquet`; else "train"."""
    stem = PurePath(path).name.split(".")[0]
    shard = _SHARD.fullmatch(stem)
    if shard is not None:
        word = shard.group(1)
        return split_of_word(word) or word
    found = {split_of_word(word) for word in re.split(r"[^a-z]+", stem.lower())} - {None}
    # A name that says two splits says none.
    return str(found.pop()) if len(found) == 1 else "train"


def by_split(paths: Iterable[str]) -> dict[str, list[str]]:
    """Sort files into splits by their names, each split in the order of the paths."""
    groups: dict[str, list[str]] = {}
    for path in sorted(paths):
        groups.setdefault(split_of_file(path), []).append(path)
    return groups


def choose(split: str, available: Iterable[str], *, where: str) -> list[str]:
    """Pick from the splits that exist: "all" is every one, "test" falls back on validation.

    Raises `NoSuchSplit` that names those that exist.
    """
    names = list(available)
    if split == "all":
        return names
    if split in names:
        return [split]
    meant = split_of_word(split)
    for canonical in [meant, "validation"] if meant == "test" else [meant]:
        for name in names:
            if canonical is not None and split_of_word(name) == canonical:
                return [name]
    raise NoSuchSplit(f"{where} has no split {split!r}; it has {', '.join(names)} (or ask for all).")
