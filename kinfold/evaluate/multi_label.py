# SPDX-License-Identifier: Apache-2.0
"""Images that show several classes each, as VOC's classification task has them: to learn from, and to be asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kinfold.data.annotated import voc
from kinfold.data.sources import Source, Subset
from kinfold.errors import UserError
from kinfold.evaluate.conditions import Conditions
from kinfold.evaluate.features import features_of
from kinfold.evaluate.protocol import Request
from kinfold.evaluate.results import about_source
from kinfold.randomness import SPLIT, permutation


@dataclass(frozen=True, kw_only=True, eq=False)
class MultiLabel(Conditions):
    """Two sets of images, and which of the same C classes each image shows."""

    train: Source
    present: voc.Presence
    """int8 [N, C] of the training images: 1 shown, 0 only difficult objects of it, -1 absent"""
    test: Source
    asked: voc.Presence
    """int8 [Q, C] of the test images"""
    classes: tuple[str, ...]
    """C names"""

    def about(self) -> dict[str, Any]:
        """Say which images they are, for the result file."""
        return {"train": about_source(self.train), "test": about_source(self.test), "classes": list(self.classes)}

    features = features_of

    def answerable(self, asked: voc.Presence) -> list[int]:
        """The classes that some of the images `asked` [q, C] show; others have no average precision, and are named.

        Raises `UserError` where there are none.
        """
        shown = (asked == 1).any(axis=0)  # [C]
        never = [name for name, there in zip(self.classes, shown) if not there]
        if len(never) == len(self.classes):
            raise UserError(f"No test image shows any of the classes: {self.test.description}. Take another split.")
        if never:
            self.say(
                f"{len(never)} of {len(self.classes)} classes are in no test image and are left out of the mean, "
                f"which is over {len(self.classes) - len(never)}: {', '.join(never)}"
            )
        return np.flatnonzero(shown).tolist()


def open_multi_label(request: Request, settings: object, conditions: dict[str, Any]) -> MultiLabel:
    """Open what was asked for in the VOC layout; usually trainval and test, where there is no test train and val.

    Raises `UserError` with file and line for what is wrong with the lists, and where an image is in both sets.
    """
    devkits = voc.find_devkits(request.data)
    others = devkits if request.test_data is None else voc.find_devkits(request.test_data)
    train_split, test_split = usual_splits(devkits, others, request, conditions["say"])
    chosen = voc.parts(devkits, train_split)
    asked = voc.parts(others, test_split)
    classes = voc.classes_of(list(dict.fromkeys(devkit for devkit, _ in chosen + asked)))
    train, present = _open(request.data, train_split, chosen, classes, request.limit)
    test, present_asked = _open(request.test_data or request.data, test_split, asked, classes, request.limit)
    _check_apart(chosen, asked, train_split, test_split)
    if request.workers is None and len(train) < 2000:
        conditions = {**conditions, "workers": 0}  # starting processes would take longer than they save
    return MultiLabel(train=train, present=present, test=test, asked=present_asked, classes=classes, **conditions)


def usual_splits(
    devkits: Sequence[voc.Devkit], others: Sequence[voc.Devkit], request: Request, say: Callable[[str], None]
) -> tuple[str, str]:
    """Say which splits are meant where none are named: trainval and test, else train and val."""
    tested = [devkit for devkit in others if voc.has_list(devkit, "test")]
    test = request.test_split or ("test" if tested else "val")
    if request.train_split is not None:
        return request.train_split, test
    whole = [devkit for devkit in devkits if voc.has_list(devkit, "trainval")]
    if test.endswith("val") or not whole:
        if request.test_split is None and not tested:
            say("There is no test split: val is asked, and train alone is learned from.")
        return "train", test
    # Of several years only one has its test set here, and nobody means the trainval of another with it.
    both = [devkit for devkit in whole if devkit in tested]
    return (f"{both[0].year}_trainval" if len(devkits) > 1 and len(both) == 1 else "trainval"), test


def _open(
    data: str, split: str, parts: list[tuple[voc.Devkit, str]], classes: tuple[str, ...], limit: int | None
) -> tuple[Source, voc.Presence]:
    """The images of splits, and what they show."""
    present = np.concatenate([voc.presence(devkit, name, classes) for devkit, name in parts])  # [N, C]
    images = voc.choose(data, split)
    source: Source = voc.VOCImages(images, f"{len(images):,} images of {data}, {split} ({len(classes)} classes)")
    if limit is not None and limit < len(images):
        kept = np.sort(permutation(SPLIT, 0, n=len(images))[:limit])  # [n]
        source, present = Subset(source, kept), present[kept]
    return source, present


def _check_apart(
    chosen: list[tuple[voc.Devkit, str]], asked: list[tuple[voc.Devkit, str]], train: str, test: str
) -> None:
    """Refuse a test set that was learned from."""
    learned = {(devkit.root.resolve(), id) for devkit, name in chosen for id in devkit.ids(name)}
    both = [id for devkit, name in asked for id in devkit.ids(name) if (devkit.root.resolve(), id) in learned]
    if both:
        raise UserError(
            f"{len(both):,} images are both in {train} and in {test}, first {both[0]}: the result would be of images "
            "that were learned from. Name splits that do not meet with the train and test split, such as train and val."
        )
