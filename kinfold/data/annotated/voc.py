# SPDX-License-Identifier: Apache-2.0
"""The layout of Pascal VOC: images, XML annotations, split lists, masks; of one year or of several.

    VOCdevkit/VOC2007/{JPEGImages,Annotations,ImageSets/{Main,Segmentation},SegmentationClass}

Other sets in the same layout (any folder name, any classes) are read as well. Everything that is wrong with a file is
named with the file and the line. Source: the development kits of the VOC challenges, 2007 and 2012.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinfold.data.annotated.voc_xml import Annotation, Box, read_annotation
from kinfold.data.decode import Undecodable
from kinfold.data.folder import EXTENSIONS, extension
from kinfold.errors import UserError

__all__ = [
    "CLASSES",
    "Annotation",
    "Box",
    "Devkit",
    "Presence",
    "VOCImages",
    "check_name",
    "choose",
    "classes_of",
    "find_devkits",
    "has_list",
    "parts",
    "presence",
    "read_annotation",
    "read_classes",
    "read_lines",
]

CLASSES: tuple[str, ...] = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
"""the twenty classes of the challenges, in their order"""

Presence = NDArray[np.int8]
"""[N, C]: 1 where a class is in an image, 0 where all that there is of it is difficult, -1 where it is absent"""


@dataclass(frozen=True)
class Devkit:
    """One folder that holds JPEGImages, Annotations and ImageSets."""

    root: Path
    year: str
    """ "2007" of a folder VOC2007, else the folder's name"""

    @cached_property
    def images(self) -> dict[str, str]:
        """The files of JPEGImages by id, which is the name without its ending."""
        names = sorted(entry.name for entry in os.scandir(self.root / "JPEGImages"))
        return {name.rpartition(".")[0]: name for name in names if extension(name) in EXTENSIONS}

    def __getstate__(self) -> dict[str, Any]:
        # What worker processes are sent is small; each lists for itself where it has to.
        return {"root": self.root, "year": self.year}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def splits(self, kind: str = "Main") -> list[str]:
        """Name the lists of ImageSets/`kind`, those of single classes left out."""
        folder = self.root / "ImageSets" / kind
        names = sorted(path.stem for path in folder.glob("*.txt")) if folder.is_dir() else []
        return [name for name in names if not any(name.endswith(f"_{other}") for other in names)]

    def list_file(self, split: str, kind: str = "Main") -> Path:
        """Give the file of a split. Raises `UserError` that names the splits there are."""
        path = self.root / "ImageSets" / kind / f"{split}.txt"
        if not path.is_file():
            there = ", ".join(self.splits(kind)) or "none"
            raise UserError(f"{path} is not there, so there is no split {split!r}. Splits of {self.root}: {there}.")
        return path

    def ids(self, split: str, kind: str = "Main") -> list[str]:
        """Give the image ids of a split in the order of its list.

        Raises `UserError` with file and line for an id without an image or an id that stands there twice.
        """
        path = self.list_file(split, kind)
        found: dict[str, int] = {}
        for line, words in read_lines(path):
            if words[0] not in self.images:
                raise UserError(
                    f"{path}, line {line}: there is no image {words[0]!r} in {self.root / 'JPEGImages'}. Add the image "
                    "or remove the line."
                )
            if words[0] in found:
                raise UserError(
                    f"{path}, line {line}: {words[0]} stands in line {found[words[0]]} already. Remove one of them."
                )
            found[words[0]] = line
        if not found:
            raise UserError(f"{path} names no image.")
        return list(found)

    def image(self, id: str) -> Path:
        """Give an image's file. Raises `UserError` where there is none."""
        if id not in self.images:
            raise UserError(f"There is no image {id!r} in {self.root / 'JPEGImages'}.")
        return self.root / "JPEGImages" / self.images[id]

    def mask(self, id: str, folder: str = "SegmentationClass") -> Path:
        """Give an image's mask of classes. Raises `UserError` where there is none."""
        return self._beside(id, self.root / folder / f"{id}.png", "mask")

    def annotation(self, id: str) -> Annotation:
        """Read an image's XML file. Raises `UserError` with file and line where it is missing or malformed."""
        return read_annotation(self._beside(id, self.root / "Annotations" / f"{id}.xml", "annotation"))

    def _beside(self, id: str, path: Path, what: str) -> Path:
        if not path.is_file():
            raise UserError(f"The image {id} of {self.root} has no {what}: {path} is not there.")
        return path


