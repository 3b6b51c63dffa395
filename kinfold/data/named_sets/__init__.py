# SPDX-License-Identifier: Apache-2.0
"""The labelled sets that papers transfer to, in the layouts that torchvision's data sets read and download.

`open_small_set("flowers", root, split="val")` is a source of one published split. A set is looked for in `root` where
torchvision puts it (`root/flowers-102`), or at `root` itself. Nothing is fetched unless asked for, with
`download=True` or `KINFOLD_DOWNLOAD=1` in the environment.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinfold import distributed
from kinfold.data.annotated import voc
from kinfold.data.index import cache_root
from kinfold.data.named_sets import large
from kinfold.data.named_sets import small as layouts
from kinfold.data.named_sets.listed import ArrayImages, FileImages
from kinfold.data.splits import choose
from kinfold.errors import UserError

DOWNLOAD = "KINFOLD_DOWNLOAD"
_PLAIN, _WITH_VAL = ("train", "test"), ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class SmallSet:
    """One set, a few of which are not small: where it lies, how it is listed, where it comes from."""

    title: str
    torchvision: str | None
    """the class of `torchvision.datasets` that downloads it, where one does"""
    places: tuple[str, ...]
    """its folder below the root, most likely first"""
    marker: str
    """a file or folder that tells the set's folder from others"""
    source: str
    """what to fetch by hand"""
    splits: tuple[str, ...] = _PLAIN
    """the published splits; "val" only where it is one of them"""
    read: layouts.Reader | layouts.ArrayReader | None = None
    """None for VOC, which has its own reader"""


def open_small_set(
    name: str,
    root: str | Path | None = None,
    *,
    split: str = "train",
    download: bool = False,
    cache: Path | None = None,
) -> FileImages | ArrayImages | voc.VOCImages:
    """Open splits of a small set: "train", "val", "test" (those that it has), "trainval", or "all".

    `root` None is `torchvision` below the cache. VOC 2007 has several labels an image, so as a source it has none
    (`presence` in `kinfold.data.annotated.voc` gives them). Raises `UserError` where the set is unknown, not there, or
    damaged.
    """
    this = SETS[canonical(name)]
    base = find_small_set(name, root, download=download, cache=cache)
    if split == "trainval":
        chosen = [word for word in this.splits if word != "test"]
    else:
        chosen = choose(split, this.splits, where=f"{this.title} in {base}")
    description = f"{this.title}, split {split if len(chosen) > 1 else chosen[0]}, in {base}"
    if this.read is None:
        pairs = [pair for word in chosen for pair in voc.choose(str(base), word)]
        return voc.VOCImages(pairs, f"{len(pairs):,} images of {description}")
    try:
        parts: list[Any] = [this.read(base, word) for word in chosen]
    except (RuntimeError, OSError) as error:  # torchvision's word for a wrong checksum, and files that are missing
        raise UserError(f"{this.title} in {base} is not whole: {error}. {_fetch(this, base.parent)}") from error
    if isinstance(parts[0], layouts.Listed):
        for part in parts:
            if not part.entries:
                raise UserError(f"{part.file} names no image.")
            layouts.check_images(base, part)
        return FileImages(base, parts, description)
    return ArrayImages(parts, chosen, description)


def find_small_set(
    name: str, root: str | Path | None = None, *, download: bool = False, cache: Path | None = None
) -> Path:
    """Give a set's own folder, after fetching it where that was asked for. Raises `UserError` where it is not there."""
    name = canonical(name)
    place = cache_root(cache) / "torchvision" if root is None else Path(root).expanduser()
    base = locate(name, place)
    if base is None and (download or os.environ.get(DOWNLOAD, "").lower() in ("1", "true", "yes", "on")):
        _download(SETS[name], place)
        base = locate(name, place)
    if base is None:
        raise UserError(_missing(name, place))
    return base


