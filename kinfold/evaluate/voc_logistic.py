# SPDX-License-Identifier: Apache-2.0
"""VOC classification by logistic regression on the last block but one: InvP's protocol.

    image  →  output of the last residual block but one  →  2 x 2 means  →  linear layer  →  a logit for each class

The loss is binary cross-entropy, summed over classes and images and divided by the images, with the difficult left out.
Test images are flipped at random, as in the authors' code. Source: InvP `downstream/voc_linear.py`; the form of average
precision is scikit-learn's, with the scores of images that show the class lowered by 1e-5, so that no smaller lead
counts. Inferred: these scores are logits.

Differs: which test images are flipped is a function of the seed, not of time.
"""

from __future__ import annotations

import itertools
import math
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field
from torch import Tensor, nn
from torch.nn import functional as F

from kinfold import distributed
from kinfold.data.annotated.voc import Presence
from kinfold.data.loader import Loader
from kinfold.evaluate.average_precision import all_point, curve, step
from kinfold.evaluate.backbones import FrozenBackbone
from kinfold.evaluate.features import frozen, left_out
from kinfold.evaluate.linear.classifier import first_weights
from kinfold.evaluate.multi_label import MultiLabel
from kinfold.evaluate.resnet import parts
from kinfold.evaluate.resumable import Resumable
from kinfold.randomness import VIEW, uniforms
from kinfold.settings import Count, settings
from kinfold.views import Augmentation, Positive, Views, expand_preset

_FLIP = 1  # the place of a test image's flip beside view 0 in its addresses


@settings
class VOCLogistic:
    """A linear layer and independent logits, trained by SGD on augmented images."""

    steps: Count = 1900
    batch_size: Count = 256
    learning_rate: Positive = 3.0
    every: Count = 760
    """steps after which the rate is multiplied by `factor`, again and again"""
    factor: Positive = 0.5
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    weight_decay: Annotated[float, Field(ge=0.0)] = 1e-6
    augment: Annotated[Augmentation, BeforeValidator(expand_preset)] = Field(
        default_factory=lambda: Augmentation(size=224, scale=(0.2, 1.0))
    )
    """how training images are varied"""
    pool: Count = 2
    """sides of the grid of means that is made of the block's output"""
    test_size: Count | None = None
    """side of a test image in pixels; the backbone's own size if not given"""
    test_resize: Count | None = None
    """short side before the central crop of `test_size`; straight to `test_size` if not given"""
    test_flip: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """probability that a test image is mirrored"""
    measure_every: Count = 190
    """steps between two measurements on the test set"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    def __post_init__(self) -> None:
        if self.test_resize is not None and (self.test_size is None or self.test_resize < self.test_size):
            raise ValueError(
                f"test_resize: {self.test_resize} is the short side that test_size is cut from, so give a test_size of "
                f"at most {self.test_resize}"
            )


class Cut(nn.Module):
    """A ResNet up to its last block but one, [B, C, H, W] to [B, W · pool²]; the modules are the network's own."""

    def __init__(self, backbone: nn.Module, *, pool: int, mirrored: bool, of: str) -> None:
        super().__init__()
        found = parts(backbone, of=of)
        self.stem, self.blocks = found.stem, nn.Sequential(*found.blocks[:-1])
        # Kept with the weights, so that features of another grid or of mirrored images are never taken for these.
        self.register_buffer("form", torch.tensor([pool, int(mirrored)]))
        self.pool, self.mirrored = nn.AdaptiveAvgPool2d(pool), mirrored

    def forward(self, images: Tensor) -> Tensor:
        """Give the features [B, F] of images [B, C, H, W]."""
        images = images.flip(3) if self.mirrored else images
        features: Tensor = self.pool(self.blocks(self.stem(images))).flatten(1)  # [B, F]
        return features


