# SPDX-License-Identifier: Apache-2.0
"""Images with objects: boxes, labels and perhaps outlines; resized and flipped batches of them to train a detector.

Boxes are continuous: (x1, y1, x2, y2) in pixels from the image's upper left corner, so that (0, 0, w, h) covers all of
a w x h image. VOC's corners are pixels counted from 1 and the last one is included: (x1 - 1, y1 - 1, x2, y2) here.

Which images a step holds, how large they are and whether they are flipped are functions of (seed, epoch, image), so
there is no state to save, and worker processes change nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinfold.data.annotated import voc
from kinfold.data.crop import crop_resize
from kinfold.data.decode import Undecodable
from kinfold.data.sources import Source, Subset
from kinfold.data.work import Task, no_readable_image, read, run, stand_ins
from kinfold.errors import UserError
from kinfold.randomness import ORDER, VIEW, permutation, uniforms

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Corners = tuple[float, float, float, float]


class Outline(Protocol):
    """Which pixels of an image belong to an object."""

    def fill(self, size: tuple[int, int], of: tuple[int, int]) -> Flags:
        """Give the object's mask [H, W] where its image of height and width `of` is resized to `size`."""
        ...


class Objects(NamedTuple):
    """The n objects of one image."""

    boxes: Floats
    """[n, 4]"""
    labels: NDArray[np.int64]
    """[n], from 0"""
    difficult: Flags
    """[n]: need not be found (VOC)"""
    crowd: Flags
    """[n]: many objects in one, never learned from (COCO)"""
    areas: Floats
    """[n], in pixels, of the object's outline where that is known, else of its box"""
    outlines: tuple[Outline, ...] | None = None
    """n, where they were asked for"""
    size: tuple[int, int] = (0, 0)
    """height and width of the image as the annotation says; 0 where it does not"""

    def some(self, kept: Flags) -> Objects:
        """Keep the objects where `kept` [n] is true."""
        outlines = None if self.outlines is None else tuple(o for o, keep in zip(self.outlines, kept) if keep)
        boxes, labels, difficult, crowd, areas, _, _ = self
        return Objects(boxes[kept], labels[kept], difficult[kept], crowd[kept], areas[kept], outlines, self.size)

    def other_size(self, size: tuple[int, int]) -> str | None:
        """Say what is odd where an image of (height, width) is not as large as its annotation says."""
        if all(self.size) and self.size != size:
            return f"{size[1]} x {size[0]}, said to be {self.size[1]} x {self.size[0]}"
        return None


class Faults:
    """What is wrong with annotations, each kind of it with the places where it was found."""

    def __init__(self) -> None:
        self.places: dict[str, list[str]] = {}

    def add(self, what: str, where: str) -> None:
        """Note one; `what` goes on after a number: "boxes have no area and are left out"."""
        self.places.setdefault(what, []).append(where)

    def tell(self, say: Callable[[str], None], *, shown: int = 5) -> None:
        """Count each kind and name the first places."""
        for what, places in self.places.items():
            more = f" and {len(places) - shown:,} more" if len(places) > shown else ""
            say(f"{len(places):,} {what}: {'; '.join(places[:shown])}{more}")

    def boxes(self, corners: Floats, size: tuple[int, int], where: Sequence[str]) -> tuple[Floats, Flags]:
        """Clip corners [n, 4] to an image of (height, width) and say which have an area: [n, 4], [n].

        A size of 0 is not known.
        """
        height, width = (side or np.inf for side in size)
        clipped = np.clip(corners, 0.0, [width, height, width, height])  # [n, 4]
        empty = ~(corners[:, 2:] > corners[:, :2]).all(axis=1)  # [n]
        outside = ~empty & ~(clipped[:, 2:] > clipped[:, :2]).all(axis=1)  # [n]
        beyond = ~empty & ~outside & (np.abs(clipped - corners) > 0).any(axis=1)  # [n]
        for flags, what in (
            (empty, "boxes have no area and are left out"),
            (outside, "boxes lie outside of their image and are left out"),
            (beyond, "boxes reach beyond their image and are cut off at its edge"),
        ):
            for i in np.flatnonzero(flags).tolist():
                self.add(what, where[i])
        return clipped, np.logical_not(empty | outside)  # [n, 4], [n]


