# SPDX-License-Identifier: Apache-2.0
"""What do time and memory of the search in InvP's bank cost, against the product with all rows and top-k?

    python benchmarks/bank_search.py
    python benchmarks/bank_search.py --device cuda

256 queries look for the 4,096 most similar of N unit vectors of 128 numbers. The dense way is two lines: all
similarities [256, N], and `topk`. First both take turns in one process at the size of ImageNet, N = 1,281,167, and what
they find is compared. Then N grows from 0.1 to 10 million, each way in processes of its own, which report seconds and
the most memory beyond what the process held with the bank in it, after a small search as warm-up: on a CPU the peak of
the resident set, on CUDA that of torch's allocator. The dense way is left out where its matrix would not fit.

Writes `benchmarks/results/bank-search.json` (`bank-search-cuda.json`) and the chart `docs/bank-search.png`
(`docs/bank-search-cuda.png`). Needs Linux, and 6 GB for the largest bank.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from measured import ROOT, in_turns, write
from torch import Tensor

from kinfold.kernels.search import Found, nearest_rows

matplotlib.use("Agg")

IMAGENET = 1_281_167
GROWTH = (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)
NAMES = {"blocked": "Kinfold, blocked", "dense": "dense product + top-k"}


def dense(queries: Tensor, bank: Tensor, count: int) -> Found:
    """All similarities, and the best of them."""
    similarity, rows = (queries @ bank.T).topk(count, dim=1)
    return similarity, rows


WAYS: dict[str, Callable[[Tensor, Tensor, int], Found]] = {"blocked": nearest_rows, "dense": dense}


def unit_rows(rows: int, width: int, device: str, *, seed: int) -> Tensor:
    """Random unit vectors [rows, width], made in place and block by block, so that making them leaves no peak."""
    generator = torch.Generator(device).manual_seed(seed)
    made = torch.empty(rows, width, device=device)  # [rows, width]
    for part in made.split(4096):
        part.normal_(generator=generator).div_(part.norm(dim=1, keepdim=True))
    return made


def finish(device: str) -> None:
    """Wait for what the device still does."""
    if device == "cuda":
        torch.cuda.synchronize()


def held(device: str) -> int:
    """Bytes in use now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak(device: str) -> int:
    """Most bytes that were in use."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def room(device: str) -> int:
    """Bytes that could be had."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024


