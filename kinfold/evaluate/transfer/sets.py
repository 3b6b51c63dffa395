# SPDX-License-Identifier: Apache-2.0
"""What transfer is measured on: one labelled set, or all of the small sets that lie under a root."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kinfold.data.annotated import voc
from kinfold.data.named_sets import SETS, canonical, find_small_set, locate, open_small_set
from kinfold.data.sources import Source, Subset, open_source
from kinfold.data.splits import split_of_word
from kinfold.data.tables import is_saved, table_files
from kinfold.errors import UserError
from kinfold.evaluate.conditions import Conditions
from kinfold.evaluate.labelled import Labelled, labels_of, open_labelled
from kinfold.evaluate.protocol import Request
from kinfold.evaluate.results import about_source
from kinfold.evaluate.transfer.logistic import Metric, Truth
from kinfold.randomness import SPLIT, permutation

if TYPE_CHECKING:
    from kinfold.evaluate.transfer import Transfer

METRICS: dict[str, Metric] = {
    "food101": "accuracy",
    "cifar10": "accuracy",
    "cifar100": "accuracy",
    "sun397": "accuracy",
    "cars": "accuracy",
    "aircraft": "per-class",
    "voc2007": "mAP",
    "dtd": "accuracy",
    "pets": "per-class",
    "caltech101": "per-class",
    "flowers": "per-class",
}
"""the sets of the published tables in their order, each with its metric (verified, ssl-transfer `linear.py`)"""

ELEVEN = tuple(METRICS)


@dataclass(frozen=True, eq=False)
class Split:
    """Images of a set, and what is right about them."""

    source: Source
    truth: Truth
    """int64 [N], a class an image, -1 for one that no training image has; or bool [N, C], the classes in an image"""


@dataclass(frozen=True, kw_only=True, eq=False)
class TransferSet:
    """One set with its splits."""

    name: str
    metric: Metric
    train: Split
    val: Split | None
    """its own validation images; None: some of the training images are held out"""
    test: Split
    classes: tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Collection(Conditions):
    """The sets that a backbone is transferred to."""

    sets: tuple[TransferSet, ...]

    def about(self) -> dict[str, Any]:
        """Say which images they are, for the result file."""
        return {
            this.name: {
                "train": about_source(this.train.source),
                "val": None if this.val is None else about_source(this.val.source),
                "test": about_source(this.test.source),
            }
            for this in self.sets
        }


def open_transfer(request: Request, settings: Transfer, conditions: dict[str, Any]) -> Collection:
    """Open what was asked for: the small sets below a folder, or one set of any kind (`open_source`).

    A folder is a root of sets where one is found in it or `settings.sets` names some. A set lies in its root as
    torchvision puts it there, or in a folder of its name in any form that `open_source` knows. Raises `UserError` where
    a set that was named is not there, or none is.
    """
    if request.data.startswith("torchvision:"):
        if settings.sets is not None:
            raise UserError(f"{request.data} is one set: leave sets out, or give the folder that holds them as data.")
        name, at, place = request.data.removeprefix("torchvision:").partition("@")
        if request.test_data is None:
            one = _small_set(canonical(name), Path(place) if at else None, request, settings)
            return Collection(sets=(one,), **conditions)
    root = Path(request.data).expanduser()
    folders = _folders(root)
    there = [name for name in SETS if locate(name, root) is not None or name in folders]
    if settings.sets is None and not there:
        return Collection(sets=(_one_set(request, settings, conditions),), **conditions)
    _refuse_splits(request)
    wanted = _wanted(root, there, settings, conditions)
    sets = []
    for name in wanted:
        folder = folders.get(name, root)
        if locate(name, root) is not None or name not in folders:
            sets.append(_small_set(name, root, request, settings))
        elif locate(name, folder) is not None:
            sets.append(_small_set(name, folder, request, settings))
        else:
            sets.append(_one_set(request._replace(data=str(folder)), settings, conditions))
    return Collection(sets=tuple(sets), **conditions)


def _wanted(root: Path, there: list[str], settings: Transfer, conditions: dict[str, Any]) -> list[str]:
    """Say which sets are measured: those that are named, else those of the eleven that are there."""
    if settings.sets is not None:
        wanted = [canonical(name) for name in settings.sets]
        if len(set(wanted)) < len(wanted):
            raise UserError(f"sets: {', '.join(settings.sets)} names a set twice.")
        return wanted
    wanted = [name for name in ELEVEN if name in there]
    if not wanted:
        raise UserError(f"{root} holds {', '.join(there)}, not of the eleven: name what you want measured with sets.")
    lacking = [name for name in ELEVEN if name not in wanted]
    if lacking:
        conditions["say"](
            f"The mean is over {len(wanted)} of the eleven sets: {', '.join(wanted)}. Not in {root}: "
            f"{', '.join(lacking)}."
        )
    return wanted


def _folders(root: Path) -> dict[str, Path]:
    """Find folders that have the name of a set and look like one: a torchvision layout, tables, or a train folder.

    A class folder of somebody's photographs may be called flowers, too.
    """
    found: dict[str, Path] = {}
    for entry in sorted(root.iterdir()) if root.is_dir() else []:
        name = _known(entry.name)
        if name is None or not entry.is_dir():
            continue
        trains = any(split_of_word(inner.name) == "train" and inner.is_dir() for inner in entry.iterdir())
        if trains or locate(name, entry) is not None or table_files(str(entry)) or is_saved(str(entry)):
            found.setdefault(name, entry)
    return found


def _refuse_splits(request: Request) -> None:
    if request.train_split is not None or request.test_split is not None or request.test_data is not None:
        raise UserError(
            "Several sets are measured, each on its own published splits: leave train_split, test_split and test_data "
            "out, or give the folder of one set as data."
        )


def _small_set(name: str, root: Path | None, request: Request, settings: Transfer) -> TransferSet:
    """Open one of the small sets on its published splits."""
    metric = settings.metric or METRICS.get(name, "accuracy")
    if (metric == "mAP") != (name == "voc2007"):
        raise UserError(f"metric: {metric} is not for {name}. mAP is for voc2007, and for nothing else.")
    names = {"train": request.train_split or "train", "test": request.test_split or "test"}
    if {"val", "test"} <= set(SETS[name].splits) and request.train_split is None:
        names["val"] = "val"
    found = {}
    for part, split in names.items():
        source: Source = open_small_set(name, root, split=split, download=settings.download)
        truth = source.labels if name != "voc2007" else _presence(find_small_set(name, root), split)
        assert truth is not None
        if request.limit is not None and request.limit < len(source):
            kept = np.sort(permutation(SPLIT, 0, n=len(source))[: request.limit])  # [n]
            source, truth = Subset(source, kept), truth[kept]
        found[part] = Split(source, truth)
    classes = voc.CLASSES if name == "voc2007" else found["train"].source.classes
    return TransferSet(
        name=name, metric=metric, train=found["train"], val=found.get("val"), test=found["test"], classes=classes
    )


def _presence(folder: Path, split: str) -> Truth:
    """Say which of the twenty classes each image of a split shows: bool [N, 20].

    A class of which all objects are difficult is absent, in all splits (third-party: copies of the authors' reader).
    """
    devkit = voc.find_devkits(str(folder))[0]
    parts = {"trainval": ("train", "val"), "all": ("train", "val", "test")}.get(split, (split,))
    found: Truth = np.concatenate([voc.presence(devkit, part, voc.CLASSES) for part in parts]) == 1  # [N, 20]
    return found


def _one_set(request: Request, settings: Transfer, conditions: dict[str, Any]) -> TransferSet:
    """Open a labelled set of any kind: its train, validation (where it has one beside test) and test images."""
    name = _name_of(request.data)
    metric = settings.metric or METRICS.get(name, "accuracy")
    if metric == "mAP":
        raise UserError(
            "metric: mAP is for images with several classes each, as voc2007 has them. Take another metric."
        )
    labelled: Labelled = open_labelled(request, settings, conditions)
    if labelled.test is None:
        raise UserError(
            f"There are no test images apart from the training images: {labelled.train.description}. Give a set with a "
            "test split, or another set as test_data"
            + (
                f"; or a folder with some of the sets {', '.join(ELEVEN)}: here is none."
                if settings.sets is None
                else "."
            )
        )
    known, asked, _ = labels_of(labelled.train, labelled.test, say=labelled.say)
    val = None
    if request.test_data is None and request.train_split is None:
        val = _validation(request, labelled, known)
    return TransferSet(
        name=name,
        metric=metric,
        train=Split(labelled.train, known),
        val=val,
        test=Split(labelled.test, asked),
        classes=labelled.train.classes,
    )


def _validation(request: Request, labelled: Labelled, known: Truth) -> Split | None:
    """The set's own validation images, where it has some that are not the test images."""
    try:
        source = open_source(request.data, split="validation", limit=request.limit)
    except UserError:
        return None
    others = {labelled.train.fingerprint, *({labelled.test.fingerprint} if labelled.test is not None else ())}
    if source.labels is None or source.fingerprint in others or source.classes != labelled.train.classes:
        return None
    assert labelled.train.labels is not None  # `labels_of` has refused such a set
    number = dict(zip(labelled.train.labels.tolist(), known.tolist()))
    return Split(source, np.array([number.get(label, -1) for label in source.labels.tolist()], np.int64))


def _name_of(data: str) -> str:
    """Name a set by its folder or file, by its usual name where that is one of the small sets."""
    path = data.partition("@")[0].removeprefix("torchvision:")
    name = os.path.basename(os.path.abspath(os.path.expanduser(path))).split(".")[0]
    return _known(name) or name or "images"


def _known(name: str) -> str | None:
    try:
        return canonical(name)
    except UserError:
        return None
