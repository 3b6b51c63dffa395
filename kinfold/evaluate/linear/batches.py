# SPDX-License-Identifier: Apache-2.0
"""What a linear classifier learns from and is asked: features made once and streamed, or made anew at every look.

Features that were made once may be a map of a file much larger than the memory: rows are taken from it batch by batch.
Each process of torchrun has its share of a batch, and of the images that ask.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from kinfold import distributed
from kinfold.console import bar
from kinfold.data.centre_crops import evaluation_batches
from kinfold.data.loader import Loader
from kinfold.data.sources import Source, Subset
from kinfold.evaluate.backbones import FrozenBackbone
from kinfold.evaluate.features import frozen, left_out
from kinfold.evaluate.labelled import Labelled, Labels
from kinfold.randomness import ORDER, VIEW, permutation, uniforms
from kinfold.views import Augmentation, Views

RESIDENT_BYTES = 2 * 2**30
"""features up to this size live on the device; larger ones come from the map batch by batch"""
_ASKED_AT_ONCE = 2**26  # numbers of a block of features that are looked at together, and at most so many images:
_ASKED_ROWS = 4096
_PAD_CROP = 1  # the place of the shifted crop beside view 0 in an image's addresses


class Share(NamedTuple):
    """This process's part of a batch."""

    x: Tensor  # [b, F]
    y: Tensor  # int64 [b]
    whole: int  # images of all processes together


class Batches(Protocol):
    """The batches of every epoch."""

    steps: int
    """batches in an epoch"""

    def epoch(self, epoch: int, start: int) -> Iterator[Share]:
        """Give the batches of an epoch from `start` on, each as it is in the whole epoch."""
        ...


class Asked(Protocol):
    """The images that ask, again and again."""

    width: int
    """F"""

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Give this process's share of them: features [b, F] and labels [b] on the device."""
        ...


class Cached:
    """Batches of features that were made once, in an order of each epoch's own."""

    def __init__(self, x: Tensor, y: Tensor, *, batch: int, seed: int, drop_last: bool, device: torch.device) -> None:
        self.x, self.y, self.batch, self.seed, self.device = _near(x, device), y, batch, seed, device
        self.steps = len(x) // batch if drop_last else math.ceil(len(x) / batch)

    def epoch(self, epoch: int, start: int) -> Iterator[Share]:
        """Give the batches from `start` on."""
        order = torch.from_numpy(permutation(ORDER, self.seed, epoch, n=len(self.x)))  # [n]
        for number in range(start, self.steps):
            rows = order[number * self.batch : (number + 1) * self.batch]  # [B]
            own = distributed.local_part(rows)  # [b]
            x = self.x[own.to(self.x.device)].to(self.device)  # [b, F]
            yield Share(x, self.y[own].to(self.device), len(rows))


class Augmented:
    """Batches of features of images that look different in every epoch."""

    def __init__(
        self,
        backbone: FrozenBackbone,
        network: nn.Module,
        data: Labelled,
        train: Source,
        labels: Labels,
        *,
        augment: Augmentation,
        pad: int | None,
        batch: int,
        seed: int,
        drop_last: bool,
    ) -> None:
        self.backbone, self.network, self.pad, self.seed = backbone, network, pad, seed
        self.labels = torch.from_numpy(labels).to(data.device)  # [N]
        with bar("training images", len(train)) as advance:
            self.loader = Loader(
                train,
                Views(augment=(augment,), pairs=((0, None),)),
                channels=backbone.channels,
                mean=backbone.mean,
                std=backbone.std,
                batch_size=batch,
                seed=seed,
                workers=data.workers,
                device=data.device,
                rank=distributed.rank(),
                world=distributed.world(),
                drop_last=drop_last,
                progress=advance,
            )
        self.steps = self.loader.steps_per_epoch

    def epoch(self, epoch: int, start: int) -> Iterator[Share]:
        """Give the batches from `start` on."""
        for batch in self.loader.epoch(epoch, start):
            images = batch.views[0]  # [b, C, S, S]
            if self.pad is not None:
                where = batch.index.cpu().numpy()  # [b]
                u = uniforms(VIEW, self.seed, epoch, where, _PAD_CROP, draws=2)  # [b, 2]
                images = pad_crop(images, self.pad, mean=self.backbone.mean, std=self.backbone.std, u=u)
            with frozen(self.network):
                features = self.network(images).flatten(1).float()  # [b, F]
            yield Share(features, self.labels[batch.index], len(images) * distributed.world())


