# SPDX-License-Identifier: Apache-2.0
"""The layout of COCO: one JSON file of annotations for a folder of images.

    coco/annotations/instances_train2017.json    {"images": [...], "annotations": [...], "categories": [...]}
    coco/train2017/000000000009.jpg

Any other such file is read as well, with its images beside it, in `images/` beside it, or in a folder of the split's
name. Boxes are (x, y, width, height), continuous, from the image's upper left corner. Everything that is wrong is named
with the file and the annotation's id.

Differs: polygons are filled by their pixels' centres, without pycocotools' rounding of corners to a fifth of a pixel.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinfold.data.annotated.scenes import Faults, Flags, Floats, Objects, Outline, Scenes
from kinfold.data.decode import Undecodable
from kinfold.errors import UserError

_PREFIX = re.compile(r"^_?(instances|annotations)[_.]?|[_.]?annotations$|\.coco$")


@dataclass(frozen=True, eq=False)
class Polygons:
    """An object by the corners of one or more polygons."""

    parts: tuple[NDArray[np.float32], ...]
    """each [k, 2]: x and y"""

    def fill(self, size: tuple[int, int], of: tuple[int, int]) -> Flags:
        """Give the mask [H, W] of all pixels whose centre lies in one of the polygons."""
        height, width = size
        mask = np.zeros(size, bool)  # [H, W]
        for part in self.parts:
            x, y = part[:, 0] * (width / of[1]), part[:, 1] * (height / of[0])  # [k], [k]
            x2, y2 = np.roll(x, -1), np.roll(y, -1)  # [k], [k]
            top, low = (int(np.clip(side, 0, height)) for side in (np.floor(y.min()), np.ceil(y.max())))
            left, right = (int(np.clip(side, 0, width)) for side in (np.floor(x.min()), np.ceil(x.max())))
            middle = np.arange(top, low)[:, None] + 0.5  # [h, 1]
            row, edge = np.nonzero((y <= middle) != (y2 <= middle))  # [m], [m]: where an edge crosses a row of centres
            at = x[edge] + (row + top + 0.5 - y[edge]) * (x2[edge] - x[edge]) / (y2[edge] - y[edge])  # [m]
            # The first centre to the right of a crossing, counted in the part's own window; the last column is outside.
            column = np.clip(np.ceil(at - 0.5) - left, 0, right - left).astype(np.int64)  # [m]
            line = right - left + 1
            crossings = np.bincount(row * line + column, minlength=(low - top) * line).reshape(-1, line)  # [h, w + 1]
            mask[top:low, left:right] |= np.cumsum(crossings, axis=1)[:, :-1] % 2 == 1
        return mask


@dataclass(frozen=True, eq=False)
class Runs:
    """An object by the lengths of runs of pixels column by column, in turn outside of it and inside."""

    counts: NDArray[np.int64]
    size: tuple[int, int]

    def fill(self, size: tuple[int, int], of: tuple[int, int]) -> Flags:
        """Give the mask [H, W], resized by the nearest pixel."""
        inside = np.arange(len(self.counts)) % 2 == 1
        mask = np.repeat(inside, self.counts).reshape(self.size[1], self.size[0]).T  # [h, w]
        rows, columns = (
            np.minimum(((np.arange(new) + 0.5) * (old / new)).astype(np.int64), old - 1)
            for new, old in zip(size, self.size)
        )
        return mask[rows[:, None], columns[None]]  # [H, W]


def letters_to_counts(letters: str) -> list[int]:
    """Read the lengths of runs from COCO's letters: 5 bits each, the sixth says that more follow, differences from #4.

    Raises `ValueError` where a number is cut off.
    """
    counts: list[int] = []
    value = shift = 0
    for letter in letters.encode("ascii"):
        bits = letter - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("the letters end within a number")
    return counts


class COCOImages:
    """The images of a COCO file, as a source without labels."""

    def __init__(self, folder: Path, names: Sequence[str], description: str) -> None:
        self._folder, self._names = str(folder), list(names)
        self.labels: NDArray[np.int64] | None = None
        self.classes: tuple[str, ...] | None = None
        # Sizes are not asked for: that would take a minute for a hundred thousand files on a slow disk.
        self.fingerprint = hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()
        self.description = description

    def __len__(self) -> int:
        return len(self._names)

    def read(self, i: int) -> bytes:
        """Give the file's bytes. Raises `Undecodable` where the file cannot be read."""
        try:
            return Path(self.name(i)).read_bytes()
        except OSError as error:
            raise Undecodable(f"it cannot be read: {error.strerror}") from error

    def name(self, i: int) -> str:
        """Give the file's path."""
        return os.path.join(self._folder, self._names[i])


