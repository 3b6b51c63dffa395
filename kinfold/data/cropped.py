# SPDX-License-Identifier: Apache-2.0
"""Images of a source, cut to one square beforehand: for protocols that say how a test image is resized."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from kinfold.data.crop import Filter, centre_crop
from kinfold.data.decode import decode
from kinfold.data.sources import Labels, Source


class Cropped:
    """The images of another source: short side to `resize` by a filter, then the central square of `size`.

    What has that size already stays as it is. Cutting happens where images are read, in the loader's workers too.
    """

    def __init__(
        self, source: Source, *, size: int, resize: int | None = None, filter: Filter = "bicubic", channels: int = 3
    ) -> None:
        self.source = source
        self.size = size
        self.resize = size if resize is None else resize
        self.filter = filter
        self.channels = channels
        self.labels: Labels | None = source.labels
        self.classes = source.classes
        about = f"{source.fingerprint} {size} {self.resize} {filter} {channels}"
        self.fingerprint = hashlib.sha256(about.encode()).hexdigest()
        self.description = f"{source.description}, {filter} to {size} x {size}"

    def __len__(self) -> int:
        return len(self.source)

    def read(self, i: int) -> NDArray[np.uint8]:
        """Give image i as uint8 [size, size, channels]. Raises `Undecodable` where it cannot be decoded."""
        image = decode(self.source.read(i), self.channels)
        cut: NDArray[np.uint8] = centre_crop(image, self.size, self.resize, filter=self.filter).permute(1, 2, 0).numpy()
        return cut

    def name(self, i: int) -> str:
        """Name image i."""
        return self.source.name(i)
