# SPDX-License-Identifier: Apache-2.0
"""Batches of augmented views: any step of any epoch, the same for any number of workers and processes.

Which images a step holds and what their views look like are functions of (seed, epoch, step), so there is no
state to save; see `kinfold.randomness`. There are two ways to the same views:

- resident: a small set of equal images is decoded once and stays on the device as uint8; each step crops it
there; - by workers: each step's images are decoded and cropped to uint8 in worker processes.

Colour, blur, flip and normalisation happen on the device for the whole batch in both. The two ways differ by
the rounding of the workers' crops to whole levels, so which is taken depends on the data and the setting
alone, never on the machine.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinfold.data.augment import Drawn, draw, photometric
from kinfold.data.crop import crop_resize_batch
from kinfold.data.decode import Undecodable
from kinfold.data.sources import Source
from kinfold.data.work import CentreCropping, Cut, Cutting, Decoding, Task, no_readable_image, read, run, stand_ins
from kinfold.errors import UserError
from kinfold.randomness import ORDER, permutation
from kinfold.views import Views

RESIDENT_BYTES = 2 * 2**30
"""a decoded set up to this size stays on the device"""
_LOOKED_AT = 64  # images that decide whether all may be of one size
_DECODED_AT_ONCE = 256


class Batch(NamedTuple):
    """What a step of training sees."""

    views: list[Tensor]
    """one float32 [B, C, S, S] per view, normalised, on the device"""
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody looks for here
    """int64 [B]: positions in the source, on the device"""


class Loader:
    """Batches of an epoch, from any step on.

    `batch_size` is that of all `world` processes together; process `rank` gets every `world`-th image of it.
    With `drop_last=False` the last, smaller batch of an epoch comes too, less the images that cannot be
    divided evenly over the processes, unless it would give them one image each: batch norm has no use for
    that. `accumulate` says in how many equal parts the caller will split each batch; the batches are
    whole. `resident` None lets the data decide. `progress(count)` is called for every `count` images
    while a resident set is decoded.

    Raises: `UserError` where the source holds fewer images than a batch, where the batch does not divide over
    processes and parts, where `resident=True` and the images differ in size; and, once batches are made,
    where an image does not decode and none of a hundred others does either.
    """

    bad: dict[int, str]
    """images that did not decode, seen so far by this process: position -> reason"""
    waiting: float
    """seconds spent waiting for images since the last `reset_waiting`"""
    resident: bool
    """whether the set lives on the device"""
    workers: int
    """processes that decode at each step: none for a resident set"""
    steps_per_epoch: int

    def __init__(
        self,
        source: Source,
        views: Views,
        *,
        channels: int,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        seed: int,
        workers: int = 0,
        device: str | torch.device = "cpu",
        rank: int = 0,
        world: int = 1,
        resident: bool | None = None,
        drop_last: bool = True,
        accumulate: int = 1,
        prefetch: int = 2,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        count = len(source)
        if count == 0:
            raise UserError(f"There are no images in {source.description}.")
        if batch_size % (world * accumulate):
            raise UserError(
                f"batch_size is {batch_size}, which does not divide by {world} process(es) times {accumulate} "
                f"accumulated part(s). Take a multiple of {world * accumulate}."
            )
        if drop_last and count < batch_size:
            advice = "Add images: two make the smallest batch."
            if count > 1:
                advice = f"Lower batch_size to {count} or less, for example batch_size={1 << (count.bit_length() - 1)}."
            raise UserError(
                f"batch_size is {batch_size}, but there {'is' if count == 1 else 'are'} only {count} "
                f"image{'' if count == 1 else 's'} in {source.description}. {advice}"
            )
        self._source, self._views = source, views
        self._channels, self._mean, self._std = channels, tuple(mean), tuple(std)
        self._batch_size, self._seed = batch_size, seed
        self._workers, self._prefetch = workers, prefetch
        self._device = torch.device(device)
        self._rank, self._world = rank, world
        rest = 0 if drop_last else (count % batch_size) // world * world
        rest = 0 if rest == world < batch_size else rest
        self._used = count // batch_size * batch_size + rest
        self.steps_per_epoch = math.ceil(self._used / batch_size)
        if self.steps_per_epoch == 0:
            raise UserError(f"{source.description}: too few for a batch over {world} process(es). Add images.")
        self.bad = {}
        self.waiting = 0.0
        self._pixels = self._decode_all(resident, progress)
        self.resident = self._pixels is not None
        self.workers = 0 if self.resident else workers

    def reset_waiting(self) -> None:
        """Start counting `waiting` from zero."""
        self.waiting = 0.0

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Give the batches of an epoch from `start_step` on; all are as they are in the whole epoch."""
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"start_step: 0 to {self.steps_per_epoch}, but got {start_step}")
        tasks = self._tasks(epoch)[start_step:]
        if self._pixels is not None:
            for task in tasks:
                yield self._from_resident(self._pixels, task)
            return
        work = Cutting(self._source, self._views, self._channels, self._seed)
        cuts = run(work, tasks, workers=self._workers, prefetch=self._prefetch, pin=self._device.type == "cuda")
        while True:
            began = time.perf_counter()
            cut = next(cuts, None)
            self.waiting += time.perf_counter() - began
            if cut is None:
                return
            self.bad.update(cut.bad)
            yield _finish(cut, self._views, self._mean, self._std, self._device)

    def _tasks(self, epoch: int) -> list[Task]:
        order = permutation(ORDER, self._seed, epoch, n=len(self._source))[: self._used]  # [used]
        starts = range(0, self._used, self._batch_size)
        return [Task(epoch, order[s : s + self._batch_size][self._rank :: self._world].copy()) for s in starts]

    def _decode_all(self, wanted: bool | None, progress: Callable[[int], None] | None) -> Tensor | None:
        """Decode the whole set to uint8 [N, C, H, W] on the device, or None where it is to be read step by step."""
        if wanted is False:
            return None
        count = len(self._source)
        size = self._common_size(wanted is True)
        if size is None:
            return None
        pixels = torch.empty(count, self._channels, *size, dtype=torch.uint8)  # [N, C, H, W]
        blocks = [Task(0, np.arange(s, min(s + _DECODED_AT_ONCE, count))) for s in range(0, count, _DECODED_AT_ONCE)]
        for block in run(
            Decoding(self._source, self._channels, size), blocks, workers=self._workers, prefetch=self._prefetch
        ):
            if block.other_size is not None:
                if wanted:
                    raise UserError(_sizes_differ(self._source, block.other_size))
                self.bad.clear()
                return None
            first, last = int(block.positions[0]), int(block.positions[-1]) + 1
            pixels[first:last] = block.pixels
            self.bad.update(block.bad)
            if progress is not None:
                progress(last - first)
        if len(self.bad) == count:
            raise UserError(no_readable_image(self._source, self.bad))
        return pixels.to(self._device)  # [N, C, H, W]

    def _common_size(self, wanted: bool) -> tuple[int, int] | None:
        """Height and width of the first images where they agree and the set is small, or the first's where wanted."""
        size: tuple[int, int] | None = None
        for position in range(len(self._source)):
            if size is not None and (wanted or position >= _LOOKED_AT):
                break
            try:
                height, width, _ = read(self._source, position, self._channels).shape
            except Undecodable:
                if not wanted and position >= _LOOKED_AT:
                    return None
                continue
            if wanted:
                return height, width
            if size not in (None, (height, width)):
                return None
            size = height, width
            if len(self._source) * self._channels * height * width > RESIDENT_BYTES:
                return None
        return size

    def _from_resident(self, pixels: Tensor, task: Task) -> Batch:
        """Crop and change a step's images on the device."""
        if self.bad:
            stood = [self._readable(int(position), task.epoch) for position in task.positions]
            task = Task(task.epoch, np.array(stood, dtype=np.int64))
        return _crop_and_finish(
            pixels, task.positions, task, self._views, self._seed, self._mean, self._std, self._device
        )

    def _readable(self, position: int, epoch: int) -> int:
        """The image that is shown at `position`: itself, or the first stand-in that decoded."""
        candidates = stand_ins(position, seed=self._seed, epoch=epoch, count=len(self._source))
        for candidate in itertools.chain([position], candidates):
            if candidate not in self.bad:
                return candidate
        raise UserError(no_readable_image(self._source, self.bad))


