# SPDX-License-Identifier: Apache-2.0
"""Transfer by fine-tuning: the whole backbone learns a labelled set, as InvP's `fine_tune.py` has it.

All labels are used. The training is that of `kinfold.evaluate.tuning`; variants are recipes.
"""

from __future__ import annotations

from kinfold.evaluate.backbones import FrozenBackbone
from kinfold.evaluate.labelled import Labelled, labels_of
from kinfold.evaluate.tuning import Task, Tuning, named, split_test, tune
from kinfold.settings import settings
from kinfold.views import Positive


@settings
class FineTune(Tuning):
    """Transfer by fine-tuning."""

    backbone_rate: Positive = 0.001
    head_factor: Positive = 5.0
    """the classifier's rate as a multiple of the backbone's"""


def fine_tune(backbone: FrozenBackbone, data: Labelled, settings: FineTune) -> dict[str, float]:
    """Train a copy of the backbone on all images and measure it: accuracies in percent (see `named`).

    Without a test set a fifth of the images of each class is held out. Raises `UserError` where labels are missing or
    training diverges, and `Stopped` at a signal.
    """
    train, test = split_test(data, settings.seed)
    labels, asked, classes = labels_of(train, test, say=data.say)
    history = tune(
        backbone,
        data,
        Task(train, labels, test, asked, classes),
        settings,
        backbone_rate=settings.backbone_rate,
        head_factor=settings.head_factor,
        doing="fine-tuning",
    )
    return named(history, classes)
