# SPDX-License-Identifier: Apache-2.0
"""The header of an image file: opened by what it is, not by its name, its size and orientation read, no pixel decoded.

`kinfold.data.decode` makes pixels of it. What is no image that can be used says why, as `Undecodable`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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

Pixels = npt.NDArray[np.uint8]
Array = npt.NDArray[Any]

PIXEL_LIMIT = 500_000_000
"""The largest width x height that is decoded: beyond, a file is an attack or a map, not a training image."""

ROWS_BACKWARDS = (3, 4, 7, 8)
"""EXIF orientations in which the rows of an image are stored from the last to the first,"""
COLUMNS_BACKWARDS = (2, 3, 6, 7)
"""and those in which the columns are"""

_ORIENTATION = 0x0112  # the EXIF and TIFF tag

# A file is opened only as one of these: `Image.open` would try every format that Pillow knows, and refuses or warns by
# a limit that is shared by the whole process.
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


@contextmanager
def reasons() -> Iterator[None]:
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


def open_image(raw: bytes) -> ImageFile.ImageFile:
    """Read the header; the pixels come later. Raises `Undecodable`, and whatever Pillow's readers do: see `reasons`."""
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
    check_size(image.width, image.height)
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


def check_size(width: int, height: int) -> None:
    """Raise `Undecodable` for an image without pixels, and for one of more than `PIXEL_LIMIT`."""
    if width < 1 or height < 1:
        raise Undecodable(f"it has no pixels ({width} x {height})")
    if width * height > PIXEL_LIMIT:
        limit = PIXEL_LIMIT // 1_000_000
        raise Undecodable(f"it claims {width:,} x {height:,} pixels; more than {limit} million are refused")


def orientation_of(image: Image.Image) -> int:
    """EXIF's number, 1 (upright) to 8; unreadable metadata is no reason to lose the image."""
    if isinstance(image, JpegImagePlugin.JpegImageFile) and not ({"exif", "xmp"} & image.info.keys()):
        return 1
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undo how the camera was held: 5 to 8 swap the axes, then rows and columns may run backwards."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in ROWS_BACKWARDS:
        pixels = pixels[::-1]
    if orientation in COLUMNS_BACKWARDS:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
