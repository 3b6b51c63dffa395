# SPDX-License-Identifier: Apache-2.0
"""Images with a mask that says of every pixel which class it is of: the layouts of VOC and Cityscapes, and a plain one.

    VOC          JPEGImages, SegmentationClass (or SegmentationClassAug), ImageSets/Segmentation/<split>.txt
    Cityscapes   leftImg8bit/<split>/<city>/*_leftImg8bit.png, gtFine/<split>/<city>/*_gtFine_labelIds.png
    plain        images/ and masks/ with equal names, beside each other at the top or in a folder of each split;
                 values are classes, classes.txt (one name a line) may name them

Masks are PNG files with a palette or grey levels. 255 is void: such pixels are neither learned from nor asked for.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import PngImagePlugin

from kinfold.data.annotated import voc
from kinfold.data.decode import PIXEL_LIMIT, Undecodable, decode
from kinfold.data.folder import EXTENSIONS, extension
from kinfold.data.splits import split_of_word
from kinfold.errors import UserError
from kinfold.randomness import SPLIT, permutation

VOID = 255
"""the value of a pixel that counts for nothing"""

_CITYSCAPES: dict[str, int] = {
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}
"""the 19 classes that are evaluated, in their order, and the label id of each in the files"""
_CITYSCAPES_IDS = 34
_BIT_DEPTH = 24  # place of this byte in a PNG file

Mask = NDArray[np.uint8]


class Pair(NamedTuple):
    """Where an image and its mask lie."""

    image: Path
    mask: Path


class Masks:
    """N images with their masks; travels to worker processes."""

    def __init__(
        self, pairs: Sequence[Pair], classes: Sequence[str], description: str, *, ids: Sequence[int] | None = None
    ) -> None:
        """`ids` are the values that stand for the classes where they are not 0, 1, 2, …; other ids are then void."""
        if len(classes) > VOID:
            raise UserError(f"{description}: {len(classes)} classes, but masks have numbers for {VOID} at most.")
        digest = hashlib.sha256("\n".join(classes).encode("utf-8", "surrogateescape"))
        for pair in pairs:
            for path in pair:
                line = f"{'/'.join(path.parts[-2:])} {path.stat().st_size}\n"
                digest.update(line.encode("utf-8", "surrogateescape"))
        self.pairs = list(pairs)
        self.classes = tuple(classes)
        self.fingerprint = digest.hexdigest()
        self.description = description
        self._table = np.full(256, -1, np.int16)  # [256]: value in the file to class, -1 for what must not be there
        self._table[VOID] = VOID
        if ids is None:
            self._table[: len(classes)] = np.arange(len(classes))
        else:
            self._table[:_CITYSCAPES_IDS] = VOID
            self._table[list(ids)] = np.arange(len(classes))

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, i: int) -> str:
        """Give the mask's path, which is what is looked at when something is wrong."""
        return str(self.pairs[i].mask)

    def some(self, positions: NDArray[np.int64], description: str | None = None) -> Masks:
        """Give the pairs at some positions as a set of their own."""
        made = object.__new__(Masks)
        made.__dict__.update(self.__dict__)
        made.pairs = [self.pairs[i] for i in positions.tolist()]
        made.fingerprint = hashlib.sha256(self.fingerprint.encode() + positions.astype(np.int64).tobytes()).hexdigest()
        made.description = description or f"{len(made):,} of {self.description}"
        return made

    def read(self, i: int, channels: int = 3) -> tuple[NDArray[np.uint8], Mask]:
        """Give image i, uint8 [H, W, channels], and its mask of class numbers and `VOID`, uint8 [H, W].

        Raises `Undecodable` whose reason names the file at fault: one that does not decode, a mask of another size than
        its image, a mask with colours in place of numbers, a number that stands for no class.
        """
        image, mask = self.pairs[i]
        pixels = _decoded(image, channels)
        values = read_mask(mask)
        if values.shape != pixels.shape[:2]:
            raise Undecodable(
                f"{mask}: the mask has {values.shape[1]} x {values.shape[0]} pixels, but its image {image} has "
                f"{pixels.shape[1]} x {pixels.shape[0]}"
            )
        labels = self._table[values]  # [H, W]
        if labels.min() < 0:
            row, column = (int(where[0]) for where in np.nonzero(labels < 0))
            raise Undecodable(
                f"{mask}: the value {values[row, column]} (first in row {row}, column {column}) is none of the "
                f"{len(self.classes)} classes, and {VOID} is void"
            )
        return pixels, labels.astype(np.uint8)


