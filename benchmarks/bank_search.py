# SPDX-License-Identifier: Apache-2.0
"""What do time and memory of the search in InvP's bank cost, against the product with all rows and top-k?

    python benchmarks/bank_search.py
    python benchmarks/bank_search.py --device cuda

256 queries look for the 4,096 most similar of N unit vectors of 128 numbers. The dense way is two lines: all
similarities [256, N], and `topk`. First they take turns in one process at the size of ImageNet, N = 1,281,167, and what
they find is compared: on random unit vectors, and on vectors in 1,000 clusters that lie one behind the other, as in a
folder sorted by class. There the nearest rows come all at once, which is hard for a search that keeps what beats the
best so far. On a CPU a third contender is dense with numpy's product, which ours uses too and which is faster than
torch's on some processors, so that nobody takes that for a gain of the search.

Then N grows from 0.1 to 10 million, each way in processes of its own, which report seconds and the most memory beyond
what the process held with the bank in it, after a small search as warm-up: on a CPU the peak of the resident set, on
CUDA that of torch's allocator. The first round starts threads, and its seconds are not counted. The dense way is left
out where its matrix would not fit.

Writes `benchmarks/results/bank-search.json` (`bank-search-cuda.json`) and the chart `docs/bank-search.png`
(`docs/bank-search-cuda.png`). Needs Linux, and 6 GB for the largest bank.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bank_search_page import NAMES, page, worked
from measured import ROOT, in_turns, suffix, synchronise, write
from threadpoolctl import threadpool_limits
from torch import Tensor

from kinfold.kernels.search import Found, nearest_rows

IMAGENET = 1_281_167
GROWTH = (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)
CLUSTERS = 1000
ROUNDING = 1e-5
"""how far similarities of unit vectors may be apart"""


def dense(queries: Tensor, bank: Tensor, count: int) -> Found:
    """All similarities, and the best of them."""
    similarity, rows = (queries @ bank.T).topk(count, dim=1)
    return similarity, rows


def by_numpy(queries: Tensor, bank: Tensor, count: int) -> Found:
    """The same with numpy's product, on a CPU."""
    similarity, rows = torch.from_numpy(queries.numpy() @ bank.numpy().T).topk(count, dim=1)
    return similarity, rows


Way = Callable[[Tensor, Tensor, int], Found]
WAYS: dict[str, Way] = {"blocked": nearest_rows, "dense": dense}


def unit_rows(rows: int, width: int, device: str, *, seed: int, clusters: Tensor | None = None) -> Tensor:
    """Random unit vectors [rows, width], made in place and block by block, so that making them leaves no peak.

    With the centres of `clusters` [C, width], unit vectors themselves, the rows lie around them, those of one cluster
    one behind the other, with a cosine of about a half to each other.
    """
    generator = torch.Generator(device).manual_seed(seed)
    made = torch.empty(rows, width, device=device)  # [rows, width]
    for start in range(0, rows, 4096):
        part = made[start : start + 4096]  # [n, width]
        part.normal_(generator=generator).div_(part.norm(dim=1, keepdim=True))
        if clusters is not None:
            own = torch.arange(start, start + len(part), device=device) * len(clusters) // rows  # [n]
            part.add_(clusters[own])
            part.div_(part.norm(dim=1, keepdim=True))
    return made


