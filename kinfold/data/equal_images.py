# SPDX-License-Identifier: Apache-2.0
"""Images of a set that is decoded once: all of one size, none of them to be decoded at a fraction of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinfold.data.decode import Jpeg, Undecodable, look
from kinfold.data.sources import Source
from kinfold.data.work import Task, read_with


class Unfit(Exception):
    """An image that cannot be held decoded with the others; the text says why and what to change."""


def read_equal(
    source: Source,
    position: int,
    channels: int,
    *,
    scaled_from: int | None,
    size: tuple[int, ...] | None = None,
) -> NDArray[np.uint8]:
    """Read and decode an image that is as large as the others: uint8 [H, W, C].

    Raises: `Undecodable`; `Unfit` where it is a JPEG whose short side has `scaled_from` pixels or more, or is not of
    the `size`.
    """
    image = read_with(look, source, position, channels)
    if scaled_from is not None and isinstance(image, Jpeg) and min(image.height, image.width) >= scaled_from:
        raise Unfit(
            f"resident=true would keep images whole, and images.scaled_decode=true decodes {source.name(position)}, a "
            "large JPEG, at a fraction of its size at each step. Set images.scaled_decode=false, or leave resident out."
        )
    pixels = image.decode().pixels  # [H, W, C]
    if size is not None and pixels.shape[:2] != size:
        raise Unfit(
            f"resident=true needs images of one size, but {source.name(position)} is not of the same size as those "
            "before it. Leave resident out: images of all sizes then go through workers."
        )
    return pixels


@dataclass(frozen=True)
class EqualBlock:
    """Decoded images of one size."""

    positions: NDArray[np.int64]
    """[n]"""
    pixels: Tensor
    """uint8 [n, H, W, C]"""
    bad: dict[int, str]
    """position -> reason"""
    unfit: str | None = None
    """why the set cannot be held, where an image says so"""


@dataclass(frozen=True)
class DecodingEqual:
    """Decode images of one size in full; those that do not decode stay black and are named in `bad`."""

    source: Source
    channels: int
    size: tuple[int, int]
    scaled_from: int | None = None

    def __call__(self, task: Task) -> EqualBlock:
        bad: dict[int, str] = {}
        pixels = np.zeros((len(task.positions), *self.size, self.channels), np.uint8)  # [n, H, W, C]
        for row, position in enumerate(task.positions.tolist()):
            try:
                pixels[row] = read_equal(
                    self.source, position, self.channels, scaled_from=self.scaled_from, size=self.size
                )
            except Undecodable as error:
                bad[position] = error.reason
            except Unfit as error:
                return EqualBlock(task.positions, torch.empty(0), bad, unfit=str(error))
        return EqualBlock(task.positions, torch.from_numpy(pixels), bad)
