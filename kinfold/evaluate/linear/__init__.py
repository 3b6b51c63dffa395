# SPDX-License-Identifier: Apache-2.0
"""Linear classification on frozen features: one layer learns, the backbone does not.

All learning rates, and with `blocks` all depths of a ResNet, are trained side by side, in one pass over the images:
their classifiers see the same batches, and each has its own weights and momentum, so the result of each is that of
training it alone. Variants of the papers (MoCo `main_lincls.py`, SCE `linear_classifier`, InvP `eval_linear.py` and
`linear_classification.py`, whose loss is the sum of 17 classifiers that share nothing) are recipes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from kinfold import distributed
from kinfold.data.sources import Source, split_off
from kinfold.errors import UserError
from kinfold.evaluate.backbones import FrozenBackbone, Layer
from kinfold.evaluate.features import left_out, resize_for
from kinfold.evaluate.labelled import Labelled, Labels, labels_of
from kinfold.evaluate.linear.batches import Asked, Augmented, Batches, Cached, Kept, Remade
from kinfold.evaluate.linear.classifier import BatchNorm, Classifier, Init, first_weights, hits
from kinfold.evaluate.linear.residual_blocks import BlockMaps, block_maps
from kinfold.evaluate.resumable import Resumable
from kinfold.settings import Count, settings
from kinfold.views import Augmentation, Positive, expand_preset

KEPT_BYTES = 8 * 2**30
"""features of test images are made at every look where they take more, if training images are read anew as well"""


@settings
class Steps:
    """The rate is multiplied by `factor` at each milestone."""

    name: Literal["steps"] = "steps"
    milestones: tuple[Count, ...] = (60, 80)
    """epochs after which the rate is lower"""
    factor: Positive = 0.1


@settings
class Cosine:
    """Half a cosine from the full rate to zero, step by step."""

    name: Literal["cosine"] = "cosine"


@settings
class Linear:
    """A linear classifier on frozen features, trained with SGD and cross-entropy."""

    epochs: Count = 100
    batch_size: Count = 256
    learning_rates: Annotated[tuple[Positive, ...], Field(min_length=1)] = (30.0,)
    """each is trained, side by side"""
    base_batch: Count | None = None
    """rates are for this batch and scale linearly with `batch_size`; as written if not given"""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    schedule: Annotated[Steps | Cosine, Field(discriminator="name")] = Field(default_factory=Steps)
    augment: Annotated[Augmentation, BeforeValidator(expand_preset)] | None = None
    """how training images are varied; if not given they look like test images, and features are made only once"""
    pad_crop: Count | None = None
    """the crop is this instead: pad by so many black pixels, cut a square of the old size anywhere (SCE on CIFAR)"""
    test_size: Count | None = None
    """side of a test image in pixels; the backbone's own size if not given"""
    test_resize: Count | None = None
    """short side before the central crop of `test_size`; straight to `test_size` if not given"""
    init: Init = "normal"
    """first weights: N(0, 0.01); torch's own; N(0, √(2 / C)) (InvP on CIFAR). Biases are zero, but for torch's own"""
    features: Layer = "backbone"
    blocks: tuple[Count, Count, Count, Count, Count] | None = None
    """instead, a classifier after a ResNet's stem and one after each of its residual blocks, all at once: the sides
    that maps are pooled to by means, of the stem and of each of the four stages (InvP)"""
    batch_norm: BatchNorm = "none"
    """in front of the classifier: none; one that normalises by the batch (train); or one that keeps its first
    statistics, mean 0 and variance 1, so that only its scale and shift act (eval: what InvP's code does)"""
    classes: Count | None = None
    """outputs of the classifier; as many as there are classes if not given (InvP: 1000 for the 205 of Places)"""
    measured: Literal["after", "before"] = "after"
    """after the training of each epoch, or before it (InvP): then the last number is that of one epoch less"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    drop_last: bool = True
    """leave out the last, smaller batch of an epoch"""

    def __post_init__(self) -> None:
        if self.test_resize is not None and (self.test_size is None or self.test_resize < self.test_size):
            raise ValueError(
                f"test_resize: {self.test_resize} is the short side that test_size is cut from, so give a test_size of "
                f"at most {self.test_resize}"
            )
        if self.blocks is not None and self.features != "backbone":
            raise ValueError("blocks: they are looked at instead of the head, so set features: backbone")
        if self.measured == "before" and self.epochs == 1:
            raise ValueError("measured: before the only epoch nothing is learned; set epochs to 2 or more, or after")
        whole = self.augment is not None and self.augment.scale == self.augment.ratio == (1.0, 1.0)
        if self.pad_crop is not None and not whole:
            raise ValueError(
                "pad_crop: takes the place of the crop, so augment is needed, with scale: [1.0, 1.0] and "
                "ratio: [1.0, 1.0]"
            )

    def at_size(self, size: int, resize: int | None) -> Linear:
        """The same protocol for images of another side, cut from a short side in the same proportion."""
        augment = None if self.augment is None else replace(self.augment, size=size)
        if self.test_size is None:
            return replace(self, augment=augment)
        if resize is None and self.test_resize is not None:  # as much is cut off at the edges as the recipe says
            resize = round(self.test_resize * size / self.test_size)
        return replace(self, augment=augment, test_size=size, test_resize=resize)


def linear(backbone: FrozenBackbone, data: Labelled, settings: Linear) -> dict[str, float]:
    """Train classifiers on frozen features and measure them after every epoch: accuracies in percent.

    `last/lr=30` is the last epoch's, `best/lr=30` the best epoch's, which is chosen on the test set, as all papers do;
    `best_epoch/lr=30` says after how many epochs. `last` is that of the rate with the smallest training loss in the
    last epoch, so nothing in it was chosen on the test set; `best` is the largest of all. From 6 classes on there is
    `last_top5/lr=30` too. With `blocks` the names are `last/block=16` (and `last/block=16,lr=1` with several rates),
    where 0 is the stem; `last` is the last block's, and `best_block` says where `best` was found. Without a test set a
    fifth of the images of each class is held out.

    It may be stopped and goes on to the bit; several processes train as one. Raises `UserError` where labels are
    missing, and for `blocks` where the backbone is no ResNet.
    """
    train, test = data.train, data.test
    if test is None:
        labels_of(train, None, say=data.say)  # refuses before anything is split
        data.say("There is no test split: a fifth of the images of each class is held out and not trained on.")
        train, test = split_off(train, 0.2, settings.seed)
    labels, answers, classes = labels_of(train, test, say=data.say)
    outputs = _outputs(settings, classes, data.say)
    device = torch.device(data.device)
    network = _network(backbone, data, settings)
    asked = _asked(backbone, network, data, test, answers, settings)
    batches, batch = _batches(backbone, network, data, train, labels, settings)
    widths = network.widths if isinstance(network, BlockMaps) else [asked.width]
    heads = []
    for width in widths:
        weight, bias = first_weights(settings.init, outputs, width, seed=settings.seed)
        # One classifier a rate and not one joined product: so each is, to the bit, what it would be alone.
        heads.append(
            [
                Classifier(
                    weight.to(device),
                    bias.to(device),
                    momentum=settings.momentum,
                    weight_decay=settings.weight_decay,
                    batch_norm=settings.batch_norm,
                )
                for _ in settings.learning_rates
            ]
        )
    scale = 1.0 if settings.base_batch is None else batch / settings.base_batch
    history, losses = fit(heads, batches, asked, data, settings, scale=scale)
    if isinstance(batches, Augmented):
        unread = left_out(train, distributed.join(batches.loader.bad))
        if unread is not None:
            data.say(f"{unread}. In training others stand in for them.")
    return _values(history, losses, settings, classes, data)


def fit(
    heads: list[list[Classifier]], batches: Batches, asked: Asked, data: Labelled, settings: Linear, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Train `heads`, one row for each of the features that lie side by side, one classifier a rate in a row.

    Gives their accuracies at each measurement in percent, first and among five [n, P, L, 2], and their mean training
    losses in the last epoch [P, L].
    """
    device = torch.device(data.device)
    widths = [row[0].weight.shape[1] for row in heads]
    flat = [head for row in heads for head in row]
    history: list[Tensor] = []
    losses = torch.zeros(len(heads), len(heads[0]), device=device)  # [P, L]: sums over the epoch's batches
    before = settings.measured == "before"
    # Differs: the epoch after the last measurement, which InvP's code trains and nobody sees, is left out.
    epochs = settings.epochs - before

    total = epochs * batches.steps

    def state() -> dict[str, Any]:
        kept = {"heads": [head.state() for head in flat], "history": list(history), "losses": losses}
        return {**kept, "images": data.train.fingerprint, "steps": total}

    def restore(kept: dict[str, Any]) -> None:
        if (kept.get("images"), kept.get("steps")) != (data.train.fingerprint, total):
            raise UserError(
                f"{data.progress} was left by a training on other images or with another number of processes. Start "
                "as before, or remove it to begin again."
            )
        for head, one in zip(flat, kept["heads"], strict=True):
            head.restore(one)
        history[:] = kept["history"]
        losses.copy_(kept["losses"])

    with Resumable(data, state=state, restore=restore, steps=total, doing="linear classifier") as going:
        while True:
            epoch, start = divmod(going.step, batches.steps)
            if start == 0 and len(history) < epoch + before:
                history.append(_accuracies(heads, widths, asked, device))
            if going.step >= total:
                break
            if start == 0:
                losses.zero_()
            for share in batches.epoch(epoch, start):
                rate = scale * share_of_rate(
                    settings.schedule, epoch=epoch, step=going.step, steps=settings.epochs * batches.steps
                )
                for p, x in enumerate(torch.split(share.x, widths, dim=1)):
                    for place, (head, full) in enumerate(zip(heads[p], settings.learning_rates)):
                        losses[p, place] += head.step(x, share.y, full * rate, whole=share.whole)
                going.took_step()
    return torch.stack(history), losses.cpu() / batches.steps


