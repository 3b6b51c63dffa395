# SPDX-License-Identifier: Apache-2.0
"""Files that hold many encoded images, in the layouts that others read: Parquet and WebDataset's tar.

- Parquet: columns `image` (a struct of `bytes` and `path`) and, with labels, `label` (int64, null where an image has
  none), with the types that the `datasets` library reads from the schema, so `load_dataset` gives images and classes;
- tar: `00000012.jpg`, and `00000012.cls` with the label's number where there is one.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

_GROUP = 100  # images of a row group: what a reader of one row has to read
_GROUP_BYTES = 2**24


class Shard(Protocol):
    """One file in the making."""

    rows: int
    """images in it"""
    size: int
    """bytes of these images"""

    def add(self, name: str, image: bytes, label: int | None) -> None:
        """Append an image; `name` is that of a file, with its ending."""
        ...

    def close(self) -> None:
        """Write what is held, and end the file."""
        ...


class ParquetShard:
    """A Parquet file of images; `classes` name the labels where they have names."""

    def __init__(self, path: Path, *, labelled: bool, classes: tuple[str, ...] | None) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.rows = self.size = 0
        features: dict[str, Any] = {"image": {"_type": "Image"}}
        columns = [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))]
        if labelled:
            named = {"names": list(classes), "_type": "ClassLabel"} if classes else {"dtype": "int64", "_type": "Value"}
            features["label"] = named
            columns.append(("label", pa.int64()))
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        self._schema = pa.schema(columns, metadata)
        self._labelled = labelled
        self._held: list[tuple[dict[str, Any], int | None]] = []
        self._held_bytes = 0
        # Images are compressed already, and no two are alike.
        self._writer = pq.ParquetWriter(path, self._schema, compression="none", use_dictionary=False)

    def add(self, name: str, image: bytes, label: int | None) -> None:
        """Append an image."""
        self._held.append(({"bytes": image, "path": name}, label))
        self._held_bytes += len(image)
        self.rows += 1
        self.size += len(image)
        if len(self._held) >= _GROUP or self._held_bytes >= _GROUP_BYTES:
            self._write()

    def close(self) -> None:
        """Write what is held, and end the file."""
        self._write()
        self._writer.close()

    def _write(self) -> None:
        import pyarrow as pa

        if not self._held:
            return
        columns: dict[str, list[Any]] = {"image": [image for image, _ in self._held]}
        if self._labelled:
            columns["label"] = [label for _, label in self._held]
        self._writer.write_table(pa.table(columns, schema=self._schema))
        self._held, self._held_bytes = [], 0


class TarShard:
    """A tar file in the WebDataset layout."""

    def __init__(self, path: Path, *, labelled: bool, classes: tuple[str, ...] | None) -> None:
        self.rows = self.size = 0
        self._file = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 - closed by `close`

    def add(self, name: str, image: bytes, label: int | None) -> None:
        """Append an image, and its label."""
        self._member(name, image)
        if label is not None:
            self._member(f"{name.split('.')[0]}.cls", str(label).encode())
        self.rows += 1
        self.size += len(image)

    def close(self) -> None:
        """End the file."""
        self._file.close()

    def _member(self, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)  # no time and no owner: the same images make the same file
        member.size = len(content)
        self._file.addfile(member, io.BytesIO(content))


FORMATS: dict[str, tuple[str, Callable[..., Shard]]] = {
    "parquet": ("parquet", ParquetShard),
    "webdataset": ("tar", TarShard),
}
"""by name: how their files end, and what writes them"""
