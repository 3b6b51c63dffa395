# SPDX-License-Identifier: Apache-2.0
"""What does a CIFAR-10 recipe cost and reach on one GPU? Speed, memory, utilisation, k-NN and linear accuracy.

    python benchmarks/cifar10_gpu.py moco/cifar10-notebook-asymmetric --data CIFAR10
    python benchmarks/cifar10_gpu.py sce/cifar10 --data CIFAR10
    python benchmarks/cifar10_gpu.py sce/cifar10 --data CIFAR10 --name sce-512 batch_size=512
    python benchmarks/cifar10_gpu.py sce/cifar10 --data CIFAR10 --minutes 9
    python benchmarks/cifar10_gpu.py sce/cifar10 --data CIFAR10 --device cpu --quick

CIFAR10 is a folder of CIFAR-10 as Parquet (which needs `datasets`) or class folders (which do not), with a train and a
test split, or hf:OWNER/NAME. The recipe runs for all its epochs in the folder `--out`, then k-NN and linear
classification. With `--minutes` a command ends after so many with a checkpoint and exit code 3, and the same command
goes on from there, as after any other end. `benchmarks/results/gpu-NAME.json` has what was reached so far, "finished"
once it is all. Seconds and images per second come from the run's log, which covers every step once however often it was
stopped. Utilisation is the FLOP of matrix products and convolutions a second over the rate of bf16 products of
8192 x 8192 matrices measured on the same device.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from device_rate import flops_of_image, matmul_rate
from measured import write

from kinfold.data.sources import open_source
from kinfold.devices import choose_device
from kinfold.evaluate import FrozenBackbone, Stopped, evaluate
from kinfold.log import read_metrics
from kinfold.pretrain import pretrain
from kinfold.recipe import Recipe, Run, load
from kinfold.training import build_learner

UNFINISHED = 3
"""exit code where the same command has to be given again"""
PEAKS = "peak-memory.jsonl"
"""MB of the device that each command's training took at most"""
QUICK = ["backbone.name=resnet10_w32", "epochs=2", "batch_size=64", "learning_rate.warmup_epochs=0"]

Tell = Callable[[dict[str, Any]], None]


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
        """`minutes` may be infinite."""
        self.end = time.monotonic() + 60 * minutes

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """Send this process SIGTERM when the time is over, which ends training and protocols with a checkpoint."""
        left = self.end - time.monotonic()
        if left <= 0:
            again("the minutes are over")
        # While nothing listens that could go on later, a signal ends the command as the end of its minutes does.
        before = signal.signal(signal.SIGTERM, lambda *_: again("between two parts"))
        timer = threading.Timer(left, os.kill, (os.getpid(), signal.SIGTERM)) if math.isfinite(left) else None
        if timer is not None:
            timer.start()
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()
            signal.signal(signal.SIGTERM, before)


