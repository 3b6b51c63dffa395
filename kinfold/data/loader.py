# SPDX-License-Identifier: Apache-2.0
"""Batches of augmented views: any step of any epoch, the same for any number of workers and processes.

Which images a step holds and what their views look like are functions of (seed, epoch, step), so there is no
state to save; see `kinfold.randomness`. There are two ways to the same views, equal to the bit on one device:

- resident: a small set of equal images is decoded once and stays on the device as uint8; each step cuts its crops
  there (`kinfold.data.resident`);
- by workers: each step's images are decoded and cropped to uint8 in worker processes.

Colour, blur, flip and normalisation happen on the device for the whole batch in both.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kinfold.data.cutting import Cut, Cutting, scaled_from
from kinfold.data.decoded_set import DecodedSet
from kinfold.data.device_copies import DeviceCopies
from kinfold.data.device_decode import DeviceDecode, nvjpeg
from kinfold.data.finish import finish
from kinfold.data.resident import Asked, open_resident, readable, resident_views
from kinfold.data.sources import Source
from kinfold.data.work import Task, run
from kinfold.devices import to_device
from kinfold.errors import UserError
from kinfold.randomness import ORDER, permutation
from kinfold.views import Views


class Batch(NamedTuple):
    """What a step of training sees."""

    views: list[Tensor]
    """one float32 [B, C, S, S] per view, normalised, on the device"""
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody looks for here
    """int64 [B]: positions in the source, on the device"""


class Loader:
    """Batches of an epoch, from any step on.

    `batch_size` is that of all `world` processes together; process `rank` gets every `world`-th image of it. With
    `drop_last=False` the last, smaller batch of an epoch comes too, less the images that cannot be divided evenly over
    the processes, unless it would give them one image each: batch norm has no use for that. `accumulate` says in how
    many equal parts the caller will split each batch; the batches are whole. `resident` None lets the data decide; with
    `decode="device"` it is by workers. `progress(count)` is called for every `count` images while a resident set is
    decoded. Workers go on from one epoch to the next up to the `epochs`-th, so that the first batches of the next are
    there when it begins; 0 starts new ones for each. `scaled_decode` is that of `kinfold.recipe.Images`, `decode` that
    of `kinfold.recipe.Run`, `compiled` that of `kinfold.data.finish.finish`.

    Raises: `UserError` where the source holds fewer images than a batch, where the batch does not divide over
    processes and parts, where `resident=True` and the images differ in size or are to be decoded on the device at
    each step; and, once batches are made, where an image does not decode and none of a hundred others does either.
    """

    bad: dict[int, str]
    """images that did not decode, seen so far by this process: position -> reason"""
    remarks: list[str]
    """what a person should know of how the images were opened, a sentence each"""
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
        epochs: int = 0,
        scaled_decode: bool = False,
        decode: Literal["cpu", "device"] = "cpu",
        compiled: bool = False,
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
        on_device = decode == "device"
        self._work = Cutting(source, views, channels, seed, scaled=scaled_decode, leave_jpegs=on_device)
        self._on_device: DeviceDecode | None = None
        if on_device:
            if resident:
                raise UserError(
                    "resident=true decodes a set once, on the CPU, and decode=device at each step. Leave one of them "
                    "out."
                )
            if scaled_decode:
                raise UserError(
                    "decode=device decodes in full, and images.scaled_decode=true asks for less. Set "
                    "images.scaled_decode=false or decode=cpu."
                )
            self._on_device = DeviceDecode(self._work, self._device, nvjpeg(self._device))
        self._copies = DeviceCopies(self._device)
        self._compiled = compiled
        self._epochs = epochs
        self._ahead: tuple[int, Generator[Cut, None, None]] | None = None
        self.bad, self.remarks = {}, []
        self.waiting = 0.0
        self._decoded = open_resident(
            Asked(
                source=source,
                channels=channels,
                device=self._device,
                # What stays on the device is decoded by the CPU: whether it fits there must not decide its pixels.
                wanted=False if on_device else resident,
                workers=workers,
                prefetch=prefetch,
                world=world,
                scaled_from=scaled_from(views) if scaled_decode else None,
                progress=progress,
                say=self.remarks.append,
            )
        )
        self.resident = self._decoded is not None
        if self._decoded is not None:
            self.bad.update(self._decoded.bad)
        self.workers = 0 if self.resident else workers

    def reset_waiting(self) -> None:
        """Start counting `waiting` from zero."""
        self.waiting = 0.0

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Give the batches of an epoch from `start_step` on; all are as they are in the whole epoch."""
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"start_step: 0 to {self.steps_per_epoch}, but got {start_step}")
        if self._decoded is not None:
            for task in self._tasks(epoch)[start_step:]:
                yield self._from_resident(self._decoded, task)
            return
        cuts = self._cuts(epoch, start_step)
        for _ in range(start_step, self.steps_per_epoch):
            began = time.perf_counter()
            cut = next(cuts)
            self.waiting += time.perf_counter() - began
            if self._on_device is not None:
                cut = self._on_device(cut, epoch)
            self.bad.update(cut.bad)
            yield self._from_workers(cut)
        # Only an epoch that was read to its end leaves its workers to the next one: they have begun with it.
        if epoch + 1 < self._epochs:
            self._ahead = epoch + 1, cuts
        else:
            cuts.close()

    def close(self) -> None:
        """End the workers that have begun with the next epoch, if there are any; an epoch asked for starts others."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead[1].close()

    def _cuts(self, epoch: int, start_step: int) -> Generator[Cut, None, None]:
        """What the workers make of the epoch from `start_step` on, then of all that follow."""
        if self._ahead is not None and self._ahead[0] == epoch and start_step == 0:
            (_, cuts), self._ahead = self._ahead, None
            return cuts
        self.close()
        epochs = range(epoch, max(epoch + 1, self._epochs))
        tasks = itertools.chain.from_iterable(self._tasks(e)[start_step if e == epoch else 0 :] for e in epochs)
        on_cuda = self._device.type == "cuda"
        return run(self._work, tasks, workers=self._workers, prefetch=self._prefetch, pin=on_cuda)

    def _tasks(self, epoch: int) -> list[Task]:
        order = permutation(ORDER, self._seed, epoch, n=len(self._source))[: self._used]  # [used]
        starts = range(0, self._used, self._batch_size)
        return [Task(epoch, order[s : s + self._batch_size][self._rank :: self._world].copy()) for s in starts]

    def _from_workers(self, cut: Cut) -> Batch:
        """Turn a step's crops into views on the device."""
        *crops, index = self._copies([*cut.crops, cut.index])  # views of [B, C, S, S], [B]
        return Batch(finish(crops, cut.drawn, self._mean, self._std, compiled=self._compiled), index)

    def _from_resident(self, decoded: DecodedSet, task: Task) -> Batch:
        """Cut and change a step's images on the device."""
        # Not `self.bad`, which callers add to: what a checkpoint or another process could not read may be here.
        if decoded.bad:
            shown = readable(task.positions.tolist(), decoded.bad, self._source, seed=self._seed, epoch=task.epoch)
            task = Task(task.epoch, np.array(shown, dtype=np.int64))
        made = resident_views(
            decoded.images,
            task.positions,
            task,
            self._views,
            seed=self._seed,
            mean=self._mean,
            std=self._std,
            compiled=self._compiled,
        )
        return Batch(made, to_device(torch.from_numpy(task.positions), self._device))
