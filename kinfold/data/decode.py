# SPDX-License-Identifier: Apache-2.0
"""Any image file or array becomes uint8 [H, W, channels]; whatever cannot says why, as `Undecodable`.

What is decided here, once:

- Transparency is laid over white: drawings, logos and diagrams are dark ink made for a white page, and on
  black the ink would vanish. Colours hidden below full transparency never show.
- 16-bit values are divided by 257 (65,535 is white), not cut off at 255.
- Floats in [0, 1] are multiplied by 255; floats beyond are stretched from their least to their greatest
  value, as no scale is known. 32-bit integers that fit 16 bits are taken for 16-bit values (that is how
  16-bit greymaps arrive), others are stretched.
- The EXIF orientation is applied, so that the array is what a person sees.
- Of an animation or a document with several pages, the first; for a channel count other than 1 and 3, the
  pages or bands of a TIFF are the channels.

`decode` does all of it at once. `look` stops a JPEG after its header, so that a caller can choose from the size how
small it is to be decoded.
"""

from __future__ import annotations

from typing import NamedTuple, final

import numpy as np
from PIL import Image, ImageFile, JpegImagePlugin, TiffImagePlugin

from kinfold.data.header import (
    COLUMNS_BACKWARDS,
    PIXEL_LIMIT,
    ROWS_BACKWARDS,
    Array,
    Pixels,
    Undecodable,
    check_size,
    open_image,
    orientation_of,
    reasons,
    upright,
)
from kinfold.data.levels import eight_bits, fit, npy, three_axes

__all__ = ["PIXEL_LIMIT", "Jpeg", "Reduced", "Undecodable", "Whole", "decode", "look"]

_BITS_PER_SAMPLE = 258  # the TIFF tag
_TRANSPARENT = frozenset({"RGBA", "LA", "PA", "RGBa", "La"})


def decode(raw: bytes | Array, channels: int = 3) -> Pixels:
    """Decode an encoded image, the bytes of an `.npy` file, or an array [H, W] or [H, W, C], to [H, W,
    channels].

    The result is contiguous, writable and the caller's own. One channel is luma (ITU-R 601); one channel
    becomes three by repetition; every other channel count must be what the array or the TIFF holds.

    Raises `Undecodable` for everything that is wrong with the image, and no other exception.
    """
    with reasons():
        if isinstance(raw, np.ndarray):
            return fit(eight_bits(three_axes(raw)), channels)
        return _decode_bytes(raw, channels)


class Reduced(NamedTuple):
    """A decoded image, perhaps at a fraction of its size."""

    pixels: Pixels
    """[H', W', C]: pixel k covers pixels `shrink` x k to `shrink` x (k + 1) of the full image, counted from `corner`"""
    shrink: int = 1
    """1, 2, 4 or 8"""
    corner: tuple[float, float] = (0.0, 0.0)
    """where the full image's upper left corner lies in `pixels`, down and right: off zero where an image of a size
    that `shrink` does not divide was turned"""


@final
class Whole:
    """An image that is decoded already."""

    def __init__(self, pixels: Pixels) -> None:
        self.pixels = pixels
        self.height, self.width = pixels.shape[:2]

    def decode(self, shrink: int = 1) -> Reduced:
        """Give the pixels in full, whatever `shrink` is."""
        return Reduced(self.pixels)


