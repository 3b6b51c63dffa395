# SPDX-License-Identifier: Apache-2.0
"""Linear classification on frozen features: one layer learns, the backbone does not.

All learning rates are trained side by side, in one pass over the images: their classifiers see the same batches of the
same features, and each has its own weights and momentum, so the result of each is that of training it alone. Variants
of the papers (MoCo `main_lincls.py`, SCE `linear_classifier`, InvP `eval_linear.py`) are recipes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn
from torch.nn import functional as F

from kinfold.data.loader import Loader
from kinfold.data.sources import split_off
from kinfold.evaluate.backbones import FrozenBackbone, Layer
from kinfold.evaluate.features import bar, frozen
from kinfold.evaluate.labelled import Labelled, labels_of
from kinfold.randomness import ORDER, VIEW, WEIGHTS, permutation, seed_of, uniforms
from kinfold.settings import settings
from kinfold.views import Augmentation, Positive, Views, expand_preset

Count = Annotated[int, Field(ge=1)]
_PAD_CROP = 1  # the place of the shifted crop beside view 0 in an image's addresses


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
    init: Literal["normal", "default", "fan-out"] = "normal"
    """first weights: N(0, 0.01); torch's own; N(0, √(2 / C)) (InvP on CIFAR). Biases are zero, but for torch's own"""
    features: Layer = "backbone"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    drop_last: bool = True
    """leave out the last, smaller batch of an epoch"""

    def __post_init__(self) -> None:
        if self.test_resize is not None and (self.test_size is None or self.test_resize < self.test_size):
            raise ValueError(
                f"test_resize: {self.test_resize} is the short side that test_size is cut from, so give a test_size of "
                f"at most {self.test_resize}"
            )
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


class Classifier:
    """A linear layer with softmax cross-entropy and SGD with momentum, without autograd.

    The gradient of the loss by the logits is (p − onehot) / B. The arithmetic is that of `torch.optim.SGD` on
    `nn.Linear`, weight decay on the bias too.
    """

    def __init__(self, weight: Tensor, bias: Tensor, *, momentum: float, weight_decay: float) -> None:
        self.weight = weight.clone()  # [C, F]
        self.bias = bias.clone()  # [C]
        self.momentum = momentum
        self.weight_decay = weight_decay
        self._speed = (torch.zeros_like(weight), torch.zeros_like(bias))

    def __call__(self, x: Tensor) -> Tensor:
        """Give the logits [B, C] of features [B, F]."""
        return F.linear(x, self.weight, self.bias)  # [B, C]

    @torch.no_grad()
    def step(self, x: Tensor, target: Tensor, rate: float) -> Tensor:
        """Take a step on features [B, F] and labels [B]; gives the loss before it, a scalar."""
        logs = torch.log_softmax(self(x), dim=1)  # [B, C]
        own = target[:, None]  # [B, 1]
        loss = -logs.gather(1, own).mean()
        slope = logs.exp().scatter_add_(1, own, -torch.ones_like(logs[:, :1])).div_(len(x))  # [B, C]
        gradients = (slope.T @ x, slope.sum(dim=0))  # [C, F], [C]
        for parameter, gradient, speed in zip((self.weight, self.bias), gradients, self._speed):
            if self.weight_decay:
                gradient = gradient.add(parameter, alpha=self.weight_decay)
            speed.mul_(self.momentum).add_(gradient)
            parameter.add_(speed, alpha=-rate)
        return loss


def linear(backbone: FrozenBackbone, data: Labelled, settings: Linear) -> dict[str, float]:
    """Train classifiers on frozen features and measure them after every epoch: accuracies in percent.

    `last/lr=30` is the last epoch's, `best/lr=30` the best epoch's, which is chosen on the test set, as all papers do.
    `last` is that of the rate with the smallest training loss in the last epoch, so nothing in it was chosen on the
    test set; `best` is the largest of all. From 6 classes on there is `last_top5/lr=30` too. Without a test set a
    fifth of the images of each class is held out. Raises `UserError` where labels are missing.
    """
    train, test = data.train, data.test
    if test is None:
        labels_of(train, None, say=data.say)  # refuses before anything is split
        data.say("There is no test split: a fifth of the images of each class is held out and not trained on.")
        train, test = split_off(train, 0.2, settings.seed)
    labels, asked, classes = labels_of(train, test, say=data.say)
    network = backbone.network(settings.features).to(data.device)
    device = torch.device(data.device)
    size, resize = settings.test_size, settings.test_resize
    x_test, found = data.features(backbone, network, test, size=size, resize=resize, doing="test features")
    x_test, y_test = x_test.to(device), torch.from_numpy(asked[found]).to(device)  # [Q, F], [Q]

    batch = min(settings.batch_size, len(train))
    if batch < settings.batch_size:
        data.say(
            f"batch_size is {settings.batch_size:,}; there are {batch:,} training images, so a batch is all of them."
        )
    batches: _Cached | _Augmented
    if settings.augment is None:
        x, found = data.features(backbone, network, train, size=size, resize=resize, doing="training features")
        batch = min(batch, len(x))
        batches = _Cached(x.to(device), torch.from_numpy(labels[found]).to(device), batch, settings)
    else:
        batches = _Augmented(backbone, network, data, train, labels, batch, settings)

    weight, bias = first_weights(settings.init, classes, x_test.shape[1], seed=settings.seed)
    scale = 1.0 if settings.base_batch is None else batch / settings.base_batch
    # One classifier a rate and not one joined product: so each is, to the bit, what it would be alone.
    classifiers = [
        Classifier(weight.to(device), bias.to(device), momentum=settings.momentum, weight_decay=settings.weight_decay)
        for _ in settings.learning_rates
    ]
    history: list[Tensor] = []
    losses = torch.zeros(len(classifiers), device=device)  # [L]
    with bar("linear classifier, epochs", settings.epochs) as advance:
        for epoch in range(settings.epochs):
            losses.zero_()
            for number, (features, target) in enumerate(batches.epoch(epoch)):
                share = scale * share_of_rate(
                    settings.schedule,
                    epoch=epoch,
                    step=epoch * batches.steps + number,
                    steps=settings.epochs * batches.steps,
                )
                for place, (one, rate) in enumerate(zip(classifiers, settings.learning_rates)):
                    losses[place] += one.step(features, target, rate * share)
            history.append(torch.stack([correct(one, x_test, y_test) for one in classifiers], dim=1))  # [2, L]
            advance(1)
    return _values(torch.stack(history), losses.cpu(), settings, classes, data)


@torch.no_grad()
def correct(classifier: Classifier, x: Tensor, y: Tensor, *, block: int = 4096) -> Tensor:
    """Give the shares in percent of x [Q, F] whose label y [Q] is first, and among the first five: [2]."""
    hits = torch.zeros(2, dtype=torch.float64)  # [2]
    top = min(5, len(classifier.bias))
    for some, own in zip(torch.split(x, block), torch.split(y, block)):
        logits = classifier(some)  # [b, C]
        hit = logits.topk(top, dim=1).indices == own[:, None]  # [b, top]
        # A classifier that has diverged says nothing, and so is right about nothing.
        hit &= torch.isfinite(logits).all(dim=1, keepdim=True)
        hits += torch.stack([hit[:, 0].sum(), hit.any(1).sum()]).cpu()
    return 100.0 * hits / len(x)  # [2]


def first_weights(
    init: Literal["normal", "default", "fan-out"], classes: int, features: int, *, seed: int
) -> tuple[Tensor, Tensor]:
    """Give the classifier's first weight [C, F] and bias [C], a function of the seed."""
    generator = torch.Generator().manual_seed(seed_of(WEIGHTS, seed))
    weight, bias = torch.empty(classes, features), torch.zeros(classes)  # [C, F], [C]
    if init == "default":
        bound = 1.0 / math.sqrt(features)
        return weight.uniform_(-bound, bound, generator=generator), bias.uniform_(-bound, bound, generator=generator)
    deviation = 0.01 if init == "normal" else math.sqrt(2.0 / classes)
    return weight.normal_(0.0, deviation, generator=generator), bias


