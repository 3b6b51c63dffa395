# SPDX-License-Identifier: Apache-2.0
"""Crops of a whole batch on the device, in whole levels: equal to `kinfold.data.crop.crop_resize` to the bit.

Torch resizes uint8 images on a CPU with weights that are whole numbers of 15 bits, and rounds to whole levels after
the columns and again after the rows. The same weights as matrices in float32 give the same levels on any device and
for any batch: every product and every partial sum is a multiple of one power of two with less than 24 bits, so no
addition rounds, whatever its order. That is why it makes no difference to a run whether a worker or the device cuts.

Source of the numbers: `_compute_index_ranges_int16_weights` of `aten/src/ATen/native/cpu/UpSampleKernel.cpp`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinfold.devices import to_device

_ONE_PRODUCT = 2.5  # up to this reduction in size the weights have 16 bits or fewer after the point
_MOST_BITS = 22
_PART = 256.0  # where weights are cut in two: both halves are exact in bfloat16, and in TF32
_PLACES = 2**22  # numbers of a piece of a batch on a CPU: 16 MiB of float32,
_PLACES_ON_DEVICE = 2**28  # and elsewhere: 1 GiB, which 512 images of 3 x 256 x 256 stay below
_AT_ONCE = 2**20  # weights that are worked out together


def crop_levels(pixels: Tensor, index: Tensor, boxes: NDArray[np.int64], size: int) -> Tensor:
    """Cut one box out of each of B images of a set and resize it: uint8 [B, C, size, size].

    `pixels` is uint8 [N, C, H, W] and `index` int64 [B] says which of them, both on one device; `boxes` [B, 4] are
    (top, left, height, width) in pixels, on the host. The reference is `crop_resize`, image by image.
    """
    with torch.autocast(pixels.device.type, enabled=False):
        return _crop_levels(pixels, index, boxes, size)


def _crop_levels(pixels: Tensor, index: Tensor, boxes: NDArray[np.int64], size: int) -> Tensor:
    count, channels, (height, width) = len(boxes), pixels.shape[1], pixels.shape[2:]
    where = torch.from_numpy(boxes)  # [B, 4]
    if pixels.device.type == "cuda":
        where = where.pin_memory()  # the host would wait for more than 64 KB of other memory
    where = to_device(where, pixels.device)  # [B, 4]
    single = boxes[:, 2:].max(initial=0) <= _ONE_PRODUCT * size and _in_full(pixels.device)
    made = pixels.new_empty(count, channels, size, size)  # [B, C, size, size]
    # The batch goes through in pieces: on a CPU so that what lies between the two products stays near, elsewhere so
    # that large images do not take the memory that the model needs.
    places = _PLACES if pixels.device.type == "cpu" else _PLACES_ON_DEVICE
    piece = max(1, places // (channels * height * max(width, size)))
    for first in range(0, count, piece):
        some = slice(first, first + piece)
        top, left, tall, wide = where[some].unbind(1)  # each [b]
        images = pixels.index_select(0, index[some]).to(torch.float32)  # [b, C, H, W]
        part = len(images)
        columns = matrices(left, wide, length=width, size=size, single=single)  # [b, S, W]
        images = images.view(part, channels * height, width)  # [b, C * H, W]
        across = _levels(images @ weights.transpose(1, 2) for weights in columns)  # [b, C * H, S]
        across = across.view(part, channels, height, size)  # [b, C, H, S]
        rows = matrices(top, tall, length=height, size=size, single=single)  # [b, S, H]
        made[some] = _levels(weights[:, None] @ across for weights in rows)  # [b, C, S, S]
    return made  # [B, C, size, size]


def _in_full(device: torch.device) -> bool:
    """Whether products of float32 use all of its bits there, as far as the person's settings go."""
    of_device = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    stated = of_device.matmul.fp32_precision
    whole: str = torch.backends.fp32_precision  # type: ignore[attr-defined]
    return (whole if stated == "none" else stated) in ("none", "ieee")


