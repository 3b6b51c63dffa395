# SPDX-License-Identifier: Apache-2.0
"""Where images come from: one interface over folders, tables, tar files, the Hub, small sets and the digits.

A source knows its length, reads image number i as encoded bytes (or as a decoded array), and can name it for
people. It can be sent to worker processes: what it knows about a million images lies in memory-mapped files.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from kinfold.data.folder import EXTENSIONS, Listing, extension, list_folder, open_folder
from kinfold.data.named_sets import open_small_set
from kinfold.data.splits import by_split, choose
from kinfold.data.tables import is_hub_name, is_saved, open_files, open_hub, open_saved, table_files
from kinfold.data.tars import expand, open_tars
from kinfold.errors import UserError
from kinfold.randomness import SPLIT, permutation

Labels = npt.NDArray[np.int64]


@runtime_checkable
class Source(Protocol):
    """N images that can be read one by one, in any order, in any process."""

    labels: Labels | None
    """int64 [N], or None where there are none"""
    classes: tuple[str, ...] | None
    """the classes' names by label, where they have names"""
    fingerprint: str
    """hex hash of the listing: another one means other data"""
    description: str
    """one line for people"""

    def __len__(self) -> int: ...

    def read(self, i: int) -> bytes | npt.NDArray[np.uint8]:
        """Give image i, encoded or as an array [H, W, C]. Raises `Undecodable` where it cannot be read."""
        ...

    def name(self, i: int) -> str:
        """Say where a person finds image i."""
        ...


class Digits:
    """The 1,797 handwritten digits that come with scikit-learn: 8 x 8 pixels, grey, scaled to 0 to 255.

    "train" is the first 1,437, "test" the last 360 (other writers), "all" is everything.
    """

    def __init__(self, split: str = "train") -> None:
        from sklearn.datasets import load_digits

        bounds = {"train": (0, 1437), "test": (1437, 1797), "all": (0, 1797)}
        start, stop = bounds[choose(split, ["train", "test"], where="digits")[0] if split != "all" else "all"]
        found = load_digits()
        self._images = np.rint(found.images[start:stop] * (255 / 16)).astype(np.uint8)[..., None]  # [N, 8, 8, 1]
        self._start = start
        self.labels: Labels | None = found.target[start:stop].astype(np.int64)  # [N]
        self.classes: tuple[str, ...] | None = tuple("0123456789")
        self.fingerprint = hashlib.sha256(self._images.tobytes()).hexdigest()
        self.description = f"{len(self):,} handwritten digits of 8 x 8 pixels from scikit-learn (10 classes)"

    def __len__(self) -> int:
        return len(self._images)

    def read(self, i: int) -> npt.NDArray[np.uint8]:
        """Give digit i as uint8 [8, 8, 1]."""
        image: npt.NDArray[np.uint8] = self._images[i]
        return image

    def name(self, i: int) -> str:
        """Give the digit's number in scikit-learn's set."""
        return f"digits, number {self._start + range(len(self))[i]}"


class Subset:
    """Some images of another source, in the order of `positions` int64 [n]."""

    def __init__(self, source: Source, positions: npt.NDArray[np.int64], description: str | None = None) -> None:
        positions = np.asarray(positions, np.int64)  # [n]
        if len(positions) and not (positions.min() >= 0 and positions.max() < len(source)):
            raise IndexError(f"positions {positions.min()} to {positions.max()} of {len(source)} images")
        self.source = source
        self.positions = positions
        self.labels: Labels | None = None if source.labels is None else source.labels[positions]
        self.classes = source.classes
        self.fingerprint = hashlib.sha256(source.fingerprint.encode() + positions.tobytes()).hexdigest()
        self.description = description or f"{len(positions):,} of {source.description}"

    def __len__(self) -> int:
        return len(self.positions)

    def read(self, i: int) -> bytes | npt.NDArray[np.uint8]:
        """Read the i-th of the positions."""
        return self.source.read(int(self.positions[i]))

    def name(self, i: int) -> str:
        """Name the i-th of the positions."""
        return self.source.name(int(self.positions[i]))


def split_off(source: Source, share: float, seed: int) -> tuple[Subset, Subset]:
    """Hold out a share of a source: (the rest, the held out), both in the source's order.

    With labels, every class gives its share (rounded so that the total is right); the images are drawn by
    the seed.

    Raises `UserError` where one of the two would be empty.
    """
    total = len(source)
    wanted = round(share * total)
    if not 0 < wanted < total:
        raise UserError(
            f"A share of {share} of {total:,} images holds out {wanted:,} and leaves {total - wanted:,}; "
            "both must be at least one."
        )
    labels = np.zeros(total, np.int64) if source.labels is None else source.labels  # [N]
    _, group, counts = np.unique(labels, return_inverse=True, return_counts=True)
    # Largest remainders: the whole parts first, then one more for the classes that lost most by rounding
    # down.
    exact = counts * (wanted / total)  # [C]
    taken = np.floor(exact).astype(np.int64)  # [C]
    taken[np.argsort(taken - exact, kind="stable")[: wanted - int(taken.sum())]] += 1
    held = np.zeros(total, bool)  # [N]
    for label, count in enumerate(taken.tolist()):
        members = np.flatnonzero(group == label)
        held[members[permutation(SPLIT, seed, label, n=len(members))[:count]]] = True
    rest, out = np.flatnonzero(~held), np.flatnonzero(held)
    return Subset(source, rest), Subset(source, out, f"{len(out):,} held out of {source.description}")


