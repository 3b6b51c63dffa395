# SPDX-License-Identifier: Apache-2.0
"""Average precision of detections: against pycocotools, against VOC's definition spelled out, and by hand."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kinfold.evaluate.detection.boxes import (
    THRESHOLDS,
    Overlaps,
    box_areas,
    box_overlaps,
    coco_ap,
    mask_overlaps,
    mean_ap,
    voc_ap,
)

CLASSES = 3
SIDE = 200.0


def image_of(
    found: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    truth: np.ndarray,
    truth_labels: np.ndarray,
    *,
    crowd: np.ndarray | None = None,
    difficult: np.ndarray | None = None,
) -> Overlaps:
    """One image's overlaps of boxes [d, 4] with boxes [g, 4]."""
    none = np.zeros(len(truth), bool)
    crowd = none if crowd is None else crowd
    difficult = none if difficult is None else difficult
    found, truth = found.reshape(-1, 4).astype(float), truth.reshape(-1, 4).astype(float)
    return Overlaps(
        np.asarray(scores, float),
        np.asarray(labels, np.int64),
        box_areas(found),
        np.asarray(truth_labels, np.int64),
        box_areas(truth),
        crowd | difficult,
        crowd,
        box_overlaps(found, truth, crowd),
    )


def random_images(seed: int, images: int) -> list[dict[str, np.ndarray]]:
    """Objects, and detections near them, doubled and out of the way; scores in tenths, so that many are equal."""
    draw = np.random.default_rng(seed)
    result = []
    for _ in range(images):
        count = int(draw.integers(0, 7))
        start = draw.integers(0, 120, (count, 2))
        truth = np.concatenate([start, start + draw.integers(4, 80, (count, 2))], axis=1).astype(float)
        truth_labels = draw.integers(0, CLASSES - (seed % 2), count)  # sometimes a class without objects
        near = truth[draw.integers(0, count, 2 * count)] if count else np.empty((0, 4))
        near = near + draw.integers(-6, 7, near.shape)
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        far = draw.integers(0, 100, (int(draw.integers(0, 4)), 2))
        found = np.concatenate([near, np.concatenate([far, far + 30], axis=1)])
        labels = draw.integers(0, CLASSES, len(found))
        if count:
            labels = np.where(draw.random(len(found)) < 0.5, truth_labels[0], labels)
        result.append(
            {
                "found": found,
                "scores": draw.integers(1, 11, len(found)) / 10,
                "labels": labels,
                "truth": truth,
                "truth_labels": truth_labels,
                "crowd": draw.random(count) < 0.25,
            }
        )
    return result


def by_pycocotools(images: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """The reference's six numbers for AP; -1 where nothing is defined."""
    truth, found = [], []
    for number, one in enumerate(images):
        for box, label, crowd in zip(one["truth"], one["truth_labels"], one["crowd"]):
            x1, y1, x2, y2 = box.tolist()
            truth.append(
                {
                    "id": len(truth) + 1,
                    "image_id": number,
                    "category_id": int(label),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": int(crowd),
                }
            )
        for box, label, score in zip(one["found"], one["labels"], one["scores"]):
            x1, y1, x2, y2 = box.tolist()
            found.append(
                {
                    "image_id": number,
                    "category_id": int(label),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": float(score),
                }
            )
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = {
            "info": {},
            "images": [{"id": number, "width": 200, "height": 200} for number in range(len(images))],
            "annotations": truth,
            "categories": [{"id": label, "name": str(label)} for label in range(CLASSES)],
        }
        reference.createIndex()
        evaluated = COCOeval(reference, reference.loadRes(found), "bbox")
        evaluated.evaluate()
        evaluated.accumulate()
        evaluated.summarize()
    return dict(zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), evaluated.stats[:6].tolist()))


def ours(images: list[dict[str, np.ndarray]]) -> dict[str, float]:
    tables = coco_ap([image_of(**one) for one in images], CLASSES)
    values = {name: mean_ap(table) for name, table in tables.items()}
    values |= {"AP50": mean_ap(tables["AP"][0]), "AP75": mean_ap(tables["AP"][5])}
    return {name: -1.0 if np.isnan(value) else value for name, value in values.items()}


@pytest.mark.parametrize("seed", range(8))
def test_coco_average_precision_is_that_of_pycocotools(seed: int) -> None:
    images = random_images(seed, 25)
    assert ours(images) == pytest.approx(by_pycocotools(images), rel=1e-9, abs=1e-12)


def test_images_without_objects_and_without_detections_are_as_in_pycocotools() -> None:
    images = random_images(3, 12)
    nothing = np.empty((0, 4))
    images[0] |= {"truth": nothing, "truth_labels": np.empty(0, int), "crowd": np.empty(0, bool)}
    images[1] |= {"found": nothing, "scores": np.empty(0), "labels": np.empty(0, int)}
    images[2] = images[0] | images[1] | {"truth": nothing, "truth_labels": np.empty(0, int), "crowd": np.empty(0, bool)}
    assert len(images[0]["found"])
    assert len(images[1]["truth"])
    assert ours(images) == pytest.approx(by_pycocotools(images), rel=1e-9, abs=1e-12)


def test_only_the_hundred_best_detections_of_a_class_in_an_image_count() -> None:
    draw = np.random.default_rng(0)
    images = random_images(5, 4)
    start = draw.integers(0, 150, (180, 2))
    images[0] |= {
        "found": np.concatenate([start, start + 20], axis=1).astype(float),
        "scores": draw.random(180),
        "labels": np.zeros(180, int),
        "truth": np.concatenate([start[:60], start[:60] + 20], axis=1).astype(float),
        "truth_labels": np.zeros(60, int),
        "crowd": np.zeros(60, bool),
    }
    assert ours(images) == pytest.approx(by_pycocotools(images), rel=1e-9, abs=1e-12)


