# SPDX-License-Identifier: Apache-2.0
"""`photometric` without a branch, for a compiler: every image goes through every operation, most with numbers that
change nothing.

One by one such operations would be far more work than `photometric`, the reference. `torch.compile` makes a few
kernels of them, where `photometric` starts some hundreds: what a small model on a fast device waits for. There is one
transfer of numbers, shapes never change from step to step, and nothing on the host waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cache
from types import FunctionType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinfold.data.augment import BRIGHTNESS, CONTRAST, HUE, SATURATION, Drawn
from kinfold.data.photometric import mirrored, send, taps

_FLIP, _GREY_BEFORE, _GREY_AFTER, _CONTRAST, _TO_MEAN, _THRESHOLD, _TURNS = 0, 1, 2, 3, 4, 5, 6
_TAPS = _TURNS + 6 * 3
_NEVER = 2.0  # a threshold above every pixel

Planes = list[Tensor]
"""one [B, S, S] a channel"""


@torch.no_grad()
def fused(
    images: Tensor, drawn: Drawn, mean: Sequence[float], std: Sequence[float], *, compiled: bool = True
) -> Tensor:
    """Do what `photometric` does, which is the reference: equal to it within 1e-5 before the normalisation.

    `compiled=False` runs the same operations one by one. The first call compiles for up to a minute, and again for a
    batch of another shape; an image's last bit may depend on the shape. On a CPU, where nothing waits for operations to
    start, it is slower than `photometric` as soon as an image is blurred.
    """
    numbers = _columns(drawn, colour=images.shape[1] == 3)
    # Decided by the batch, but the same for nearly every batch of a preset.
    half = int(drawn.reach.max()) if drawn.blur.any() else 0
    columns = send(numbers, images.device)  # [B, columns]
    jitter = bool(drawn.jitter.any())
    run = _compiled(images.shape, images.dtype, images.device, columns.shape[1], half, jitter) if compiled else _pixels
    return run(images, columns, half, jitter, tuple(mean), tuple(std))  # [B, C, S, S]


@cache
def _compiled(*_kind: Hashable) -> Callable[..., Tensor]:
    """`_pixels`, to be compiled for one kind of batch only.

    Torch counts by code object what it has compiled, and runs one that was compiled for eight kinds operation by
    operation from then on, without an error. Views of several sizes and a smaller last batch are more: each kind has
    code of its own.
    """
    own = FunctionType(_pixels.__code__.replace(), globals(), _pixels.__name__)
    compiled: Callable[..., Tensor] = torch.compile(own, dynamic=False)
    return compiled


def _columns(drawn: Drawn, *, colour: bool) -> NDArray[np.float32]:
    """All numbers of a batch: [B, columns].

    The contrast wants the mean of what comes before it. So there are three turns before it and three after, each with
    a scale, a share of the grey and a shift of the hue; the other three operations have their turn on one side.
    """
    count = len(drawn.flip)
    place = np.argmax(drawn.order == CONTRAST, axis=1)[:, None]  # [B, 1]
    rest = drawn.order[drawn.order != CONTRAST].reshape(count, 3)  # [B, 3]
    factor = np.take_along_axis(drawn.factors, rest, axis=1)  # [B, 3]
    possible = (BRIGHTNESS, SATURATION, HUE) if colour else (BRIGHTNESS,)
    acts = drawn.jitter[:, None] & np.isin(rest, possible)  # [B, 3]
    turns = []
    for here in (np.arange(3) < place, np.arange(3) >= place):  # [B, 3], before the contrast and after it
        scale = np.where(acts & here & (rest != HUE), factor, 1.0)  # [B, 3]
        to_grey = np.where(acts & here & (rest == SATURATION), 1.0 - factor, 0.0)  # [B, 3]
        shift = np.where(acts & here & (rest == HUE), 6.0 * factor, 0.0)  # [B, 3]
        turns.append(np.stack([scale, to_grey, shift], axis=2).reshape(count, 9))  # [B, 9]
    contrast = np.where(drawn.jitter, drawn.factors[:, CONTRAST], 1.0)  # [B]
    weights, _ = taps(drawn)  # [B, reach + 1]
    weights[~drawn.blur] = np.arange(weights.shape[1]) == 0
    single = [
        drawn.flip,
        drawn.grey & drawn.grey_first & colour,
        drawn.grey & ~drawn.grey_first & colour,
        contrast,
        1.0 - contrast,
        np.where(drawn.solarize, drawn.threshold, _NEVER),
    ]
    return np.concatenate([np.stack(single, axis=1), *turns, weights], axis=1).astype(np.float32)


def _pixels(
    images: Tensor, columns: Tensor, half: int, jitter: bool, mean: tuple[float, ...], std: tuple[float, ...]
) -> Tensor:
    """Everything, for all images: [B, C, S, S]."""
    column = columns[:, :, None, None].unbind(1)  # each [B, 1, 1]
    x = images.to(torch.float32)  # [B, C, S, S]
    if not images.is_floating_point():
        x = x / 255.0
    x = torch.where(column[_FLIP][:, None] > 0.0, x.flip(3), x)
    planes = _to_grey(list(x.unbind(1)), column[_GREY_BEFORE])
    if jitter:
        for turn in range(6):
            if turn == 3:
                of = _luma(planes) if len(planes) == 3 else torch.stack(planes, 1)
                mean_ = of.flatten(1).mean(1)[:, None, None] * column[_TO_MEAN]  # [B, 1, 1]
                planes = [(plane * column[_CONTRAST] + mean_).clamp(0.0, 1.0) for plane in planes]
            first = _TURNS + 3 * turn
            planes = _turn(planes, *column[first : first + 3])
    planes = _to_grey(planes, column[_GREY_AFTER])
    x = torch.stack(planes, 1)  # [B, C, S, S]
    if half:
        index = mirrored(x.shape[3], half, x.device)  # [S + 2 * half]
        for axis in (3, 2):
            x = _blur(x.index_select(axis, index), [weight[:, None] for weight in column[_TAPS:]], axis, half)
    x = torch.where(x >= column[_THRESHOLD][:, None], 1.0 - x, x)
    return torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(len(mean))], 1)  # [B, C, S, S]


def _luma(planes: Planes) -> Tensor:
    red, green, blue = planes
    return red * 0.2989 + green * 0.587 + blue * 0.114  # [B, S, S]


def _to_grey(planes: Planes, where: Tensor) -> Planes:
    if len(planes) != 3:
        return planes
    grey = _luma(planes)  # [B, S, S]
    return [torch.where(where > 0.0, grey, plane) for plane in planes]


def _turn(planes: Planes, scale: Tensor, to_grey: Tensor, shift: Tensor) -> Planes:
    """Brightness, saturation or hue, whichever each image has; the hue as in `photometric`."""
    if len(planes) != 3:
        return [(plane * scale).clamp(0.0, 1.0) for plane in planes]
    grey = _luma(planes) * to_grey  # [B, S, S]
    planes = [(plane * scale + grey).clamp(0.0, 1.0) for plane in planes]
    red, green, blue = planes
    high = torch.maximum(torch.maximum(red, green), blue)  # [B, S, S]
    low = torch.minimum(torch.minimum(red, green), blue)  # [B, S, S]
    chroma, side, below = high - low, green - blue, high - red  # each [B, S, S]
    way = (side.abs() - below).abs() + 2.0 * below  # [B, S, S]
    hue = torch.where(side < 0.0, -way, way) / chroma.clamp(min=torch.finfo(torch.float32).tiny) + shift
    hue = hue - 6.0 * torch.floor(hue * (1.0 / 6.0))  # [B, S, S], 0 to 6
    turned = (
        low + chroma * ((hue - 3.0).abs() - 1.0).clamp(0.0, 1.0),
        high - chroma * ((hue - 2.0).abs() - 1.0).clamp(0.0, 1.0),
        high - chroma * ((hue - 4.0).abs() - 1.0).clamp(0.0, 1.0),
    )
    return [torch.where(shift != 0.0, new, old) for new, old in zip(turned, planes)]


def _blur(around: Tensor, weights: Sequence[Tensor], axis: int, half: int) -> Tensor:
    size = around.shape[axis] - 2 * half
    x = around.narrow(axis, half, size) * weights[0]  # [B, C, S, S] or with mirrored edges on the other axis
    for away in range(1, half + 1):
        pair = around.narrow(axis, half - away, size) + around.narrow(axis, half + away, size)
        x = x + pair * weights[away]
    return x
