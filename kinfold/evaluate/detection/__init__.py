# SPDX-License-Identifier: Apache-2.0
"""Detection: Faster or Mask R-CNN trained from a backbone, all of it, and its average precision.

    a copy of the backbone in a detector  →  SGD for so many steps  →  batch norm's statistics anew  →  AP on the test

Sources: MoCo `detection/` on detectron2; InvP, CO2 and SCE say by which of its files. In VOC's layout AP, AP50 and AP75
are VOC's (11 points for 2007) and `coco/AP` is COCO's; in COCO's layout all are COCO's, and `mask/AP` is of outlines.
Differs: images of upright and of wide form meet in a batch; an epoch's images that do not fill a batch are left out of
it; a test image is seen alone, so that its result does not depend on others. On CUDA, gradients of regions are summed
in no fixed order, so that two runs there agree but not to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kinfold import distributed
from kinfold.console import bar
from kinfold.data.annotated import coco, voc
from kinfold.data.annotated.scenes import Preparing, SceneLoader, Scenes, voc_scenes
from kinfold.errors import UserError
from kinfold.evaluate.backbones import FrozenBackbone
from kinfold.evaluate.conditions import Conditions
from kinfold.evaluate.detection.detected import measure_detections
from kinfold.evaluate.detection.detectors import RCNN, Detector, build_detector
from kinfold.evaluate.features import left_out
from kinfold.evaluate.protocol import Request
from kinfold.evaluate.results import about_source
from kinfold.evaluate.resumable import Resumable
from kinfold.randomness import SPLIT, STEP, permutation, seed_of
from kinfold.settings import Count, settings
from kinfold.views import Positive, Probability


@settings
class Detection:
    """A detector trained from a backbone; steps, not epochs, as detectron2 counts."""

    model: RCNN = Field(default_factory=RCNN)
    iterations: Count = 24_000
    batch_size: Count = 16
    """images of a step on all devices together"""
    learning_rate: Positive = 0.02
    schedule: Literal["steps", "cosine"] = "steps"
    milestones: tuple[Count, ...] = (18_000, 22_000)
    """steps: after so many the rate is multiplied by `factor`"""
    factor: Positive = 0.1
    warmup: Annotated[int, Field(ge=0)] = 100
    """steps in which the rate grows in a line from `warmup_factor` of what it would be"""
    warmup_factor: Annotated[float, Field(ge=0.0, le=1.0)] = 0.001
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    weight_decay: Annotated[float, Field(ge=0.0)] = 1e-4
    norm_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """the same for batch norm's own weights"""
    train_short: Annotated[tuple[Count, ...], Field(min_length=1)] = tuple(range(480, 801, 32))
    """short side of a training image in pixels, one drawn for each image"""
    test_short: Count = 800
    longest: Count = 1333
    """the other side is never longer; the short one then is shorter"""
    flip: Probability = 0.5
    difficult: Literal["learn", "leave-out"] = "learn"
    """whether objects marked as difficult are learned from; the test never counts them"""
    precise_statistics: Annotated[int, Field(ge=0)] = 200
    """batches from which batch norm's statistics are made anew before the test; 0 keeps the running ones"""
    drawn: Annotated[int, Field(ge=0)] = 4
    """test images that are drawn, with the truth beside them, in a picture beside the result"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    def __post_init__(self) -> None:
        if self.schedule == "steps" and self.milestones and max(self.milestones) >= self.iterations:
            raise ValueError(
                f"milestones: {list(self.milestones)} must lie before the end, but iterations is {self.iterations}. "
                "Change both together."
            )

    def at_size(self, size: int, resize: int | None) -> Detection:
        """The same protocol with `size` as the short side in the test, and training images in the same proportion."""
        scale = size / self.test_short
        short = tuple(max(1, round(side * scale)) for side in self.train_short)
        return replace(self, test_short=size, train_short=short, longest=max(1, round(self.longest * scale)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Detectable(Conditions):
    """Images with objects: to learn from, and to be asked."""

    train: Scenes
    test: Scenes

    def about(self) -> dict[str, Any]:
        """Say which images they are, for the result file."""
        return {
            name: {**(about_source(one.source) or {}), "annotations": one.fingerprint, "layout": one.layout}
            for name, one in (("train", self.train), ("test", self.test))
        } | {"classes": list(self.train.classes)}


def open_detection(request: Request, settings: Detection, conditions: dict[str, Any]) -> Detectable:
    """Open what was asked for, in VOC's layout or COCO's.

    Usual splits: trainval of all years and test, else train and val; COCO's are train and val (train2017, val2017).
    Raises `UserError` for what is not there, and where the classes of both sets differ.
    """
    say = conditions["say"]
    other = request.test_data or request.data
    train, test = (_splits_of(data) for data in (request.data, other))
    first = request.train_split or train[0]
    if request.train_split is None and request.test_split is None and test[1].endswith("val"):
        first = first.replace("trainval", "train")  # what is asked must not be learned
    kits = [
        kit for data in dict.fromkeys((request.data, other)) if not coco.is_coco(data) for kit in voc.find_devkits(data)
    ]
    classes = voc.classes_of(kits) if kits else ()
    learned = _open(request.data, first, classes, settings, say, request.limit)
    asked = _open(other, request.test_split or test[1], classes, settings, say, request.limit)
    if set(learned.classes) != set(asked.classes):
        odd = ", ".join(sorted(set(learned.classes) ^ set(asked.classes))[:10])
        raise UserError(f"The training and the test images do not have the same classes; in one set only: {odd}.")
    place = np.array([learned.classes.index(name) for name in asked.classes], np.int64)  # [C]
    objects = [one._replace(labels=place[one.labels]) for one in asked.objects]
    asked = Scenes(asked.source, objects, learned.classes, asked.layout)
    names = {learned.source.name(i) for i in range(len(learned))}
    both = sum(asked.source.name(i) in names for i in range(len(asked)))
    if both:
        say(f"{both:,} of the {len(asked):,} test images are training images too, so the result is not one of a test.")
    if request.workers is None and conditions["device"] == "cpu":
        conditions = {**conditions, "workers": 0}  # decoding takes little beside training, which needs the processors
    return Detectable(train=learned, test=asked, **conditions)


def _splits_of(data: str) -> tuple[str, str]:
    """The usual splits of a set: to learn from, and to be asked."""
    if coco.is_coco(data):
        return "train", "val"
    kits = voc.find_devkits(data)
    whole = [kit for kit in kits if voc.has_list(kit, "trainval")]
    asked = [kit for kit in kits if voc.has_list(kit, "test")]
    name = "test" if asked else "val"
    test = (asked or [kit for kit in kits if voc.has_list(kit, "val")] or kits)[0]
    learned = [f"{kit.year}_{'trainval' if whole else 'train'}" for kit in whole or kits]
    return "+".join(learned), f"{test.year}_{name}"


def _open(
    data: str, split: str, classes: tuple[str, ...], settings: Detection, say: Callable[[str], None], limit: int | None
) -> Scenes:
    masks = settings.model.masks
    if coco.is_coco(data):
        found = coco.coco_scenes(coco.annotation_file(data, split), masks=masks, say=say)
    elif masks:
        raise UserError(f"model.masks: {data} is in VOC's layout, which has boxes only. Give COCO's, or masks=false.")
    else:
        found = voc_scenes(data, split, classes, say=say)
    if limit is not None and limit < len(found):
        found = found.some(np.sort(permutation(SPLIT, 0, n=len(found))[:limit]))
    return found


def detection(backbone: FrozenBackbone, data: Detectable, settings: Detection) -> dict[str, float]:
    """Train a detector from a copy of the backbone and measure it: average precisions in percent.

    `AP` is the mean over overlaps from 0.50 to 0.95, `AP50` and `AP75` are of one overlap, `AP50/person` of a class.
    VOC's layout has `AP50/11-point` and `AP50/area` too. Raises `UserError` where the loss stops being finite.
    """
    device, world = torch.device(data.device), distributed.world()
    learned = data.train.learnable(difficult=settings.difficult == "learn", say=data.say)
    batch = settings.batch_size
    if batch > len(learned):
        batch = max(world, len(learned) // world * world)
        data.say(f"batch_size is {settings.batch_size}; there are {len(learned)} training images, so it is {batch}.")
    model = build_detector(backbone, settings.model, classes=len(learned.classes), seed=settings.seed).to(device)
    if device.type == "cuda" and world > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    work = Preparing(
        learned,
        settings.train_short,
        settings.longest,
        settings.flip,
        backbone.channels,
        settings.seed,
        settings.model.masks,
    )
    loader = SceneLoader(work, batch_size=batch, workers=data.workers, rank=distributed.rank(), world=world)
    _train(model, loader, data, settings)
    renew_statistics(model, loader, settings)
    remark = left_out(learned.source, distributed.join(loader.bad))
    if remark is not None:
        data.say(f"Training: {remark}; others stood in.")
    learned.tell_odd(distributed.join(loader.odd), lambda text: data.say(f"Training: {text}"))
    return measure_detections(
        model,
        data.test,
        data,
        short=settings.test_short,
        longest=settings.longest,
        channels=backbone.channels,
        drawn=settings.drawn,
    )


def rate(settings: Detection, step: int) -> float:
    """Give the learning rate of a step, counted from 0."""
    share = settings.factor ** sum(step >= milestone for milestone in settings.milestones)
    if settings.schedule == "cosine":
        share = 0.5 * (1.0 + math.cos(math.pi * step / settings.iterations))
    if step < settings.warmup:
        along = step / settings.warmup
        share *= settings.warmup_factor * (1.0 - along) + along
    return settings.learning_rate * share


def _train(model: Detector, loader: SceneLoader, data: Detectable, settings: Detection) -> None:
    """Take all steps that were not taken yet."""
    norms = {id(p) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) for p in m.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in norms], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if id(p) in norms], "weight_decay": settings.norm_decay},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum)
    several = distributed.world() > 1
    wrapped = DistributedDataParallel(model, broadcast_buffers=False) if several else model
    model.train()

    def restore(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    def state() -> dict[str, Any]:
        return {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()}

    with Resumable(data, state=state, restore=restore, steps=settings.iterations, doing="detector") as going:
        for batch in loader.steps(going.step, settings.iterations):
            for group in optimizer.param_groups:
                group["lr"] = rate(settings, going.step)
            with _seeded(data.device, settings.seed, going.step):
                losses = wrapped(batch.images, _on(batch.targets, data.device))
                loss = torch.stack(list(losses.values())).sum()
            broken = distributed.largest(int(not torch.isfinite(loss)), torch.device(data.device))
            if broken:
                said = ", ".join(f"{name} {float(value.detach()):.3g}" for name, value in losses.items())
                raise UserError(
                    f"The detector's loss is not finite at step {going.step:,} ({said}). Lower learning_rate, now "
                    f"{settings.learning_rate:g}, or make warmup longer, now {settings.warmup} steps."
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if several:  # each process has seen other images; synchronised batch norm has equal statistics already
                distributed.average_(b for n, b in model.named_buffers() if n.endswith(("running_mean", "running_var")))
            going.took_step()


@torch.no_grad()
def renew_statistics(model: Detector, loader: SceneLoader, settings: Detection) -> None:
    """Replace the running statistics of trained batch norm by means over so many batches of training images."""
    model.train()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    if not settings.precise_statistics or not norms:
        return
    momenta = [norm.momentum for norm in norms]
    kept = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var) if buffer is not None]
    means = [torch.zeros_like(buffer) for buffer in kept]
    for norm in norms:
        norm.momentum = 1.0  # so that the running statistics are those of the last batch
    first, device = settings.iterations, str(model.get_buffer("mean").device)
    with bar("batch norm's statistics", settings.precise_statistics) as advance:
        for number, batch in enumerate(loader.steps(first, first + settings.precise_statistics)):
            with _seeded(device, settings.seed, first + number):
                model(batch.images, _on(batch.targets, device))
            for mean, buffer in zip(means, kept):
                mean += (buffer - mean) / (number + 1)
            advance(1)
    distributed.average_(means)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    for mean, buffer in zip(means, kept):
        buffer.copy_(mean)


def _on(targets: list[dict[str, Tensor]], device: str) -> list[dict[str, Tensor]]:
    return [{name: value.to(device) for name, value in target.items()} for target in targets]


@contextmanager
def _seeded(device: str, seed: int, step: int) -> Iterator[None]:
    """Make what torch's own generators draw, the boxes to learn from, a function of the step; put them back after."""
    where = torch.device(device)
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        torch.manual_seed(seed_of(STEP, seed, step, distributed.rank()))
        yield