def read_mask(path: Path) -> Mask:
    """Read the numbers of a mask, uint8 [H, W]: the places in its palette, or its grey levels as they are.

    Raises `Undecodable` where it is no such PNG file.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise Undecodable(f"{path}: it cannot be read: {error.strerror or error}") from error
    try:
        # Not by way of `decode`, which looks colours up in the palette and scales: here the numbers are the meaning.
        image = PngImagePlugin.PngImageFile(io.BytesIO(raw))
        if image.width * image.height > PIXEL_LIMIT:
            raise Undecodable(f"{path}: it claims {image.width:,} x {image.height:,} pixels")
        if image.mode in ("P", "L", "1"):
            values = np.array(image).astype(np.uint8)  # [H, W]
            # Pillow stretches grey levels of 2 and 4 bits to 255.
            return values // (255 // (2 ** raw[_BIT_DEPTH] - 1)) if image.mode == "L" else values
    except Undecodable:
        raise
    except Exception as error:  # Pillow raises whatever a damaged file makes it stumble over
        raise Undecodable(f"{path}: it is no whole PNG file: {error}") from error
    raise Undecodable(
        f"{path}: the mask holds colours or wide numbers (mode {image.mode}); a PNG file with a palette or with 8-bit "
        "grey levels that are the classes is expected"
    )


def open_masks(
    data: str, split: str | None, *, training: bool, limit: int | None = None, say: Callable[[str], None]
) -> Masks | None:
    """Open a split of images with masks at a path.

    Usual splits where none is named: to train, `train_aug` or `trainaug` where VOC's lists have it, else `train`; to
    test, `val`; of several years the last. A plain layout without splits is all training. None where no test split is
    named and there is none. `limit` keeps that many, always the same. Raises `UserError` with file and line for what
    does not fit.
    """
    path = Path(data).expanduser()
    if (path / "leftImg8bit").is_dir():
        found: Masks | None = _cityscapes(path, split or ("train" if training else "val"))
    elif plain := _plain_folders(path):
        found = _plain(path, plain, split, training, say)
    else:
        found = _voc(data, split, training)
    if found is None or limit is None or limit >= len(found):
        return found
    return found.some(np.sort(permutation(SPLIT, 0, n=len(found))[:limit]))


def _decoded(path: Path, channels: int) -> NDArray[np.uint8]:
    try:
        return decode(path.read_bytes(), channels)
    except OSError as error:
        raise Undecodable(f"{path}: it cannot be read: {error.strerror or error}") from error
    except Undecodable as error:
        raise Undecodable(f"{path}: {error.reason}") from error


def _voc(data: str, split: str | None, training: bool) -> Masks:
    devkits = voc.find_devkits(data)
    if split is None:
        wanted = ("train_aug", "trainaug", "train") if training else ("val",)
        split = next(
            (name for name in wanted if any(voc.has_list(kit, name, "Segmentation") for kit in devkits)), wanted[-1]
        )
        having = [kit.year for kit in devkits if voc.has_list(kit, split, "Segmentation")]
        if len(having) > 1:  # of several years the last, 2012 as all papers do
            split = f"{having[-1]}_{split}"
    chosen = voc.parts(devkits, split, "Segmentation")
    pairs = [pair for devkit, name in chosen for pair in _listed(devkit, name)]
    if len({pair.image for pair in pairs}) < len(pairs):
        raise UserError(f"{split!r} holds an image twice. Join splits that do not meet.")
    kits = list(dict.fromkeys(devkit for devkit, _ in chosen))
    told = all((kit.root / "classes.txt").is_file() or (kit.root / "Annotations").is_dir() for kit in kits)
    classes = voc.classes_of(kits) if told else voc.CLASSES
    folders = sorted({pair.mask.parent.name for pair in pairs})
    where = ", ".join(str(kit.root) for kit in kits)
    return Masks(
        pairs,
        ("background", *(name for name in classes if name != "background")),
        f"{len(pairs):,} images with masks ({', '.join(folders)}) of {split} in {where}",
    )


def _listed(devkit: voc.Devkit, split: str) -> list[Pair]:
    """The pairs of one list: a line holds an id, or the paths of an image and a mask below the development kit."""
    path = devkit.list_file(split, "Segmentation")
    folders = [devkit.root / name for name in ("SegmentationClassAug", "SegmentationClass")]
    # The augmented lists name images of which the challenge's own masks know nothing; the others are asked by its own.
    if "aug" not in split or not folders[0].is_dir():
        folders.reverse()
    folder = next((each for each in folders if each.is_dir()), folders[0])
    pairs: dict[str, Pair] = {}
    for line, words in voc.read_lines(path):
        id = PurePosixPath(words[0]).stem if "/" in words[0] else words[0]
        mask = devkit.root / words[1].lstrip("/") if len(words) > 1 else folder / f"{id}.png"
        if id not in devkit.images:
            raise UserError(
                f"{path}, line {line}: there is no image {id!r} in {devkit.root / 'JPEGImages'}. Add the image or "
                "remove the line."
            )
        if not mask.is_file():
            raise UserError(
                f"{path}, line {line}: the image {id} has no mask: {mask} is not there. Add it or remove the line."
            )
        if id in pairs:
            raise UserError(f"{path}, line {line}: {id} stands in the list already. Remove one of the two.")
        pairs[id] = Pair(devkit.image(id), mask)
    if not pairs:
        raise UserError(f"{path} names no image.")
    return list(pairs.values())


def _cityscapes(root: Path, split: str) -> Masks:
    folder = root / "leftImg8bit" / split
    if not folder.is_dir():
        there = ", ".join(sorted(each.name for each in (root / "leftImg8bit").iterdir() if each.is_dir())) or "none"
        raise UserError(f"{folder} is not there, so there is no split {split!r}. Splits: {there}.")
    ending = "_leftImg8bit.png"
    images = sorted(folder.glob(f"*/*{ending}"))
    if not images:
        raise UserError(f"{folder} holds no file <city>/*{ending}.")
    pairs = []
    for image in images:
        stem = image.name.removesuffix(ending)
        pairs.append(Pair(image, root / "gtFine" / split / image.parent.name / f"{stem}_gtFine_labelIds.png"))
    missing = [pair for pair in pairs if not pair.mask.is_file()]
    if missing:
        raise UserError(
            f"{len(missing):,} of {len(pairs):,} images have no mask, the first is {missing[0].image}: "
            f"{missing[0].mask} is not there. Unpack gtFine beside leftImg8bit."
        )
    description = f"{len(pairs):,} images with fine masks of {split} in {root}"
    return Masks(pairs, tuple(_CITYSCAPES), description, ids=list(_CITYSCAPES.values()))


def _plain_folders(path: Path) -> dict[str, Path]:
    """The folders that hold images/ and masks/, by split; "" is the one at the top."""
    if not path.is_dir():
        return {}
    folders = {"": path} | {each.name: each for each in sorted(path.iterdir()) if each.is_dir()}
    return {name: each for name, each in folders.items() if (each / "images").is_dir() and (each / "masks").is_dir()}


def _plain(
    root: Path, folders: dict[str, Path], split: str | None, training: bool, say: Callable[[str], None]
) -> Masks | None:
    wanted = split or ("train" if training else "test")
    kinds = (wanted, "validation") if wanted == "test" else (wanted,)
    by_word = {split_of_word(name) or name: name for name in folders}
    name = wanted if wanted in folders else next((by_word[kind] for kind in kinds if kind in by_word), None)
    if name is None and training and split is None and "" in folders:
        name = ""
    if name is None:
        if split is None and not training:
            return None
        there = ", ".join(each for each in folders if each) or "none: images/ and masks/ lie at the top"
        raise UserError(f"{root} has no split {wanted!r}. Splits: {there}.")
    pairs = _matched(folders[name], say)
    return Masks(pairs, _plain_classes(root, folders, pairs), f"{len(pairs):,} images with masks in {folders[name]}")


def _matched(folder: Path, say: Callable[[str], None]) -> list[Pair]:
    images, masks = (
        {
            path.stem: path
            for path in sorted((folder / name).iterdir())
            if extension(path.name) in kinds and not path.name.startswith(".")  # "._1.png" is a system's own note
        }
        for name, kinds in (("images", EXTENSIONS), ("masks", frozenset({"png"})))
    )
    pairs = [Pair(image, masks[stem]) for stem, image in images.items() if stem in masks]
    if not pairs:
        raise UserError(
            f"{folder} has {len(images):,} images and {len(masks):,} masks (.png), but none of them have the same name."
        )
    alone = [str(images[stem]) for stem in images.keys() - masks.keys()]
    alone += [str(masks[stem]) for stem in masks.keys() - images.keys()]
    if alone:
        shown = ", ".join(sorted(alone)[:5])
        say(f"{len(alone):,} files of {folder} have no partner of the same name and are left out: {shown}")
    return pairs


def _plain_classes(root: Path, folders: dict[str, Path], pairs: list[Pair]) -> tuple[str, ...]:
    """The names in classes.txt; else the numbers up to the largest that the training masks hold."""
    listed = root / "classes.txt"
    if listed.is_file():
        return voc.read_classes(listed)
    first = next((folders[name] for name in folders if split_of_word(name) == "train"), None)
    if first is not None:
        pairs = _matched(first, lambda text: None)
    largest = 0
    for pair in pairs:
        try:
            values = read_mask(pair.mask)
        except Undecodable:  # named when all are looked through
            continue
        largest = max(largest, int(values[values != VOID].max(initial=0)))
    return tuple(str(number) for number in range(largest + 1))