def share_of_rate(schedule: Steps | Cosine, *, epoch: int, step: int, steps: int) -> float:
    """Give what share of the full rate is used in `step` of `steps`, in `epoch`; all counted from 0."""
    if isinstance(schedule, Steps):
        return float(schedule.factor ** sum(epoch >= milestone for milestone in schedule.milestones))
    return 0.5 * (1.0 + math.cos(math.pi * step / steps))


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


class _Cached:
    """Batches of features that were made once, in an order of each epoch's own."""

    def __init__(self, x: Tensor, y: Tensor, batch: int, settings: Linear) -> None:
        self.x, self.y, self.batch, self.seed = x, y, batch, settings.seed
        self.steps = len(x) // batch if settings.drop_last else math.ceil(len(x) / batch)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Give features [B, F] and labels [B]."""
        order = torch.from_numpy(permutation(ORDER, self.seed, epoch, n=len(self.x))).to(self.x.device)  # [n]
        for some in torch.split(order[: self.steps * self.batch], self.batch):
            yield self.x[some], self.y[some]


class _Augmented:
    """Batches of features of images that look different in every epoch."""

    def __init__(
        self,
        backbone: FrozenBackbone,
        network: nn.Module,
        data: Labelled,
        train: object,
        labels: np.ndarray,
        batch: int,
        settings: Linear,
    ) -> None:
        assert settings.augment is not None
        self.backbone, self.network, self.settings = backbone, network, settings
        self.labels = torch.from_numpy(labels).to(data.device)  # [N]
        self.loader = Loader(
            train,  # type: ignore[arg-type]
            Views(augment=(settings.augment,), pairs=((0, None),)),
            channels=backbone.channels,
            mean=backbone.mean,
            std=backbone.std,
            batch_size=batch,
            seed=settings.seed,
            workers=data.workers,
            device=data.device,
            drop_last=settings.drop_last,
        )
        self.steps = self.loader.steps_per_epoch

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Give features [B, F] and labels [B]."""
        for batch in self.loader.epoch(epoch):
            images = batch.views[0]  # [B, C, S, S]
            if self.settings.pad_crop is not None:
                where = batch.index.cpu().numpy()  # [B]
                u = uniforms(VIEW, self.settings.seed, epoch, where, _PAD_CROP, draws=2)  # [B, 2]
                images = pad_crop(images, self.settings.pad_crop, mean=self.backbone.mean, std=self.backbone.std, u=u)
            with frozen(self.network):
                features = self.network(images).flatten(1).float()  # [B, F]
            yield features, self.labels[batch.index]


def _values(history: Tensor, losses: Tensor, settings: Linear, classes: int, data: Labelled) -> dict[str, float]:
    """Name the results; history [epochs, 2, L], losses [L] of the last epoch."""
    values: dict[str, float] = {}
    for place, rate in enumerate(settings.learning_rates):
        name = f"lr={rate:g}"
        if not torch.isfinite(losses[place]):
            data.say(f"{name} diverged: its training loss is not finite. Leave it out or lower it.")
        values[f"last/{name}"] = float(history[-1, 0, place])
        values[f"best/{name}"] = float(history[:, 0, place].max())
        values[f"best_epoch/{name}"] = float(history[:, 0, place].argmax() + 1)
        if classes > 5:
            values[f"last_top5/{name}"] = float(history[-1, 1, place])
    chosen = int(torch.nan_to_num(losses, nan=math.inf).argmin())
    values["last"] = float(history[-1, 0, chosen])
    values["best"] = float(history[:, 0].max())
    return values
