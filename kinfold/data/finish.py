# SPDX-License-Identifier: Apache-2.0
"""From crops to views: views of one size go through the device together, so that their operations start once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kinfold.data.augment import Drawn
from kinfold.data.fused import fused
from kinfold.data.photometric import photometric


def finish(
    crops: Sequence[Tensor],
    drawn: Sequence[Drawn],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    compiled: bool = False,
) -> list[Tensor]:
    """Make views of crops on their device: for each view uint8 [B, C, S, S] and its numbers, to normalised float32.

    The reference is `photometric` for one view after the other, which gives the same to the bit on a CPU. `compiled`
    takes `fused` in its place: for devices that are fast at pixels and slow at starting operations.
    """
    change = fused if compiled else photometric
    views: dict[int, Tensor] = {}
    for numbers in _together(crops):
        images = crops[numbers[0]] if len(numbers) == 1 else torch.cat([crops[view] for view in numbers])
        made = change(images, Drawn.join([drawn[view] for view in numbers]), mean, std)  # [views * B, C, S, S]
        views.update(zip(numbers, made.chunk(len(numbers))))
    return [views[view] for view in range(len(crops))]


def _together(crops: Sequence[Tensor]) -> list[list[int]]:
    """Which views go through together: those of one size, but on a CPU none, which works in small pieces anyway."""
    groups: dict[object, list[int]] = {}
    for view, images in enumerate(crops):
        groups.setdefault(view if images.device.type == "cpu" else images.shape, []).append(view)
    return list(groups.values())
