# SPDX-License-Identifier: Apache-2.0
"""How many images a second does one core prepare for two views, ours against torchvision with PIL and lightly?

    uv run --with-requirements benchmarks/alternatives.txt python benchmarks/loader_speed.py

Two MoCo v2 views of 224 pixels of each image, all contenders on the same files, in one process that is held to one
core, one thread, in turns. The files are JPEGs of 500 x 375 pixels and quality 90, generated as 1/f noise (about 120 kB
each), or those of `--data FOLDER`.

Our workers decode and cut, and the rest happens on the device for the whole batch; torchvision's and lightly's do all
of it. So there are two figures of ours: the workers' share alone, and with the device's share done on the same core.

Then a photo of 4000 x 3000 pixels for two views of 128: decoded in full, decoded at a fraction, and decoded in full
after `kinfold pack` has shrunk it with its defaults, which is timed apart. And the whole loader with two workers, in
which the main process does the device's share.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measured import in_turns, plain, ratio, times, write
from numpy.typing import NDArray
from photographs import photo
from PIL import Image, ImageFilter
from torchvision import transforms

from kinfold.data.cutting import Cutting
from kinfold.data.finish import finish
from kinfold.data.loader import Loader
from kinfold.data.pack import pack
from kinfold.data.sources import open_source
from kinfold.data.work import Task
from kinfold.views import Augmentation, Views, preset

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OURS, WHOLE, LIGHTLY = "ours, workers' share", "ours, all on one core", "lightly"
PIL, TORCHVISION = "torchvision with PIL's blur", "torchvision with its own blur"


class Files:
    """JPEGs in memory."""

    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] | None = None
    fingerprint = "-"
    description = "JPEGs in memory"

    def __init__(self, files: list[bytes], count: int | None = None) -> None:
        self.files, self.count = files, count or len(files)

    def __len__(self) -> int:
        return self.count

    def read(self, i: int) -> bytes:
        return self.files[i % len(self.files)]

    def name(self, i: int) -> str:
        return f"{i}.jpg"


def views(size: int) -> Views:
    return Views(augment=(preset("moco-v2", size=size),) * 2, pairs=((0, 1),))


class BlurOfPIL:
    """PIL's Gaussian blur with a standard deviation drawn anew, as MoCo's own loader has it."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def with_pil(size: int, blur: Callable[[Image.Image], Image.Image]) -> Callable[[Image.Image], object]:
    """Two views of MoCo v2 by torchvision's transforms of PIL images."""
    one = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([blur], p=0.5),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return lambda image: [one(image), one(image)]


def with_lightly(size: int) -> Callable[[Image.Image], object]:
    from lightly.transforms import MoCoV2Transform  # type: ignore[import-not-found]  # of alternatives.txt

    return MoCoV2Transform(input_size=size, normalize={"mean": list(MEAN), "std": list(STD)})  # type: ignore[no-any-return]


def one_core(files: list[bytes], rounds: int) -> dict[str, Any]:
    """Seconds an image of each contender, in turns."""
    cutting = Cutting(Files(files), views(224), 3, 0)
    task = Task(0, np.arange(len(files)))

    def whole() -> None:
        cut = cutting(task)
        finish(cut.crops, cut.drawn, MEAN, STD)

    def one_by_one(transform: Callable[[Image.Image], object]) -> Callable[[], None]:
        def all_() -> None:
            for file in files:
                transform(Image.open(io.BytesIO(file)).convert("RGB"))

        return all_

    contenders: dict[str, Callable[[], object]] = {
        OURS: lambda: cutting(task),
        WHOLE: whole,
        PIL: one_by_one(with_pil(224, BlurOfPIL())),
        TORCHVISION: one_by_one(with_pil(224, transforms.GaussianBlur(23, (0.1, 2.0)))),
        LIGHTLY: one_by_one(with_lightly(224)),
    }
    return in_turns(contenders, rounds=rounds, per=len(files))


LARGE = 8
"""times that the large photo is there"""


