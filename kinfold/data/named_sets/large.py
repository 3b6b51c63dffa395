# SPDX-License-Identifier: Apache-2.0
"""How the large labelled sets of linear evaluation lie on the disk: Places and iNaturalist 2018, with their lists.

Their images lie in folders within folders (`images256/a/abbey/`), so that the first folder says no class: the lists do.
No test labels are public, and the validation images are what is asked. Sets whose first folder is the class (ImageNet,
iNaturalist 2021, Places365 as `train/` and `val/`) are read as any folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kinfold.data.named_sets.small import Entry, Listed, read_lines, read_text
from kinfold.errors import UserError


def places205(base: Path, split: str) -> Listed:
    """Places205 (Zhou et al., NIPS 2014), resized to 256 x 256 pixels: lines of a path and a number from 0."""
    file = base / "trainvalsplit_places205" / f"{split}_places205.csv"
    images = _first(base, "data/vision/torralba/deeplearning/images256", "images256")
    entries = _numbered(file, images, classes=205)
    names = {entry.label: "/".join(entry.path.removeprefix(f"{images}/").split("/")[1:-1]) for entry in entries}
    return Listed(file, "line", entries, tuple(names.get(label, str(label)) for label in range(205)))


def places365(base: Path, split: str) -> Listed:
    """Places365-Standard (Zhou et al., 2018) as torchvision lays it out, of either size."""
    words = [line.split() for _, line in read_lines(base / "categories_places365.txt")]
    classes = tuple(word[0].split("/", 2)[-1] for word in sorted(words, key=lambda word: int(word[1])))
    if split == "train":
        file = base / "places365_train_standard.txt"
        images = _first(base, "data_256_standard", "data_256", "data_large_standard", "data_large")
    else:
        file = base / "places365_val.txt"
        images = _first(base, "val_256", "val_large")
    return Listed(file, "line", _numbered(file, images, classes=len(classes)), classes)


def inaturalist2018(base: Path, split: str) -> Listed:
    """iNaturalist 2018 (Van Horn et al., CVPR 2018): 8,142 species, listed as COCO lists its annotations."""
    file = base / f"{split}2018.json"
    try:
        found: dict[str, Any] = json.loads(read_text(file))
        names = {int(row["id"]): str(row["name"]) for row in found["categories"]}
        label_of = {row["image_id"]: int(row["category_id"]) for row in found["annotations"]}
        rows = [(str(row["file_name"]), label_of[row["id"]]) for row in found["images"]]
    except ValueError as error:
        raise UserError(f"{file} is no JSON: {error}. Unpack the archive again.") from error
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{file} is not as iNaturalist lists images ({error!r}). Expected images with file_name and id, "
            "annotations with image_id and category_id, and categories with id and name."
        ) from error
    classes = tuple(names.get(label, str(label)) for label in range(max(names, default=-1) + 1))
    entries = [Entry(path, label, place) for place, (path, label) in enumerate(rows, 1)]
    for entry in entries:
        if entry.label not in names:
            raise UserError(f"{file}, image {entry.place}: class {entry.label} is none of its {len(names)} categories.")
    return Listed(file, "image", entries, classes)


def _first(base: Path, *folders: str) -> str:
    """Give the first of the folders that is there. Raises `UserError` that names them all."""
    for folder in folders:
        if (base / folder).is_dir():
            return folder
    raise UserError(f"{base} holds none of the folders {', '.join(folders)}. Unpack the archive of the images into it.")


def _numbered(file: Path, images: str, *, classes: int) -> list[Entry]:
    """Read lines of a path below `images` and a label. Raises `UserError` with the line."""
    entries = []
    for place, line in read_lines(file):
        path, _, label = line.rpartition(" ")
        if not label.isdigit() or int(label) >= classes:
            raise UserError(f"{file}, line {place}: expected a path and a class below {classes}, got {line!r}.")
        entries.append(Entry(f"{images}/{path.strip().lstrip('/')}", int(label), place))
    return entries
