# SPDX-License-Identifier: Apache-2.0
"""Small sets live on the device: decoded once, kept on disk, and cut there for a whole batch at each step.

A set is taken when its images are of one size, its pixels are no more than `RESIDENT_BYTES`, and they fit in `SHARE` of
the device's free memory. A set that does not fit goes by workers, with the same views to the bit
(`kinfold.data.exact_crop`), so that a run does not depend on the memory of its machine.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinfold import distributed
from kinfold.data import decoded_set
from kinfold.data.augment import draw
from kinfold.data.decode import Undecodable
from kinfold.data.decoded_set import DecodedSet
from kinfold.data.equal_images import DecodingEqual, Unfit, read_equal
from kinfold.data.exact_crop import crop_levels
from kinfold.data.finish import finish
from kinfold.data.free_memory import free_memory
from kinfold.data.sources import Source
from kinfold.data.work import Task, in_order, no_readable_image, run, stand_ins
from kinfold.devices import to_device
from kinfold.errors import UserError
from kinfold.views import Views

RESIDENT_BYTES = 4 * 2**30
"""a decoded set up to this size stays on the device: STL-10's 100,000 unlabelled images of 96 pixels are 2.8 GB"""
SHARE = 0.5
"""so much of the device's free memory may be a set's, unless `resident=true` asks for it"""
KEPT_FROM = 2**23
"""bytes from which a decoded set is kept on disk: a smaller one is decoded in a second or two"""

_LOOKED_AT = 64  # images that decide whether all may be of one size,
_LOOKED_AT_PIXELS = 2**24  # or fewer where they are large: decoding the set shows it too
_DECODED_AT_ONCE = 256  # images of a task,
_DECODED_BYTES = 2**24  # or fewer where they are large: every worker has several tasks' results on their way


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a loader wants of a resident set."""

    source: Source
    channels: int
    device: torch.device
    wanted: bool | None
    """True: it has to be; False: it must not; None: the data decide"""
    workers: int = 0
    """processes that decode"""
    prefetch: int = 2
    world: int = 1
    scaled_from: int | None = None
    """a JPEG whose short side has so many pixels is to be decoded at a fraction at each step, and so by workers"""
    cache: Path | None = None
    progress: Callable[[int], None] | None = None
    """told how many more images are there"""
    say: Callable[[str], None] = lambda sentence: None
    """told, in a sentence, what a person should know"""


def open_resident(asked: Asked) -> DecodedSet | None:
    """Give the whole set on the device, or None where it is to be read step by step; the same on all processes.

    Of several processes, one on each machine decodes and keeps the pixels; the others read them.

    Raises: `UserError` where the set has to be resident and its images differ in size or there is no room, or where
    no image decodes.
    """
    if asked.wanted is False:
        return None
    size = _common_size(asked)
    if size is None:
        return None
    shape = (len(asked.source), asked.channels, *size)
    several = asked.world > 1 and distributed.world() > 1
    shared = not several or KEPT_FROM <= math.prod(shape) <= decoded_set.most_kept()
    if not _fits(asked, shape, several, copies=1 if shared else _neighbours()):
        return None
    found = _from_disk_or_files(asked, shape, several)
    if found is None:
        return None
    if len(found.bad) == len(asked.source):
        raise UserError(no_readable_image(asked.source, found.bad))
    return found._replace(images=found.images.to(asked.device))


def _common_size(asked: Asked) -> tuple[int, int] | None:
    """Height and width of the first images where they agree and the set is small, or the first's where wanted."""
    source, wanted = asked.source, asked.wanted is True
    size: tuple[int, int] | None = None
    seen = 0
    for position in range(len(source)):
        if size is not None and (position >= _LOOKED_AT or seen >= _LOOKED_AT_PIXELS):
            break
        try:
            height, width, _ = read_equal(source, position, asked.channels, scaled_from=asked.scaled_from).shape
        except Undecodable:
            if not wanted and position >= _LOOKED_AT:
                return None
            continue
        except Unfit as error:
            if wanted:
                raise UserError(str(error)) from None
            return None
        if wanted:
            return height, width
        if size not in (None, (height, width)):
            return None
        size, seen = (height, width), seen + height * width
        if len(source) * asked.channels * height * width > RESIDENT_BYTES:
            return None
    return size


def _fits(asked: Asked, shape: tuple[int, ...], several: bool, *, copies: int) -> bool:
    """Whether every process has room for the set; where one has not, say so, or raise where it has to be there.

    `copies` processes of this machine hold it in memory at once.
    """
    needed, free = math.prod(shape), free_memory(asked.device, copies)
    if several:  # the process that has least decides for all
        free = -distributed.largest(-int(min(free, 2**62)), asked.device)
    if needed <= free * (1.0 if asked.wanted else SHARE):
        return True
    each = f" for each of {copies} processes" if copies > 1 else ""
    sizes = f"the decoded images take {needed / 1e9:.2f} GB, and {asked.device} has {free / 1e9:.2f} GB free{each}"
    if asked.wanted:
        raise UserError(
            f"resident=true: {sizes}. Leave resident out, so that workers read the images, or take fewer with limit=."
        )
    asked.say(
        f"{sizes}, of which at most {SHARE:.0%} may be theirs: workers read the images instead, with the same views"
    )
    return False