def alone(way: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Search in this process, which has done nothing else: seconds of each round, and bytes beyond the bank."""
    queries = unit_rows(asked.queries, asked.width, asked.device, seed=1)  # [B, D]
    bank = unit_rows(asked.rows, asked.width, asked.device, seed=2)  # [N, D]
    WAYS[way](queries[:2], bank[:5000], 10)
    finish(asked.device)
    before = held(asked.device)
    seconds = []
    for _ in range(asked.rounds):
        began = time.perf_counter()
        found = WAYS[way](queries, bank, min(asked.nearest, asked.rows))
        finish(asked.device)
        seconds.append(time.perf_counter() - began)
        del found
    return {
        "seconds": {
            "median": statistics.median(seconds),
            "least": min(seconds),
            "greatest": max(seconds),
            "all": seconds,
        },
        "bytes": peak(asked.device) - before,
    }


def in_its_own_process(way: str, rows: int, asked: argparse.Namespace) -> dict[str, Any] | None:
    """Measure one way in a new process; None where the matrix of similarities would not fit beside the bank."""
    needed = 4 * rows * (asked.width + (asked.queries if way == "dense" else 0))
    if 1.1 * needed > room(asked.device):
        return None
    command = [sys.executable, __file__, "--way", way, "--rows", str(rows), "--rounds", str(asked.rounds)]
    for word in ("device", "queries", "width", "nearest"):
        command += [f"--{word}", str(getattr(asked, word))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(way, f"{rows:,}", f"{found['seconds']['median']:.3f} s", f"{found['bytes'] / 1e6:.0f} MB", flush=True)
    return found


def together(asked: argparse.Namespace) -> dict[str, Any]:
    """Both ways in turns in this process, and whether they find the same."""
    queries = unit_rows(asked.queries, asked.width, asked.device, seed=1)  # [B, D]
    bank = unit_rows(asked.rows, asked.width, asked.device, seed=2)  # [N, D]
    count = min(asked.nearest, asked.rows)

    def timed(way: str) -> Callable[[], None]:
        def run() -> None:
            WAYS[way](queries, bank, count)
            finish(asked.device)

        return run

    seconds = in_turns({way: timed(way) for way in WAYS}, rounds=asked.rounds)
    (similarity, rows), (values, columns) = nearest_rows(queries, bank, count), dense(queries, bank, count)
    common = sum(torch.isin(a, b).sum().item() for a, b in zip(rows, columns))
    print({way: round(seconds[way]["median"], 3) for way in WAYS}, "times ours", seconds["dense"]["times_ours"])
    return {
        "rows": asked.rows,
        "seconds": seconds,
        "rows_in_common": common / rows.numel(),
        "similarity_differs_at_most": (similarity - values).abs().max().item(),
    }


def chart(growth: dict[str, Any], place: Path) -> None:
    """Seconds and memory over the number of rows, both axes by powers of ten."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(8, 3.2), constrained_layout=True)
    for way, colour in (("blocked", "#1b6ca8"), ("dense", "#c05621")):
        points = [(int(rows), found[way]) for rows, found in growth.items() if found[way] is not None]
        rows = [n for n, _ in points]
        words: dict[str, Any] = {"marker": "o", "markersize": 4, "color": colour, "label": NAMES[way]}
        panels[0].loglog(rows, [found["seconds"]["median"] for _, found in points], **words)
        panels[1].loglog(rows, [found["bytes"] / 1e6 for _, found in points], **words)
    for panel, title in zip(panels, ("seconds a search", "MB beyond the bank")):
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("images in the bank")
        panel.grid(True, which="major", linewidth=0.4, alpha=0.6)
    panels[0].legend(frameon=False, fontsize=9)
    figure.savefig(place, dpi=110)
    pyplot.close(figure)


def page(result: dict[str, Any], picture: Path | None) -> dict[str, Any]:
    """What a reader should see."""
    table = []
    for rows, found in result["growth"].items():
        ours, theirs = found["blocked"], found["dense"]
        table.append(
            [
                f"{int(rows):,}",
                f"{ours['seconds']['median']:.3g}" if ours else "does not fit",
                f"{theirs['seconds']['median']:.3g}" if theirs else "does not fit",
                f"{ours['bytes'] / 1e6:,.0f}" if ours else "",
                f"{theirs['bytes'] / 1e6:,.0f}" if theirs else "",
            ]
        )
    seconds, at = result["together"]["seconds"], result["together"]["rows"]
    both = result["growth"].get(str(at), {})
    text = (
        f"In turns in one process at {at:,} images the blocked search takes {seconds['blocked']['median']:.2f} s "
        f"(least {seconds['blocked']['least']:.2f}, greatest {seconds['blocked']['greatest']:.2f}) and the dense one "
        f"{seconds['dense']['median']:.2f} s ({seconds['dense']['least']:.2f} to {seconds['dense']['greatest']:.2f}): "
        f"{seconds['dense']['times_ours']:.2f} times as long. "
        f"{100 * result['together']['rows_in_common']:.3f} % of the rows found are the same; the others are as near to "
        "within rounding."
    )
    if both.get("dense"):
        share = both["blocked"]["bytes"] / both["dense"]["bytes"]
        text += f" Its memory is {100 * share:.1f} % of the dense search's."
    compared = [("s", seconds["blocked"]["median"], seconds["dense"]["median"])]
    if both.get("dense"):
        compared.append(("MB", both["blocked"]["bytes"] / 1e6, both["dense"]["bytes"] / 1e6))
    page: dict[str, Any] = {
        "title": "The search in a bank of one key per image (InvP)",
        "text": [
            f"{result['queries']} queries, the {result['nearest']:,} most similar keys of {result['width']} numbers, "
            f"on {result['device']} with {result['threads']} threads; random unit vectors. The search alone: no "
            "gradient and no loss is in it. Dense is one product with all rows and torch's top-k. Memory is the peak "
            "beyond the bank, of each way in a process of its own.",
            text,
        ],
        "table": {"columns": ["images", "s, blocked", "s, dense", "MB, blocked", "MB, dense"], "rows": table},
        "summary": [
            {
                "question": f"the {result['nearest']:,} nearest of {at:,} rows for {result['queries']} queries, "
                f"{'time' if unit == 's' else 'memory beyond the bank'}",
                "ours": f"{ours:.3g} {unit}",
                "alternative": f"{theirs:.3g} {unit} (dense product and top-k)",
                "ratio": f"{theirs / ours:.1f}×",
            }
            for unit, ours, theirs in compared
        ],
    }
    return page if picture is None else {**page, "charts": [picture.name]}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    words.add_argument("--rows", type=int, default=IMAGENET, help="N where both take turns")
    words.add_argument("--growth", type=int, nargs="*", default=list(GROWTH), help="N of the curve")
    words.add_argument("--queries", type=int, default=256)
    words.add_argument("--width", type=int, default=128)
    words.add_argument("--nearest", type=int, default=4096)
    words.add_argument("--rounds", type=int, default=5)
    words.add_argument("--quick", action="store_true", help="a bank of 20,000 and one round: does it run? No chart")
    words.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    asked = words.parse_args()
    if asked.way:
        print(json.dumps(alone(asked.way, asked)))
        return
    if asked.quick:
        asked.rows, asked.growth, asked.nearest, asked.rounds = 20_000, [10_000], 100, 1
    growth: dict[str, Any] = {}
    for rows in sorted({*asked.growth, asked.rows}):
        growth[str(rows)] = {way: in_its_own_process(way, rows, asked) for way in WAYS}
    suffix = "" if asked.device == "cpu" else f"-{asked.device}"
    result: dict[str, Any] = {
        "question": "seconds and memory of finding the keys most similar to a batch in a bank of one key per image",
        "device": asked.device,
        "queries": asked.queries,
        "width": asked.width,
        "nearest": asked.nearest,
        "threads": torch.get_num_threads(),
        "together": together(asked),
        "growth": growth,
    }
    picture = None if asked.quick else ROOT / "docs" / f"bank-search{suffix}.png"
    if picture is not None:
        chart(growth, picture)
    print(write(f"bank-search{suffix}", {**result, "page": page(result, picture)}))


if __name__ == "__main__":
    main()
