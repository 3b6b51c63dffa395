# SPDX-License-Identifier: Apache-2.0
"""Images with masks in the layouts that are read, written for a test: bright shapes whose colour says their class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from kinfold.data.annotated.mask_crops import Crops
from kinfold.encoders import Backbone, build_backbone
from kinfold.evaluate import FrozenBackbone
from kinfold.evaluate.protocol import Request
from kinfold.evaluate.segmentation.masked import Masked, open_masked
from kinfold.evaluate.segmentation.picture import palette

COLOURS = np.array([[40, 40, 40], [220, 60, 60], [60, 220, 60]], np.uint8)
"""of background, class 1 and class 2"""


def scene(number: int, *, height: int = 40, width: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """A noisy image [H, W, 3] of two rectangles, and its mask [H, W] with a void border on one of them."""
    random = np.random.default_rng(number)
    mask = np.zeros((height, width), np.uint8)
    for label in (1, 2):
        top, left = random.integers(0, height - 18), random.integers(0, width - 18)
        mask[top : top + 18, left : left + 18] = label
    image = COLOURS[mask].astype(np.int64) + random.integers(-30, 31, (height, width, 3))
    mask[0, :] = 255
    return image.clip(0, 255).astype(np.uint8), mask


def save_mask(mask: np.ndarray, path: Path, *, colours: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask)
    if colours:
        image = image.convert("P")
        image.putdata(mask.ravel().tolist())
        image.putpalette(palette().ravel().tolist())
    image.save(path)


def save_image(image: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, quality=95)  # PNG takes no notice


def write_voc(
    root: Path,
    splits: Mapping[str, Sequence[str]],
    *,
    masks: str = "SegmentationClass",
    classes: str = "red\ngreen\n",
    shown: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
) -> Path:
    """Write scenes, their masks and the lists; `shown` are images that are other ones."""
    ids = dict.fromkeys(id for some in splits.values() for id in some)
    for number, id in enumerate(ids):
        image, mask = (shown or {}).get(id) or scene(number)
        save_image(image, root / "JPEGImages" / f"{id}.jpg")
        save_mask(mask, root / masks / f"{id}.png")
    for name, some in splits.items():
        write_list(root, name, some)
    (root / "classes.txt").write_text(classes)
    return root


def write_list(root: Path, split: str, lines: Sequence[str]) -> Path:
    path = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def shapes(root: Path, *, train: int = 24, test: int = 6) -> Path:
    """A set that can be learned, in VOC's layout."""
    ids = [f"{number:03}" for number in range(train + test)]
    return write_voc(root / "VOCshapes", {"train": ids[:train], "val": ids[train:]})


def opened(root: Path, **conditions: Any) -> Masked:
    """Open the usual splits; remarks go nowhere unless `say` is given."""
    return open_masked(Request(str(root)), SEED, {"say": lambda text: None, **conditions})


class _Seed:
    seed = 0


SEED = _Seed()

SMALL = Crops(size=33, scale=(0.8, 1.25))


def small_resnet(*, channels: int = 3) -> FrozenBackbone:
    torch.manual_seed(0)
    module = build_backbone(Backbone(name="resnet10_w8", stem="small"), channels)
    return FrozenBackbone(module=module, size=32, channels=channels, mean=(0.3,) * channels, std=(0.3,) * channels)
