# SPDX-License-Identifier: Apache-2.0
"""How long does `kinfold demo` take, and what does it learn? One run in a fresh folder, in a process of its own.

    python benchmarks/demo_time.py

The time is that of the whole command: start of Python, training, evaluation, embeddings and picture. k-NN, before and
after, is what the run itself wrote to its metrics. Writes `benchmarks/results/demo.json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measured import write


def accuracies(folder: Path) -> tuple[float, float]:
    """k-NN accuracy in per cent before the first step and after the last, from a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = [line for line in lines if "probe/knn" in line]
    if not found or found[0]["step"] != 0 or found[-1] is found[0]:
        raise SystemExit(f"{folder} lacks a k-NN probe at step 0 and one after it.")
    return found[0]["probe/knn"], found[-1]["probe/knn"]


def main() -> None:
    """Run the demo, read what it wrote, write the result."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "demo"
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "kinfold", "demo", "--out", str(out)], check=True)
        seconds = time.monotonic() - began
        before, after = accuracies(out)
    path = write(
        "demo",
        {
            "question": "how long `kinfold demo` takes from start to end, and what it learns",
            "measured_command": "kinfold demo",
            "protocol": "the run's own k-NN probe on held-out digits, per cent",
            "seconds": round(seconds, 1),
            "knn_untrained": round(before, 2),
            "knn_trained": round(after, 2),
        },
    )
    print(path)


if __name__ == "__main__":
    main()
