# SPDX-License-Identifier: Apache-2.0
"""The first half of augmentation: a view's numbers, drawn from its address.

`draw` says for every image of a batch where its crop lies and what happens to its colours; `kinfold.data.photometric`
does the latter on the device. The distributions are those of torchvision's `RandomResizedCrop`, `ColorJitter`,
`RandomGrayscale`, `GaussianBlur`, `RandomSolarize` and `RandomHorizontalFlip`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from kinfold.randomness import VIEW, uniforms
from kinfold.views import Augmentation

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_TRIES = 10  # RandomResizedCrop's; then it takes the middle of the image
_DRAWS = 2 * _TRIES + 16

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Drawn:
    """The numbers of one view for B images, all that its pixels depend on.

    `factors` and `order` matter only where `jitter` is true, `sigma` and `reach` where `blur` is.
    """

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
    grey_first: Flags
    """[B]: grey before the jitter, not after it"""
    blur: Flags
    """[B]"""
    sigma: Floats
    """[B]: standard deviation of the blur in pixels, where `blur` is true"""
    reach: NDArray[np.int64]
    """[B]: the blur takes in so many pixels on either side"""
    solarize: Flags
    """[B]"""
    threshold: Floats
    """[B]: on [0, 1], from where on `solarize` inverts"""

    def at(self, rows: NDArray[np.int64] | slice) -> Drawn:
        """The numbers of these images of the batch."""
        return Drawn(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    @staticmethod
    def join(parts: Sequence[Drawn]) -> Drawn:
        """The numbers of several batches or views, one after the other."""
        if len(parts) == 1:
            return parts[0]
        return Drawn(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Drawn)})


def put(own: Drawn, numbers: Drawn, row: int) -> None:
    """Replace the numbers of image `row` by those of the only one of `own`."""
    for one in fields(Drawn):
        getattr(numbers, one.name)[row] = getattr(own, one.name)[0]


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
    # Three of the widest standard deviations: nearly all of the bell, and the same window for every image.
    reach = math.ceil(3.0 * high)
    return Drawn(
        box=_boxes(augmentation, u[:, : 2 * _TRIES], own[:, :2], height, width),
        flip=own[:, 2] < augmentation.flip,
        jitter=own[:, 3] < augmentation.jitter_probability,
        factors=_factors(augmentation.jitter, own[:, 4:8]),
        order=np.argsort(own[:, 8:12], axis=1, kind="stable"),
        grey=own[:, 12] < augmentation.grey,
        grey_first=np.full(len(u), augmentation.grey_first),
        blur=own[:, 13] < augmentation.blur,
        sigma=low + (high - low) * own[:, 14],
        reach=np.full(len(u), reach),
        solarize=own[:, 15] < augmentation.solarize,
        threshold=np.full(len(u), augmentation.solarize_threshold),
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
