# SPDX-License-Identifier: Apache-2.0
"""The training that fine-tuning and semi-supervised evaluation share: a copy of the backbone and a new classifier.

The backbone that is measured stays as it was, to the bit: a copy trains, in training mode, by SGD at a rate of its own,
and the classifier at a multiple of it. Both rates follow the schedules of the papers.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Annotated, Any, Literal, NamedTuple, Self

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn
from torch.nn import functional as F

from kinfold import distributed
from kinfold.data.any_crop import AnyCrop
from kinfold.data.loader import Loader
from kinfold.data.sources import Source, split_off
from kinfold.errors import UserError
from kinfold.evaluate.accuracies import accuracies
from kinfold.evaluate.backbones import FrozenBackbone
from kinfold.evaluate.features import frozen, left_out, resize_for
from kinfold.evaluate.labelled import Labelled, Labels, labels_of
from kinfold.evaluate.linear import Cosine, Steps, share_of_rate
from kinfold.evaluate.linear.classifier import first_weights
from kinfold.evaluate.resumable import Resumable
from kinfold.randomness import STEP, seed_of
from kinfold.settings import Count, settings
from kinfold.views import Augmentation, Positive, Views, expand_preset


class Diverged(UserError):
    """The training loss is no number any more."""


@settings
class Tuning:
    """How a copy of a backbone is trained with a new classifier; abstract, the protocols add what they ask."""

    epochs: Count = 30
    batch_size: Count = 128
    schedule: Annotated[Steps | Cosine, Field(discriminator="name")] = Field(default_factory=Steps)
    """of the backbone's rate; a milestone is a number of finished epochs"""
    head_schedule: Literal["same", "constant"] = "same"
    """whether the classifier's rate falls with the backbone's or stays"""
    first_head_factor: Positive | None = None
    """the classifier's multiple of the backbone's rate in the first epoch; as in the others if not given"""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """on all weights, biases and norms too"""
    init: Literal["normal", "default", "fan-out"] = "default"
    """first weights of the classifier: N(0, 0.01); torch's own; N(0, √(2 / C))"""
    augment: Annotated[Augmentation, BeforeValidator(expand_preset)] | None = None
    """how training images are varied; crops of 0.08 to 1 of the image and flips if not given"""
    train_resize: Count | None = None
    """the crop is this instead: short side to so many pixels, then a square of the augmentation's size anywhere"""
    test_size: Count | None = None
    """side of a test image in pixels; the backbone's own size if not given"""
    test_resize: Count | None = None
    """short side before the central crop of `test_size`; straight to `test_size` if not given"""
    measure_every: Count = 1
    """epochs between two measurements; the first and the last are measured always"""
    drop_last: bool = False
    """leave out the last, smaller batch of an epoch"""
    sync_batch_norm: bool = True
    """batch norm over the batch of all CUDA devices; elsewhere, or if false, each process normalises its own images"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """of the training steps' products, on CUDA; weights and measurements are fp32 always"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    def __post_init__(self) -> None:
        if self.test_resize is not None and (self.test_size is None or self.test_resize < self.test_size):
            raise ValueError(
                f"test_resize: {self.test_resize} is the short side that test_size is cut from, so give a test_size of "
                f"at most {self.test_resize}"
            )
        if self.train_resize is None:
            return
        crop = self.augment
        if crop is None or not crop.scale == crop.ratio == (1.0, 1.0) or crop.size > self.train_resize:
            raise ValueError(
                f"train_resize: {self.train_resize} takes the place of the crop, so augment is needed, with a size of "
                f"at most {self.train_resize}, scale: [1.0, 1.0] and ratio: [1.0, 1.0]"
            )

    def at_size(self, size: int, resize: int | None) -> Self:
        """The same protocol for images of another side, cut from a short side in the same proportion."""
        changes: dict[str, Any] = {}
        if self.augment is not None:
            changes["augment"] = replace(self.augment, size=size)
            if self.train_resize is not None:
                changes["train_resize"] = round(self.train_resize * size / self.augment.size)
        if self.test_size is not None:
            if resize is None and self.test_resize is not None:
                resize = round(self.test_resize * size / self.test_size)
            changes |= {"test_size": size, "test_resize": resize}
        return replace(self, **changes)


class Task(NamedTuple):
    """Images to learn from and images to be asked, with labels that count from 0 to C - 1."""

    train: Source
    labels: Labels
    """[N]"""
    test: Source
    asked: Labels
    """[Q]"""
    classes: int
    """C"""


