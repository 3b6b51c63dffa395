# SPDX-License-Identifier: Apache-2.0
"""A folder of images, nested to any depth: listed once, and from then on only checked for changes.

The listing is sorted by the bytes of the relative path, so it is the same in every locale. It is kept under
the cache with the time at which every directory was last changed; adding, removing or renaming a file
changes the directory that it lies in, so opening the folder again asks once per directory instead of once
per file. (A file that is rewritten in place under its own name is not a change of the listing.)
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kinfold.data import index
from kinfold.data.decode import Undecodable
from kinfold.data.splits import NoSuchSplit, choose, split_of_word
from kinfold.errors import UserError

EXTENSIONS = frozenset(
    ["jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "dib", "tif", "tiff", "gif", "ppm", "pgm", "pbm", "npy"]
)
"""What is taken for an image by its name, in lower case."""

# First-level folders of data sets for other tasks: they tell pictures from masks, or splits, and not classes.
_PARTS = (
    {"JPEGImages", "SegmentationClass", "SegmentationClassAug", "SegmentationObject"},
    {"leftImg8bit", "gtFine", "gtCoarse"},
    {"images", "masks"},
    {*(f"{name}{year}" for name in ("train", "val", "test") for year in (2014, 2015, 2017)), "unlabeled2017"},
)

# A directory that was changed this shortly before it was listed may have been changed again within the same
# tick of the file system's clock (two seconds on the coarsest): such a listing is not trusted the next time.
_TICK = 2_000_000_000


def extension(name: str) -> str:
    """Give what follows the last dot, in lower case; "" where there is none."""
    stem, dot, end = name.rpartition(".")
    return end.lower() if dot and stem else ""


class Listing:
    """Every image below `root`.

    `names` are relative paths with "/", `parent` int32 [N] the directory of each, `directories` the paths of
    the directories, `ignored` how many other files there are by extension.
    """

    def __init__(self, root: str, content: index.Index) -> None:
        self.root = root
        self.content = content
        self.names = index.Names(content.arrays["names"], content.arrays["offsets"])
        self.parent: npt.NDArray[np.int32] = content.arrays["parent"]
        self.directories: list[str] = content.meta["directories"]
        self.ignored: dict[str, int] = content.meta["ignored"]

    def __len__(self) -> int:
        return len(self.names)


def list_folder(root: str, cache: Path | None = None) -> Listing:
    """List the images of a folder, from the cache where the folder has not changed since."""
    root = os.path.abspath(root)
    file = index.index_file(cache, "folder", root)
    known = index.load(file)
    if known is not None and _unchanged(root, known):
        return Listing(root, known)
    meta, arrays = _scan(root)
    if len(arrays["parent"]) == 0:
        return Listing(root, index.Index(meta, arrays))
    return Listing(root, index.save(file, meta, arrays))


def _unchanged(root: str, known: index.Index) -> bool:
    if known.meta.get("root") != root or not {"names", "offsets", "parent", "changed"} <= known.arrays.keys():
        return False
    directories, changed = known.meta["directories"], known.arrays["changed"]
    if len(directories) != len(changed) or int(changed.max()) > known.meta["listed"] - _TICK:
        return False
    try:
        return all(
            os.stat(os.path.join(root, directory)).st_mtime_ns == before
            for directory, before in zip(directories, changed.tolist())
        )
    except OSError:
        return False


def _scan(root: str) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Walk the tree. Links to directories are followed, and no directory is listed twice, so a loop ends.

    Real directories come first and links after them, both in order: where a directory can be reached in
    several ways, its real path is the one that is listed, and the result does not depend on the file
    system's order.
    """
    listed = time.time_ns()
    found: list[tuple[bytes, int]] = []
    directories: list[str] = []
    changed: list[int] = []
    ignored: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()
    real, links = [""], list[str]()
    while real or links:
        here = real.pop() if real else links.pop(0)
        path = os.path.join(root, here)
        try:
            state = os.stat(path)
            if (state.st_dev, state.st_ino) in seen:
                continue
            seen.add((state.st_dev, state.st_ino))
            # The time is taken before the names, so that a change in between shows the next time.
            with os.scandir(path) as entries:
                content = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"The folder {path} cannot be read: {error.strerror}.") from error
        number = len(directories)
        directories.append(here)
        changed.append(state.st_mtime_ns)
        for entry in content:
            # What a disk's own repair puts aside belongs to root and may not be looked into.
            if entry.name.startswith(".") or entry.name == "lost+found":
                continue
            below = f"{here}/{entry.name}" if here else entry.name
            what = _what(entry)
            if what == "directory":
                (links if entry.is_symlink() else real).append(below)
            elif (kind := extension(entry.name)) in EXTENSIONS and what == "file":
                found.append((os.fsencode(below), number))
            else:
                ignored[kind] += 1
        links.sort()
    found.sort()
    names = index.Names.of(name for name, _ in found)
    parent = np.fromiter((number for _, number in found), np.int32, len(found))  # [N]
    meta = {"root": root, "listed": listed, "directories": directories, "ignored": dict(ignored)}
    arrays: dict[str, npt.NDArray[Any]] = {
        "names": names.blob,
        "offsets": names.offsets,
        "parent": parent,
        "changed": np.array(changed, np.int64),
    }
    return meta, arrays


