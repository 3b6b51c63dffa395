# SPDX-License-Identifier: Apache-2.0
"""Images as evaluation sees them: decoded, resized and cut at the centre, a task at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinfold.data.crop import centre_crop
from kinfold.data.decode import Undecodable
from kinfold.data.sources import Source
from kinfold.data.work import Task, read


@dataclass(frozen=True)
class Block:
    """Decoded images, centre-cropped."""

    positions: NDArray[np.int64]
    """[n], of the images in `pixels`"""
    pixels: Tensor
    """uint8 [n, C, H, W]"""
    bad: dict[int, str]
    """position -> reason"""

    def pin_memory(self) -> Block:
        """Copy the pixels to memory from which a GPU copies while the CPU goes on."""
        return replace(self, pixels=self.pixels.pin_memory())


@dataclass(frozen=True)
class CentreCropping:
    """Decode images for evaluation: the short side resized, then the centre cut out; bad ones are left out."""

    source: Source
    channels: int
    size: int
    resize: int

    def __call__(self, task: Task) -> Block:
        bad: dict[int, str] = {}
        kept, crops = [], []
        for position in task.positions.tolist():
            try:
                crops.append(centre_crop(read(self.source, position, self.channels), self.size, self.resize))
                kept.append(position)
            except Undecodable as error:
                bad[position] = error.reason
        none = torch.empty(0, self.channels, self.size, self.size, dtype=torch.uint8)  # [0, C, size, size]
        return Block(np.array(kept, dtype=np.int64), torch.stack(crops) if crops else none, bad)
