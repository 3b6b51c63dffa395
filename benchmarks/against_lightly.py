# SPDX-License-Identifier: Apache-2.0
"""How many images a second does MoCo v2 learn from, end to end, beside the same method written with lightly's parts?

    uv run --with-requirements benchmarks/alternatives.txt python benchmarks/against_lightly.py --data CIFAR10

CIFAR10 is a folder of CIFAR-10 as Parquet. Both sides train `benchmarks/recipes/moco.yaml` (a small ResNet, 32 px,
batch 256, a queue of 4,096 keys) on the CPU with as many threads. Ours is `kinfold.pretrain.pretrain`, whose own log
gives the speed; theirs is `benchmarks/lightly_loop.py`, with no, one and two workers. Beside them the encoders alone,
on tensors that lie ready: nobody can be faster without changing them.

Processes take turns, round by round, each with the first steps left out. Then each side trains several epochs, ours and
the fastest of lightly's, and both losses, the keys' k-NN (k = 200, T = 0.1, backbone features) and the time of the
whole run are kept. Writes `benchmarks/results/against-lightly.json` and `docs/loss-against-lightly.png`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from learning import knn
from loop_overhead import measure_bare
from measured import ROOT, counted, summary, times, without_folder, write

from kinfold.data.decode import decode
from kinfold.data.sources import open_source
from kinfold.export import rebuild_backbone
from kinfold.pretrain import pretrain
from kinfold.recipe import Recipe, load
from kinfold.training import build_learner

RECIPE = ROOT / "benchmarks" / "recipes" / "moco.yaml"
WARM_UP = 4
"""steps at the beginning of each measurement that do not count"""
OURS, BARE = "kinfold", "encoders alone"
THEIRS = {f"lightly, {count} worker{'s' if count != 1 else ''}": count for count in (0, 1, 2)}
CHART = "loss-against-lightly.png"
K = 200


def asked(given: argparse.Namespace, out: Path) -> tuple[Recipe, Any]:
    """The recipe, and where and on what it runs."""
    settings = [f"epochs={given.epochs}", f"batch_size={given.batch}", "probe_every=0", "log_every=1", "device=cpu"]
    if given.epochs < 2:
        settings.append("learning_rate.warmup_epochs=0")
    wanted = {"data": given.data, "out": str(out), "limit": given.limit, "checkpoint_every": 1000}
    return load(str(RECIPE), [*settings, *given.settings], run=wanted)


def speed_of(ends: list[float], batch: int) -> float:
    """Images per second from the end of the warm-up on, from the times at which steps ended."""
    return batch * (len(ends) - WARM_UP) / (ends[-1] - ends[WARM_UP - 1])


def ours(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train with kinfold: losses, images per second from its own log, and the weights' file."""
    recipe, run = asked(given, folder / "run")
    began = time.perf_counter()
    done = pretrain(recipe, run, quiet=True)
    seconds = time.perf_counter() - began
    lines = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if "images_per_second" in line]
    steady = sum(1 / line["images_per_second"] for line in lines[WARM_UP:])
    return {
        "images_per_second": (len(lines) - WARM_UP) / steady,
        "waiting_for_images": statistics.median(line["waiting"] for line in lines[WARM_UP:]),
        "losses": [line["loss"] for line in lines],
        "seconds_whole_run": seconds,
        "backbone": rebuild_backbone(done.folder / "backbone.safetensors")[0],
    }


def theirs(given: argparse.Namespace, workers: int) -> dict[str, Any]:
    """Train with lightly's parts: losses, images per second, and the backbone."""
    from lightly_loop import train  # only here: what is measured for kinfold does without lightly

    recipe, _ = asked(given, Path("unused"))
    source = open_source(given.data, limit=given.limit)
    pixels = np.stack([decode(source.read(i)) for i in range(len(source))])  # [N, H, W, 3]
    torch.manual_seed(recipe.seed)
    began = time.perf_counter()
    done = train(recipe, pixels, workers=workers)
    return {
        "images_per_second": speed_of(done.ends, recipe.batch_size),
        "losses": done.losses,
        "seconds_whole_run": time.perf_counter() - began,
        "backbone": done.backbone,
    }


