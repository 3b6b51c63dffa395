# SPDX-License-Identifier: Apache-2.0
"""How each of the small sets lies on the disk: its lists of images and labels, split by split.

The folders are those that the archives unpack to, and that torchvision's data sets read. A reader is given the set's
own folder and one of its splits, and says for every image where it was named, so that whatever is wrong with a list is
told with file and line. CIFAR, STL-10 and SVHN come as arrays; their files are read by torchvision.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kinfold.data.folder import EXTENSIONS, extension
from kinfold.errors import UserError

CALTECH_SHOTS = 30
"""draws for each class of Caltech-101"""


class Entry(NamedTuple):
    """One image of a list."""

    path: str
    """relative to the set's folder, with "/" """
    label: int
    place: int
    """line of the list, or number of the entry, from 1"""


class Listed(NamedTuple):
    """A split as it is listed."""

    file: Path
    """what lists it"""
    unit: str
    """what `Entry.place` counts: "line", "entry" """
    entries: list[Entry]
    classes: tuple[str, ...]


Arrays = tuple[NDArray[np.uint8], NDArray[np.int64], tuple[str, ...]]
"""images [N, H, W, C], labels [N], classes"""

Reader = Callable[[Path, str], Listed]
ArrayReader = Callable[[Path, str], Arrays]


def food(base: Path, split: str) -> Listed:
    """Food-101 (Bossard et al., ECCV 2014): `meta/train.json` lists each class's images."""
    file = base / "meta" / f"{split}.json"
    try:
        found = json.loads(read_text(file))
    except ValueError as error:
        raise UserError(f"{file} is no JSON: {error}. Unpack the archive again.") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} holds {type(found).__name__}; a mapping of classes to image names is expected.")
    classes = tuple(sorted(found))
    pairs = [(str(name), classes.index(of)) for of, names in found.items() for name in names]
    entries = [Entry(f"images/{name}.jpg", label, place) for place, (name, label) in enumerate(pairs, 1)]
    return Listed(file, "entry", entries, classes)


def sun(base: Path, split: str) -> Listed:
    """SUN397 (Xiao et al., CVPR 2010): the first of its ten published partitions, 50 images a class in each half.

    Differs: the authors' reader (ssl-transfer, datasets/sun397.py) takes the first class whose name is a part of the
    path, so that barn counts as bar; here the folder decides.
    """
    name = {"train": "Training_01.txt", "test": "Testing_01.txt"}[split]
    places = [base, base / "Partitions", base.parent / "Partitions"]
    file = next((place / name for place in places if (place / name).is_file()), None)
    if file is None:
        raise UserError(
            f"SUN397's archive comes without its split lists, and {base / name} is not there. Fetch Partitions.zip "
            f"(http://vision.princeton.edu/projects/2010/SUN/download/Partitions.zip) and unpack it into {base}."
        )
    classes = tuple(line.split("/", 2)[-1] for _, line in read_lines(base / "ClassName.txt"))
    label_of = {name: label for label, name in enumerate(classes)}
    entries = []
    for place, line in read_lines(file):
        path = line.lstrip("/")
        entries.append(Entry(path, _label(label_of, "/".join(path.split("/")[1:-1]), file, place), place))
    return Listed(file, "line", entries, classes)


def cars(base: Path, split: str) -> Listed:
    """Stanford Cars (Krause et al., 2013): annotations in MATLAB files."""
    file = base / ("devkit/cars_train_annos.mat" if split == "train" else "cars_test_annos_withlabels.mat")
    classes = tuple(str(name) for name in np.atleast_1d(_matlab(base / "devkit" / "cars_meta.mat", "class_names")))
    rows = np.atleast_1d(_matlab(file, "annotations"))
    if rows.dtype.names is None or not {"fname", "class"} <= set(rows.dtype.names):
        raise UserError(f"{file}: its annotations lack fname or class. (The test list with labels has them.)")
    entries = []
    for place, row in enumerate(rows, 1):
        label = int(row["class"]) - 1
        if not 0 <= label < len(classes):
            raise UserError(f"{file}, entry {place}: class {label + 1}; there are {len(classes)}.")
        entries.append(Entry(f"cars_{split}/{row['fname']}", label, place))
    return Listed(file, "entry", entries, classes)


