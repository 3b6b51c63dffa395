# SPDX-License-Identifier: Apache-2.0
"""What does it bring that a small set lives on the device: start-up, and two views of a whole batch at once?

    python benchmarks/resident.py --data CIFAR10
    python benchmarks/resident.py --data CIFAR10 --device cuda

Start-up: seconds from the name of the data to the first batch, within a process that has imported everything; the first
time (the table is unpacked, all images are decoded and kept), the second time, and with nothing kept but the unpacked
table. Each round does the three in this order with a cache of its own.

Views: seconds an image for MoCo v2's two views of 32 pixels, our resident set against torch's DataLoader over
torchvision's transforms, image by image on PIL images as the papers' code does it, with 0 and 2 workers that stay
alive. Both start from decoded images in memory and end with normalised float32 batches; the contenders take turns. Ours
is also taken apart: the numbers (drawn on the host) and the crops, timed alone.

Without `--data` the images are generated (smooth noise as JPEG in Parquet). Writes `benchmarks/results/resident.json`
(`resident-cuda.json`).
"""

from __future__ import annotations

import argparse
import io
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measured import counted, in_turns, plain, suffix, summary, synchronise, times, without_folder, write
from PIL import Image, ImageFilter
from torchvision import transforms

from kinfold.data.augment import draw
from kinfold.data.exact_crop import crop_levels
from kinfold.data.loader import Loader
from kinfold.data.resident import Asked, open_resident
from kinfold.data.shards import ParquetShard
from kinfold.data.sources import Source, open_source
from kinfold.views import Views, preset

SIZE, BATCH = 32, 256
QUICK = 3000
"""images of a quick run: enough that the decoded ones are kept on disk"""
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
LOOK = preset("moco-v2", size=SIZE)
VIEWS = Views(augment=(LOOK, LOOK), pairs=((0, 1),))


def generate(place: Path, count: int) -> Path:
    """A Parquet file of `count` smooth images."""
    shard = ParquetShard(place / "train.parquet", labelled=False, classes=None)
    for number in range(count):
        coarse = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
        shard.add(f"{number:08d}.jpg", file.getvalue(), None)
    shard.close()
    return place / "train.parquet"


def loader(source: Source, device: str, **words: Any) -> Loader:
    """Our loader over a resident set."""
    given = {"channels": 3, "mean": MEAN, "std": STD, "batch_size": BATCH, "seed": 0, "device": device, **words}
    return Loader(source, VIEWS, resident=True, **given)


def start_up(data: str, workers: int, device: str, rounds: int) -> dict[str, Any]:
    """Seconds from the name of the data to the first batch, by what the caches hold."""
    seconds: dict[str, list[float]] = {"second time": [], "first time": [], "no decoded images kept": []}

    def once() -> float:
        began = time.perf_counter()
        next(loader(open_source(data), device, workers=workers).epoch(0))
        synchronise(device)
        return time.perf_counter() - began

    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            os.environ["KINFOLD_CACHE"] = cache
            seconds["first time"].append(once())
            seconds["second time"].append(once())
            os.environ["KINFOLD_PIXELS_GB"] = "0"
            for kept in (Path(cache) / "pixels").glob("*/*"):
                kept.unlink()
            seconds["no decoded images kept"].append(once())
            del os.environ["KINFOLD_PIXELS_GB"], os.environ["KINFOLD_CACHE"]
    return alone(summary(seconds))


def alone(found: dict[str, Any]) -> dict[str, Any]:
    """Seconds that are parts of one thing and no contenders: without their ratios."""
    return {name: {key: one[key] for key in ("median", "least", "greatest", "all")} for name, one in found.items()}


class Blur:
    """Gaussian blur as in the papers' code."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*LOOK.blur_sigma)))


def pipeline() -> transforms.Compose:
    """MoCo v2's augmentation out of torchvision's parts, for PIL images."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, scale=LOOK.scale, ratio=LOOK.ratio),
            transforms.RandomApply([transforms.ColorJitter(*LOOK.jitter)], p=LOOK.jitter_probability),
            transforms.RandomGrayscale(p=LOOK.grey),
            transforms.RandomApply([Blur()], p=LOOK.blur),
            transforms.RandomHorizontalFlip(LOOK.flip),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


