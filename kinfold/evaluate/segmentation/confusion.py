# SPDX-License-Identifier: Apache-2.0
"""Confusion matrices of pixels, and what is read from them: IoU of each class, its mean, accuracies.

IoU of a class is TP / (TP + FP + FN) over all pixels of the test set together. A class that neither the truth nor the
prediction has anywhere has none, and the mean leaves it out (VOC's and Cityscapes' definition).
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from kinfold import distributed
from kinfold.data.annotated.masks import VOID


@final
class Confusion:
    """How often a pixel of class t was called p, as int64 [C, C] with the truth in rows."""

    def __init__(self, classes: int, device: str | torch.device = "cpu") -> None:
        self.matrix = torch.zeros(classes, classes, dtype=torch.int64, device=device)  # [C, C]

    def add(self, truth: Tensor, predicted: Tensor) -> None:
        """Count pixels: class numbers of any shape, `VOID` in the truth counts for nothing."""
        classes = len(self.matrix)
        known = truth != VOID
        pairs = truth[known].long() * classes + predicted[known].long()  # [n]
        self.matrix += torch.bincount(pairs, minlength=classes * classes).view(classes, classes)

    def joined(self) -> Confusion:
        """The counts of all processes together."""
        made = Confusion(len(self.matrix), self.matrix.device)
        made.matrix = distributed.gather(self.matrix[None]).sum(0)  # [C, C]
        return made

    @property
    def iou(self) -> Tensor:
        """IoU of each class, float64 [C]; NaN where a class is nowhere."""
        matrix = self.matrix.double()
        hit = matrix.diagonal()  # [C]
        return hit / (matrix.sum(0) + matrix.sum(1) - hit)  # [C]

    @property
    def mean_iou(self) -> float:
        """Mean of the IoUs that there are."""
        return float(self.iou.nanmean())

    @property
    def pixel_accuracy(self) -> float:
        """Share of the pixels that are right."""
        return float(self.matrix.diagonal().sum().double() / self.matrix.sum())

    @property
    def class_accuracy(self) -> float:
        """Mean over the classes in the truth of the share of their pixels that are right."""
        matrix = self.matrix.double()
        return float((matrix.diagonal() / matrix.sum(1)).nanmean())


def constant(pixels: Tensor, always: int) -> float:
    """Give the mean IoU of calling every pixel the class `always`, from the test set's pixels of each class [C]."""
    matrix = Confusion(len(pixels))
    matrix.matrix[:, always] = pixels
    return matrix.mean_iou


def values(confusion: Confusion, classes: tuple[str, ...]) -> dict[str, float]:
    """Name the results, in percent; a class that is nowhere has no IoU and is not there."""
    iou = {name: 100.0 * value for name, value in zip(classes, confusion.iou.tolist()) if not math.isnan(value)}
    return {
        "mIoU": 100.0 * confusion.mean_iou,
        "pixel_accuracy": 100.0 * confusion.pixel_accuracy,
        "class_accuracy": 100.0 * confusion.class_accuracy,
        "classes": float(len(iou)),
        **{f"iou/{name}": value for name, value in iou.items()},
    }
