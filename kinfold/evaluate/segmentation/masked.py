# SPDX-License-Identifier: Apache-2.0
"""Images with masks to evaluate on: a set to learn from, a set to be asked, both looked through before the start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kinfold import distributed
from kinfold.console import bar
from kinfold.data.annotated.mask_crops import Looked, Looking
from kinfold.data.annotated.masks import VOID, Masks, open_masks
from kinfold.data.work import Task, run
from kinfold.errors import UserError
from kinfold.evaluate.conditions import Conditions
from kinfold.evaluate.protocol import Request
from kinfold.randomness import SPLIT, permutation


@dataclass(frozen=True, kw_only=True, eq=False)
class Masked(Conditions):
    """Images with masks: a set to learn from, and a set to be asked."""

    train: Masks
    test: Masks

    def about(self) -> dict[str, Any]:
        """Say which images they are, for the result file."""
        return {
            name: {"description": each.description, "images": len(each), "fingerprint": each.fingerprint}
            for name, each in (("train", self.train), ("test", self.test))
        }


def open_masked(request: Request, settings: Any, conditions: dict[str, Any]) -> Masked:
    """Open what was asked for; a fifth of the images is held out where no test split is named and there is none."""
    say, limit = conditions["say"], request.limit
    train = open_masks(request.data, request.train_split, training=True, limit=limit, say=say)
    assert train is not None
    test = open_masks(
        request.test_data or request.data, request.test_split, training=False, limit=request.limit, say=say
    )
    if test is None and request.test_data is not None:  # a set without splits is all test
        test = open_masks(request.test_data, None, training=True, limit=limit, say=say)
    if test is None:
        if len(train) < 2:
            raise UserError(f"{train.description}: too few to hold some out for the test.")
        say("There is no test split: a fifth of the images is held out and not trained on.")
        order, held = permutation(SPLIT, settings.seed, n=len(train)), max(1, len(train) // 5)
        train, test = train.some(np.sort(order[held:])), train.some(np.sort(order[:held]))
    if train.classes != test.classes:
        raise UserError(
            f"The images to train on and those to be asked do not have the same classes: {', '.join(train.classes)}; "
            f"{', '.join(test.classes)}. Name the same in classes.txt of both."
        )
    shared = {pair.image.resolve() for pair in train.pairs} & {pair.image.resolve() for pair in test.pairs}
    if shared:
        say(f"{len(shared):,} of the {len(test):,} images that are asked are learned from too.")
    return Masked(train=train, test=test, **conditions)


class Held(NamedTuple):
    """What is known of the test images before they are asked."""

    pixels: NDArray[np.int64]
    """[C]: pixels of each class"""
    common: str
    """the class that has most pixels in the training images: the answer of one who does not look"""


def look(masks: Masks, data: Masked, *, channels: int, doing: str) -> Looked:
    """Read every pair once, before anything is trained: the pixels of each class, and all that is wrong."""
    mine = np.arange(distributed.rank(), len(masks), distributed.world())  # [n]
    tasks = [Task(0, some) for some in np.array_split(mine, max(1, len(mine) // 16))]
    pixels = np.zeros(len(masks.classes), np.int64)  # [C]
    faults: dict[int, str] = {}
    with bar(doing, len(tasks)) as advance:
        for found in run(Looking(masks, channels), tasks, workers=data.workers):
            pixels += found.pixels
            faults |= found.faults
            advance(1)
    everyone = distributed.gather(torch.from_numpy(pixels).to(data.device)[None]).sum(0)  # [C]
    return Looked(everyone.cpu().numpy(), dict(sorted(distributed.join(faults).items())))


def checked(data: Masked, *, channels: int) -> tuple[Masks, Held]:
    """Give the training pairs that can be used, and what the test pairs hold.

    A pair that cannot be used is left out of the training, named and counted. Raises `UserError` where a test pair
    cannot be used: a figure over fewer images is not the protocol's.
    """
    train = look(data.train, data, channels=channels, doing="looking at the training masks")
    test = look(data.test, data, channels=channels, doing="looking at the test masks")
    if test.faults:
        raise UserError(
            f"{_named(test, data.test)} The test is over all of its images, so mend them or take them off the list."
        )
    names = data.test.classes
    if not test.pixels.any():
        raise UserError(f"No pixel has a class in {data.test.description}. Are its masks published?")
    if train.faults:
        data.say(f"{_named(train, data.train)} They are left out of the training.")
    if not train.pixels.any():
        raise UserError(f"No pixel has a class in {data.train.description}; there is nothing to learn.")
    if np.count_nonzero(train.pixels) < 2:
        raise UserError(
            f"All pixels are {names[int(train.pixels.argmax())]!r} in {data.train.description}; there is nothing to "
            f"tell apart. {VOID} is void: where it is meant as a class, write that class's number."
        )
    missing = [name for name, count in zip(names, test.pixels) if not count]
    if missing:
        data.say(
            f"{len(missing)} of {len(names)} classes have no pixel in the test images: {', '.join(missing)}. The mean "
            "leaves out those that are predicted nowhere either, and counts the others as 0."
        )
    unseen = [name for name, count in zip(names, train.pixels) if not count]
    if unseen:
        data.say(f"{len(unseen)} of {len(names)} classes have no pixel to learn from: {', '.join(unseen)}.")
    good = np.setdiff1d(np.arange(len(data.train)), np.array(list(train.faults), np.int64))  # [n]
    usable = data.train.some(good) if train.faults else data.train
    return usable, Held(test.pixels, names[int(train.pixels.argmax())])


def _named(looked: Looked, masks: Masks, shown: int = 5) -> str:
    """Say what is wrong with pairs, and how many they are."""
    more = "; ..." if len(looked.faults) > shown else ""
    return (
        f"{len(looked.faults):,} of {len(masks):,} images cannot be used: "
        f"{'; '.join(list(looked.faults.values())[:shown])}{more}."
    )
