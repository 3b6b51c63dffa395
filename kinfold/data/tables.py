# SPDX-License-Identifier: Apache-2.0
"""Images in tables: parquet and Arrow files in the Hugging Face layout, saved data sets, and the Hub.

The `datasets` library reads them. The images stay encoded (`Image(decode=False)`): the library decodes rows
as it reads them, and one bad image would end the run. The table is memory-mapped, so workers share it and a
row costs its own bytes only; parquet is unpacked once, under the cache, because its compressed pages have no
random access.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kinfold.data.decode import Undecodable
from kinfold.data.index import cache_root
from kinfold.data.splits import by_split, choose, split_of_file
from kinfold.errors import UserError

_IMAGE_NAMES = (
    "image",
    "img",
    "images",
    "picture",
    "photo",
    "pixel_values",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "bytes",
)
_LABEL_NAMES = (
    "label",
    "labels",
    "fine_label",
    "class",
    "category",
    "target",
    "cls",
    "class_label",
    "label_id",
)
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?")
# The end of a parquet or Arrow file holds the sizes and places of all its parts: with it, a changed file is
# told from an equal one on any machine, without reading it.
_TAIL = 1 << 16

_temporary: list[tempfile.TemporaryDirectory[str]] = []


class TableSource:
    """The rows of a `datasets.Dataset`; `open_files`, `open_saved` and `open_hub` make it.

    `folder` is where image paths in the table start from.
    """

    def __init__(self, rows: Any, *, where: str, split: str, sign: str, folder: str) -> None:
        self._image = _image_column(rows, where)
        label = _label_column(rows)
        self.labels, self.classes = _labels(rows, label)
        self._rows = _encoded(rows.select_columns([self._image]), self._image)
        self._where = where
        self._split = split
        self._folder = folder
        digest = hashlib.sha256(f"{sign}\0{split}\0{len(rows)}\0".encode("utf-8", "surrogateescape"))
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        self.fingerprint = digest.hexdigest()
        kinds = f"{len(np.unique(self.labels)):,} classes" if self.labels is not None else "no labels"
        self.description = f"{len(rows):,} images in {where}, split {split} ({kinds})"

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, i: int) -> bytes:
        """Give the encoded image of a row. Raises `Undecodable` where the row has none."""
        cell = self._cell(int(i))
        if isinstance(cell, dict):
            raw, path = cell.get("bytes"), cell.get("path")
        else:
            raw, path = cell, None
        if raw is not None:
            return bytes(raw)
        if not path:
            raise Undecodable("the table has no image in this row")
        try:
            with open(os.path.join(self._folder, path), "rb") as file:
                return file.read()
        except OSError as error:
            raise Undecodable(f"{path} cannot be read: {error.strerror}") from error

    def file(self, i: int) -> str | None:
        """Give the path of a row's image that is not in the table itself; None where it is, or where there is none."""
        cell = self._cell(int(i))
        if isinstance(cell, dict) and cell.get("bytes") is None and cell.get("path"):
            return os.path.join(self._folder, cell["path"])
        return None

    def _cell(self, i: int) -> Any:
        """What stands in a row: straight from the Arrow column, which is three times faster than by way of `datasets`.

        The library's own way, which is the reference, is taken where the rows are a selection of the table's.
        """
        if getattr(self._rows, "_indices", self) is not None:
            return self._rows[i][self._image]
        return self._rows.data.column(self._image)[i].as_py()

    def name(self, i: int) -> str:
        """Give the table, the split and the row."""
        return f"{self._where}, split {self._split}, row {range(len(self))[int(i)]:,}"


def table_files(folder: str) -> list[str]:
    """List the parquet and Arrow files at the top of a folder, or else in its `data/`."""
    for place in (folder, os.path.join(folder, "data")):
        if os.path.isdir(place):
            names = [name for name in sorted(os.listdir(place)) if not name.startswith(".")]
            found = [os.path.join(place, name) for name in names if name.lower().endswith((".parquet", ".arrow"))]
            if found:
                return found
    return []


def is_saved(folder: str) -> bool:
    """Say whether `datasets`' `save_to_disk` wrote this folder."""
    names = ("dataset_dict.json", "state.json")
    return any(os.path.isfile(os.path.join(folder, name)) for name in names)


