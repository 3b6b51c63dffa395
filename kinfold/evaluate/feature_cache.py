# SPDX-License-Identifier: Apache-2.0
"""Features that were made once, as memory-mapped arrays on the disk, found again by what they are features of.

    features/KEY/features.npy     float32 [n, F], one row an image that decodes, in the order of the source
    features/KEY/about.json       what the key was made of, and the images that do not decode, with the reason

The key hashes the network's weights and structure, the listing of the images, and how images look to the network; so
whatever would change the features changes the place, and protocols that need the same ones share them. Files are
written row by row, by one process or several, under another name, and get their own when they are whole. No process
holds more than a batch of them: what a map shows is the system's to keep or to drop.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kinfold import distributed
from kinfold.data import kept
from kinfold.errors import UserError
from kinfold.evaluate.backbones import hash_of, hash_tensors

BOUND_GB = 100.0
"""so much is kept if `$KINFOLD_FEATURES_GB` says nothing; the sets that nobody used for longest go first"""

_TRANSFORM = 1  # version of the code between a file and the network: raise it when its numbers change
_ROWS = 4096  # moved at a time


class Kept(NamedTuple):
    """Features, and which images they are of."""

    features: Tensor
    """float32 [n, F], a map of the file"""
    positions: NDArray[np.int64]
    """[n]"""
    bad: dict[int, str]
    """position -> reason, of the images that do not decode"""


def key_of(network: nn.Module, facts: dict[str, Any]) -> str:
    """Hash what features depend on: weights, structure, and `facts` about images and their look."""
    kinds = [_kind(name, module) for name, module in network.named_modules()]
    about = {"facts": facts, "weights": hash_of(network), "structure": repr(network), "kinds": kinds}
    digest = hashlib.sha256(json.dumps({**about, "transform": _TRANSFORM}, sort_keys=True).encode())
    return digest.hexdigest()[:32]


def _kind(name: str, module: nn.Module) -> list[str]:
    """What a module computes with beside its weights: its class, plain attributes, buffers that are not saved."""
    words = [f"{name}:{type(module).__module__}.{type(module).__qualname__}"]
    words += [
        f"{key}={value!r}" for key, value in sorted(vars(module).items()) if key != "training" and _is_plain(value)
    ]
    unsaved = {
        key: value for key, value in module.named_buffers(recurse=False) if key in module._non_persistent_buffers_set
    }
    return [*words, hash_tensors(unsaved)] if unsaved else words


def _is_plain(value: object) -> bool:
    return isinstance(value, (bool, int, float, str)) or (
        isinstance(value, (list, tuple)) and all(_is_plain(item) for item in value)
    )


def find(folder: Path, key: str, *, images: int) -> Kept | None:
    """Open the features of `key` of a source of so many images; None where there are none, or where they are damaged.

    A damaged place is emptied, so that the features are made anew.
    """
    place = folder / key
    if not place.is_dir():
        return None
    try:
        about = json.loads((place / "about.json").read_text(encoding="utf-8"))
        bad = {int(position): str(reason) for position, reason in about["bad"].items()}
        # "c": torch wants memory that may be written; what is written there would stay in this process.
        array = np.load(place / "features.npy", mmap_mode="c", allow_pickle=False)  # [n, F]
        if array.dtype != np.float32 or array.ndim != 2 or len(array) != images - len(bad):
            raise ValueError("another number of rows than images")
        kept.used(place)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        shutil.rmtree(place, ignore_errors=True)
        return None
    positions = np.setdiff1d(np.arange(images, dtype=np.int64), np.array(sorted(bad), np.int64))  # [n]
    return Kept(torch.from_numpy(array), positions, bad)


class Writing:
    """A set of features in the making; every process of a group may write its own rows.

    All processes call the methods in the same order. Rows are the images' positions; those of images that do not decode
    are closed up in `finish`.
    """

    def __init__(self, folder: Path, key: str, *, images: int, about: dict[str, Any]) -> None:
        self._folder, self._key, self._images, self._about = folder, key, images, about
        # No process number: in containers that share a cache all have the same, and leave it behind when killed.
        main = distributed.join({distributed.rank(): uuid.uuid4().hex[:8]})[0]
        self._draft = folder / f".{key}.{main}.partial"
        self._width = self._header = 0

    def begin(self, width: int) -> None:
        """Make room for features of `width` numbers. Raises `UserError` where the disk has none."""
        self._width, self._header = width, len(_header(self._images, width))
        _bound()  # a number that is none is found before the work
        if distributed.is_main():
            try:
                kept.remove_leftovers(self._folder)
                self._draft.mkdir(parents=True)
                with self._file.open("wb") as file:
                    file.truncate(self._header + self._images * width * 4)
            except OSError as error:
                raise self._refused(error) from error
            free = shutil.disk_usage(self._folder).free
            if free < self._images * width * 4:
                self.abandon()
                raise self._refused(OSError(f"the disk has {free / 1e9:.1f} GB left"))
        distributed.wait_for_all()

    def write(self, rows: NDArray[np.int64], features: Tensor) -> None:
        """Put features [b, F] where the images `rows` [b] belong. Raises `UserError` where the disk refuses."""
        data = features.numpy().astype(np.float32, copy=False)  # [b, F]
        try:
            with self._file.open("r+b", buffering=0) as file:
                # Written, not mapped: a full disk is then an error and not the end of the process.
                for run in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows) != 1) + 1):
                    file.seek(self._header + int(rows[run[0]]) * self._width * 4)
                    _write_all(file, data[run[0] : run[-1] + 1])
        except OSError as error:
            raise self._refused(error) from error

    def finish(self, bad: dict[int, str]) -> Kept:
        """Give the set its name and open it; `bad` are the images of this process that do not decode."""
        bad = distributed.join(bad)  # also waits for the rows of all
        if distributed.is_main():
            try:
                count = self._images - len(bad)
                self._close_up(sorted(bad))
                with self._file.open("r+b") as file:
                    file.write(_header(count, self._width))
                    file.truncate(self._header + count * self._width * 4)
                facts = {**self._about, "images": self._images, "features": self._width}
                text = json.dumps({**facts, "bad": {str(k): v for k, v in sorted(bad.items())}}, indent=2)
                (self._draft / "about.json").write_text(text + "\n", encoding="utf-8")
                place = self._folder / self._key
                shutil.rmtree(place, ignore_errors=True)  # another process may have been quicker: the same features
                self._draft.rename(place)
            except OSError as error:
                raise self._refused(error) from error
            kept.make_room(self._folder, _bound(), but=self._key)
        distributed.wait_for_all()
        found = find(self._folder, self._key, images=self._images)
        if found is None:
            raise UserError(f"{self._folder / self._key} vanished while it was written. Run the command again.")
        return found

    def abandon(self) -> None:
        """Remove what was written."""
        if distributed.is_main():
            shutil.rmtree(self._draft, ignore_errors=True)

    @property
    def _file(self) -> Path:
        return self._draft / "features.npy"

    def _close_up(self, holes: list[int]) -> None:
        """Move the rows behind each hole forward."""
        if not holes:
            return
        table = np.memmap(self._file, np.float32, "r+", self._header, (self._images, self._width))  # [N, F]
        for number, hole in enumerate(holes):
            last = holes[number + 1] if number + 1 < len(holes) else self._images
            for row in range(hole + 1, last, _ROWS):
                some = np.array(table[row : min(row + _ROWS, last)])  # [r, F]
                table[row - number - 1 : row - number - 1 + len(some)] = some
        table.flush()

    def _refused(self, error: OSError) -> UserError:
        self.abandon()
        size = self._images * self._width * 4 / 1e9
        return UserError(
            f"The features of {self._images:,} images take {size:.1f} GB and could not be kept in {self._folder}: "
            f"{error.strerror or error}. Make room there, set KINFOLD_CACHE to a folder with more, or give --no-cache."
        )


def _write_all(file: io.FileIO, data: NDArray[np.float32]) -> None:
    """Write all bytes; an unbuffered file may take some at a time."""
    left = memoryview(np.ascontiguousarray(data).view(np.uint8).reshape(-1).data)
    while left:
        left = left[file.write(left) or 0 :]


def _header(count: int, width: int) -> bytes:
    """The first bytes of an `.npy` file of float32 [count, width]; as long for any count."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (count, width)})
    return file.getvalue()


def _bound() -> float:
    """Bytes that are kept. Raises `UserError` where the environment asks for what is no such number."""
    return kept.bound("KINFOLD_FEATURES_GB", BOUND_GB, "features")
