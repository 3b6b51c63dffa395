# SPDX-License-Identifier: Apache-2.0
"""Sources of images with labels that a set's own lists name, as files or as one array."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kinfold.data.decode import Undecodable
from kinfold.data.index import Names
from kinfold.data.named_sets.small import Arrays, Listed

Labels = NDArray[np.int64]
Pixels = NDArray[np.uint8]


class FileImages:
    """Images in files, named by a list."""

    def __init__(self, base: Path, parts: list[Listed], description: str) -> None:
        entries = [entry for part in parts for entry in part.entries]
        self.base = str(base)
        self.labels: Labels | None = np.array([entry.label for entry in entries], np.int64)  # [N]
        self.classes: tuple[str, ...] | None = parts[0].classes
        self.description = f"{len(entries):,} images of {description}"
        self._names = Names.of(os.fsencode(entry.path) for entry in entries)
        digest = hashlib.sha256(repr(self.classes).encode() + self.labels.tobytes())
        self._names.hash_into(digest, 0, len(entries))
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._names)

    def read(self, i: int) -> bytes:
        """Give the file's bytes. Raises `Undecodable` where the file has gone or cannot be read."""
        try:
            with open(self.name(i), "rb") as file:
                return file.read()
        except OSError as error:
            raise Undecodable(f"it cannot be read: {error.strerror}") from error

    def name(self, i: int) -> str:
        """Give the file's path."""
        return os.path.join(self.base, os.fsdecode(self._names[range(len(self))[i]]))


class ArrayImages:
    """Images that come as one array [N, H, W, C]."""

    def __init__(self, parts: list[Arrays], splits: list[str], description: str) -> None:
        self._images = parts[0][0] if len(parts) == 1 else np.concatenate([part[0] for part in parts])
        self.labels: Labels | None = np.concatenate([part[1] for part in parts])  # [N]
        self.classes: tuple[str, ...] | None = parts[0][2]
        self.description = f"{len(self._images):,} images of {description}"
        self._places = [f"{split}, number {i}" for split, part in zip(splits, parts) for i in range(len(part[0]))]
        digest = hashlib.sha256(repr(self.classes).encode() + self.labels.tobytes())
        digest.update(np.ascontiguousarray(self._images).data)
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._images)

    def read(self, i: int) -> Pixels:
        """Give image i as uint8 [H, W, C]."""
        image: Pixels = self._images[i]
        return image

    def name(self, i: int) -> str:
        """Give the split and the number in it."""
        return self._places[i]
