# SPDX-License-Identifier: Apache-2.0
"""Cut a box out of an image and resize it, in a loader worker or on the device for a whole batch.

Both ways resize with the antialiased triangle filter ("bilinear with antialias") of PIL and torch, and both agree
with `torchvision.transforms.v2.functional.resized_crop(antialias=True)` on uint8 images within one level of 255.
The worker's result is whole levels, the batch's is not rounded.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
    top, left, height, width = box
    rows, columns = (size, size) if isinstance(size, int) else size
    cut = image[top : top + height, left : left + width]
    if not cut.flags.writeable:  # torch takes writable memory only; decoders and memory maps may lend theirs
        cut = cut.copy()
    # Channels stay last in memory: torch has a uint8 kernel for that layout, twice as fast as PIL's.
    pixels = torch.from_numpy(cut).permute(2, 0, 1)[None]  # [1, C, h, w]
    if (height, width) != (rows, columns):
        pixels = torch.nn.functional.interpolate(
            pixels, size=(rows, columns), mode=filter, antialias=True, align_corners=False
        )  # [1, C, size, size]
    return pixels[0].contiguous()  # [C, size, size]


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


def crop_resize_batch(images: Tensor, index: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut one box out of each of B images of a set and resize it: float32 [B, C, size, size] on [0, 1].

    `images` is uint8 [N, C, H, W], `index` int64 [B] says which of them, `boxes` [B, 4] are (top, left,
    height, width) in pixels. All on one device; nothing is rounded on the way.
    """
    top, left, height, width = boxes.to(torch.float32).unbind(1)  # each [B]
    chosen = images[index].to(torch.float32)  # [B, C, H, W]
    rows = triangle(top, height, length=images.shape[2], size=size) / 255.0  # [B, size, H]
    columns = triangle(left, width, length=images.shape[3], size=size)  # [B, size, W]
    return resample(chosen, rows, columns).clamp_(0.0, 1.0)  # [B, C, size, size]


def triangle(start: Tensor, extent: Tensor, *, length: int, size: int) -> Tensor:
    """Weights [B, size, length] that resize `extent` pixels from `start` on; each row sums to 1.

    `start` and `extent` are float [B]. Pixels outside the box weigh nothing, as if it had been cut out first.
    """
    device = start.device
    scale = (extent / size)[:, None, None]  # [B, 1, 1]
    out = torch.arange(size, device=device, dtype=torch.float32)[None, :, None] + 0.5  # [1, size, 1]
    pixel = torch.arange(length, device=device, dtype=torch.float32)[None, None, :]  # [1, 1, length]
    pixel = pixel - start[:, None, None]  # [B, 1, length], counted from the box's edge
    distance = (pixel + 0.5 - out * scale).abs() / scale.clamp(min=1.0)  # [B, size, length]
    inside = (pixel >= 0) & (pixel < extent[:, None, None])  # [B, 1, length]
    weights = (1.0 - distance).clamp_(min=0.0) * inside  # [B, size, length]
    return weights / weights.sum(2, keepdim=True)  # [B, size, length]


def resample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Apply one matrix per image to its rows and one to its columns: [B, C, H, W] -> [B, C, R, S].

    `rows` is [B, R, H] and `columns` [B, S, W]. In float32: an autocast around the loop does not reach in
    here.
    """
    r, s = rows.shape[1], columns.shape[1]
    # On a CPU a product's last bit can depend on where in memory its matrix begins, and so on the image's place in
    # the batch. With every side a multiple of 16 numbers (64 bytes) all begin alike.
    images, rows, columns = _pad(images), _pad(rows), _pad(columns)
    b, c, h, w = images.shape
    with torch.autocast(images.device.type, enabled=False):
        across = torch.bmm(images.view(b, c * h, w), columns.transpose(1, 2))  # [B, C * H, S]
        across = across.view(b, c, h, -1).transpose(1, 2).reshape(b, h, -1)  # [B, H, C * S]
        down = torch.bmm(rows, across)  # [B, R, C * S]
    return down.view(b, rows.shape[1], c, -1).transpose(1, 2)[:, :, :r, :s].contiguous()  # [B, C, R, S]


def _pad(matrices: Tensor) -> Tensor:
    """Fill the last two sides up with zeros to multiples of 16."""
    height, width = matrices.shape[-2:]
    if height % 16 == 0 and width % 16 == 0:
        return matrices.contiguous()
    return torch.nn.functional.pad(matrices, (0, -width % 16, 0, -height % 16))