def is_coco(data: str) -> bool:
    """Whether a path names a set in COCO's layout."""
    path = Path(data).expanduser()
    return path.suffix == ".json" or (path / "annotations").is_dir()


def annotation_file(data: str, split: str) -> Path:
    """Find the file of a split: `train2017`, or `train` where one file alone begins so. A file is its own split.

    Raises `UserError` that names the splits there are.
    """
    path = Path(data).expanduser()
    if path.suffix == ".json":
        if not path.is_file():
            raise UserError(f"{path} does not exist. Give a file of annotations in COCO's layout.")
        return path
    found = {_split_of(file): file for file in sorted((path / "annotations").glob("*.json")) if _has_boxes(file)}
    near = [file for name, file in found.items() if name.startswith(split)]
    if split in found or len(near) == 1:
        return found[split] if split in found else near[0]
    there = ", ".join(found) or "none"
    raise UserError(f"{path / 'annotations'} has no file instances_{split}.json. Splits with boxes: {there}.")


def coco_scenes(file: Path, *, masks: bool, say: Callable[[str], None]) -> Scenes:
    """Read a file of annotations, with outlines where `masks` are wanted.

    Missing images and boxes that cannot be used are named and left out. Raises `UserError` where the file is no such
    file, where an annotation lacks what it must have, or where no image is left.
    """
    content, faults = _load(file), Faults()
    classes, label_of = _classes(content["categories"], file)
    folder = _folder(file, content["images"])
    there = _listing(folder, content["images"])
    names: list[str] = []
    sizes: list[tuple[int, int]] = []
    place: dict[int, int] = {}
    for image in content["images"]:
        if image["file_name"] not in there:
            faults.add("images are missing and are left out", f"{folder / image['file_name']} of {file}")
            continue
        place[image["id"]] = len(names)
        names.append(image["file_name"])
        sizes.append((int(image.get("height") or 0), int(image.get("width") or 0)))
    if not names:
        raise UserError(f"{file} names {len(content['images']):,} images and none is in {folder}.")
    rows: list[list[dict[str, Any]]] = [[] for _ in names]
    known = {image["id"] for image in content["images"]}
    for one in content["annotations"]:
        where = f"{file}, annotation {one.get('id')}"
        if one["image_id"] not in known:
            faults.add("annotations are of no image in the file and are left out", where)
        elif one["image_id"] in place:
            if one["category_id"] in label_of:
                rows[place[one["image_id"]]].append(one)
            else:
                faults.add("annotations are of no class in the file and are left out", where)
    objects = [_objects(mine, label_of, size, masks=masks, file=file, faults=faults) for mine, size in zip(rows, sizes)]
    faults.tell(say)
    count = sum(len(one.labels) for one in objects)
    source = COCOImages(folder, names, f"{len(names):,} images of {file}, {count:,} objects")
    return Scenes(source, objects, classes, "coco")


def _objects(
    rows: list[dict[str, Any]],
    label_of: dict[int, int],
    size: tuple[int, int],
    *,
    masks: bool,
    file: Path,
    faults: Faults,
) -> Objects:
    where = [f"{file}, annotation {one.get('id')}" for one in rows]
    corners: Floats = np.array([_corners(one, place) for one, place in zip(rows, where)], np.float64).reshape(-1, 4)
    corners, kept = faults.boxes(corners, size, where)
    crowd = np.array([_is_crowd(one, place) for one, place in zip(rows, where)], bool)  # [n]
    outlines: list[Outline] = []
    if masks:
        for i, one in enumerate(rows):
            outline = _outline(one.get("segmentation"), where[i])
            if outline is None:
                kept[i] = False
                faults.add("objects have no outline and are left out", where[i])
            elif isinstance(outline, Runs) and all(size) and outline.size != size:
                kept[i] = False
                faults.add("outlines are of another size than their image and are left out", where[i])
            outlines.append(outline or Polygons(()))
    given = [_area(one, place) for one, place in zip(rows, where)]
    box = (corners[:, 2:] - corners[:, :2]).prod(axis=1).tolist()  # [n]
    areas = np.array([area or own for area, own in zip(given, box)], np.float64)  # [n]
    labels = np.array([label_of[one["category_id"]] for one in rows], np.int64)  # [n]
    none = np.zeros(len(rows), bool)  # [n]
    return Objects(corners, labels, none, crowd, areas, tuple(outlines) if masks else None, size).some(kept)


