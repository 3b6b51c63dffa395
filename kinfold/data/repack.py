# SPDX-License-Identifier: Apache-2.0
"""What packing does to one image: the short side shrinks, the orientation is applied, and it is encoded anew.

Pixels are those of `kinfold.data.decode`: transparency is laid over white, 16 bits become 8. An image without colour is
stored with one channel. What is no picture of one or three channels (arrays, TIFFs of several pages or bands) keeps its
bytes, whatever its size.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from kinfold.data.crop import crop_resize
from kinfold.data.decode import Jpeg, Undecodable, decode, look
from kinfold.data.header import reasons
from kinfold.data.sources import Source
from kinfold.data.work import Task, read_with

_JPEG, _PNG, _NPY = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"\x93NUMPY"
_TIFF = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")


class Encoded(NamedTuple):
    """An image as it goes into a shard."""

    position: int
    raw: bytes
    kind: str
    """how its name ends"""
    untouched: bool
    """whether these are the source's own bytes"""
    before: int
    """bytes that the source holds for it"""


class Repacked(NamedTuple):
    """The images of a task."""

    images: list[Encoded]
    bad: dict[int, str]
    """position -> reason, of those that do not decode"""


@dataclass(frozen=True)
class Repacking:
    """Decode images, shrink and encode them; a few at a time, in a worker process."""

    source: Source
    short_side: int
    quality: int
    png: bool

    def __call__(self, task: Task) -> Repacked:
        images, bad = list[Encoded](), dict[int, str]()
        for position in task.positions.tolist():
            try:
                (image, kind, untouched), before = read_with(self._encoded, self.source, position, 3)
                images.append(Encoded(position, image, kind, untouched, before))
            except Undecodable as error:
                bad[position] = error.reason
        return Repacked(images, bad)

    def _encoded(self, raw: bytes | NDArray[np.uint8], _channels: int) -> tuple[tuple[bytes, str, bool], int]:
        """What `encode` gives, and the bytes that there were."""
        return self.encode(raw), raw.nbytes if isinstance(raw, np.ndarray) else len(raw)

    def encode(self, raw: bytes | NDArray[np.uint8]) -> tuple[bytes, str, bool]:
        """Give an image's new bytes, how its name ends, and whether they are the old ones. Raises `Undecodable`."""
        if (array := _other_channels(raw)) is not None:
            return array, "npy", isinstance(raw, bytes)
        if isinstance(raw, bytes) and raw.startswith(_TIFF) and _bands(raw) not in ((1, 1), (1, 3)):
            return raw, "tif", True
        opened = look(raw)
        small = min(opened.height, opened.width) <= self.short_side
        # A photo is decoded at a fraction of its size that leaves twice the pixels that are wanted.
        least = min(opened.height, opened.width) // (2 * self.short_side)
        shrink = next(factor for factor in (8, 4, 2, 1) if factor <= max(least, 1))
        pixels = opened.decode(shrink).pixels  # [H, W, 3]; also shows whether it decodes to its end
        if isinstance(raw, bytes) and small:
            if isinstance(opened, Jpeg) and opened.orientation == 1:
                return raw, "jpg", True
            if self.png and raw.startswith(_PNG) and b"eXIf" not in raw:
                return raw, "png", True
        return self._written(self._shrunk(pixels))

    def _shrunk(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        height, width = pixels.shape[:2]
        short = min(height, width)
        if short <= self.short_side:
            return pixels
        sides = tuple(max(1, round(self.short_side * side / short)) for side in (height, width))
        resized = crop_resize(pixels, (0, 0, height, width), (sides[0], sides[1]))  # [3, h, w]
        shrunk: NDArray[np.uint8] = resized.permute(1, 2, 0).numpy()  # [h, w, 3]
        return shrunk

    def _written(self, pixels: NDArray[np.uint8]) -> tuple[bytes, str, bool]:
        if (pixels[..., :1] == pixels[..., 1:]).all():
            pixels = pixels[..., 0]  # [h, w]
        file = io.BytesIO()
        image = Image.fromarray(np.ascontiguousarray(pixels))
        if self.png or max(image.size) > 65_000:  # JPEG's limit is 65,500 a side in Pillow
            image.save(file, "PNG")
            return file.getvalue(), "png", False
        image.save(file, "JPEG", quality=self.quality)
        return file.getvalue(), "jpg", False


def _other_channels(raw: bytes | NDArray[np.uint8]) -> bytes | None:
    """The `.npy` bytes of an array with other than 1 or 3 channels; None for everything else."""
    if isinstance(raw, np.ndarray):
        array, held = raw, None
    elif raw.startswith(_NPY):
        try:
            array, held = np.load(io.BytesIO(raw), allow_pickle=False), raw
        except (ValueError, EOFError, OSError, MemoryError) as error:
            raise Undecodable(f"it is damaged: {error}") from error
    else:
        return None
    if array.ndim != 3 or array.shape[2] in (1, 3):
        return None
    decode(array, array.shape[2])
    if held is None:
        file = io.BytesIO()
        np.save(file, array)
        held = file.getvalue()
    return held


def _bands(raw: bytes) -> tuple[int, int]:
    """Pages of a TIFF, and the bands of its first."""
    with reasons():
        image = TiffImagePlugin.TiffImageFile(io.BytesIO(raw))
        return image.n_frames, len(image.getbands())