def views_of(
    source: Source,
    position: int,
    views: Views,
    *,
    seed: int,
    epoch: int,
    channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    resident: bool = False,
    device: str | torch.device = "cpu",
) -> list[Tensor]:
    """Make one image's views again, as the loader made them in that epoch: one [C, S, S] per view.

    `resident` is that of the loader.

    Raises: `UserError` where the image does not decode.
    """
    try:
        image = read(source, position, channels)
    except Undecodable as error:
        raise UserError(f"{source.name(position)} has no views: {error.reason}.") from error
    task = Task(epoch, np.array([position]))
    where = torch.device(device)
    if resident:
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].to(where)  # [1, C, H, W]
        batch = _crop_and_finish(pixels, np.zeros(1, dtype=np.int64), task, views, seed, mean, std, where)
    else:
        batch = _finish(Cutting(source, views, channels, seed)(task), views, mean, std, where)
    return [view[0] for view in batch.views]


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
    count, seen = len(source), 0
    tasks = [Task(0, np.arange(s, min(s + batch_size, count))) for s in range(0, count, batch_size)]
    for block in run(work, tasks, workers=workers, pin=where.type == "cuda"):
        reasons.update(block.bad)
        seen += len(block.positions)
        if len(block.positions):
            images = block.pixels.to(where, non_blocking=True).to(torch.float32).div_(255.0)  # [B, C, size, size]
            yield images.sub_(centre).div_(spread), block.positions
    if not seen:
        raise UserError(no_readable_image(source, reasons))


