# SPDX-License-Identifier: Apache-2.0
"""Images in tar files (the WebDataset layout): each tar is indexed once, then read at any position.

Members of one folder that share their name up to its first dot are one sample: `000123.jpg` is the image,
`000123.cls` or the "label" in `000123.json` its label.

Differs: WebDataset reads its shards as a stream, and the `datasets` library either copies them into a cache
several times their size or streams them as well. A stream can be shuffled only within a buffer and resumed
only roughly. With the place of each image known, the order of an epoch is arithmetic and a run resumes at
the exact image. The index is kept under the cache, and made again when a tar's size or time changes.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from kinfold.data import index
from kinfold.data.decode import Undecodable
from kinfold.data.folder import EXTENSIONS, extension
from kinfold.errors import UserError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_LABELS = frozenset({"cls", "json"})

Label = int | str | None


def expand(pattern: str) -> list[str]:
    """Write out `shard-{000..012}.tar`, `{train,extra}.tar` and `shard-*.tar`.

    Raises `UserError` where a file that the braces name is missing, or nothing fits.
    """
    found = _BRACES.search(pattern)
    if found is None:
        if glob.has_magic(pattern):
            names = sorted(glob.glob(pattern))
            if not names:
                raise UserError(f"No file fits {pattern}.")
            return names
        if not os.path.isfile(pattern):
            raise UserError(f"{pattern} does not exist.")
        return [pattern]
    span = _RANGE.fullmatch(found.group(1))
    if span is not None:
        first, last = span.groups()
        words = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        words = found.group(1).split(",")
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [name for word in words for name in expand(head + word + tail)]


class TarSource:
    """The images of a row of tar files, in the order of files and members; `open_tars` makes it."""

    def __init__(self, paths: Sequence[str], content: index.Index, names: tuple[str, ...] | None = None) -> None:
        self.paths = tuple(paths)
        self._content = content
        self._attach()
        count = len(self)
        self.classes: tuple[str, ...] | None = None
        self.labels: npt.NDArray[np.int64] | None = None
        if content.meta["labelled"]:
            self.labels = np.asarray(content.arrays["labels"])  # [N]
            stated = content.meta["classes"]
            if stated is not None:
                self.classes = tuple(stated)
            elif names is not None and self.labels.max() < len(names):
                self.classes = names
        digest = hashlib.sha256()
        for array in ("offsets", "names", "shard", "place", "size", "labels"):
            digest.update(content.arrays[array].tobytes())
        self.fingerprint = digest.hexdigest()
        where = self.paths[0] if len(self.paths) == 1 else f"{len(self.paths):,} tar files, {self.paths[0]} first"
        kinds = f"{len(np.unique(self.labels)):,} classes" if self.labels is not None else "no labels"
        self.description = f"{count:,} image{'' if count == 1 else 's'} in {where} ({kinds})"

    def _attach(self) -> None:
        arrays = self._content.arrays
        self._names = index.Names(arrays["names"], arrays["offsets"])
        self._shard, self._place, self._size = arrays["shard"], arrays["place"], arrays["size"]

    def __len__(self) -> int:
        return len(self._names)

    def read(self, i: int) -> bytes:
        """Give the member's bytes. Raises `Undecodable` where the tar has gone or became shorter."""
        path, size = self.paths[self._shard[i]], int(self._size[i])
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(int(self._place[i]))
                raw = file.read(size)
                while len(raw) < size and (more := file.read(size - len(raw))):
                    raw += more
        except OSError as error:
            raise Undecodable(f"it cannot be read: {error.strerror}") from error
        if len(raw) < size:
            raise Undecodable(f"{path} is shorter than when it was indexed")
        return raw

    def name(self, i: int) -> str:
        """Give the tar's path and the member's name in it."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        member = self._names[i % len(self)].decode("utf-8", "backslashreplace")
        return f"{self.paths[self._shard[i]]}:{member}"

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in self.__dict__.items() if key not in _ATTACHED}
        return {**state, "_content": index.packed(self._content)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _content=index.unpacked(state["_content"], state["paths"][0]))
        self._attach()


_ATTACHED = frozenset({"_names", "_shard", "_place", "_size"})


def open_tars(paths: Sequence[str], cache: Path | None = None) -> TarSource:
    """Make a source of tar files, indexing those anew that changed.

    Raises `UserError` where a file is no tar, is compressed, is cut off, or where none holds an image.
    """
    paths = [os.path.abspath(path) for path in paths]
    states = [os.stat(path) for path in paths]
    signs = [[path, state.st_size, state.st_mtime_ns] for path, state in zip(paths, states)]
    file = index.index_file(cache, "tars", *paths)
    known = index.load(file)
    if known is None or known.meta.get("tars") != signs:
        meta, arrays = _scan(paths)
        if len(arrays["shard"]) == 0:
            found = ", ".join(f".{kind} ({count:,})" for kind, count in sorted(meta["ignored"].items()))
            raise UserError(f"{paths[0]} holds no image; it holds {found or 'nothing'}.")
        known = index.save(file, {**meta, "tars": signs}, arrays)
    return TarSource(paths, known, _class_names(paths))


def _class_names(paths: list[str]) -> tuple[str, ...] | None:
    """The classes' names that `kinfold pack` left beside the tar files, which hold their numbers."""
    try:
        with open(os.path.join(os.path.dirname(paths[0]), "pack.json"), encoding="utf-8") as file:
            names = json.load(file)["classes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return tuple(map(str, names)) if isinstance(names, list) else None


def _scan(paths: list[str]) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    names: list[bytes] = []
    rows: list[tuple[int, int, int]] = []
    labels: list[Label] = []
    ignored: dict[str, int] = {}
    for shard, path in enumerate(paths):
        # Samples are put together per tar, by key, in the order of their images.
        images: dict[str, tuple[str, int, int]] = {}
        told: dict[str, Label] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    base = PurePosixPath(member.name).name
                    if not member.isfile() or base.startswith("."):
                        continue
                    key = member.name[: len(member.name) - len(base)] + base.split(".")[0]
                    kind = extension(base)
                    if kind in EXTENSIONS:
                        images.setdefault(key, (member.name, member.offset_data, member.size))
                    elif kind in _LABELS and member.size < 1 << 24:
                        inner = tar.extractfile(member)
                        label = None if inner is None else _label(kind, inner.read())
                        if label is not None:
                            told[key] = label
                    else:
                        ignored[kind] = ignored.get(kind, 0) + 1
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise UserError(_complaint(path, error)) from error
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from error
        for key, (name, place, size) in images.items():
            names.append(name.encode("utf-8", "surrogateescape"))
            rows.append((shard, place, size))
            labels.append(told.get(key))
    row = index.Names.of(names)
    table = np.array(rows, np.int64).reshape(-1, 3)  # [N, 3]
    numbers, classes = _numbers(labels)
    meta = {"ignored": ignored, "labelled": numbers is not None, "classes": classes}
    arrays: dict[str, npt.NDArray[Any]] = {
        "names": row.blob,
        "offsets": row.offsets,
        "shard": table[:, 0].astype(np.int32),
        "place": np.ascontiguousarray(table[:, 1]),
        "size": np.ascontiguousarray(table[:, 2]),
        "labels": np.zeros(0, np.int64) if numbers is None else numbers,
    }
    return meta, arrays


def _complaint(path: str, error: Exception) -> str:
    with open(path, "rb") as file:
        head = file.read(6)
    for magic, tool in (
        (b"\x1f\x8b", "gunzip"),
        (b"BZh", "bunzip2"),
        (b"\xfd7zXZ", "unxz"),
        (b"(\xb5/\xfd", "unzstd"),
    ):
        if head.startswith(magic):
            return f"{path} is compressed, so no image in it can be reached directly: unpack it with {tool}."
    return f"{path} is not a complete tar file: {error}."


def _label(kind: str, raw: bytes) -> Label:
    """Read a label: a whole number or a class's name; None where there is none."""
    try:
        found: object = raw.decode().strip()
        if kind == "json":
            record = json.loads(str(found))
            found = record.get("label") if isinstance(record, dict) else None
    except ValueError:
        return None
    if isinstance(found, bool) or not isinstance(found, int | str) or found == "":
        return None
    try:
        return int(found)
    except ValueError:
        return found


def _numbers(labels: list[Label]) -> tuple[npt.NDArray[np.int64] | None, list[str] | None]:
    """Turn labels into numbers [N] and, where they are words, classes; None unless every image has one."""
    if not labels or any(label is None for label in labels):
        return None, None
    if all(isinstance(label, int) and 0 <= label < 1 << 62 for label in labels):
        return np.array(labels, np.int64), None  # [N]
    classes = sorted({str(label) for label in labels})
    numbers = {name: number for number, name in enumerate(classes)}
    return np.array([numbers[str(label)] for label in labels], np.int64), classes  # [N]