def aircraft(base: Path, split: str) -> Listed:
    """FGVC-Aircraft (Maji et al., 2013): the 100 variants."""
    classes = tuple(line for _, line in read_lines(base / "data" / "variants.txt"))
    label_of = {name: label for label, name in enumerate(classes)}
    file = base / "data" / f"images_variant_{split}.txt"
    entries = []
    for place, line in read_lines(file):
        image, _, name = line.partition(" ")
        entries.append(Entry(f"data/images/{image}.jpg", _label(label_of, name, file, place), place))
    return Listed(file, "line", entries, classes)


def textures(base: Path, split: str) -> Listed:
    """DTD (Cimpoi et al., CVPR 2014): the first of its ten published partitions."""
    found = {word: read_lines(base / "labels" / f"{word}1.txt") for word in ("train", "val", "test")}
    classes = tuple(sorted({line.partition("/")[0] for lines in found.values() for _, line in lines}))
    label_of = {name: label for label, name in enumerate(classes)}
    entries = [Entry(f"images/{line}", label_of[line.partition("/")[0]], place) for place, line in found[split]]
    return Listed(base / "labels" / f"{split}1.txt", "line", entries, classes)


def pets(base: Path, split: str) -> Listed:
    """Oxford-IIIT Pets (Parkhi et al., CVPR 2012): 37 breeds."""
    file = base / "annotations" / ("trainval.txt" if split == "train" else "test.txt")
    entries, names = list[Entry](), dict[int, str]()
    for place, line in read_lines(file):
        words = line.split()
        if words[0].startswith("#"):
            continue
        if len(words) != 4 or not words[1].isdigit() or int(words[1]) < 1:
            raise UserError(f"{file}, line {place}: expected a name, class, species and breed, got {line!r}.")
        entries.append(Entry(f"images/{words[0]}.jpg", int(words[1]) - 1, place))
        names[int(words[1]) - 1] = words[0].rpartition("_")[0].replace("_", " ").title()
    return Listed(file, "line", entries, tuple(names.get(i, str(i + 1)) for i in range(max(names, default=0) + 1)))


def caltech(base: Path, split: str) -> Listed:
    """Caltech-101 (Fei-Fei et al., 2004), as ssl-transfer splits it: 102 classes, BACKGROUND_Google is one.

    Numpy's seed 0; each class in the order of its name gives 30 draws *with* replacement, so 20 to 30 images (2,416
    in all) are for training, and all others are for testing. Verified: this gives the published lists
    (`caltech101-splits`). torchvision's own class has no split, and leaves BACKGROUND_Google out.
    """
    folder = base / "101_ObjectCategories"
    classes = tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()))
    images = [
        sorted(name for name in os.listdir(folder / of) if extension(name) in EXTENSIONS and name[0] != ".")
        for of in classes
    ]
    for of, names in zip(classes, images):
        if not names:
            raise UserError(f"{folder / of} holds no image. Unpack the archive again, or remove the folder.")
    drawn = draw_caltech([len(names) for names in images])
    entries: list[Entry] = []
    for label, (of, names) in enumerate(zip(classes, images)):
        for place, name in enumerate(names):
            if (place in drawn[label]) == (split == "train"):
                entries.append(Entry(f"101_ObjectCategories/{of}/{name}", label, len(entries) + 1))
    return Listed(folder, "entry", entries, classes)


def draw_caltech(counts: Sequence[int]) -> list[set[int]]:
    """Draw each class's training images, as places from 0 among its `counts` images."""
    generator = np.random.RandomState(0)  # the authors' generator
    return [set(generator.choice(count, CALTECH_SHOTS).tolist()) for count in counts]


