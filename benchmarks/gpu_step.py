# SPDX-License-Identifier: Apache-2.0
"""How near is the whole step of SCE with ResNet-50 at 224 px to its encoders alone, and where does the rest go?

    python benchmarks/gpu_step.py
    python benchmarks/gpu_step.py --part toggles
    python benchmarks/gpu_step.py --device cpu --quick

Parts, each of which fits ten minutes on one GPU and writes `benchmarks/results/gpu-step-PART.json`:

`whole`: images per second of `kinfold.pretrain.pretrain` from its own log, in turns with the encoders alone (every pass
that the pairs ask for, forward, backward, optimiser) on tensors that lie on the device: once with synthetic images that
live on the device, once with the loader running from JPEG files of 500 x 375 on all cores.
`profile`: the step in parts (images, forward and loss, backward, optimiser, advance), the device waited for after each,
and the kernels that take most of the device's time.
`toggles`: the encoders alone before and after each change: channels-last, bf16, fused optimiser, compiled.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from device_rate import flops_of_image, matmul_rate, synchronise
from gpu_step_page import page
from measured import write
from PIL import Image
from torch import Tensor

from kinfold.devices import choose_device
from kinfold.optim import build_optimizer
from kinfold.pretrain import begin, pretrain
from kinfold.recipe import Recipe, load
from kinfold.training import build_learner

NAME = "sce/imagenet-1000"
PARTS = ("whole", "profile", "toggles")
DIFFERENT = 256
"""images that are drawn and encoded; more files are copies of their bytes"""
QUICK = ["backbone.name=resnet10_w32", "head.hidden=[32]", "views.augment.*.size=32", "memory.size=128"]
QUICK += ["predictor.hidden=[32]", "head.out=32", "predictor.out=32"]


def make(folder: Path, files: int, size: tuple[int, int]) -> None:
    """Write JPEG files of `size` (width, height), as large as photographs of that size are."""
    folder.mkdir(parents=True)
    source, images = np.random.default_rng(0), []
    for _ in range(min(files, DIFFERENT)):
        coarse = Image.fromarray(source.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        grain = source.integers(-12, 13, (size[1], size[0], 3), dtype=np.int16)
        written = io.BytesIO()
        Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)).save(written, "jpeg", quality=90)
        images.append(written.getvalue())
    for number in range(files):
        (folder / f"{number:06d}.jpg").write_bytes(images[number % len(images)])


def recipe_for(given: argparse.Namespace, steps: int, files: int) -> Recipe:
    """The recipe at this batch, for enough epochs of `files` images to make `steps` steps."""
    epochs = -(-steps // (files // given.batch))
    words = [*(QUICK if given.quick else []), f"batch_size={given.batch}", f"epochs={epochs}"]
    words += ["learning_rate.warmup_epochs=0", *given.settings]
    return load(NAME, [word for word in words if not is_run(word)], run={"data": "-", "out": "-"})[0]


def is_run(word: str) -> bool:
    """Whether a setting is one of the run, such as compile=true."""
    return word.split("=")[0] in {"compile", "workers", "resident", "decode"}


def passes(
    recipe: Recipe, device: torch.device, *, last: bool, bf16: bool, fused: bool, compiled: bool
) -> Callable[[], None]:
    """One step of the encoders alone, on tensors that lie on the device."""
    layout = torch.channels_last if last else torch.contiguous_format
    learner = build_learner(recipe, images=recipe.batch_size).train()
    learner.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    query, key, views = learner.encoder, learner.key_encoder, recipe.views
    if key is None:
        raise ValueError("this measurement wants a method with a key encoder")
    optimizer = build_optimizer(recipe.optimizer, query, fused=fused)
    if compiled:
        learner.compile_encoders(graphs=False)
    shape = (recipe.batch_size, recipe.images.channels)
    images = {
        view: torch.randn(*shape, *(2 * [views.augment[view].size]), device=device).contiguous(memory_format=layout)
        for view in {*views.queries, *views.keys}
    }  # [B, C, H, W] each
    half = bf16 and device.type == "cuda"

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            asked: list[Tensor] = [query(images[view]) for view in views.queries]  # [B, D] each
            with torch.no_grad():
                answers: list[Tensor] = [key(images[view]) for view in views.keys]  # [B, D] each
        together = torch.stack(answers).mean(0)  # [B, D]
        torch.stack([(1 - (q * together).sum(1)).mean() for q in asked]).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def speed_alone(recipe: Recipe, device: torch.device, steps: int, **how: bool) -> float:
    """Images per second of the encoders alone."""
    step = passes(recipe, device, **how)
    for _ in range(max(3, steps // 5)):
        step()
    synchronise(device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    synchronise(device)
    return recipe.batch_size * steps / (time.perf_counter() - began)


def tidy(device: torch.device) -> None:
    """Give back what the measurement before has taken."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def speed_whole(given: argparse.Namespace, data: Path, out: Path, *, files: int, resident: bool) -> dict[str, float]:
    """Images per second of our whole step, from its log without the first part, and the share spent waiting."""
    recipe = recipe_for(given, given.steps, files)
    each = max(1, given.steps // 10)
    words = [f"resident={str(resident).lower()}", f"device={given.device}", "probe_every=0", "checkpoint_every=100000"]
    words += [f"log_every={each}", *(word for word in given.settings if is_run(word))]
    _, run = load(NAME, words, run={"data": str(data), "out": str(out)})
    done = pretrain(recipe, run, quiet=True)
    lines = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steady = [line for line in lines if "images_per_second" in line][3:]
    return {
        "images_per_second": len(steady) / sum(1 / line["images_per_second"] for line in steady),
        "waiting_for_images": statistics.median(line["waiting"] for line in steady),
    }


def whole(given: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Our step beside the encoders alone, in turns: images on the device, and JPEG files through the loader."""
    device = choose_device(given.device)
    make(place / "square", given.files, given.square)
    make(place / "photos", given.files, (500, 375))
    compiled = any(word in given.settings for word in ("compile=true", "compile=yes"))
    rounds: list[dict[str, Any]] = []
    peak = None
    for turn in range(given.rounds):
        found: dict[str, Any] = {}
        for name, folder, resident in (("on_the_device", "square", True), ("from_files", "photos", False)):
            tidy(device)
            found[name] = speed_whole(
                given, place / folder, place / f"run-{turn}-{name}", files=given.files, resident=resident
            )
            if device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(device) / 1e6
        tidy(device)
        recipe = recipe_for(given, given.steps, given.files)
        found["alone"] = {
            "images_per_second": speed_alone(
                recipe, device, given.steps, last=True, bf16=recipe.precision == "bf16", fused=True, compiled=compiled
            )
        }
        rounds.append(found)
        print(found, flush=True)
    tidy(device)
    medians = {
        name: {key: statistics.median(each[name][key] for each in rounds) for key in rounds[0][name]}
        for name in rounds[0]
    }
    shares = {
        name: statistics.median(each[name]["images_per_second"] / each["alone"]["images_per_second"] for each in rounds)
        for name in ("on_the_device", "from_files")
    }
    flops, rate = flops_of_image(recipe, batch=4), matmul_rate(device)
    return {
        "question": "images per second of the whole step beside the encoders alone, ResNet-50 at 224 px",
        "rounds": rounds,
        "medians": medians,
        "share_of_the_encoders_alone": shares,
        "peak_gpu_memory_mb": peak,
        "flop_per_image": flops,
        "bf16_flops": rate,
        "utilisation": medians["on_the_device"]["images_per_second"] * flops / rate,
    }


def wrapped(owner: Any, name: str, label: str, spent: dict[str, float], device: torch.device) -> None:
    """Count the seconds of `owner.name(...)` under `label`, the device waited for before and after."""
    inner = getattr(owner, name)

    def timed(*args: Any, **words: Any) -> Any:
        synchronise(device)
        began = time.perf_counter()
        try:
            return inner(*args, **words)
        finally:
            synchronise(device)
            spent[label] = spent.get(label, 0.0) + time.perf_counter() - began

    setattr(owner, name, timed)


def profile(given: argparse.Namespace, place: Path) -> dict[str, Any]:
    """The step in parts with waiting between them, and the kernels that take most of the device's time."""
    make(place / "square", given.files, given.square)
    recipe = recipe_for(given, 10_000, given.files)
    words = ["resident=true", f"device={given.device}", "probe_every=0", *(w for w in given.settings if is_run(w))]
    _, run = load(NAME, words, run={"data": str(place / "square"), "out": str(place / "run")})
    training = begin(recipe, run, quiet=True)
    device = training.device
    if run.compile:
        training.learner.compile_encoders(graphs=run.compile == "graphs")
    epochs = ((epoch, batch) for epoch in range(recipe.epochs) for batch in training.loader.epoch(epoch))

    def steps(count: int) -> Iterator[None]:
        for _ in range(count):
            epoch, batch = next(epochs)
            training.take_step(batch, epoch)
            yield

    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    list(steps(5))
    synchronise(device)
    began = time.perf_counter()
    list(steps(given.steps))
    synchronise(device)
    undisturbed = (time.perf_counter() - began) / given.steps
    with torch.profiler.profile(activities=kinds) as seen:
        list(steps(3))
        synchronise(device)
    spent: dict[str, float] = {}
    wrapped(training.learner, "forward", "forward and loss", spent, device)
    wrapped(training.optimizer, "step", "optimiser", spent, device)
    wrapped(training.learner, "advance", "advance (momentum, memory)", spent, device)
    wrapped(training, "take_step", "whole step", spent, device)
    images = 0.0
    for _ in range(given.steps):
        synchronise(device)
        began = time.perf_counter()
        epoch, batch = next(epochs)
        synchronise(device)
        images += time.perf_counter() - began
        training.take_step(batch, epoch)
    parts = {name: seconds for name, seconds in spent.items() if name != "whole step"}
    parts = {"images (choice, crop, colour)": images, **parts}
    parts["backward and the rest"] = images + spent["whole step"] - sum(parts.values())
    on = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    rows = sorted(seen.key_averages(), key=lambda row: getattr(row, on), reverse=True)
    total = sum(getattr(row, on) for row in rows)
    return {
        "question": "where the time of a step goes, ResNet-50 at 224 px",
        "undisturbed_step_seconds": undisturbed,
        "parts_seconds": {name: seconds / given.steps for name, seconds in parts.items()},
        "kernels": [
            {"name": row.key[:100], "share": getattr(row, on) / total, "calls": row.count / 3} for row in rows[:15]
        ],
    }


def toggles(given: argparse.Namespace, place: Path) -> dict[str, Any]:
    """The encoders alone before and after each change, each on top of the one before."""
    device, recipe = choose_device(given.device), recipe_for(given, given.steps, given.files)
    plain = {"last": False, "bf16": False, "fused": False, "compiled": False}
    found: dict[str, float] = {}
    for name, change in (
        ("fp32, plain", {}),
        ("+ bf16", {"bf16": True}),
        ("+ channels-last", {"last": True}),
        ("+ fused optimiser", {"fused": True}),
        ("+ compiled", {"compiled": True}),
    ):
        plain |= change
        tidy(device)
        found[name] = speed_alone(recipe, device, given.steps, **plain)
        print(name, round(found[name], 1), flush=True)
    return {"question": "what each change is worth to the encoders, ResNet-50 at 224 px", "images_per_second": found}


def main() -> None:
    """Read the words, measure the parts that were asked for, write each."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--part", choices=PARTS, action="append", help="all of them if not given")
    words.add_argument("--device", default="cuda")
    words.add_argument("--batch", type=int, default=256)
    words.add_argument("--steps", type=int, default=60, help="of each measurement")
    words.add_argument("--rounds", type=int, default=3)
    words.add_argument("--files", type=int, default=4096, help="images that are made")
    words.add_argument("--quick", action="store_true", help="a small network at 32 px; prints, and writes nothing")
    words.add_argument("settings", nargs="*", help="key=value, of the recipe or the run: compile=true workers=16")
    given = words.parse_intermixed_args()
    given.square = (256, 256)
    if given.quick:
        given.batch, given.steps, given.rounds, given.files, given.square = 8, 12, 1, 32, (40, 40)
    recipe = recipe_for(given, given.steps, given.files)
    about = {
        "recipe": NAME,
        "settings": given.settings,
        "backbone": recipe.backbone.name,
        "size": recipe.views.augment[0].size,
        "batch_size": given.batch,
        "steps": given.steps,
        "device": given.device,
        "machine_cores": os.cpu_count(),
    }
    measures = {"whole": whole, "profile": profile, "toggles": toggles}
    for part in given.part or PARTS:
        with tempfile.TemporaryDirectory() as place:
            tidy(choose_device(given.device))
            result = {**measures[part](given, Path(place)), **about}
        result["page"] = page(part, result)
        print(json.dumps(result, indent=2) if given.quick else write(f"gpu-step-{part}", result), flush=True)


if __name__ == "__main__":
    main()
