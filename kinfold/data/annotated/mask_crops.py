# SPDX-License-Identifier: Apache-2.0
"""The work on images with masks: looking all of them through, cutting training crops, reading them whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from kinfold.data.annotated.masks import VOID, Mask, Masks
from kinfold.data.crop import crop_resize
from kinfold.data.decode import Undecodable
from kinfold.data.work import Task
from kinfold.errors import UserError
from kinfold.randomness import VIEW, uniforms
from kinfold.settings import settings
from kinfold.views import Positive


@settings
class Crops:
    """How a training crop is cut: scaled, placed and mirrored at random."""

    size: Annotated[int, Field(ge=1)] = 513
    """side in pixels"""
    scale: tuple[Positive, Positive] = (0.5, 2.0)
    """the image is made larger by a factor drawn evenly from here"""
    flip: bool = True
    """half of the crops are mirrored"""

    def __post_init__(self) -> None:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale: from the smaller to the larger, but got {list(self.scale)}")


class Cuts(NamedTuple):
    """A batch of training crops."""

    images: Tensor
    """uint8 [B, C, S, S]"""
    labels: Tensor
    """uint8 [B, S, S]: class numbers, and `VOID` where the image does not reach"""


class Looked(NamedTuple):
    """What a number of pairs hold."""

    pixels: NDArray[np.int64]
    """[C]: pixels of each class"""
    faults: dict[int, str]
    """position -> what is wrong with that pair"""


@dataclass(frozen=True)
class Looking:
    """Read each pair once: count the classes, and find what cannot be used."""

    masks: Masks
    channels: int

    def __call__(self, task: Task) -> Looked:
        pixels = np.zeros(len(self.masks.classes), np.int64)  # [C]
        faults: dict[int, str] = {}
        for position in task.positions.tolist():
            try:
                _, labels = self.masks.read(position, self.channels)
            except Undecodable as error:
                faults[position] = error.reason
                continue
            pixels += np.bincount(labels.ravel(), minlength=VOID + 1)[: len(pixels)]
        return Looked(pixels, faults)


@dataclass(frozen=True)
class Cropping:
    """Cut one crop of each pair, as (seed, epoch, position) says."""

    masks: Masks
    how: Crops
    channels: int
    seed: int
    fill: tuple[int, ...]
    """colour, 0 to 255, of what lies outside the image"""

    def __call__(self, task: Task) -> Cuts:
        draws = uniforms(VIEW, self.seed, task.epoch, task.positions, 0, draws=4)  # [B, 4]
        made = []
        for position, u in zip(task.positions.tolist(), draws):
            image, labels = _read(self.masks, position, self.channels)
            made.append(cut(image, labels, self.how, u, self.fill))
        return Cuts(torch.stack([one for one, _ in made]), torch.stack([one for _, one in made]))


@dataclass(frozen=True)
class Whole:
    """Read one pair as it is: uint8 [C, H, W] and uint8 [H, W]."""

    masks: Masks
    channels: int

    def __call__(self, task: Task) -> tuple[Tensor, Tensor]:
        image, labels = _read(self.masks, int(task.positions[0]), self.channels)
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(labels)  # [C, H, W], [H, W]


def cut(
    image: NDArray[np.uint8], labels: Mask, how: Crops, u: NDArray[np.float64], fill: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Cut a crop as `u` [4] on [0, 1) says (scale, row, column, flip): uint8 [C, S, S] and uint8 [S, S].

    What the crop takes of the image is a square of S / scale pixels, and that alone is resized, so a large photo costs
    no more than a small one. Where the image is smaller it lies at the top left, and the rest is `fill` and `VOID`.
    """
    height, width = labels.shape
    low, high = how.scale
    side = max(1, round(how.size / (low + u[0] * (high - low))))  # in pixels of the image
    rows, columns = min(side, height), min(side, width)
    top, left = int(u[1] * (height - rows + 1)), int(u[2] * (width - columns + 1))
    made = tuple(max(1, round(part * how.size / side)) for part in (rows, columns))
    pixels = torch.tensor(fill, dtype=torch.uint8)[:, None, None].expand(-1, how.size, how.size).clone()  # [C, S, S]
    pixels[:, : made[0], : made[1]] = crop_resize(image, (top, left, rows, columns), (made[0], made[1]))
    truth = np.full((how.size, how.size), VOID, np.uint8)  # [S, S]
    across, along = ((np.arange(n) + 0.5) * part / n for n, part in zip(made, (rows, columns)))  # nearest neighbours
    truth[: made[0], : made[1]] = labels[top + across.astype(int)[:, None], left + along.astype(int)]
    if how.flip and u[3] < 0.5:
        return pixels.flip(2), torch.from_numpy(truth).flip(1)
    return pixels, torch.from_numpy(truth)


def _read(masks: Masks, position: int, channels: int) -> tuple[NDArray[np.uint8], Mask]:
    try:
        return masks.read(position, channels)
    except Undecodable as error:  # it could be read when all were looked through
        raise UserError(f"{error.reason}. It was whole a while ago: was the file changed?") from error