def _accuracies(heads: list[list[Classifier]], widths: list[int], asked: Asked, device: torch.device) -> Tensor:
    """Shares in percent of all images that ask whose label is first, and among the first five: [P, L, 2]."""
    right = torch.zeros(len(heads), len(heads[0]), 2, dtype=torch.int64, device=device)  # [P, L, 2]
    count = torch.zeros(1, dtype=torch.int64, device=device)  # [1]
    for features, y in asked.blocks():
        count += len(y)
        for p, x in enumerate(torch.split(features, widths, dim=1)):
            for place, head in enumerate(heads[p]):
                right[p, place] += hits(head, x, y)
    counts = distributed.gather(torch.cat([right.flatten(), count])[None]).sum(0).cpu()  # [P · L · 2 + 1]
    return 100.0 * counts[:-1].view(right.shape).double() / int(counts[-1])  # [P, L, 2]


def share_of_rate(schedule: Steps | Cosine, *, epoch: int, step: int, steps: int) -> float:
    """Give what share of the full rate is used in `step` of `steps`, in `epoch`; all counted from 0."""
    if isinstance(schedule, Steps):
        return float(schedule.factor ** sum(epoch >= milestone for milestone in schedule.milestones))
    return 0.5 * (1.0 + math.cos(math.pi * step / steps))