def packed(files: Files) -> tuple[Files, dict[str, Any]]:
    """The files as `kinfold pack` with its defaults leaves them, and what that took in this process."""
    with tempfile.TemporaryDirectory() as place:
        began = time.perf_counter()
        made = pack(files, f"{place}/packed", workers=0)
        seconds = time.perf_counter() - began
        source = open_source(f"{place}/packed", cache=Path(place, "cache"))
        read = [source.read(i) for i in range(len(source))]
    found = {"seconds_an_image": seconds / len(files), "short_side": made.settings["short_side"]}
    found |= {"bytes_before": made.bytes_before, "bytes_after": made.bytes_after}
    return Files([file for file in read if isinstance(file, bytes)]), found


def large(rounds: int, height: int, width: int) -> dict[str, Any]:
    """Seconds a photo of several megapixels for two views of 128 pixels: in full, at a fraction, packed."""
    files = Files([photo(0, height, width)], LARGE)
    packed(Files(files.files))  # what is imported the first time does not count
    shrunk, packing = packed(files)
    small = Views(augment=(preset("moco-v2", size=128), Augmentation(size=128)), pairs=((0, 1),))
    task = Task(0, np.arange(LARGE))
    work = {
        "at a fraction": Cutting(files, small, 3, 0, scaled=True),
        "in full": Cutting(files, small, 3, 0),
        "packed": Cutting(shrunk, small, 3, 0),
    }
    contenders = {name: partial(cutting, task) for name, cutting in work.items()}
    return {"large_photo": in_turns(contenders, rounds=rounds, per=LARGE), "packing": packing}


def delivered(files: list[bytes], batches: int) -> dict[str, float]:
    """Images a second that a loop gets from a loader with two workers, and the share of time that it waits."""
    settings = {"channels": 3, "mean": MEAN, "std": STD, "seed": 0, "workers": 2, "epochs": 3, "resident": False}
    loader = Loader(Files(files, 64 * batches), views(224), batch_size=64, **settings)  # type: ignore[arg-type]
    list(loader.epoch(0))
    loader.reset_waiting()
    began = time.perf_counter()
    images = sum(len(batch.index) for batch in loader.epoch(1))
    seconds = time.perf_counter() - began
    loader.close()
    return {"images_per_second": images / seconds, "waiting": loader.waiting / seconds}


def page(found: dict[str, Any]) -> dict[str, Any]:
    """What a reader should see."""
    count, kilobytes = found["images"], found["bytes"] / found["images"] / 1e3
    core, loop = found["one_core"], found["two_workers"]

    def row(name: str, does: str) -> list[str]:
        longer = "1" if name == OURS else times(ratio(core[OURS], core[name]))
        return [name, does, f"{1 / core[name]['median']:.0f}", longer]

    def summary_row(question: str, ours: str) -> dict[str, str]:
        rivals = {name: core[name] for name in (TORCHVISION, PIL, LIGHTLY)}
        return {
            "question": f"{question}, images/s on one core",
            "ours": f"{1 / core[ours]['median']:.0f}",
            "alternative": ", ".join(f"{1 / one['median']:.0f} ({name}, all of it)" for name, one in rivals.items()),
            "ratio": ", ".join(times(ratio(core[ours], one)) for one in rivals.values()),
        }

    return {
        "title": "Preparing two views of a JPEG on one core",
        "text": [
            f"Two MoCo v2 views of 224 pixels of {count} JPEGs ({kilobytes:.0f} kB each on average), one process on "
            "one core, one thread, in turns, the same files for all. PIL's blur is MoCo's own and lightly's, an "
            "approximation by boxes that is faster than a Gaussian one; torchvision's is 23 pixels wide, a tenth of "
            "the view. Ours is Gaussian, 13 pixels wide.",
            "The first figure is not the whole work: our workers decode and cut the crops, and colour, grey, blur, "
            "flip and normalisation are left to the device, a whole batch at a time. The second row does those too, "
            "on the same core, which is what a machine without a GPU does. Torchvision and lightly do all of it in a "
            "worker. The last column says how many times as long as our workers each took for an image.",
            text_of_large(found),
            "The whole loader with two workers, the main process doing the device's share on the same cores, delivers "
            f"{loop['images_per_second']:.0f} images a second; {loop['waiting']:.0%} of the time is spent waiting.",
        ],
        "table": {
            "columns": ["who", "does", "images a second and core", "time, ours = 1"],
            "rows": [
                row(OURS, "decode, two crops, uint8"),
                row(WHOLE, "all, float32 normalised"),
                row(PIL, "all, float32 normalised"),
                row(TORCHVISION, "all, float32 normalised"),
                row(LIGHTLY, "all, float32 normalised"),
            ],
        },
        "summary": [
            summary_row("the workers' share: decode and cut two views of a 500 x 375 JPEG", OURS),
            summary_row("all of two views of a 500 x 375 JPEG, the device's share on the same core", WHOLE),
            *summary_of_large(found),
        ],
    }


