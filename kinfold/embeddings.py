# SPDX-License-Identifier: Apache-2.0
"""Embeddings of a set of images as a Parquet table, one row an image.

    position   int64                        number of the image in the source
    path       string                       where a person finds it
    label      int64, may be null           its class, where the source has labels
    embedding  fixed_size_list<float32>[F]

The schema's metadata say which weights made it and how the images were shown (keys `kinfold.…`). The table is written
in row groups as the images come, so a million of them take the memory of a few thousand, and it is renamed into its
place at the end, so it is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from kinfold import __version__
from kinfold.data.sources import Source, open_source
from kinfold.devices import choose_device, choose_workers
from kinfold.errors import UserError
from kinfold.evaluate.backbones import FrozenBackbone, Layer, hash_of, load_backbone
from kinfold.evaluate.features import Positions, resize_for, stream

ROW_GROUP = 8192
"""rows that are held before they are written: 64 MB of ResNet-50 features"""


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """What was written, and what was left out."""

    path: Path
    images: int
    """rows of the table"""
    dimension: int
    """F, numbers in an embedding"""
    bad: dict[str, str] = field(default_factory=dict)
    """images that do not decode and so have no row: name and reason"""


def embed(
    backbone: str | FrozenBackbone,
    data: str | Source,
    out: Path,
    *,
    split: str = "all",
    features: Layer = "backbone",
    normalise: bool = False,
    size: int | None = None,
    resize: int | None = None,
    batch_size: int = 256,
    workers: int | None = None,
    device: str = "auto",
    limit: int | None = None,
    row_group: int = ROW_GROUP,
) -> Embedded:
    """Write the embeddings of all images of `data` to the Parquet file `out`, in the order of the source.

    `backbone` and `data` are what `kinfold.evaluate.features.load_backbone` and `open_source` take, or what they give.
    `features` says whether the backbone's features or the head's unit vectors are kept; `normalise` makes unit vectors
    of both. `size` and `resize` take the place of the backbone's own. A table that is there already is replaced when
    the new one is complete, and another kind of file is not.

    Raises `UserError` where something given cannot work, or the disk refuses; then `out` is as it was.
    """
    out = Path(out)
    _check_place(out)
    source = open_source(data, split=split, limit=limit) if isinstance(data, str) else data
    loaded = load_backbone(backbone) if isinstance(backbone, str) else backbone
    if size is not None or resize is not None:
        loaded = replace(loaded, size=size or loaded.size, resize=resize)
    where = choose_device(device)
    network = loaded.to(where).network(features)
    few = workers is None and len(source) < 2000  # starting processes would take longer
    side = resize_for(source, loaded.size, loaded.resize, channels=loaded.channels)
    metadata = {
        "version": __version__,
        "backbone": loaded.description,
        "weights_sha256": hash_of(loaded.module),
        "features": features,
        "head_sha256": hash_of(loaded.head) if features == "head" else None,
        "unit_length": normalise or features == "head",
        "size": loaded.size,
        "resize": side,
        "mean": list(loaded.mean),
        "std": list(loaded.std),
        "data": source.description,
        "data_fingerprint": source.fingerprint,
        "classes": None if source.classes is None else list(source.classes),
    }
    bad: dict[int, str] = {}
    parts = stream(
        network,
        source,
        size=loaded.size,
        resize=side,
        channels=loaded.channels,
        mean=loaded.mean,
        std=loaded.std,
        batch_size=min(batch_size, row_group),
        workers=0 if few else choose_workers(workers),
        device=where,
        normalise=normalise,
        progress="embeddings",
        bad=bad,
    )
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    table = _Table(partial, source, metadata, row_group)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for vectors, positions in parts:
            table.add(vectors, positions)
        table.close()
        os.replace(partial, out)
    except OSError as error:
        raise UserError(
            f"{out} could not be written: {error.strerror or error}. Make room, or give a place that can be written."
        ) from error
    finally:
        table.abandon()
        partial.unlink(missing_ok=True)
    return Embedded(
        path=out,
        images=table.rows,
        dimension=table.dimension,
        bad={source.name(position): reason for position, reason in sorted(bad.items())},
    )


class _Table:
    """A Parquet file under way: rows are held until they fill a row group."""

    def __init__(self, path: Path, source: Source, metadata: dict[str, Any], row_group: int) -> None:
        self.path, self.source, self.metadata, self.row_group = path, source, metadata, row_group
        self.rows = self.dimension = 0
        self._vectors: list[np.ndarray[Any, Any]] = []
        self._positions: list[Positions] = []
        self._held = 0
        self._writer: Any = None

    def add(self, vectors: Tensor, positions: Positions) -> None:
        """Take rows [b, F] with their positions [b]."""
        self.dimension = vectors.shape[1]
        self._vectors.append(vectors.numpy())
        self._positions.append(positions)
        self._held += len(positions)
        if self._held >= self.row_group:
            self._write()

    def close(self) -> None:
        """Write what is held and end the file."""
        if self._held:
            self._write()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def abandon(self) -> None:
        """Let go of a file that is not complete; it is removed anyway."""
        if self._writer is not None:
            with contextlib.suppress(OSError, pa.ArrowException):
                self._writer.close()
            self._writer = None

    def _write(self) -> None:
        vectors, positions = np.concatenate(self._vectors), np.concatenate(self._positions)  # [n, F], [n]
        schema = self._schema()
        labels: Any = pa.nulls(len(positions), pa.int64())
        if self.source.labels is not None:
            own = np.asarray(self.source.labels, np.int64)[positions]  # [n]
            labels = pa.array(own, pa.int64(), mask=own < 0)
        columns = [
            pa.array(positions, pa.int64()),
            pa.array([_text(self.source.name(int(position))) for position in positions], pa.string()),
            labels,
            pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1), pa.float32()), self.dimension),
        ]
        if self._writer is None:
            self._writer = pq.ParquetWriter(self.path, schema)
        self._writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=len(positions))
        self.rows += len(positions)
        self._vectors, self._positions, self._held = [], [], 0

    def _schema(self) -> Any:
        words = {
            f"kinfold.{key}": value if isinstance(value, str) else json.dumps(value)
            for key, value in self.metadata.items()
        }
        return pa.schema(
            [
                pa.field("position", pa.int64(), nullable=False),
                pa.field("path", pa.string(), nullable=False),
                pa.field("label", pa.int64()),
                pa.field("embedding", pa.list_(pa.field("element", pa.float32()), self.dimension)),
            ],
            metadata={key: _text(value) for key, value in words.items()},
        )


def _text(name: str) -> str:
    """A name as text that a table can hold: bytes of a file name that are no UTF-8 are shown as escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _check_place(out: Path) -> None:
    """Refuse a place that cannot hold the table before hours are spent on it."""
    if out.is_dir():
        raise UserError(f"{out} is a folder. Give the name of a file in it, for example {out / 'embeddings.parquet'}.")
    if out.suffix != ".parquet":
        raise UserError(f"Embeddings are written as .parquet; {out.name} ends otherwise. Change the name of the file.")
    for above in out.absolute().parents:
        if above.exists():
            if not above.is_dir() or not os.access(above, os.W_OK):
                raise UserError(f"{out} cannot be written: {above} is not a folder that takes files. Choose another.")
            break
