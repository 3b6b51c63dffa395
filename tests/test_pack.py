# SPDX-License-Identifier: Apache-2.0
"""Packing: the same images, labels and order in files that others read, and nothing half done under a final name."""

from __future__ import annotations

import errno
import io
import json
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from hostile import bytes_of
from PIL import Image

from kinfold.data import pack as pack_module
from kinfold.data.decode import decode
from kinfold.data.pack import Packing, pack
from kinfold.data.repack import Repacking
from kinfold.data.sources import Digits, open_source
from kinfold.errors import UserError
from kinfold.run_folder import held

SMALL = Packing(short_side=24, shard_mb=1)


def encoded(height: int, width: int, kind: str = "JPEG", seed: int = 0, **words: object) -> bytes:
    """A smooth picture in colour."""
    down, right = np.linspace(0, 3, height)[:, None], np.linspace(0, 4, width)[None, :]
    pixels = np.stack([127 + 120 * np.sin(down + right * k + seed) for k in (0.5, 1.0, 2.0)], axis=2)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, kind, **words)
    return file.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes: large and small JPEG, one turned by EXIF, a PNG, and a file that is cut off."""
    turned = Image.Exif()
    turned[0x0112] = 6
    folder = tmp_path / "photos"
    files = {
        "cat/0.jpg": encoded(60, 90),
        "cat/1.jpg": encoded(20, 30, seed=1, quality=95),
        "cat/2.jpg": encoded(48, 80, seed=2, exif=turned),
        "zebra/3.png": encoded(20, 31, "PNG", seed=3),
        "zebra/4.jpg": encoded(60, 90, seed=4)[:400],
        "zebra/5.jpg": encoded(100, 40, seed=5),
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def encode(raw: bytes | np.ndarray, **words: object) -> tuple[bytes, str, bool]:
    return Repacking(Digits(), **{"short_side": 24, "quality": 90, "png": False, **words}).encode(raw)


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_packed_folder_opens_with_the_same_images_labels_classes_and_order(
    format: str, workers: int, photos: Path, tmp_path: Path
) -> None:
    told: list[int] = []
    made = pack(
        str(photos), tmp_path / "out", Packing(short_side=24, format=format), workers=workers, progress=told.append
    )
    assert sum(told) == 6
    before, after = open_source(str(photos)), open_source(str(tmp_path / "out"))
    kept = [0, 1, 2, 3, 5]
    assert after.labels is not None
    assert before.labels is not None
    assert after.labels.tolist() == before.labels[kept].tolist() == [0, 0, 0, 1, 1]
    assert after.classes == before.classes == ("cat", "zebra")
    assert [decode(after.read(i)).shape[:2] for i in range(5)] == [(24, 36), (20, 30), (40, 24), (20, 31), (60, 24)]
    for i, position in enumerate(kept):
        old = Image.fromarray(decode(before.read(position)))
        new = decode(after.read(i))
        wanted = np.asarray(old.resize(new.shape[1::-1], Image.Resampling.BILINEAR), np.int64)
        assert np.abs(wanted - new).mean() < 4
    assert after.read(1) == before.read(1)
    assert (made.images, made.untouched) == (5, 1)
    assert made.bytes_before == sum(len(before.read(i)) for i in kept)
    assert made.bytes_after == sum(len(after.read(i)) for i in range(5))
    assert list(made.left_out) == [str(photos / "zebra" / "4.jpg")]


def test_the_number_of_workers_changes_no_byte(photos: Path, tmp_path: Path) -> None:
    for workers in (0, 1, 2):
        pack(str(photos), tmp_path / str(workers), SMALL, workers=workers)
    assert bytes_of(tmp_path / "0") == bytes_of(tmp_path / "1") == bytes_of(tmp_path / "2")


def test_parquet_shards_are_read_by_the_datasets_library(photos: Path, tmp_path: Path) -> None:
    pack(str(photos), tmp_path / "out", SMALL)
    assert [path.name for path in sorted((tmp_path / "out").glob("*.parquet"))] == ["train-00000-of-00001.parquet"]
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.features["label"] == datasets.ClassLabel(names=["cat", "zebra"])
    assert isinstance(rows.features["image"], datasets.Image)
    assert [row["label"] for row in rows] == [0, 0, 0, 1, 1]
    assert [row["image"].size for row in rows] == [(36, 24), (30, 20), (24, 40), (31, 20), (24, 60)]


def test_webdataset_shards_pair_each_image_with_its_label(photos: Path, tmp_path: Path) -> None:
    pack(str(photos), tmp_path / "out", Packing(short_side=24, format="webdataset"))
    with tarfile.open(tmp_path / "out" / "train-00000-of-00001.tar") as tar:
        names = tar.getnames()
        labels = [tar.extractfile(name).read() for name in names if name.endswith(".cls")]
    assert names[:4] == ["00000000.jpg", "00000000.cls", "00000001.jpg", "00000001.cls"]
    assert labels == [b"0", b"0", b"0", b"1", b"1"]


def test_shards_are_as_large_as_asked_and_keep_the_order(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (300, 400, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{i:02}.jpg", quality=95)
    made = pack(str(tmp_path / "in"), tmp_path / "out", Packing(shard_mb=1))
    sizes = [pq.read_metadata(tmp_path / "out" / name).num_rows for name in made.shards]
    assert len(sizes) > 1
    assert sum(sizes) == 12
    assert made.shards[-1] == f"train-{len(sizes) - 1:05}-of-{len(sizes):05}.parquet"
    before, after = open_source(str(tmp_path / "in")), open_source(str(tmp_path / "out"))
    assert [after.read(i) for i in range(12)] == [before.read(i) for i in range(12)]
    assert after.labels is None


def test_arrays_and_splits_are_packed_too(tmp_path: Path) -> None:
    for split in ("train", "test"):
        pack("digits", tmp_path / "out", Packing(split=split, png=True), workers=0)
    for split in ("train", "test"):
        before, after = Digits(split), open_source(str(tmp_path / "out"), split=split)
        assert after.labels is not None
        assert after.labels.tolist() == before.labels.tolist()
        assert after.classes == before.classes
        assert all(np.array_equal(decode(after.read(i), 1), before.read(i)) for i in range(0, len(before), 50))


def test_an_image_without_colour_gets_one_channel_and_png_loses_nothing() -> None:
    grey = np.arange(900, dtype=np.uint8).reshape(30, 30, 1)
    raw, kind, untouched = encode(grey, png=True, short_side=64)
    assert (kind, untouched) == ("png", False)
    assert Image.open(io.BytesIO(raw)).mode == "L"
    assert np.array_equal(decode(raw, 1), grey)
    small = encoded(20, 20, "PNG")
    assert encode(small, png=True) == (small, "png", True)
    assert encode(small)[1:] == ("jpg", False)


def test_what_is_no_picture_of_one_or_three_channels_keeps_its_bytes() -> None:
    bands = np.random.default_rng(0).integers(0, 256, (40, 50, 5), dtype=np.uint8)
    raw, kind, untouched = encode(bands)
    assert (kind, untouched) == ("npy", False)
    assert np.array_equal(decode(raw, 5), bands)
    assert encode(raw) == (raw, "npy", True)
    pages = io.BytesIO()
    first, *rest = (Image.fromarray(bands[..., i]) for i in range(5))
    first.save(pages, "TIFF", save_all=True, append_images=rest)
    assert encode(pages.getvalue()) == (pages.getvalue(), "tif", True)


def test_a_large_photo_is_decoded_at_a_fraction_and_looks_the_same() -> None:
    raw = encoded(640, 800)
    new = decode(encode(raw, short_side=64)[0]).astype(np.int64)
    whole = Image.fromarray(decode(raw)).resize((80, 64), Image.Resampling.BILINEAR)
    assert new.shape == (64, 80, 3)
    assert np.abs(new - np.asarray(whole)).mean() < 3


class Stopped(Exception):
    """Somebody pulled the plug."""


def noise(folder: Path, count: int) -> Path:
    """Images of about 100 kB."""
    folder.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (200, 220, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return folder


def test_a_stopped_run_leaves_no_shard_under_its_name_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, how = noise(tmp_path / "in", 40), Packing(shard_mb=1, png=True)
    (source / "00.png").write_bytes(b"not an image")
    pack(str(source), tmp_path / "whole", how)
    seen: list[int] = []

    def stop(count: int) -> None:
        seen.append(count)
        if sum(seen) >= 32:
            raise Stopped

    with pytest.raises(Stopped):
        pack(str(source), tmp_path / "out", how, workers=0, progress=stop)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".packing-train"]
    worked_on: list[int] = []
    original = Repacking.__call__

    def watched(self: Repacking, task: pack_module.Task) -> object:
        worked_on.extend(task.positions.tolist())
        return original(self, task)

    monkeypatch.setattr(Repacking, "__call__", watched)
    again = pack(str(source), tmp_path / "out", how, workers=0)
    assert 0 < worked_on[0] <= 32
    assert again.left_out.keys() == {str(source / "00.png")}
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    worked_on.clear()
    pack(str(source), tmp_path / "out", how, workers=0)
    assert worked_on == []


def test_a_run_stopped_while_shards_get_their_names_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, how = noise(tmp_path / "in", 24), Packing(shard_mb=1, png=True)
    pack(str(source), tmp_path / "whole", how)
    original, left = pack_module.os.replace, [3]

    def replace(old: object, new: Path) -> None:
        if Path(new).parent == tmp_path / "out":
            left[0] -= 1
            if left[0] == 0:
                raise Stopped
        original(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(pack_module.os, "replace", replace)
        with pytest.raises(Stopped):
            pack(str(source), tmp_path / "out", how, workers=0)
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 2
    pack(str(source), tmp_path / "out", how, workers=0)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_full_disk_is_one_message_and_what_was_written_is_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, how = noise(tmp_path / "in", 24), Packing(shard_mb=1, png=True)
    original, left = pq.ParquetWriter.write_table, [2]

    def full(self: pq.ParquetWriter, *words: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, *words)

    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "write_table", full)
        with pytest.raises(UserError, match=r"No space left.*Make room; the same command then goes on behind the fi"):
            pack(str(source), tmp_path / "out", how, workers=0)
    pack(str(source), tmp_path / "whole", how)
    pack(str(source), tmp_path / "out", how)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_draft_of_other_settings_is_begun_anew(tmp_path: Path) -> None:
    source = noise(tmp_path / "in", 20)

    def stop(count: int) -> None:
        if count:
            raise Stopped

    with pytest.raises(Stopped):
        pack(str(source), tmp_path / "out", Packing(shard_mb=1, png=True), workers=0, progress=stop)
    pack(str(source), tmp_path / "out", SMALL)
    pack(str(source), tmp_path / "whole", SMALL)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_folder_that_holds_something_else_is_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"full is not empty \(it holds thesis\.tex\)"):
        pack(str(photos), tmp_path / "full", SMALL)
    with pytest.raises(UserError, match="is a file"):
        pack(str(photos), tmp_path / "full" / "thesis.tex", SMALL)
    with pytest.raises(UserError, match="a folder outside of it"):
        pack(str(photos), photos / "packed", SMALL)
    pack(str(photos), tmp_path / "out", SMALL)
    before = bytes_of(tmp_path / "out")
    with pytest.raises(UserError, match=r"other images or with other settings.*short_side 24.*short_side 25"):
        pack(str(photos), tmp_path / "out", Packing(short_side=25, shard_mb=1))
    with pytest.raises(UserError, match="other classes"):
        pack("digits", tmp_path / "out", Packing(split="test"))
    assert bytes_of(tmp_path / "out") == before
    assert json.loads(before["pack.json"])["classes"] == ["cat", "zebra"]


def test_two_processes_do_not_pack_into_one_folder(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    out.mkdir()
    with held(out), pytest.raises(UserError, match="another process is at work in"):
        pack(str(photos), out, workers=0)
    assert pack(str(photos), out, workers=0).shards


def test_a_packed_folder_that_lost_a_file_says_so(photos: Path, tmp_path: Path) -> None:
    shards = pack(str(photos), tmp_path / "packed", workers=0).shards
    (tmp_path / "packed" / shards[0]).unlink()
    with pytest.raises(UserError, match=f"{shards[0]} was packed, but it is gone"):
        pack(str(photos), tmp_path / "packed", workers=0)


def test_a_set_without_a_readable_image_is_an_error_and_no_shard(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.jpg").write_bytes(b"nothing")
    with pytest.raises(UserError, match="No readable image"):
        pack(str(tmp_path / "in"), tmp_path / "out", SMALL)
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_images_without_a_label_among_others_are_kept_so_in_parquet_and_refused_in_tars(tmp_path: Path) -> None:
    source = Digits()
    assert source.labels is not None
    source.labels[3] = -1
    pack(source, tmp_path / "out", SMALL)
    labels = open_source(str(tmp_path / "out")).labels
    assert labels is not None
    assert labels.tolist() == source.labels.tolist()
    with pytest.raises(UserError, match=r"1 images of .* have no label"):
        pack(source, tmp_path / "tars", Packing(format="webdataset"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"short_side": 0}, "--short-side is 0"),
        ({"quality": 96}, "--quality is 96; it has to be 1 to 95"),
        ({"shard_mb": 0}, "--shard-mb is 0"),
        ({"format": "zip"}, "--format is 'zip'; it has to be parquet or webdataset"),
    ],
)
def test_a_setting_that_cannot_be_is_named(words: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        pack("digits", tmp_path / "out", Packing(**words))
    assert not (tmp_path / "out").exists()
