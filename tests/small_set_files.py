# SPDX-License-Identifier: Apache-2.0
"""Small sets with a handful of images each, written in the layouts of the real archives."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat


def jpeg(shade: int, side: int = 8) -> bytes:
    """A grey image, bright and of that shade."""
    file = io.BytesIO()
    Image.new("L", (side + 2, side), shade).save(file, "JPEG", quality=95)
    return file.getvalue()


def put(path: Path, shade: int = 128) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(shade))


def lines(path: Path, *words: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(words) + "\n")


def food101(root: Path) -> None:
    base = root / "food-101"
    for split, numbers in (("train", (1, 2, 3)), ("test", (4, 5))):
        names = {of: [f"{of}/{n}{i}" for n in numbers] for i, of in enumerate(("waffles", "apple_pie"))}
        (base / "meta").mkdir(parents=True, exist_ok=True)
        (base / "meta" / f"{split}.json").write_text(json.dumps(names))
        for of in names:
            for name in names[of]:
                put(base / "images" / f"{name}.jpg")


def sun397(root: Path) -> None:
    base = root / "SUN397"
    lines(base / "ClassName.txt", "/a/abbey", "/b/bar", "/b/barn", "/c/church/indoor")
    train = ["/a/abbey/sun_a.jpg", "/b/barn/sun_b.jpg", "/c/church/indoor/sun_c.jpg", "/b/bar/sun_d.jpg"]
    test = ["/b/barn/sun_e.jpg", "/a/abbey/sun_f.jpg"]
    lines(base / "Partitions" / "Training_01.txt", *train)
    lines(base / "Partitions" / "Testing_01.txt", *test)
    for name in train + test:
        put(base / name[1:])


def cars(root: Path) -> None:
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array(["AM General", "Acura RL"], object)})
    kind = [(name, object) for name in ("bbox_x1", "class", "fname")]
    for split, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = np.array([(1, 1 + n % 2, f"0000{n}.jpg") for n in range(1, 5)], dtype=kind)
        savemat(base / file, {"annotations": rows[None]})
        for n in range(1, 5):
            put(base / f"cars_{split}" / f"0000{n}.jpg")


def aircraft(root: Path) -> None:
    data = root / "fgvc-aircraft-2013b" / "data"
    lines(data / "variants.txt", "707-320", "Cessna 172", "DC-10")
    named = {"train": ["1 Cessna 172", "2 707-320", "3 DC-10"], "val": ["4 DC-10", "5 707-320"], "test": ["6 DC-10"]}
    for split, rows in named.items():
        lines(data / f"images_variant_{split}.txt", *rows)
    lines(data / "images_variant_trainval.txt", *named["train"], *named["val"])
    for n in range(1, 7):
        put(data / "images" / f"{n}.jpg")


def voc2007(root: Path) -> None:
    """Two classes have images; the other eighteen are nowhere. Cats are dark and dogs are bright."""
    base = root / "VOCdevkit" / "VOC2007"
    from kinfold.data.annotated.voc import CLASSES

    split_of = {"train": range(8), "val": range(8, 14), "test": range(14, 22)}
    shows = {n: ((n % 2 == 0), (n % 3 == 0)) for n in range(22)}  # cat, dog
    for split, numbers in {**split_of, "trainval": range(14)}.items():
        lines(base / "ImageSets" / "Main" / f"{split}.txt", *(f"{n:06d}" for n in numbers))
        for of in CLASSES:
            flags = [int(shows[n][("cat", "dog").index(of)]) if of in ("cat", "dog") else 0 for n in numbers]
            words = [f"{n:06d} {' 1' if flag else '-1'}" for n, flag in zip(numbers, flags)]
            if of == "bird" and split == "test":
                words[0] = words[0].replace("-1", " 0")  # a difficult one
            lines(base / "ImageSets" / "Main" / f"{of}_{split}.txt", *words)
    for n, (cat, dog) in shows.items():
        put(base / "JPEGImages" / f"{n:06d}.jpg", 120 - 90 * cat + 100 * dog + n % 5)


def dtd(root: Path) -> None:
    base = root / "dtd" / "dtd"
    for split, numbers in (("train", (1, 2)), ("val", (3,)), ("test", (4, 5))):
        names = [f"{of}/{of}_{n}.jpg" for n in numbers for of in ("dotted", "banded")]
        lines(base / "labels" / f"{split}1.txt", *names)
        for name in names:
            put(base / "images" / name)


def pets(root: Path) -> None:
    base = root / "oxford-iiit-pet"
    for split, numbers in (("trainval", (1, 2)), ("test", (3,))):
        rows = [
            f"{name}_{n} {label} 1 1" for n in numbers for label, name in enumerate(("Abyssinian", "great_dane"), 1)
        ]
        lines(base / "annotations" / f"{split}.txt", *rows)
        for row in rows:
            put(base / "images" / f"{row.split()[0]}.jpg")


def caltech101(root: Path) -> None:
    base = root / "caltech101" / "101_ObjectCategories"
    for of, count in (("yin_yang", 40), ("BACKGROUND_Google", 50), ("Faces", 35)):
        for n in range(1, count + 1):
            put(base / of / f"image_{n:04d}.jpg")
    (base / "BACKGROUND_Google" / "tmp").write_bytes(b"as in the archive")


def flowers(root: Path) -> None:
    base = root / "flowers-102"
    base.mkdir(parents=True)
    savemat(base / "imagelabels.mat", {"labels": np.array([[3, 1, 2, 3, 1, 2, 1]], np.uint8)})
    savemat(base / "setid.mat", {"trnid": [[2, 6, 1]], "valid": [[3, 4]], "tstid": [[5, 7]]})
    for n in range(1, 8):
        put(base / "jpg" / f"image_{n:05d}.jpg")


def _cifar(base: Path, names: dict[str, str], meta: tuple[str, str], label_key: str) -> None:
    base.mkdir(parents=True)
    random = np.random.RandomState(1)
    for file in names:
        entry = {"data": random.randint(0, 256, (6, 3072)).astype(np.uint8), label_key: [0, 1, 2, 0, 1, 2]}
        (base / file).write_bytes(pickle.dumps(entry))
    (base / meta[0]).write_bytes(pickle.dumps({meta[1]: ["cat", "dog", "frog"]}))


def cifar10(root: Path) -> None:
    files = {f"data_batch_{n}": "" for n in range(1, 6)} | {"test_batch": ""}
    _cifar(root / "cifar-10-batches-py", files, ("batches.meta", "label_names"), "labels")


def cifar100(root: Path) -> None:
    _cifar(root / "cifar-100-python", {"train": "", "test": ""}, ("meta", "fine_label_names"), "fine_labels")


def stl10(root: Path) -> None:
    base = root / "stl10_binary"
    base.mkdir(parents=True)
    random = np.random.RandomState(2)
    for split, count in (("train", 3), ("test", 2)):
        random.randint(0, 256, (count, 3, 96, 96)).astype(np.uint8).tofile(base / f"{split}_X.bin")
        np.arange(1, count + 1, dtype=np.uint8).tofile(base / f"{split}_y.bin")
    lines(base / "class_names.txt", *(f"class {n}" for n in range(10)))


def svhn(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(3)
    for split in ("train", "test"):
        images = random.randint(0, 256, (32, 32, 3, 4)).astype(np.uint8)
        savemat(root / f"{split}_32x32.mat", {"X": images, "y": np.array([[10], [1], [2], [10]], np.uint8)})


def places205(root: Path) -> None:
    base = root / "places205"
    for split, rows in (("train", ["a/abbey/x.jpg 0", "c/church/indoor/y.jpg 44"]), ("val", ["a/abbey/z.jpg 0"])):
        lines(base / "trainvalsplit_places205" / f"{split}_places205.csv", *rows)
        for row in rows:
            put(base / "data/vision/torralba/deeplearning/images256" / row.split()[0])


def places365(root: Path) -> None:
    lines(root / "categories_places365.txt", "/a/airfield 0", "/b/bar 1", "/c/church/indoor 2")
    lines(root / "places365_train_standard.txt", "/b/bar/1.jpg 1", "/c/church/indoor/2.jpg 2", "/a/airfield/3.jpg 0")
    lines(root / "places365_val.txt", "v1.jpg 2", "v2.jpg 0")
    for name in ("b/bar/1.jpg", "c/church/indoor/2.jpg", "a/airfield/3.jpg"):
        put(root / "data_256_standard" / name)
    for name in ("v1.jpg", "v2.jpg"):
        put(root / "val_256" / name)


def inaturalist2018(root: Path) -> None:
    base = root / "inaturalist2018"
    for split, numbers in (("train", (7, 3, 5)), ("val", (9, 11))):
        images = [{"id": n, "file_name": f"train_val2018/Aves/{n % 3}/{n}.jpg"} for n in numbers]
        found = {
            "images": images,
            "annotations": [{"id": 100 + n, "image_id": n, "category_id": n % 3} for n in sorted(numbers)],
            "categories": [{"id": n, "name": f"bird {n}", "supercategory": "Aves"} for n in range(3)],
        }
        base.mkdir(parents=True, exist_ok=True)
        (base / f"{split}2018.json").write_text(json.dumps(found))
        for image in images:
            put(base / str(image["file_name"]))


BUILDERS: dict[str, Callable[[Path], None]] = {
    build.__name__: build
    for build in (
        food101,
        cifar10,
        cifar100,
        sun397,
        cars,
        aircraft,
        voc2007,
        dtd,
        pets,
        caltech101,
        flowers,
        stl10,
        svhn,
        places205,
        places365,
        inaturalist2018,
    )
}
