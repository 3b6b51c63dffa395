# SPDX-License-Identifier: Apache-2.0
"""Arrays of any numeric type become levels of 0 to 255, by the rules at the head of `kinfold.data.decode`."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from kinfold.data.header import Array, Pixels, Undecodable, check_size


def npy(raw: bytes) -> Array:
    """Read an `.npy` file without trusting its header: no objects, and no more values than bytes follow."""
    file = io.BytesIO(raw)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, column_major, dtype = read(file)
    if dtype.hasobject:
        raise Undecodable("its array holds Python objects, not numbers")
    count = 1
    for side in shape:
        count *= int(side)
    if count * dtype.itemsize > len(raw) - file.tell():
        raise Undecodable("its array is cut off")
    flat = np.frombuffer(raw, dtype, count, file.tell())
    return flat.reshape(shape, order="F" if column_major else "C")


def three_axes(array: Array) -> Array:
    """Give an array [H, W] or [H, W, C] its third axis. Raises `Undecodable` for others."""
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3:
        raise Undecodable(f"its array has shape {array.shape}; [H, W] or [H, W, C] is expected")
    check_size(array.shape[1], array.shape[0])
    return array


def eight_bits(array: Array, bits: int = 16) -> Pixels:
    """Scale the values of any numeric type to 0..255; of 16-bit ones so many `bits` count."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        white = (1 << bits) - 1
        wide = np.minimum(array.astype(np.uint32), white)
        return ((wide * 255 + white // 2) // white).astype(np.uint8)
    if array.dtype.kind == "i" and array.dtype.itemsize == 4:
        low, high = int(array.min()), int(array.max())
        if low >= 0 and high <= 65535:
            return eight_bits(array.astype(np.uint16), 16)
        return _stretch(array.astype(np.float64))
    if array.dtype.kind == "f":
        values = array.astype(np.float64)
        if not np.isfinite(values).all():
            raise Undecodable("it contains values that are not finite")
        if values.min() >= 0 and values.max() <= 1:
            return np.rint(values * 255).astype(np.uint8)
        return _stretch(values)
    raise Undecodable(f"values of type {array.dtype} have no known scale; use uint8, uint16 or floats in [0, 1]")


def _stretch(values: npt.NDArray[np.float64]) -> Pixels:
    low, high = values.min(), values.max()
    # Halved first, so that the range of the largest floats does not overflow.
    span = high / 2 - low / 2
    if span == 0:
        return np.zeros(values.shape, np.uint8)
    stretched: Pixels = np.rint((values / 2 - low / 2) / span * 255).astype(np.uint8)
    return stretched


def fit(array: Pixels, channels: int) -> Pixels:
    """Give [H, W, C] the channels that were asked for, in memory of its own."""
    found = array.shape[2]
    if found == channels:
        return np.array(array, order="C")
    if found == 1 and channels == 3:
        return np.repeat(array, 3, axis=2)
    if found == 3 and channels == 1:
        return np.array(Image.fromarray(np.ascontiguousarray(array)).convert("L"))[:, :, None]  # [H, W, 1]
    raise Undecodable(f"it has {found} channels, {channels} are expected")
