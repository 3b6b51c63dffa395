# SPDX-License-Identifier: Apache-2.0
"""How long until help, import, and the first step on a folder of 100,000 files?

    python benchmarks/startup.py

The commands run in turns, each in a process of its own, beside a Python that does nothing and `import torch`. Then
100,000 JPEG files of 32 px are made in class folders in a temporary place, and `kinfold pretrain` is started on them,
from the start of the process until its first step stands in the log: with nothing known about the folder (an empty
cache of ours), and again. Once as it comes (a set of small images of one size is decoded whole and then lives on the
device) and once with resident=false (workers decode as they go). The alternative is torchvision's `ImageFolder` with a
`DataLoader` on the same folder, until its first batch is there; its step is not counted. Every way runs once a round,
in an order that moves on; the second start of ours comes right after its first. The files have just been
written, so the system still has them in memory, on both sides. Writes `benchmarks/results/startup.json`.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measured import ROOT, in_turns, ratio, summary, times, write
from PIL import Image

RECIPE = ROOT / "benchmarks" / "recipes" / "moco.yaml"
DIFFERENT = 500
"""images that are drawn and encoded; the files are copies of their bytes"""
COMMANDS = {
    "kinfold --help": ["-m", "kinfold", "--help"],
    "import kinfold": ["-c", "import kinfold"],
    "import torch": ["-c", "import torch"],
    "python alone": ["-c", "pass"],
}
OURS = ("on the device, first", "on the device, again", "by workers, first", "by workers, again")
THEIRS = {f"ImageFolder, {workers} workers": workers for workers in (0, 2)}
FIRST_BATCH = """
import sys
import torch
from torchvision import datasets, transforms
view = transforms.Compose([
    transforms.RandomResizedCrop(32, scale=(0.2, 1.0)),
    transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
    transforms.RandomGrayscale(p=0.2),
    transforms.RandomHorizontalFlip(),
    transforms.ToTensor(),
])
images = datasets.ImageFolder(sys.argv[1], transform=lambda image: (view(image), view(image)))
workers = int(sys.argv[2])
loader = torch.utils.data.DataLoader(images, batch_size=256, shuffle=True, drop_last=True, num_workers=workers)
(asks, answers), _ = next(iter(loader))
assert asks.shape == answers.shape == (256, 3, 32, 32)
"""
"""torchvision's way to a first batch of two views; argv: folder, workers"""


def make(folder: Path, files: int) -> None:
    """Write `files` JPEG images of 32 px into class folders of a thousand."""
    source = np.random.default_rng(0)
    images = []
    for _ in range(min(files, DIFFERENT)):
        smooth = Image.fromarray(source.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((32, 32))
        written = io.BytesIO()
        smooth.save(written, format="jpeg", quality=90)
        images.append(written.getvalue())
    for start in range(0, files, 1000):
        inner = folder / f"class-{start // 1000:05d}"
        inner.mkdir(parents=True)
        for number in range(start, min(start + 1000, files)):
            (inner / f"image-{number:08d}.jpg").write_bytes(images[number % len(images)])


def run(words: list[str]) -> None:
    """Run Python with these words, in silence."""
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def first_step(folder: Path, out: Path, cache: Path, settings: list[str]) -> float:
    """Seconds from the start of `kinfold pretrain` until its first step is in the log; it is stopped there.

    Raises `RuntimeError` where it ends before, with what it said.
    """
    words = [sys.executable, "-m", "kinfold", "pretrain", str(folder), "--out", str(out), "--recipe", str(RECIPE)]
    words += ["--quiet", "log_every=1", "probe_every=0", "epochs=2", "device=cpu", *settings]
    log, began = out / "metrics.jsonl", time.perf_counter()
    with tempfile.TemporaryFile() as said:
        environment = {**os.environ, "KINFOLD_CACHE": str(cache)}
        process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=said)
        try:
            while not (log.exists() and b'"images_per_second"' in log.read_bytes()):
                if process.poll() is not None:
                    said.seek(0)
                    raise RuntimeError(f"kinfold ended before its first step: {said.read().decode(errors='replace')}")
                time.sleep(0.005)
            return time.perf_counter() - began
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def listing(folder: Path, cache: Path) -> float:
    """Seconds in which kinfold learns what is in the folder, in this process."""
    from kinfold.data.sources import open_source

    began = time.perf_counter()
    open_source(str(folder), cache=cache)
    return time.perf_counter() - began


def first_batch(folder: Path, workers: int) -> float:
    """Seconds of a process that ends when torchvision's way has made its first batch."""
    began = time.perf_counter()
    run(["-c", FIRST_BATCH, str(folder), str(workers)])
    return time.perf_counter() - began


