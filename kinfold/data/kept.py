# SPDX-License-Identifier: Apache-2.0
"""Room on the disk for derived files: a folder of folders, each whole under its name, the longest unused go first.

FOLDER/KEY/about.json         what KEY was made of; its time is when the place was last used
FOLDER/KEY/...                what is kept
FOLDER/.KEY.xxxx.partial      one in the making
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from kinfold.errors import UserError

ABOUT = "about.json"


def bound(variable: str, usual_gb: float, what: str) -> float:
    """Bytes that may be kept, from the environment's `variable` in GB.

    Raises `UserError` where that is no such number.
    """
    asked = os.environ.get(variable, "").strip()
    try:
        gigabytes = float(asked or usual_gb)
    except ValueError:
        gigabytes = -1.0
    if not 0.0 <= gigabytes < float("inf"):
        raise UserError(f"{variable} is {asked!r}; it is how many GB of {what} are kept, for example 50.")
    return gigabytes * 1e9


def used(place: Path) -> None:
    """Note that a place was used now, so that the others go first; a cache of others may only be read."""
    with suppress(OSError):
        os.utime(place / ABOUT)


def make_room(folder: Path, bytes_kept: float, *, but: str) -> None:
    """Remove the places that nobody used for longest until the rest is within the bound; `but` stays."""
    found: list[tuple[float, int, Path]] = []
    for place in folder.iterdir():
        if place.name.startswith("."):  # in the making
            continue
        try:
            size = sum(file.stat().st_size for file in place.iterdir())
            found.append(((place / ABOUT).stat().st_mtime, size, place))
        except OSError:  # being removed by another process
            continue
    total = sum(size for _, size, _ in found)
    for _, size, place in sorted(found, key=lambda one: one[0]):
        if total <= bytes_kept:
            return
        if place.name != but:
            shutil.rmtree(place, ignore_errors=True)
            total -= size


def remove_leftovers(folder: Path, *, hours: float = 48.0) -> None:
    """Remove drafts that nobody has written to for long: their processes were killed."""
    drafts: Iterable[Path] = folder.glob(".*.partial") if folder.is_dir() else ()
    for draft in drafts:
        try:
            times = [path.stat().st_mtime for path in (draft, *draft.iterdir())]
        except OSError:
            continue
        if time.time() - max(times) > hours * 3600:
            shutil.rmtree(draft, ignore_errors=True)
