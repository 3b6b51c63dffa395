# SPDX-License-Identifier: Apache-2.0
"""One step of training in parts, with and without each change that made it faster; for benchmarks/gpu_step.py."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from measured import synchronise
from torch import Tensor, nn

from kinfold.data.loader import Batch
from kinfold.optim import build_optimizer
from kinfold.pretrain import begin
from kinfold.recipe import Recipe, Run
from kinfold.training import Training

CHANGES = {
    "plain": "fp32 weights and activations, rows of pixels by channel, optimiser one parameter after the other",
    "bf16": "autocast to bf16",
    "channels-last": "channels-last weights and images",
    "fused": "the optimiser updates all parameters in a few kernels",
    "compiled": "encoders and views compiled",
}
"""each on top of those above it; kinfold's own way is all but the last, and `compile=true` all of them"""


def changed_step(recipe: Recipe, run: Run, on: set[str], *, steps: int) -> dict[str, Any]:
    """Seconds of a step of a run that has the changes `on`: undisturbed, in parts, and by kernels.

    The recipe says whether there is bf16, and the run whether it is compiled; the other two are done here.
    """
    training = begin(recipe, run, quiet=True)
    device, learner = training.device, training.learner
    if "channels-last" not in on:
        learner.to(memory_format=torch.contiguous_format)
        for encoder in (learner.encoder, learner.key_encoder):
            if encoder is not None:
                encoder.register_forward_pre_hook(in_rows)
    if "fused" not in on:
        training.optimizer = build_optimizer(recipe.optimizer, learner.encoder, fused=False)
    if run.compile:
        learner.compile_encoders(graphs=run.compile == "graphs")
    batches = all_batches(training)
    take(training, batches, 5)
    synchronise(device)
    began = time.perf_counter()
    take(training, batches, steps)
    synchronise(device)
    undisturbed = (time.perf_counter() - began) / steps
    return {
        "images_per_second": recipe.batch_size / undisturbed,
        "undisturbed_step_seconds": undisturbed,
        "kernels": kernels(training, batches),
        "parts_seconds": parts(training, batches, steps),
    }


def in_rows(_: nn.Module, images: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The images in torch's ordinary memory format, which `take_step` does not leave them in."""
    return tuple(each.contiguous() for each in images)


def all_batches(training: Training) -> Iterator[tuple[int, Batch]]:
    """Epoch and batch, as long as the recipe has epochs."""
    return ((epoch, batch) for epoch in range(training.recipe.epochs) for batch in training.loader.epoch(epoch))


def take(training: Training, batches: Iterator[tuple[int, Batch]], count: int) -> None:
    """Take `count` steps."""
    for _ in range(count):
        epoch, batch = next(batches)
        training.take_step(batch, epoch)


def kernels(training: Training, batches: Iterator[tuple[int, Batch]], *, steps: int = 3) -> list[dict[str, Any]]:
    """The kernels (on a CPU: operations) that take most time, with their share and how often a step calls them."""
    on_device = training.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if on_device:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as seen:
        take(training, batches, steps)
        synchronise(training.device)
    measure = "self_device_time_total" if on_device else "self_cpu_time_total"
    # What the host calls is given its kernels' time as well, and a range that a name was given to holds others.
    rows = [
        row
        for row in seen.key_averages()
        if not on_device or (row.device_type.name != "CPU" and not getattr(row, "is_user_annotation", False))
    ]
    total = sum(getattr(row, measure) for row in rows) or 1.0  # none, where the device's profiler does not work
    rows.sort(key=lambda row: getattr(row, measure), reverse=True)
    return [
        {"name": row.key[:100], "share": getattr(row, measure) / total, "calls": row.count / steps} for row in rows[:15]
    ]


def parts(training: Training, batches: Iterator[tuple[int, Batch]], steps: int) -> dict[str, float]:
    """Seconds of each part of a step; the device is waited for before and after each, which takes time of its own."""
    device, spent = training.device, dict[str, float]()
    wrap(training.learner, "keys", "keys", spent, device)
    wrap(training.learner, "forward", "forward", spent, device)
    wrap(training.optimizer, "step", "optimiser", spent, device)
    wrap(training.learner, "advance", "momentum and memory", spent, device)
    wrap(training, "take_step", "step", spent, device)
    images = 0.0
    for _ in range(steps):
        synchronise(device)
        began = time.perf_counter()
        epoch, batch = next(batches)
        synchronise(device)
        images += time.perf_counter() - began
        training.take_step(batch, epoch)
    keys = spent.get("keys", 0.0)
    found = {
        "views": images,
        "keys": keys,
        "queries and loss": spent["forward"] - keys,
        "backward and the rest": spent["step"] - spent["forward"] - spent["optimiser"] - spent["momentum and memory"],
        "optimiser": spent["optimiser"],
        "momentum and memory": spent["momentum and memory"],
    }
    return {name: seconds / steps for name, seconds in found.items()}


def wrap(owner: Any, name: str, label: str, spent: dict[str, float], device: torch.device) -> None:
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
