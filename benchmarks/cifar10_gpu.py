# SPDX-License-Identifier: Apache-2.0
"""What does a CIFAR-10 recipe cost and reach on one GPU? Speed, memory, utilisation, k-NN and linear accuracy.

    python benchmarks/cifar10_gpu.py moco/cifar10-notebook-asymmetric --data CIFAR10
    python benchmarks/cifar10_gpu.py sce/cifar10 --data CIFAR10
    python benchmarks/cifar10_gpu.py sce/cifar10 --data CIFAR10 --name sce-512 batch_size=512
    python benchmarks/cifar10_gpu.py sce/cifar10 --data CIFAR10 --device cpu --quick

CIFAR10 is a folder of CIFAR-10 as Parquet or class folders with a train and a test split, or hf:OWNER/NAME. The recipe
runs for all its epochs in the folder `--out`. After `--minutes` a command stops with a checkpoint; the same command
goes on from there, through training, k-NN and linear classification, and writes `benchmarks/results/gpu-NAME.json` when
all is done (until then it ends with exit code 3). Seconds and images per second come from the run's log, which covers
every step once however often it was stopped. Utilisation is the FLOP of matrix products and convolutions a second over
the rate of bf16 products of 8192 x 8192 matrices measured on the same device.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from device_rate import flops_of_image, matmul_rate
from measured import write

from kinfold.data.sources import open_source
from kinfold.devices import choose_device
from kinfold.evaluate import FrozenBackbone, Stopped, evaluate
from kinfold.pretrain import pretrain
from kinfold.recipe import Recipe, Run, load
from kinfold.training import build_learner

UNFINISHED = 3
"""exit code where the same command has to be given again"""
QUICK = ["backbone.name=resnet10_w32", "epochs=2", "batch_size=64", "learning_rate.warmup_epochs=0"]


def untrained(recipe: Recipe, images: int) -> FrozenBackbone:
    """The encoder that the recipe starts from."""
    encoder = build_learner(recipe, images=images).encoder
    return FrozenBackbone(
        module=encoder.backbone,
        head=encoder.head,
        size=recipe.views.augment[0].size,
        channels=recipe.images.channels,
        mean=recipe.images.mean,
        std=recipe.images.std,
        description=f"{recipe.backbone.name}, untrained",
    )


class Clock:
    """The minutes of one command: says what is left, and stops a long part in time."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """Send this process SIGTERM when the time is over, which ends training and protocols with a checkpoint."""
        left = self.end - time.monotonic()
        if left <= 0:
            again("the minutes are over")
        timer = threading.Timer(left, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def again(where: str) -> None:
    """End this command: the next one goes on."""
    print(f"Stopped: {where}. Give the same command again to go on.", flush=True)
    sys.exit(UNFINISHED)


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` gives, from the file where it was made before."""
    if not path.exists():
        made = make()
        path.write_text(json.dumps(made), encoding="utf-8")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def training(recipe: Recipe, run: Run, place: Path, clock: Clock) -> dict[str, Any]:
    """Train to the end, or stop this command; the log's figures of the whole run."""
    device = choose_device(run.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with clock.stopping():
        done = pretrain(recipe, run, quiet=True)
    peaks = place / "peak-memory.jsonl"
    with peaks.open("a", encoding="utf-8") as file:
        file.write(f"{torch.cuda.max_memory_allocated(device) / 1e6 if device.type == 'cuda' else 0.0}\n")
    if done.step < done.steps:
        again(f"step {done.step} of {done.steps}")
    lines = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if "images_per_second" in line]
    seconds = [
        (line["step"] - before["step"]) * recipe.batch_size / line["images_per_second"]
        for before, line in zip([{"step": 0}, *lines], lines, strict=False)
    ]
    per_epoch = done.steps / recipe.epochs
    speed = statistics.median(line["images_per_second"] for line in lines[len(lines) // 2 :])
    peak = max(float(line) for line in peaks.read_text(encoding="utf-8").splitlines())
    return {
        "images_per_second": round(speed, 1),
        "seconds_per_epoch": round(per_epoch * recipe.batch_size / speed, 3),
        "seconds": round(sum(seconds), 1),
        "waiting_for_images": round(statistics.median(line["waiting"] for line in lines), 4),
        "peak_gpu_memory_mb": round(peak, 1) or None,
        "steps": done.steps,
    }


def accuracies(recipe: Recipe, run: Run, place: Path, clock: Clock, *, quick: bool) -> dict[str, Any]:
    """k-NN before and after and linear accuracy, in per cent; each is kept as soon as it is there."""

    def value(protocol: str, backbone: str | FrozenBackbone, how: str, key: str, name: str) -> dict[str, Any]:
        words = ["epochs=2"] if quick and protocol == "linear" else ["neighbours=[20]"] if quick else []
        out = place / name
        try:
            with clock.stopping():
                found = evaluate(
                    protocol,
                    backbone,
                    run.data,
                    recipe=how,
                    overrides=words,
                    out=out,
                    device=run.device,
                    limit=run.limit,
                )
        except Stopped:
            again(f"in {protocol}")
        return {"recipe": how, "percent": round(float(found["values"][key]), 2)}

    images = len(open_source(run.data, limit=run.limit))
    linear = "sce-cifar10" if recipe.method.name == "sce" else "moco-cifar10"
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "knn_untrained": lambda: value("knn", untrained(recipe, images), "moco-notebook", "best", "before"),
        "knn_trained": lambda: value("knn", run.out, "moco-notebook", "best", "after"),
        "linear": lambda: value("linear", run.out, linear, "last", "linear"),
    }
    return {name: kept(place / f"{name}.json", make)["percent"] for name, make in parts.items()} | {
        "knn_protocol": "weighted k-NN on the head's embeddings, k=200, temperature=0.1 (MoCo's CIFAR-10 notebook)",
        "linear_protocol": f"linear classification, recipe {linear}",
    }


def page(result: dict[str, Any]) -> dict[str, Any]:
    """What a reader should see: one row, for a table of several recipes."""
    memory = result["peak_gpu_memory_mb"]
    return {
        "title": "CIFAR-10 on one GPU",
        "text": [
            "ResNet-18 at 32 px, the whole recipe from end to end: views, encoders, loss, memory, optimiser, log. "
            "Utilisation is the FLOP a second of matrix products and convolutions over the device's own rate of bf16 "
            "products (8192 x 8192), measured in the same command. k-NN on the head's embeddings (k = 200, T = 0.1); "
            "linear as the method's authors do it. Seconds are those of all steps; imports, the start and evaluation "
            "are not in them."
        ],
        "table": {
            "columns": ["recipe", "batch", "epochs", "images/s", "s/epoch", "all epochs", "memory", "utilisation",
                        "k-NN", "linear"],
            "rows": [[
                f"`{result['recipe']}`", str(result["batch_size"]), str(result["epochs"]),
                f"{result['images_per_second']:,.0f}", f"{result['seconds_per_epoch']:.2f}",
                f"{result['seconds']:.0f} s", "" if memory is None else f"{memory / 1000:.1f} GB",
                f"{100 * result['utilisation']:.1f} %", f"{result['knn_trained']:.1f} %", f"{result['linear']:.1f} %",
            ]],
        },
        "summary": [{
            "question": f"`{result['recipe']}`, batch {result['batch_size']}, {result['epochs']} epochs on one GPU",
            "ours": f"{result['seconds']:.0f} s, {result['images_per_second']:,.0f} images/s",
            "alternative": f"the device's bf16 rate, {result['bf16_flops'] / 1e12:.0f} TFLOP/s",
            "ratio": f"{100 * result['utilisation']:.1f} % of it",
        }],
    }  # fmt: skip


def main() -> None:
    """Read the words; train, evaluate and measure as far as the minutes go; write when all is there."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("recipe")
    words.add_argument("--data", required=True)
    words.add_argument("--minutes", type=float, default=9.0, help="this command's time; the same command goes on")
    words.add_argument("--out", type=Path, help="folder of the run and of what is done; runs/gpu-NAME if not given")
    words.add_argument("--device", default="cuda")
    words.add_argument("--limit", type=int, help="use this many images of each split only")
    words.add_argument("--name", help="name of the result file, after gpu-")
    words.add_argument("--quick", action="store_true", help="a small network, few images, nothing written but --out")
    words.add_argument("settings", nargs="*", help="key=value, of the recipe or the run: compile=true epochs=400")
    given = words.parse_intermixed_args()
    clock = Clock(given.minutes)
    name = f"gpu-{given.name or given.recipe.replace('/', '-')}"
    place = given.out or Path("runs") / name
    place.mkdir(parents=True, exist_ok=True)
    wanted = {"data": given.data, "out": str(place / "run"), "device": given.device, "probe_every": 0}
    limit = given.limit or (512 if given.quick else None)
    settings = [*(QUICK if given.quick else []), "checkpoint_every=20", "log_every=20", *given.settings]
    recipe, run = load(given.recipe, settings, run={**wanted, **({"limit": limit} if limit else {})})
    trained = kept(place / "trained.json", lambda: training(recipe, run, place, clock))
    rates = kept(
        place / "rates.json",
        lambda: {
            "flop_per_image": flops_of_image(recipe),
            "bf16_flops": matmul_rate(choose_device(given.device)),
        },
    )
    reached = accuracies(recipe, run, place, clock, quick=given.quick)
    result = {
        "question": "speed, memory, utilisation and accuracy of a CIFAR-10 recipe on one GPU",
        "recipe": given.recipe,
        "settings": given.settings,
        "data": given.data.rstrip("/").split("/")[-1],
        "limit": limit,
        "device": given.device,
        "epochs": recipe.epochs,
        "epochs_of_recipe": load(given.recipe, run={"data": "-", "out": "-"})[0].epochs,
        "batch_size": recipe.batch_size,
        "precision": recipe.precision,
        **trained,
        **rates,
        "utilisation": trained["images_per_second"] * rates["flop_per_image"] / rates["bf16_flops"],
        **reached,
    }
    result["page"] = page(result)
    print(json.dumps(result, indent=2) if given.quick else write(name, result))


if __name__ == "__main__":
    main()