def split_test(data: Labelled, seed: int) -> tuple[Source, Source]:
    """The images to learn from and to be asked; a fifth of each class is held out, and said, where none are given."""
    if data.test is not None:
        return data.train, data.test
    labels_of(data.train, None, say=data.say)  # refuses before anything is split
    data.say("There is no test split: a fifth of the images of each class is held out and not trained on.")
    return split_off(data.train, 0.2, seed)


def named(history: list[dict[str, float]], classes: int) -> dict[str, float]:
    """Name the results of the measurements `history`: those of the last epoch, and the best of each.

    `top1`, `mean_per_class` (the mean of the classes' accuracies) and from 6 classes on `top5` are the last epoch's.
    `best/top1` and so on are each the largest of all measured epochs, so chosen on the test set, as the authors do;
    `best_epoch` is that of the best top-1, counted from 1.
    """
    values: dict[str, float] = {}
    for name in ("top1", "top5", "mean_per_class"):
        if name != "top5" or classes > 5:
            values[name] = history[-1][name]
            values[f"best/{name}"] = max(scores[name] for scores in history)
    values["best_epoch"] = max(history, key=lambda scores: scores["top1"])["epoch"]
    return values


def tune(
    backbone: FrozenBackbone,
    data: Labelled,
    task: Task,
    settings: Tuning,
    *,
    backbone_rate: float,
    head_factor: float,
    doing: str,
    part: str | None = None,
) -> list[dict[str, float]]:
    """Train a copy of the backbone with a new classifier; gives the measurements, one an epoch measured, in order.

    Each has `epoch` (from 1), `top1`, `top5` and `mean_per_class` in percent. `part` names one of several trainings of
    a protocol. Raises `Diverged` where the loss is not finite.
    """
    device, world = torch.device(data.device), distributed.world()
    size, resize = settings.test_size, settings.test_resize
    if size is None:
        size = backbone.size
        resize = resize_for(task.test, size, backbone.resize, channels=backbone.channels)
    augment = settings.augment or Augmentation(size=size, scale=(0.08, 1.0))
    train: Source | AnyCrop = task.train
    if settings.train_resize is not None:
        train = AnyCrop(train, backbone.channels, augment.size / settings.train_resize, settings.seed)
    loader = Loader(
        train,
        Views(augment=(augment,), pairs=((0, None),)),
        channels=backbone.channels,
        mean=backbone.mean,
        std=backbone.std,
        batch_size=_batch_size(data, task, settings),
        seed=settings.seed,
        workers=data.workers,
        device=device,
        rank=distributed.rank(),
        world=world,
        resident=None if settings.train_resize is None else False,  # these crops are cut when an image is read
        drop_last=settings.drop_last,
    )
    network = _network(backbone, task.classes, size, settings, device)
    groups = [{"params": list(part.parameters())} for part in (network.backbone, network.classifier)]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=settings.momentum, weight_decay=settings.weight_decay)
    labels = torch.from_numpy(task.labels).to(device)  # [N]
    half = settings.precision == "bf16" and device.type == "cuda"
    if settings.precision == "bf16" and not half:
        data.say(f"precision: bf16 is for CUDA devices; on {device.type} everything is computed in fp32.")
    per_epoch, steps = loader.steps_per_epoch, loader.steps_per_epoch * settings.epochs
    history: list[dict[str, float]] = []
    bad: dict[int, str] = {}

    def state() -> dict[str, Any]:
        return {
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "history": history,
            "images": task.train.fingerprint,
            "steps": steps,
        }

    def restore(state: dict[str, Any]) -> None:
        if (state["images"], state["steps"]) != (task.train.fingerprint, steps):
            raise UserError(
                f"{data.progress} was left by a training on other images or with another number of processes. Start "
                "as before, or remove it to begin again."
            )
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        history[:] = state["history"]

    network.train()
    randomness = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])  # the caller's stays
    going = Resumable(data, state=state, restore=restore, steps=steps, doing=doing, part=part)
    with randomness, going:
        for epoch in range(going.step // per_epoch, settings.epochs):
            if isinstance(train, AnyCrop):
                train.epoch = epoch
            for batch in loader.epoch(epoch, going.step % per_epoch):
                now = rates(settings, backbone_rate, head_factor, epoch=epoch, step=going.step, steps=steps)
                # Whatever draws from torch's own generators (dropout) does so as a function of the step.
                torch.manual_seed(seed_of(STEP, settings.seed, going.step, distributed.rank()))
                loss = _learn(network, optimizer, batch.views[0], labels[batch.index], now, half=half)
                if not torch.isfinite(loss):
                    raise Diverged(
                        f"{doing}: the loss is not finite at step {going.step:,} of {steps:,}. Its rates were "
                        f"{now[0]:g} for the backbone and {now[1]:g} for the classifier; lower them."
                    )
                ends = going.step % per_epoch == per_epoch - 1
                # Measured before the step is counted: what is kept at its end then has the measurement too.
                if ends and (epoch % settings.measure_every == 0 or epoch == settings.epochs - 1):
                    scores = accuracies(
                        network, backbone, data, task.test, task.asked, task.classes, size=size, resize=resize, bad=bad
                    )
                    history.append({"epoch": float(epoch + 1), **scores})
                going.took_step()
    unread = left_out(task.train, distributed.join(loader.bad))
    if unread is not None:
        data.say(f"{unread}. In training others stand in for them.")
    unread = left_out(task.test, distributed.join(bad))
    if unread is not None:
        data.say(unread)
    return history


def rates(
    settings: Tuning, backbone_rate: float, head_factor: float, *, epoch: int, step: int, steps: int
) -> tuple[float, float]:
    """Give the rates of the backbone and of the classifier in `step` of `steps`, in `epoch`; all counted from 0."""
    share = share_of_rate(settings.schedule, epoch=epoch, step=step, steps=steps)
    if epoch == 0 and settings.first_head_factor is not None:
        head_factor = settings.first_head_factor
    return backbone_rate * share, backbone_rate * head_factor * (share if settings.head_schedule == "same" else 1.0)


def _learn(
    network: _Network,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    target: Tensor,
    now: tuple[float, float],
    *,
    half: bool,
) -> Tensor:
    """Take a step on images [B, C, S, S] and labels [B] with the two rates; gives the loss before it, a scalar."""
    for group, rate in zip(optimizer.param_groups, now):
        group["lr"] = rate
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=half):
        logits = network(images.contiguous(memory_format=torch.channels_last))  # [B, classes]
    loss = F.cross_entropy(logits.float(), target)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    mean = loss.detach().clone()
    # With the gradients go the loss, so that all processes agree on it, and the running statistics of batch norm.
    gradients = [weight.grad for weight in network.parameters() if weight.grad is not None]
    distributed.average_([mean, *gradients, *(b for b in network.buffers() if b.is_floating_point())])
    optimizer.step()
    return mean