def open_source(data: str, *, split: str = "train", limit: int | None = None, cache: Path | None = None) -> Source:
    """Open images by a word: a folder, a table, tar files, a Hub name, a small set, or "digits".

    - a folder of images, nested to any depth; folders of one class each give labels (`kinfold.data.folder`);
    - a `.parquet` or `.arrow` file, a folder that holds some at its top or in `data/`, or what `datasets`
      saved;
    - a `.tar` file, a pattern such as `shard-{000..012}.tar`, or a folder of tar files;
    - `hf:owner/name` or `hf:owner/name:config` on the Hugging Face Hub;
    - `torchvision:NAME` or `torchvision:NAME@ROOT`, one of the small sets (`kinfold.data.named_sets`).

    `split` is "train", "test", "all", or a name that the data has. `limit` keeps that many images, drawn
    evenly and always the same ones; a smaller limit keeps some of those that a larger one keeps. `cache` is
    where listings and unpacked tables are kept: else `$KINFOLD_CACHE`, else `~/.cache/kinfold`.

    Raises `UserError` that says what was found instead.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; it is the number of images to keep, at least 1.")
    source = _open(data, split, cache)
    if len(source) == 0:
        raise UserError(f"{data} holds no image in its split {split!r}.")
    if limit is None or limit >= len(source):
        return source
    return Subset(source, np.sort(permutation(SPLIT, 0, n=len(source))[:limit]))


def _open(data: str, split: str, cache: Path | None) -> Source:
    if data == "digits":
        return Digits(split)
    if data.startswith("torchvision:"):
        name, at, root = data.removeprefix("torchvision:").partition("@")
        return open_small_set(name, root if at else None, split=split, cache=cache)
    path = data if data.startswith("hf:") else os.path.expanduser(data)
    if os.path.isdir(path):
        return _open_directory(path, split, cache)
    if os.path.isfile(path):
        return _open_file(path, split, cache)
    if path.lower().endswith(".tar") and re.search(r"[{*?\[]", path):
        return _open_tars(expand(path), path, split, cache)
    if is_hub_name(path):
        return open_hub(path, split=split, cache=cache)
    raise UserError(_missing(path))


def _open_file(path: str, split: str, cache: Path | None) -> Source:
    kind = extension(os.path.basename(path))
    if kind in ("parquet", "arrow"):
        return open_files([path], where=path, split=split, cache=cache)
    if kind == "tar":
        return _open_tars([path], path, split, cache)
    if kind in EXTENSIONS:
        raise UserError(f"{path} is a single image: give the folder that it lies in.")
    if kind in ("zip", "gz", "tgz", "bz2", "xz", "zst", "7z", "rar"):
        raise UserError(f"{path} is a compressed archive: unpack it and give the folder (a plain .tar can stay).")
    raise UserError(
        f"{path} is no image folder, table or tar: expected a folder, or a file that ends in .parquet, .arrow or .tar."
    )


def _open_tars(paths: list[str], where: str, split: str, cache: Path | None) -> Source:
    groups = by_split(paths)
    # One kind of tar, given by name: it is what the person wants, whatever its name says.
    if len(groups) == 1 and split == "train":
        return open_tars(paths, cache)
    chosen = choose(split, groups, where=where)
    return open_tars([path for name in chosen for path in groups[name]], cache)


def _open_directory(path: str, split: str, cache: Path | None) -> Source:
    if is_saved(path):
        return open_saved(path, split=split)
    tables = table_files(path)
    if tables:
        return open_files(tables, where=path, split=split, cache=cache)
    listing = list_folder(path, cache)
    tars = sorted(name for name in os.listdir(path) if name.endswith(".tar") and not name.startswith("."))
    if tars and len(listing):
        raise UserError(
            f"{path} holds {len(listing):,} images and {len(tars):,} tar files, for example {tars[0]}: "
            f"give one of them, the tar files as {os.path.join(path, '*.tar')}."
        )
    if tars:
        return _open_tars([os.path.join(path, name) for name in tars], path, split, cache)
    if len(listing) == 0:
        raise UserError(_imageless(path, listing))
    return open_folder(listing, split)


def _imageless(path: str, listing: Listing) -> str:
    expected = "Expected images (.jpg, .png, .webp, .tif, .bmp, .gif, .ppm, .npy), .parquet, .arrow or .tar files."
    if not listing.ignored:
        return f"{path} is empty. {expected}"
    kinds = sorted(listing.ignored.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{f'.{kind}' if kind else 'no ending'} ({count:,})" for kind, count in kinds[:6])
    more = ", ..." if len(kinds) > 6 else ""
    count = sum(listing.ignored.values())
    return f"{path} holds no image; found {count:,} file{'' if count == 1 else 's'}: {shown}{more}. {expected}"


def _missing(path: str) -> str:
    """Say how far the path exists, and what is there with a similar name."""
    here = os.path.abspath(path)
    parent = os.path.dirname(here)
    while not os.path.isdir(parent):
        here, parent = parent, os.path.dirname(parent)
    lost = os.path.basename(here)
    message = f"{path} does not exist"
    if here != os.path.abspath(path):
        message += f": there is no {lost} in {parent}"
    try:
        beside = sorted(name for name in os.listdir(parent) if not name.startswith("."))
    except OSError:
        beside = []
    by_lower = {name.lower(): name for name in beside}
    near = [by_lower[name] for name in difflib.get_close_matches(lost.lower(), list(by_lower), n=3)]
    if near:
        return f"{message}. Did you mean {' or '.join(os.path.join(parent, name) for name in near)}?"
    return (
        f"{message}. Expected a folder, a .parquet, .arrow or .tar file, hf:owner/name, torchvision:NAME@ROOT, or "
        "digits."
    )