def again(where: str) -> NoReturn:
    """End this command: the next one goes on."""
    print(f"Stopped: {where}. Give the same command again to go on.", flush=True)
    sys.exit(UNFINISHED)


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` gives, from the file where it was made before."""
    if not path.exists():
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps(make()), encoding="utf-8")
        beside.replace(path)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def training(recipe: Recipe, run: Run, place: Path, clock: Clock, tell: Tell) -> dict[str, Any]:
    """Train to the end, or stop this command; the log's figures of the whole run. `tell` hears them either way."""
    device = choose_device(run.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with clock.stopping():
        done = pretrain(recipe, run, quiet=True)
    with (place / PEAKS).open("a", encoding="utf-8") as file:
        file.write(f"{torch.cuda.max_memory_allocated(device) / 1e6 if device.type == 'cuda' else 0.0}\n")
    found = figures(recipe, done.folder, place, steps=done.steps)
    if found:
        tell(found)
    if done.step < done.steps:
        again(f"step {done.step} of {done.steps}")
    return found


def figures(recipe: Recipe, folder: Path, place: Path, *, steps: int) -> dict[str, Any]:
    """What the log says so far; nothing before its first line."""
    lines = [line for line in read_metrics(folder) if "images_per_second" in line]
    if not lines:
        return {}
    seconds = [
        (line["step"] - before["step"]) * recipe.batch_size / line["images_per_second"]
        for before, line in zip([{"step": 0.0}, *lines], lines, strict=False)
    ]
    per_epoch = steps / recipe.epochs
    speed = statistics.median(line["images_per_second"] for line in lines[len(lines) // 2 :])
    peak = max(float(line) for line in (place / PEAKS).read_text(encoding="utf-8").splitlines())
    return {
        "images_per_second": round(speed, 1),
        "seconds_per_epoch": round(per_epoch * recipe.batch_size / speed, 3),
        "seconds": round(sum(seconds), 1),
        "waiting_for_images": round(statistics.median(line["waiting"] for line in lines), 4),
        "peak_gpu_memory_mb": round(peak, 1) or None,
        "epochs_done": round(lines[-1]["step"] / per_epoch, 2),
    }


def accuracies(recipe: Recipe, run: Run, place: Path, clock: Clock, tell: Tell, *, quick: bool) -> None:
    """k-NN before and after and linear accuracy, in per cent; each is kept, and told, as soon as it is there."""

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
    tell(
        {
            "knn_protocol": "weighted k-NN on the head's embeddings, k=200, temperature=0.1 (MoCo's CIFAR-10 notebook)",
            "linear_protocol": f"linear classification, recipe {linear}",
        }
    )
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "knn_trained": lambda: value("knn", run.out, "moco-notebook", "best", "after"),
        "knn_untrained": lambda: value("knn", untrained(recipe, images), "moco-notebook", "best", "before"),
        "linear": lambda: value("linear", run.out, linear, "last", "linear"),
    }
    for name, make in parts.items():
        tell({name: kept(place / f"{name}.json", make)["percent"]})


def page(result: dict[str, Any]) -> dict[str, Any]:
    """What a reader should see: one row, for a table of several recipes, as far as it was measured."""
    memory, all_, done = result["peak_gpu_memory_mb"], result["epochs"], result["epochs_done"]
    epochs = str(all_) if done >= all_ else f"{done:.0f} of {all_}"
    reached = [f"{result[name]:.1f} %" if name in result else "" for name in ("knn_untrained", "knn_trained", "linear")]
    return {
        "title": "CIFAR-10 on one GPU",
        "text": [
            "ResNet-18 at 32 px, the whole recipe from end to end: views, encoders, loss, memory, optimiser, log. "
            "Utilisation is the FLOP a second of matrix products and convolutions over the device's own rate of bf16 "
            "products (8192 x 8192), measured in the same command. k-NN on the head's embeddings (k = 200, T = 0.1), "
            "before and after training; linear as the method's authors do it. Seconds are those of all steps; "
            "imports, the start and evaluation are not in them.",
            *([result["note"]] if result.get("note") else []),
        ],
        "table": {
            "columns": ["recipe", "batch", "epochs", "images/s", "s/epoch", "all of them", "memory", "utilisation",
                        "k-NN before", "k-NN", "linear"],
            "rows": [[
                f"`{' '.join([result['recipe'], *result['settings']])}`", str(result["batch_size"]), epochs,
                f"{result['images_per_second']:,.0f}", f"{result['seconds_per_epoch']:.2f}",
                f"{result['seconds']:.0f} s", "" if memory is None else f"{memory / 1000:.1f} GB",
                f"{100 * result['utilisation']:.1f} %", *reached,
            ]],
        },
        "summary": [{
            "question": f"`{result['recipe']}`, batch {result['batch_size']}, {epochs} epochs on one GPU",
            "ours": f"{result['seconds']:.0f} s, {result['images_per_second']:,.0f} images/s",
            "alternative": f"the device's bf16 rate, {result['bf16_flops'] / 1e12:.0f} TFLOP/s",
            "ratio": f"{100 * result['utilisation']:.1f} %",
        }],
    }  # fmt: skip


def main() -> None:
    """Read the words; train, evaluate and measure as far as the minutes go; write what is there."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("recipe")
    words.add_argument("--data", required=True)
    words.add_argument(
        "--minutes", type=float, default=math.inf, help="this command's time, no end if not given; the same one goes on"
    )
    words.add_argument("--out", type=Path, help="folder of the run and of what is done; runs/gpu-NAME if not given")
    words.add_argument("--device", default="cuda")
    words.add_argument("--limit", type=int, help="use this many images of each split only")
    words.add_argument("--note", help="a sentence for the page, such as where the images are from")
    words.add_argument("--name", help="name of the result file, after gpu-")
    words.add_argument("--quick", action="store_true", help="a small network, few images, nothing written but --out")
    words.add_argument("settings", nargs="*", help="key=value, of the recipe or the run: compile=true epochs=400")
    given = words.parse_intermixed_args()
    clock = Clock(given.minutes)
    name = f"gpu-{given.name or given.recipe.replace('/', '-')}"
    thrown_away = tempfile.TemporaryDirectory() if given.quick and not given.out else None
    place = Path(thrown_away.name) if thrown_away else given.out or Path("runs") / name
    place.mkdir(parents=True, exist_ok=True)
    wanted = {"data": given.data, "out": str(place / "run"), "device": given.device, "probe_every": 0}
    limit = given.limit or (512 if given.quick else None)
    settings = [*(QUICK if given.quick else []), "checkpoint_every=20", "log_every=20", *given.settings]
    recipe, run = load(given.recipe, settings, run={**wanted, **({"limit": limit} if limit else {})})
    asked = {"recipe": given.recipe, "settings": settings, "data": given.data, "limit": limit, "device": given.device}
    if kept(place / "asked.json", lambda: asked) != asked:
        sys.exit(f"{place} has what another command measured: give --out another folder, or remove this one.")
    result: dict[str, Any] = {
        "question": "speed, memory, utilisation and accuracy of a CIFAR-10 recipe on one GPU",
        "recipe": given.recipe,
        "settings": given.settings,
        "data": given.data.rstrip("/").split("/")[-1],
        "limit": limit,
        "note": given.note,
        "device": given.device,
        "epochs": recipe.epochs,
        "epochs_of_recipe": load(given.recipe, run={"data": "-", "out": "-"})[0].epochs,
        "batch_size": recipe.batch_size,
        "precision": recipe.precision,
        "finished": False,
    }

    def tell(found: dict[str, Any]) -> None:
        result.update(found)
        result["utilisation"] = result["images_per_second"] * result["flop_per_image"] / result["bf16_flops"]
        result["page"] = page(result)
        if not given.quick:
            write(name, result)

    device = choose_device(given.device)
    result |= kept(
        place / "rates.json", lambda: {"flop_per_image": flops_of_image(recipe), "bf16_flops": matmul_rate(device)}
    )
    tell(kept(place / "trained.json", lambda: training(recipe, run, place, clock, tell)))
    accuracies(recipe, run, place, clock, tell, quick=given.quick)
    tell({"finished": True})
    print(write(name, result, quick=given.quick))


if __name__ == "__main__":
    main()
