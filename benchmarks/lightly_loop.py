# SPDX-License-Identifier: Apache-2.0
"""MoCo v2 in a plain torch loop over lightly's parts: what `benchmarks/against_lightly.py` holds kinfold against.

Taken from lightly: transform, dataset, projection head, loss with its memory bank, momentum update. Taken from kinfold,
so that both sides train the same: the backbone, the first weights, the optimiser's numbers and the rate of every step.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightly.data import LightlyDataset
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import MoCoV2Transform
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from kinfold.encoders import feature_width
from kinfold.optim import SGD, key_momentum, learning_rate
from kinfold.recipe import Recipe
from kinfold.training import build_learner


class InMemory(Dataset[tuple[Any, int]]):
    """Decoded images in memory, handed out as PIL images through `transform`, as torchvision's own CIFAR-10 does it."""

    def __init__(self, pixels: npt.NDArray[np.uint8]) -> None:
        self.pixels = pixels  # [N, H, W, 3]
        self.transform: Callable[[Image.Image], Any] | None = None
        """put here by `LightlyDataset`"""

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, position: int) -> tuple[Any, int]:
        image = Image.fromarray(self.pixels[position])
        return (image if self.transform is None else self.transform(image)), 0


@dataclass
class Trained:
    """What a loop leaves behind."""

    backbone: nn.Module
    losses: list[float] = field(default_factory=list)
    """one a step"""
    ends: list[float] = field(default_factory=list)
    """when each step had ended, on the clock of `time.perf_counter`"""


def transform_of(recipe: Recipe) -> MoCoV2Transform:
    """lightly's transform with the numbers of the recipe's view."""
    view = recipe.views.augment[0]
    bright, contrast, saturation, hue = view.jitter
    return MoCoV2Transform(
        input_size=view.size,
        cj_prob=view.jitter_probability,
        cj_strength=1.0,
        cj_bright=bright,
        cj_contrast=contrast,
        cj_sat=saturation,
        cj_hue=hue,
        min_scale=view.scale[0],
        random_gray_scale=view.grey,
        gaussian_blur=view.blur,
        hf_prob=view.flip,
        normalize={"mean": list(recipe.images.mean), "std": list(recipe.images.std)},
    )


def batches(recipe: Recipe, pixels: npt.NDArray[np.uint8], workers: int) -> DataLoader[tuple[list[Tensor], Tensor]]:
    """Batches of two views a image, shuffled, without the last smaller one."""
    dataset = LightlyDataset.from_torch_dataset(InMemory(pixels), transform=transform_of(recipe))
    return DataLoader(
        dataset,
        batch_size=recipe.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def train(recipe: Recipe, pixels: npt.NDArray[np.uint8], *, workers: int) -> Trained:
    """Train MoCo v2 on `pixels` (uint8 [N, H, W, 3]) for the recipe's epochs, on the CPU.

    Raises `ValueError` for a recipe that is not the MoCo that lightly's parts make: SGD, one hidden layer, a queue.
    """
    how = recipe.optimizer
    if recipe.method.name != "moco" or recipe.memory.name != "queue" or not isinstance(how, SGD):
        raise ValueError("lightly's parts are put together as MoCo here: a queue of keys and SGD")
    (hidden,) = recipe.head.hidden
    learner = build_learner(recipe, images=len(pixels))
    backbone = learner.encoder.backbone
    head = MoCoProjectionHead(feature_width(backbone), hidden, recipe.head.out)
    with torch.no_grad():
        for theirs, ours in zip(head.parameters(), learner.encoder.head.parameters(), strict=True):
            theirs.copy_(ours)
    key_backbone, key_head = copy.deepcopy(backbone), copy.deepcopy(head)
    deactivate_requires_grad(key_backbone)
    deactivate_requires_grad(key_head)
    criterion = NTXentLoss(
        temperature=recipe.method.temperature, memory_bank_size=(recipe.memory.size, recipe.head.out)
    )
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=how.momentum, weight_decay=how.weight_decay)
    loader = batches(recipe, pixels, workers)
    per_epoch, done, step = len(loader), Trained(backbone), 0
    for _ in range(recipe.epochs):
        for (asks, answers), *_ in loader:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(
                    recipe.learning_rate,
                    step=step,
                    steps_per_epoch=per_epoch,
                    epochs=recipe.epochs,
                    batch_size=recipe.batch_size,
                )
            m = key_momentum(recipe.key_momentum, step=step, steps=per_epoch * recipe.epochs)
            update_momentum(backbone, key_backbone, m=m)
            update_momentum(head, key_head, m=m)
            q = head(backbone(asks).flatten(start_dim=1))  # [B, D]
            with torch.no_grad():
                k = key_head(key_backbone(answers).flatten(start_dim=1))  # [B, D]
            loss = criterion(q, k)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            done.losses.append(loss.item())
            done.ends.append(time.perf_counter())
            step += 1
    return done
