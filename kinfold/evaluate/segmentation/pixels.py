# SPDX-License-Identifier: Apache-2.0
"""Learning the classes of pixels: training on random crops of images with masks, and asking whole images.

The two protocols on masks share it: `segmentation` trains a whole network, `patches` a layer on a frozen one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from kinfold import distributed
from kinfold.console import bar
from kinfold.data.annotated.mask_crops import Cropping, Crops, Whole
from kinfold.data.annotated.masks import VOID, Masks
from kinfold.data.work import Task, run
from kinfold.devices import to_device
from kinfold.errors import UserError
from kinfold.evaluate.backbones import FrozenBackbone
from kinfold.evaluate.features import frozen
from kinfold.evaluate.resumable import Resumable
from kinfold.evaluate.segmentation.confusion import Confusion, constant, values
from kinfold.evaluate.segmentation.masked import Held, Masked
from kinfold.evaluate.segmentation.picture import draw_segmentations
from kinfold.randomness import ORDER, permutation
from kinfold.settings import Count, settings
from kinfold.views import Positive

_SHOWN = 5  # images in the picture


@settings
class PixelTraining:
    """How a network learns the classes of pixels; what the protocols add stands in their own settings."""

    steps: Count = 30_000
    """steps of training, one batch each"""
    batch_size: Count = 16
    """images a step, of all processes together"""
    crops: Crops = Field(default_factory=Crops)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: Positive = 0.003
    """as it is, for this batch"""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """of sgd; adamw has 0.9 and 0.999"""
    weight_decay: Annotated[float, Field(ge=0.0)] = 1e-4
    """on all weights, those of batch norm and biases too"""
    milestones: tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...] = (0.7, 0.9)
    """shares of the steps after which the rate is lower"""
    factor: Positive = 0.1
    """by which the rate is multiplied at each milestone"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    def rate(self, step: int) -> float:
        """The learning rate of `step`, from 0."""
        passed = sum(step >= round(share * self.steps) for share in self.milestones)
        return float(self.learning_rate * self.factor**passed)


def fit(network: nn.Module, train: Masks, data: Masked, settings: PixelTraining, backbone: FrozenBackbone) -> None:
    """Train a network on crops; it gives logits [B, C, S, S] of images [B, c, S, S] as `backbone` wants them.

    The loss is the cross-entropy, its mean over the pixels of the batches of all processes that have a class.
    Raises `UserError` where the training diverges.
    """
    world, rank, device = distributed.world(), distributed.rank(), torch.device(data.device)
    parameters = [p for p in network.parameters() if p.requires_grad]
    batch = min(settings.batch_size, len(train) // world * world)
    if batch < settings.batch_size:
        data.say(f"batch_size is {settings.batch_size:,}; there are {len(train):,} training images: {batch:,} a step.")
    if not batch or batch % world:
        raise UserError(f"A batch of {batch} images does not divide by {world} processes. Take a multiple of {world}.")
    optimizer = _optimizer(parameters, settings)
    alone = [
        buffer
        for module in network.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm)
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]

    def state() -> dict[str, Any]:
        kept = {"weights": dict(network.state_dict()), "optimizer": optimizer.state_dict()["state"]}
        return {**kept, "images": train.fingerprint, "batch": batch}

    def restore(state: dict[str, Any]) -> None:
        if (state["images"], state["batch"]) != (train.fingerprint, batch):
            raise UserError(
                f"{data.progress} was left by a training on other images or with another number of processes. Start "
                "as before, or remove it to begin again."
            )
        network.load_state_dict(state["weights"])
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state["optimizer"]})

    with Resumable(data, state=state, restore=restore, steps=settings.steps, doing="training on pixels") as going:
        tasks = [
            Task(task.epoch, task.positions[rank::world].copy())
            for task in _tasks(len(train), batch, settings, going.step)
        ]
        work = Cropping(train, settings.crops, backbone.channels, settings.seed, _fill(backbone))
        for crops in run(work, tasks, workers=data.workers, pin=device.type == "cuda"):
            images = normalised(to_device(crops.images, device), backbone)  # [b, c, S, S]
            truth = to_device(crops.labels, device).long()  # [b, S, S]
            try:
                loss = pixel_loss(network(images), truth)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise UserError(
                    f"Batch norm cannot train on one place of one image: {len(images)} crops of {settings.crops.size} "
                    "pixels in a process leave no more of a map. Raise batch_size or crops.size."
                ) from error
            if distributed.largest(int(not torch.isfinite(loss)), device):  # all processes stop together
                raise UserError(_diverged("the loss is", going.step, settings))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            distributed.average_(p.grad for p in parameters if p.grad is not None)
            distributed.average_(alone)  # so that all processes have the same network
            for group in optimizer.param_groups:
                group["lr"] = settings.rate(going.step)
            optimizer.step()
            going.took_step()
    if not all(bool(torch.isfinite(p).all()) for p in parameters):
        raise UserError(_diverged("weights are", settings.steps, settings))


def _diverged(what: str, step: int, settings: PixelTraining) -> str:
    return (
        f"The training diverged: {what} not finite at step {step:,} of {settings.steps:,}. Lower learning_rate, now "
        f"{settings.learning_rate:g}."
    )


