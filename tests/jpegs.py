# SPDX-License-Identifier: Apache-2.0
"""What tests of photos share: JPEGs made in memory, and views that are smaller than they are."""

import io

import numpy as np
from PIL import Image
from test_loader import InMemory

from kinfold.views import Augmentation, Views

LARGE = Views(augment=(Augmentation(size=24), Augmentation(size=16, scale=(0.6, 1.0))), pairs=((0, 1),))


def photo(seed: int, height: int, width: int, **how: object) -> bytes:
    """A JPEG that is as rough at every scale as photos are: 1/f noise."""
    draws = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])  # [H, W / 2 + 1]
    frequency[0, 0] = 1.0
    noise = draws.standard_normal((2, 3, *frequency.shape))
    waves = np.fft.irfft2((noise[0] + 1j * noise[1]) / frequency, s=(height, width))  # [3, H, W]
    waves = waves[:1] + 0.4 * waves
    pixels = np.clip(128 + 55 * waves / waves.std((1, 2), keepdims=True), 0, 255).astype(np.uint8)  # [3, H, W]
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(file, "JPEG", quality=90, **how)
    return file.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


class Photos(InMemory):
    """JPEGs in memory; those in `broken` end in the middle of their pixels, behind a whole header."""

    def __post_init__(self) -> None:
        for position, (height, width) in enumerate(self.sizes):
            file = photo(position, height, width, exif=turned(1 + position % 8))
            self.files.append(file[: len(file) // 2] if position in self.broken else file)


def as_png(raw):
    file = io.BytesIO()
    Image.open(io.BytesIO(raw)).save(file, "PNG")
    return file.getvalue()
