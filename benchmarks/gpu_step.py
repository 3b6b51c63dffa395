# SPDX-License-Identifier: Apache-2.0
"""How near is the whole step of SCE with ResNet-50 at 224 px to its encoders alone, and where does the rest go?

    python benchmarks/gpu_step.py
    python benchmarks/gpu_step.py --part changes
    python benchmarks/gpu_step.py --part whole compile=true
    python benchmarks/gpu_step.py --device cpu --quick

Parts, each of which fits ten minutes on one GPU and writes `benchmarks/results/gpu-step-PART.json`, again after each
measurement: what was measured before something failed or was stopped is there.

`whole`: images per second of `kinfold.pretrain.pretrain` from its own log, beside a forward and backward of the same
model on tensors that lie on the device, in turns: once with images that live on the device, once with the loader
running from JPEG files of 500 x 375 on all cores. Workers make batches ahead while the first steps are slow, so from
files there are 200 steps at least, and the first ones, three times as many as the workers can have ready, do not count.
`changes`: the whole step in parts, the device waited for after each, and the kernels that take most of its time, before
and after each change: bf16, channels-last, fused optimiser, compiled.

Photographs are generated, as rough as real ones at every scale and as large as ImageNet's (about 110 kB). Needs what
kinfold needs but for `datasets`, and no network.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from device_rate import flops_of_image, matmul_rate
from gpu_step_changes import CHANGES, changed_step
from gpu_step_page import page
from measured import synchronise, write
from photographs import photo
from torch import Tensor

from kinfold.devices import choose_device, choose_workers
from kinfold.pretrain import pretrain
from kinfold.recipe import Recipe, Run, load
from kinfold.training import build_learner

NAME = "sce/imagenet-1000"
PHOTO = (375, 500)
"""height and width of most of ImageNet's photographs"""
DIFFERENT = 256
"""photographs that are drawn and encoded; more files are copies of their bytes"""
QUICK = ["backbone.name=resnet10_w32", "head.hidden=[32]", "views.augment.*.size=32", "memory.size=128"]
QUICK += ["predictor.hidden=[32]", "head.out=32", "predictor.out=32"]
FROM_FILES = 200
"""steps from files at least"""
AHEAD = 3 * 2
"""steps from files a worker that are left out: three times the two batches that each may have ready"""
RUN = {"compile", "workers", "resident", "decode"}
"""settings that are the run's; all others are the recipe's"""

Save = Callable[[dict[str, Any]], None]


def make(folder: Path, files: int, size: tuple[int, int]) -> float:
    """Write photographs of `size` (height, width); returns how many kB each has on average."""
    folder.mkdir(parents=True)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        images = list(threads.map(lambda seed: photo(seed, *size), range(min(files, DIFFERENT))))
    for number in range(files):
        (folder / f"{number:06d}.jpg").write_bytes(images[number % len(images)])
    return sum(len(images[number % len(images)]) for number in range(files)) / files / 1e3


