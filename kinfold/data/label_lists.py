# SPDX-License-Identifier: Apache-2.0
"""Which images of a set keep their labels: a share of every class drawn by an address, or the names in a file."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kinfold.data.sources import Source
from kinfold.errors import UserError
from kinfold.randomness import SPLIT, permutation

Positions = NDArray[np.int64]

_LABELLED = 1  # last word of a draw's address: apart from all other splits
_SHOWN = 5  # lines that a message names
_SEPARATOR = re.compile(r"[/:]")  # of folders; of a tar and its member


def draw_per_class(labels: NDArray[np.int64], *, share: float, seed: int, draw: int = 0) -> Positions:
    """Draw a share of the images of every class, rounded up (InvP `generate_list.py`): positions [n], ascending.

    `labels` is [N]; `draw` numbers the draws of one seed. A smaller share is a part of a larger one. Every class that
    is there keeps at least one image.
    """
    exact = Fraction(str(share))  # 0.01 as a float is a little more, and 0.01 · 700 would be rounded up to 8
    kept = []
    for label in np.unique(labels).tolist():
        members = np.flatnonzero(labels == label)  # [m]
        count = math.ceil(exact * len(members))
        kept.append(members[permutation(SPLIT, seed, draw, label, _LABELLED, n=len(members))[:count]])
    return np.sort(np.concatenate(kept)).astype(np.int64)  # [n]


def read_list(path: Path, source: Source, *, say: Callable[[str], None]) -> Positions:
    """Find the images that a file names, one a line, in a source: positions [n], ascending, each once.

    A line is the end of an image's name from a folder's border on: `n01440764_10026.JPEG` (the lists that SimCLR
    published), `cat/1.png`, or a whole path. Empty lines are passed over; repeated ones are said. Raises `UserError`,
    with file and line, where a line names no image or several, and where the file cannot be read or is empty.
    """
    entries: dict[str, int] = {}  # entry -> line
    repeated = []
    for number, line in enumerate(_lines(path), start=1):
        entry = _plain(line.strip()).removeprefix("./")
        if not entry:
            continue
        if entry in entries:
            repeated.append(f"line {number} ({entry}, as line {entries[entry]})")
        entries.setdefault(entry, number)
    if not entries:
        raise UserError(f"{path} names no image. Write one file name on each line.")
    if repeated:
        say(f"{path} names {len(repeated):,} of its images twice, and each counts once: {_some(repeated)}")

    found = _find(entries, source)
    unknown = [f"line {line} ({entry})" for entry, line in entries.items() if not found[entry]]
    if unknown:
        raise UserError(
            f"{path} names {len(unknown):,} of {len(entries):,} images that are not there: {_some(unknown)}. Searched "
            f"in {source.description}, whose first image is called {source.name(0)}. Give the list of these images, or "
            "the folder that the list was made for, and no limit."
        )
    several = [
        f"line {line} ({entry}: {source.name(found[entry][0])} and {source.name(found[entry][1])})"
        for entry, line in entries.items()
        if len(found[entry]) > 1
    ]
    if several:
        raise UserError(
            f"{path} has {len(several):,} names that several images end in: {_some(several)}. Write the class folder "
            "in front, as class/file."
        )
    positions = np.array([found[entry][0] for entry in entries], np.int64)  # [n]
    if len(np.unique(positions)) < len(positions):
        say(f"{path} names some images in two ways; each counts once.")
    return np.unique(positions)  # [n]


def _find(entries: dict[str, int], source: Source) -> dict[str, list[int]]:
    """The first two images at most whose names end in each entry; one pass over the names of the source."""
    by_file: dict[str, list[str]] = {}
    for entry in entries:
        by_file.setdefault(_SEPARATOR.split(entry)[-1], []).append(entry)
    found: dict[str, list[int]] = {entry: [] for entry in entries}
    for position in range(len(source)):
        name = _plain(source.name(position))
        for entry in by_file.get(_SEPARATOR.split(name)[-1], ()):
            if (name == entry or name.endswith((f"/{entry}", f":{entry}"))) and len(found[entry]) < 2:
                found[entry].append(position)
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UserError(f"{path} cannot be read as a list of names: {reason}. Give a text file in UTF-8.") from error


def _plain(name: str) -> str:
    return name if os.sep == "/" else name.replace(os.sep, "/")


def _some(words: list[str]) -> str:
    return ", ".join(words[:_SHOWN]) + (f" and {len(words) - _SHOWN:,} more" if len(words) > _SHOWN else "")