def starts(folder: Path, place: Path, rounds: int) -> dict[str, Any]:
    """Every way to a first step once a round, in an order that moves on; ours first and again, with a new cache."""
    seconds: dict[str, list[float]] = {name: [] for name in (*OURS, *THEIRS)}
    parts: dict[str, list[float]] = {"listing, first": [], "listing, again": [], "imports": []}
    run(["-c", "import kinfold.pretrain, torchvision"])  # no way is the first to read the packages from the disk

    def ours(way: str, settings: list[str], turn: int) -> None:
        for when in ("first", "again"):
            out, cache = (place / f"{kind}-{turn}-{len(settings)}" for kind in (when, "cache"))
            seconds[f"{way}, {when}"].append(first_step(folder, out, cache, settings))

    def theirs(name: str, workers: int, turn: int) -> None:
        seconds[name].append(first_batch(folder, workers))

    ways = [partial(ours, "on the device", []), partial(ours, "by workers", ["resident=false"])]
    ways += [partial(theirs, name, workers) for name, workers in THEIRS.items()]
    for turn in range(rounds):
        shift = turn % len(ways)
        for way in ways[shift:] + ways[:shift]:
            way(turn)
        for when in ("first", "again"):
            parts[f"listing, {when}"].append(listing(folder, place / f"listing-{turn}"))
        began = time.perf_counter()
        run(["-c", "import kinfold.pretrain"])
        parts["imports"].append(time.perf_counter() - began)
        print(
            f"round {turn + 1}:", {name: round(all_[-1], 1) for name, all_ in {**seconds, **parts}.items()}, flush=True
        )
    return {"ways": summary(seconds), "parts": {n: statistics.median(all_) for n, all_ in parts.items()}}


def page(result: dict[str, Any]) -> dict[str, Any]:
    """What a reader should see."""
    commands, ways, parts = result["commands"], result["starts"]["ways"], result["starts"]["parts"]
    rows = [[f"`{name}`", f"{found['median']:.2f} s", spread(found)] for name, found in commands.items()]
    for name, found in ways.items():
        who = (
            "first batch with torchvision's " if name.startswith("ImageFolder") else "first step, `kinfold pretrain`, "
        )
        rows.append([f"{who}{name}", f"{found['median']:.1f} s", spread(found)])
    best = min((name for name in ways if name.startswith("ImageFolder")), key=lambda name: ways[name]["median"])
    files = f"{result['files']:,}"
    first = ways["by workers, first"]
    fastest = min(("on the device, again", "by workers, again"), key=lambda name: ways[name]["median"])
    return {
        "title": f"Start: help, import, and the first step on {files} files",
        "text": [
            "Wall time of whole processes. `kinfold --help` and `import kinfold` do without torch, which is imported "
            "when a command runs.",
            f"The folder has {files} JPEG files of 32 px, a thousand a directory. Ours is the time from the start of "
            "`kinfold pretrain` until its first step of 256 images (resnet10_w32, two threads) is in the log. *First*: "
            "nothing is known about the folder; *again*: its list (and, on the device, its decoded pixels) come from "
            "the cache. *On the device*, the default for such a set, all images are decoded before the first step; *by "
            "workers*, they are decoded as they are needed. `ImageFolder` stands for the time until the first batch of "
            "two views; its encoder, optimiser and step are not in it. Each way ran once a round, one process after "
            "the other, and the order moved on from round to round; *again* came right after its *first*. The files "
            "had just been written, so that the disk does not count on either side.",
            f"Of ours, {parts['imports']:.1f} s are imports; {parts['listing, first']:.1f} s go into the list of files "
            f"the first time and {parts['listing, again']:.2f} s after that.",
        ],
        "table": {"columns": ["what", "median", "least to greatest"], "rows": rows},
        "summary": [
            {
                "question": f"first step on a folder of {files} files, the first time, by workers",
                "ours": f"{first['median']:.1f} s",
                "alternative": f"{ways[best]['median']:.1f} s (torchvision's {best}, first batch only)",
                "ratio": times(ratio(first, ways[best])),
            },
            {
                "question": f"first step on a folder of {files} files, again",
                "ours": f"{ways[fastest]['median']:.1f} s ({fastest})",
                "alternative": f"{ways[best]['median']:.1f} s (the same)",
                "ratio": times(ratio(ways[fastest], ways[best])),
            },
            {
                "question": "`kinfold --help`",
                "ours": f"{commands['kinfold --help']['median']:.2f} s",
                "alternative": f"{commands['import torch']['median']:.2f} s (`import torch`)",
                "ratio": "",  # a measure for it, and nobody's alternative
            },
        ],
    }


def spread(found: dict[str, Any]) -> str:
    """Least to greatest, in seconds."""
    return f"{found['least']:.2f} to {found['greatest']:.2f} s"


def main() -> None:
    """Read the words, measure, write."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--files", type=int, default=100_000)
    words.add_argument("--rounds", type=int, default=3, help="of first steps")
    words.add_argument("--processes", type=int, default=10, help="of each short command")
    words.add_argument("--quick", action="store_true", help="few files, once; prints, and writes nothing")
    given = words.parse_args()
    if given.quick:
        given.files, given.rounds, given.processes = 1000, 1, 2
    commands = in_turns({name: partial(run, words) for name, words in COMMANDS.items()}, rounds=given.processes)
    print({name: round(found["median"], 3) for name, found in commands.items()}, flush=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "images")
        make(folder, given.files)
        time.sleep(3)  # a directory changed within the last seconds is not trusted
        found = starts(folder, Path(place), given.rounds)
    result = {
        "question": "seconds until help, import, and the first step on a folder of many files",
        "files": given.files,
        "recipe": RECIPE.name,
        "commands": commands,
        "starts": found,
    }
    print(write("startup", {**result, "page": page(result)}, quick=given.quick))


if __name__ == "__main__":
    main()
