# SPDX-License-Identifier: Apache-2.0
"""Decoded images of one size that were made once, as a memory-mapped array on the disk.

    pixels/KEY/pixels.npy      uint8 [N, C, H, W], in the order of the source
    pixels/KEY/about.json      size, checksum, and the images that do not decode, with the reason

The key hashes the listing of the images, when their files were written, and what decoded them. Files are written under
another name and get their own when they are whole; what is read is held against its checksum first. A cache is a
convenience: where the disk refuses, the caller hears why and goes on without.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinfold.data import kept
from kinfold.data.index import cache_root
from kinfold.data.sources import Source
from kinfold.data.written import written

BOUND_GB = 20.0
"""so much is kept if `$KINFOLD_PIXELS_GB` says nothing; 0 keeps nothing"""

_DECODER = 1  # version of the code between a file and its pixels: raise it when they change
_PART = 2**24  # bytes that are written and checked at a time


class DecodedSet(NamedTuple):
    """A whole set, decoded."""

    images: Tensor
    """uint8 [N, C, H, W]; those that do not decode are black"""
    bad: dict[int, str]
    """position -> reason, of the images that do not decode"""


def folder_of(cache: Path | None = None) -> Path:
    """Say where decoded sets are kept."""
    return cache_root(cache) / "pixels"


def key_of(source: Source, shape: tuple[int, ...], *, without_jpegs: bool = False) -> str:
    """Hash what decoded pixels of the `shape` [N, C, H, W] depend on, and whether any of them may be a JPEG's."""
    about = [_DECODER, PIL.__version__, source.fingerprint, written(source), *shape]
    if without_jpegs:
        about.append("without JPEGs")
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]


def find(folder: Path, key: str, shape: tuple[int, ...], say: Callable[[str], None]) -> DecodedSet | None:
    """Map the pixels of `key`; None where there are none, or where they are damaged, which `say` is told."""
    place = folder / key
    try:
        about = json.loads((place / kept.ABOUT).read_text(encoding="utf-8"))
        # "c": torch wants memory that may be written; what is written there would stay in this process.
        array = np.load(place / "pixels.npy", mmap_mode="c", allow_pickle=False)  # [N, C, H, W]
        if array.dtype != np.uint8 or array.shape != shape or not array.flags.c_contiguous:
            raise ValueError("another shape")
        if _checksum(array) != about["crc32"]:  # reading it all also brings it into memory, in order
            raise ValueError("another checksum")
        bad = {int(position): str(reason) for position, reason in about["bad"].items()}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError):
        say(f"the decoded images in {place} are damaged; they are made anew")
        shutil.rmtree(place, ignore_errors=True)
        return None
    kept.used(place)
    return DecodedSet(torch.from_numpy(array), bad)


def most_kept() -> float:
    """Bytes of decoded images that are kept. Raises `UserError` where the environment says none that can be."""
    return kept.bound("KINFOLD_PIXELS_GB", BOUND_GB, "decoded images")


def keep(folder: Path, key: str, decoded: DecodedSet, say: Callable[[str], None]) -> None:
    """Write a set under its key; where the disk refuses, `say` is told and nothing is left behind.

    Where the disk or a person's share of it is full, sets that nobody used for longest go first.
    """
    bound = most_kept()
    array: NDArray[np.uint8] = decoded.images.numpy()  # [N, C, H, W]
    if array.nbytes > bound:
        if bound:
            say(
                f"the decoded images take {array.nbytes / 1e9:.2f} GB, and KINFOLD_PIXELS_GB allows {bound / 1e9:g}: "
                "they are not kept, and the next run decodes again"
            )
        return
    draft = folder / f".{key}.{uuid.uuid4().hex[:8]}.partial"
    try:
        kept.remove_leftovers(folder)
        draft.mkdir(parents=True)
        free = shutil.disk_usage(folder).free
        if free < array.nbytes and not kept.give_up(folder, array.nbytes - free):
            raise OSError(f"the disk has {free / 1e9:.1f} GB left")
        try:
            _write(draft / "pixels.npy", array)
        except OSError as error:  # a share of the disk does not show before it is full
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not kept.give_up(folder, array.nbytes):
                raise
            _write(draft / "pixels.npy", array)
        bad = {str(position): reason for position, reason in sorted(decoded.bad.items())}
        about = {"crc32": _checksum(array), "shape": array.shape, "pillow": PIL.__version__, "bad": bad}
        (draft / kept.ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(folder / key, ignore_errors=True)  # another process may have been quicker: the same pixels
        draft.rename(folder / key)
        kept.make_room(folder, bound, but=key)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        say(
            f"the decoded images ({array.nbytes / 1e9:.2f} GB) could not be kept in {folder}: "
            f"{error.strerror or error}. This run goes on, and the next one decodes again; KINFOLD_CACHE names "
            "another folder, KINFOLD_PIXELS_GB=0 keeps none"
        )


def _write(path: Path, array: NDArray[np.uint8]) -> None:
    """Write an `.npy` file in parts. Not through a map: there a full disk would be the end of the process."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    with path.open("wb") as file:
        file.write(header.getvalue())
        flat = array.reshape(-1)
        for start in range(0, len(flat), _PART):
            file.write(flat[start : start + _PART].data)
        file.flush()
        os.fsync(file.fileno())


def _checksum(array: NDArray[np.uint8]) -> int:
    flat, checksum = array.reshape(-1), 0
    for start in range(0, len(flat), _PART):
        checksum = zlib.crc32(flat[start : start + _PART].data, checksum)
    return checksum
