# SPDX-License-Identifier: Apache-2.0
"""Folders as people have them: files that are no images, links in circles, a run that is stopped; nothing hangs."""

from __future__ import annotations

import io
import multiprocessing
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hostile import bytes_of
from PIL import Image

from kinfold.data.loader import Loader
from kinfold.data.pack import Packing, pack
from kinfold.data.sources import open_source
from kinfold.views import Augmentation, Views

SIDE = 24
VIEWS = Views(augment=(Augmentation(size=8),), pairs=((0, None),))
SHAPE = {"channels": 3, "mean": (0.5,) * 3, "std": (0.25,) * 3}


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))


def bomb(side: int) -> bytes:
    """A PNG of some bytes whose header claims `side` x `side` pixels."""
    file = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")):
        file += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return file


@pytest.fixture
def strange(tmp_path: Path) -> Path:
    """Sixteen good images, eight of kinds that are easily forgotten, and eight that are none, each in its own way."""
    folder = tmp_path / "strange"
    folder.mkdir()
    for i in range(16):
        noise(i).save(folder / f"good{i:02}.png")
    frames = [noise(20 + i) for i in range(4)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "moving.webp", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "moving.png", save_all=True, append_images=frames[1:])
    frames[0].convert("CMYK").save(folder / "print.jpg")
    frames[0].convert("P").save(folder / "palette.png")
    frames[0].convert("LA").save(folder / "clear.png")
    deep = np.random.default_rng(0).integers(0, 65536, (SIDE, SIDE), dtype=np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    Image.fromarray(deep).save(folder / "deep.tif")
    jpeg = io.BytesIO()
    noise(30).save(jpeg, "JPEG")
    (folder / "bad-empty.jpg").write_bytes(b"")
    (folder / "bad-cut.jpg").write_bytes(jpeg.getvalue()[:-200])
    (folder / "bad-header.jpg").write_bytes(jpeg.getvalue()[:30])
    (folder / "bad-bomb.png").write_bytes(bomb(30_000))
    (folder / "bad-page.jpg").write_text("<html>404</html>")
    (folder / "bad-link.jpg").symlink_to("nowhere.jpg")
    (folder / "bad-circle.jpg").symlink_to("bad-circle.jpg")
    (folder / "bad-gone.png").write_bytes(b"")
    (folder / "circle").symlink_to("circle")
    (folder / "again").symlink_to(folder)
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "link-to-pipe.jpg").symlink_to("pipe.jpg")
    return folder


REASONS = {
    "bad-empty.jpg": "the file is empty",
    "bad-cut.jpg": "it is damaged: image file is truncated",
    "bad-header.jpg": "it is damaged",
    "bad-bomb.png": "it claims 30,000 x 30,000 pixels; more than 500 million are refused",
    "bad-page.jpg": "it is an HTML page",
    "bad-link.jpg": "it cannot be read: No such file or directory",
    "bad-circle.jpg": "it cannot be read: Too many levels of symbolic links",
    "bad-gone.png": "it cannot be read: No such file or directory",
}


def as_expected(bad: dict[str, str]) -> dict[str, str]:
    """What was said of each file, as far as the reasons above go."""
    return {Path(name).name: reason[: len(REASONS.get(Path(name).name, ""))] for name, reason in bad.items()}


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_no_image_is_named_with_its_reason_and_everything_else_is_shown(
    resident: bool, workers: int, strange: Path
) -> None:
    source = open_source(str(strange))
    assert len(source) == 32  # no pipe, which would be waited for without end, and no directory
    (strange / "bad-gone.png").unlink()  # between listing and reading
    loader = Loader(source, VIEWS, batch_size=32, seed=0, workers=workers, resident=resident, **SHAPE)
    (batch,) = loader.epoch(0)
    assert as_expected({source.name(position): reason for position, reason in loader.bad.items()}) == REASONS
    shown = {Path(source.name(position)).name for position in batch.index.tolist()}
    assert shown == {path.name for path in strange.iterdir() if path.is_file()} - REASONS.keys()


def test_a_folder_with_strange_files_is_packed_and_those_are_named(strange: Path, tmp_path: Path) -> None:
    source = open_source(str(strange))
    (strange / "bad-gone.png").unlink()
    packed = pack(source, tmp_path / "out", workers=0)
    assert packed.images == 24
    assert as_expected(packed.left_out) == REASONS
    assert len(open_source(str(tmp_path / "out"))) == 24


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_ends_packing_with_its_workers_and_the_same_call_goes_on(workers: int, tmp_path: Path) -> None:
    folder, how = tmp_path / "in", Packing(png=True, shard_mb=1)
    folder.mkdir()
    for i in range(40):
        pixels = np.random.default_rng(i).integers(0, 256, (200, 220, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png", compress_level=0)
    before, through = bytes_of(folder), [0]

    def stop(count: int) -> None:
        through[0] += count
        if through[0] >= 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(str(folder), tmp_path / "out", how, workers=workers, progress=stop)
    assert multiprocessing.active_children() == []
    assert list(tmp_path.glob("out/.packing-train/0*.parquet"))  # whole shards, which are not made again
    assert not list(tmp_path.glob("out/*.parquet"))
    pack(str(folder), tmp_path / "out", how, workers=workers)
    pack(str(folder), tmp_path / "whole", how, workers=0)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    assert bytes_of(folder) == before