def _corners(one: dict[str, Any], where: str) -> tuple[float, float, float, float]:
    try:
        x, y, width, height = (float(number) for number in one["bbox"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{where}: bbox is {one.get('bbox')!r}; expected [x, y, width, height].") from None
    if not np.isfinite([x, y, width, height]).all():
        raise UserError(f"{where}: bbox is {one['bbox']!r}, which are not all numbers.")
    return x, y, x + width, y + height


def _is_crowd(one: dict[str, Any], where: str) -> bool:
    if one.get("iscrowd", 0) not in (0, 1):
        raise UserError(f"{where}: iscrowd is 0 or 1, not {one['iscrowd']!r}.")
    return bool(one.get("iscrowd", 0))


def _area(one: dict[str, Any], where: str) -> float:
    area = one.get("area") or 0.0
    if not isinstance(area, int | float) or not 0 <= area < np.inf:
        raise UserError(f"{where}: area is a number of pixels, not {area!r}.")
    return float(area)


def _outline(given: Any, where: str) -> Outline | None:
    """Read a segmentation: polygons, or runs as numbers or letters; None where it holds nothing."""
    try:
        if isinstance(given, dict):
            size = int(given["size"][0]), int(given["size"][1])
            counts = given["counts"]
            runs = np.array(letters_to_counts(counts) if isinstance(counts, str) else counts, np.int64)  # [r]
            if runs.sum() != size[0] * size[1] or (runs < 0).any():
                raise ValueError("runs do not fill their size")
            return Runs(runs, size)
        # Two corners make a line, which holds nothing.
        parts = tuple(np.array(part, np.float32).reshape(-1, 2) for part in given or () if len(part) >= 6)
        return Polygons(parts) if parts else None
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{where}: its segmentation is neither polygons nor runs ({error}).") from error


def _load(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{file} is no JSON: {error}.") from error
    lists = ("images", "annotations", "categories")
    missing = [key for key in lists if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing:
        raise UserError(f"{file} has no list {', '.join(missing)}; expected COCO's images, annotations and categories.")
    known: set[int | str] = set()
    for image in content["images"]:
        if not isinstance(image, dict) or not _is_id(image.get("id")) or not isinstance(image.get("file_name"), str):
            raise UserError(f"{file}: an image needs an id and a file_name, got {str(image)[:100]}.")
        if image["id"] in known:
            raise UserError(f"{file}: two images have the id {image['id']}. Give each its own, also in annotations.")
        known.add(image["id"])
        sides = [image.get(side) or 0 for side in ("height", "width")]
        if not all(isinstance(side, int | float) and 0 <= side < np.inf for side in sides):
            raise UserError(f"{file}: the image {image['file_name']} has no size in pixels, but {sides}.")
    for one in content["annotations"]:
        if not isinstance(one, dict) or not all(_is_id(one.get(key)) for key in ("image_id", "category_id")):
            raise UserError(f"{file}: an annotation needs an image_id and a category_id, got {str(one)[:100]}.")
    return content  # type: ignore[no-any-return]


def _is_id(given: object) -> bool:
    return isinstance(given, int | float | str)


def _classes(categories: list[Any], file: Path) -> tuple[tuple[str, ...], dict[int, int]]:
    """The names, and each category's place among them; ids need not be gapless, COCO's own are not."""
    try:
        rows = sorted((int(one["id"]), str(one["name"])) for one in categories)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{file}: a category needs an id, a whole number, and a name.") from None
    names = tuple(name for _, name in rows)
    if not rows or len({id for id, _ in rows}) < len(rows) or len(set(names)) < len(names):
        raise UserError(f"{file} needs categories with ids and names of their own, got {', '.join(names) or 'none'}.")
    return names, {id: label for label, (id, _) in enumerate(rows)}


def _split_of(file: Path) -> str:
    return _PREFIX.sub("", file.stem) or file.stem


def _has_boxes(file: Path) -> bool:
    return not re.match(r"(captions|person_keypoints|stuff|panoptic|image_info)", file.name)


def _folder(file: Path, images: list[dict[str, Any]]) -> Path:
    """The folder that the images lie in: where the first ones that are anywhere are."""
    split = _split_of(file)
    above = file.parent.parent
    places = [above / split, file.parent, file.parent / "images", above / "images" / split, above / "images", above]
    for image in images[:100]:
        for place in places:
            if (place / image["file_name"]).is_file():
                return place
    looked = ", ".join(map(str, places))
    raise UserError(f"None of the first images of {file} is in any of {looked}. Put its images in one of these.")


def _listing(folder: Path, images: list[dict[str, Any]]) -> set[str]:
    """Which of the images are there; a folder is listed once rather than asked a hundred thousand times."""
    wanted = {image["file_name"] for image in images}
    found: set[str] = set()
    for below in {os.path.dirname(name) for name in wanted}:
        try:
            found |= {os.path.join(below, entry.name) for entry in os.scandir(folder / below)}
        except OSError:
            continue
    return wanted & found
