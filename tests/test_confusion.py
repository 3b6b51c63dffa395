# SPDX-License-Identifier: Apache-2.0
"""Confusion matrices: IoU by hand, against torchmetrics, and what happens to classes that are nowhere."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from kinfold.data.annotated.masks import VOID
from kinfold.evaluate.segmentation.confusion import Confusion, constant, values


def confused(truth: list[int], predicted: list[int], classes: int) -> Confusion:
    made = Confusion(classes)
    made.add(torch.tensor(truth, dtype=torch.uint8), torch.tensor(predicted))
    return made


def test_iou_is_as_by_hand() -> None:
    #   class 0: 2 right of 3, 1 called so wrongly; class 1: 1 right of 2, 1 called so wrongly; class 2: all 2 right
    found = confused([0, 0, 0, 1, 1, 2, 2, VOID], [0, 0, 1, 1, 0, 2, 2, 1], 3)
    assert found.iou.tolist() == [2 / 4, 1 / 3, 1.0]
    assert found.mean_iou == pytest.approx((2 / 4 + 1 / 3 + 1) / 3)
    assert found.pixel_accuracy == 5 / 7
    assert found.class_accuracy == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert found.matrix.tolist() == [[2, 1, 0], [1, 1, 0], [0, 0, 2]]


def test_a_class_that_is_nowhere_is_left_out_and_one_that_is_predicted_only_counts_as_zero() -> None:
    found = confused([0, 0, 1, 1], [0, 0, 1, 2], 4)
    assert found.iou.tolist()[:3] == [1.0, 0.5, 0.0]
    assert math.isnan(found.iou[3])
    assert found.mean_iou == 0.5
    named = values(found, ("ground", "cat", "dog", "bird"))
    assert named["classes"] == 3
    assert named["iou/dog"] == 0.0
    assert "iou/bird" not in named
    assert named["mIoU"] == 50.0


@given(st.integers(2, 7), st.integers(0, 2**31), st.booleans())
def test_torchmetrics_says_the_same(classes: int, seed: int, some_nowhere: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    known = max(1, classes - 2) if some_nowhere else classes
    truth = torch.randint(0, known, (3, 9, 11), generator=generator)
    predicted = torch.where(
        torch.rand(truth.shape, generator=generator) < 0.5,
        truth,
        torch.randint(0, known, truth.shape, generator=generator),
    )
    truth[torch.rand(truth.shape, generator=generator) < 0.2] = VOID
    own = Confusion(classes)
    for one, other in zip(truth, predicted):  # image by image
        own.add(one, other)
    jaccard = MulticlassJaccardIndex(classes, average=None, ignore_index=VOID)(predicted, truth)
    assert torch.allclose(own.iou.nan_to_num(0.0).float(), jaccard.nan_to_num(0.0))
    mean = MulticlassJaccardIndex(classes, average="macro", ignore_index=VOID)(predicted, truth)
    assert own.mean_iou == pytest.approx(float(mean), abs=1e-6)
    accuracy = MulticlassAccuracy(classes, average="micro", ignore_index=VOID)(predicted, truth)
    assert own.pixel_accuracy == pytest.approx(float(accuracy), abs=1e-6)


def test_one_who_says_the_same_everywhere_gets_that_classs_share() -> None:
    pixels = torch.tensor([60, 0, 30, 10])
    truth = torch.repeat_interleave(torch.arange(4), pixels)
    by_hand = Confusion(4)
    by_hand.add(truth, torch.zeros_like(truth))
    assert constant(pixels, 0) == by_hand.mean_iou == pytest.approx(0.6 / 3)  # of three classes that are there


def test_all_right_is_one_hundred() -> None:
    truth = torch.arange(5).repeat(3)
    found = Confusion(5)
    found.add(truth, truth)
    named = values(found, tuple("abcde"))
    assert named["mIoU"] == named["pixel_accuracy"] == named["class_accuracy"] == 100.0
