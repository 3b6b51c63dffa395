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
import uuid
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
    found = _places(folder)
    total = sum(size for size, _ in found)
    for size, place in found:
        if total <= bytes_kept:
            return
        if place.name != but and _remove(place):
            total -= size


def give_up(folder: Path, bytes_wanted: int) -> bool:
    """Remove the places that nobody used for longest until so many bytes are free that were not.

    Where all of them together hold less, none is removed and the answer is False.
    """
    found = _places(folder)
    if sum(size for size, _ in found) < bytes_wanted:
        return False
    for size, place in found:
        if bytes_wanted > 0 and _remove(place):
            bytes_wanted -= size
    return bytes_wanted <= 0


def _places(folder: Path) -> list[tuple[int, Path]]:
    """Bytes and path of each place, the longest unused first."""
    found: list[tuple[float, int, Path]] = []
    for place in folder.iterdir():
        if place.name.startswith("."):  # in the making
            continue
        try:
            size = sum(file.stat().st_size for file in place.iterdir())
            found.append(((place / ABOUT).stat().st_mtime, size, place))
        except OSError:  # being removed by another process
            continue
    return [(size, place) for _, size, place in sorted(found)]


def _remove(place: Path) -> bool:
    """Remove a place at once, so that nobody finds half of it; False where it stays.

    What another process has mapped stays readable there after it has gone from the folder. Windows allows no new name
    for such a place, and it stays.
    """
    gone = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        place.rename(gone)
    except OSError:
        return False
    shutil.rmtree(gone, ignore_errors=True)
    return True


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
