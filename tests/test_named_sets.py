# SPDX-License-Identifier: Apache-2.0
"""The small sets are read from the layouts of their archives as torchvision reads them, and say what is missing."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import small_set_files as files
from torchvision import datasets

from kinfold.data import named_sets as small_sets
from kinfold.data.decode import decode
from kinfold.data.named_sets import SETS, canonical, open_small_set
from kinfold.data.named_sets.small import draw_caltech
from kinfold.data.sources import Source, open_source
from kinfold.errors import UserError


@pytest.fixture(autouse=True)
def _no_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINFOLD_CACHE", str(tmp_path / "the cache"))
    monkeypatch.delenv(small_sets.DOWNLOAD, raising=False)


@pytest.fixture
def _any_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision take our small files for the real ones."""
    for kind in (datasets.CIFAR10, datasets.CIFAR100):
        for name in ("train_list", "test_list"):
            monkeypatch.setattr(kind, name, [[file, None] for file, _ in getattr(kind, name)])
        monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": None})
    for kind in (datasets.STL10, datasets.SVHN):
        monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    for kind in (datasets.Flowers102,):
        monkeypatch.setattr(kind, "_file_dict", {key: (file, None) for key, (file, _) in kind._file_dict.items()})


def pairs(source: Source) -> list[tuple[str, int]]:
    """Every image's file and label."""
    assert source.labels is not None
    return [(source.name(i), int(label)) for i, label in enumerate(source.labels)]


def theirs(dataset: object) -> list[tuple[str, int]]:
    """The same of a torchvision data set whose loader gives the path."""
    return [(str(path), int(label)) for path, label in (dataset[i] for i in range(len(dataset)))]  # type: ignore


@pytest.mark.parametrize(
    ("name", "kind", "split", "words"),
    [
        ("food101", "Food101", "train", {"split": "train"}),
        ("food101", "Food101", "test", {"split": "test"}),
        ("cars", "StanfordCars", "train", {"split": "train"}),
        ("cars", "StanfordCars", "test", {"split": "test"}),
        ("aircraft", "FGVCAircraft", "train", {"split": "train"}),
        ("aircraft", "FGVCAircraft", "val", {"split": "val"}),
        ("aircraft", "FGVCAircraft", "trainval", {"split": "trainval"}),
        ("aircraft", "FGVCAircraft", "test", {"split": "test"}),
        ("dtd", "DTD", "train", {"split": "train"}),
        ("dtd", "DTD", "val", {"split": "val"}),
        ("dtd", "DTD", "test", {"split": "test"}),
        ("flowers", "Flowers102", "train", {"split": "train"}),
        ("flowers", "Flowers102", "val", {"split": "val"}),
        ("flowers", "Flowers102", "test", {"split": "test"}),
    ],
)
@pytest.mark.usefixtures("_any_checksum")
def test_files_and_labels_are_those_of_torchvision(
    tmp_path: Path, name: str, kind: str, split: str, words: dict[str, str]
) -> None:
    files.BUILDERS[name](tmp_path)
    source = open_small_set(name, tmp_path, split=split)
    dataset = getattr(datasets, kind)(root=tmp_path, loader=lambda path: path, **words)
    assert pairs(source) == theirs(dataset)
    assert source.classes is not None
    assert list(source.classes) == list(dataset.classes)[: len(source.classes)]
    assert decode(source.read(0)).shape == (8, 10, 3)


def test_pets_are_those_of_torchvision(tmp_path: Path) -> None:
    files.pets(tmp_path)
    for split, theirs in (("train", "trainval"), ("test", "test")):
        source = open_small_set("pets", tmp_path, split=split)
        dataset = datasets.OxfordIIITPet(root=tmp_path, split=theirs)
        assert pairs(source) == list(zip(map(str, dataset._images), dataset._labels))
        assert list(source.classes or ()) == dataset.classes == ["Abyssinian", "Great Dane"]


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "svhn"])
@pytest.mark.usefixtures("_any_checksum")
def test_arrays_are_those_of_torchvision(tmp_path: Path, name: str) -> None:
    files.BUILDERS[name](tmp_path)
    kind = getattr(datasets, SETS[name].torchvision)
    for split in ("train", "test"):
        source = open_small_set(name, tmp_path, split=split)
        dataset = kind(tmp_path, train=split == "train") if "cifar" in name else kind(tmp_path, split=split)
        assert len(source) == len(dataset)
        for i in range(len(dataset)):
            image, label = dataset[i]
            np.testing.assert_array_equal(source.read(i), np.asarray(image))
            assert source.labels is not None
            assert source.labels[i] == label


