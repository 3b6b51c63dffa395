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
import math
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinfold.data.augment import Drawn, draw, put
from kinfold.data.crop import crop_reduced_into
from kinfold.data.decode import Jpeg, Undecodable, Whole, look
from kinfold.data.sources import Source
from kinfold.data.work import Task, no_readable_image, read_with, stand_ins
from kinfold.data.worker import pixel_memory
from kinfold.errors import UserError
from kinfold.views import Views

MARGIN = 1.5
"""so many pixels a pixel of the view, on either axis, has the crop of an image that is decoded at a fraction"""
_HELD = 32  # images that a worker holds at a time, JPEGs as files: a photo of 12 megapixels has 5 MB,
_HELD_BYTES = 2**26  # or fewer where they are large: what is no JPEG is held decoded


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
    jpegs: dict[int, tuple[int, int]] = field(default_factory=dict)
    """row -> bytes of the file and EXIF orientation, of those left to be decoded and cut elsewhere"""
    files: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    """uint8 [bytes]: these files, one behind the other; a tensor of each would take a file descriptor of each"""

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
        left: dict[int, Jpeg] = {}
        parts, index = [], task.positions.copy()  # [B]
        start = 0
        while start < len(index):
            some = slice(start, start + _HELD)
            drawn, jpegs = self._some(task.epoch, index[some], [crop[some] for crop in crops], bad)
            parts.append(drawn)
            left |= {start + row: jpeg for row, jpeg in jpegs.items()}
            start += len(drawn[0].box)
        drawn = [Drawn.join(numbers) for numbers in zip(*parts)]
        cut = Cut(crops, drawn, torch.from_numpy(index), bad)
        if not left:
            return cut
        files = bytearray().join(jpeg.file for jpeg in left.values())
        told = {row: (len(jpeg.file), jpeg.orientation) for row, jpeg in left.items()}
        return replace(cut, jpegs=told, files=torch.frombuffer(files, dtype=torch.uint8))

    def _some(
        self, epoch: int, index: NDArray[np.int64], crops: list[Tensor], bad: dict[int, str]
    ) -> tuple[list[Drawn], dict[int, Jpeg]]:
        """Cut the views of the first images of `index` [n], as many as may be held at a time, into `crops`.

        Puts into `index` those that were shown; gives their numbers, and by row the JPEGs that are left.
        """
        jpegs: dict[int, Jpeg] = {}
        tried: list[dict[int, str]] = []
        found: deque[tuple[int, Jpeg | Whole]] = deque()
        held = 0
        while len(found) < len(index) and held < _HELD_BYTES:
            tried.append({})
            shown, image = self._looked(int(index[len(found)]), epoch, tried[-1])
            found.append((shown, image))
            held += len(image.file) if isinstance(image, Jpeg) else image.pixels.nbytes
        drawn = self._numbers(epoch, found)
        for row, position in enumerate(index[: len(found)].tolist()):
            # Taken out, so that neither file nor pixels are held while the others are decoded.
            shown, image = found.popleft()
            index[row] = shown
            if self.leave_jpegs and isinstance(image, Jpeg) and image.plain:
                jpegs[row] = image
                bad.update(tried[row])
                continue
            while True:
                try:
                    whole = image.decode(self._shrink(drawn, row))
                    break
                except Undecodable as error:
                    tried[row][shown] = error.reason
                    shown, image = self._looked(position, epoch, tried[row])
                    for numbers, own in zip(drawn, self._numbers(epoch, [(shown, image)])):
                        put(own, numbers, row)
            index[row] = shown
            for crop, numbers in zip(crops, drawn):
                top, left, height, width = numbers.box[row].tolist()
                crop_reduced_into(whole, (top, left, height, width), crop[row])
            bad.update(tried[row])
        return drawn, jpegs

    def _looked(self, position: int, epoch: int, tried: dict[int, str]) -> tuple[int, Jpeg | Whole]:
        """The image at `position`, or its first stand-in, that can be read and is not among those `tried` in vain."""
        others = stand_ins(position, seed=self.seed, epoch=epoch, count=len(self.source))
        for candidate in itertools.chain([position], others):
            if candidate not in tried:
                try:
                    return candidate, read_with(look, self.source, candidate, self.channels)
                except Undecodable as error:
                    tried[candidate] = error.reason
        raise UserError(no_readable_image(self.source, tried))

    def _numbers(self, epoch: int, images: Collection[tuple[int, Jpeg | Whole]]) -> list[Drawn]:
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


def scaled_from(views: Views) -> int:
    """Pixels of the short side from which `scaled` may decode a JPEG at a fraction; smaller ones it never does."""
    return math.ceil(2 * MARGIN * max(augmentation.size for augmentation in views.augment))