class VOCImages:
    """The images of ids, each of its own development kit; as a source without labels."""

    def __init__(self, chosen: Sequence[tuple[Devkit, str]], description: str | None = None) -> None:
        paths = [devkit.image(id) for devkit, id in chosen]
        roots = dict.fromkeys(devkit.root for devkit, _ in chosen)
        # Other versions of the set have the same ids, so sizes count too.
        digest = hashlib.sha256()
        for path in paths:
            digest.update(f"{path.parts[-3]}/{path.name}\0{path.stat().st_size}\n".encode("utf-8", "surrogateescape"))
        self._paths = [str(path) for path in paths]
        self.labels: NDArray[np.int64] | None = None
        self.classes: tuple[str, ...] | None = None
        self.fingerprint = digest.hexdigest()
        self.description = description or f"{len(paths):,} images in {', '.join(map(str, roots))}"

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, i: int) -> bytes:
        """Give the file's bytes. Raises `Undecodable` where the file has gone or cannot be read."""
        try:
            return Path(self._paths[i]).read_bytes()
        except OSError as error:
            raise Undecodable(f"it cannot be read: {error.strerror}") from error

    def name(self, i: int) -> str:
        """Give the file's path."""
        return self._paths[i]


def find_devkits(data: str) -> list[Devkit]:
    """Find the development kits at a path: itself, the years in a VOCdevkit, or in a VOCdevkit below it.

    Raises `UserError` that says what was found instead.
    """
    path = Path(data).expanduser()
    if path.is_file():
        advice = f"Unpack it (tar xf {path}) and give the folder." if ".tar" in path.name else "Give a folder."
        raise UserError(f"{path} is a file; the VOC layout is read from a folder. {advice}")
    if not path.is_dir():
        raise UserError(f"{path} does not exist. Give the folder VOCdevkit, or VOC2007 or another in its layout.")
    if _is_devkit(path):
        return [_devkit(path)]
    folders = [*sorted(path.glob("*")), *sorted(path.glob("VOCdevkit/*"))]
    found = [_devkit(folder) for folder in folders if _is_devkit(folder)]
    if found:
        return found
    below = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    raise UserError(
        f"{path} is not in the VOC layout, a folder with JPEGImages, Annotations and ImageSets, or a VOCdevkit that "
        f"holds some; it holds {below}. Detection reads COCO's layout too (annotations/instances_*.json), segmentation "
        "and patches Cityscapes' (leftImg8bit, gtFine) and folders images and masks with equal names."
    )


def choose(data: str, split: str) -> list[tuple[Devkit, str]]:
    """Give the images of splits joined by "+", as (development kit, id) in order: "2007_trainval+2012_trainval".

    Raises `UserError` where a split is unknown, where several years have it and none is named, or where an image is in
    two of the splits.
    """
    chosen = [(devkit, id) for devkit, name in parts(find_devkits(data), split) for id in devkit.ids(name)]
    once = set(chosen)
    if len(once) < len(chosen):
        twice = next(pair for i, pair in enumerate(chosen) if pair in chosen[:i])
        raise UserError(f"{split!r} holds the image {twice[1]} of {twice[0].root} twice. Join splits that do not meet.")
    return chosen


def parts(devkits: Sequence[Devkit], split: str, kind: str = "Main") -> list[tuple[Devkit, str]]:
    """Take the words of `split` apart: each word's development kit and list. Raises `UserError` as `choose`."""
    found = []
    for word in split.split("+"):
        named = [devkit for devkit in devkits if word.startswith(f"{devkit.year}_")]
        name = word.removeprefix(f"{named[0].year}_") if named else word
        if not named:
            named = [devkit for devkit in devkits if has_list(devkit, word, kind)]
        if len(named) > 1:
            years = [f"{devkit.year}_{name}" for devkit in named]
            raise UserError(f"Several years have a split {word!r}: say {', '.join(years)} or {'+'.join(years)}.")
        if not named:
            there = "; ".join(f"{devkit.year}: {', '.join(devkit.splits(kind)) or 'none'}" for devkit in devkits)
            raise UserError(f"There is no split {word!r} in ImageSets/{kind} of {devkits[0].root.parent}. {there}.")
        named[0].list_file(name, kind)
        found.append((named[0], name))
    return found


def has_list(devkit: Devkit, name: str, kind: str = "Main") -> bool:
    """Whether a development kit has a split of that name."""
    return (devkit.root / "ImageSets" / kind / f"{name}.txt").is_file()