def _what(entry: os.DirEntry[str]) -> str:
    """Say whether an entry is a directory, a file, or something that would be waited for without end (a pipe).

    A link that leads nowhere or around in a circle is a file, whose reading says so.
    """
    try:
        if entry.is_dir():
            return "directory"
        return "file" if entry.is_file() or not os.path.exists(entry) else "other"
    except OSError:
        return "file"


class FolderSource:
    """The images of one split of a folder; `open_folder` makes it.

    The split is a stretch `start` to `stop` of the sorted listing, because a split is a first-level folder.
    """

    def __init__(
        self,
        listing: Listing,
        *,
        start: int,
        stop: int,
        labels: npt.NDArray[np.int64] | None,
        classes: tuple[str, ...] | None,
        description: str,
    ) -> None:
        self.root = listing.root
        self.labels = labels
        self.classes = classes
        self.description = description
        self._content = listing.content
        self._names = listing.names
        self._start = start
        self._stop = stop
        digest = hashlib.sha256()
        self._names.hash_into(digest, start, stop)
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return self._stop - self._start

    def _relative(self, i: int) -> bytes:
        if not -len(self) <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        return self._names[self._start + i % len(self)]

    def read(self, i: int) -> bytes:
        """Give the file's bytes. Raises `Undecodable` where the file has gone or cannot be read."""
        try:
            with open(os.path.join(self.root, os.fsdecode(self._relative(i))), "rb") as file:
                return file.read()
        except OSError as error:
            raise Undecodable(f"it cannot be read: {error.strerror}") from error

    def name(self, i: int) -> str:
        """Give the file's path; bytes that are no text appear as escapes, so it can always be printed."""
        return os.path.join(self.root, self._relative(i).decode("utf-8", "backslashreplace"))

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in self.__dict__.items() if key != "_names"}
        return {**state, "_content": index.packed(self._content)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        content = index.unpacked(state["_content"], state["root"])
        self.__dict__.update(state, _content=content)
        self._names = index.Names(content.arrays["names"], content.arrays["offsets"])


def open_folder(listing: Listing, split: str = "train") -> FolderSource:
    """Make a source of a folder's split, with labels where folders are classes.

    Splits: a first-level `train/` and nothing but other splits' names (`val`, `valid`, `validation`, `test`)
    beside it; else the whole folder is "train". Classes: the first-level folders (of the split), if every
    image lies in one, there are at least two, and they are not the folders of VOC, COCO, Cityscapes or of images with
    masks. The classes of all splits count together, so that a label means the same in each.

    Raises `NoSuchSplit` for a split that does not exist.
    """
    tops = [directory.split("/")[:2] if directory else [] for directory in listing.directories]
    holding = np.unique(listing.parent).tolist()
    firsts = sorted({tops[number][0] if tops[number] else "" for number in holding})
    words = {first: split_of_word(first) for first in firsts}
    is_split = "train" in words.values() and None not in words.values()
    depth = 1 if is_split else 0
    if is_split:
        chosen = choose(split, firsts, where=listing.root)
    elif split in ("train", "all"):
        chosen = [""]
    else:
        raise NoSuchSplit(
            f"{listing.root} has no splits, so there is no {split!r} in it: put its images in the folders "
            f"train/ and {split}/, or point at the folder that holds them."
        )
    inner = {number: tops[number][depth] if len(tops[number]) > depth else "" for number in holding}
    by_split: dict[str, set[str]] = {}
    for number in holding:
        by_split.setdefault(tops[number][0] if is_split else "", set()).add(inner[number])
    classed = {
        name: found
        for name, found in by_split.items()
        if "" not in found and len(found) > 1 and not any(found <= parts for parts in _PARTS)
    }
    start, stop = 0, len(listing)
    if is_split and len(chosen) == 1:
        number_of = np.array([bool(top) and top[0] == chosen[0] for top in tops])
        inside = np.flatnonzero(number_of[listing.parent])
        start, stop = int(inside[0]), int(inside[-1]) + 1
    labels: npt.NDArray[np.int64] | None = None
    classes: tuple[str, ...] | None = None
    if set(chosen) <= classed.keys():
        classes = tuple(sorted(set().union(*classed.values())))
        numbers = {name: label for label, name in enumerate(classes)}
        of_directory = np.full(len(listing.directories), -1, np.int64)
        for number in holding:
            of_directory[number] = numbers.get(inner[number], -1)
        labels = of_directory[listing.parent[start:stop]]  # [N]
    count = stop - start
    noun = "image" if count == 1 else "images"
    description = f"{count:,} {noun} in {listing.root}"
    if is_split:
        description += f", split {'all' if len(chosen) > 1 else chosen[0]}"
    folders = f"{len(holding):,} folder{'' if len(holding) == 1 else 's'}"
    notes = [f"{len(classes):,} classes" if classes else f"no labels, {folders}"]
    if listing.ignored:
        notes.append(f"{sum(listing.ignored.values()):,} other files ignored")
    return FolderSource(
        listing,
        start=start,
        stop=stop,
        labels=labels,
        classes=classes,
        description=f"{description} ({', '.join(notes)})",
    )
