# SPDX-License-Identifier: Apache-2.0
"""What every result file says beside its figures: machine, versions, commit, time."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision

import kinfold

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def circumstances(*others: str) -> dict[str, Any]:
    """Machine, versions (also of the packages `others`), commit and time of a measurement."""
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
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "kinfold": kinfold.__version__,
            **{name: importlib.metadata.version(name) for name in others},
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


def write(name: str, result: dict[str, Any], *, alternatives: Sequence[str] = (), quick: bool = False) -> str:
    """Write a result with its circumstances to benchmarks/results/NAME.json, and give the path, to be printed.

    `alternatives` are packages whose versions belong to it. A `quick` run measures nothing: it touches no file, and
    the text that would have been written is given in place of the path.
    """
    text = json.dumps({**result, **circumstances(*alternatives)}, indent=2, ensure_ascii=False)
    if quick:
        return text
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(text + "\n", encoding="utf-8")
    return str(path)


def synchronise(device: str | torch.device) -> None:
    """Wait until the device has done what it was given, so that a clock read now counts all of it."""
    device = torch.device(device)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def times(ratio: float) -> str:
    """A ratio for people: 0.81×, 1.45×, 13.9×."""
    return f"{ratio:.{2 if ratio < 10 else 1}f}×"


def plain(value: float) -> str:
    """A figure for people, with three digits or all those before the point: 0.497, 98.6, 1,372."""
    if value == 0:
        return "0"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def counted(count: int, thing: str) -> str:
    """So many things: 1 thread, 2 threads, 50,000 images."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def in_turns(
    contenders: Mapping[str, Callable[[], object]], *, rounds: int = 5, warm_up: int = 1, per: float = 1.0
) -> dict[str, Any]:
    """Time contenders in turns, in one process: each round runs every one of them, in an order that moves on.

    The first contender is ours. `per` divides the seconds, for example by the images of one call. Gives, for each
    name, the median, least and greatest seconds with all single ones, and for each but the first `times_ours`, its
    `ratio`: how many times as long as ours it took, the median over the rounds, so that a machine that slows down for a
    while favours nobody.
    """
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warm_up + rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            began = time.perf_counter()
            contenders[name]()
            if turn >= warm_up:
                seconds[name].append((time.perf_counter() - began) / per)
    return summary(seconds)


def summary(seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    """Medians and spread of each contender's seconds, a list with one entry a round; the first contender is ours."""
    ours, *others = seconds
    found: dict[str, Any] = {
        name: {"median": statistics.median(all_), "least": min(all_), "greatest": max(all_), "all": all_}
        for name, all_ in seconds.items()
    }
    for name in others:
        found[name]["times_ours_each"] = each_round(found[ours], found[name])
        found[name]["times_ours"] = ratio(found[ours], found[name])
    return found


def each_round(ours: Mapping[str, Any], other: Mapping[str, Any]) -> list[float]:
    """How many times as long as ours the other took in each round, of two entries of a `summary`."""
    return [theirs / own for own, theirs in zip(ours["all"], other["all"], strict=True)]


def ratio(ours: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """How many times as long as ours the other took, the median over the rounds, which is the rule of the house."""
    return statistics.median(each_round(ours, other))


def suffix(device: str) -> str:
    """What the files of a result on another device than the CPU have at the end of their names."""
    return "" if device == "cpu" else f"-{device}"


def _git(*words: str) -> str | None:
    """What git says, None outside of a checkout and on a machine without git."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
