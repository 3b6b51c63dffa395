# SPDX-License-Identifier: Apache-2.0
"""What does the loop cost? Images per second of `pretrain` beside a bare loop over the same encoders.

    python benchmarks/loop_overhead.py --pairs 3 --steps 12

Two processes take turns, so that both see the same machine: one runs `kinfold.pretrain.pretrain` (loader, augmentation,
method, memory, key encoder, log), the other only the query encoder forward and backward, the key encoder forward and
the optimiser's step, on tensors that lie ready. Both begin with the weights of the same recipe (MoCo's CIFAR-10
notebook, ResNet-18, 32 px, on generated images). The first steps of each are left out. Writes medians over the pairs,
and the peak memory (resident set) of each process, to `benchmarks/results/loop-overhead.json`.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measured import synchronise, write
from PIL import Image

from kinfold.devices import choose_device, keep_freed_memory
from kinfold.optim import build_optimizer
from kinfold.pretrain import pretrain
from kinfold.recipe import Recipe, load
from kinfold.training import build_learner

WARM_UP = 3
"""steps that are left out at the beginning of each measurement"""


def make_images(folder: Path, count: int, *, size: int = 32) -> None:
    """Write `count` PNG images of noise, as many as one epoch takes."""
    folder.mkdir(parents=True)
    source = np.random.default_rng(0)
    for number in range(count):
        pixels = source.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:05d}.png")


def measure_kinfold(recipe: Recipe, images: Path, out: Path, device: str) -> dict[str, float]:
    """Images per second of our loop after the warm-up, from its own log."""
    _, run = load(
        "moco/cifar10-notebook-asymmetric",
        ["log_every=1", "probe_every=0", "checkpoint_every=1000", f"device={device}"],
        run={"data": str(images), "out": str(out)},
    )
    pretrain(recipe, run, quiet=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steady = [line for line in lines if "images_per_second" in line][WARM_UP:]
    seconds = sum(recipe.batch_size / line["images_per_second"] for line in steady)
    waited = sum(line["waiting"] * recipe.batch_size / line["images_per_second"] for line in steady)
    return {"images_per_second": recipe.batch_size * len(steady) / seconds, "waiting_for_data": waited / seconds}


def measure_bare(recipe: Recipe, steps: int, device: str) -> dict[str, float]:
    """Images per second of the same encoders and optimiser in a loop that does nothing else."""
    where = choose_device(device)
    if where.type == "cpu":
        keep_freed_memory()  # as pretrain does
    learner = build_learner(recipe, images=recipe.batch_size).train()
    learner.to(device=where, memory_format=torch.channels_last)  # type: ignore[call-overload]
    query_encoder, key_encoder = learner.encoder, learner.key_encoder
    assert key_encoder is not None, "this measurement wants a method with a key encoder"
    del learner  # with its memory: a bare loop has none
    optimizer = build_optimizer(recipe.optimizer, query_encoder)
    size = recipe.views.augment[0].size
    shape = (recipe.batch_size, recipe.images.channels, size, size)
    asks, answers = (
        torch.randn(shape, device=where).contiguous(memory_format=torch.channels_last) for _ in range(2)
    )  # [B, C, H, W] each
    half = recipe.precision == "bf16" and where.type == "cuda" and torch.cuda.is_bf16_supported()
    began = 0.0
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            synchronise(where)
            began = time.perf_counter()
        with torch.autocast(where.type, dtype=torch.bfloat16, enabled=half):
            q = query_encoder(asks)  # [B, D]
            with torch.no_grad():
                k = key_encoder(answers)  # [B, D]
        (1 - (q * k).sum(1)).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    synchronise(where)
    return {"images_per_second": recipe.batch_size * steps / (time.perf_counter() - began)}


def peak_memory(device: str) -> dict[str, float]:
    """Peak resident set of this process in MB, and of the CUDA allocator where there is one."""
    # Linux counts kilobytes, macOS bytes.
    unit = 1e6 if sys.platform == "darwin" else 1e3
    found = {"peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)}
    if choose_device(device).type == "cuda":
        found["peak_gpu_memory_mb"] = round(torch.cuda.max_memory_allocated() / 1e6, 1)
    return found


def one_measurement(which: str, given: argparse.Namespace) -> dict[str, float]:
    """Measure one loop in a process of its own."""
    words = [sys.executable, __file__, "--only", which, "--images", given.images, "--backbone", given.backbone]
    words += ["--batch", str(given.batch), "--steps", str(given.steps), "--device", given.device]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """Take turns, and give the medians of both loops with all single measurements."""
    pairs = []
    for number in range(given.pairs):
        # Who goes first changes, so that a machine that warms up favours neither.
        order = ("kinfold", "bare") if number % 2 == 0 else ("bare", "kinfold")
        pairs.append({which: one_measurement(which, given) for which in order})
        print(pairs[-1], flush=True)
    medians = {
        which: {name: round(statistics.median(pair[which][name] for pair in pairs), 3) for name in pairs[0][which]}
        for which in ("kinfold", "bare")
    }
    ratios = [pair["kinfold"]["images_per_second"] / pair["bare"]["images_per_second"] for pair in pairs]
    return {"medians": medians, "speed_share": round(statistics.median(ratios), 4), "pairs": pairs}


def page(result: dict[str, Any]) -> dict[str, Any]:
    """What a reader should see."""
    medians = result["medians"]
    names = {"kinfold": "`pretrain`, all included", "bare": "encoders alone"}
    rows = [
        [title, f"{medians[name]['images_per_second']:.1f}", f"{medians[name]['peak_memory_mb']:,.0f} MB"]
        for name, title in names.items()
    ]
    return {
        "title": "What the loop costs",
        "text": [
            f"`pretrain` beside {result['bare']}: {result['backbone']} at 32 px, batch {result['batch_size']}, "
            f"{len(result['pairs'])} pairs of processes in turns."
        ],
        "table": {"columns": ["loop", "images/s", "peak memory"], "rows": rows},
        "summary": [
            {
                "question": f"images/s of `pretrain`, {result['backbone']} at 32 px",
                "ours": rows[0][1],
                "alternative": f"{rows[1][1]} (encoders alone)",
                "ratio": f"{100 * result['speed_share']:.0f} %",
            }
        ],
    }


def main() -> None:
    """Read the words; measure one loop, or compare both."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--pairs", type=int, default=3)
    words.add_argument("--steps", type=int, default=12, help=f"measured steps, after {WARM_UP} that do not count")
    words.add_argument("--batch", type=int, default=32)
    words.add_argument("--backbone", default="resnet18")
    words.add_argument("--device", default="auto")
    words.add_argument("--name", default="loop-overhead", help="name of the result file")
    words.add_argument("--quick", action="store_true", help="a small network, a few steps; prints, and writes nothing")
    words.add_argument("--only", choices=["kinfold", "bare"], help=argparse.SUPPRESS)
    words.add_argument("--images", default="", help=argparse.SUPPRESS)
    given = words.parse_args()
    if given.quick:
        given.backbone, given.batch, given.steps, given.pairs = "resnet10_w32", 16, 2, 1
    recipe, _ = load(
        "moco/cifar10-notebook-asymmetric",
        [f"backbone.name={given.backbone}", f"batch_size={given.batch}", "epochs=1"],
        run={"data": "-", "out": "-"},
    )
    with tempfile.TemporaryDirectory() as folder:
        if given.only is not None:
            if given.only == "kinfold":
                found = measure_kinfold(recipe, Path(given.images), Path(folder) / "run", given.device)
            else:
                found = measure_bare(recipe, given.steps, given.device)
            print(json.dumps({**found, **peak_memory(given.device)}))
            return
        given.images = str(Path(folder) / "images")
        make_images(Path(given.images), (WARM_UP + given.steps) * given.batch)
        result = compare(given)
    result = {
        "question": "images per second and peak memory of the loop beside a bare loop over the same encoders",
        "backbone": given.backbone,
        "recipe": "moco/cifar10-notebook-asymmetric",
        "batch_size": given.batch,
        "steps": given.steps,
        "device": given.device,
        "bare": "query forward and backward, key forward, optimiser step, on prepared tensors",
        **result,
    }
    print(write(given.name, {**result, "page": page(result)}, quick=given.quick))


if __name__ == "__main__":
    main()
