# SPDX-License-Identifier: Apache-2.0
"""The loader's work in processes: decoding, cutting crops, centre crops; one task in, one result out.

A task is a whole batch of positions, so a result does not depend on how many workers there are. With no
workers the same objects do the same in the process itself. A worker never raises for what is wrong with the
data: it returns what happened, and `run` raises it where a person sees it without a worker's traceback.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kinfold.data.augment import Drawn, draw
from kinfold.data.crop import centre_crop, crop_resize
from kinfold.data.decode import Undecodable, decode
from kinfold.data.sources import Source
from kinfold.errors import UserError
from kinfold.randomness import REPLACE, integers
from kinfold.views import Views

STAND_INS = 100
"""how many other images are tried in place of one that does not decode"""
_HELD = 16  # decoded images a worker holds at a time: a large photo is 36 MB

R = TypeVar("R", covariant=True)
S = TypeVar("S")


class Task(NamedTuple):
    """Positions int64 [B] of the source, and the epoch they are wanted for."""

    epoch: int
    positions: NDArray[np.int64]


class Work(Protocol[R]):
    """Something that turns a task into a result; travels to worker processes by pickle."""

    def __call__(self, task: Task) -> R: ...


@dataclass(frozen=True)
class Cut:
    """A batch's crops from a worker."""

    crops: list[Tensor]
    """one uint8 [B, C, S, S] per view"""
    drawn: list[Drawn]
    """the numbers of each view"""
    index: Tensor
    """int64 [B]: the positions shown, stand-ins for those that did not decode"""
    bad: dict[int, str]
    """position -> reason"""

    def pin_memory(self) -> Cut:
        """Copy the tensors to memory from which a GPU copies while the CPU goes on."""
        return replace(self, crops=[crop.pin_memory() for crop in self.crops], index=self.index.pin_memory())


@dataclass(frozen=True)
class Block:
    """Decoded images, whole or centre-cropped."""

    positions: NDArray[np.int64]
    """[n], of the images in `pixels`"""
    pixels: Tensor
    """uint8 [n, C, H, W]"""
    bad: dict[int, str]
    """position -> reason"""
    other_size: int | None = None
    """position of an image that is not of the size expected"""

    def pin_memory(self) -> Block:
        """Copy the pixels to memory from which a GPU copies while the CPU goes on."""
        return replace(self, pixels=self.pixels.pin_memory())


def read(source: Source, position: int, channels: int) -> NDArray[np.uint8]:
    """Read and decode one image: uint8 [H, W, C].

    Raises: `Undecodable`, also where the file cannot be read.
    """
    try:
        return decode(source.read(position), channels)
    except OSError as error:
        raise Undecodable(f"it cannot be read: {error.strerror or error}") from error


def stand_ins(position: int, *, seed: int, epoch: int, count: int) -> Iterator[int]:
    """Positions to try in place of an image that does not decode, as its address says."""
    for trial in range(STAND_INS):
        yield integers(REPLACE, seed, epoch, position, trial, below=count)


def no_readable_image(source: Source, bad: dict[int, str]) -> str:
    """Say that nothing decodes, with the first reasons."""
    first = "; ".join(f"{source.name(position)}: {reason}" for position, reason in list(bad.items())[:3])
    return (
        f"No readable image: {len(bad)} of the {len(source)} were tried and none decodes, in {source.description}. "
        f"The first: {first}. Check the files, or name another folder."
    )


