# SPDX-License-Identifier: Apache-2.0
"""Long listings as flat arrays, kept in one memory-mapped file: a million names cost no Python objects.

A list of a million `str` takes about 100 MB in every worker (reference counts are written, so fork copies
the pages) and has to be pickled for every spawned one. Here the names are one run of bytes and their
offsets, which the processes share through the page cache.

The file: eight bytes that name the format, the length of a JSON header, the header (`meta`, then type, shape
and place of each array, and a checksum over all of them), the arrays, each starting at a multiple of 64
bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kinfold.errors import UserError

_FORMAT = b"KINFIDX1"
_ALIGNMENT = 64


class Names:
    """A read-only row of byte strings: `blob` uint8 is all of them, `offsets` int64 [N + 1] their bounds."""

    def __init__(self, blob: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]) -> None:
        self.blob = blob
        self.offsets = offsets

    @classmethod
    def of(cls, names: Iterable[bytes]) -> Names:
        """Lay the strings end to end."""
        row = list(names)
        offsets = np.zeros(len(row) + 1, np.int64)  # [N + 1]
        np.cumsum(np.fromiter((len(name) for name in row), np.int64, len(row)), out=offsets[1:])
        return cls(np.frombuffer(b"".join(row), np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> bytes:
        return self.blob[self.offsets[i] : self.offsets[i + 1]].tobytes()

    def hash_into(self, digest: Any, start: int, stop: int) -> None:
        """Feed the names `start` to `stop` and their lengths to a hashlib object."""
        digest.update(np.diff(self.offsets[start : stop + 1]).tobytes())
        digest.update(self.blob[self.offsets[start] : self.offsets[stop]].tobytes())


class Index(NamedTuple):
    """What an index file holds. `file` is None where it lives in memory only; `token` tells what
    was written apart."""

    meta: dict[str, Any]
    arrays: dict[str, npt.NDArray[Any]]
    file: Path | None = None
    token: str = ""


def cache_root(cache: Path | None) -> Path:
    """Say where derived files go: the folder given, else `$KINFOLD_CACHE`, else `~/.cache/kinfold`."""
    if cache is not None:
        return Path(cache)
    stated = os.environ.get("KINFOLD_CACHE")
    if stated:
        return Path(stated)
    try:
        return Path.home() / ".cache" / "kinfold"
    except RuntimeError:  # a user without a home, as some containers have
        return Path(tempfile.gettempdir()) / "kinfold"


def index_file(cache: Path | None, kind: str, *what: str) -> Path:
    """Say where the index of `what` (paths) lies."""
    digest = hashlib.sha256("\0".join(what).encode("utf-8", "surrogateescape")).hexdigest()
    return cache_root(cache) / "index" / f"{kind}-{digest[:32]}.index"


def save(path: Path, meta: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]) -> Index:
    """Write an index in one step, so that no reader ever sees half of it.

    Where the place cannot be written, the index stays in memory: a cache is a convenience.
    """
    places: dict[str, tuple[str, list[int], int]] = {}
    end, checksum = 0, 0
    for name, array in arrays.items():
        end += -end % _ALIGNMENT
        places[name] = (array.dtype.str, list(array.shape), end)
        checksum = zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data, checksum)
        end += array.nbytes
    # By content: the same listing written twice, by two commands or two ranks, is the same to who holds the first.
    lasting = {key: value for key, value in meta.items() if key != "listed"}  # when, which is never the same twice
    said = hashlib.sha256(json.dumps(lasting, sort_keys=True).encode())
    for array in arrays.values():
        said.update(np.ascontiguousarray(array).view(np.uint8).data)
    token = said.hexdigest()[:32]
    header = json.dumps({"meta": meta, "arrays": places, "checksum": checksum, "token": token, "bytes": end})
    encoded = header.encode()
    start = 16 + len(encoded)
    start += -start % _ALIGNMENT
    draft: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(prefix=path.stem, suffix=".part", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(_FORMAT + len(encoded).to_bytes(8, "little") + encoded)
            for name, array in arrays.items():
                file.seek(start + places[name][2])
                file.write(np.ascontiguousarray(array).view(np.uint8).data)
            file.truncate(start + end)
        os.replace(draft, path)
    except OSError:
        if draft is not None:
            with contextlib.suppress(OSError):
                os.unlink(draft)
        return Index(meta, arrays)
    return Index(meta, arrays, path, token)


def load(path: Path) -> Index | None:
    """Map an index into memory; None where there is none, or where it is damaged."""
    try:
        with open(path, "rb") as file:
            if file.read(8) != _FORMAT:
                return None
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            if 16 + length > size:
                return None
            header = json.loads(file.read(length))
            start = 16 + length
            start += -start % _ALIGNMENT
            if size != start + header["bytes"]:
                return None
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        arrays: dict[str, npt.NDArray[Any]] = {}
        checksum = 0
        for name, (dtype, shape, place) in header["arrays"].items():
            count = int(np.prod(shape, dtype=np.int64))
            arrays[name] = np.frombuffer(mapped, np.dtype(dtype), count, start + place).reshape(shape)
            checksum = zlib.crc32(arrays[name].view(np.uint8).data, checksum)
        if checksum != header["checksum"]:
            return None
        return Index(dict(header["meta"]), arrays, path, str(header["token"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def packed(content: Index) -> Index | tuple[Path, str]:
    """What of an index travels to another process: where its file is, which that process maps itself.

    Only an index that is not on disk travels by value.
    """
    return content if content.file is None else (content.file, content.token)


def unpacked(what: Index | tuple[Path, str], where: str) -> Index:
    """The index that `packed` was given. Raises `UserError`, naming `where`, if another has been written since."""
    if isinstance(what, Index):
        return what
    file, token = what
    content = load(file)
    if content is None or content.token != token:
        raise UserError(f"{where} changed while processes were being started; start again.")
    return content
