# SPDX-License-Identifier: Apache-2.0
"""How fast are the nearest neighbours of a test set found, against scikit-learn's brute force and faiss' flat index?

    uv run --with-requirements benchmarks/alternatives.txt python benchmarks/knn_speed.py

50,000 features of 512 numbers are asked by 10,000 others for the 200 with the greatest cosine. Every contender gets the
features as a backbone gives them, in memory, and makes unit vectors itself; none may keep an index for the next round.
The features are made: a centre for each of 100 classes, noise around it, and no number below zero, as after a ReLU.
The contenders take turns in one process, with as many threads as torch has, and their answers are compared. The votes
of the neighbours and the making of features are not in it. Writes `benchmarks/results/knn-speed.json`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from measured import counted, in_turns, times, write
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits
from torch import Tensor

from kinfold.evaluate.knn import nearest

CLASSES = 100
ALIKE = 0.999
"""share of the neighbours that exact contenders must have in common; the rest are nearer to each other than rounding"""


def made(rows: int, width: int, *, seed: int) -> Tensor:
    """Features [rows, width], each around the centre of a class drawn at random."""
    centres = torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(0))  # [C, width]
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(CLASSES, (rows,), generator=generator)  # [rows]
    return (centres[classes] + 2 * torch.randn(rows, width, generator=generator)).clamp_(min=0)  # [rows, width]


def contenders(bank: Tensor, queries: Tensor, neighbours: int) -> dict[str, Callable[[], Any]]:
    """Name → a search that gives the neighbours' rows, int64 [Q, k], with torch's number of threads."""
    import faiss  # type: ignore[import-not-found]  # of alternatives.txt

    faiss.omp_set_num_threads(torch.get_num_threads())

    def kinfold() -> Any:
        return torch.cat([near.places for near in nearest(queries, bank, k=neighbours)]).numpy()

    def by_sklearn() -> Any:
        index = NearestNeighbors(n_neighbors=neighbours, algorithm="brute", metric="cosine").fit(bank.numpy())
        return index.kneighbors(queries.numpy(), return_distance=False)

    def by_faiss() -> Any:
        rows, asking = bank.numpy().copy(), queries.numpy().copy()
        faiss.normalize_L2(rows)
        faiss.normalize_L2(asking)
        index = faiss.IndexFlatIP(rows.shape[1])
        index.add(rows)
        return index.search(asking, neighbours)[1]

    return {"kinfold": kinfold, "scikit-learn": by_sklearn, "faiss": by_faiss}


def agreement(ours: Any, theirs: Any) -> dict[str, float]:
    """Share of the queries with the same set of neighbours, and of all neighbours that both name."""
    common = [len(np.intersect1d(a, b)) for a, b in zip(ours, theirs)]
    return {
        "queries_with_equal_sets": float(np.mean([n == ours.shape[1] for n in common])),
        "neighbours_in_common": float(np.sum(common) / ours.size),
    }


def page(result: dict[str, Any]) -> dict[str, Any]:
    """What a reader should see."""
    rows = [
        [
            name,
            f"{found['median']:.2f}",
            f"{found['least']:.2f} to {found['greatest']:.2f}",
            times(found["times_ours"]) if "times_ours" in found else "1",
            f"{100 * found['agreement']['neighbours_in_common']:.3f} %" if "agreement" in found else "",
        ]
        for name, found in result["seconds"].items()
    ]
    return {
        "title": "Nearest neighbours for the k-NN protocol",
        "text": [
            f"The {result['neighbours']} rows with the greatest cosine among {result['bank']:,} features of "
            f"{result['width']}, for {result['queries']:,} queries, with {counted(result['threads'], 'thread')}. Each "
            "contender makes unit vectors of the same features first; computing features and counting votes are not in "
            "it. All three are exact: neighbours differ where two are nearer to each other than single precision tells."
        ],
        "table": {
            "columns": ["", "seconds (median)", "range", "times Kinfold's", "neighbours in common"],
            "rows": rows,
        },
        "summary": [
            {
                "question": f"{result['neighbours']} nearest of {result['bank']:,} rows of {result['width']} for "
                f"{result['queries']:,} queries",
                "ours": f"{result['seconds']['kinfold']['median']:.2f} s",
                "alternative": f"{result['seconds'][other]['median']:.2f} s ({other})",
                "ratio": times(result["seconds"][other]["times_ours"]),
            }
            for other in result["seconds"]
            if other != "kinfold"
        ],
    }


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--bank", type=int, default=50_000)
    words.add_argument("--queries", type=int, default=10_000)
    words.add_argument("--width", type=int, default=512)
    words.add_argument("--neighbours", type=int, default=200)
    words.add_argument("--rounds", type=int, default=5)
    words.add_argument("--quick", action="store_true", help="2,000 x 500 x 64, one round; prints, and writes nothing")
    asked = words.parse_args()
    if asked.quick:
        asked.bank, asked.queries, asked.width, asked.neighbours, asked.rounds = 2000, 500, 64, 20, 1
    threads = torch.get_num_threads()
    bank, queries = made(asked.bank, asked.width, seed=1), made(asked.queries, asked.width, seed=2)  # [N, F], [Q, F]
    runs = contenders(bank, queries, asked.neighbours)
    with threadpool_limits(threads):
        answers = {name: run() for name, run in runs.items()}  # which warms up as well
        seconds = in_turns(runs, rounds=asked.rounds, warm_up=0)
    for name in list(runs)[1:]:
        seconds[name]["agreement"] = agreement(answers["kinfold"], answers[name])
        if seconds[name]["agreement"]["neighbours_in_common"] < ALIKE:
            raise SystemExit(f"ours and {name} do not find the same: {seconds[name]['agreement']}")
        print(name, f"{seconds[name]['times_ours']:.2f} times ours", seconds[name]["agreement"], flush=True)
    result: dict[str, Any] = {
        "question": "seconds to find the nearest neighbours of a test set's features among a training set's",
        "bank": asked.bank,
        "queries": asked.queries,
        "width": asked.width,
        "neighbours": asked.neighbours,
        "threads": threads,
        "seconds": seconds,
    }
    print({name: round(found["median"], 3) for name, found in seconds.items()})
    alternatives = ("faiss-cpu", "scikit-learn")
    print(write("knn-speed", {**result, "page": page(result)}, alternatives=alternatives, quick=asked.quick))


if __name__ == "__main__":
    main()