def canonical(name: str) -> str:
    """Give a set's own name for any spelling of it, or for its torchvision class. Raises `UserError`."""
    word = name.lower().replace("-", "").replace("_", "")
    for key, this in SETS.items():
        if word in (key, (this.torchvision or key).lower()):
            return key
    raise UserError(f"There is no set {name!r}. There are: {', '.join(SETS)}.")


def locate(name: str, root: Path) -> Path | None:
    """Find a set's own folder in `root`, or at `root`; None where it is not there."""
    this = SETS[name]
    for base in (*(root / place for place in this.places), root):
        if (base / this.marker).exists():
            return base
    return None


def _missing(name: str, root: Path) -> str:
    this = SETS[name]
    found = f"holds {', '.join(sorted(os.listdir(root))[:6]) or 'nothing'}" if root.is_dir() else "does not exist"
    lacking = root / this.places[0] / this.marker
    return f"{this.title} is not in {root} (which {found}): there is no {lacking}. {_fetch(this, root)}"


def _fetch(this: SmallSet, root: Path) -> str:
    target = root / this.places[0]
    if this.torchvision == "StanfordCars":
        return (
            f"Its own download is gone, so kinfold cannot fetch it. Get a copy and lay it out as {target}/cars_train/, "
            f"cars_test/, devkit/cars_train_annos.mat, devkit/cars_meta.mat and cars_test_annos_withlabels.mat."
        )
    by_hand = f"Fetch {this.source}, and unpack it so that {target} comes to be"
    return f"{by_hand}." if this.torchvision is None else f"{by_hand}; or set {DOWNLOAD}=1 to have it fetched."


def _download(this: SmallSet, root: Path) -> None:
    """Fetch and unpack a set with torchvision, once for all processes. Raises `UserError` where that fails."""
    if this.torchvision in (None, "StanfordCars"):
        raise UserError(f"{this.title} cannot be fetched by kinfold. {_fetch(this, root)}")
    if distributed.is_main():
        from torchvision import datasets

        make = getattr(datasets, str(this.torchvision))
        wanted: list[dict[str, Any]] = [{}]
        if this.torchvision == "VOCDetection":
            wanted = [{"year": "2007", "image_set": "trainval"}, {"year": "2007", "image_set": "test"}]
        elif this.torchvision == "Places365":
            wanted = [{"split": "train-standard", "small": True}, {"split": "val", "small": True}]
        elif this.torchvision == "SVHN":
            wanted = [{"split": "train"}, {"split": "test"}]
        try:
            root.mkdir(parents=True, exist_ok=True)
            for words in wanted:
                make(root=str(root), download=True, **words)
        except Exception as error:  # the network, the disk, a checksum: torchvision raises them as they come
            raise UserError(f"{this.title} could not be fetched to {root}: {error}. {_fetch(this, root)}") from error
    distributed.wait_for_all()


_OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
_TORONTO = "https://www.cs.toronto.edu/~kriz"

