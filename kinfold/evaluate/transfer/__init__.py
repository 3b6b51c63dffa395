# SPDX-License-Identifier: Apache-2.0
"""Transfer to small sets: logistic regression on frozen features, set by set, its decay chosen on validation images.

Features come once from each image: short side resized (bicubic), centre cut out, normalised as the backbone wants it;
the features themselves are not normalised. Every decay is fitted to the training images and measured on the validation
images; the first of the best is fitted again to both together, and measured once on the test images. The validation
images are the set's own where they are published (Aircraft, DTD, Flowers, VOC 2007), else a fifth of the training
images: the first of a permutation by numpy's seed 0.

Source: Ericsson, Gouk and Hospedales, "How Well Do Self-Supervised Models Transfer?", CVPR 2021, and its code
ssl-transfer (`linear.py`); the tables of NNCLR and SCE follow it.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kinfold.data.crop import Filter
from kinfold.data.cropped import Cropped
from kinfold.data.sources import Source
from kinfold.errors import UserError
from kinfold.evaluate.backbones import FrozenBackbone, Layer
from kinfold.evaluate.features import features_of
from kinfold.evaluate.resumable import Resumable
from kinfold.evaluate.transfer.logistic import Features, Metric, Probe, Truth, published_decays
from kinfold.evaluate.transfer.sets import Collection, Split, TransferSet, open_transfer
from kinfold.settings import Count, settings
from kinfold.views import Positive

__all__ = ["Transfer", "open_transfer", "transfer"]

Share = Annotated[float, Field(gt=0.0, lt=1.0)]


@settings
class Transfer:
    """Logistic regression on frozen features of several small sets."""

    sets: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """names of small sets, all of which have to be there; if not given, those of the eleven that are"""
    decays: Count | Annotated[tuple[Positive, ...], Field(min_length=1)] = 45
    """how many, from 1e-6 to 1e5 evenly in the logarithm; or the values themselves, in the order of trying"""
    max_iter: Count = 100
    """iterations of a fit; most fits end by it"""
    valid_size: Count | Share = 0.2
    """share of the training images (or their number) that is held out where a set has no validation images"""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """of the permutation that holds them out"""
    metric: Metric | None = None
    """for all sets; each set's published one if not given"""
    features: Layer = "backbone"
    test_size: Count | None = None
    """side of an image in pixels; the backbone's own size if not given"""
    test_resize: Count | None = None
    """short side before the central crop; the same as the size if not given"""
    filter: Filter = "bicubic"
    """how images are resized"""
    download: bool = False
    """fetch a set that is named and not there"""


def transfer(backbone: FrozenBackbone, data: Collection, settings: Transfer) -> dict[str, float]:
    """Measure each set's metric in percent, and their mean.

    Keys are the sets' names and `mean`; `val/NAME` is what the chosen decay reached on the validation images,
    `decay/NAME` that decay (not percent). Raises `UserError` where a set cannot be measured.
    """
    values = {}
    for this in data.sets:
        values.update(_one(backbone, data, this, settings))
    return {**values, "mean": float(np.mean([values[this.name] for this in data.sets]))}