def test_sun397_takes_its_first_partition_and_the_folder_for_the_class(tmp_path: Path) -> None:
    files.sun397(tmp_path)
    source = open_small_set("sun397", tmp_path, split="train")
    classes = source.classes or ()
    found = {Path(name).name: classes[label] for name, label in pairs(source)}
    assert found == {"sun_a.jpg": "abbey", "sun_b.jpg": "barn", "sun_c.jpg": "church/indoor", "sun_d.jpg": "bar"}
    for path, label in theirs(datasets.SUN397(root=tmp_path, loader=lambda path: path)):
        assert dict(pairs(source)).get(path, label) == label


def test_sun397_without_its_partitions_says_where_they_are(tmp_path: Path) -> None:
    files.sun397(tmp_path)
    (tmp_path / "SUN397" / "Partitions" / "Testing_01.txt").unlink()
    with pytest.raises(UserError, match=r"Partitions\.zip"):
        open_small_set("sun397", tmp_path, split="test")


def test_places365_is_that_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.places365(tmp_path)
    monkeypatch.setattr(datasets.Places365, "_check_integrity", lambda *words: True)
    for split, theirs in (("train", "train-standard"), ("val", "val")):
        source = open_small_set("places365", tmp_path, split=split)
        assert pairs(source) == datasets.Places365(root=tmp_path, split=theirs, small=True).imgs
        assert source.classes == ("airfield", "bar", "church/indoor")


def test_lists_decide_where_the_first_folder_is_no_class(tmp_path: Path) -> None:
    files.places205(tmp_path)
    source = open_source(f"torchvision:places205@{tmp_path}")
    assert source.labels is not None
    assert source.labels.tolist() == [0, 44]
    assert source.classes is not None
    assert (len(source.classes), source.classes[0], source.classes[44]) == (205, "abbey", "church/indoor")
    files.inaturalist2018(tmp_path)
    for split, numbers in (("train", [7, 3, 5]), ("test", [9, 11])):  # no test labels are public: validation is asked
        source = open_source(f"torchvision:inaturalist2018@{tmp_path}", split=split)
        assert [Path(name).name for name, _ in pairs(source)] == [f"{n}.jpg" for n in numbers]
        assert [label for _, label in pairs(source)] == [n % 3 for n in numbers]
        assert source.classes == ("bird 0", "bird 1", "bird 2")


# The images of the 102 classes in the order of their names, and what the published train.txt has of some.
CALTECH = (
    "467 435 435 200 798 55 800 42 42 47 54 46 33 128 98 43 85 91 50 43 123 47 59 62 107 47 69 73 70 50 51 57 67 52 "
    "65 68 75 64 53 64 85 67 67 45 34 34 51 99 100 42 54 88 80 31 64 86 114 61 81 78 41 66 43 40 87 32 76 55 35 39 47 "
    "38 45 53 34 57 82 59 49 40 63 39 84 57 35 64 45 86 59 64 35 85 49 86 75 239 37 59 34 56 39 60"
)
PUBLISHED = {
    0: "10 26 40 48 71 73 88 89 118 166 173 175 193 194 196 212 243 252 266 278 293 315 324 334 338 360 397 405",
    3: "1 7 24 37 48 49 50 69 70 79 85 86 95 96 101 114 118 128 132 142 144 149 164 170 179 181 187 193 197 198",
    20: "4 7 21 22 29 32 35 38 44 55 61 67 70 71 74 78 80 84 89 93 101 102 103 110 111 116",
    92: "2 3 15 19 21 24 25 28 29 30 31 33 35 36 37 38 40 43 44 47",
    101: "1 2 3 7 8 9 11 14 19 20 21 22 26 27 34 38 41 42 47 52 56 57 59 60",
}