def voc_logistic(backbone: FrozenBackbone, data: MultiLabel, settings: VOCLogistic) -> dict[str, float]:
    """Train the layer and measure it on the way: mean average precision in percent.

    `mAP/last` is that after the last step, `mAP/best` the best of all measurements, which is chosen on the test set, at
    `best_step`; `AP/aeroplane` are the last one's classes, and `mAP_all_point/last` is in the all-point form. Raises
    `UserError` where the backbone is no ResNet, and where the test images show no class.
    """
    device = torch.device(data.device)
    test = _Test(backbone, data, settings)
    loader = _loader(backbone, data, settings)
    network = Cut(backbone.module, pool=settings.pool, mirrored=False, of=backbone.description).to(device)
    target = torch.from_numpy(data.present).to(device)  # [N, C]
    first = first_weights("default", len(data.classes), test.features, seed=settings.seed)
    weight, bias = (nn.Parameter(tensor.to(device)) for tensor in first)  # [C, F], [C]
    optimiser = torch.optim.SGD(
        [weight, bias], lr=settings.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    history: list[list[float]] = []  # a row a measurement: step, mean, mean in the all-point form, each class

    def state() -> dict[str, Any]:
        tensors = {"weight": weight.detach(), "bias": bias.detach()}
        return {**tensors, "optimiser": optimiser.state_dict(), "history": history}

    def restore(kept: dict[str, Any]) -> None:
        weight.data.copy_(kept["weight"])
        bias.data.copy_(kept["bias"])
        optimiser.load_state_dict(kept["optimiser"])
        history[:] = kept["history"]

    steps, per_epoch = settings.steps, loader.steps_per_epoch
    with Resumable(data, state=state, restore=restore, steps=steps, doing="logistic regression, steps") as going:
        for epoch in range(going.step // per_epoch, math.ceil(steps / per_epoch)):
            batches = loader.epoch(epoch, going.step % per_epoch)
            for batch in itertools.islice(batches, steps - going.step):
                for group in optimiser.param_groups:
                    group["lr"] = settings.learning_rate * settings.factor ** (going.step // settings.every)
                with frozen(network):
                    x = network(batch.views[0])  # [B, F]
                optimiser.zero_grad()
                loss(F.linear(x, weight, bias), target[batch.index]).backward()  # type: ignore[no-untyped-call]
                distributed.average_([p.grad for p in (weight, bias) if p.grad is not None])
                optimiser.step()
                if (going.step + 1) % settings.measure_every == 0 or going.step + 1 == steps:
                    history.append([going.step + 1, *test.measure(weight, bias, going.step + 1)])
                going.took_step()
    unread = left_out(data.train, distributed.join(loader.bad))
    if unread is not None:
        data.say(f"{unread}. In training others stand in for them.")
    return _values(np.array(history), test.classes, data)


def loss(logits: Tensor, present: Tensor) -> Tensor:
    """Sum the cross-entropies of logits [B, C] but where present [B, C] is 0, and divide by B: a scalar."""
    weight = (present != 0).to(logits.dtype)  # [B, C]
    target = (present == 1).to(logits.dtype)  # [B, C]
    return F.binary_cross_entropy_with_logits(logits, target, weight=weight, reduction="sum") / len(logits)


def precision(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """Give InvP's average precision of scores [q], of which `positive` [q] show the class; a share."""
    return step(curve(scores - 1e-5 * positive, positive))


def _loader(backbone: FrozenBackbone, data: MultiLabel, settings: VOCLogistic) -> Loader:
    """The batches of training images; a set that is smaller than one is one."""
    world = distributed.world()
    batch = min(settings.batch_size, len(data.train) // world * world)
    if batch < settings.batch_size:
        data.say(
            f"batch_size is {settings.batch_size:,}; there are {len(data.train):,} images, so a batch is {batch:,}"
        )
    return Loader(
        data.train,
        Views(augment=(settings.augment,), pairs=((0, None),)),
        channels=backbone.channels,
        mean=backbone.mean,
        std=backbone.std,
        batch_size=batch,
        seed=settings.seed,
        workers=data.workers,
        device=data.device,
        rank=distributed.rank(),
        world=world,
    )


class _Test:
    """The test set: each image's features as it is and mirrored, made once; which of the two is asked is drawn."""

    def __init__(self, backbone: FrozenBackbone, data: MultiLabel, settings: VOCLogistic) -> None:
        self.settings, self.device = settings, torch.device(data.device)
        both = []
        # Without flips or with nothing but flips one form is enough.
        self.forms = [form for form, share in ((False, 1.0 - settings.test_flip), (True, settings.test_flip)) if share]
        for mirrored in self.forms:
            network = Cut(backbone.module, pool=settings.pool, mirrored=mirrored, of=backbone.description)
            x, self.found = data.features(
                backbone,
                network.to(self.device),
                data.test,
                size=settings.test_size,
                resize=settings.test_resize,
                doing="test features" + (", mirrored" if mirrored else ""),
            )
            both.append(x)
        self.x = both
        self.features = both[0].shape[1]
        self.asked: Presence = data.asked[self.found]  # [q, C]
        self.classes = data.answerable(self.asked)
        self.say = data.say

    @torch.no_grad()
    def measure(self, weight: Tensor, bias: Tensor, number: int) -> list[float]:
        """Give, in percent, the mean over the classes, the mean in the all-point form, and each class's value."""
        scores = torch.stack([self._logits(x, weight, bias) for x in self.x])  # [forms, q, C]
        flipped = uniforms(VIEW, self.settings.seed, number, self.found, _FLIP, draws=1)[:, 0] < self.settings.test_flip
        form = torch.from_numpy(flipped & (len(self.forms) == 2)).long()  # [q]
        own = scores[form, torch.arange(len(form))].numpy()  # [q, C]
        if not np.isfinite(own).all():
            self.say(
                f"Diverged: at step {number:,} logits are not finite, so every image scores alike. Lower the rate."
            )
            own = np.zeros_like(own)
        values, areas = [], []
        for place in self.classes:
            known = self.asked[:, place] != 0  # [q]
            positive = self.asked[known, place] == 1
            values.append(100.0 * precision(own[known, place], positive))
            areas.append(100.0 * all_point(curve(own[known, place], positive)))
        return [float(np.mean(values)), float(np.mean(areas)), *values]

    def _logits(self, x: Tensor, weight: Tensor, bias: Tensor, *, block: int = 4096) -> Tensor:
        """Give the logits [q, C] of features [q, F]."""
        some = [F.linear(part.to(self.device), weight, bias).double().cpu() for part in torch.split(x, block)]
        return torch.cat(some)  # [q, C]


def _values(history: NDArray[np.float64], classes: list[int], data: MultiLabel) -> dict[str, float]:
    """Name the results; history [measurements, 3 + classes]."""
    best = int(history[:, 1].argmax())
    return {
        "mAP/last": float(history[-1, 1]),
        "mAP/best": float(history[best, 1]),
        "best_step": float(history[best, 0]),
        "mAP_all_point/last": float(history[-1, 2]),
        **{f"AP/{data.classes[number]}": float(value) for number, value in zip(classes, history[-1, 3:])},
    }
