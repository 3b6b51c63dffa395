# SPDX-License-Identifier: Apache-2.0
"""A batch's crops, made by a loader worker: each image decoded once, all its views cut, uint8 handed on.

The views' numbers are drawn for the image's full size, which a JPEG's header tells, so they are the same however it is
decoded then. With `scaled` a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where every view's crop keeps `MARGIN`
times the pixels that the view has on either axis. That changes pixels a little: over generated and real photos the mean
difference of a crop to that of the full decode is about 1 level of 255 and less than 3 for nearly every one, and single
pixels beside sharp edges differ by up to 30. With a margin of 1 the differences are twice as large, with 2 a third
smaller.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinfold.data.augment import Drawn, draw
from kinfold.data.crop import crop_reduced_into
from kinfold.data.decode import Jpeg, Undecodable, Whole, look
from kinfold.data.sources import Source
from kinfold.data.work import Task, no_readable_image, pixel_memory, read_with, stand_ins
from kinfold.errors import UserError
from kinfold.views import Views

MARGIN = 1.5
"""so many pixels a pixel of the view, on either axis, has the crop of an image that is decoded at a fraction"""
_LOOKED_AT = 8  # images that tell whether a set has large JPEGs
_HELD = 32  # files that a worker holds at a time: a photo of 12 megapixels has 5 MB


@dataclass(frozen=True)
class Cut:
    """A batch's crops from a worker."""

    crops: list[Tensor]
    """one uint8 [B, C, S, S] per view, channels last in memory"""
    drawn: list[Drawn]
    """the numbers of each view"""
    index: Tensor
    """int64 [B]: the positions shown, stand-ins for those that did not decode"""
    bad: dict[int, str]
    """position -> reason"""
    jpegs: dict[int, tuple[Tensor, int]] = field(default_factory=dict)
    """row -> file uint8 [bytes] and EXIF orientation, of those left to be decoded and cut elsewhere"""

    def pin_memory(self) -> Cut:
        """Copy the tensors to memory from which a GPU copies while the CPU goes on."""
        return replace(self, crops=[crop.pin_memory() for crop in self.crops], index=self.index.pin_memory())


@dataclass(frozen=True)
class Cutting:
    """Decode each image once and cut all its views."""

    source: Source
    views: Views
    channels: int
    seed: int
    scaled: bool = False
    """decode JPEGs at a fraction of their size where the crops allow it"""
    leave_jpegs: bool = False
    """hand on the plain ones as they are: `kinfold.data.device_decode` does the rest"""

    def __call__(self, task: Task) -> Cut:
        sizes = [augmentation.size for augmentation in self.views.augment]
        crops = pixel_memory([(len(task.positions), self.channels, size, size) for size in sizes])  # [B, C, S, S] each
        bad: dict[int, str] = {}
        jpegs: dict[int, tuple[Tensor, int]] = {}
        parts, index = [], task.positions.copy()  # [B]
        for start in range(0, len(index), _HELD):
            some = slice(start, start + _HELD)
            drawn, left = self._some(task.epoch, index[some], [crop[some] for crop in crops], bad)
            parts.append(drawn)
            jpegs |= {start + row: jpeg for row, jpeg in left.items()}
        drawn = [Drawn.join(numbers) for numbers in zip(*parts)]
        return Cut(crops, drawn, torch.from_numpy(index), bad, jpegs)

    def _some(
        self, epoch: int, index: NDArray[np.int64], crops: list[Tensor], bad: dict[int, str]
    ) -> tuple[list[Drawn], dict[int, tuple[Tensor, int]]]:
        """Cut the views of images `index` [n] into `crops`, put into it those that were shown; give what is left."""
        jpegs: dict[int, tuple[Tensor, int]] = {}
        tried: list[dict[int, str]] = [{} for _ in index]
        found = [self.looked(int(position), epoch, reasons) for position, reasons in zip(index, tried)]
        drawn = self.numbers(epoch, found)
        for row, (position, (shown, image)) in enumerate(zip(index.tolist(), found)):
            index[row] = shown
            if self.leave_jpegs and isinstance(image, Jpeg) and image.plain:
                jpegs[row] = torch.frombuffer(bytearray(image.file), dtype=torch.uint8), image.orientation  # [bytes]
                bad.update(tried[row])
                continue
            while True:
                try:
                    whole = image.decode(self._shrink(drawn, row))
                    break
                except Undecodable as error:
                    tried[row][shown] = error.reason
                    shown, image = self.looked(position, epoch, tried[row])
                    for numbers, own in zip(drawn, self.numbers(epoch, [(shown, image)])):
                        put(own, numbers, row)
            found[row] = shown, Whole(whole.pixels[:0])  # the file is not needed any more
            index[row] = shown
            for crop, numbers in zip(crops, drawn):
                top, left, height, width = numbers.box[row].tolist()
                crop_reduced_into(whole, (top, left, height, width), crop[row])
            bad.update(tried[row])
        return drawn, jpegs

    def looked(self, position: int, epoch: int, tried: dict[int, str]) -> tuple[int, Jpeg | Whole]:
        """The image at `position`, or its first stand-in, that can be read and is not among those `tried` in vain."""
        others = stand_ins(position, seed=self.seed, epoch=epoch, count=len(self.source))
        for candidate in itertools.chain([position], others):
            if candidate not in tried:
                try:
                    return candidate, read_with(look, self.source, candidate, self.channels)
                except Undecodable as error:
                    tried[candidate] = error.reason
        raise UserError(no_readable_image(self.source, tried))

    def numbers(self, epoch: int, images: Sequence[tuple[int, Jpeg | Whole]]) -> list[Drawn]:
        """Draw all views' numbers for images whose positions and sizes are known."""
        position = np.array([shown for shown, _ in images], dtype=np.int64)  # [n]
        height, width = np.array([(image.height, image.width) for _, image in images], dtype=np.int64).T  # each [n]
        return [
            draw(augmentation, seed=self.seed, epoch=epoch, image=position, view=view, height=height, width=width)
            for view, augmentation in enumerate(self.views.augment)
        ]

    def _shrink(self, drawn: Sequence[Drawn], row: int) -> int:
        """The least fraction, as its divisor, that leaves every view's crop enough pixels."""
        if not self.scaled:
            return 1
        pairs = zip(drawn, self.views.augment)
        room = min(min(numbers.box[row, 2:].tolist()) / augmentation.size for numbers, augmentation in pairs)
        return next((shrink for shrink in (8, 4, 2) if room >= MARGIN * shrink), 1)


def scalable(source: Source, views: Views, channels: int) -> bool:
    """Whether the set has JPEGs that `scaled` decodes at a fraction, as its first images tell."""
    least = 2 * MARGIN * max(augmentation.size for augmentation in views.augment)
    for position in range(min(_LOOKED_AT, len(source))):
        with suppress(Undecodable):
            image = read_with(look, source, position, channels)
            if isinstance(image, Jpeg) and min(image.height, image.width) >= least:
                return True
    return False


def put(own: Drawn, numbers: Drawn, row: int) -> None:
    """Replace the numbers of image `row` by those of the only one of `own`."""
    for one in fields(Drawn):
        getattr(numbers, one.name)[row] = getattr(own, one.name)[0]