def one(given: argparse.Namespace) -> dict[str, Any]:
    """One contender in this process, with its k-NN where that is asked for."""
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        if given.only == BARE:
            recipe, _ = asked(given, Path(folder))
            return {
                "images_per_second": measure_bare(recipe, given.limit // given.batch - WARM_UP, "cpu")[
                    "images_per_second"
                ]
            }
        found = ours(given, Path(folder)) if given.only == OURS else theirs(given, THEIRS[given.only])
    backbone = found.pop("backbone")
    if given.knn:
        recipe, _ = asked(given, Path("unused"))
        bank, queries = open_source(given.data, limit=given.limit), open_source(given.data, split="test")
        found["knn"] = knn(backbone, recipe, bank, queries, min(K, len(bank)))
        untrained = build_learner(recipe, images=len(bank)).encoder.backbone
        found["knn_untrained"] = knn(untrained, recipe, bank, queries, min(K, len(bank)))
    return found


def measure(name: str, given: argparse.Namespace, *, epochs: int, limit: int, knn_too: bool) -> dict[str, Any]:
    """One contender in a process of its own."""
    words = [sys.executable, __file__, "--only", name, "--data", given.data, "--batch", str(given.batch)]
    words += ["--threads", str(given.threads), "--epochs", str(epochs), "--limit", str(limit)]
    words += ["--knn"] if knn_too else []
    # Two loops of threads that wait for each other by spinning take each other's cores.
    environment = {**os.environ, "OMP_NUM_THREADS": str(given.threads)}
    done = subprocess.run([*words, *given.settings], check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def rounds(given: argparse.Namespace) -> dict[str, Any]:
    """Every contender once a round, in an order that moves on: seconds an image, and images a second."""
    names = [OURS, *THEIRS, BARE]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(given.rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            found = measure(name, given, epochs=1, limit=(WARM_UP + given.steps) * given.batch, knn_too=False)
            seconds[name].append(1 / found["images_per_second"])
            print(f"round {turn + 1}: {name}: {found['images_per_second']:.0f} images/s", flush=True)
    found = summary(seconds)
    for name in names:
        found[name]["images_per_second"] = round(1 / found[name]["median"], 1)
    return found


def draw(runs: dict[str, Any], path: Path) -> None:
    """Both losses over the steps, each as a running mean."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.2), dpi=110)
    for name, found in runs.items():
        losses, width = found["losses"], 9
        smooth = [statistics.mean(losses[max(0, i - width + 1) : i + 1]) for i in range(len(losses))]
        axes.plot(range(1, len(losses) + 1), smooth, label=name, linewidth=1.4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (mean of 9 steps)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def page(result: dict[str, Any]) -> dict[str, Any]:
    """What a reader should see."""
    speed, runs, fastest = result["speed"], result["learning"], result["fastest_of_lightly"]
    threads = counted(result["threads"], "thread")
    rows = []
    for name in (OURS, *THEIRS, BARE):
        ratio = "" if name == OURS else f"{1 / speed[name]['times_ours']:.2f} of ours"
        low, high = (1 / speed[name][end] for end in ("greatest", "least"))
        rows.append([name, f"{speed[name]['images_per_second']:.0f}", f"{low:.0f} to {high:.0f}", ratio])
    learnt = [
        f"{name} ends after {len(found['losses'])} steps ({result['epochs']} epochs) at a loss of "
        f"{statistics.mean(found['losses'][-20:]):.2f} and a k-NN of {found['knn']:.1f} % (untrained "
        f"{found['knn_untrained']:.1f} %), {found['seconds_whole_run']:.0f} s for the whole run, each by its own clock"
        for name, found in runs.items()
    ]
    text = [
        f"MoCo v2 on {result['data']}, 32 px, `{result['backbone']}`, batch {result['batch_size']}, a queue of 4,096 "
        f"keys, {threads}, no accelerator. Everything is in these figures: making the views, both "
        "encoders, loss, optimiser, momentum, memory, log. Images lie decoded in memory on both sides. lightly's "
        f"workers are processes beside the {threads}. `{BARE}` is query forward and backward, key "
        "forward and optimiser on tensors that lie ready, in channels-last. Processes took "
        f"turns, {result['rounds']} rounds of {result['steps']} steps, the first {WARM_UP} of each left out. "
        "How many times as long the others take is the median of the rounds' own ratios, so it is not the quotient of "
        "two medians.",
        "It learns as well, in runs one after the other: " + "; ".join(learnt) + ".",
        "What makes it faster, beside views made for a whole batch at once: images and weights in channels-last, and "
        "memory that a step has freed and keeps for the next one (`kinfold.devices.keep_freed_memory`), "
        f"both in `{BARE}` as well. lightly's loop does what its examples do.",
        "What differs: kinfold normalises keys in 8 groups and shuffles them before (as MoCo does on 8 GPUs); "
        "lightly's parts, put together for one process, normalise the whole batch. The momentum update comes before "
        "the step there and after it here, which gives the same sequence of key encoders. Random numbers differ. "
        "Backbone, head, first weights, augmentations and their probabilities, optimiser, and rate at every step are "
        "the same.",
    ]
    return {
        "title": "End to end: MoCo v2 beside the same method from lightly's parts",
        "text": text,
        "table": {"columns": ["who", "images/s", "least to greatest", "speed"], "rows": rows},
        "charts": [CHART],
        "summary": [
            {
                "question": "pretraining MoCo v2 at 32 px, images/s on two cores",
                "ours": f"{speed[OURS]['images_per_second']:.0f}",
                "alternative": f"{speed[fastest]['images_per_second']:.0f} ({fastest})",
                "ratio": times(speed[fastest]["times_ours"]),
            }
        ],
    }


def main() -> None:
    """Read the words; measure one contender, or compare all."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--data", required=True)
    words.add_argument("--limit", type=int, default=10_000, help="images of the learning runs")
    words.add_argument("--epochs", type=int, default=8, help="of the learning runs")
    words.add_argument("--rounds", type=int, default=3)
    words.add_argument("--steps", type=int, default=20, help=f"measured steps, after {WARM_UP} that do not count")
    words.add_argument("--batch", type=int, default=256)
    words.add_argument("--threads", type=int, default=2)
    words.add_argument("--quick", action="store_true", help="a few steps; prints, and writes nothing")
    words.add_argument("--only", choices=[OURS, BARE, *THEIRS], help=argparse.SUPPRESS)
    words.add_argument("--knn", action="store_true", help=argparse.SUPPRESS)
    words.add_argument("settings", nargs="*", help="key=value, of the recipe or of our run")
    given = words.parse_intermixed_args()
    if given.quick:
        given.limit, given.epochs, given.rounds, given.steps, given.batch = 448, 2, 1, 3, 64
    if given.only is not None:
        print(json.dumps(one(given)))
        return
    speed = rounds(given)
    fastest = min(THEIRS, key=lambda name: speed[name]["median"])
    learning = {
        name: measure(name, given, epochs=given.epochs, limit=given.limit, knn_too=True) for name in (OURS, fastest)
    }
    for name, found in learning.items():
        print(f"{name}: k-NN {found['knn']:.1f}, loss {found['losses'][-1]:.3f}, {found['seconds_whole_run']:.0f} s")
    recipe, _ = asked(given, Path("unused"))
    result = {
        "question": "images per second of MoCo v2 at 32 px from end to end, beside lightly's parts",
        "recipe": RECIPE.name,
        "settings": given.settings,
        "data": without_folder(open_source(given.data, limit=given.limit).description, given.data),
        "backbone": recipe.backbone.name,
        "batch_size": given.batch,
        "threads": given.threads,
        "rounds": given.rounds,
        "steps": given.steps,
        "epochs": given.epochs,
        "fastest_of_lightly": fastest,
        "speed": speed,
        "learning": learning,
    }
    if not given.quick:
        draw(learning, ROOT / "docs" / CHART)
    torch.set_num_threads(given.threads)  # the result says how many were used
    result["page"] = page(result)
    print(write("against-lightly", result, alternatives=("lightly",), quick=given.quick))


if __name__ == "__main__":
    main()