def _finish(cut: Cut, views: Views, mean: Sequence[float], std: Sequence[float], device: torch.device) -> Batch:
    """Turn the workers' crops into views on the device."""
    made = []
    for crops, drawn, augmentation in zip(cut.crops, cut.drawn, views.augment):
        images = crops.to(device, non_blocking=True).to(torch.float32).div_(255.0)  # [B, C, S, S]
        made.append(photometric(images, drawn, augmentation, mean, std))
    return Batch(made, cut.index.to(device, non_blocking=True))


def _crop_and_finish(
    pixels: Tensor,
    rows: NDArray[np.int64],
    task: Task,
    views: Views,
    seed: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
) -> Batch:
    """Make the views of images `task.positions`, which are `rows` of `pixels` [N, C, H, W], on the device."""
    height, width = np.full(len(rows), pixels.shape[2]), np.full(len(rows), pixels.shape[3])
    where = torch.from_numpy(rows).to(device, non_blocking=True)  # [B]
    made = []
    for view, augmentation in enumerate(views.augment):
        drawn: Drawn = draw(
            augmentation,
            seed=seed,
            epoch=task.epoch,
            image=task.positions,
            view=view,
            height=height,
            width=width,
        )
        boxes = torch.from_numpy(drawn.box).to(device, non_blocking=True)  # [B, 4]
        images = crop_resize_batch(pixels, where, boxes, augmentation.size)  # [B, C, S, S]
        made.append(photometric(images, drawn, augmentation, mean, std))
    return Batch(made, torch.from_numpy(task.positions).to(device, non_blocking=True))


def _sizes_differ(source: Source, position: int) -> str:
    return (
        f"resident is true, but {source.name(position)} is not of the same size as the first image. Make all images "
        f"one size, or leave resident out."
    )
