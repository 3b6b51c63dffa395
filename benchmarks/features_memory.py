# SPDX-License-Identifier: Apache-2.0
"""How much memory do features of a large set take while they are made, and while classifiers learn from them?

    python benchmarks/features_memory.py --images 1281167

Makes 2048 features of each of so many synthetic images (8 x 8, no decoding: this is about memory, not speed) into the
cache, then trains linear classifiers on them and asks for nearest neighbours; each part in a process of its own, which
reports the largest amount of memory that was its own (RssAnon) beyond what it had after its imports. Pages of mapped
files are not counted: the system may drop them at any time. Writes `benchmarks/results/features-memory.json`. Needs
Linux, and room on the disk for all features: 10.5 GB for the images of ImageNet.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measured import write
from torch import nn

from kinfold.evaluate import FrozenBackbone
from kinfold.evaluate.knn import KNN, knn
from kinfold.evaluate.labelled import Labelled
from kinfold.evaluate.linear import Linear, linear

PARTS = {"extract": "making features", "linear": "linear classifier on them", "knn": "k-NN on them"}
WIDTH = 2048
BATCH = 256
CLASSES = 100
TEST = 2000


class Synthetic:
    """Images whose pixels are a function of their number, and ask for no memory."""

    classes: tuple[str, ...] | None = None

    def __init__(self, images: int, first: int = 0) -> None:
        self.images, self.first = images, first
        self.labels: Any = (np.arange(images, dtype=np.int64) + first) % CLASSES
        self.fingerprint = f"synthetic-{first}-{images}"
        self.description = f"{images:,} synthetic images of 8 x 8 pixels"
        self._noise = np.random.default_rng(0).integers(0, 256, 4096, dtype=np.uint8)

    def __len__(self) -> int:
        return self.images

    def read(self, i: int) -> Any:
        start = (i + self.first) * 61 % (4096 - 64)
        return self._noise[start : start + 64].reshape(8, 8, 1)

    def name(self, i: int) -> str:
        return f"number {i + self.first}"


def own_memory() -> int:
    """Bytes of memory that are this process's own."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Peak:
    """The largest `own_memory` while open, looked at a hundred times a second."""

    def __enter__(self) -> Peak:
        self.before = self.most = own_memory()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._began = time.perf_counter()
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.01):
            self.most = max(self.most, own_memory())

    def __exit__(self, *exception: object) -> None:
        self.seconds = time.perf_counter() - self._began
        self._ended.set()
        self._thread.join()


def measure(part: str, images: int, cache: Path) -> dict[str, Any]:
    """Do one part and say what it took."""
    with Peak() as peak:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH))
        backbone = FrozenBackbone(module=module, size=8, channels=1, mean=(0.5,), std=(0.25,))
        train, test = Synthetic(images), Synthetic(TEST, first=images)
        data = Labelled(train=train, test=test, batch_size=BATCH, cache=cache, say=lambda text: None)
        if part == "extract":
            data.features(backbone, module, train)
        elif part == "linear":
            linear(backbone, data, Linear(epochs=1, learning_rates=(1.0,), batch_size=BATCH))
        else:
            knn(backbone, data, KNN(neighbours=(20, 200)))
    return {"mb_own_at_most": round((peak.most - peak.before) / 1e6, 1), "seconds": round(peak.seconds, 1)}


def page(result: dict[str, Any]) -> dict[str, Any]:
    """What a reader should see."""
    found = result["parts"]
    most = max(found[part]["mb_own_at_most"] for part in PARTS)
    disk = f"{result['mb_of_the_features_on_disk'] / 1000:.1f} GB"
    rows = [
        [title, f"{found[part]['mb_own_at_most']:,.0f} MB", f"{found[part]['seconds']:.0f} s"]
        for part, title in PARTS.items()
    ]
    return {
        "title": "Memory of features",
        "text": [
            f"{result['images']:,} synthetic images, {result['features']:,} features each, {disk} on the disk: the "
            "memory of the process's own at most, beyond what it had after its imports. Pages of mapped files "
            "are not counted."
        ],
        "table": {"columns": ["part", "own memory", "time"], "rows": rows},
        "summary": [
            {
                "question": f"own memory while {result['images']:,} features are made and used",
                "ours": f"{most:,.0f} MB",
                "alternative": f"{disk} (all of them at once)",
                "ratio": f"{100 * most / result['mb_of_the_features_on_disk']:.1f} %",
            }
        ],
    }


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--images", type=int, default=100_000)
    words.add_argument("--place", type=Path, help="where the features go for the while; the system's temporary folder")
    words.add_argument("--quick", action="store_true", help="1,000 images; prints, and writes nothing")
    words.add_argument("--parts", choices=list(PARTS), nargs="+", help=argparse.SUPPRESS)
    asked = words.parse_args()
    if asked.parts:
        print(json.dumps({part: measure(part, asked.images, asked.place) for part in asked.parts}))
        return
    if asked.quick:
        asked.images = 1000
    parts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=asked.place) as place:
        # A new process is most of a quick run.
        for some in [list(PARTS)] if asked.quick else [[part] for part in PARTS]:
            command = [sys.executable, __file__, "--images", str(asked.images), "--place", place, "--parts", *some]
            parts |= json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            print({part: parts[part] for part in some}, flush=True)
        bytes_kept = sum(path.stat().st_size for path in Path(place).rglob("features.npy"))
    result = {
        "question": "MB of a process's own memory while features are made and used",
        "images": asked.images,
        "features": WIDTH,
        "mb_of_the_features_on_disk": round(bytes_kept / 1e6, 1),
        "mb_of_a_batch": round(BATCH * WIDTH * 4 / 1e6, 1),
        "parts": parts,
    }
    print(write("features-memory", {**result, "page": page(result)}, quick=asked.quick))


if __name__ == "__main__":
    main()
