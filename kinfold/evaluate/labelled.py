# SPDX-License-Identifier: Apache-2.0
"""Labelled images to evaluate on: a set to learn from, a set to be asked, and how they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinfold.data.decode import Undecodable
from kinfold.data.sources import Source, open_source
from kinfold.data.splits import NoSuchSplit
from kinfold.data.written import same_images
from kinfold.errors import UserError
from kinfold.evaluate.conditions import Conditions, tell
from kinfold.evaluate.features import features_of
from kinfold.evaluate.protocol import Request
from kinfold.evaluate.results import about_source

Labels = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Labelled(Conditions):
    """Images with labels: a set to learn from, and a set to be asked."""

    train: Source
    test: Source | None = None
    """images that were not learned from; each protocol says what it does without"""

    def about(self) -> dict[str, Any]:
        """Say which images they are, for the result file."""
        return {"train": about_source(self.train), "test": about_source(self.test)}

    features = features_of


def open_labelled(request: Request, settings: object, conditions: dict[str, Any]) -> Labelled:
    """Open what was asked for: the data's own splits, or another set to be asked.

    Usual splits: train, and test (or validation) where there is one.
    """
    train = open_source(request.data, split=request.train_split or "train", limit=request.limit)
    test = _test_source(request, train, conditions["say"])
    if request.workers is None and (len(train) < 2000 or _comes_decoded(train)):
        conditions = {**conditions, "workers": 0}  # starting processes would take longer than they save
    return Labelled(train=train, test=test, **conditions)


def _comes_decoded(source: Source) -> bool:
    try:
        return not isinstance(source.read(0), bytes)
    except (Undecodable, OSError):
        return False


def _test_source(request: Request, train: Source, say: Callable[[str], None]) -> Source | None:
    """The images to be asked: another set, or the test split of the same; None where there is none."""
    split, limit = request.test_split or "test", request.limit
    if request.test_data is not None:
        try:
            given = open_source(request.test_data, split=split, limit=limit)
        except NoSuchSplit:
            if request.test_split is not None:  # asked for by name
                raise
            given = open_source(request.test_data, limit=limit)  # a set without splits is all test
        if same_images(given, train):  # every image would find itself
            say("The test images are the training images, so each is left out when it asks.")
            return None
        return given
    if request.train_split == "all" and request.test_split is None:
        return None  # every split is learned from
    try:
        test = open_source(request.data, split=split, limit=limit)
    except NoSuchSplit:  # one that is there and cannot be read is an error
        if request.test_split is not None:
            raise
        return None
    if test.labels is None and train.labels is not None and request.test_split is None:
        say(f"The test split has no labels and is not used: {test.description}.")
        return None
    return None if same_images(test, train) else test


def labels_of(train: Source, test: Source | None, *, say: Callable[[str], None] = tell) -> tuple[Labels, Labels, int]:
    """Give both sets' labels as numbers from 0 that mean the same classes, and the number of classes C.

    Classes are matched by name where both sets have names, else by number. Without `test` its labels are empty.
    Raises `UserError` where labels are missing, or the test set has a name that the training set does not know.
    """
    first, names = _given(train), train.classes
    second = np.empty(0, np.int64) if test is None else _given(test)
    if test is not None and names is not None and test.classes is not None and names != test.classes:
        unknown = sorted(set(test.classes) - set(names))
        if unknown:
            raise UserError(
                f"The test images have classes that the training images lack: {_some(unknown)}. Name the class "
                "folders alike in both."
            )
        place = np.array([names.index(name) for name in test.classes], np.int64)
        second = place[second]
    # Numbers may be anything (years, ids); classes are counted.
    known, joined = np.unique(np.concatenate([first, second]), return_inverse=True)
    shown = np.unique(first)
    never = np.setdiff1d(known, shown).tolist()
    if never:
        words = [names[i] if names is not None and 0 <= i < len(names) else str(i) for i in never]
        say(f"Of {len(words)} classes there is no training image, so their test images count as wrong: {_some(words)}")
    if len(known) < 2:
        raise UserError(
            f"All images have the same label; there is nothing to tell apart: {train.description}. Give a set with "
            "at least two classes."
        )
    joined = joined.reshape(-1).astype(np.int64)
    return joined[: len(first)], joined[len(first) :], len(known)


def _given(source: Source) -> Labels:
    if source.labels is None:
        raise UserError(
            f"There are no labels, and this protocol compares with them: {source.description}. Put each class into a "
            "folder of its own (photos/cats/..., photos/dogs/...), or give a table with a label column."
        )
    labels = np.asarray(source.labels, np.int64)
    missing = int((labels < 0).sum())
    if missing:
        raise UserError(
            f"{missing:,} of {len(labels):,} images have no label (a negative number): {source.description}. Take a "
            "split that is labelled, or remove them."
        )
    return labels


def _some(words: list[str]) -> str:
    return ", ".join(words[:5]) + (f" and {len(words) - 5:,} more" if len(words) > 5 else "")