class Kept:
    """Images that ask by features that were made once."""

    def __init__(self, x: Tensor, y: Tensor, *, device: torch.device) -> None:
        self.x, self.y, self.device, self.width = _near(x, device), y, device, x.shape[1]

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Give a stretch of the rows, a block at a time."""
        rows = max(1, min(_ASKED_ROWS, _ASKED_AT_ONCE // self.width))
        world, rank = distributed.world(), distributed.rank()
        stop = len(self.x) * (rank + 1) // world
        for first in range(len(self.x) * rank // world, stop, rows):
            some = slice(first, min(first + rows, stop))
            yield self.x[some].to(self.device), self.y[some].to(self.device)


class Remade:
    """Images that ask by features that are made at every look, because keeping them would take too much."""

    def __init__(
        self,
        backbone: FrozenBackbone,
        network: nn.Module,
        data: Labelled,
        test: Source,
        labels: Labels,
        *,
        width: int,
        size: int,
        resize: int | None,
    ) -> None:
        self.backbone, self.network, self.data, self.test = backbone, network, data, test
        self.labels = torch.from_numpy(labels)  # [N]
        self.width, self.size, self.resize = width, size, resize
        self._said = False

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Give the features a batch at a time; says once which images do not decode."""
        mine = np.arange(distributed.rank(), len(self.test), distributed.world())  # [n]
        bad: dict[int, str] = {}
        if len(mine):
            for images, places in evaluation_batches(
                Subset(self.test, mine),
                size=self.size,
                resize=self.resize,
                channels=self.backbone.channels,
                mean=self.backbone.mean,
                std=self.backbone.std,
                batch_size=self.data.batch_size,
                workers=self.data.workers,
                device=self.data.device,
                bad=bad,
            ):
                with frozen(self.network):
                    features = self.network(images).flatten(1).float()  # [b, F]
                yield features, self.labels[mine[places]].to(features.device)
        if not self._said:
            self._said = True
            remark = left_out(self.test, distributed.join({int(mine[place]): why for place, why in bad.items()}))
            if remark is not None:
                self.data.say(remark)


def pad_crop(images: Tensor, pad: int, *, mean: tuple[float, ...], std: tuple[float, ...], u: np.ndarray) -> Tensor:
    """Pad normalised images [B, C, S, S] with black by `pad`, cut S x S anywhere as `u` [B, 2] on [0, 1) says."""
    b, c, s, _ = images.shape
    # Black before normalisation, as the papers pad.
    black = images.new_tensor([-m / d for m, d in zip(mean, std)])[None, :, None, None]  # [1, C, 1, 1]
    padded = black.expand(b, c, s + 2 * pad, s + 2 * pad).clone()  # [B, C, S + 2p, S + 2p]
    padded[:, :, pad : pad + s, pad : pad + s] = images
    shift = torch.from_numpy(np.floor(u * (2 * pad + 1)).astype(np.int64)).to(images.device)  # [B, 2]
    along = torch.arange(s, device=images.device)  # [S]
    rows, columns = shift[:, :1] + along, shift[:, 1:] + along  # [B, S], [B, S]
    picture = torch.arange(b, device=images.device)[:, None, None]  # [B, 1, 1]
    # Indices around a slice put the channels last.
    return padded[picture, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # [B, C, S, S]


def _near(x: Tensor, device: torch.device) -> Tensor:
    """Features [n, F] on the device where they are few, else where they are."""
    return x.to(device) if x.nbytes <= RESIDENT_BYTES else x