def classes_of(devkits: Sequence[Devkit]) -> tuple[str, ...]:
    """Give the classes: the twenty, or those in `classes.txt` (one a line), or all names in the annotations, sorted.

    Raises `UserError` where annotations name none, or two development kits say otherwise.
    """
    each = {devkit.root: _classes(devkit) for devkit in devkits}
    if len(set(each.values())) > 1:
        said = "; ".join(f"{root}: {', '.join(names)}" for root, names in each.items())
        raise UserError(f"These do not have the same classes, so they cannot be joined: {said}.")
    return next(iter(each.values()))


def presence(devkit: Devkit, split: str, classes: Sequence[str]) -> Presence:
    """Say for each image of a split which classes it shows: int8 [N, C].

    From the lists `<class>_<split>.txt` where all classes have one, else from the annotations.
    Raises `UserError` with file and line for what does not fit.
    """
    ids = devkit.ids(split)
    files = {name: devkit.root / "ImageSets" / "Main" / f"{name}_{split}.txt" for name in classes}
    missing = [path.name for path in files.values() if not path.is_file()]
    if missing and len(missing) < len(classes):
        raise UserError(
            f"{devkit.root / 'ImageSets' / 'Main'} has lists of {len(classes) - len(missing)} of the {len(classes)} "
            f"classes for {split}, but not {', '.join(missing)}. Add them, or remove the others to have the "
            "annotations read."
        )
    if missing:
        return _presence_by_annotations(devkit, ids, classes)
    return np.stack([_read_presence(files[name], ids) for name in classes], axis=1)  # [N, C]


def check_name(box: Box, path: Path, classes: Sequence[str]) -> int:
    """Give a box's class as a number. Raises `UserError` with file and line for a class that is none of `classes`."""
    if box.name not in classes:
        raise UserError(
            f"{path}, line {box.line}: {box.name!r} is none of the {len(classes)} classes ({', '.join(classes)})."
        )
    return classes.index(box.name)


def read_lines(path: Path) -> list[tuple[int, list[str]]]:
    """Read the lines of a list that hold anything: (line number from 1, its words)."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    return [(number, line.split()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def read_classes(path: Path) -> tuple[str, ...]:
    """Read the names of classes, one a line. Raises `UserError` where there is none, or a name stands there twice."""
    lines: dict[str, int] = {}
    for line, words in read_lines(path):
        name = " ".join(words)
        if name in lines:
            raise UserError(f"{path}, line {line}: {name!r} stands in line {lines[name]} already. Remove one of them.")
        lines[name] = line
    if not lines:
        raise UserError(f"{path} names no class; write one a line.")
    return tuple(lines)


def _is_devkit(folder: Path) -> bool:
    return (folder / "JPEGImages").is_dir() and (folder / "ImageSets").is_dir()


def _devkit(folder: Path) -> Devkit:
    name = folder.resolve().name
    found = re.fullmatch(r"VOC(\d{4})", name)
    return Devkit(folder, found.group(1) if found else name)


def _classes(devkit: Devkit) -> tuple[str, ...]:
    listed = devkit.root / "classes.txt"
    if listed.is_file():
        return read_classes(listed)
    if re.fullmatch(r"\d{4}", devkit.year):
        return CLASSES
    files = sorted((devkit.root / "Annotations").glob("[!.]*.xml"))  # "._1.xml" is a system's own note on a file
    names = tuple(sorted({box.name for path in files for box in read_annotation(path).boxes}))
    if not names:
        raise UserError(f"{devkit.root / 'Annotations'} names no class, in {len(files):,} files.")
    return CLASSES if set(names) <= set(CLASSES) else names


def _read_presence(path: Path, ids: list[str]) -> Presence:
    """Read one class's list: int8 [N] in the order of ids."""
    known = set(ids)
    found: dict[str, int] = {}
    for line, words in read_lines(path):
        if len(words) != 2 or words[1] not in ("1", "0", "-1"):
            raise UserError(f"{path}, line {line}: expected an image's id and 1, 0 or -1, got {' '.join(words)!r}.")
        if words[0] not in known:
            raise UserError(f"{path}, line {line}: {words[0]!r} is no image of the split's own list.")
        found[words[0]] = int(words[1])
    for id in ids:
        if id not in found:
            raise UserError(f"{path} does not say whether {id} shows its class. Add the line.")
    return np.array([found[id] for id in ids], np.int8)  # [N]


def _presence_by_annotations(devkit: Devkit, ids: list[str], classes: Sequence[str]) -> Presence:
    result = np.full((len(ids), len(classes)), -1, np.int8)  # [N, C]
    for row, id in enumerate(ids):
        annotation = devkit.annotation(id)
        for box in annotation.boxes:
            column = check_name(box, annotation.path, classes)
            result[row, column] = max(result[row, column], 0 if box.difficult else 1)
    return result