def voc_by_definition(images: list[dict[str, np.ndarray]], label: int, least: float) -> tuple[float, float]:
    """The development kit's evaluation, loop by loop: the 11-point form and the area; boxes with the last pixel."""
    rows = sorted(
        (
            (-score, number, place)
            for number, one in enumerate(images)
            for place, (score, own) in enumerate(zip(one["scores"], one["labels"]))
            if own == label
        ),
        key=lambda row: row[0],
    )
    taken: set[tuple[int, int]] = set()
    positives = sum(int(((one["truth_labels"] == label) & ~one["difficult"]).sum()) for one in images)
    hits = misses = 0
    precision, recall = [], []
    for _, number, place in rows:
        one = images[number]
        x1, y1, x2, y2 = one["found"][place] + np.array([1, 1, 0, 0])
        best, chosen = -np.inf, -1
        for object_, (box, own) in enumerate(zip(one["truth"], one["truth_labels"])):
            if own != label:
                continue
            a1, b1, a2, b2 = box + np.array([1, 1, 0, 0])
            w, h = max(min(x2, a2) - max(x1, a1) + 1, 0), max(min(y2, b2) - max(y1, b1) + 1, 0)
            union = (x2 - x1 + 1) * (y2 - y1 + 1) + (a2 - a1 + 1) * (b2 - b1 + 1) - w * h
            if w * h / union > best:
                best, chosen = w * h / union, object_
        if best > least:
            if not one["difficult"][chosen]:
                if (number, chosen) in taken:
                    misses += 1
                else:
                    hits += 1
                    taken.add((number, chosen))
        else:
            misses += 1
        precision.append(hits / max(hits + misses, np.finfo(float).eps))
        recall.append(hits / positives)
    p, r = np.array(precision), np.array(recall)
    eleven = sum(p[r >= t - 1e-12].max(initial=0.0) for t in np.arange(11) / 10) / 11
    area, before = 0.0, 0.0
    for level in np.unique(r):
        area += (level - before) * p[r >= level].max()
        before = level
    return float(eleven), float(area)


@given(st.integers(0, 10_000))
@settings(max_examples=25)
def test_voc_average_precision_is_the_definition_with_difficult_objects(seed: int) -> None:
    images = random_images(seed, 6)
    for one in images:
        one["difficult"] = one.pop("crowd")
    # Equal scores in two images are in the order of the images, in both.
    points, area = voc_ap([image_of(**one) for one in images], CLASSES)
    for label in range(CLASSES):
        needed = sum(int(((one["truth_labels"] == label) & ~one["difficult"]).sum()) for one in images)
        if not needed:
            assert np.isnan(points[:, label]).all()
            assert np.isnan(area[:, label]).all()
            continue
        for row, least in enumerate(THRESHOLDS):
            assert (points[row, label], area[row, label]) == pytest.approx(
                voc_by_definition(images, label, least), abs=1e-12
            )


def test_voc_average_precision_by_hand() -> None:
    truth = np.array([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]])
    # Right, wrong, right again, the same object twice, the difficult one.
    found = np.array([[0, 0, 10, 10], [0, 50, 10, 60], [20, 0, 30, 9], [21, 0, 30, 10], [40, 0, 50, 10]])
    one = image_of(
        found,
        np.array([0.9, 0.8, 0.7, 0.6, 0.95]),
        np.zeros(5, int),
        truth,
        np.zeros(3, int),
        difficult=np.array([False, False, True]),
    )
    points, area = voc_ap([one], 1)
    # Precision 1, 1/2, 2/3, 2/4 at recalls 1/2, 1/2, 1, 1; the difficult object is neither right nor wrong.
    assert area[0, 0] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert points[0, 0] == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert area[9, 0] == pytest.approx(0.5)  # at 0.95 only the exact box is right


def test_a_detection_equal_to_the_threshold_is_right_for_coco_and_wrong_for_voc() -> None:
    one = image_of(
        np.array([[0, 0, 10, 5]]), np.ones(1), np.zeros(1, int), np.array([[0, 0, 10, 10]]), np.zeros(1, int)
    )
    assert one.iou[0, 0] == 0.5
    assert coco_ap([one], 1)["AP"][0, 0] == 1.0
    assert voc_ap([one], 1)[1][0, 0] == 0.0


def test_masks_overlap_as_counted_pixel_by_pixel() -> None:
    draw = np.random.default_rng(0)
    masks, others = draw.random((3, 9, 11)) < 0.4, draw.random((4, 9, 11)) < 0.5
    crowd = np.array([False, True, False, False])
    others[3] = False
    expected = np.zeros((3, 4))
    for d in range(3):
        for g in range(4):
            common = sum(bool(a and b) for a, b in zip(masks[d].flat, others[g].flat))
            union = masks[d].sum() if crowd[g] else sum(bool(a or b) for a, b in zip(masks[d].flat, others[g].flat))
            expected[d, g] = common / union
    assert mask_overlaps(masks, others, crowd) == pytest.approx(expected, abs=1e-15)


def test_nothing_is_defined_without_objects() -> None:
    none = np.empty((0, 4))
    one = image_of(np.array([[0, 0, 5, 5]]), np.ones(1), np.zeros(1, int), none, np.empty(0, int))
    assert all(np.isnan(mean_ap(table)) for table in coco_ap([one], 2).values())
    assert all(np.isnan(table).all() for table in voc_ap([one], 2))
