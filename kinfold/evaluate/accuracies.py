# SPDX-License-Identifier: Apache-2.0
"""Accuracies of a whole network that classifies: the first answer, the first five, and each class alike."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from kinfold import distributed
from kinfold.data.centre_crops import evaluation_batches
from kinfold.data.sources import Source, Subset
from kinfold.evaluate.backbones import FrozenBackbone
from kinfold.evaluate.conditions import Conditions
from kinfold.evaluate.features import frozen
from kinfold.evaluate.labelled import Labels


@torch.no_grad()
def accuracies(
    network: nn.Module,
    backbone: FrozenBackbone,
    data: Conditions,
    test: Source,
    labels: Labels,
    classes: int,
    *,
    size: int,
    resize: int | None,
    bad: dict[int, str],
) -> dict[str, float]:
    """Ask `network` about all images of `test`, whose labels [N] lie below `classes`: accuracies in percent.

    `top1`, `top5` (the label is among the first five) and `mean_per_class`, the mean over the classes that are there of
    their own accuracies. The network is asked in evaluation mode and in fp32. Every process asks about its share of the
    images. `bad` is told which do not decode; they do not count.
    """
    rank, world = distributed.rank(), distributed.world()
    mine = np.arange(rank, len(test), world)  # [q]
    unread: dict[int, str] = {}
    counts = torch.zeros(3, classes, dtype=torch.int64)  # images, hits, hits among five: [3, C]
    batches = evaluation_batches(
        Subset(test, mine),
        size=size,
        resize=resize,
        channels=backbone.channels,
        mean=backbone.mean,
        std=backbone.std,
        batch_size=data.batch_size,
        workers=data.workers,
        device=data.device,
        bad=unread,
    )
    for images, positions in batches if len(mine) else ():
        with frozen(network):
            logits = network(images).float().cpu()  # [b, C]
        own = torch.from_numpy(labels[mine[positions]])  # [b]
        hit = logits.topk(min(5, classes), dim=1).indices == own[:, None]  # [b, 5]
        hit &= torch.isfinite(logits).all(dim=1, keepdim=True)  # who has diverged is right about nothing
        for row, chosen in zip(counts, (own, own[hit[:, 0]], own[hit.any(dim=1)])):
            row += torch.bincount(chosen, minlength=classes)
    bad.update({int(mine[position]): reason for position, reason in unread.items()})
    counts = distributed.gather(counts.to(data.device)[None]).sum(0).cpu().double()  # [3, C]
    asked, first, five = counts.unbind(0)  # each [C]
    there = asked > 0  # [C]
    return {
        "top1": float(100.0 * first.sum() / asked.sum()),
        "top5": float(100.0 * five.sum() / asked.sum()),
        "mean_per_class": float(100.0 * (first[there] / asked[there]).mean()),
    }
