# SPDX-License-Identifier: Apache-2.0
"""What does a CIFAR-10 recipe reach on one GPU in a given time? Images per second, and the k-NN of MoCo's notebook.

    python benchmarks/cifar10_gpu.py moco/cifar10-notebook-asymmetric --data DATA --minutes 8
    python benchmarks/cifar10_gpu.py sce/cifar10 --data DATA --minutes 8

DATA is a folder of CIFAR-10 as Parquet or class folders with a train and a test split, or hf:OWNER/NAME. A short pilot
measures the speed; then the recipe runs once for as many epochs as fit, its schedule made for that number, and at most
as many as it asks for. k-NN (k = 200, T = 0.1, embeddings of the head, all training images against all test images) is
measured before and after. Writes `benchmarks/results/gpu-NAME.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measured import write

from kinfold.evaluate import FrozenBackbone, evaluate
from kinfold.pretrain import Outcome, pretrain
from kinfold.recipe import Recipe, load
from kinfold.training import build_learner

PILOT_EPOCHS = 2
RESERVE = 0.85
"""share of the time that the epochs may take: the rest is for starting, compiling and k-NN"""


def notebook_knn(backbone: str | FrozenBackbone, data: str, folder: Path, device: str, limit: int | None) -> float:
    """Top-1 of the notebook's k-NN, in per cent."""
    result = evaluate("knn", backbone, data, recipe="moco-notebook", out=folder, device=device, limit=limit)
    return float(result["values"]["best"])  # one k and one T, so the best is the only one


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


def steady_speed(folder: Path) -> float:
    """Images per second in the second half of a run's log, where nothing is being started any more."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    speeds = [line["images_per_second"] for line in lines if "images_per_second" in line]
    late = speeds[len(speeds) // 2 :]
    return len(late) / sum(1 / speed for speed in late)


def train(words: list[str], given: argparse.Namespace, out: Path) -> tuple[Recipe, Outcome]:
    """Run the recipe that was asked for, changed by `words`, into `out`."""
    wanted: dict[str, Any] = {"data": given.data, "out": str(out), "device": given.device, "probe_every": 0}
    if given.limit is not None:
        wanted["limit"] = given.limit
    recipe, run = load(given.recipe, ["checkpoint_every=1000", "log_every=20", *given.settings, *words], run=wanted)
    done = pretrain(recipe, run, quiet=True)
    if done.signal is not None:
        raise SystemExit(f"Stopped at step {done.step} of {done.steps}: nothing is written.")
    return recipe, done


def main() -> None:
    """Read the words, measure the speed, train, measure k-NN, write."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("recipe")
    words.add_argument("--data", required=True)
    words.add_argument("--minutes", type=float, default=8.0)
    words.add_argument("--device", default="cuda")
    words.add_argument("--limit", type=int, help="use this many images of each split only")
    words.add_argument("--name", help="name of the result file, after gpu-")
    words.add_argument("settings", nargs="*", help="key=value, of the recipe or the run: compile=true epochs=400")
    given = words.parse_intermixed_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        _, pilot = train([f"epochs={PILOT_EPOCHS}"], given, place / "pilot")
        per_epoch = pilot.steps // PILOT_EPOCHS
        asked, _ = load(given.recipe, given.settings, run={"data": given.data, "out": "-"})
        pilot_speed = steady_speed(pilot.folder)
        left = 60 * given.minutes - (time.monotonic() - began)
        fits = math.floor(RESERVE * left * pilot_speed / (per_epoch * asked.batch_size))
        epochs = max(1, min(asked.epochs, fits))
        print(
            f"{pilot_speed:.0f} images/s: {epochs} of {asked.epochs} epochs fit {given.minutes:g} minutes", flush=True
        )
        images = per_epoch * asked.batch_size
        before = notebook_knn(untrained(asked, images), given.data, place / "before", given.device, given.limit)
        start = time.monotonic()
        recipe, done = train([f"epochs={epochs}"], given, place / "run")
        seconds = time.monotonic() - start
        after = notebook_knn(str(done.folder), given.data, place / "after", given.device, given.limit)
        memory = torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else None
        path = write(
            f"gpu-{given.name or given.recipe.replace('/', '-')}",
            {
                "question": "what a CIFAR-10 recipe reaches on one GPU in a given time",
                "recipe": given.recipe,
                "settings": given.settings,
                "data": given.data.rstrip("/").split("/")[-1],
                "limit": given.limit,
                "minutes": given.minutes,
                "epochs": epochs,
                "epochs_of_recipe": asked.epochs,
                "images_per_second": round(steady_speed(done.folder), 1),
                "seconds": round(seconds, 1),
                "peak_gpu_memory_mb": None if memory is None else round(memory, 1),
                "protocol": "weighted k-NN on the head's embeddings, k=200, temperature=0.1 (MoCo's CIFAR-10 notebook)",
                "knn_untrained": round(before, 2),
                "knn_trained": round(after, 2),
                "batch_size": recipe.batch_size,
                "precision": recipe.precision,
            },
        )
    print(path)


if __name__ == "__main__":
    main()
