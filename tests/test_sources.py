# SPDX-License-Identifier: Apache-2.0
"""Folders, tables, tar files and the digits are one kind of thing, and say clearly what they are not."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from kinfold.data import folder, index
from kinfold.data.decode import Undecodable, decode
from kinfold.data.sources import Digits, Source, Subset, open_source, split_off
from kinfold.data.tars import expand
from kinfold.errors import UserError


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 3), shade).save(file, "PNG")
    return file.getvalue()


def shade(source: Source, i: int) -> int:
    return int(decode(source.read(i))[0, 0, 0])


def write(root: Path, *names: str) -> Path:
    """Write images whose shade is their number among the names."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(number))
    return root


def age(root: Path) -> None:
    """Let a folder look as if it had been written long ago, so that its listing can be trusted."""
    for place, _, _ in os.walk(root):
        os.utime(place, (1e9, 1e9))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "the cache"
    monkeypatch.setenv("KINFOLD_CACHE", str(place))
    return place


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that were walked, and not taken from the cache."""
    walked: list[str] = []
    walk = folder._scan

    def counting(root: str):
        walked.append(root)
        return walk(root)

    monkeypatch.setattr(folder, "_scan", counting)
    return walked


# The digits


def test_the_digits_are_split_in_time() -> None:
    train, test, everything = (open_source("digits", split=split) for split in ("train", "test", "all"))
    assert (len(train), len(test), len(everything)) == (1437, 360, 1797)
    np.testing.assert_array_equal(np.concatenate([train.labels, test.labels]), everything.labels)
    np.testing.assert_array_equal(test.read(0), everything.read(1437))
    assert decode(train.read(0)).shape == (8, 8, 3)
    assert max(int(train.read(i).max()) for i in range(20)) == 255
    assert train.fingerprint != test.fingerprint


# Folders


def test_a_nested_folder_without_classes_is_sorted_by_path_and_unlabelled(tmp_path: Path) -> None:
    root = write(tmp_path / "photos", "b.png", "a/z/2.JPG", "a/1.png", "a-b/3.png", "B.png", "a/Ä.png")
    source = open_source(str(root))
    names = [Path(source.name(i)).relative_to(root).as_posix() for i in range(len(source))]
    assert names == ["B.png", "a-b/3.png", "a/1.png", "a/z/2.JPG", "a/Ä.png", "b.png"]
    assert [shade(source, i) for i in range(6)] == [4, 3, 2, 1, 5, 0]
    assert source.labels is None
    assert source.classes is None
    assert isinstance(source, Source)


def test_folders_of_one_class_each_give_labels(tmp_path: Path) -> None:
    root = write(tmp_path / "pets", "dog/1.png", "cat/x/1.png", "cat/2.png", "Ant/1.png")
    source = open_source(str(root))
    assert source.classes == ("Ant", "cat", "dog")
    assert source.labels is not None
    assert [source.classes[label] for label in source.labels] == ["Ant", "cat", "cat", "dog"]
    assert source.labels.dtype == np.int64


@pytest.mark.parametrize(
    "names",
    [
        ("JPEGImages/1.png", "SegmentationClass/1.png"),
        ("leftImg8bit/train/a/1.png", "gtFine/train/a/1.png"),
        ("train/images/1.png", "train/masks/1.png", "test/images/2.png", "test/masks/2.png"),
        ("train2017/1.png", "val2017/1.png"),
    ],
)
def test_the_folders_of_voc_coco_cityscapes_and_masks_are_no_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    source = open_source(str(write(tmp_path / "photos", *names)))
    assert source.labels is None
    assert "no labels" in source.description


def test_one_image_outside_the_class_folders_means_they_are_no_classes(tmp_path: Path) -> None:
    assert open_source(str(write(tmp_path / "a", "dog/1.png", "cat/1.png", "2.png"))).labels is None
    assert open_source(str(write(tmp_path / "b", "dog/1.png", "dog/2.png"))).labels is None


def test_train_and_validation_folders_are_splits_with_the_same_classes(tmp_path: Path) -> None:
    root = write(tmp_path / "set", "train/a/1.png", "train/b/1.png", "train/c/1.png", "val/b/1.png", "val/c/1.png")
    train, test = open_source(str(root)), open_source(str(root), split="test")
    assert train.classes == test.classes == ("a", "b", "c")
    assert train.labels.tolist() == [0, 1, 2]
    assert test.labels.tolist() == [1, 2]
    assert [shade(test, i) for i in range(2)] == [3, 4]
    assert open_source(str(root), split="val").fingerprint == test.fingerprint
    assert open_source(str(root), split="all").labels.tolist() == [0, 1, 2, 1, 2]
    with pytest.raises(UserError, match=r"has no split 'extra'; it has train, val"):
        open_source(str(root), split="extra")


def test_a_flat_test_folder_beside_classes_has_no_labels(tmp_path: Path) -> None:
    root = write(tmp_path / "set", "train/a/1.png", "train/b/1.png", "test/1.png", "valid/1.png")
    assert open_source(str(root)).labels.tolist() == [0, 1]
    assert open_source(str(root), split="test").labels is None
    assert [shade(open_source(str(root), split=split), 0) for split in ("test", "validation")] == [2, 3]


def test_a_folder_named_test_among_classes_is_a_class(tmp_path: Path) -> None:
    root = write(tmp_path / "set", "train/1.png", "plane/1.png", "test/1.png")
    assert open_source(str(root)).classes == ("plane", "test", "train")
    with pytest.raises(UserError, match="has no splits"):
        open_source(str(root), split="test")


def test_hidden_files_and_other_files_are_left_out(tmp_path: Path) -> None:
    root = write(tmp_path / "photos", "1.png", ".hidden/2.png", "._1.png", "x/.thumb.jpg")
    (root / "notes.txt").write_text("no image")
    source = open_source(str(root))
    assert len(source) == 1
    assert "1 other files ignored" in source.description


def test_links_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    elsewhere = write(tmp_path / "elsewhere", "1.png", "deep/2.png")
    root = write(tmp_path / "photos", "z/3.png")
    (root / "a").symlink_to(elsewhere)
    (root / "b").symlink_to(elsewhere)
    (root / "z" / "up").symlink_to(root)
    (elsewhere / "deep" / "back").symlink_to(root / "z")
    (root / "lost.png").symlink_to(tmp_path / "nowhere.png")
    source = open_source(str(root))
    names = [Path(source.name(i)).relative_to(root).as_posix() for i in range(len(source))]
    assert names == ["a/1.png", "a/deep/2.png", "lost.png", "z/3.png"]
    with pytest.raises(Undecodable, match="cannot be read"):
        source.read(2)


def test_odd_names_are_read_and_can_be_printed(tmp_path: Path) -> None:
    root = write(tmp_path / "photos", "naïve 写真 #1.png", "line\nbreak.png", " .x y.png")
    try:
        with open(os.fsencode(root) + b"/\xff\xfe.png", "wb") as file:
            file.write(png(9))
    except OSError:  # a file system that knows only text
        write(root, "0.png")
    source = open_source(str(root))
    assert len(source) == 4
    for i in range(4):
        decode(source.read(i))
        source.name(i).encode("utf-8")


def test_an_unchanged_folder_is_not_walked_again(tmp_path: Path, scans: list[str]) -> None:
    root = write(tmp_path / "photos", "a/1.png", "b/c/2.png")
    age(root)
    first, second = open_source(str(root)), open_source(str(root))
    assert len(scans) == 1
    assert first.fingerprint == second.fingerprint
    assert [second.name(i) for i in range(2)] == [first.name(i) for i in range(2)]


@pytest.mark.parametrize("change", ["add", "remove", "rename", "folder", "root"])
def test_a_changed_folder_is_walked_again(tmp_path: Path, scans: list[str], change: str) -> None:
    root = write(tmp_path / "photos", "a/1.png", "b/c/2.png", "b/c/3.png")
    age(root)
    before = open_source(str(root))
    if change == "add":
        write(root, "b/c/4.png")
    elif change == "remove":
        (root / "b/c/3.png").unlink()
    elif change == "rename":
        (root / "b/c/3.png").rename(root / "b/c/5.png")
    elif change == "folder":
        write(root, "b/d/1.png")
    else:
        write(root, "1.png")
    after = open_source(str(root))
    assert len(scans) == 2
    assert after.fingerprint != before.fingerprint
    assert len(after) == sum(1 for path in root.rglob("*.png"))


def test_a_folder_changed_a_moment_ago_is_not_trusted(tmp_path: Path, scans: list[str]) -> None:
    root = write(tmp_path / "photos", "1.png")
    open_source(str(root))
    state = os.stat(root)
    write(root, "2.png")
    # As on a file system whose clock ticks slowly: the new file left no trace in the directory's time.
    os.utime(root, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert len(open_source(str(root))) == 2


def test_a_damaged_index_is_made_again(tmp_path: Path, cache: Path, scans: list[str]) -> None:
    root = write(tmp_path / "photos", "1.png", "2.png")
    age(root)
    good = open_source(str(root)).fingerprint
    (file,) = (cache / "index").iterdir()
    content = file.read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    for number, damaged in enumerate((b"", b"rubbish", content[:-3], content[:40], flipped, content[:8] * 9)):
        file.write_bytes(damaged)
        assert open_source(str(root)).fingerprint == good
        assert len(scans) == number + 2


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "photos", "1.png", "2.png")
    blocked = tmp_path / "a file"
    blocked.write_text("in the way of the cache's folder")
    source = open_source(str(root), cache=blocked)
    assert shade(pickle.loads(pickle.dumps(source)), 1) == 1


def test_the_names_of_many_files_travel_as_a_path(tmp_path: Path) -> None:
    root = write(tmp_path / "photos", *(f"{i:04d}.png" for i in range(500)))
    source = open_source(str(root))
    sent = pickle.dumps(source)
    assert len(sent) < 2000
    arrived = pickle.loads(sent)
    assert [arrived.name(i) for i in (0, 499)] == [source.name(i) for i in (0, 499)]
    (next((tmp_path / "the cache" / "index").iterdir())).unlink()
    with pytest.raises(UserError, match="changed while processes were being started"):
        pickle.loads(sent)


def test_many_channel_arrays_lie_in_folders_as_npy(tmp_path: Path) -> None:
    root = tmp_path / "cubes"
    root.mkdir()
    pixels = np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)
    np.save(root / "1.npy", pixels)
    np.testing.assert_array_equal(decode(open_source(str(root)).read(0), 5), pixels)


# Index files


def test_an_index_comes_back_as_it_was_written(tmp_path: Path) -> None:
    arrays = {"a": np.arange(7, dtype=np.int64), "empty": np.zeros(0, np.uint8), "c": np.ones((3, 2), np.int32)}
    written = index.save(tmp_path / "x" / "y.index", {"word": "ä\udcff"}, arrays)
    read = index.load(tmp_path / "x" / "y.index")
    assert read is not None
    assert read.meta == {"word": "ä\udcff"}
    assert read.token == written.token
    assert arrays.keys() == read.arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(read.arrays[name], array)
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["y.index"]


# Tables


def cells(count: int, **more: list) -> dict[str, list]:
    return {"image": [{"bytes": png(i), "path": f"{i}.png"} for i in range(count)], **more}


def parquet(path: Path, columns: dict[str, list], features: object = None) -> None:
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)


@pytest.fixture
def features():
    import datasets

    return datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})


def test_parquet_shards_are_read_by_split(tmp_path: Path, features: object) -> None:
    root = tmp_path / "table"
    parquet(root / "data" / "train-00000-of-00002.parquet", cells(3, label=[0, 1, 1]), features)
    parquet(root / "data" / "train-00001-of-00002.parquet", cells(2, label=[0, 0]), features)
    parquet(root / "data" / "validation-00000-of-00001.parquet", cells(4, label=[1, 1, 0, 1]), features)
    train, test = open_source(str(root)), open_source(str(root), split="test")
    assert train.labels.tolist() == [0, 1, 1, 0, 0]
    assert train.classes == ("no", "yes")
    assert [shade(train, i) for i in range(5)] == [0, 1, 2, 0, 1]
    assert test.labels.tolist() == [1, 1, 0, 1]
    assert len(open_source(str(root), split="all")) == 9
    assert shade(pickle.loads(pickle.dumps(train)), 2) == 2
    assert train.fingerprint == open_source(str(root)).fingerprint != test.fingerprint
    with pytest.raises(UserError, match="has no split 'unlabeled'; it has train, validation"):
        open_source(str(root), split="unlabeled")


def test_one_damaged_image_does_not_spoil_a_table(tmp_path: Path, features: object) -> None:
    columns = cells(3, label=[0, 1, 0])
    columns["image"][1]["bytes"] = b"not an image"
    parquet(tmp_path / "t.parquet", columns, features)
    source = open_source(str(tmp_path / "t.parquet"))
    assert shade(source, 2) == 2
    with pytest.raises(Undecodable):
        decode(source.read(1))


def test_a_plain_table_is_understood_by_its_column_names(tmp_path: Path) -> None:
    columns = {"id": [7, 8], "img": [png(0), png(1)], "fine_label": [4, 2]}
    parquet(tmp_path / "test.parquet", columns)
    source = open_source(str(tmp_path / "test.parquet"))
    assert shade(source, 1) == 1
    assert source.labels.tolist() == [4, 2]
    assert source.classes is None


def test_labels_that_are_missing_are_no_labels(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", cells(2, label=[-1, -1]))
    parquet(tmp_path / "b.parquet", cells(2, label=[1, None]))
    assert open_source(str(tmp_path / "a.parquet")).labels is None
    some = open_source(str(tmp_path / "b.parquet")).labels
    assert some is not None
    assert some.tolist() == [1, -1], "a row without a label has -1, whatever the others have"


def test_a_rewritten_table_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    parquet(path, cells(2, label=[0, 1]))
    before = open_source(str(path))
    parquet(path, cells(3, label=[1, 1, 0]))
    after = open_source(str(path))
    assert after.labels.tolist() == [1, 1, 0]
    assert before.fingerprint != after.fingerprint


def test_images_named_by_path_are_read_beside_the_table(tmp_path: Path) -> None:
    write(tmp_path / "pictures", "0.png", "1.png")
    columns = {"image": [{"bytes": None, "path": f"pictures/{i}.png"} for i in (1, 0, 5)]}
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"image": pa.array(columns["image"], kind)}), tmp_path / "t.parquet")
    source = open_source(str(tmp_path / "t.parquet"))
    assert [shade(source, i) for i in (0, 1)] == [1, 0]
    with pytest.raises(Undecodable, match=r"pictures/5\.png cannot be read"):
        source.read(2)


def test_saved_data_sets_and_arrow_files_are_opened(tmp_path: Path, features: object) -> None:
    import datasets

    rows = datasets.Dataset.from_dict(cells(4, label=[0, 1, 0, 1]), features=features)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([3])}).save_to_disk(tmp_path / "two")
    arrow = next((tmp_path / "one").glob("*.arrow"))
    assert shade(open_source(str(tmp_path / "one")), 3) == 3
    assert shade(open_source(str(tmp_path / "two"), split="test"), 0) == 3
    source = open_source(str(arrow))
    assert source.labels.tolist() == [0, 1, 0, 1]
    assert shade(pickle.loads(pickle.dumps(source)), 2) == 2


def test_a_table_is_read_without_a_cache(tmp_path: Path, features: object) -> None:
    parquet(tmp_path / "t.parquet", cells(2, label=[0, 1]), features)
    (tmp_path / "blocked").write_text("")
    assert shade(open_source(str(tmp_path / "t.parquet"), cache=tmp_path / "blocked"), 1) == 1


def test_a_table_without_images_and_a_broken_table_are_refused(tmp_path: Path) -> None:
    parquet(tmp_path / "numbers.parquet", {"x": [1, 2], "text": ["a", "b"]})
    with pytest.raises(UserError, match=r"No column .* holds images\. Found: x \(int64\), text \(string\)"):
        open_source(str(tmp_path / "numbers.parquet"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match=r"broken\.parquet cannot be read as parquet"):
        open_source(str(tmp_path / "broken.parquet"))


def test_a_hub_that_cannot_be_reached_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*words: object, **named: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset_builder", offline)
    for data in ("hf:someone/something:config", "someone/something"):
        with pytest.raises(UserError, match=r"Hub cannot be reached .*no route to host"):
            open_source(data)
    with pytest.raises(UserError, match="no name on the Hub"):
        open_source("hf:a/b/c")


def test_a_hub_data_set_is_read_by_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, features) -> None:
    import datasets

    rows = datasets.Dataset.from_dict(cells(4, label=[0, 1, 0, 1]), features=features)
    parts = {"train": rows, "validation": rows.select([2, 3])}
    asked: list[object] = []

    class Builder:
        class info:
            splits = dict.fromkeys(parts)

    def load(name: str, config: str | None, *, split: str | None = None, cache_dir: object = None) -> object:
        asked.append((name, config, split))
        return parts[split] if split else datasets.DatasetDict(parts)

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *words, **named: Builder)
    monkeypatch.setattr(datasets, "load_dataset", load)
    test = open_source("hf:x/y:z", split="test")
    assert [shade(test, i) for i in range(2)] == [2, 3]
    assert len(open_source("hf:x/y", split="all")) == 6
    assert asked == [("x/y", "z", "validation"), ("x/y", None, None)]


# Tar files


def tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as file:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return path


def test_a_tar_is_read_at_any_position_with_its_labels(tmp_path: Path) -> None:
    samples: dict[str, bytes] = {}
    for i in (3, 1, 2):
        samples |= {f"d/{i:03d}.cls": b"%d\n" % (i * 10), f"d/{i:03d}.png": png(i), f"d/{i:03d}.txt": b"caption"}
    source = open_source(str(tar(tmp_path / "a.tar", samples)))
    assert [shade(source, i) for i in (2, 0, 1)] == [2, 3, 1]
    assert source.labels.tolist() == [30, 10, 20]
    assert source.name(0).endswith("a.tar:d/003.png")
    assert shade(pickle.loads(pickle.dumps(source)), 1) == 1
    with pytest.raises(IndexError):
        source.name(3)


def test_labels_in_json_may_be_words(tmp_path: Path) -> None:
    members = {}
    for i, word in enumerate(("owl", "elk", "owl")):
        members |= {f"{i}.jpg": png(i), f"{i}.json": json.dumps({"label": word}).encode()}
    source = open_source(str(tar(tmp_path / "a.tar", members)))
    assert source.classes == ("elk", "owl")
    assert source.labels.tolist() == [1, 0, 1]
    members["2.json"] = b"{}"
    assert open_source(str(tar(tmp_path / "b.tar", members))).labels is None


def test_shards_are_one_source_in_their_order(tmp_path: Path) -> None:
    for shard in range(11):
        tar(tmp_path / f"part-{shard:03d}.tar", {f"{shard}-{i}.png": png(2 * shard + i) for i in range(2)})
    tar(tmp_path / "part-test.tar", {"x.png": png(99)})
    for data in (str(tmp_path), str(tmp_path / "part-{000..010}.tar"), str(tmp_path / "part-0*.tar")):
        source = open_source(data)
        assert [shade(source, i) for i in range(22)] == list(range(22))
    assert shade(open_source(str(tmp_path), split="test"), 0) == 99
    with pytest.raises(UserError, match=r"part-011\.tar does not exist"):
        open_source(str(tmp_path / "part-{009..012}.tar"))
    with pytest.raises(UserError, match="No file fits"):
        open_source(str(tmp_path / "none-*.tar"))


def test_braces_are_written_out(tmp_path: Path) -> None:
    for name in ("a1x", "a2x", "b1x", "b2x"):
        (tmp_path / f"{name}.tar").touch()
    found = expand(str(tmp_path / "{b,a}{1..2}x.tar"))
    assert [Path(name).stem for name in found] == ["b1x", "b2x", "a1x", "a2x"]


def test_a_rewritten_tar_is_indexed_anew_and_a_shortened_one_noticed(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", {"0.png": png(0)})
    before = open_source(str(path))
    tar(path, {"0.png": png(5), "1.png": png(6)})
    after = open_source(str(path))
    assert [shade(after, i) for i in range(2)] == [5, 6]
    assert before.fingerprint != after.fingerprint
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(Undecodable, match="shorter than when it was indexed"):
        after.read(1)
    with pytest.raises(UserError, match="not a complete tar file"):
        open_source(str(path))


def test_a_compressed_or_imageless_tar_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is compressed"):
        open_source(str(tar(tmp_path / "a.tar", {"0.png": png(0)}, "w:gz")))
    with pytest.raises(UserError, match=r"holds no image; it holds \.txt \(1\)"):
        open_source(str(tar(tmp_path / "b.tar", {"0.txt": b"x"})))


# What cannot be opened


def test_what_is_not_there_is_answered_with_what_is(tmp_path: Path) -> None:
    write(tmp_path / "Photos", "1.png")
    with pytest.raises(UserError, match=r"does not exist\. Did you mean .*/Photos\?"):
        open_source(str(tmp_path / "photo"))
    with pytest.raises(UserError, match=r"there is no photos in .*Did you mean .*/Photos\?"):
        open_source(str(tmp_path / "photos" / "train" / "x"))


def test_a_folder_without_images_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is empty"):
        open_source(str(tmp_path))
    for name in ("a.txt", "b.TXT", "sub/c.pdf", "Makefile"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=r"found 4 files: \.txt \(2\), no ending \(1\), \.pdf \(1\)"):
        open_source(str(tmp_path))


def test_a_wrong_file_says_what_is_expected(tmp_path: Path) -> None:
    write(tmp_path, "1.png")
    for name, message in (("a.csv", "is no image folder"), ("a.zip", "unpack it"), ("1.png", "a single image")):
        (tmp_path / name).touch()
        with pytest.raises(UserError, match=message):
            open_source(str(tmp_path / name))


def test_images_beside_tar_files_are_a_question(tmp_path: Path) -> None:
    write(tmp_path, "cat/1.png", "dog/1.png")
    tar(tmp_path / "backup.tar", {"0.png": png(0)})
    with pytest.raises(UserError, match="holds 2 images and 1 tar files"):
        open_source(str(tmp_path))


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "photos", "1.png", "secret/2.png", "lost+found/3.png")
    scan = os.scandir

    def guarded(path: str):
        if "secret" in path or "lost+found" in path:
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(UserError, match="secret cannot be read: Permission denied"):
        open_source(str(tmp_path / "photos"))
    (tmp_path / "photos" / "secret").rename(tmp_path / "elsewhere")
    assert len(open_source(str(tmp_path / "photos"))) == 1


# Parts of a source


def test_a_limit_keeps_the_same_images_and_a_smaller_one_some_of_them() -> None:
    few, more = open_source("digits", limit=50), open_source("digits", limit=200)
    assert isinstance(few, Subset)
    assert isinstance(more, Subset)
    assert len(few) == 50
    assert set(few.positions) < set(more.positions)
    assert (np.diff(few.positions) > 0).all()
    np.testing.assert_array_equal(few.positions, open_source("digits", limit=50).positions)
    # Evenly spread: each fifth of the set gives about its share of 200.
    assert np.histogram(more.positions, 5, (0, 1437))[0].min() > 20
    assert len(open_source("digits", limit=5000)) == 1437
    assert few.fingerprint != more.fingerprint != open_source("digits").fingerprint
    with pytest.raises(UserError, match="limit is 0"):
        open_source("digits", limit=0)


def test_a_subset_shows_the_images_of_its_positions() -> None:
    source = Digits()
    part = Subset(source, np.array([5, 3, 700]))
    np.testing.assert_array_equal(part.read(1), source.read(3))
    assert part.labels.tolist() == source.labels[[5, 3, 700]].tolist()
    assert part.name(2) == source.name(700)
    assert pickle.loads(pickle.dumps(part)).name(0) == source.name(5)
    with pytest.raises(IndexError):
        Subset(source, np.array([1437]))


def test_a_held_out_part_has_its_share_of_every_class() -> None:
    source = Digits()
    rest, held = split_off(source, 0.2, seed=1)
    assert sorted([*rest.positions, *held.positions]) == list(range(1437))
    assert len(held) == round(0.2 * 1437)
    share = np.bincount(held.labels) / np.bincount(source.labels)
    np.testing.assert_allclose(share, 0.2, atol=0.01)
    assert split_off(source, 0.2, seed=1)[1].fingerprint == held.fingerprint
    assert split_off(source, 0.2, seed=2)[1].fingerprint != held.fingerprint


def test_a_held_out_part_of_unlabelled_images_is_drawn_from_all(tmp_path: Path) -> None:
    source = open_source(str(write(tmp_path / "photos", *(f"{i}.png" for i in range(10)))))
    rest, held = split_off(source, 0.3, seed=0)
    assert (len(rest), len(held)) == (7, 3)
    for share in (0.0, 0.01, 1.0):
        with pytest.raises(UserError, match="at least one"):
            split_off(source, share, seed=0)


def test_a_folder_listed_twice_is_the_same_to_who_holds_the_first_listing(tmp_path: Path) -> None:
    photos = write(tmp_path / "photos", "a.png", "b.png")
    listings = tmp_path / "listings"
    travelling = pickle.dumps(open_source(str(photos), cache=listings))
    for listing in (listings / "index").iterdir():
        listing.unlink()  # listed anew, as two ranks on a cold cache do
    again = open_source(str(photos), cache=listings)
    assert pickle.loads(travelling).name(1) == again.name(1)


def test_all_splits_of_a_table_open_where_only_one_has_labels(tmp_path: Path) -> None:
    import datasets

    rows = {"image": [{"bytes": b"x", "path": None}] * 3}
    features = {"image": datasets.Image(decode=False)}
    labelled = datasets.Features({**features, "label": datasets.ClassLabel(names=["cat", "dog"])})
    datasets.Dataset.from_dict({**rows, "label": [0, 1, 1]}, features=labelled).to_parquet(tmp_path / "train.parquet")
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(tmp_path / "test.parquet")
    everything = open_source(str(tmp_path), split="all", cache=tmp_path / "cache")
    assert len(everything) == 6
    assert everything.labels is not None
    assert sorted(everything.labels.tolist()) == [-1, -1, -1, 0, 1, 1]
    assert everything.classes == ("cat", "dog")
