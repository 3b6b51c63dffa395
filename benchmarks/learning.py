# SPDX-License-Identifier: Apache-2.0
"""Does it learn? k-NN accuracy on CIFAR-10 before and after a pretraining that fits two cores and ten minutes.

    python benchmarks/learning.py sce --seeds 0 1 2 --data CIFAR10

Trains on 10,000 images (`--limit`) with `benchmarks/recipes/METHOD.yaml` and evaluates as the MoCo notebook does
(weighted k-NN, k = 200, τ = 0.1), but on backbone features of the same 10,000 against all 10,000 test images. Writes
`benchmarks/results/learning-METHOD.json`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import torch
from measured import ROOT, without_folder, write

from kinfold.data.sources import open_source
from kinfold.evaluate.features import extract
from kinfold.evaluate.knn import knn_scores
from kinfold.export import rebuild_backbone
from kinfold.pretrain import build_learner, pretrain
from kinfold.recipe import find_recipe, load

TEMPERATURE = 0.1


def knn(backbone: torch.nn.Module, recipe: Any, bank: Any, asked: Any, k: int) -> float:
    """Top-1 of weighted k-NN in per cent."""
    features = []
    for source in (bank, asked):
        found, positions = extract(
            backbone,
            source,
            size=recipe.views.augment[0].size,
            resize=None,
            channels=recipe.images.channels,
            mean=recipe.images.mean,
            std=recipe.images.std,
        )
        features.append((found, torch.from_numpy(source.labels[positions])))
    (keys, labels), (queries, truth) = features
    scores = knn_scores(queries, keys, labels, k=k, temperature=TEMPERATURE, classes=len(labels.unique()))
    return 100.0 * float((scores.argmax(1) == truth).double().mean())


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("method")
    words.add_argument("--data", required=True)
    words.add_argument("--seeds", type=int, nargs="+", default=[0])
    words.add_argument("--limit", type=int, default=10_000)
    words.add_argument("--recipe", help="a recipe's name or file, if not that of the method in benchmarks/recipes")
    words.add_argument("--k", type=int, default=200, help="neighbours of the k-NN")
    words.add_argument("--name", help="name of the result file")
    words.add_argument("settings", nargs="*", help="key=value")
    words = words.parse_intermixed_args()
    recipe_file = find_recipe(words.recipe or str(ROOT / "benchmarks" / "recipes" / f"{words.method}.yaml"))
    runs = []
    for seed in words.seeds:
        with tempfile.TemporaryDirectory() as folder:
            wanted = {"data": words.data, "out": f"{folder}/run", "limit": words.limit, "probe_every": 0}
            recipe, run = load(str(recipe_file), [f"seed={seed}", "checkpoint_every=1000", *words.settings], run=wanted)
            bank = open_source(words.data, limit=words.limit)
            asked = open_source(words.data, split="test")
            before = knn(build_learner(recipe, images=len(bank)).encoder.backbone, recipe, bank, asked, words.k)
            began = time.monotonic()
            done = pretrain(recipe, run)
            seconds = time.monotonic() - began
            if done.signal is not None:
                raise SystemExit(f"Stopped at step {done.step} of {done.steps}: nothing is written.")
            after = knn(rebuild_backbone(done.folder / "backbone.safetensors")[0], recipe, bank, asked, words.k)
            runs.append(
                {
                    "seed": seed,
                    "knn_untrained": round(before, 2),
                    "knn_trained": round(after, 2),
                    "gain": round(after - before, 2),
                    "seconds": round(seconds, 1),
                    "images_per_second": round(done.steps * recipe.batch_size / seconds, 1),
                    "epochs": recipe.epochs,
                }
            )
            print(runs[-1], flush=True)
    path = write(
        f"learning-{words.name or words.method}",
        {
            "question": "k-NN accuracy before and after pretraining on two cores",
            "recipe_file": recipe_file.name,
            "recipe": recipe_file.read_text(encoding="utf-8"),
            "settings": words.settings,
            "data": without_folder(bank.description, words.data),
            "protocol": f"weighted k-NN on backbone features, k={words.k}, temperature={TEMPERATURE}, all test images",
            "runs": runs,
        },
    )
    print(path)


if __name__ == "__main__":
    main()
