# SPDX-License-Identifier: Apache-2.0
"""Semi-supervised evaluation: the whole backbone is fine-tuned on a small share of the labels.

Which images keep their labels is drawn per class by an address, as InvP did (`generate_list.py`), or read from a file,
as SimCLR published them. The training is that of `kinfold.evaluate.tuning`; InvP's settings
(`semi_supervised.py` of its authors) are a recipe.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from kinfold.data.label_lists import draw_per_class, read_list
from kinfold.data.sources import Source, Subset, split_off
from kinfold.errors import UserError
from kinfold.evaluate.backbones import FrozenBackbone
from kinfold.evaluate.labelled import Labelled, labels_of
from kinfold.evaluate.tuning import Diverged, Task, Tuning, named, split_test, tune
from kinfold.settings import settings
from kinfold.views import Positive


@settings
class SemiSupervised(Tuning):
    """Fine-tuning on a few labels; of several rates the best on a held-out part of those labels is taken."""

    share: Annotated[float, Field(gt=0.0, le=1.0)] | None = 0.1
    """of the images of every class that keep their labels, rounded up; drawn by `seed` and `draw`"""
    list: str | None = None
    """a file that names the images that keep their labels, one a line, instead of a share"""
    draw: Annotated[int, Field(ge=0)] = 0
    """number of the draw: other images for each, with the same training"""
    backbone_rates: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.0012,)
    head_factors: Annotated[tuple[Positive, ...], Field(min_length=1)] = (50.0,)
    """the classifier's rate as a multiple of the backbone's"""
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """part of the labelled images on which one of several rates and factors is chosen"""

    def __post_init__(self) -> None:
        Tuning.__post_init__(self)
        if (self.share is None) == (self.list is None):
            raise ValueError(
                "share, list: give one of the two, for example share: 0.01, or list: 1percent.txt with share: null"
            )


def semi_supervised(backbone: FrozenBackbone, data: Labelled, settings: SemiSupervised) -> dict[str, float]:
    """Fine-tune a copy of the backbone on a few labelled images and measure it: accuracies in percent.

    `labels` is the number of images that were learned from, the others are those of `tuning.named`. Where there are
    several rates or factors, `grid/lr=0.0012,x=50` is the last epoch's top-1 of each on the held-out part, trained on
    the rest of the labelled images; the best of them (the first where several are) trains on all of these, and is
    named by `chosen/backbone_rate` and `chosen/head_factor`. Raises `UserError` where labels are missing, the list does
    not fit the images or training diverges, and `Stopped` at a signal.
    """
    labels_of(data.train, None, say=data.say)  # refuses before anything is drawn
    few, test = _few(data, settings)
    labels, asked, classes = labels_of(few, test, say=data.say)
    counts = np.unique(labels, return_counts=True)[1]  # [C]
    each = f"{counts.min():,}" if counts.min() == counts.max() else f"{counts.min():,} to {counts.max():,}"
    data.say(
        f"{len(few):,} images have labels, {each} of each of {len(counts):,} classes: {few.description} "
        f"(fingerprint {few.fingerprint[:12]})."
    )
    values: dict[str, float] = {"labels": float(len(few))}
    rate, factor = settings.backbone_rates[0], settings.head_factors[0]
    several = len(settings.backbone_rates) * len(settings.head_factors) > 1
    # What is held out to choose by must leave every class something to learn from, and ask something of each.
    if several and counts.min() < 2:
        data.say(
            f"Some classes have one labelled image, so none can be held out to choose by: the first of the rates, "
            f"{rate:g} and {factor:g}, are taken. Name one of each, or give more labels."
        )
    elif several:
        grid = _grid(backbone, data, few, settings)
        values |= {f"grid/lr={r:g},x={f:g}": accuracy for (r, f), accuracy in grid.items()}
        rate, factor = max(grid, key=lambda cell: grid[cell])
        values |= {"chosen/backbone_rate": rate, "chosen/head_factor": factor}
    history = tune(
        backbone,
        data,
        Task(few, labels, test, asked, classes),
        settings,
        backbone_rate=rate,
        head_factor=factor,
        doing="fine-tuning",
        part="all",
    )
    return values | named(history, classes)


def _few(data: Labelled, settings: SemiSupervised) -> tuple[Subset, Source]:
    """The images that keep their labels, and those to be asked."""
    if settings.list is not None:
        chosen = read_list(Path(settings.list), data.train, say=data.say)  # [n]
        few = Subset(data.train, chosen, f"{len(chosen):,} of {data.train.description}, named by {settings.list}")
        if data.test is not None:
            return few, data.test
        others = np.setdiff1d(np.arange(len(data.train)), chosen)  # [N - n]
        if not len(others):
            raise UserError(
                f"There is no test split, and {settings.list} names all images, so none is left to be asked. Give a "
                "test set."
            )
        data.say(f"There is no test split: the {len(others):,} images that {settings.list} does not name are asked.")
        return few, Subset(data.train, others)
    train, test = split_test(data, settings.seed)
    assert settings.share is not None  # or a list, as the settings see to
    assert train.labels is not None  # looked at before
    chosen = draw_per_class(train.labels, share=settings.share, seed=settings.seed, draw=settings.draw)  # [n]
    how = f"{100 * settings.share:g} % of each class, seed {settings.seed}, draw {settings.draw}"
    return Subset(train, chosen, f"{len(chosen):,} of {train.description}, {how}"), test


def _grid(
    backbone: FrozenBackbone, data: Labelled, few: Subset, settings: SemiSupervised
) -> dict[tuple[float, float], float]:
    """Top-1 in percent of every rate and factor on a held-out part; 0 where training diverges."""
    data = replace(data, say=_once(data.say))
    rest, held = split_off(few, settings.held_out, settings.seed)
    labels, asked, classes = labels_of(rest, held, say=data.say)
    measured = replace(settings, measure_every=settings.epochs)
    grid: dict[tuple[float, float], float] = {}
    for rate, factor in itertools.product(settings.backbone_rates, settings.head_factors):
        grid[rate, factor] = 0.0
        try:
            history = tune(
                backbone,
                data,
                Task(rest, labels, held, asked, classes),
                measured,
                backbone_rate=rate,
                head_factor=factor,
                doing=f"choosing: rate {rate:g}, factor {factor:g}",
                part=f"rate-{rate:g}-factor-{factor:g}",
            )
            grid[rate, factor] = history[-1]["top1"]
        except Diverged as error:
            data.say(str(error))
    return grid


def _once(say: Callable[[str], None]) -> Callable[[str], None]:
    """Say every remark the first time only."""
    said: set[str] = set()

    def first(text: str) -> None:
        if text not in said:
            said.add(text)
            say(text)

    return first