def open_files(files: Sequence[str], *, where: str, split: str, cache: Path | None = None) -> TableSource:
    """Open the files of one split; which split a file is, its name says.

    A single file is taken for "train" whatever its name. Raises `UserError` for a split that does not exist
    and for files that are no tables.
    """
    import datasets

    if len(files) == 1 and split == "train":
        groups = {split_of_file(files[0]): list(files)}
        chosen = list(groups)
    else:
        groups = by_split(files)
        chosen = choose(split, groups, where=where)
    paths = [path for name in chosen for path in groups[name]]
    parts = []
    for name in chosen:
        for kind in ("parquet", "arrow"):
            these = [path for path in groups[name] if path.lower().endswith(f".{kind}")]
            if these:
                parts.append(_load(kind, these, where, cache))
    try:
        rows = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(_aligned(parts))
    except ValueError as error:
        raise UserError(f"The files of {where} hold different columns: {error}") from error
    folder = where if os.path.isdir(where) else os.path.dirname(where)
    return TableSource(rows, where=where, split=_title(split, chosen), sign=_sign(paths), folder=folder)


def _aligned(parts: list[Any]) -> list[Any]:
    """Splits with the same columns: those that all have, and the label, -1 where a split has none."""
    shared = [name for name in parts[0].column_names if all(name in part.column_names for part in parts)]
    label = next((found for part in parts if (found := _label_column(part)) is not None), None)
    if label is None or label in shared:
        return [part.select_columns(shared) for part in parts]
    kind = next(part.features[label] for part in parts if label in part.column_names)
    filled = []
    for part in parts:
        if label not in part.column_names:
            part = part.add_column(label, [-1] * len(part)).cast_column(label, kind)
        filled.append(part.select_columns([*shared, label]))
    return filled


def _title(split: str, chosen: list[str]) -> str:
    return chosen[0] if len(chosen) == 1 else split