def matrices(start: Tensor, extent: Tensor, *, length: int, size: int, single: bool) -> list[Tensor]:
    """Matrices [B, size, length] that resize `extent` [B] pixels from `start` [B] on; their sum is the weight.

    One, or two of the weights' higher and lower bits, for where the products of one would not be exact.
    """
    taps = _taps(length, size, start.device)
    values = taps.weight[extent]  # [B, size, T]
    places = (taps.first[extent] + start[:, None])[:, :, None] + torch.arange(values.shape[2], device=start.device)
    one = taps.one[extent][:, None, None]  # [B, 1, 1]
    high = torch.zeros_like(values) if single else torch.floor(values / _PART) * _PART  # [B, size, T]
    made = []
    for part in (values,) if single else (high, values - high):
        # Taps that reach over the end weigh nothing; they have columns of their own, so that no place is named twice.
        matrix = torch.zeros(len(start), size, length + values.shape[2], device=start.device)
        made.append(matrix.scatter_(2, places, part / one)[:, :, :length])  # [B, size, length]
    return made


class _Taps(NamedTuple):
    """How to resize 0 to `length` pixels: T weights a pixel of the result."""

    weight: Tensor
    """float32 [length + 1, size, T], whole numbers"""
    first: Tensor
    """int64 [length + 1, size]: the pixel that the first weight is for"""
    one: Tensor
    """float32 [length + 1]: the weight that stands for one, a power of two: its bits stand after the point"""


@lru_cache(maxsize=16)
def _taps(length: int, size: int, device: torch.device) -> _Taps:
    """Work out the weights of every extent up to `length`, once."""
    count = 2 * math.ceil(max(length / size, 1.0)) + 1
    weight = np.zeros((length + 1, size, count), np.float32)  # [length + 1, size, T]
    first = np.zeros((length + 1, size), np.int64)  # [length + 1, size]
    one = np.ones(length + 1, np.float32)  # [length + 1]
    step = max(1, _AT_ONCE // (size * count))
    for low in range(1, length + 1, step):
        some = slice(low, min(low + step, length + 1))
        weight[some], first[some], bits = _whole_weights(np.arange(low, some.stop), size, count)
        one[some] = np.ldexp(1.0, bits)  # here, as a device's powers need not be exact
    return _Taps(*(torch.from_numpy(array).to(device) for array in (weight, first, one)))


def _whole_weights(
    extents: NDArray[np.int64], size: int, count: int
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """The weights [U, size, count] of resizing so many pixels, whole numbers; their first pixels; their bits [U].

    There are as many bits as leave the greatest weight below 2 ** 15.
    """
    scale = (extents / size)[:, None]  # [U, 1]
    reach = np.maximum(scale, 1.0)  # [U, 1]
    centre = scale * (np.arange(size) + 0.5)  # [U, size]
    first = np.maximum((centre - reach + 0.5).astype(np.int64), 0)  # [U, size]
    pixel = first[:, :, None] + np.arange(count)  # [U, size, count]
    share = np.maximum(1.0 - np.abs((pixel - centre[:, :, None] + 0.5) * (1.0 / reach)[:, :, None]), 0.0)
    share *= pixel < extents[:, None, None]
    share /= share.sum(2, keepdims=True)  # [U, size, count]
    # frexp: the greatest is m * 2**e with 0.5 <= m < 1, so with 15 - e bits it is below 2**15 unless it is rounded up.
    greatest = share.max((1, 2))  # [U]
    bits = np.minimum(15 - np.frexp(greatest)[1], _MOST_BITS).astype(np.int64)  # [U]
    bits -= np.floor(0.5 + np.ldexp(greatest, bits)) >= 2**15
    return np.floor(np.ldexp(share, bits[:, None, None]) + 0.5), first, bits


def _levels(parts: Iterable[Tensor]) -> Tensor:
    """Round the sum of one or two products, the second of the weights' lower bits, to whole levels."""
    first, *rest = parts
    if rest:
        # Each part is exact; together they may have more bits than float32, so the lower ones are counted apart.
        whole = first.floor()
        levels = whole + (first - whole + rest[0] + 0.5).floor()
    else:
        levels = first.add_(0.5).floor_()
    return levels.clamp_(max=255.0)