def read(given: argparse.Namespace, steps: int, *words: str, data: Path | str, out: Path | str) -> tuple[Recipe, Run]:
    """The recipe at this batch, for enough epochs of the files to make `steps` steps, and its run."""
    epochs = -(-steps // (given.files // given.batch))
    settings = [*(QUICK if given.quick else []), f"batch_size={given.batch}", f"epochs={epochs}"]
    settings += ["learning_rate.warmup_epochs=0", "probe_every=0", "checkpoint_every=100000", *given.settings, *words]
    return load(NAME, settings, run={"data": str(data), "out": str(out), "device": given.device})


def passes(recipe: Recipe, device: torch.device, *, compiled: bool) -> Callable[[], None]:
    """Forward and backward of the recipe's own model, as plain as torch has it, on tensors that lie on the device.

    Every view that asks goes through the query encoder, every view that answers through the key encoder without a
    gradient. No optimiser, no memory, no momentum; in place of the method's loss a product of q and k.
    """
    learner = build_learner(recipe, images=recipe.batch_size).train()
    learner.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    query, key, views = learner.encoder, learner.key_encoder, recipe.views
    if key is None:
        raise ValueError("this measurement wants a method with a key encoder")
    if compiled:
        learner.compile_encoders(graphs=False)
    images = {
        view: torch.randn(
            recipe.batch_size, recipe.images.channels, *(2 * [views.augment[view].size]), device=device
        ).contiguous(memory_format=torch.channels_last)
        for view in {*views.queries, *views.keys}
    }  # [B, C, H, W] each
    half = recipe.precision == "bf16" and device.type == "cuda"

    def step() -> None:
        query.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            asked: list[Tensor] = [query(images[view]) for view in views.queries]  # [B, D] each
            with torch.no_grad():
                answers: list[Tensor] = [key(images[view]) for view in views.keys]  # [B, D] each
        together = torch.stack(answers).mean(0)  # [B, D]
        torch.autograd.backward(torch.stack([(1 - (q * together).sum(1)).mean() for q in asked]).sum())

    return step


def tidy(device: torch.device) -> None:
    """Give back what the measurement before has taken."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> dict[str, float]:
    """MB of the device that were in use at most since `tidy`; nothing where torch does not count them."""
    return {"peak_gpu_memory_mb": torch.cuda.max_memory_allocated(device) / 1e6} if device.type == "cuda" else {}


def speed_alone(given: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Images per second of the model's forward and backward alone."""
    recipe, run = read(given, given.steps, data="-", out="-")
    step = passes(recipe, device, compiled=bool(run.compile))
    for _ in range(max(3, given.steps // 5)):
        step()
    synchronise(device)
    began = time.perf_counter()
    for _ in range(given.steps):
        step()
    synchronise(device)
    return {"images_per_second": given.batch * given.steps / (time.perf_counter() - began), **peak(device)}


def stretch(given: argparse.Namespace, *, resident: bool) -> tuple[int, int]:
    """How many steps a measurement of the whole step takes, and how many of the first ones are left out."""
    left_out = 3 * max(1, given.steps // 10)
    if resident or given.quick:
        return given.steps, left_out
    _, run = read(given, given.steps, data="-", out="-")
    left_out = max(left_out, AHEAD * choose_workers(run.workers))
    return max(FROM_FILES, left_out + given.steps), left_out


def speed_whole(
    given: argparse.Namespace, device: torch.device, data: Path, out: Path, *, resident: bool
) -> dict[str, float]:
    """Images per second of our whole step, from its log without the first part, and the share spent waiting."""
    steps, left_out = stretch(given, resident=resident)
    every = max(1, given.steps // 10)
    words = [f"resident={str(resident).lower()}", f"log_every={every}"]
    recipe, run = read(given, steps, *words, data=data, out=out)
    done = pretrain(recipe, run, quiet=True)
    if done.step < done.steps:  # a signal: what is there of it is no whole measurement, and nothing may follow
        sys.exit(f"stopped at step {done.step} of {done.steps}")
    lines = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    # A line is about the steps since the one before it.
    steady = [line for line in lines if "images_per_second" in line and line["step"] >= left_out + every]
    first = steady[0]["step"] - every
    return {
        "images_per_second": len(steady) / sum(1 / line["images_per_second"] for line in steady),
        "waiting_for_images": statistics.median(line["waiting"] for line in steady),
        "steps": done.steps - first,
        "steps_left_out": first,
        **peak(device),
    }


def in_short(error: Exception) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def whole(given: argparse.Namespace, place: Path, save: Save) -> None:
    """Our step beside its encoders alone, in turns: images on the device, and JPEG files through the loader."""
    device = choose_device(given.device)
    make(place / "square", given.files, given.square)
    kilobytes = make(place / "photos", given.files, PHOTO)
    recipe, _ = read(given, given.steps, data="-", out="-")
    facts = {
        "question": "images per second of the whole step beside a forward and backward of the same model",
        "kilobytes_of_a_photograph": kilobytes,
        "batch_norm_splits": [recipe.batch_norm.query_splits, recipe.batch_norm.key_splits],
        "flop_per_image": flops_of_image(recipe, batch=4),
        "bf16_flops": matmul_rate(device),
    }
    contenders: dict[str, Callable[[Path], dict[str, float]]] = {
        "alone": lambda out: speed_alone(given, device),
        "on_the_device": lambda out: speed_whole(given, device, place / "square", out, resident=True),
        "from_files": lambda out: speed_whole(given, device, place / "photos", out, resident=False),
    }
    rounds: list[dict[str, dict[str, float]]] = []
    failed: dict[str, str] = {}
    names = list(contenders)
    for turn in range(given.rounds):
        rounds.append({})
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if name in failed:
                continue
            tidy(device)
            try:
                rounds[-1][name] = contenders[name](place / f"run-{turn}-{name}")
            except Exception as error:  # out of memory in one, or whatever it was, leaves the others
                traceback.print_exc()
                failed[name] = in_short(error)
            print(turn, name, rounds[-1].get(name, failed.get(name)), flush=True)
            if any(rounds):
                save({**facts, **summed_up(rounds, facts), "rounds": rounds, "failed": failed})
    tidy(device)
    if failed:
        raise RuntimeError(f"not measured: {failed}")


def summed_up(rounds: list[dict[str, dict[str, float]]], facts: dict[str, Any]) -> dict[str, Any]:
    """Medians over the rounds, the shares of the encoders alone, and how much of the device's rate is used."""
    names = dict.fromkeys(name for each in rounds for name in each)
    medians = {}
    for name in names:
        found = [each[name] for each in rounds if name in each]
        medians[name] = {key: statistics.median(one[key] for one in found) for key in found[0]}
    shares = {}
    for name in names:
        both = [each for each in rounds if name in each and "alone" in each]
        if name != "alone" and both:
            shares[name] = statistics.median(
                each[name]["images_per_second"] / each["alone"]["images_per_second"] for each in both
            )
    used = {
        name: found["images_per_second"] * facts["flop_per_image"] / facts["bf16_flops"]
        for name, found in medians.items()
    }
    return {"medians": medians, "share_of_the_encoders_alone": shares, "utilisation": used}


def changes(given: argparse.Namespace, place: Path, save: Save) -> None:
    """The whole step in parts, before and after each change, each on top of those before it."""
    make(place / "square", given.files, given.square)
    device = choose_device(given.device)
    steps: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for number, name in enumerate(CHANGES):
        on = set(list(CHANGES)[: number + 1])
        words = ["resident=true", *(["precision=fp32"] if "bf16" not in on else [])]
        words.append(f"compile={str('compiled' in on).lower()}")
        recipe, run = read(given, 10_000, *words, data=place / "square", out=place / f"run-{number}")
        tidy(device)
        try:
            steps[name] = {**changed_step(recipe, run, on, steps=max(6, given.steps // 3)), **peak(device)}
        except Exception as error:
            traceback.print_exc()
            failed[name] = in_short(error)
        print(name, steps[name]["parts_seconds"] if name in steps else failed[name], flush=True)
        if steps:
            save({"question": "the step in parts before and after each change", "changes": steps, "failed": failed})
    tidy(device)
    if failed:
        raise RuntimeError(f"not measured: {failed}")


PARTS: dict[str, Callable[[argparse.Namespace, Path, Save], None]] = {"whole": whole, "changes": changes}


def main() -> None:
    """Read the words, measure the parts that were asked for, write each as far as it went."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--part", choices=list(PARTS), action="append", help="all of them if not given")
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
    recipe, run = read(given, given.steps, data="-", out="-")
    about = {
        "recipe": NAME,
        "settings": given.settings,
        "backbone": recipe.backbone.name,
        "size": recipe.views.augment[0].size,
        "batch_size": given.batch,
        "files": given.files,
        "steps": given.steps,
        "precision": recipe.precision,
        "compile": run.compile,
        "device": given.device,
        "machine_cores": os.cpu_count(),
    }
    unfinished = []
    for part in given.part or PARTS:
        written: dict[str, Any] = {}

        def save(found: dict[str, Any], part: str = part, written: dict[str, Any] = written) -> None:
            written.update({**found, **about})
            written["page"] = page(written)
            if not given.quick:
                write(f"gpu-step-{part}", written)

        with tempfile.TemporaryDirectory() as place:
            os.environ["KINFOLD_CACHE"] = f"{place}/cache"  # made-up images are of no use to later runs
            try:
                PARTS[part](given, Path(place), save)
            except Exception:  # whatever it was, the other part can be measured
                traceback.print_exc()
                unfinished.append(part)
        print(
            write(f"gpu-step-{part}", written, quick=True) if given.quick else f"{part}: {sorted(written)}", flush=True
        )
    if unfinished:
        sys.exit(f"not measured to the end: {', '.join(unfinished)}")


if __name__ == "__main__":
    main()
