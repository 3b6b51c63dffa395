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

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

PIXEL_LIMIT = 500_000_000
"""The largest width x height that is decoded: beyond, a file is an attack or a map, not a training image."""

Pixels = npt.NDArray[np.uint8]
Array = npt.NDArray[Any]

_ORIENTATION = 0x0112  # the EXIF and TIFF tag
_ROWS_BACKWARDS = (3, 4, 7, 8)
_COLUMNS_BACKWARDS = (2, 3, 6, 7)
_BITS_PER_SAMPLE = 258  # the TIFF tag
_TRANSPARENT = frozenset({"RGBA", "LA", "PA", "RGBa", "La"})

# A file is opened by what it is, not by its name, and only as one of these: `Image.open` would try every
# format that Pillow knows, and refuses or warns by a limit that is shared by the whole process.
_FORMATS: tuple[tuple[bytes, type[ImageFile.ImageFile]], ...] = (
    (b"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    (b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (b"GIF87a", GifImagePlugin.GifImageFile),
    (b"GIF89a", GifImagePlugin.GifImageFile),
    (b"BM", BmpImagePlugin.BmpImageFile),
    (b"\x28\x00\x00\x00", BmpImagePlugin.DibImageFile),
    (b"II*\x00", TiffImagePlugin.TiffImageFile),
    (b"MM\x00*", TiffImagePlugin.TiffImageFile),
    (b"II+\x00", TiffImagePlugin.TiffImageFile),
    (b"MM\x00+", TiffImagePlugin.TiffImageFile),
    *((b"P%d" % kind, PpmImagePlugin.PpmImageFile) for kind in range(1, 7)),
    (b"Pf", PpmImagePlugin.PpmImageFile),
)


class Undecodable(Exception):
    """These bytes are no image that can be used; `reason` is one sentence for people."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode(raw: bytes | Array, channels: int = 3) -> Pixels:
    """Decode an encoded image, the bytes of an `.npy` file, or an array [H, W] or [H, W, C], to [H, W,
    channels].

    The result is contiguous, writable and the caller's own. One channel is luma (ITU-R 601); one channel
    becomes three by repetition; every other channel count must be what the array or the TIFF holds.

    Raises `Undecodable` for everything that is wrong with the image, and no other exception.
    """
    with _reasons():
        if isinstance(raw, np.ndarray):
            return _fit(_eight_bits(_three_axes(raw)), channels)
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
        self.orientation = _orientation(image)
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
        with _reasons():
            if shrink > 1:
                image.draft(None, (image.width // shrink, image.height // shrink))
            image.load()
            pixels = _upright(_colours(image, self._channels), self.orientation)
        over = [(-side % shrink) / shrink for side in (self.height, self.width)]
        top = over[0] if self.orientation in _ROWS_BACKWARDS else 0.0
        left = over[1] if self.orientation in _COLUMNS_BACKWARDS else 0.0
        return Reduced(pixels, shrink, (top, left))


def look(raw: bytes | Array, channels: int = 3) -> Jpeg | Whole:
    """Read a JPEG's header only, and decode everything else: what `decode` gives, in two parts.

    Raises `Undecodable`; a JPEG damaged behind its header raises it when it is decoded.
    """
    if channels in (1, 3) and isinstance(raw, bytes):
        with _reasons():
            if raw.startswith(b"\xff\xd8\xff") and isinstance(image := _open(raw), JpegImagePlugin.JpegImageFile):
                return Jpeg(raw, image, channels)
    return Whole(decode(raw, channels))


@contextmanager
def _reasons() -> Iterator[None]:
    """Turn whatever goes wrong with an image into `Undecodable`."""
    try:
        yield
    except Undecodable:
        raise
    except MemoryError:
        raise Undecodable("it needs more memory than there is") from None
    except Exception as error:  # Pillow's readers raise whatever a damaged file makes them stumble over
        reason = str(error) or type(error).__name__
        raise Undecodable(f"it is damaged: {reason}") from error


def _decode_bytes(raw: bytes, channels: int) -> Pixels:
    if raw[:6] == b"\x93NUMPY":
        return _fit(_eight_bits(_three_axes(_npy(raw))), channels)
    image = _open(raw)
    if channels not in (1, 3):
        return _bands(image, channels)
    image.load()
    mode = image.mode
    if mode.startswith("I") or mode == "F":
        array = _fit(_eight_bits(_three_axes(np.asarray(image)), _bits(image)), channels)
    else:
        array = _colours(image, channels)
    return _upright(array, _orientation(image))


def _open(raw: bytes) -> ImageFile.ImageFile:
    """Read the header; the pixels come later."""
    if not raw:
        raise Undecodable("the file is empty")
    head = raw[:16]
    reader: type[ImageFile.ImageFile] | None = None
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        reader = WebPImagePlugin.WebPImageFile
    for magic, candidate in _FORMATS:
        if head.startswith(magic):
            reader = candidate
    if reader is None:
        raise Undecodable(f"it is {_what(raw)}, not an image of a known format")
    image = reader(io.BytesIO(raw))
    _check_size(image.width, image.height)
    return image


def _what(raw: bytes) -> str:
    """Name what was found in place of an image."""
    head = raw[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "an HTML page (a failed download?)"
    if not any(raw[:512]):
        return "filled with zeros (an interrupted copy?)"
    if head.startswith((b"<?xml", b"<svg")):
        return "XML or SVG"
    return f"a file that starts with {raw[:8]!r}"


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise Undecodable(f"it has no pixels ({width} x {height})")
    if width * height > PIXEL_LIMIT:
        limit = PIXEL_LIMIT // 1_000_000
        raise Undecodable(f"it claims {width:,} x {height:,} pixels; more than {limit} million are refused")


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
        _check_size(image.width, image.height)
        # Pillow turns a TIFF upright while loading.
        image.load()
        flat = image.convert("RGB") if image.mode == "P" else image
        pages.append(_three_axes(np.asarray(flat)))
        if pages[-1].shape[:2] != pages[0].shape[:2] or pages[-1].dtype != pages[0].dtype:
            raise Undecodable("its pages differ in size or type, so they are no channels of one image")
    found = sum(page.shape[2] for page in pages)
    if found != channels:
        raise Undecodable(f"it has {found} channels, {channels} are expected")
    return np.ascontiguousarray(_eight_bits(np.concatenate(pages, axis=2), bits))


def _bits(image: Image.Image) -> int:
    """How many bits a sample of 16-bit storage really has (12-bit cameras and microscopes write TIFF)."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        stated = image.tag_v2.get(_BITS_PER_SAMPLE, (16,))
        first = int(stated[0] if isinstance(stated, tuple) else stated)
        return first if 8 < first < 16 else 16
    return 16


def _orientation(image: Image.Image) -> int:
    """EXIF's number, 1 (upright) to 8; unreadable metadata is no reason to lose the image."""
    if isinstance(image, JpegImagePlugin.JpegImageFile) and not ({"exif", "xmp"} & image.info.keys()):
        return 1
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undo how the camera was held: 5 to 8 swap the axes, then rows and columns may run backwards."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in _ROWS_BACKWARDS:
        pixels = pixels[::-1]
    if orientation in _COLUMNS_BACKWARDS:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _npy(raw: bytes) -> Array:
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


def _three_axes(array: Array) -> Array:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3:
        raise Undecodable(f"its array has shape {array.shape}; [H, W] or [H, W, C] is expected")
    _check_size(array.shape[1], array.shape[0])
    return array


def _eight_bits(array: Array, bits: int = 16) -> Pixels:
    """Scale the values of any numeric type to 0..255; see the head of this file for the rules."""
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
            return _eight_bits(array.astype(np.uint16), 16)
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


def _fit(array: Pixels, channels: int) -> Pixels:
    """Give [H, W, C] the channels that were asked for, in memory of its own."""
    found = array.shape[2]
    if found == channels:
        return np.array(array, order="C")
    if found == 1 and channels == 3:
        return np.repeat(array, 3, axis=2)
    if found == 3 and channels == 1:
        return np.array(Image.fromarray(np.ascontiguousarray(array)).convert("L"))[:, :, None]  # [H, W, 1]
    raise Undecodable(f"it has {found} channels, {channels} are expected")
