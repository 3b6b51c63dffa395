# SPDX-License-Identifier: Apache-2.0
"""Does every protocol run from end to end on two cores, in under five minutes, and is its figure better than chance?

    kinfold pretrain DATA/cifar10 --recipe benchmarks/recipes/sce.yaml --out runs/sce-cifar limit=10000
    python benchmarks/evaluation.py --backbone runs/sce-cifar --data DATA
    python benchmarks/evaluation.py --backbone runs/sce-cifar --data DATA --only knn linear-cifar10

DATA is a folder with the sets `cifar10`, `tiny-imagenet-200-32px` and `imagenette-224-subset` (Parquet), and the
VOC-layout sets `bccd-voc/BCCD.tar` and `voc2012-mini200/VOC2012-mini200.tar`, which are unpacked for the while. Each
protocol is one call of the command with a small backbone and a short schedule: the settings are in the table below, and
no paper's. Chance is 100 / classes for accuracies, the mean of 200 random orders for average precision of images,
predicting background only for segmentation, and none for detection. Writes
`benchmarks/results/evaluation-PROTOCOL[-SET].json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measured import write

CIFAR, TINY, IMAGENETTE = "cifar10", "tiny-imagenet-200-32px", "imagenette-224-subset"
BCCD, VOC = "bccd-voc", "voc2012-mini200"


@dataclass(frozen=True)
class Trial:
    """One protocol on one set."""

    protocol: str
    data: str
    value: str
    """the figure that is compared with chance"""
    margin: float
    """times chance that it has to reach; for detection, percent"""
    words: tuple[str, ...] = ()
    """what the command is told besides"""
    name: str = ""

    @property
    def file(self) -> str:
        """Name of the result."""
        return f"evaluation-{self.name or self.protocol}"


TRIALS = (
    Trial("knn", CIFAR, "top1/k=200,T=0.1", 3.0, ("--limit", "10000")),
    Trial("linear", CIFAR, "last", 4.5, ("epochs=30", "learning_rates=[0.3,1.0,3.0,10.0]"), "linear-cifar10"),
    Trial(
        "linear",
        TINY,
        "last",
        5.0,
        ("--limit", "20000", "epochs=30", "learning_rates=[0.3,1.0,3.0,10.0]"),
        "linear-tiny-imagenet",
    ),
    Trial(
        "linear",
        CIFAR,
        "last/block=4",
        2.5,
        ("--recipe", "invp-imagenet", "--size", "32", "--limit", "10000", "epochs=10", "schedule.milestones=[5,7,9]"),
        "linear-blocks",
    ),
    Trial("semi-supervised", CIFAR, "top1", 4.0, ("backbone_rates=[0.03]", "epochs=20", "measure_every=20")),
    Trial(
        "fine-tune",
        IMAGENETTE,
        "top1",
        4.0,
        ("--size", "64", "--limit", "2000", "epochs=10", "batch_size=64", "backbone_rate=0.03", "measure_every=10"),
    ),
    Trial("transfer", IMAGENETTE, "mean", 4.0, ("--size", "64", "--limit", "2000", "decays=12")),
    Trial("voc-svm", VOC, "chosen", 1.2, ("--size", "96", "shots=[1,2,4]")),
    Trial(
        "voc-logistic",
        VOC,
        "mAP/last",
        1.2,
        ("--size", "96", "steps=150", "every=60", "batch_size=64"),
    ),
    Trial("detection", BCCD, "AP50", 20.0, ("--recipe", "bccd-two-cores")),
    Trial("segmentation", VOC, "mIoU", 1.05, ("--recipe", "voc-two-cores")),
    Trial("patches", VOC, "mIoU", 1.05, ("--recipe", "voc-two-cores")),
)


def unpacked(data: Path, name: str, place: Path) -> Path:
    """The folder of a VOC-layout set, out of its tar."""
    archive = next((data / name).glob("*.tar"))
    with tarfile.open(archive) as tar:
        tar.extractall(place / name, filter="data")
    return next(path.parent for path in sorted((place / name).rglob("JPEGImages")))


def chance(trial: Trial, result: dict[str, Any], folder: Path) -> float:
    """What the figure would be of a backbone that says nothing, in percent."""
    if trial.protocol in ("segmentation", "patches"):
        return float(result["values"]["background_only"])
    if trial.protocol == "detection":
        return 0.0
    if trial.protocol.startswith("voc-"):
        from kinfold.data.annotated import voc
        from kinfold.evaluate.average_precision import all_point, curve, step

        kit = voc.find_devkits(str(folder))[0]
        split = "test" if voc.has_list(kit, "test") else "val"
        present = voc.presence(kit, split, tuple(result["data"]["classes"]))  # [Q, C]
        order = np.random.default_rng(0)
        form = all_point if trial.protocol == "voc-svm" else step
        found = [
            form(curve(order.random(int((column != 0).sum())), column[column != 0] == 1))
            for column in present.T
            if (column == 1).any()
            for _ in range(200)
        ]
        return 100.0 * float(np.mean(found))
    return 0.5 if trial.data == TINY else 10.0


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--backbone", required=True)
    words.add_argument("--data", required=True, type=Path)
    words.add_argument("--only", nargs="*", help="results to make, by the ends of their names")
    asked = words.parse_args()
    with tempfile.TemporaryDirectory() as place:
        for trial in TRIALS:
            if asked.only and trial.file.removeprefix("evaluation-") not in asked.only:
                continue
            packed = trial.data in (BCCD, VOC)
            folder = unpacked(asked.data, trial.data, Path(place)) if packed else asked.data / trial.data
            out = Path(place) / f"{trial.file}.json"
            command = [sys.executable, "-m", "kinfold", "evaluate", trial.protocol, *trial.words]
            command += ["--backbone", asked.backbone, "--data", str(folder), "--out", str(out)]
            environment = {**os.environ, "KINFOLD_CACHE": f"{place}/cache"}
            began = time.monotonic()
            subprocess.run(command, check=True, env=environment)
            seconds = time.monotonic() - began
            result = json.loads(out.read_text(encoding="utf-8"))
            expected = chance(trial, result, folder)
            value = result["values"][trial.value]
            summary = {
                "question": "a protocol from end to end on two cores, beside chance",
                "protocol": trial.protocol,
                "set": trial.data,
                "evaluated_by": " ".join(["kinfold evaluate", trial.protocol, *trial.words]),
                "backbone": result["backbone"]["description"],
                "value": trial.value,
                "percent": round(value, 2),
                "chance_percent": round(expected, 2),
                "asked_percent": round(trial.margin * (expected or 1.0), 2),
                "seconds": round(seconds, 1),
                "values": {name: number and round(number, 2) for name, number in result["values"].items()},
                "notes": [note.replace(str(folder), trial.data).replace(place, "") for note in result["notes"]],
            }
            print(f"{trial.file}: {trial.value} {value:.1f}, chance {expected:.1f}, {seconds:.0f} s", flush=True)
            write(trial.file, summary)


if __name__ == "__main__":
    main()
