# SPDX-License-Identifier: Apache-2.0
"""Square crops of a fixed share at any place: what `Resize` followed by `RandomCrop` shows of a photo."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kinfold.data.sources import Source
from kinfold.data.work import read
from kinfold.randomness import VIEW, uniforms

_PLACE = 2  # of these numbers, beside view 0 and the padded crop, in an image's addresses


class AnyCrop:
    """A source whose images are a square of theirs, at another place in every epoch: Resize, then RandomCrop.

    The side is `share` of the short side, the place any. Set `epoch` before the epoch's first image is read; workers
    that are started afterwards know it.
    """

    def __init__(self, source: Source, channels: int, share: float, seed: int) -> None:
        self.source, self.channels, self.share, self.seed = source, channels, share, seed
        self.epoch = 0
        self.labels, self.classes = source.labels, source.classes
        self.fingerprint, self.description = source.fingerprint, source.description

    def __len__(self) -> int:
        return len(self.source)

    def read(self, i: int) -> NDArray[np.uint8]:
        """Give the crop of image i in this epoch: uint8 [s, s, C]. Raises `Undecodable`."""
        image = read(self.source, i, self.channels)  # [H, W, C]
        side = max(1, round(self.share * min(image.shape[:2])))
        u = uniforms(VIEW, self.seed, self.epoch, i, _PLACE, draws=2)  # [2]
        top, left = (int(part * (length - side + 1)) for part, length in zip(u, image.shape[:2]))
        return image[top : top + side, left : left + side]  # [s, s, C]

    def name(self, i: int) -> str:
        """Name image i."""
        return self.source.name(i)
