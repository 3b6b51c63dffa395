# SPDX-License-Identifier: Apache-2.0
"""What a trained detector finds on images that were not learned from: numbers, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist
from torchvision.models.detection.roi_heads import paste_masks_in_image

from kinfold import distributed
from kinfold.console import bar
from kinfold.data.annotated.scenes import Objects, Scenes, Showing, resized
from kinfold.data.crop import crop_resize
from kinfold.data.work import Task, no_readable_image, read, run
from kinfold.errors import UserError
from kinfold.evaluate.conditions import Conditions
from kinfold.evaluate.detection.boxes import (
    THRESHOLDS,
    Floats,
    Overlaps,
    box_areas,
    box_overlaps,
    coco_ap,
    mask_overlaps,
    mean_ap,
    voc_ap,
)
from kinfold.evaluate.detection.detectors import Detector
from kinfold.evaluate.features import frozen, left_out

T = TypeVar("T")
_COLOURS = (
    "#e6194b",
    "#3cb44b",
    "#4363d8",
    "#f58231",
    "#911eb4",
    "#008080",
    "#f032e6",
    "#9a6324",
    "#808000",
    "#000075",
)


class Found(NamedTuple):
    """The d detections of one image, in its own pixels, by falling score."""

    boxes: Floats
    """[d, 4]"""
    scores: Floats
    """[d]"""
    labels: np.typing.NDArray[np.int64]
    """[d], from 0"""


def measure_detections(
    model: Detector, scenes: Scenes, conditions: Conditions, *, short: int, longest: int, channels: int, drawn: int
) -> dict[str, float]:
    """Ask a detector about all images, and give average precisions in percent.

    The first `drawn` images go into a picture beside the result. Images that do not decode are named and left out.
    Several processes share the images. Raises `UserError` where no image decodes or no object has to be found.
    """
    mine = range(distributed.rank(), len(scenes), distributed.world())
    tasks = [Task(0, np.array([position])) for position in mine]
    asked: dict[int, list[Overlaps]] = {}
    shown: dict[int, Found] = {}
    bad: dict[int, str] = {}
    odd: dict[int, str] = {}
    work = Showing(scenes.source, short, longest, channels)
    with bar("detections", len(tasks)) as advance, frozen(model):
        for one in run(work, tasks, workers=conditions.workers):
            advance(1)
            if one.image is None:
                bad[one.position] = one.reason
                continue
            # One at a time: beside a larger image it would get a wider margin, and other values at its edge.
            result = full_size(model([one.image])[0], (one.image.shape[1], one.image.shape[2]), one.size)
            found = Found(*(result[name].cpu().numpy() for name in ("boxes", "scores", "labels")))
            found = Found(found.boxes.astype(np.float64), found.scores.astype(np.float64), found.labels - 1)
            if (what := scenes.objects[one.position].other_size(one.size)) is not None:
                odd[one.position] = what
            asked[one.position] = overlaps(found, scenes.objects[one.position], result.get("masks"), one.size)
            shown |= {one.position: found} if one.position < drawn else {}
    bad, shown = distributed.join(bad), _joined(shown)
    images = [image for _, image in sorted(_joined(asked).items())]
    if not images:
        raise UserError(no_readable_image(scenes.source, bad))
    remark = left_out(scenes.source, bad)
    if remark is not None:
        conditions.say(remark)
    scenes.tell_odd(distributed.join(odd), conditions.say)
    if conditions.progress is not None and drawn and distributed.is_main():
        path = conditions.progress.with_suffix(".png")
        draw(path, scenes, dict(sorted(shown.items())), channels)
        conditions.say(f"{len(shown)} test images with what was found are drawn in {path}.")
    return _values(images, scenes, conditions)


def full_size(found: dict[str, Tensor], of: tuple[int, int], size: tuple[int, int]) -> dict[str, Tensor]:
    """Bring detections in an image of height and width `of` to its whole size; masks become bool [d, H, W]."""
    scale = torch.tensor([size[1] / of[1], size[0] / of[0]] * 2, device=found["boxes"].device)  # [4]
    result = {**found, "boxes": found["boxes"] * scale}
    if "masks" in found:
        result["masks"] = paste_masks_in_image(found["masks"], result["boxes"], size)[:, 0] >= 0.5  # [d, H, W]
    return result


def overlaps(found: Found, truth: Objects, masks: Tensor | None, size: tuple[int, int]) -> list[Overlaps]:
    """Compare detections with the objects of an image of (height, width): by boxes, and by masks [d, H, W] if given."""
    ignore = truth.difficult | truth.crowd  # [G]
    facts = (truth.labels, truth.areas, ignore, truth.crowd)
    iou = box_overlaps(found.boxes, truth.boxes, truth.crowd)  # [d, G]
    result = [Overlaps(found.scores, found.labels, box_areas(found.boxes), *facts, iou)]
    if masks is not None:
        own = masks.cpu().numpy()  # [d, H, W]
        others = np.zeros((len(truth.labels), *size), bool)  # [G, H, W]
        for row, outline in enumerate(truth.outlines or ()):
            others[row] = outline.fill(size, size)
        iou = mask_overlaps(own, others, truth.crowd)  # [d, G]
        result.append(Overlaps(found.scores, found.labels, own.sum(axis=(1, 2)).astype(np.float64), *facts, iou))
    return result


def _joined(part: dict[int, T]) -> dict[int, T]:
    """The entries of all processes."""
    if distributed.world() == 1:
        return part
    parts: list[dict[int, T]] = [{} for _ in range(distributed.world())]
    dist.all_gather_object(parts, part)
    return {position: value for each in parts for position, value in each.items()}


def _values(images: list[list[Overlaps]], scenes: Scenes, conditions: Conditions) -> dict[str, float]:
    """Name the numbers, in percent; what is not defined is named and left out."""
    boxes = [image[0] for image in images]
    classes = len(scenes.classes)
    needed = np.concatenate([image.truth_labels[~image.ignore] for image in boxes])
    never = [name for label, name in enumerate(scenes.classes) if label not in needed]
    if len(never) == classes:
        raise UserError(f"No test image shows an object that has to be found: {scenes.source.description}.")
    if never:
        conditions.say(
            f"{len(never)} of {classes} classes are in no test image and are left out of the mean, which is over "
            f"{classes - len(never)}: {', '.join(never)}"
        )
    by_coco = coco_ap(boxes, classes)
    if scenes.layout == "coco":
        own = by_coco["AP"]  # [T, C]
        values = _summary("", own)
        values |= {f"{name}": mean_ap(by_coco[name]) for name in ("APs", "APm", "APl")}
    else:
        points, area = voc_ap(boxes, classes)  # [T, C], [T, C]
        own = points if scenes.layout == "voc-2007" else area
        values = _summary("", own) | _summary("coco/", by_coco["AP"])
        values |= {"AP50/11-point": mean_ap(points[0]), "AP50/area": mean_ap(area[0])}
    if len(images[0]) > 1:
        by_mask = coco_ap([image[1] for image in images], classes)
        values |= _summary("mask/", by_mask["AP"])
        values |= {f"mask/{name}": mean_ap(by_mask[name]) for name in ("APs", "APm", "APl")}
    values |= {f"AP50/{name}": float(own[0, label]) for label, name in enumerate(scenes.classes)}
    return {name: 100.0 * value for name, value in values.items() if not np.isnan(value)}


def _summary(prefix: str, table: Floats) -> dict[str, float]:
    """AP over all thresholds, and of 0.50 and 0.75; table [T, C]."""
    assert np.isclose(THRESHOLDS[5], 0.75)
    return {f"{prefix}AP": mean_ap(table), f"{prefix}AP50": mean_ap(table[0]), f"{prefix}AP75": mean_ap(table[5])}


def draw(path: Path, scenes: Scenes, shown: dict[int, Found], channels: int, *, side: int = 240) -> None:
    """Write a picture of images, one a row: the truth, and what was found with a score of at least one half."""
    from PIL import Image

    rows = []
    for position, found in shown.items():
        pixels = read(scenes.source, position, channels)
        size = pixels.shape[0], pixels.shape[1]
        new = resized(size, side, 2 * side)
        image = crop_resize(pixels, (0, 0, *size), new)  # [C, h, w]
        image = image.expand(3, *new) if len(image) == 1 else image[:3]  # [3, h, w]
        scale = np.array([new[1] / size[1], new[0] / size[0]] * 2)  # [4]
        truth, sure = scenes.objects[position], found.scores >= 0.5  # [d]
        left = _boxes(image, truth.boxes * scale, [scenes.classes[label] for label in truth.labels], truth.labels)
        said = [f"{scenes.classes[k]} {s:.2f}" for k, s in zip(found.labels[sure], found.scores[sure])]
        right = _boxes(image, found.boxes[sure] * scale, said, found.labels[sure])
        gap = torch.full((3, new[0], 4), 255, dtype=torch.uint8)  # [3, h, 4]
        rows.append(torch.cat([left, gap, right], dim=2))  # [3, h, 2 w + 4]
    if not rows:
        return
    wide = max(row.shape[2] for row in rows)
    rows = [torch.nn.functional.pad(row, (0, wide - row.shape[2], 0, 4), value=255) for row in rows]
    picture = torch.cat(rows, dim=1).permute(1, 2, 0).numpy()  # [H, W, 3]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).quantize(200).save(path, optimize=True)


def _boxes(image: Tensor, boxes: Floats, names: Sequence[str], labels: np.typing.NDArray[np.int64]) -> Tensor:
    from torchvision.utils import draw_bounding_boxes

    if not len(boxes):
        return image
    colours = [_COLOURS[label % len(_COLOURS)] for label in labels.tolist()]
    drawn: Tensor = draw_bounding_boxes(image, torch.from_numpy(boxes), list(names), colors=colours, width=2)
    return drawn