def text_of_large(found: dict[str, Any]) -> str:
    """The paragraph on the large photo."""
    big = found["large_photo"]
    ms = {name: plain(1e3 * one["median"]) for name, one in big.items()}
    text = (
        f"A large JPEG ({' x '.join(map(str, found['large_photo_size']))} pixels) for two views of 128 pixels takes "
        f"{ms['in full']} ms in full and {ms['at a fraction']} ms with images.scaled_decode=true"
    )
    if "packed" not in big:
        return f"{text}."
    once, packed_ = found["packing"], big["packed"]
    return (
        f"{text}. Packed, with a short side of {once['short_side']} pixels, and then decoded in full it takes "
        f"{ms['packed']} ms: the other two take {times(ratio(packed_, big['in full']))} and "
        f"{times(ratio(packed_, big['at a fraction']))} as long. Packing took "
        f"{plain(1e3 * once['seconds_an_image'])} ms a photo, once, and made {plain(once['bytes_before'] / 1e6)} MB "
        f"into {plain(once['bytes_after'] / 1e6)} MB. All of it is Kinfold, with files in memory; the three took turns."
    )


def summary_of_large(found: dict[str, Any]) -> list[dict[str, str]]:
    """The row on the large photo; nothing where packing was not measured."""
    ms = {name: plain(1e3 * one["median"]) for name, one in found["large_photo"].items()}
    if "packed" not in ms:
        return []
    size = " x ".join(map(str, found["large_photo_size"]))
    return [
        {
            "question": f"two views of 128 px of a JPEG of {size}: decoding and cutting on one core",
            "ours": f"{ms['packed']} ms (packed once)",
            "alternative": f"{ms['at a fraction']} ms (at a fraction), {ms['in full']} ms (in full)",
            "ratio": "",  # ours beside ours
        }
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="a folder of JPEGs; generated ones if not given")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a few small images; prints, and writes nothing")
    given = parser.parse_args()
    count, rounds = (4, 1) if given.quick else (given.images, given.rounds)
    if given.data is not None:
        paths = sorted(path for path in given.data.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
        files = [path.read_bytes() for path in paths[:count]]
    else:
        files = [photo(seed, 375, 500) for seed in range(count)]
    torch.set_num_threads(1)
    cores = os.sched_getaffinity(0)
    found: dict[str, Any] = {
        "question": "How many images a second does one core prepare for two MoCo v2 views at 224 pixels?",
        "images": len(files),
        "bytes": sum(len(file) for file in files),
        "generated": given.data is None,
    }
    os.sched_setaffinity(0, {min(cores)})
    found["one_core"] = one_core(files, rounds)
    height, width = (600, 800) if given.quick else (3000, 4000)
    found["large_photo_size"] = [width, height]
    found |= large(rounds, height, width)
    os.sched_setaffinity(0, cores)
    found["two_workers"] = delivered(files, 2 if given.quick else 12)
    found["page"] = page(found)
    for line in found["page"]["table"]["rows"]:
        print(" | ".join(line))
    print(*found["page"]["text"][2:], sep="\n")
    print(write("loader-speed", found, alternatives=("lightly",), quick=given.quick))


if __name__ == "__main__":
    main()