def test_the_draw_of_caltech101_is_the_published_one() -> None:
    drawn = draw_caltech([int(count) for count in CALTECH.split()])
    assert len(drawn) == 102
    assert sum(map(len, drawn)) == 2416
    for place, numbers in PUBLISHED.items():
        assert sorted(i + 1 for i in drawn[place]) == [int(number) for number in numbers.split()]


def test_caltech101_has_its_background_and_every_image_once(tmp_path: Path) -> None:
    files.caltech101(tmp_path)
    train, test = (open_small_set("caltech101", tmp_path, split=split) for split in ("train", "test"))
    assert train.classes == test.classes == ("BACKGROUND_Google", "Faces", "yin_yang")
    both = pairs(train) + pairs(test)
    assert len(both) == len({name for name, _ in both}) == 125
    assert train.labels is not None
    assert max(np.bincount(train.labels)) <= 30
    for name, label in both:
        assert Path(name).parent.name == train.classes[label]


def test_voc2007_is_a_source_of_images(tmp_path: Path) -> None:
    files.voc2007(tmp_path)
    assert [len(open_small_set("voc2007", tmp_path, split=split)) for split in ("train", "val", "test")] == [8, 6, 8]
    assert open_small_set("voc2007", tmp_path, split="trainval").labels is None


@pytest.mark.parametrize("name", list(SETS))
@pytest.mark.usefixtures("_any_checksum")
def test_every_set_is_a_source_that_travels(tmp_path: Path, name: str) -> None:
    files.BUILDERS[name](tmp_path)
    splits = {split: open_source(f"torchvision:{name}@{tmp_path}", split=split) for split in SETS[name].splits}
    assert len({source.fingerprint for source in splits.values()}) == len(splits)
    for source in splits.values():
        assert isinstance(source, Source)
        copy = pickle.loads(pickle.dumps(source))
        last = len(source) - 1
        np.testing.assert_array_equal(decode(copy.read(last)), decode(source.read(last)))
        assert copy.name(last) == source.name(last)
    everything = open_source(f"torchvision:{name}@{tmp_path}", split="all")
    assert len(everything) == sum(map(len, splits.values()))


def test_a_set_may_be_given_by_its_own_folder_and_by_torchvisions_name(tmp_path: Path) -> None:
    files.dtd(tmp_path)
    first = open_source(f"torchvision:DTD@{tmp_path}")
    assert open_source(f"torchvision:dtd@{tmp_path / 'dtd' / 'dtd'}").fingerprint == first.fingerprint
    assert [canonical(name) for name in ("OxfordIIITPet", "CIFAR-10", "flowers102")] == ["pets", "cifar10", "flowers"]


# What is wrong is said


def test_an_unknown_set_names_the_known() -> None:
    with pytest.raises(UserError, match=r"no set 'mnist'.*food101, cifar10"):
        open_source("torchvision:mnist")


@pytest.mark.parametrize("name", list(SETS))
def test_a_set_that_is_not_there_says_what_to_fetch_and_where_to(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"is not in .* there is no ") as error:
        open_small_set(name, tmp_path)
    assert str(tmp_path / SETS[name].places[0]) in str(error.value)
    fetched = name not in ("cars", "places205", "inaturalist2018")
    assert ("KINFOLD_DOWNLOAD=1" in str(error.value)) == fetched
    assert ("cannot fetch it" in str(error.value)) == (name == "cars")


def test_the_usual_place_is_below_the_cache(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path / "the cache" / "torchvision")):
        open_source("torchvision:food101")
    files.food101(tmp_path / "the cache" / "torchvision")
    assert len(open_source("torchvision:food101")) == 6


def test_nothing_is_fetched_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[Path] = []

    def fetch(self: datasets.DTD) -> None:
        fetched.append(Path(self.root))
        files.dtd(Path(self.root))

    monkeypatch.setattr(datasets.DTD, "_download", fetch)
    with pytest.raises(UserError, match="is not in"):
        open_small_set("dtd", tmp_path)
    assert not fetched
    assert len(open_small_set("dtd", tmp_path, download=True)) == 4
    assert len(open_small_set("dtd", tmp_path, download=True)) == 4
    assert fetched == [tmp_path]  # once
    monkeypatch.setenv("KINFOLD_DOWNLOAD", "1")
    assert len(open_source(f"torchvision:dtd@{tmp_path / 'other'}")) == 4