@dataclass(frozen=True, eq=False)
class Scenes:
    """N images and their objects."""

    source: Source
    objects: list[Objects]
    """N"""
    classes: tuple[str, ...]
    layout: Literal["voc-2007", "voc", "coco"]
    """which definition of average precision belongs to them"""

    def __len__(self) -> int:
        return len(self.objects)

    @property
    def fingerprint(self) -> str:
        """Hex hash of the images' listing and all boxes: another one means other data."""
        digest = hashlib.sha256(f"{self.source.fingerprint}\0{self.classes}".encode())
        for one in self.objects:
            for part in one[:5]:
                digest.update(part.tobytes())
        return digest.hexdigest()

    def some(self, positions: NDArray[np.int64]) -> Scenes:
        """Keep the images at `positions` int64 [n]."""
        objects = [self.objects[i] for i in positions.tolist()]
        return replace(self, source=Subset(self.source, positions), objects=objects)

    def tell_odd(self, odd: dict[int, str], say: Callable[[str], None], *, shown: int = 5) -> None:
        """Count the images that are not as large as their annotations say, which `odd` are, and name the first."""
        if odd:
            names = "; ".join(f"{self.source.name(position)} is {odd[position]}" for position in sorted(odd)[:shown])
            say(
                f"{len(odd):,} of {len(self):,} images are not as large as their annotations say, so their boxes may "
                f"lie beside the objects: {names}{'; ...' if len(odd) > shown else ''}. Were they turned or resized?"
            )

    def learnable(self, *, difficult: bool, say: Callable[[str], None]) -> Scenes:
        """Keep what a detector learns from: no crowds, perhaps no difficult objects, no images without any.

        Raises `UserError` where nothing is left.
        """
        objects = [one.some(~one.crowd & (difficult | ~one.difficult)) for one in self.objects]
        kept = np.array([i for i, one in enumerate(objects) if len(one.labels)], np.int64)  # [n]
        if not len(kept):
            raise UserError(f"No training image shows an object to learn from: {self.source.description}.")
        if len(kept) < len(objects):
            say(f"{len(objects) - len(kept):,} of {len(objects):,} training images show no object and are left out.")
        return replace(self, objects=objects).some(kept)


def voc_scenes(data: str, split: str, classes: tuple[str, ...], *, say: Callable[[str], None]) -> Scenes:
    """Read the images of `split` in the VOC layout, which may join several: "2007_trainval+2012_trainval".

    Boxes of no area and of unknown classes are named with file and line and left out.
    Raises `UserError` as `kinfold.data.annotated.voc` does for lists and files that do not fit.
    """
    chosen, faults = voc.choose(data, split), Faults()
    objects = [_voc_objects(devkit.annotation(id), classes, faults) for devkit, id in chosen]
    faults.tell(say)
    years = {devkit.year for devkit, _ in chosen}
    description = f"{len(chosen):,} images of {data}, {split}, {sum(len(o.labels) for o in objects):,} objects"
    source = voc.VOCImages(chosen, description)
    return Scenes(source, objects, classes, "voc-2007" if years == {"2007"} else "voc")


def _voc_objects(annotation: voc.Annotation, classes: tuple[str, ...], faults: Faults) -> Objects:
    boxes = []
    for box in annotation.boxes:
        if box.name in classes:
            boxes.append(box)
        else:
            faults.add("boxes are of no known class and are left out", f"{annotation.path}, line {box.line} {box.name}")
    where = [f"{annotation.path}, line {box.line}" for box in boxes]
    # A box whose two corners are the same pixel, or that is a line, is a slip of the mouse: VOC's has no area either.
    flat = np.array([not box.has_area for box in boxes], bool)  # [n]
    corners = np.array([box.corners for box in boxes], np.float64).reshape(-1, 4)  # [n, 4]
    corners[:, :2] -= 1.0
    corners[flat, 2:] = corners[flat, :2]
    corners, kept = faults.boxes(corners, (annotation.height, annotation.width), where)
    labels = np.array([classes.index(box.name) for box in boxes], np.int64)  # [n]
    difficult = np.array([box.difficult for box in boxes], bool)  # [n]
    areas = (corners[:, 2:] - corners[:, :2]).prod(axis=1)  # [n]
    size = annotation.height, annotation.width
    return Objects(corners, labels, difficult, np.zeros(len(boxes), bool), areas, size=size).some(kept)


@dataclass(frozen=True)
class Prepared:
    """A batch to learn from."""

    images: list[Tensor]
    """B of uint8 [C, h, w], each of its own size"""
    targets: list[dict[str, Tensor]]
    """B of boxes [n, 4], labels [n] from 1 and perhaps masks [n, h, w]"""
    bad: dict[int, str]
    """position -> why the image could not be used"""
    odd: dict[int, str]
    """position -> how the image's size differs from what its annotation says"""


class Shown(NamedTuple):
    """An image to be asked."""

    position: int
    image: Tensor | None
    """uint8 [C, h, w], resized; None where it does not decode"""
    size: tuple[int, int]
    """height and width before"""
    reason: str = ""
    """why it does not decode"""


def resized(size: tuple[int, int], short: int, longest: int) -> tuple[int, int]:
    """Give height and width after the short side is made `short`, or less where the other would exceed `longest`."""
    scale = min(short / min(size), longest / max(size))
    height, width = (max(1, int(side * scale + 0.5)) for side in size)
    return height, width


