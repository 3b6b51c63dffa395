# SPDX-License-Identifier: Apache-2.0
"""What every result file says beside its figures: machine, versions, commit, time."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torchvision

import kinfold

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def circumstances() -> dict[str, Any]:
    """Machine, versions, commit and time of a measurement."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "machine": {"processor": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "kinfold": kinfold.__version__,
        },
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "kinfold")),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", sys.argv[0], *(shown(word) for word in sys.argv[1:])]),
    }


def shown(word: str) -> str:
    """A word of the command line without the folders that lead to it, which are this machine's own."""
    return os.path.basename(os.path.normpath(word)) if os.path.exists(word) else word


def without_folder(description: str, data: str) -> str:
    """A description of images without the place where they lie on this machine."""
    places = {data, data.rstrip("/"), str(Path(data)), os.path.abspath(data), os.path.realpath(data)}
    for place in sorted(places, key=len, reverse=True):
        description = description.replace(f" in {place}", "")
    return description


def write(name: str, result: dict[str, Any]) -> Path:
    """Write a result with its circumstances to benchmarks/results/NAME.json."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**result, **circumstances()}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _git(*words: str) -> str | None:
    """What git says, None outside of a checkout."""
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