def _from_disk_or_files(asked: Asked, shape: tuple[int, ...], several: bool) -> DecodedSet | None:
    """The set from the cache, or decoded; None where not all images are of the shape."""
    if math.prod(shape) < KEPT_FROM:
        return _decoded(asked, shape)
    decoded_set.most_kept()  # what the environment says wrongly is said before all is decoded
    without_jpegs = asked.scaled_from is not None and min(shape[2:]) >= asked.scaled_from
    folder = decoded_set.folder_of(asked.cache)
    key = decoded_set.key_of(asked.source, shape, without_jpegs=without_jpegs)
    found = _kept(asked, shape, folder, key)
    if not several:
        return found or _decoded_and_kept(asked, shape, folder, key)
    if not distributed.largest(int(found is None), asked.device):
        return found
    # What goes wrong in one process is told to all, so that none waits for what never comes.
    fault: dict[int, str] = {}
    if found is None and int(os.environ.get("LOCAL_RANK", distributed.rank())) == 0:
        try:
            found = _decoded_and_kept(asked, shape, folder, key)
            if found is None:
                fault = {distributed.rank(): ""}
        except UserError as error:
            fault = {distributed.rank(): str(error)}
    faults = distributed.join(fault)
    if faults:
        message = next(iter(faults.values()))
        if message:
            raise UserError(message)
        return None
    found = found or _kept(asked, shape, folder, key)
    # Where it could not be kept on the disk, each process has its own: one on the machine holds it by now.
    if distributed.largest(int(found is None), asked.device) and not _fits(asked, shape, several, copies=_neighbours()):
        return None
    return found or _decoded(asked, shape)


def _neighbours() -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world()))


def _kept(asked: Asked, shape: tuple[int, ...], folder: Path, key: str) -> DecodedSet | None:
    """The set from the cache; None where there is none, or one of its unreadable images can be read by now.

    A disk that failed for a moment or a file that was forbidden leaves no trace in the file's size and time.
    """
    found = decoded_set.find(folder, key, shape, asked.say)
    if found is not None and any(_decodes(asked, position) for position in found.bad):
        return None
    return found


def _decodes(asked: Asked, position: int) -> bool:
    with suppress(Undecodable):
        read_equal(asked.source, position, asked.channels, scaled_from=None)
        return True
    return False


def _decoded_and_kept(asked: Asked, shape: tuple[int, ...], folder: Path, key: str) -> DecodedSet | None:
    found = _decoded(asked, shape)
    if found is not None and len(found.bad) < len(asked.source):
        decoded_set.keep(folder, key, found, asked.say)
    return found


def _decoded(asked: Asked, shape: tuple[int, ...]) -> DecodedSet | None:
    """Decode the whole set to `shape` [N, C, H, W]; None, or an error where it is wanted, if an image has another."""
    source, bad = asked.source, dict[int, str]()
    images = torch.empty(shape, dtype=torch.uint8)  # [N, C, H, W]
    step = max(1, min(_DECODED_AT_ONCE, _DECODED_BYTES // math.prod(shape[1:])))
    work = DecodingEqual(source, asked.channels, (shape[2], shape[3]), asked.scaled_from)
    for block in run(work, in_order(shape[0], step), workers=asked.workers, prefetch=asked.prefetch):
        if block.unfit is not None:
            if asked.wanted:
                raise UserError(block.unfit)
            return None
        first, last = int(block.positions[0]), int(block.positions[-1]) + 1
        images[first:last] = block.pixels.permute(0, 3, 1, 2)
        bad.update(block.bad)
        if asked.progress is not None:
            asked.progress(last - first)
    return DecodedSet(images, bad)


def readable(positions: Iterable[int], bad: dict[int, str], source: Source, *, seed: int, epoch: int) -> list[int]:
    """The images that are shown at `positions`: themselves, or the first stand-ins that decoded.

    Raises `UserError` where no stand-in of one did.
    """
    shown = []
    for position in positions:
        candidates = itertools.chain([position], stand_ins(position, seed=seed, epoch=epoch, count=len(source)))
        found = next((candidate for candidate in candidates if candidate not in bad), None)
        if found is None:
            raise UserError(no_readable_image(source, bad))
        shown.append(found)
    return shown


def resident_views(
    images: Tensor,
    rows: NDArray[np.int64],
    task: Task,
    views: Views,
    *,
    seed: int,
    mean: Sequence[float],
    std: Sequence[float],
    compiled: bool = False,
) -> list[Tensor]:
    """Make the views of images `task.positions`, which are `rows` of `images` uint8 [N, C, H, W], where these lie.

    One float32 [B, C, S, S] a view, normalised. `compiled` is that of `kinfold.data.finish.finish`.
    """
    height, width = np.full(len(rows), images.shape[2]), np.full(len(rows), images.shape[3])
    where = to_device(torch.from_numpy(rows), images.device)  # [B]
    crops, numbers = [], []
    for view, augmentation in enumerate(views.augment):
        drawn = draw(
            augmentation,
            seed=seed,
            epoch=task.epoch,
            image=task.positions,
            view=view,
            height=height,
            width=width,
        )
        crops.append(crop_levels(images, where, drawn.box, augmentation.size))  # [B, C, S, S]
        numbers.append(drawn)
    return finish(crops, numbers, mean, std, compiled=compiled)