def test_a_download_that_fails_says_what_to_fetch_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: datasets.DTD) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(datasets.DTD, "_download", refuse)
    with pytest.raises(UserError, match=r"could not be fetched to .*no route to host.*dtd-r1\.0\.1\.tar\.gz"):
        open_small_set("dtd", tmp_path, download=True)
    with pytest.raises(UserError, match=r"cannot be fetched by kinfold.*cars_train"):
        open_small_set("cars", tmp_path, download=True)


def test_a_pickle_with_another_checksum_is_not_opened(tmp_path: Path) -> None:
    files.cifar10(tmp_path)
    trace = tmp_path / "it ran"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (trace,)

    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match=r"CIFAR-10 in .* is not whole"):
        open_small_set("cifar10", tmp_path)
    assert not trace.exists()


def test_a_list_that_names_an_unknown_image_is_told_with_its_line(tmp_path: Path) -> None:
    files.aircraft(tmp_path)
    (tmp_path / "fgvc-aircraft-2013b" / "data" / "images" / "2.jpg").unlink()
    with pytest.raises(UserError, match=r"images_variant_train\.txt, line 2: there is no image .*2\.jpg"):
        open_small_set("aircraft", tmp_path)


def test_a_label_outside_the_classes_is_told_with_its_line(tmp_path: Path) -> None:
    files.aircraft(tmp_path)
    data = tmp_path / "fgvc-aircraft-2013b" / "data"
    files.lines(data / "images_variant_train.txt", "1 DC-10", "", "2 Zeppelin")
    with pytest.raises(UserError, match=r"images_variant_train\.txt, line 3: 'Zeppelin' is none of the 3 classes"):
        open_small_set("aircraft", tmp_path)
    files.cars(tmp_path)
    (tmp_path / "stanford_cars" / "devkit" / "cars_meta.mat").unlink()
    files.savemat(tmp_path / "stanford_cars" / "devkit" / "cars_meta.mat", {"class_names": np.array(["one"], object)})
    with pytest.raises(UserError, match=r"cars_train_annos\.mat, entry 1: class 2; there are 1"):
        open_small_set("cars", tmp_path)
    files.pets(tmp_path)
    files.lines(tmp_path / "oxford-iiit-pet" / "annotations" / "test.txt", "# a remark", "Abyssinian_3 one 1 1")
    with pytest.raises(UserError, match=r"test\.txt, line 2: expected a name, class"):
        open_small_set("pets", tmp_path, split="test")


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("food101", "food-101/meta/train.json", b"{", r"train\.json is no JSON"),
        ("food101", "food-101/meta/train.json", b"[]", r"holds list"),
        ("flowers", "flowers-102/setid.mat", b"not a matrix", r"cannot be read as a MATLAB file"),
        ("flowers", "flowers-102/imagelabels.mat", None, r"imagelabels\.mat is not there"),
        ("dtd", "dtd/dtd/labels/train1.txt", b"\n", r"train1\.txt names no image"),
        ("dtd", "dtd/dtd/labels/val1.txt", None, r"val1\.txt cannot be read"),
        ("places365", "places365_train_standard.txt", b"/b/bar/1.jpg\n", r"standard\.txt, line 1: expected a path and"),
        ("places365", "places365_train_standard.txt", b"/b/bar/1.jpg 3\n", r"line 1: expected .* class below 3"),
        ("inaturalist2018", "inaturalist2018/train2018.json", b"{}", r"Expected images with file_name and id"),
        ("inaturalist2018", "inaturalist2018/train2018.json", b"{", r"train2018\.json is no JSON"),
    ],
)
def test_a_damaged_list_is_named(tmp_path: Path, name: str, file: str, content: bytes | None, message: str) -> None:
    files.BUILDERS[name](tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_small_set(name, tmp_path)


def test_a_split_that_a_set_does_not_have_is_refused(tmp_path: Path) -> None:
    files.food101(tmp_path)
    with pytest.raises(UserError, match=r"has no split 'val'; it has train, test"):
        open_small_set("food101", tmp_path, split="val")
