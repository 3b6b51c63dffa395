# SPDX-License-Identifier: Apache-2.0
"""Every kind of image becomes uint8 [H, W, C], and every kind of rubbish becomes `Undecodable`."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from kinfold.data.decode import PIXEL_LIMIT, Undecodable, decode, look

RNG = np.random.default_rng(0)
# Smooth in large blocks, so that a lossy format keeps it; and unlike itself after any flip or turn.
BLOCKS = RNG.integers(0, 256, (3, 5, 3), dtype=np.uint8).repeat(16, axis=0).repeat(16, axis=1)  # [48, 80, 3]


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "DIB"])
def test_a_lossless_file_comes_back_exactly(kind: str) -> None:
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(BLOCKS), kind)), BLOCKS)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_a_compressed_tiff_comes_back_exactly(compression: str) -> None:
    raw = encoded(Image.fromarray(BLOCKS), "TIFF", compression=compression)
    np.testing.assert_array_equal(decode(raw), BLOCKS)


def test_a_lossless_webp_comes_back_exactly() -> None:
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(BLOCKS), "WEBP", lossless=True)), BLOCKS)


def test_a_jpeg_is_what_pillow_reads() -> None:
    raw = encoded(Image.fromarray(BLOCKS), "JPEG", quality=90)
    np.testing.assert_array_equal(decode(raw), np.asarray(Image.open(io.BytesIO(raw))))
    assert np.abs(decode(raw).astype(int) - BLOCKS).mean() < 8


def test_the_result_is_contiguous_and_the_callers_own() -> None:
    for raw in (encoded(Image.fromarray(BLOCKS), "PNG"), npy(BLOCKS), BLOCKS):
        found = decode(raw)
        assert found.flags.c_contiguous
        assert found.flags.writeable
        assert not np.shares_memory(found, BLOCKS)


def test_a_grey_image_becomes_rgb() -> None:
    grey = BLOCKS[:, :, 0]
    found = decode(encoded(Image.fromarray(grey), "PNG"))
    np.testing.assert_array_equal(found, np.repeat(grey[:, :, None], 3, axis=2))


def test_one_channel_is_luma() -> None:
    found = decode(encoded(Image.fromarray(BLOCKS), "PNG"), 1)
    expected = BLOCKS @ np.array([0.299, 0.587, 0.114])
    assert found.shape == (48, 80, 1)
    assert np.abs(found[:, :, 0] - expected).max() <= 1
    np.testing.assert_array_equal(decode(BLOCKS, 1), found)


def test_a_black_and_white_image_keeps_black_and_white() -> None:
    bits = BLOCKS[:, :, 0] > 127
    for kind in ("PNG", "TIFF", "PPM"):
        found = decode(encoded(Image.fromarray(bits), kind))
        np.testing.assert_array_equal(found[:, :, 1], bits * 255)


def test_a_palette_becomes_its_colours() -> None:
    flat = Image.fromarray(BLOCKS).quantize(16)
    for kind in ("PNG", "GIF", "BMP"):
        np.testing.assert_array_equal(decode(encoded(flat, kind)), np.asarray(flat.convert("RGB")))


def test_a_transparent_palette_entry_becomes_white() -> None:
    picture = Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
    picture.putpalette([10, 20, 30, 200, 100, 50])
    for kind in ("PNG", "GIF"):
        found = decode(encoded(picture, kind, transparency=0))
        np.testing.assert_array_equal(found, [[[255, 255, 255], [200, 100, 50]]])


def test_a_transparent_colour_of_an_rgb_png_becomes_white() -> None:
    picture = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    found = decode(encoded(picture, "PNG", transparency=(1, 2, 3)))
    np.testing.assert_array_equal(found, [[[255, 255, 255], [4, 5, 6]]])


def test_alpha_is_laid_over_white() -> None:
    pixels = RNG.integers(0, 256, (9, 7, 4), dtype=np.uint8)
    alpha = pixels[:, :, 3:] / 255
    expected = pixels[:, :, :3] * alpha + 255 * (1 - alpha)
    assert np.abs(decode(encoded(Image.fromarray(pixels), "PNG")) - expected).max() <= 1
    clear = pixels.copy()
    clear[:, :, 3] = 0
    assert (decode(encoded(Image.fromarray(clear), "PNG")) == 255).all()


def test_grey_with_alpha_is_laid_over_white() -> None:
    pixels = np.array([[[0, 0], [0, 255], [100, 255]]], np.uint8)
    found = decode(encoded(Image.fromarray(pixels), "PNG"), 1)
    np.testing.assert_array_equal(found[:, :, 0], [[255, 0, 100]])


def test_an_adobe_cmyk_jpeg_is_not_a_negative() -> None:
    # Pillow writes CMYK JPEGs as Adobe does: inverted, with the marker that says so.
    for colour in ((250, 250, 250), (20, 20, 20), (230, 30, 40)):
        raw = encoded(Image.new("RGB", (16, 16), colour).convert("CMYK"), "JPEG", quality=95)
        assert b"Adobe" in raw
        assert np.abs(decode(raw).astype(int) - colour).max() < 12


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled_and_not_cut_off(kind: str) -> None:
    deep = np.array([[0, 257, 1000, 30_000, 65_535]], np.uint16)
    found = decode(encoded(Image.fromarray(deep), kind))
    np.testing.assert_array_equal(found[0, :, 0], np.rint(deep[0] / 257))


def test_big_endian_sixteen_bit_tiff_is_scaled() -> None:
    deep = np.array([[0, 257, 30_000, 65_535]], ">u2")
    image = Image.frombytes("I;16B", (4, 1), deep.tobytes())
    np.testing.assert_array_equal(decode(encoded(image, "TIFF"))[0, :, 0], np.rint(deep[0] / 257))


def test_a_sixteen_bit_rgb_png_keeps_its_high_bytes() -> None:
    deep = RNG.integers(0, 65_536, (4, 6, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 6, 4, 16, 2, 0, 0, 0))
    raw = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.abs(decode(raw) - deep / 257).max() <= 1


def test_a_sixteen_bit_rgb_tiff_keeps_its_high_bytes() -> None:
    deep = RNG.integers(0, 65_536, (4, 6, 3), dtype=np.uint16)
    # A minimal little-endian TIFF: width, height, 3 x 16 bits, no compression, RGB, one strip.
    entries = [
        (256, 3, 1, 6), (257, 3, 1, 4), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2),
        (273, 4, 1, 14), (277, 3, 1, 3), (278, 3, 1, 4), (279, 4, 1, deep.nbytes),
    ]  # fmt: skip
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    end = 14 + deep.nbytes
    raw = b"II*\0" + struct.pack("<I", end) + struct.pack("<HHH", 16, 16, 16)
    raw += deep.astype("<u2").tobytes() + struct.pack("<H", len(entries)) + table + b"\0\0\0\0"
    assert np.abs(decode(raw) - deep / 257).max() <= 1


def test_floats_up_to_one_are_shares_of_white_and_others_are_stretched() -> None:
    shares = np.array([[0.0, 0.25, 0.5, 1.0]], np.float32)
    for raw in (encoded(Image.fromarray(shares), "TIFF"), npy(shares), shares.astype(np.float64)):
        np.testing.assert_array_equal(decode(raw)[0, :, 0], [0, 64, 128, 255])
    wide = np.array([[-100.0, 0.0, 100.0]], np.float32)
    np.testing.assert_array_equal(decode(wide)[0, :, 0], [0, 128, 255])
    assert (decode(np.full((2, 2), 7.0)) == 0).all()


def test_thirty_two_bit_integers_are_sixteen_bit_values_or_stretched() -> None:
    small = Image.fromarray(np.array([[0, 257, 65_535]], np.int32))
    np.testing.assert_array_equal(decode(encoded(small, "TIFF"))[0, :, 0], [0, 1, 255])
    large = Image.fromarray(np.array([[-(2**31), 0, 2**31 - 1]], np.int32))
    np.testing.assert_array_equal(decode(encoded(large, "TIFF"))[0, :, 0], [0, 128, 255])


# What each orientation number says, as numpy operations on the stored array that make it upright.
UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_the_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    found = decode(encoded(Image.fromarray(BLOCKS), kind, exif=exif, **options))
    expected = UPRIGHT[orientation](BLOCKS)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).mean() < (8 if kind == "JPEG" else 1e-9)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_an_impossible_orientation_or_broken_exif_leaves_the_image_as_it_is() -> None:
    exif = Image.Exif()
    exif[0x0112] = 77
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(BLOCKS), "PNG", exif=exif)), BLOCKS)
    raw = encoded(Image.fromarray(BLOCKS), "JPEG", quality=90, exif=b"Exif\0\0II*\0\xff\xff\xff\xff\0\0")
    assert decode(raw).shape == BLOCKS.shape


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_many_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "WEBP" else {}
    raw = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (decode(raw) == [255, 0, 0]).all()


def test_a_single_pixel_is_an_image() -> None:
    for kind in ("PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        found = decode(encoded(Image.new("RGB", (1, 1), "white"), kind, **options))
        np.testing.assert_array_equal(found, [[[255, 255, 255]]])


@pytest.mark.parametrize("channels", [2, 5, 12])
def test_an_array_gives_as_many_channels_as_it_has(channels: int) -> None:
    pixels = RNG.integers(0, 256, (6, 4, channels), dtype=np.uint8)
    np.testing.assert_array_equal(decode(npy(pixels), channels), pixels)
    np.testing.assert_array_equal(decode(npy(np.asfortranarray(pixels)), channels), pixels)
    np.testing.assert_array_equal(decode(pixels.astype(np.uint16) * 257, channels), pixels)
    with pytest.raises(Undecodable, match=f"it has {channels} channels, 3 are expected"):
        decode(pixels, 3)


def test_the_pages_or_bands_of_a_tiff_are_channels() -> None:
    pages = [Image.fromarray(RNG.integers(0, 65_536, (4, 6), dtype=np.uint16)) for _ in range(5)]
    raw = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    expected = np.rint(np.stack([np.asarray(page) for page in pages], axis=2) / 257)
    np.testing.assert_array_equal(decode(raw, 5), expected)
    bands = RNG.integers(0, 256, (4, 6, 4), dtype=np.uint8)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(bands), "TIFF"), 4), bands)
    with pytest.raises(Undecodable, match="it has 5 pages, 4 channels are expected"):
        decode(raw, 4)
    with pytest.raises(Undecodable, match="PNG images give 1 or 3 channels"):
        decode(encoded(Image.fromarray(bands), "PNG"), 4)


def test_a_jpeg_is_looked_at_before_it_is_decoded_at_a_fraction_of_its_size() -> None:
    photo = Image.fromarray(BLOCKS).resize((1000, 750), Image.Resampling.BICUBIC)
    raw = encoded(photo, "JPEG", quality=90)
    seen = look(raw)
    assert (seen.height, seen.width) == (750, 1000)
    np.testing.assert_array_equal(seen.decode().pixels, decode(raw))
    for shrink, shape in ((2, (375, 500, 3)), (4, (188, 250, 3)), (8, (94, 125, 3))):
        assert look(raw).decode(shrink).pixels.shape == shape
        assert look(raw, 1).decode(shrink).pixels.shape == (*shape[:2], 1)
    small = np.asarray(photo.resize((500, 375), Image.Resampling.BOX)).astype(int)
    assert np.abs(look(raw).decode(2).pixels - small).mean() < 3
    for other in (encoded(photo, "PNG"), np.asarray(photo)):
        np.testing.assert_array_equal(look(other).decode(4).pixels, decode(other))
    with pytest.raises(Undecodable, match="damaged"):
        look(raw[: len(raw) // 2]).decode()


def test_rubbish_says_what_it_is() -> None:
    for raw, reason in (
        (b"", "empty"),
        (b"\n<!DOCTYPE html><html>", "HTML"),
        (bytes(4000), "zeros"),
        (b"<svg xmlns='x'/>", "SVG"),
        (b"%PDF-1.7 ...", "starts with b'%PDF-1.7'"),
        (npy(np.zeros((2, 2), "<U3")), "no known scale"),
        (npy(np.zeros((2, 2), np.int64)), "no known scale"),
        (npy(np.zeros((2, 0, 3), np.uint8)), "no pixels"),
        (npy(np.zeros(7, np.uint8)), "shape"),
        (npy(np.full((2, 2), np.nan)), "not finite"),
        (npy(np.zeros((2, 2), np.uint8))[:-1], "cut off"),
    ):
        with pytest.raises(Undecodable, match="(?s)" + reason):
            decode(raw)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_a_file_cut_in_the_middle_is_undecodable(kind: str) -> None:
    noise = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    raw = encoded(noise, kind)
    with pytest.raises(Undecodable):
        decode(raw[: len(raw) // 2])


def test_a_decompression_bomb_is_refused_and_a_large_photo_makes_no_noise() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Undecodable, match="more than 500 million are refused"):
            decode(png_header(40_000, PIXEL_LIMIT // 40_000 + 1))
        # 10,000 x 10,000 one-bit pixels: beyond where Pillow by itself would warn.
        assert decode(encoded(Image.new("1", (10_000, 10_000)), "PNG"), 1).shape == (10_000, 10_000, 1)


@hypothesis_settings(max_examples=150, deadline=None)
@given(
    head=st.sampled_from(
        [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"\x28\0\0\0", b"II*\0\x08\0\0\0", b"MM\0*",
         b"P6 3 3 255\n", b"P5", b"Pf", b"RIFF\x40\0\0\0WEBPVP8 ", b"\x93NUMPY\x01\0"]
    ),
    rest=st.binary(max_size=200),
    channels=st.sampled_from([1, 3, 4]),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_any_bytes_become_an_image_or_undecodable(head: bytes, rest: bytes, channels: int) -> None:
    try:
        found = decode(head + rest, channels)
    except Undecodable:
        return
    assert found.dtype == np.uint8
    assert found.shape[2] == channels


@hypothesis_settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]),
    place=st.floats(0, 1, exclude_max=True),
    byte=st.integers(0, 255),
)
@pytest.mark.filterwarnings("ignore")
def test_a_flipped_byte_gives_an_image_or_undecodable(kind: str, place: float, byte: int) -> None:
    raw = bytearray(encoded(Image.fromarray(BLOCKS[::4, ::4]), kind))
    raw[int(place * len(raw))] = byte
    try:
        found = decode(bytes(raw))
    except Undecodable:
        return
    assert found.shape[2] == 3