def flowers(base: Path, split: str) -> Listed:
    """Oxford Flowers-102 (Nilsback and Zisserman, 2008): numbered images, split and labels in MATLAB files."""
    from torchvision.datasets import Flowers102

    file = base / "setid.mat"
    numbers = np.atleast_1d(_matlab(file, {"train": "trnid", "val": "valid", "test": "tstid"}[split])).tolist()
    labels = np.atleast_1d(_matlab(base / "imagelabels.mat", "labels"))
    entries = []
    for place, number in enumerate(numbers, 1):
        if not 1 <= number <= len(labels):
            raise UserError(f"{file}, entry {place}: image {number}; imagelabels.mat has {len(labels):,} labels.")
        entries.append(Entry(f"jpg/image_{number:05d}.jpg", int(labels[number - 1]) - 1, place))
    count = int(labels.max())
    known = tuple(getattr(Flowers102, "classes", ()))
    return Listed(
        file, "entry", entries, known[:count] if len(known) >= count else tuple(map(str, range(1, count + 1)))
    )


def cifar(kind: str) -> ArrayReader:
    """CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): the reader of one of the two."""

    def read(base: Path, split: str) -> Arrays:
        from torchvision import datasets

        # Its files are pickles, which may run code: torchvision opens them only where their checksums are right.
        found = getattr(datasets, kind)(root=str(base.parent), train=split == "train")
        return np.ascontiguousarray(found.data), np.asarray(found.targets, np.int64), tuple(found.classes)

    return read


def stl(base: Path, split: str) -> Arrays:
    """STL-10 (Coates et al., 2011): 96 x 96 pixels, the labelled part."""
    from torchvision.datasets import STL10

    found = STL10(root=str(base.parent), split=split)
    labels = np.asarray(found.labels).astype(np.int64)
    images = np.ascontiguousarray(found.data.transpose(0, 2, 3, 1))  # [N, 96, 96, 3]
    return images, labels, tuple(getattr(found, "classes", map(str, range(10))))


def svhn(base: Path, split: str) -> Arrays:
    """SVHN (Netzer et al., 2011), cropped digits of 32 x 32 pixels."""
    from torchvision.datasets import SVHN

    found = SVHN(root=str(base), split=split)
    return (
        np.ascontiguousarray(found.data.transpose(0, 2, 3, 1)),  # [N, 32, 32, 3]
        np.asarray(found.labels, np.int64),
        tuple("0123456789"),
    )


def check_images(base: Path, listed: Listed) -> None:
    """See that every image is there, folder by folder. Raises `UserError` with the place that names a missing one."""
    there: dict[str, set[str]] = {}
    for entry in listed.entries:
        folder, _, name = entry.path.rpartition("/")
        if folder not in there:
            try:
                there[folder] = set(os.listdir(base / folder))
            except OSError:
                there[folder] = set()
        if name not in there[folder]:
            raise UserError(
                f"{listed.file}, {listed.unit} {entry.place}: there is no image {base / entry.path}. Unpack the "
                "archive again, or take the image out of the list."
            )


def _label(label_of: dict[str, int], name: str, file: Path, line: int) -> int:
    if name not in label_of:
        raise UserError(f"{file}, line {line}: {name!r} is none of the {len(label_of)} classes.")
    return label_of[name]


def read_text(file: Path) -> str:
    """Read a list. Raises `UserError` where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8-sig", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}. Unpack the archive again.") from error


def read_lines(file: Path) -> list[tuple[int, str]]:
    """Read the lines that hold anything, with their numbers from 1."""
    return [(number, line.strip()) for number, line in enumerate(read_text(file).splitlines(), 1) if line.strip()]


def _matlab(file: Path, variable: str) -> Any:
    """Read one variable of a MATLAB file."""
    from scipy.io import loadmat  # type: ignore[import-untyped]

    if not file.is_file():
        raise UserError(f"{file} is not there. Unpack the archive again.")
    try:
        found = loadmat(file, squeeze_me=True)
    except Exception as error:  # scipy raises whatever a damaged file makes it stumble over
        raise UserError(f"{file} cannot be read as a MATLAB file: {error}. Unpack the archive again.") from error
    if variable not in found:
        there = ", ".join(name for name in found if not name.startswith("__"))
        raise UserError(f"{file} has no {variable}; it has {there or 'nothing'}.")
    return found[variable]
