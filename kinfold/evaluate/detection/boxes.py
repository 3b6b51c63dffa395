# SPDX-License-Identifier: Apache-2.0
"""Average precision of detections, in COCO's definition and in VOC's.

Boxes are continuous: (x1, y1, x2, y2) with x2 - x1 the width. VOC counts pixels from 1 and includes the last one; its
box (1, 1, w, h) is (0, 0, w, h) here, so the overlaps are the same numbers. Results are shares, not percent.

- COCO: mean over the overlaps 0.50, 0.55, ..., 0.95 and over classes of the precision's envelope at 101 recalls; at
  most 100 detections of a class in an image. A detection takes the free object that it overlaps most, and an ignored
  one only where there is no other; crowds may be taken by many (pycocotools, `cocoeval.py`).
- VOC: a detection looks at the object that it overlaps most, and only at that; difficult objects count neither way.
  The area under the envelope (from 2010 on), or its mean at 11 recalls (2007).

Differs: detectron2, which MoCo reports VOC by, rounds scores to three digits and corners to one before it counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kinfold.evaluate.average_precision import Curve, all_point, eleven_point

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

THRESHOLDS: Floats = np.linspace(0.5, 0.95, 10)
"""[10]: overlaps from which on a detection may be right"""
_RECALLS: Floats = np.linspace(0.0, 1.0, 101)  # [101]
_AREAS = {"AP": (0.0, 1e10), "APs": (0.0, 32.0**2), "APm": (32.0**2, 96.0**2), "APl": (96.0**2, 1e10)}


class Overlaps(NamedTuple):
    """All that average precision needs to know of one image: D detections, G objects, and how they overlap."""

    scores: Floats
    """[D]"""
    labels: NDArray[np.int64]
    """[D]"""
    areas: Floats
    """[D], in pixels"""
    truth_labels: NDArray[np.int64]
    """[G]"""
    truth_areas: Floats
    """[G], in pixels, of the object itself where its outline is known"""
    ignore: Flags
    """[G]: difficult objects and crowds, which need not be found"""
    crowd: Flags
    """[G]: many objects in one, any number of which may be found"""
    iou: Floats
    """[D, G]: intersection over union, with a crowd over the detection's own area"""


def box_areas(boxes: Floats) -> Floats:
    """Give the areas [n] of boxes [n, 4]."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])  # [n]


def box_overlaps(boxes: Floats, others: Floats, crowd: Flags) -> Floats:
    """Give the overlaps [D, G] of boxes [D, 4] with others [G, 4], of which some are crowds [G]."""
    corner = np.maximum(boxes[:, None, :2], others[None, :, :2])  # [D, G, 2]
    sides = np.minimum(boxes[:, None, 2:], others[None, :, 2:]) - corner  # [D, G, 2]
    common = np.where((sides > 0).all(axis=2), sides[..., 0] * sides[..., 1], 0.0)  # [D, G]
    return _over_union(common, box_areas(boxes), box_areas(others), crowd)


def mask_overlaps(masks: Flags, others: Flags, crowd: Flags) -> Floats:
    """Give the overlaps [D, G] of masks [D, H, W] with others [G, H, W], of which some are crowds [G]."""
    pixels = int(np.prod(masks.shape[1:]))
    first, second = masks.reshape(len(masks), pixels), others.reshape(len(others), pixels)  # [D, HW], [G, HW]
    # Whole numbers below 2**24 are exact in float32, whose product is fast.
    exact = np.float32 if pixels < 2**24 else np.float64
    common = (first.astype(exact) @ second.T.astype(exact)).astype(np.float64)  # [D, G]
    return _over_union(common, first.sum(1, dtype=np.float64), second.sum(1, dtype=np.float64), crowd)


def _over_union(common: Floats, areas: Floats, others: Floats, crowd: Flags) -> Floats:
    union = np.where(crowd[None], areas[:, None], areas[:, None] + others[None] - common)  # [D, G]
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)  # [D, G]


def coco_ap(images: Sequence[Overlaps], classes: int, *, most: int = 100) -> dict[str, Floats]:
    """Give each class's average precision at each of `THRESHOLDS` as COCO defines it: [T, C] each.

    "AP" is of all objects, "APs" of those below 32², "APm" below 96², "APl" above; NaN for a class without any.
    """
    tables = {name: np.full((len(THRESHOLDS), classes), np.nan) for name in _AREAS}  # each [T, C]
    for label, mine in enumerate(_by_class(images, classes, most)):
        for name, (low, high) in _AREAS.items():
            tables[name][:, label] = _coco_class(mine, low, high)
    return tables


def voc_ap(images: Sequence[Overlaps], classes: int) -> tuple[Floats, Floats]:
    """Give each class's average precision at each of `THRESHOLDS`: 11-point [T, C] and area [T, C].

    NaN for a class of which no object has to be found.
    """
    shape = (len(THRESHOLDS), classes)
    points, area = np.full(shape, np.nan), np.full(shape, np.nan)  # [T, C], [T, C]
    for label, mine in enumerate(_by_class(images, classes, None)):
        positives = sum(int((~image.ignore).sum()) for image in mine)
        if not positives:
            continue
        right, wrong = (np.concatenate(some, axis=1) for some in zip(*(_voc_image(image) for image in mine)))  # [T, D]
        order = np.argsort(-np.concatenate([image.scores for image in mine]), kind="stable")  # [D]
        for row, (hits, misses) in enumerate(zip(right[:, order], wrong[:, order])):
            taken = np.cumsum(hits) + np.cumsum(misses)  # [D]
            seen = taken > 0  # before the first that counts there is no precision
            curve = Curve(np.cumsum(hits)[seen], taken[seen], positives)
            points[row, label], area[row, label] = eleven_point(curve), all_point(curve)
    return points, area


def mean_ap(table: Floats) -> float:
    """The mean of a table [..., C] over what is defined; NaN where nothing is."""
    known = table[~np.isnan(table)]
    return float(known.mean()) if len(known) else float("nan")


def _by_class(images: Sequence[Overlaps], classes: int, most: int | None) -> list[list[Overlaps]]:
    """Each class's part of the images that have any of it, the detections in order of falling score."""
    parts: list[list[Overlaps]] = [[] for _ in range(classes)]
    for image in images:
        for label in np.union1d(image.labels, image.truth_labels).tolist():
            rows = np.flatnonzero(image.labels == label)  # [d]
            rows = rows[np.argsort(-image.scores[rows], kind="stable")][:most]
            columns = np.flatnonzero(image.truth_labels == label)  # [g]
            parts[label].append(
                Overlaps(
                    image.scores[rows],
                    image.labels[rows],
                    image.areas[rows],
                    image.truth_labels[columns],
                    image.truth_areas[columns],
                    image.ignore[columns],
                    image.crowd[columns],
                    image.iou[np.ix_(rows, columns)],
                )
            )
    return parts


