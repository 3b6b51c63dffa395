# SPDX-License-Identifier: Apache-2.0
"""Images as evaluation sees them: decoded, resized, cut at the centre and normalised, all in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinfold.data.crop import centre_crop
from kinfold.data.decode import Undecodable
from kinfold.data.sources import Source
from kinfold.data.work import Task, in_order, no_readable_image, read, run
from kinfold.devices import to_device
from kinfold.errors import UserError


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


def evaluation_batches(
    source: Source,
    *,
    size: int,
    resize: int | None = None,
    channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int,
    workers: int = 0,
    device: str | torch.device = "cpu",
    bad: dict[int, str] | None = None,
) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
    """Give all images in order, without augmentation, as [B, C, size, size] and positions [B].

    Images are float32 and normalised, positions int64. The short side is resized to `resize` (None: to
    `size`), then the centre is cut out; an image that already is `size` by `size` passes unchanged. Images
    that do not decode are left out, so their positions are missing, and `bad` (where given) is told why.

    Raises: `UserError` where `resize` is smaller than `size`, or no image decodes.
    """
    if resize is not None and resize < size:
        raise UserError(f"resize is {resize}, smaller than the crop's size {size}. Make it {size} or more.")
    reasons: dict[int, str] = {} if bad is None else bad
    where = torch.device(device)
    centre = torch.tensor(mean, dtype=torch.float32, device=where)[:, None, None]  # [C, 1, 1]
    spread = torch.tensor(std, dtype=torch.float32, device=where)[:, None, None]  # [C, 1, 1]
    work = CentreCropping(source, channels, size, size if resize is None else resize)
    seen = 0
    for block in run(work, in_order(len(source), batch_size), workers=workers, pin=where.type == "cuda"):
        reasons.update(block.bad)
        seen += len(block.positions)
        if len(block.positions):
            images = to_device(block.pixels, where).to(torch.float32).div_(255.0)  # [B, C, size, size]
            yield images.sub_(centre).div_(spread), block.positions
    if not seen:
        raise UserError(no_readable_image(source, reasons))
