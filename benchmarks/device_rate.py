# SPDX-License-Identifier: Apache-2.0
"""What a device can do, and what a recipe asks of it: the two figures that utilisation is made of."""

from __future__ import annotations

import statistics
import time

import torch
from measured import synchronise
from torch.utils.flop_counter import FlopCounterMode

from kinfold.recipe import Recipe
from kinfold.training import build_learner


def matmul_rate(device: torch.device, *, side: int | None = None, groups: int = 7, each: int = 10) -> float:
    """FLOP per second of bf16 products of two square matrices: the median over groups, each a chain without waiting."""
    side = side or (8192 if device.type == "cuda" else 512)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))  # [S, S] each
    out = torch.empty_like(a)
    seconds = []
    for group in range(groups + 1):
        synchronise(device)
        began = time.perf_counter()
        for _ in range(each):
            torch.mm(a, b, out=out)
        synchronise(device)
        if group:  # the first one warms up
            seconds.append((time.perf_counter() - began) / each)
    return 2 * side**3 / statistics.median(seconds)


def flops_of_image(recipe: Recipe, *, batch: int = 32) -> float:
    """FLOP that a step spends on one image: matrix products and convolutions, a multiplication and an addition are two.

    Counted in one forward and backward pass of the learner on the CPU, in which every operation is as large as it is on
    a device; all of them grow with the batch. Normalisation, activations, augmentation and optimiser are not counted.
    """
    learner = build_learner(recipe, images=max(batch, recipe.batch_size)).train()
    sizes = [view.size for view in recipe.views.augment]
    views = [torch.randn(batch, recipe.images.channels, size, size) for size in sizes]  # [B, C, H, W] each
    with FlopCounterMode(display=False) as counter:
        losses, _ = learner(views, torch.arange(batch), 0)
        torch.autograd.backward(torch.stack(list(losses.values())).sum())
    return float(counter.get_total_flops()) / batch