def _one(backbone: FrozenBackbone, data: Collection, this: TransferSet, settings: Transfer) -> dict[str, float]:
    """Measure one set."""
    x, y = _features(backbone, data, this.train, this.name, "training", settings)
    tested = _features(backbone, data, this.test, this.name, "test", settings)
    if this.val is None:
        held, rest = _hold_out(x, y, settings, this.name)
        learned, asked, both = (x[rest], y[rest]), (x[held], y[held]), (x, y)
    else:
        learned = (x, y)
        asked = _features(backbone, data, this.val, this.name, "validation", settings)
        both = np.concatenate([x, asked[0]]), np.concatenate([y, asked[1]])
    columns = [_columns(data, this, *pair) for pair in ((learned, asked), (both, tested))]
    decays = settings.decays if isinstance(settings.decays, tuple) else published_decays(settings.decays)
    probe = Probe(this.metric, max_iter=settings.max_iter)
    scores: list[float] = []

    def state() -> dict[str, Any]:
        return {"probe": probe.state(), "scores": list(scores)}

    def restore(found: dict[str, Any]) -> None:
        probe.restore(found["probe"])
        scores[:] = found["scores"]

    doing = f"{this.name}: logistic regression"
    with Resumable(data, state=state, restore=restore, steps=len(decays), doing=doing, part=this.name) as going:
        for decay in decays[going.step :]:
            scores.append(probe.score(decay, learned, asked, columns[0])[None])
            going.took_step()
    best = int(np.argmax(scores))  # the first of equals
    found = probe.score(decays[best], both, tested, columns[1])
    names = this.classes or ()
    by_class = {f"AP/{this.name}/{names[place]}": ap for place, ap in found.items() if place is not None}
    return {
        this.name: found[None],
        f"val/{this.name}": scores[best],
        f"decay/{this.name}": decays[best],
        **by_class,
    }


def _features(
    backbone: FrozenBackbone, data: Collection, split: Split, name: str, which: str, settings: Transfer
) -> tuple[Features, Truth]:
    """Give the features [n, F] of a split's readable images, and what is right about each."""
    size = settings.test_size or backbone.size
    resize = settings.test_resize or size
    if resize < size:
        raise UserError(f"test_resize is {resize}, smaller than the images' size {size}. Make it {size} or more.")
    source: Source = split.source
    if settings.filter != "bilinear":  # which is what features are made with, so other protocols have them already
        source = Cropped(source, size=size, resize=resize, filter=settings.filter, channels=backbone.channels)
    network = backbone.network(settings.features).to(data.device)
    doing = f"{name}: features of {which} images"
    found, positions = features_of(data, backbone, network, source, size=size, resize=resize, doing=doing)
    return np.ascontiguousarray(found.numpy()), split.truth[positions]


def _hold_out(x: Features, y: Truth, settings: Transfer, name: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split rows in two, as the authors do: the first of a permutation are held out, the others learned from."""
    share = settings.valid_size
    count = share if isinstance(share, int) else int(np.floor(share * len(x)))
    if not 0 < count < len(x):
        raise UserError(
            f"{name}: valid_size {share} holds out {count:,} of {len(x):,} training images; hold out at least one, and "
            "leave some."
        )
    order = np.random.RandomState(settings.seed).permutation(len(x))  # [n]
    return order[:count], order[count:]


def _columns(
    data: Collection, this: TransferSet, learned: tuple[Features, Truth], asked: tuple[Features, Truth]
) -> list[int] | None:
    """Give the classes that can be measured, and name the others; None where each image has one class.

    Raises `UserError` where none can.
    """
    y, truth = learned[1], asked[1]
    names = this.classes
    if this.metric != "mAP":
        if len(np.unique(y)) < 2:
            raise UserError(f"{this.name}: all images that are learned from have the same label. Take more of them.")
        missing = np.setdiff1d(y, truth)
        if len(missing) and this.metric == "per-class":
            data.say(
                f"{this.name}: {len(missing):,} of {len(np.unique(y)):,} classes have no image among the "
                f"{len(truth):,} that are asked; the mean is over the others."
            )
        return None
    fits = np.asarray(y.any(axis=0) & ~y.all(axis=0) & truth.any(axis=0))  # [C]
    lost = [names[place] if names else str(place) for place in np.flatnonzero(~fits)]
    if not fits.any():
        raise UserError(f"{this.name}: no class has images with and without it to learn from, and one that is asked.")
    if lost:
        data.say(
            f"{this.name}: {len(lost)} of {len(fits)} classes are left out of the mean, for want of images with and "
            f"without them among the {len(y):,} that are learned from, or with them among the {len(truth):,} that are "
            f"asked: {', '.join(lost)}"
        )
    return [int(place) for place in np.flatnonzero(fits)]