class TwoViews(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Decoded images [N, H, W, C], each given as two views."""

    def __init__(self, images: np.ndarray, count: int) -> None:
        self.images, self.count, self.change = images, count, pipeline()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = Image.fromarray(self.images[i % len(self.images)])
        return self.change(image), self.change(image)


def theirs(images: np.ndarray, count: int, workers: int) -> torch.utils.data.DataLoader[Any]:
    """Torch's loader; its workers stay alive between epochs."""
    return torch.utils.data.DataLoader(
        TwoViews(images, count),
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def views(source: Source, device: str, count: int, rounds: int) -> dict[str, Any]:
    """Seconds an image for two views, ours and torchvision's; and the parts of ours."""
    resident = open_resident(Asked(source=source, channels=3, device=torch.device(device), wanted=True))
    assert resident is not None
    images = np.ascontiguousarray(resident.images.cpu().permute(0, 2, 3, 1).numpy())  # [N, H, W, C]
    own, batches = loader(source, device), count // BATCH

    def endless() -> Iterator[Any]:
        epoch = 0
        while True:
            yield from own.epoch(epoch)
            epoch += 1

    stream = endless()

    def ours() -> None:
        for _ in range(batches):
            next(stream)
        synchronise(device)

    def image_by_image(workers: int) -> Any:
        found = theirs(images, batches * BATCH, workers)

        def run() -> None:
            for pair in found:
                for view in pair:
                    view.to(device)
            synchronise(device)

        return run

    contenders = {
        "resident": ours,
        "torchvision, 0 workers": image_by_image(0),
        "torchvision, 2 workers": image_by_image(2),
    }
    found = in_turns(contenders, rounds=rounds, per=batches * BATCH)
    chosen = np.random.default_rng(0).integers(0, len(source), BATCH)
    where, side = torch.from_numpy(chosen).to(device), np.full(BATCH, SIZE)

    def numbers() -> list[Any]:
        words: dict[str, Any] = {"seed": 0, "epoch": 0, "image": chosen, "height": side, "width": side}
        return [draw(LOOK, view=view, **words) for view in range(2)]

    drawn = numbers()

    def crops() -> None:
        for one in drawn:
            crop_levels(resident.images, where, one.box, SIZE)
        synchronise(device)

    def repeat(part: Any) -> Any:
        return lambda: [part() for _ in range(batches)]

    parts = in_turns({"crops": repeat(crops), "numbers": repeat(numbers)}, rounds=rounds, per=batches * BATCH)
    return {"seconds_an_image": found, "parts_of_ours": alone(parts)}


def page(result: dict[str, Any]) -> dict[str, Any]:
    """What a reader should see."""
    start, made = result["start_up_seconds"], result["views"]["seconds_an_image"]
    parts, device = result["views"]["parts_of_ours"], result["device"]
    whole = made["resident"]["median"]
    best = min((name for name in made if name != "resident"), key=lambda name: made[name]["median"])
    rows = [
        [f"start-up, {name}", f"{start[name]['median']:.2f} s", ""]
        for name in ("first time", "second time", "no decoded images kept")
    ]
    for name, one in made.items():
        ratio = times(one["times_ours"]) if "times_ours" in one else "1"
        rows.append([f"two views, {name}", f"{1 / one['median']:,.0f} images/s", ratio])
    return {
        "title": f"Small sets live on the device: {device}",
        "text": [
            f"{result['images']:,} images of {SIZE} x {SIZE} pixels. Start-up is the time from the name of the data to "
            f"the first batch on the device ({device}), imports not counted. The first time the table is unpacked, the "
            f"images are decoded by {result['workers']} processes and kept on disk; from then on they are read from "
            "there. Each round did the three one after the other, in this order and in one process, with a new cache; "
            "what was just written the system still has in memory.",
            f"Two views of MoCo v2 at {SIZE} px in batches of {result['batch']}, on {device} with "
            f"{counted(result['threads'], 'thread')}: the resident set cuts and changes a whole batch at once; "
            "torch's DataLoader runs torchvision's transforms on PIL images one by one"
            f"{'' if device == 'cpu' else ', on the CPU, and the views are copied to the device'}. They took turns. "
            "Both start from decoded images in memory and end with normalised float32 batches, the random numbers "
            "drawn anew; no network is run. Of our time, "
            f"{parts['crops']['median'] / whole:.0%} are the crops and {parts['numbers']['median'] / whole:.1%} "
            "drawing the random numbers on the host "
            f"({plain(1e3 * result['batch'] * parts['numbers']['median'])} ms for both views of a batch); these two "
            "were timed apart from the whole.",
        ],
        "table": {"columns": ["what", f"median, {device}", "times ours"], "rows": rows},
        "summary": [
            {
                "question": f"start-up with {result['images']:,} images of {SIZE} px on {device}, again and for the "
                "first time",
                "ours": f"{start['second time']['median']:.2f} s and {start['first time']['median']:.2f} s",
                "alternative": f"{start['no decoded images kept']['median']:.2f} s (again, without what is kept)",
                "ratio": "",  # ours beside ours
            },
            {
                "question": f"two views at {SIZE} px of images that lie decoded in memory, on {device}, images/s",
                "ours": f"{1 / whole:,.0f}",
                "alternative": f"{1 / made[best]['median']:,.0f} ({best})",
                "ratio": times(made[best]["times_ours"]),
            },
        ],
    }


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--data", help="images of 32 pixels, for example CIFAR-10 as Parquet")
    words.add_argument("--images", type=int, default=50_000, help="how many are generated without --data")
    words.add_argument("--device", default="cpu")
    words.add_argument("--workers", type=int, default=2, help="processes that decode at the first start")
    words.add_argument("--rounds", type=int, default=5)
    words.add_argument("--quick", action="store_true", help="few images, one round; prints, and writes nothing")
    asked = words.parse_args()
    images, rounds, count = (QUICK, 1, 2 * BATCH) if asked.quick else (asked.images, asked.rounds, 10 * BATCH)
    with tempfile.TemporaryDirectory() as place:
        data = asked.data or str(generate(Path(place), images))
        start = start_up(data, asked.workers, asked.device, rounds)
        os.environ["KINFOLD_CACHE"] = place
        source = open_source(data)
        result: dict[str, Any] = {
            "question": "seconds to start on a small set, and seconds an image for two views, resident and one by one",
            "data": without_folder(source.description, data),
            "images": len(source),
            "batch": BATCH,
            "size": SIZE,
            "device": asked.device,
            "workers": asked.workers,
            "threads": torch.get_num_threads(),
            "start_up_seconds": start,
            "views": views(source, asked.device, count, rounds),
        }
    result["page"] = page(result)
    for row in result["page"]["table"]["rows"]:
        print(*row, sep=" | ")
    print(*result["page"]["text"], sep="\n")
    print(write(f"resident{suffix(asked.device)}", result, quick=asked.quick))


if __name__ == "__main__":
    main()
