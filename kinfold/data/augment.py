# SPDX-License-Identifier: Apache-2.0
"""Augmentation in two halves: a view's numbers, drawn from its address, and its pixels, made on the device.

`draw` says for every image of a batch where its crop lies and what happens to its colours; `photometric` does
the latter for the whole batch at once, each image with its own numbers. For the same numbers it equals the
functions of `torchvision.transforms.v2.functional` on float images; the distributions are those of torchvision's
`RandomResizedCrop`, `ColorJitter`, `RandomGrayscale`, `GaussianBlur`, `RandomSolarize` and `RandomHorizontalFlip`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinfold.randomness import VIEW, uniforms
from kinfold.views import Augmentation

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_TRIES = 10  # RandomResizedCrop's; then it takes the middle of the image
_DRAWS = 2 * _TRIES + 16
_CACHE = 2**20  # numbers of a piece of a batch on a CPU: 4 MiB of float32

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


class Operation(Protocol):
    """One of the four of colour jitter: [m, C, S, S] and factors [m, 1, 1, 1]; may write into the images."""

    def __call__(self, images: Tensor, factor: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Drawn:
    """The numbers of one view for B images; `factors` and `order` matter only where `jitter` is true."""

    box: NDArray[np.int64]
    """crops [B, 4]: top, left, height, width in pixels"""
    flip: Flags
    """[B]"""
    jitter: Flags
    """[B]"""
    factors: Floats
    """[B, 4]: brightness, contrast, saturation (1 changes nothing) and hue (0 changes nothing)"""
    order: NDArray[np.int64]
    """[B, 4]: which of the four comes first, second, third, last"""
    grey: Flags
    """[B]"""
    blur: Flags
    """[B]"""
    sigma: Floats
    """[B]: standard deviation of the blur in pixels, where `blur` is true"""
    solarize: Flags
    """[B]"""

    def part(self, start: int, stop: int) -> Drawn:
        """The numbers of images `start` to `stop` of the batch."""
        return Drawn(**{field.name: getattr(self, field.name)[start:stop] for field in fields(self)})


def draw(
    augmentation: Augmentation,
    *,
    seed: int,
    epoch: int,
    image: NDArray[np.int64],
    view: int,
    height: NDArray[np.int64],
    width: NDArray[np.int64],
) -> Drawn:
    """Draw the numbers of view `view` of the images `image` [B], whose sizes are `height` and `width` [B].

    Each number has its own place in the address's stream, so changing one setting leaves all the others as
    they were.
    """
    u = uniforms(VIEW, seed, epoch, image, view, draws=_DRAWS)  # [B, draws]
    own = u[:, 2 * _TRIES :]  # [B, 16]
    low, high = augmentation.blur_sigma
    return Drawn(
        box=_boxes(augmentation, u[:, : 2 * _TRIES], own[:, :2], height, width),
        flip=own[:, 2] < augmentation.flip,
        jitter=own[:, 3] < augmentation.jitter_probability,
        factors=_factors(augmentation.jitter, own[:, 4:8]),
        order=np.argsort(own[:, 8:12], axis=1, kind="stable"),
        grey=own[:, 12] < augmentation.grey,
        blur=own[:, 13] < augmentation.blur,
        sigma=low + (high - low) * own[:, 14],
        solarize=own[:, 15] < augmentation.solarize,
    )


def _factors(strengths: tuple[float, float, float, float], u: Floats) -> Floats:
    """Spread u [B, 4] over torchvision's ranges: 1 - s to 1 + s, not below 0, and -h to h for the hue."""
    strength = np.asarray(strengths)  # [4]
    low = np.append(np.maximum(0.0, 1.0 - strength[:HUE]), -strength[HUE])  # [4]
    high = np.append(1.0 + strength[:HUE], strength[HUE])  # [4]
    factors: Floats = low + (high - low) * u  # [B, 4]
    return factors