def _outputs(settings: Linear, classes: int, say: Callable[[str], None]) -> int:
    """How many outputs the classifier has."""
    if settings.classes is None or settings.classes == classes:
        return classes
    if settings.classes < classes:
        raise UserError(f"classes is {settings.classes}, but the images have {classes:,} classes. Set classes: null.")
    say(f"The classifier has {settings.classes:,} outputs for {classes:,} classes, as classes says.")
    return settings.classes


def _size(backbone: FrozenBackbone, settings: Linear) -> int:
    return backbone.size if settings.test_size is None else settings.test_size


def _network(backbone: FrozenBackbone, data: Labelled, settings: Linear) -> nn.Module:
    """What makes the features: the backbone, its head, or the maps of all blocks."""
    device = torch.device(data.device)
    if settings.blocks is None:
        return backbone.network(settings.features).to(device)
    return block_maps(backbone, settings.blocks, size=_size(backbone, settings), device=device, say=data.say)


def _asked(
    backbone: FrozenBackbone, network: nn.Module, data: Labelled, test: Source, answers: Labels, settings: Linear
) -> Kept | Remade:
    """The test images: their features are kept unless that takes too much."""
    size, resize = settings.test_size, settings.test_resize
    width = sum(network.widths) if isinstance(network, BlockMaps) else 0  # one map's features are few
    if settings.augment is not None and 4 * width * len(test) > KEPT_BYTES:
        if size is None:
            size, resize = backbone.size, resize_for(test, backbone.size, backbone.resize, channels=backbone.channels)
        return Remade(backbone, network, data, test, answers, width=width, size=size, resize=resize)
    x, found = data.features(backbone, network, test, size=size, resize=resize, doing="test features")
    return Kept(x, torch.from_numpy(answers[found]), device=torch.device(data.device))