SETS: dict[str, SmallSet] = {
    "food101": SmallSet(
        title="Food-101",
        torchvision="Food101",
        places=("food-101",),
        marker="meta/train.json",
        source="http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",
        read=layouts.food,
    ),
    "cifar10": SmallSet(
        title="CIFAR-10",
        torchvision="CIFAR10",
        places=("cifar-10-batches-py",),
        marker="data_batch_1",
        source=f"{_TORONTO}/cifar-10-python.tar.gz",
        read=layouts.cifar("CIFAR10"),
    ),
    "cifar100": SmallSet(
        title="CIFAR-100",
        torchvision="CIFAR100",
        places=("cifar-100-python",),
        marker="meta",
        source=f"{_TORONTO}/cifar-100-python.tar.gz",
        read=layouts.cifar("CIFAR100"),
    ),
    "sun397": SmallSet(
        title="SUN397",
        torchvision="SUN397",
        places=("SUN397",),
        marker="ClassName.txt",
        source="http://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz",
        read=layouts.sun,
    ),
    "cars": SmallSet(
        title="Stanford Cars",
        torchvision="StanfordCars",
        places=("stanford_cars",),
        marker="devkit/cars_train_annos.mat",
        source="a copy",
        read=layouts.cars,
    ),
    "aircraft": SmallSet(
        title="FGVC-Aircraft",
        torchvision="FGVCAircraft",
        places=("fgvc-aircraft-2013b",),
        marker="data/variants.txt",
        source=f"{_OXFORD}/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz",
        splits=_WITH_VAL,
        read=layouts.aircraft,
    ),
    "voc2007": SmallSet(
        title="VOC 2007",
        torchvision="VOCDetection",
        places=("VOCdevkit/VOC2007", "VOC2007"),
        marker="ImageSets/Main/trainval.txt",
        source="VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar of the PASCAL VOC 2007 challenge",
        splits=_WITH_VAL,
    ),
    "dtd": SmallSet(
        title="DTD",
        torchvision="DTD",
        places=("dtd/dtd", "dtd"),
        marker="labels/train1.txt",
        source=f"{_OXFORD}/dtd/download/dtd-r1.0.1.tar.gz",
        splits=_WITH_VAL,
        read=layouts.textures,
    ),
    "pets": SmallSet(
        title="Oxford-IIIT Pets",
        torchvision="OxfordIIITPet",
        places=("oxford-iiit-pet",),
        marker="annotations/trainval.txt",
        source=f"{_OXFORD}/pets/data/images.tar.gz and annotations.tar.gz beside it",
        read=layouts.pets,
    ),
    "caltech101": SmallSet(
        title="Caltech-101",
        torchvision="Caltech101",
        places=("caltech101", "caltech-101"),
        marker="101_ObjectCategories",
        source="https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip (101_ObjectCategories.tar.gz in it)",
        read=layouts.caltech,
    ),
    "flowers": SmallSet(
        title="Flowers-102",
        torchvision="Flowers102",
        places=("flowers-102",),
        marker="setid.mat",
        source=f"{_OXFORD}/flowers/102/ (102flowers.tgz, imagelabels.mat, setid.mat)",
        splits=_WITH_VAL,
        read=layouts.flowers,
    ),
    "stl10": SmallSet(
        title="STL-10",
        torchvision="STL10",
        places=("stl10_binary",),
        marker="train_X.bin",
        source="http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
        read=layouts.stl,
    ),
    "svhn": SmallSet(
        title="SVHN",
        torchvision="SVHN",
        places=("", "svhn"),
        marker="train_32x32.mat",
        source="train_32x32.mat and test_32x32.mat of http://ufldl.stanford.edu/housenumbers/",
        read=layouts.svhn,
    ),
    "places205": SmallSet(
        title="Places205",
        torchvision=None,
        places=("places205", "Places205"),
        marker="trainvalsplit_places205/train_places205.csv",
        source="imagesPlaces205_resize.tar.gz and trainvalsplit_places205.tar.gz of http://places.csail.mit.edu",
        splits=("train", "val"),
        read=large.places205,
    ),
    "places365": SmallSet(
        title="Places365",
        torchvision="Places365",
        places=("", "places365"),
        marker="categories_places365.txt",
        source="train_256_places365standard.tar, val_256.tar and filelist_places365-standard.tar of "
        "http://places2.csail.mit.edu",
        splits=("train", "val"),
        read=large.places365,
    ),
    "inaturalist2018": SmallSet(
        title="iNaturalist 2018",
        torchvision=None,
        places=("inaturalist2018", "inat2018"),
        marker="train2018.json",
        source="train_val2018.tar.gz, train2018.json.tar.gz and val2018.json.tar.gz of the iNaturalist 2018 challenge",
        splits=("train", "val"),
        read=large.inaturalist2018,
    ),
}
"""by the names that are used everywhere"""