def _boxes(
    augmentation: Augmentation,
    tries: Floats,
    corner: Floats,
    height: NDArray[np.int64],
    width: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Choose crops as RandomResizedCrop does: the first of ten (area, ratio) that fits, else the middle."""
    low, high = augmentation.scale
    narrow, broad = augmentation.ratio
    area = (height * width)[:, None] * (low + (high - low) * tries[:, 0::2])  # [B, 10]
    ratio = np.exp(math.log(narrow) + (math.log(broad) - math.log(narrow)) * tries[:, 1::2])  # [B, 10]
    w = np.rint(np.sqrt(area * ratio)).astype(np.int64)  # [B, 10]
    h = np.rint(np.sqrt(area / ratio)).astype(np.int64)  # [B, 10]
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])  # [B, 10]
    first = np.argmax(fits, axis=1)[:, None]  # [B, 1]
    found = fits.any(axis=1)  # [B]
    # Where none fits: the whole image, cut down to the nearest ratio that is allowed.
    shape = width / height  # [B]
    middle_h = np.where(shape < narrow, np.rint(width / narrow), height)  # [B]
    middle_w = np.where(shape > broad, np.rint(height * broad), width)  # [B]
    h = np.where(found, np.take_along_axis(h, first, axis=1)[:, 0], np.clip(middle_h, 1, height))
    w = np.where(found, np.take_along_axis(w, first, axis=1)[:, 0], np.clip(middle_w, 1, width))
    top = np.where(found, np.floor(corner[:, 0] * (height - h + 1)), (height - h) // 2)  # [B]
    left = np.where(found, np.floor(corner[:, 1] * (width - w + 1)), (width - w) // 2)  # [B]
    return np.stack([top, left, h, w], axis=1).astype(np.int64)  # [B, 4]


@torch.no_grad()
def photometric(
    images: Tensor, drawn: Drawn, augmentation: Augmentation, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Do to crops [B, C, S, S] on [0, 1] what was drawn for them, then normalise: a new tensor, same shape.

    In the order of `Augmentation`: colour and grey (or grey and colour), blur, solarise, flip, normalise.
    With other than 3 channels brightness and contrast act, and saturation, hue and grey are left out.
    """
    centre = torch.tensor(mean, dtype=torch.float32, device=images.device)[:, None, None]  # [C, 1, 1]
    spread = torch.tensor(std, dtype=torch.float32, device=images.device)[:, None, None]  # [C, 1, 1]
    result = images.clone()  # [B, C, S, S]
    # On a CPU the batch goes through in pieces that stay in its cache, a third faster at 224 pixels.
    numbers = math.prod(images.shape[1:])
    piece = max(1, _CACHE // numbers) if images.device.type == "cpu" else len(images)
    for start in range(0, len(images), piece):
        some = slice(start, start + piece)
        changed = _change(result[some], drawn.part(start, start + piece), augmentation)
        torch.sub(changed, centre, out=result[some]).div_(spread)
    return result  # [B, C, S, S]


def _change(images: Tensor, drawn: Drawn, augmentation: Augmentation) -> Tensor:
    """Everything but the normalisation; may write into `images`."""
    colour = images.shape[1] == 3
    if augmentation.grey_first and colour:
        images = _where(drawn.grey, images, _three_times_grey)
    if any(augmentation.jitter):
        chosen = drawn.jitter
        images = _where(
            chosen,
            images,
            lambda some: _jitter(some, drawn.factors[chosen], drawn.order[chosen], augmentation),
        )
    if not augmentation.grey_first and colour:
        images = _where(drawn.grey, images, _three_times_grey)
    half = math.ceil(3.0 * augmentation.blur_sigma[1])
    images = _where(drawn.blur, images, lambda some: _blur(some, drawn.sigma[drawn.blur], half))
    limit = augmentation.solarize_threshold
    images = _where(drawn.solarize, images, lambda some: torch.where(some >= limit, 1.0 - some, some))
    return _where(drawn.flip, images, lambda some: some.flip(3))  # [B, C, S, S]


def _where(mask: Flags, images: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Give `images` changed where `mask` [B] is true, without work on the others; may write into it."""
    if mask.all():
        return change(images)
    if mask.any():
        index = torch.from_numpy(np.flatnonzero(mask)).to(images.device, non_blocking=True)  # [n]
        images.index_copy_(0, index, change(images.index_select(0, index)))
    return images


def _column(numbers: Floats, like: Tensor) -> Tensor:
    """Put one number per image where it multiplies [n, C, S, S]."""
    column = torch.from_numpy(numbers.astype(np.float32)).to(like.device, non_blocking=True)  # [n]
    return column[:, None, None, None]  # [n, 1, 1, 1]


def _grey(images: Tensor) -> Tensor:
    """Luma of Rec. 601 with torchvision's rounding of the weights: [n, 3, S, S] -> [n, 1, S, S]."""
    red, green, blue = images[:, 0:1], images[:, 1:2], images[:, 2:3]  # each [n, 1, S, S]
    grey: Tensor = (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)  # [n, 1, S, S]
    return grey


def _three_times_grey(images: Tensor) -> Tensor:
    return images.copy_(_grey(images))  # [n, 3, S, S]


def _jitter(images: Tensor, factors: Floats, order: NDArray[np.int64], augmentation: Augmentation) -> Tensor:
    """Colour jitter, each image by its own factors [n, 4], in its own order [n, 4]; writes into `images`."""
    operations: dict[int, Operation] = {BRIGHTNESS: _brightness, CONTRAST: _contrast}
    if images.shape[1] == 3:
        operations |= {SATURATION: _saturation, HUE: _hue}
    # Four rounds; in each, the images whose turn it is for the same operation go through it together.
    for turn in range(4):
        for which, operation in operations.items():
            mask = order[:, turn] == which  # [n]
            if augmentation.jitter[which] > 0 and mask.any():
                factor = _column(factors[mask, which], images)  # [m, 1, 1, 1]
                images = _where(mask, images, partial(operation, factor=factor))
    return images


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return images.mul_(factor).clamp_(0.0, 1.0)  # [m, C, S, S]


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    grey = _grey(images) if images.shape[1] == 3 else images
    # In two steps, so that the sum's order, and with it the last bit, does not depend on how many images
    # there are.
    mean = grey.mean(3, keepdim=True).mean((1, 2), keepdim=True)  # [m, 1, 1, 1]
    return images.mul_(factor).add_(mean * (1.0 - factor)).clamp_(0.0, 1.0)  # [m, C, S, S]


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    rest = _grey(images).mul_(1.0 - factor)  # [m, 1, S, S]
    return images.mul_(factor).add_(rest).clamp_(0.0, 1.0)  # [m, 3, S, S]


def _hue(images: Tensor, factor: Tensor) -> Tensor:
    """Turn the hue by `factor` of a full circle: to HSV and back without writing out saturation and value.

    A colour lies between its smallest and largest channel; how far up each channel lies is a trapezium of the
    hue (counted 0 to 6 from red over green and blue), so turning the hue slides three trapezia.
    """
    red, green, blue = images[:, 0:1], images[:, 1:2], images[:, 2:3]  # each [n, 1, S, S]
    high = torch.maximum(torch.maximum(red, green), blue)  # [m, 1, S, S]
    low = torch.minimum(torch.minimum(red, green), blue)  # [m, 1, S, S]
    chroma = high - low  # [m, 1, S, S]
    # Which sixths of the circle the hue is near depends on the largest channel, red before green before blue.
    red_most, green_most = red == high, green == high
    across = torch.where(red_most, green - blue, torch.where(green_most, blue - red, red - green))
    hue = across.div_(torch.where(chroma == 0, 1.0, chroma))  # [m, 1, S, S]
    hue += torch.where(red_most, 0.0, torch.where(green_most, 2.0, 4.0))
    hue = hue.add_(6.0 * factor).remainder_(6.0)  # [m, 1, S, S]
    for channel, height in enumerate(((hue - 3).abs_().sub_(1), 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_())):
        images[:, channel : channel + 1] = height.clamp_(0.0, 1.0).mul_(chroma).add_(low)
    return images  # [m, 3, S, S]


def _blur(images: Tensor, sigma: Floats, half: int) -> Tensor:
    """Gaussian blur of each image by its own sigma [n], over 2 * half + 1 pixels, mirrored at the edges.

    Where the window is wider than the image, the image is mirrored as often as it takes.
    """
    spread = torch.from_numpy(sigma.astype(np.float32))[:, None]  # [n, 1]
    offset = torch.arange(-half, half + 1, dtype=torch.float32)  # [2 * half + 1]
    taps = torch.softmax(-0.5 * (offset / spread) ** 2, dim=1).to(images.device, non_blocking=True)
    weights = [tap[:, None, None, None] for tap in taps.unbind(1)]  # 2 * half + 1 of [n, 1, 1, 1]
    for axis in (2, 3):
        size = images.shape[axis]
        around = images.index_select(axis, _mirror(size, half).to(images.device, non_blocking=True))
        images = around.narrow(axis, half, size) * weights[half]  # [n, C, S, S]
        # The kernel is even: the two pixels at one distance are added first, which halves the products. On
        # a CPU faster than a grouped convolution, and a sum's order does not depend on how many images there
        # are.
        for step in range(1, half + 1):
            pair = around.narrow(axis, half - step, size) + around.narrow(axis, half + step, size)
            images.addcmul_(pair, weights[half + step])
    return images  # [n, C, S, S]


def _mirror(size: int, half: int) -> Tensor:
    """Positions of -half .. size + half - 1 after reflection at the first and the last pixel: int64."""
    positions = torch.arange(-half, size + half)  # [size + 2 * half]
    if size == 1:
        return torch.zeros_like(positions)
    period = 2 * (size - 1)
    positions = positions.remainder(period)  # [size + 2 * half]
    return torch.minimum(positions, period - positions)  # [size + 2 * half]