def _batches(
    backbone: FrozenBackbone, network: nn.Module, data: Labelled, train: Source, labels: Labels, settings: Linear
) -> tuple[Cached | Augmented, int]:
    """What is learned from, and the size of a batch."""
    batch, world = min(settings.batch_size, len(train)), distributed.world()
    if batch < settings.batch_size:
        data.say(
            f"batch_size is {settings.batch_size:,}; there are {batch:,} training images, so a batch is all of them."
        )
    if settings.augment is None:
        x, found = data.features(
            backbone,
            network,
            train,
            size=settings.test_size,
            resize=settings.test_resize,
            doing="training features",
        )
        batch = min(batch, len(x))
        y = torch.from_numpy(labels[found])  # [n]
        device = torch.device(data.device)
        return Cached(x, y, batch=batch, seed=settings.seed, drop_last=settings.drop_last, device=device), batch
    if batch < settings.batch_size:
        batch -= batch % world
    left = len(train) % batch
    lost = left if left // world == 1 else left % world
    if lost and world > 1 and not settings.drop_last:
        data.say(f"Of each epoch's last batch {lost} images are left out: they do not divide over {world} processes.")
    augmented = Augmented(
        backbone,
        network,
        data,
        train,
        labels,
        augment=settings.augment,
        pad=settings.pad_crop,
        batch=batch,
        seed=settings.seed,
        drop_last=settings.drop_last,
    )
    return augmented, batch


def _values(history: Tensor, losses: Tensor, settings: Linear, classes: int, data: Labelled) -> dict[str, float]:
    """Name the results; history [n, P, L, 2], losses [P, L] of the last epoch."""
    values: dict[str, float] = {}
    first = int(settings.measured == "after")  # epochs that the first measurement has seen
    for block in range(losses.shape[0]):
        for place, rate in enumerate(settings.learning_rates):
            words = [] if settings.blocks is None else [f"block={block}"]
            if settings.blocks is None or len(settings.learning_rates) > 1:
                words.append(f"lr={rate:g}")
            name, top = ",".join(words), history[:, block, place, 0]  # [n]
            if not torch.isfinite(losses[block, place]):
                data.say(f"{name} diverged: its training loss is not finite. Leave it out or lower it.")
            values[f"last/{name}"] = float(top[-1])
            values[f"best/{name}"] = float(top.max())
            values[f"best_epoch/{name}"] = float(top.argmax() + first)
            if classes > 5:
                values[f"last_top5/{name}"] = float(history[-1, block, place, 1])
    chosen = int(torch.nan_to_num(losses[-1], nan=math.inf).argmin())
    values["last"] = float(history[-1, -1, chosen, 0])
    values["best"] = float(history[..., 0].max())
    if settings.blocks is not None:
        values["best_block"] = float(history[..., 0].amax(dim=(0, 2)).argmax())
    return values