class _Network(nn.Module):
    """A backbone and a linear classifier: [B, C, H, W] to logits [B, classes]."""

    def __init__(self, backbone: nn.Module, classifier: nn.Linear) -> None:
        super().__init__()
        self.backbone, self.classifier = backbone, classifier

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.backbone(images).flatten(1))  # [B, classes]
        return logits


def _network(backbone: FrozenBackbone, classes: int, size: int, settings: Tuning, device: torch.device) -> _Network:
    """A copy of the backbone, all of it to be trained, and the new classifier."""
    module = copy.deepcopy(backbone.module).to(device).requires_grad_(True)
    with frozen(module):
        width = module(torch.zeros(1, backbone.channels, size, size, device=device)).flatten(1).shape[1]
    # Torch draws first weights when it makes a layer; these come from the seed, and its random state stays.
    classifier: nn.Linear = nn.utils.skip_init(nn.Linear, width, classes)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for own, first in zip(
            (classifier.weight, classifier.bias), first_weights(settings.init, classes, width, seed=settings.seed)
        ):
            own.copy_(first)
    if settings.sync_batch_norm and device.type == "cuda" and distributed.world() > 1:
        from timm.layers.norm_act import convert_sync_batchnorm  # knows timm's fused norms too

        module = convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
    return _Network(module, classifier.to(device))


def _batch_size(data: Labelled, task: Task, settings: Tuning) -> int:
    """The batch that was asked for, or as many images as there are, in equal shares for all processes."""
    count, world = len(task.train), distributed.world()
    if count >= settings.batch_size:
        return settings.batch_size
    batch = count // world * world
    if batch < 2 * world:
        raise UserError(
            f"There are {count} training images for {world} process(es), and batch norm needs two for each. Give more "
            "images, or start fewer processes."
        )
    data.say(
        f"batch_size is {settings.batch_size:,}; there are {count:,} training images, so a batch has {batch:,} of them."
    )
    return batch
