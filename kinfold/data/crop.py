# SPDX-License-Identifier: Apache-2.0
"""Cut a box out of an image and resize it, in a loader worker; `kinfold.data.exact_crop` does it for a whole batch.

Both resize with the antialiased triangle filter ("bilinear with antialias") of PIL and torch to the same whole levels,
and agree with `torchvision.transforms.v2.functional.resized_crop(antialias=True)` on uint8 images within one level of
255.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from kinfold.data.decode import Reduced

Box = tuple[int, int, int, int]
"""top, left, height, width in pixels"""

Filter = Literal["bilinear", "bicubic"]
"""both antialiased"""


def crop_resize(
    image: NDArray[np.uint8], box: Box, size: int | tuple[int, int], *, filter: Filter = "bilinear"
) -> Tensor:
    """Cut `box` out of `image` [H, W, C] and resize it to `size`: uint8 [C, size, size].

    `size` is a side, or (height, width). The bicubic filter agrees with PIL's within a level too.
    """
    return _resized(image, box, (size, size) if isinstance(size, int) else size, filter)[0].contiguous()  # [C, S, S]


def crop_resize_into(image: NDArray[np.uint8], box: Box, out: Tensor) -> None:
    """Write what `crop_resize` gives into `out` uint8 [C, size, size]: fastest where its channels lie last in memory.

    The kernel makes them in that order, so nothing is turned around on the way into such a batch.
    """
    out.copy_(_resized(image, box, (out.shape[1], out.shape[2]), "bilinear")[0])


def crop_reduced_into(image: Reduced, box: Box, out: Tensor) -> None:
    """Do what `crop_resize_into` does for an image decoded at a fraction of its size: `box` is one of the full image.

    The box lies between the reduced pixels where `shrink` does not divide it, and is cut there exactly.
    """
    if image.shrink == 1:
        crop_resize_into(image.pixels, box, out)
        return
    top, left = (corner + start / image.shrink for corner, start in zip(image.corner, box[:2]))
    bottom, right = top + box[2] / image.shrink, left + box[3] / image.shrink
    # Only the pixels that the box touches: the filter would reach beyond it.
    first, before = int(top), int(left)
    part = image.pixels[first : math.ceil(bottom), before : math.ceil(right)]  # [h, w, C]
    flat = Image.fromarray(part[:, :, 0] if part.shape[2] == 1 else part)
    inside = (left - before, top - first, min(right - before, flat.width), min(bottom - first, flat.height))
    made = flat.resize((out.shape[2], out.shape[1]), Image.Resampling.BILINEAR, box=inside)
    out.copy_(torch.from_numpy(np.array(made).reshape(out.shape[1], out.shape[2], -1)).permute(2, 0, 1))


def _resized(image: NDArray[np.uint8], box: Box, size: tuple[int, int], filter: Filter) -> Tensor:
    """Cut and resize: uint8 [1, C, *size], in the order in memory that the kernel makes it in."""
    top, left, height, width = box
    cut = image[top : top + height, left : left + width]
    if not cut.flags.writeable:  # torch takes writable memory only; decoders and memory maps may lend theirs
        cut = cut.copy()
    # Channels stay last in memory, and the batch axis is put before all others so that torch sees that they do: it has
    # a uint8 kernel for that layout, twice as fast as PIL's, and hands on the same layout.
    pixels = torch.from_numpy(cut)[None].permute(0, 3, 1, 2)  # [1, C, h, w]
    if (height, width) == size:
        return pixels
    return torch.nn.functional.interpolate(pixels, size=size, mode=filter, antialias=True, align_corners=False)


def centre_crop(image: NDArray[np.uint8], size: int, resize: int, *, filter: Filter = "bilinear") -> Tensor:
    """Resize the short side of `image` [H, W, C] to `resize` and cut the centre out: uint8 [C, size, size].

    An image that is `size` by `size` already stays as it is.
    """
    height, width = image.shape[:2]
    if height == width == size:
        return torch.from_numpy(image).permute(2, 0, 1)  # [C, size, size]
    short = min(height, width)
    # The long side is cut off to whole pixels and the middle rounded half to even, as torchvision does.
    rows, columns = (resize * side // short for side in (height, width))
    resized = crop_resize(image, (0, 0, height, width), (rows, columns), filter=filter)  # [C, rows, columns]
    top, left = round((rows - size) / 2), round((columns - size) / 2)
    return resized[:, top : top + size, left : left + size]  # [C, size, size]