@dataclass(frozen=True)
class Preparing:
    """Decode, resize and perhaps flip images with their objects; an image that does not decode has a stand-in."""

    scenes: Scenes
    short: tuple[int, ...]
    longest: int
    flip: float
    channels: int
    seed: int
    masks: bool

    def __call__(self, task: Task) -> Prepared:
        bad: dict[int, str] = {}
        shown = [self._readable(int(position), task.epoch, bad) for position in task.positions]
        pairs = [self._one(position, pixels, task.epoch) for position, pixels in shown]
        sizes = [
            (position, self.scenes.objects[position].other_size((pixels.shape[0], pixels.shape[1])))
            for position, pixels in shown
        ]
        odd = {position: what for position, what in sizes if what is not None}
        return Prepared([image for image, _ in pairs], [target for _, target in pairs], bad, odd)

    def _one(self, position: int, pixels: NDArray[np.uint8], epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        choose, turn = uniforms(VIEW, self.seed, epoch, position, 0, draws=2).tolist()
        before = pixels.shape[0], pixels.shape[1]
        size = resized(before, self.short[int(choose * len(self.short))], self.longest)
        image = crop_resize(pixels, (0, 0, *before), size)  # [C, h, w]
        one = self.scenes.objects[position]
        scale = np.array([size[1] / before[1], size[0] / before[0]] * 2)  # [4]
        # The image may be smaller than its annotation says.
        boxes = np.clip(one.boxes * scale, 0.0, [size[1], size[0]] * 2)  # [n, 4]
        kept = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)  # [n]
        boxes, one = boxes[kept], one.some(kept)
        flipped = turn < self.flip
        if flipped:
            image = image.flip(2)
            boxes = np.stack([size[1] - boxes[:, 2], boxes[:, 1], size[1] - boxes[:, 0], boxes[:, 3]], axis=1)  # [n, 4]
        target = {"boxes": torch.from_numpy(boxes).float(), "labels": torch.from_numpy(one.labels + 1)}
        if self.masks:
            masks = np.zeros((len(boxes), *size), bool)  # [n, h, w]
            for row, outline in enumerate(one.outlines or ()):
                masks[row] = outline.fill(size, before)
            target["masks"] = torch.from_numpy(masks[:, :, ::-1].copy() if flipped else masks)
        return image, target

    def _readable(self, position: int, epoch: int, bad: dict[int, str]) -> tuple[int, NDArray[np.uint8]]:
        """The image at `position`, or the first stand-in that decodes."""
        candidate: int | None = position
        others = stand_ins(position, seed=self.seed, epoch=epoch, count=len(self.scenes))
        while candidate is not None:
            try:
                return candidate, read(self.scenes.source, candidate, self.channels)
            except Undecodable as error:
                bad[candidate] = error.reason
            candidate = next(others, None)
        raise UserError(no_readable_image(self.scenes.source, bad))


@dataclass(frozen=True)
class Showing:
    """Decode and resize one image to be asked."""

    source: Source
    short: int
    longest: int
    channels: int

    def __call__(self, task: Task) -> Shown:
        position = int(task.positions[0])
        try:
            pixels = read(self.source, position, self.channels)
        except Undecodable as error:
            return Shown(position, None, (0, 0), error.reason)
        size = pixels.shape[0], pixels.shape[1]
        return Shown(position, crop_resize(pixels, (0, 0, *size), resized(size, self.short, self.longest)), size)


class SceneLoader:
    """Batches of whole epochs, one after the other, from any step on.

    `batch_size` is that of all `world` processes; process `rank` gets every `world`-th image. The images that do not
    fill a last batch of an epoch are left out of it. Raises `UserError` where a batch cannot be made or divided.
    """

    bad: dict[int, str]
    """images that did not decode, seen so far by this process: position -> reason"""
    odd: dict[int, str]
    """the same of images that are not as large as their annotations say"""

    def __init__(self, work: Preparing, *, batch_size: int, workers: int = 0, rank: int = 0, world: int = 1) -> None:
        if batch_size % world:
            raise UserError(f"batch_size is {batch_size}, which does not divide by {world} processes.")
        self.steps_per_epoch = len(work.scenes) // batch_size
        if not self.steps_per_epoch:
            raise UserError(f"batch_size is {batch_size}, but there are {len(work.scenes)} images with objects.")
        self.bad, self.odd = {}, {}
        self._work, self._batch, self._workers = work, batch_size, workers
        self._rank, self._world = rank, world

    def steps(self, start: int, stop: int) -> Iterator[Prepared]:
        """Give the batches of the steps from `start` to before `stop`, counted over all epochs."""
        for batch in run(self._work, self._tasks(start, stop), workers=self._workers):
            self.bad.update(batch.bad)
            self.odd.update(batch.odd)
            yield batch

    def _tasks(self, start: int, stop: int) -> list[Task]:
        tasks = []
        order, known = np.empty(0, np.int64), -1
        for step in range(start, stop):
            epoch, number = divmod(step, self.steps_per_epoch)
            if epoch != known:
                order, known = permutation(ORDER, self._work.seed, epoch, n=len(self._work.scenes)), epoch
            batch = order[number * self._batch : (number + 1) * self._batch]
            tasks.append(Task(epoch, batch[self._rank :: self._world].copy()))
        return tasks
