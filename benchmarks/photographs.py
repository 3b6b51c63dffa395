# SPDX-License-Identifier: Apache-2.0
"""Generated images that cost as much to encode, decode and cut as photographs do."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def pixels(seed: int, height: int, width: int) -> NDArray[np.uint8]:
    """Make an image [H, W, 3] that is as rough at every scale as photos are: 1/f noise."""
    draws = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])  # [H, W / 2 + 1]
    frequency[0, 0] = 1.0
    noise = draws.standard_normal((2, 3, *frequency.shape))
    waves = np.fft.irfft2((noise[0] + 1j * noise[1]) / frequency, s=(height, width))  # [3, H, W]
    waves = waves[:1] + 0.4 * waves
    levels = np.clip(128 + 55 * waves / waves.std((1, 2), keepdims=True), 0, 255).astype(np.uint8)  # [3, H, W]
    return np.ascontiguousarray(levels.transpose(1, 2, 0))


def photo(seed: int, height: int, width: int) -> bytes:
    """Make a JPEG of quality 90 of such an image: of 500 x 375 pixels it has about 120 kB."""
    file = io.BytesIO()
    Image.fromarray(pixels(seed, height, width)).save(file, "JPEG", quality=90)
    return file.getvalue()