def pixel_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy of logits [B, C, H, W] and classes int64 [B, H, W], meaned over the pixels that are not void.

    The mean is over the pixels of all processes: the mean over processes of what each of them gets is that of one
    process with all images.
    """
    known = truth != VOID  # [B, H, W]
    count = known.sum().to(logits.dtype)
    distributed.average_([count])
    # Not `F.cross_entropy`, whose gradient on maps adds up in any order on a GPU: a resumed run would differ.
    logs = F.log_softmax(logits, dim=1)  # [B, C, H, W]
    own = logs.gather(1, torch.where(known, truth, 0)[:, None])[:, 0]  # [B, H, W]
    return -torch.where(known, own, 0.0).sum() / count.clamp(min=1.0 / distributed.world())


def ask(network: nn.Module, held: Held, data: Masked, backbone: FrozenBackbone) -> dict[str, float]:
    """Ask for every pixel of the whole test images, at their own size and one by one, and name the results.

    `held` is what `checked` has found.
    """
    test, device = data.test, torch.device(data.device)
    mine = range(distributed.rank(), len(test), distributed.world())
    shown = set(np.linspace(0, len(mine) - 1, min(_SHOWN, len(mine))).astype(int).tolist())
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    confusion = Confusion(len(test.classes), device)
    tasks = [Task(0, np.array([position])) for position in mine]
    with bar("test images", len(tasks)) as advance, frozen(network):
        for number, (image, truth) in enumerate(run(Whole(test, backbone.channels), tasks, workers=data.workers)):
            logits = network(normalised(image[None].to(device), backbone))  # [1, C, H, W]
            predicted = logits[0].argmax(0)  # [H, W]
            confusion.add(truth.to(device), predicted)
            if number in shown:
                kept.append((image, truth, predicted.cpu()))
            advance(1)
    confusion = confusion.joined()
    names, common = test.classes, held.common
    name = "background_only" if common == "background" else "commonest_class_only"
    always = constant(torch.from_numpy(held.pixels), names.index(common))
    nowhere = [name for name, value in zip(names, confusion.iou.tolist()) if math.isnan(value)]
    if nowhere:
        data.say(f"The mean is over {len(names) - len(nowhere)} classes; nowhere to be found: {', '.join(nowhere)}.")
    if data.progress is not None and distributed.is_main():
        path = draw_segmentations(kept, names, data.progress.with_suffix(".png"))
        data.say(f"Some images, their masks and what was predicted: {path}")
    return {**values(confusion, names), name: 100.0 * always}


def normalised(images: Tensor, backbone: FrozenBackbone) -> Tensor:
    """Turn uint8 [B, c, H, W] into the numbers that the backbone was trained on."""
    mean, std = (images.new_tensor(v, dtype=torch.float32)[:, None, None] for v in (backbone.mean, backbone.std))
    return images.float().div_(255.0).sub_(mean).div_(std)  # [B, c, H, W]


def upsample(maps: Tensor, size: tuple[int, int], *, stride: int, first: float) -> Tensor:
    """Interpolate maps [B, C, h, w] linearly to every pixel of `size`: [B, C, H, W].

    Number i of a map is at the pixel `first` + i · `stride`; beyond the outermost ones their values go on. As products
    of matrices, whose gradient is the same each time on a GPU too, which that of `F.interpolate` is not.
    """
    rows, columns = (
        tent(length, pixels, stride=stride, first=first).to(maps) for length, pixels in zip(maps.shape[2:], size)
    )  # [H, h], [W, w]
    return rows @ (maps @ columns.T)  # [B, C, H, W]


def tent(length: int, pixels: int, *, stride: int, first: float) -> Tensor:
    """Weights [pixels, length] of linear interpolation between points `stride` pixels apart; each row sums to 1."""
    where = torch.arange(pixels, dtype=torch.float64).sub(first).div(stride).clamp(0.0, length - 1.0)  # [pixels]
    return (1.0 - (where[:, None] - torch.arange(length)).abs()).clamp(min=0.0)  # [pixels, length]


def _tasks(images: int, batch: int, settings: PixelTraining, start: int) -> Iterator[Task]:
    """Give the positions of every step from `start` on; an epoch's last images that fill no batch are left out."""
    per_epoch, order, of = images // batch, np.empty(0, np.int64), -1
    for step in range(start, settings.steps):
        epoch, place = divmod(step, per_epoch)
        if epoch != of:
            order, of = permutation(ORDER, settings.seed, epoch, n=images), epoch  # [N]
        yield Task(epoch, order[place * batch : (place + 1) * batch])


def _fill(backbone: FrozenBackbone) -> tuple[int, ...]:
    """The mean colour, which is 0 for the network."""
    return tuple(round(255 * min(1.0, max(0.0, mean))) for mean in backbone.mean)


def _optimizer(parameters: list[nn.Parameter], settings: PixelTraining) -> torch.optim.Optimizer:
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
    return torch.optim.SGD(parameters, lr=rate, momentum=settings.momentum, weight_decay=decay)