def held(device: str) -> int:
    """Bytes in use now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak(device: str) -> int:
    """Most bytes that were in use."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


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
    synchronise(asked.device)
    before = held(asked.device)
    seconds = []
    for _ in range(1 + asked.rounds):
        began = time.perf_counter()
        found = WAYS[way](queries, bank, min(asked.nearest, asked.rows))
        synchronise(asked.device)
        seconds.append(time.perf_counter() - began)
        del found
    seconds = seconds[1:]
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
    """Measure one way in a new process; None where the matrix of similarities would not fit beside the bank.

    A process that fails leaves the others: {"failed": how it ended}.
    """
    needed = 4 * rows * (asked.width + (asked.queries if way == "dense" else 0))
    if 1.1 * needed > room(asked.device):
        return None
    command = [sys.executable, __file__, "--way", way, "--rows", str(rows), "--rounds", str(asked.rounds)]
    for word in ("device", "queries", "width", "nearest"):
        command += [f"--{word}", str(getattr(asked, word))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(way, f"{rows:,}", f"failed: exit {done.returncode}", flush=True)
        return {"failed": f"exit {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(way, f"{rows:,}", f"{found['seconds']['median']:.3f} s", f"{found['bytes'] / 1e6:.0f} MB", flush=True)
    return found


def together(asked: argparse.Namespace, clusters: int | None = None) -> dict[str, Any]:
    """All ways in turns in this process, and whether they find the same; on rows in so many clusters, or none."""
    centres = None if clusters is None else unit_rows(clusters, asked.width, asked.device, seed=3)  # [C, D]
    some = None if centres is None else centres[:: max(1, clusters // asked.queries)]  # [<= C, D]
    queries = unit_rows(asked.queries, asked.width, asked.device, seed=1, clusters=some)  # [B, D]
    bank = unit_rows(asked.rows, asked.width, asked.device, seed=2, clusters=centres)  # [N, D]
    count = min(asked.nearest, asked.rows)
    ways = {**WAYS, "numpy": by_numpy} if asked.device == "cpu" else WAYS

    def timed(way: Way) -> Callable[[], None]:
        def run() -> None:
            way(queries, bank, count)
            synchronise(asked.device)

        return run

    with threadpool_limits(torch.get_num_threads(), user_api="blas"):  # numpy's product
        seconds = in_turns({name: timed(way) for name, way in ways.items()}, rounds=asked.rounds)
    (similarity, rows), (values, columns) = nearest_rows(queries, bank, count), dense(queries, bank, count)
    differs = (similarity - values).abs().max().item()
    if differs > ROUNDING:
        raise SystemExit(f"ours and dense do not find the same: similarities differ by {differs:g}")
    common = sum(torch.isin(a, b).sum().item() for a, b in zip(rows, columns))
    print(
        f"{clusters or 'no'} clusters:",
        {name: round(found["median"], 3) for name, found in seconds.items()},
        "times ours",
        {name: round(found["times_ours"], 2) for name, found in seconds.items() if "times_ours" in found},
        flush=True,
    )
    return {
        "rows": asked.rows,
        "clusters": clusters,
        "seconds": seconds,
        "rows_in_common": common / rows.numel(),
        "similarity_differs_at_most": differs,
    }


def chart(growth: dict[str, Any], place: Path) -> None:
    """Seconds and memory over the number of rows, both axes by powers of ten."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(8, 3.2), constrained_layout=True)
    for way, colour in (("blocked", "#1b6ca8"), ("dense", "#c05621")):
        points = [(int(rows), found[way]) for rows, found in growth.items() if worked(found[way])]
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


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    words.add_argument("--rows", type=int, default=IMAGENET, help="N where all take turns")
    words.add_argument("--growth", type=int, nargs="*", default=list(GROWTH), help="N of the curve")
    words.add_argument("--queries", type=int, default=256)
    words.add_argument("--width", type=int, default=128)
    words.add_argument("--nearest", type=int, default=4096)
    words.add_argument("--rounds", type=int, default=5)
    words.add_argument("--quick", action="store_true", help="a bank of 20,000, one round; prints, and writes nothing")
    words.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    asked = words.parse_args()
    if asked.way:
        print(json.dumps(alone(asked.way, asked)))
        return
    if asked.quick:
        asked.rows, asked.growth, asked.nearest, asked.rounds = 20_000, [], 100, 1
    growth: dict[str, Any] = {}
    result: dict[str, Any] = {
        "question": "seconds and memory of finding the keys most similar to a batch in a bank of one key per image",
        "device": asked.device,
        "queries": asked.queries,
        "width": asked.width,
        "nearest": asked.nearest,
        "threads": torch.get_num_threads(),
        "together": together(asked),
        "clustered": together(asked, CLUSTERS),
        "growth": growth,
    }
    name = f"bank-search{suffix(asked.device)}"

    def tell() -> str:
        result["page"] = page(result)
        if growth and not asked.quick:
            chart(growth, ROOT / "docs" / f"{name}.png")
        return write(name, result, quick=asked.quick)

    told = tell()
    if asked.device == "cuda":
        torch.cuda.empty_cache()  # the processes need it
    for rows in sorted({*asked.growth, asked.rows}):
        growth[str(rows)] = {way: in_its_own_process(way, rows, asked) for way in WAYS}
        told = tell()  # again each time: what is measured is kept
    print(told)


if __name__ == "__main__":
    main()