def _coco_class(images: list[Overlaps], low: float, high: float) -> Floats:
    """COCO's average precision [T] of one class, for objects with an area from `low` to `high`."""
    ignores = [image.ignore | (image.truth_areas < low) | (image.truth_areas > high) for image in images]
    positives = sum(int((~ignore).sum()) for ignore in ignores)
    if not positives:
        return np.full(len(THRESHOLDS), np.nan)
    counted, right = [], []
    for image, ignore in zip(images, ignores):
        hit, excused = _coco_image(image.iou, ignore, image.crowd)  # [T, D], [T, D]
        excused |= ~hit & ((image.areas < low) | (image.areas > high))
        counted.append(~excused)
        right.append(hit & ~excused)
    order = np.argsort(-np.concatenate([image.scores for image in images]), kind="stable")  # [D]
    hits = np.cumsum(np.concatenate(right, axis=1)[:, order], axis=1)  # [T, D]
    taken = np.cumsum(np.concatenate(counted, axis=1)[:, order], axis=1)  # [T, D]
    precision = hits / np.maximum(taken, 1)  # [T, D]
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]  # [T, D]
    envelope = np.concatenate([envelope, np.zeros((len(envelope), 1))], axis=1)  # [T, D + 1]
    recall = hits / positives  # [T, D]
    return np.array([line[np.searchsorted(r, _RECALLS)].mean() for line, r in zip(envelope, recall)])  # [T]


def _coco_image(iou: Floats, ignore: Flags, crowd: Flags) -> tuple[Flags, Flags]:
    """Match detections in their order, at all thresholds at once: which have an object, whose object is ignored."""
    count, others = iou.shape
    hit, excused = np.zeros((2, len(THRESHOLDS), count), bool)  # [T, D], [T, D]
    if not others:
        return hit, excused
    taken = np.zeros((len(THRESHOLDS), others), bool)  # [T, G]
    least = np.minimum(THRESHOLDS, 1.0 - 1e-10)[:, None]  # [T, 1]
    for d in range(count):
        free = (iou[d] >= least) & (~taken | crowd)  # [T, G]
        proper = free & ~ignore
        free = np.where(proper.any(axis=1, keepdims=True), proper, free)
        # Of equal overlaps the last counts.
        best = others - 1 - np.argmax(np.where(free, iou[d], -1.0)[:, ::-1], axis=1)  # [T]
        hit[:, d] = free.any(axis=1)
        excused[:, d] = hit[:, d] & ignore[best]
        taken[hit[:, d], best[hit[:, d]]] = True
    return hit, excused


def _voc_image(image: Overlaps) -> tuple[Flags, Flags]:
    """Which detections are right [T, D] and which are wrong [T, D], in their order; some are neither."""
    count, others = image.iou.shape
    right, wrong = np.zeros((2, len(THRESHOLDS), count), bool)  # [T, D], [T, D]
    taken = np.zeros((len(THRESHOLDS), others), bool)  # [T, G]
    for d in range(count):
        if not others:
            wrong[:, d] = True
            continue
        best = int(image.iou[d].argmax())
        near = image.iou[d, best] > THRESHOLDS  # [T]
        wrong[:, d] = ~near
        if not image.ignore[best]:
            right[:, d] = near & ~taken[:, best]
            wrong[:, d] |= near & taken[:, best]
            taken[:, best] |= near
    return right, wrong