@dataclass(frozen=True)
class Cutting:
    """Decode each image once and cut all its views."""

    source: Source
    views: Views
    channels: int
    seed: int

    def __call__(self, task: Task) -> Cut:
        bad: dict[int, str] = {}
        parts = [
            self._some(Task(task.epoch, task.positions[start : start + _HELD]), bad)
            for start in range(0, len(task.positions), _HELD)
        ]
        crops = [torch.cat(some) for some in zip(*(part[0] for part in parts))]  # views of [B, C, S, S]
        drawn = [_join(some) for some in zip(*(part[1] for part in parts))]
        return Cut(crops, drawn, torch.from_numpy(np.concatenate([part[2] for part in parts])), bad)

    def _some(self, task: Task, bad: dict[int, str]) -> tuple[list[Tensor], list[Drawn], NDArray[np.int64]]:
        shown = [self._readable(int(position), task.epoch, bad) for position in task.positions]
        index = np.array([position for position, _ in shown], dtype=np.int64)  # [n]
        images = [image for _, image in shown]
        height, width = np.array([image.shape[:2] for image in images]).T  # each [n]
        crops, numbers = [], []
        for view, augmentation in enumerate(self.views.augment):
            drawn = draw(
                augmentation,
                seed=self.seed,
                epoch=task.epoch,
                image=index,
                view=view,
                height=height,
                width=width,
            )
            cuts = [
                crop_resize(image, (top, left, h, w), augmentation.size)
                for image, (top, left, h, w) in zip(images, drawn.box.tolist())
            ]
            crops.append(torch.stack(cuts))  # [n, C, S, S]
            numbers.append(drawn)
        return crops, numbers, index

    def _readable(self, position: int, epoch: int, bad: dict[int, str]) -> tuple[int, NDArray[np.uint8]]:
        """The image at `position`, or the first stand-in that decodes."""
        tried: dict[int, str] = {}
        others = stand_ins(position, seed=self.seed, epoch=epoch, count=len(self.source))
        candidate: int | None = position
        while candidate is not None:
            if candidate not in tried:
                try:
                    return candidate, read(self.source, candidate, self.channels)
                except Undecodable as error:
                    tried[candidate] = bad[candidate] = error.reason
            candidate = next(others, None)
        raise UserError(no_readable_image(self.source, tried))


def _join(parts: Sequence[Drawn]) -> Drawn:
    """Put the numbers of consecutive images together."""
    return Drawn(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Drawn)})


@dataclass(frozen=True)
class Decoding:
    """Decode whole images of one size; those that do not decode stay black and are named in `bad`."""

    source: Source
    channels: int
    size: tuple[int, int]

    def __call__(self, task: Task) -> Block:
        bad: dict[int, str] = {}
        pixels = torch.zeros(len(task.positions), self.channels, *self.size, dtype=torch.uint8)  # [n, C, H, W]
        for row, position in enumerate(task.positions.tolist()):
            try:
                image = read(self.source, position, self.channels)
            except Undecodable as error:
                bad[position] = error.reason
                continue
            if image.shape[:2] != self.size:
                return Block(task.positions, pixels, bad, other_size=position)
            pixels[row] = torch.from_numpy(image).permute(2, 0, 1)
        return Block(task.positions, pixels, bad)


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


@dataclass(frozen=True)
class _Failure:
    """What a worker found wrong with the data."""

    message: str


@dataclass(frozen=True)
class _Tasks(Dataset[S | _Failure], Generic[S]):
    """Work in the shape that torch's loader sends to processes."""

    work: Work[S]
    tasks: Sequence[Task] = field(repr=False)

    def __getitem__(self, number: int) -> S | _Failure:
        try:
            return self.work(self.tasks[number])
        except UserError as error:
            return _Failure(str(error))

    def __len__(self) -> int:
        return len(self.tasks)


def run(work: Work[S], tasks: Sequence[Task], *, workers: int, prefetch: int = 2, pin: bool = False) -> Iterator[S]:
    """Do the tasks in `workers` processes, `prefetch` ahead in each, and give the results in order.

    Raises: `UserError` for what is wrong with the data, and where a worker dies.
    """
    todo = _Tasks(work, tasks)
    if workers == 0 or not tasks:
        for number in range(len(tasks)):
            yield _good(todo[number])
        return
    results = DataLoader(
        todo,
        batch_size=None,
        num_workers=min(workers, len(tasks)),
        prefetch_factor=prefetch,
        pin_memory=pin,
        collate_fn=_as_it_is,
        worker_init_fn=_quiet_worker,
        # Torch's loader draws a seed for its workers: from here, so that the caller's generator stays untouched.
        generator=torch.Generator(),
    )
    try:
        for result in results:
            yield _good(result)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error) or "Traceback" in str(error):
            raise
        raise UserError(
            f"A loader worker ended before its work was done, most often for lack of memory ({error}). "
            f"Lower the number of workers (now {workers}) or the batch size."
        ) from error


def _good(result: S | _Failure) -> S:
    if isinstance(result, _Failure):
        raise UserError(result.message)
    return result


def _as_it_is(result: S) -> S:
    return result


def _quiet_worker(_worker: int) -> None:
    """One thread; and Ctrl-C, which a terminal sends to all processes, is the main one's to answer."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # torchrun, systemd and some batch systems signal the whole group; a worker of a dead main process ends by itself.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