@final
class Jpeg:
    """A JPEG whose header is read: `height` and `width` are those of the upright image, no pixel is decoded."""

    def __init__(self, file: bytes, image: JpegImagePlugin.JpegImageFile, channels: int) -> None:
        self.file, self._image, self._channels = file, image, channels
        self.orientation = orientation_of(image)
        sides = (image.height, image.width)
        self.height, self.width = sides[::-1] if self.orientation >= 5 else sides

    @property
    def plain(self) -> bool:
        """Whether any decoder makes the same RGB of it: grey or YCbCr, to the end, and colour is asked for."""
        usual = self._image.mode == "L" or (self._image.mode == "RGB" and self._image.info.get("adobe_transform", 1))
        return bool(usual) and self._channels == 3 and b"\xff\xd9" in self.file[-64:]

    def decode(self, shrink: int = 1) -> Reduced:
        """Decode, once, at 1/`shrink` of the size (1, 2, 4 or 8): each side is divided and rounded up.

        The inverse transform of JPEG's 8 x 8 blocks gives 8/`shrink` pixels a side, which is close to the mean over
        `shrink` x `shrink` pixels. Raises `Undecodable`.
        """
        image = self._image
        with reasons():
            if shrink > 1:
                image.draft(None, (image.width // shrink, image.height // shrink))
            image.load()
            pixels = upright(_colours(image, self._channels), self.orientation)
        over = [(-side % shrink) / shrink for side in (self.height, self.width)]
        top = over[0] if self.orientation in ROWS_BACKWARDS else 0.0
        left = over[1] if self.orientation in COLUMNS_BACKWARDS else 0.0
        return Reduced(pixels, shrink, (top, left))


def look(raw: bytes | Array, channels: int = 3) -> Jpeg | Whole:
    """Read a JPEG's header only, and decode everything else: what `decode` gives, in two parts.

    Raises `Undecodable`; a JPEG damaged behind its header raises it when it is decoded.
    """
    if channels in (1, 3) and isinstance(raw, bytes):
        with reasons():
            if raw.startswith(b"\xff\xd8\xff") and isinstance(image := open_image(raw), JpegImagePlugin.JpegImageFile):
                return Jpeg(raw, image, channels)
    return Whole(decode(raw, channels))


def _decode_bytes(raw: bytes, channels: int) -> Pixels:
    if raw[:6] == b"\x93NUMPY":
        return fit(eight_bits(three_axes(npy(raw))), channels)
    image = open_image(raw)
    if channels not in (1, 3):
        return _bands(image, channels)
    image.load()
    mode = image.mode
    if mode.startswith("I") or mode == "F":
        array = fit(eight_bits(three_axes(np.asarray(image)), _bits(image)), channels)
    else:
        array = _colours(image, channels)
    return upright(array, orientation_of(image))


def _colours(image: Image.Image, channels: int) -> Pixels:
    """Turn an 8-bit image of any mode into 1 or 3 channels."""
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        painted = image.convert("RGBA")
        page = Image.new("RGBA", painted.size, "white")
        image = Image.alpha_composite(page, painted)
    if channels == 1:
        # Palettes, CMYK and the like have no luma of their own: by way of RGB.
        if image.mode not in ("L", "1", "RGB"):
            image = image.convert("RGB")
        return np.array(image.convert("L"))[:, :, None]  # [H, W, 1]
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))  # [H, W, 3]


def _bands(image: ImageFile.ImageFile, channels: int) -> Pixels:
    """Stack the pages and bands of a TIFF to the channels that were asked for."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        raise Undecodable(f"{image.format} images give 1 or 3 channels; {channels} need a TIFF or .npy file")
    if image.n_frames > channels:
        raise Undecodable(f"it has {image.n_frames} pages, {channels} channels are expected")
    bits = _bits(image)
    pages: list[Array] = []
    for page in range(image.n_frames):
        image.seek(page)
        check_size(image.width, image.height)
        # Pillow turns a TIFF upright while loading.
        image.load()
        flat = image.convert("RGB") if image.mode == "P" else image
        pages.append(three_axes(np.asarray(flat)))
        if pages[-1].shape[:2] != pages[0].shape[:2] or pages[-1].dtype != pages[0].dtype:
            raise Undecodable("its pages differ in size or type, so they are no channels of one image")
    found = sum(page.shape[2] for page in pages)
    if found != channels:
        raise Undecodable(f"it has {found} channels, {channels} are expected")
    return np.ascontiguousarray(eight_bits(np.concatenate(pages, axis=2), bits))


def _bits(image: Image.Image) -> int:
    """How many bits a sample of 16-bit storage really has (12-bit cameras and microscopes write TIFF)."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        stated = image.tag_v2.get(_BITS_PER_SAMPLE, (16,))
        first = int(stated[0] if isinstance(stated, tuple) else stated)
        return first if 8 < first < 16 else 16
    return 16