def _load(kind: str, paths: list[str], where: str, cache: Path | None) -> Any:
    import datasets

    datasets.disable_progress_bars()
    if kind == "arrow":
        try:
            return datasets.concatenate_datasets([datasets.Dataset.from_file(path) for path in paths])
        except Exception:
            pass  # the file format with a footer, which is not mapped but unpacked like parquet
    states = [os.stat(path) for path in paths]
    what = "\0".join(f"{p}\0{s.st_size}\0{s.st_mtime_ns}" for p, s in zip(paths, states))
    place = cache_root(cache) / "tables" / hashlib.sha256(what.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    try:
        place.mkdir(parents=True, exist_ok=True)
        if not os.access(place, os.W_OK):
            raise PermissionError
    except OSError:
        _temporary.append(tempfile.TemporaryDirectory(prefix="kinfold-", ignore_cleanup_errors=True))
        place = Path(_temporary[-1].name)
    try:
        return datasets.load_dataset(kind, data_files={"train": paths}, split="train", cache_dir=str(place))
    except Exception as error:
        raise UserError(f"{where} cannot be read as {kind}: {_last(error)}.") from error


def _last(error: BaseException) -> str:
    """Give the message of the first cause: `datasets` wraps what went wrong in what it was doing."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error) or type(error).__name__).strip().rstrip(".")


def _sign(paths: list[str]) -> str:
    """Tell the content of files apart by names, sizes and ends."""
    digest = hashlib.sha256()
    for path in paths:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            file.seek(max(0, size - _TAIL))
            digest.update(f"{os.path.basename(path)}\0{size}\0".encode("utf-8", "surrogateescape") + file.read())
    return digest.hexdigest()


def open_saved(folder: str, *, split: str) -> TableSource:
    """Open what `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    import datasets

    try:
        found = datasets.load_from_disk(folder)
    except Exception as error:
        raise UserError(f"{folder} looks like a saved data set, but cannot be read: {_last(error)}.") from error
    rows, title, sign = _pick(found, split, folder)
    return TableSource(rows, where=folder, split=title, sign=sign, folder=folder)


def _pick(found: Any, split: str, where: str) -> tuple[Any, str, str]:
    import datasets

    if not isinstance(found, dict):
        found = {str(found.split) if found.split is not None else "train": found}
        if split == "train":
            split = next(iter(found))
    chosen = choose(split, found, where=where)
    rows = found[chosen[0]] if len(chosen) == 1 else datasets.concatenate_datasets([found[name] for name in chosen])
    sign = "".join(str(found[name]._fingerprint) for name in chosen)
    return rows, _title(split, chosen), sign


def is_hub_name(data: str) -> bool:
    """Say whether this is `hf:owner/name`, or `owner/name` where no folder `owner` is."""
    if data.startswith("hf:"):
        return True
    return _HUB_NAME.fullmatch(data) is not None and not os.path.exists(data.split("/")[0])


def open_hub(data: str, *, split: str, cache: Path | None = None) -> TableSource:
    """Open a data set of the Hugging Face Hub: `hf:owner/name` or `hf:owner/name:config`.

    It is downloaded once, into the library's own cache (or `cache`). Raises `UserError` where the Hub cannot
    be reached, the data set does not exist, or needs a choice of configuration.
    """
    import datasets

    named = _HUB_NAME.fullmatch(data.removeprefix("hf:"))
    if named is None:
        raise UserError(f"{data!r} is no name on the Hub: hf:owner/name or hf:owner/name:config is expected.")
    name, config = named["name"], named["config"]
    place = None if cache is None else str(cache_root(cache) / "hub")
    try:
        builder = datasets.load_dataset_builder(name, config, cache_dir=place)
        splits = list(builder.info.splits or ())
        if splits and split != "all":
            only = choose(split, splits, where=data)[0]
            rows: Any = {only: datasets.load_dataset(name, config, split=only, cache_dir=place)}
            split = only
        else:
            rows = datasets.load_dataset(name, config, cache_dir=place)
    except UserError:
        raise
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"{data} is neither a path here nor a data set that the Hub shows: check the name (private ones need "
            "`hf auth login`)."
        ) from error
    except OSError as error:
        raise UserError(
            f"{data} is not a path here, and the Hugging Face Hub cannot be reached to look for it there "
            f"({_last(error)[:200]}). Check the path, or the network."
        ) from error
    except Exception as error:
        raise UserError(f"{data} cannot be read from the Hugging Face Hub: {_last(error)[:500]}.") from error
    found, title, sign = _pick(rows, split, data)
    return TableSource(found, where=data, split=title, sign=sign, folder="")


def _image_column(rows: Any, where: str) -> str:
    import datasets
    import pyarrow as pa

    features = rows.features
    found = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    if not found:
        for name, kind in features.items():
            encoded = isinstance(kind, dict) and "bytes" in kind
            arrow = rows.data.schema.field(name).type
            binary = pa.types.is_binary(arrow) or pa.types.is_large_binary(arrow)
            if (encoded or binary) and (encoded or name.lower() in _IMAGE_NAMES):
                found.append(name)
    if not found:
        columns = ", ".join(f"{name} ({rows.data.schema.field(name).type})" for name in features)
        raise UserError(
            f"No column of {where} holds images. Found: {columns}. Expected: a column of the Image type, "
            "or encoded files as bytes in a column named image."
        )
    best: str = min(found, key=lambda name: (_rank(name, _IMAGE_NAMES), found.index(name)))
    return best


def _rank(name: str, order: tuple[str, ...]) -> int:
    return order.index(name.lower()) if name.lower() in order else len(order)


def _label_column(rows: Any) -> str | None:
    import datasets
    import pyarrow as pa

    found = []
    for name, kind in rows.features.items():
        classed = isinstance(kind, datasets.ClassLabel)
        whole = pa.types.is_integer(rows.data.schema.field(name).type)
        if classed or (whole and name.lower() in _LABEL_NAMES):
            found.append(name)
    return min(found, key=lambda name: (_rank(name, _LABEL_NAMES), found.index(name)), default=None)


def _labels(rows: Any, column: str | None) -> tuple[npt.NDArray[np.int64] | None, tuple[str, ...] | None]:
    """Read the labels [N], -1 for rows without one (null, or any negative number); none where no row has one."""
    import datasets

    if column is None or len(rows) == 0:
        return None, None
    values = rows.select_columns([column]).with_format("arrow")[:].column(column)
    labels = values.fill_null(-1).to_numpy().astype(np.int64)  # [N]
    labels[labels < 0] = -1
    if labels.max() < 0:
        return None, None
    kind = rows.features[column]
    return labels, tuple(kind.names) if isinstance(kind, datasets.ClassLabel) else None


def _encoded(rows: Any, column: str) -> Any:
    import datasets

    if isinstance(rows.features[column], datasets.Image):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows.with_format(None)
