# SPDX-License-Identifier: Apache-2.0
"""The loop: forward, backward, step, advance, in this order and in plain sight.

Everything random is a function of its address, schedules are functions of the step, and all state is in the learner and
the optimiser. So a checkpoint of those two and the step number is enough to go on bit for bit from the middle of an
epoch.
"""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kinfold import __version__, checkpoint, distributed
from kinfold.data.loader import Batch, Loader
from kinfold.data.sources import Source, open_source
from kinfold.encoders import Encoder, build_backbone, build_head, load_backbone_weights
from kinfold.errors import UserError
from kinfold.export import export_backbone
from kinfold.interrupt import Interrupt
from kinfold.learner import Learner
from kinfold.log import Console, MetricsLog, Sink
from kinfold.memory import Memo, build_memory
from kinfold.optim import build_optimizer, key_momentum, learning_rate
from kinfold.probes import Probes
from kinfold.randomness import STEP, WEIGHTS, seed_of
from kinfold.recipe import Recipe, Run, plain, to_yaml
from kinfold.run_folder import open_run_folder, write_encoder, write_summary


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a call of `pretrain` did."""

    folder: Path
    step: int
    """steps taken since the very beginning"""
    steps: int
    """steps that the recipe asks for"""
    signal: int | None
    """the signal that stopped the run early, if one did"""
    seconds: float
    measures: dict[str, float] = field(default_factory=dict)
    """the last probe"""
    bad: dict[str, str] = field(default_factory=dict)
    """images that could not be read: name and reason"""


def build_learner(recipe: Recipe, *, images: int, weights: Path | None = None) -> Learner:
    """Make the learner that a recipe describes, for a set of `images`; its first state is a function of the seed.

    `weights` is a local file for the backbone. Leaves torch's global random state as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(WEIGHTS, recipe.seed))
        backbone = build_backbone(recipe.backbone, recipe.images.channels)
        if weights is not None:
            load_backbone_weights(backbone, weights)
        head = build_head(recipe.head, int(backbone.num_features))  # type: ignore[arg-type]
        predictor = None if recipe.predictor is None else build_head(recipe.predictor, recipe.head.out)
        return Learner(
            method=recipe.method,
            views=recipe.views,
            encoder=Encoder(backbone, head, predictor),
            memory=build_memory(recipe.memory, images=images, dimension=recipe.head.out),
            batch_norm=recipe.batch_norm,
            seed=recipe.seed,
        )


def pretrain(recipe: Recipe, run: Run, *, quiet: bool = False) -> Outcome:
    """Train `recipe` on the images that `run` names until its last epoch, or go on where the folder stopped.

    Raises `UserError` for anything given that cannot work. SIGTERM and Ctrl-C end it after the step under way, with a
    checkpoint.
    """
    began = time.monotonic()
    device = choose_device(run.device)
    distributed.start(device.type)
    folder = open_run_folder(recipe, run, writes=distributed.is_main())
    source = open_source(run.data, split=run.split, limit=run.limit)
    loader = Loader(
        source,
        recipe.views,
        channels=recipe.images.channels,
        mean=recipe.images.mean,
        std=recipe.images.std,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        workers=choose_workers(run.workers),
        device=str(device),
        rank=distributed.rank(),
        world=distributed.world(),
        resident=run.resident,
        drop_last=recipe.drop_last,
    )
    learner = build_learner(recipe, images=len(source), weights=Path(run.weights) if run.weights else None)
    learner.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    learner.train()
    optimizer = build_optimizer(recipe.optimizer, learner.encoder)
    probes = Probes(recipe, run, source, device)
    steps = loader.steps_per_epoch * recipe.epochs

    found = checkpoint.load_latest(folder)
    step = 0 if found is None else restore(found, learner, optimizer, source)
    console = Console(steps, step, quiet=quiet)
    console.say(f"{source.description}; {steps} steps of {recipe.batch_size} images on {device}, into {folder}")
    if found is not None:
        for broken in found.skipped:
            console.warn(f"{broken}; the checkpoint before it is used")
        console.say(f"resuming from {found.path} at step {step}")
    if run.compile:
        learner.encoder.compile()
        if learner.key_encoder is not None:
            learner.key_encoder.compile()
    wrapped: nn.Module = learner
    if distributed.world() > 1:
        # Buffers are equal on all ranks by construction: sending rank 0's would cost time and hide a fault.
        wrapped = DistributedDataParallel(learner, broadcast_buffers=False)
    half = recipe.precision == "bf16" and device.type == "cuda" and torch.cuda.is_bf16_supported()

    log = open_log(folder, run, step) if distributed.is_main() else None
    measures: dict[str, float] = {}
    batch: Batch | None = None

    def probe(epoch: int) -> None:
        """Look at the encoder as it is now; the main process does, the others wait."""
        if log is not None:
            measures.update(probes.measure(learner, batch, epoch))
            log.write(step, epoch, **{f"probe/{name}": value for name, value in measures.items()})
            console.say(f"epoch {epoch}: " + ", ".join(f"{k} {v:.4g}" for k, v in measures.items()))
        distributed.wait_for_all()

    if step == 0 and run.probe_every:
        probe(0)
    meter = Meter(loader, recipe.batch_size)
    with console, Interrupt() as interrupt:
        for epoch in range(step // loader.steps_per_epoch, recipe.epochs):
            for batch in loader.epoch(epoch, step % loader.steps_per_epoch):
                losses = take_step(
                    wrapped,
                    learner,
                    optimizer,
                    batch,
                    recipe,
                    epoch=epoch,
                    rate=learning_rate(
                        recipe.learning_rate,
                        step=step,
                        steps_per_epoch=loader.steps_per_epoch,
                        epochs=recipe.epochs,
                        batch_size=recipe.batch_size,
                    ),
                    momentum=key_momentum(recipe.key_momentum, step=step, steps=steps),
                    step=step,
                    half=half,
                    where=(folder, source),
                )
                step += 1
                meter.count(len(batch.index) * distributed.world())
                stopping = False
                if step % run.log_every == 0 or step == steps:
                    terms = shown(losses)
                    speed, waiting = meter.read()
                    if log is not None:
                        rate = optimizer.param_groups[0]["lr"]
                        log.write(
                            step, epoch, **terms, rate=rate, images_per_second=speed, waiting=waiting,
                            unreadable=len(loader.bad),
                        )  # fmt: skip
                    console.update(step, epoch, speed, terms, waiting)
                    stopping = distributed.any_rank(interrupt.signal is not None, device)
                elif distributed.world() == 1:
                    stopping = interrupt.signal is not None
                ended = step % loader.steps_per_epoch == 0
                due = ended and (epoch + 1) % run.checkpoint_every == 0
                due = due or (run.checkpoint_steps is not None and step % run.checkpoint_steps == 0)
                if due or stopping or step == steps:
                    save(folder, learner, optimizer, source, recipe, step)
                    distributed.wait_for_all()
                if stopping and step < steps:
                    return finish(recipe, folder, learner, source, loader, step, steps, interrupt.signal, began, measures, device)
            if epoch + 1 == recipe.epochs or (run.probe_every and (epoch + 1) % run.probe_every == 0):
                probe(epoch + 1)
                meter.read()
        if batch is None and not measures:  # a finished run, started again
            probe(recipe.epochs)
    return finish(recipe, folder, learner, source, loader, step, steps, None, began, measures, device)


def take_step(
    wrapped: nn.Module,
    learner: Learner,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    recipe: Recipe,
    *,
    epoch: int,
    rate: float,
    momentum: float,
    step: int,
    half: bool,
    where: tuple[Path, Source],
) -> dict[str, Tensor]:
    """Take one optimiser step on one batch, in `recipe.accumulate` parts, and let the learner advance.

    Returns the terms of the loss, scalars averaged over this rank's batch.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    # Whatever draws from torch's own generators (dropout, stochastic depth) does so as a function of the step.
    torch.manual_seed(seed_of(STEP, recipe.seed, step, distributed.rank()))
    optimizer.zero_grad(set_to_none=True)
    total: dict[str, Tensor] = {}
    memos: list[list[Memo]] = []
    parts = list(split(batch, recipe.accumulate))
    for number, part in enumerate(parts):
        if isinstance(wrapped, DistributedDataParallel):
            wrapped.require_backward_grad_sync = number == len(parts) - 1
        share = len(part.index) / len(batch.index)
        views = [view.contiguous(memory_format=torch.channels_last) for view in part.views]
        with torch.autocast(part.index.device.type, dtype=torch.bfloat16, enabled=half):
            losses, memo = wrapped(views, part.index, epoch)
        loss = share * torch.stack(list(losses.values())).sum()
        if not torch.isfinite(loss):
            raise UserError(not_finite(losses, part, step, *where))
        loss.backward()
        memos.append(memo)
        for name, value in losses.items():
            total[name] = total.get(name, 0.0) + share * value.detach()
    optimizer.step()
    learner.advance(memos, momentum=momentum)
    return total


def split(batch: Batch, parts: int) -> list[Batch]:
    """Cut a batch into at most `parts` consecutive ones."""
    if parts == 1:
        return [batch]
    views = [view.chunk(parts) for view in batch.views]
    return [Batch(list(images), index) for *images, index in zip(*views, batch.index.chunk(parts))]


def shown(losses: dict[str, Tensor]) -> dict[str, float]:
    """Terms of the loss and their sum as numbers, averaged over the ranks."""
    values = torch.stack(list(losses.values())).double().cpu() if distributed.world() == 1 else None
    if values is None:
        stacked = torch.stack(list(losses.values()))
        distributed.average_([stacked])
        values = stacked.double().cpu()
    terms = {f"loss/{name}": float(value) for name, value in zip(losses, values)}
    return {"loss": sum(terms.values()), **terms}


def not_finite(losses: dict[str, Tensor], part: Batch, step: int, folder: Path, source: Source) -> str:
    """The message for a loss that is no number."""
    terms = ", ".join(f"{name} {float(value)}" for name, value in losses.items())
    names = [source.name(int(i)) for i in part.index[:8]]
    more = f" and {len(part.index) - 8} more" if len(part.index) > 8 else ""
    found = sorted((folder / "checkpoints").glob("*.pt"))
    last = f"The last good checkpoint is {found[-1]}." if found else "There is no checkpoint yet."
    return (
        f"The loss is not finite at step {step}: {terms}. Images of this batch: {', '.join(names)}{more}. {last} "
        "Lower learning_rate.base, raise method.temperature, or set precision=fp32, and start a new run folder."
    )


class Meter:
    """Counts images and waiting between two readings."""

    def __init__(self, loader: Loader, batch_size: int) -> None:
        self.loader = loader
        self.images = 0
        self.since = time.monotonic()
        loader.reset_waiting()

    def count(self, images: int) -> None:
        """Add the images of a step."""
        self.images += images

    def read(self) -> tuple[float, float]:
        """Images per second, and the share of time spent waiting for data, since the last reading."""
        now = time.monotonic()
        seconds = max(now - self.since, 1e-9)
        speed, waiting = self.images / seconds, min(self.loader.waiting / seconds, 1.0)
        self.images, self.since = 0, now
        self.loader.reset_waiting()
        return speed, waiting


def save(
    folder: Path, learner: Learner, optimizer: torch.optim.Optimizer, source: Source, recipe: Recipe, step: int
) -> None:
    """Write a checkpoint; the main process does."""
    if not distributed.is_main():
        return
    state = {
        "learner": learner.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "recipe": plain(recipe),
        "data": source.fingerprint,
        "images": len(source),
        "kinfold": __version__,
    }
    checkpoint.save(folder, state, step=step)


def restore(
    found: checkpoint.Loaded, learner: Learner, optimizer: torch.optim.Optimizer, source: Source
) -> int:
    """Put a checkpoint into learner and optimiser; returns its step. Raises `UserError` where the images differ."""
    if found.state["data"] != source.fingerprint:
        raise UserError(
            f"The images have changed since {found.path} was written: {found.state['images']} then, {len(source)} now, "
            "or other names. A run cannot go on with other images; choose another out=, or bring the images back."
        )
    learner.load_state_dict(found.state["learner"])
    optimizer.load_state_dict(found.state["optimizer"])
    return int(found.state["step"])


def finish(
    recipe: Recipe,
    folder: Path,
    learner: Learner,
    source: Source,
    loader: Loader,
    step: int,
    steps: int,
    signal: int | None,
    began: float,
    measures: dict[str, float],
    device: torch.device,
) -> Outcome:
    """Write weights and summary, leave the group of processes, and say what was done."""
    bad = {source.name(position): reason for position, reason in sorted(loader.bad.items())}
    seconds = time.monotonic() - began
    outcome = Outcome(
        folder=folder, step=step, steps=steps, signal=signal, seconds=seconds, measures=dict(measures), bad=bad
    )
    if distributed.is_main():
        card = {
            "name": recipe.backbone.name,
            "stem": recipe.backbone.stem,
            "channels": recipe.images.channels,
            "mean": list(recipe.images.mean),
            "std": list(recipe.images.std),
            "size": recipe.views.augment[0].size,
            "method": recipe.method.name,
            "step": step,
            "steps": steps,
            "images": len(source),
            "recipe": to_yaml(recipe),
            "kinfold": __version__,
        }
        export_backbone(learner.encoder.backbone, folder / "backbone.safetensors", card=card)
        write_encoder(folder, learner.encoder)
        write_summary(
            folder,
            {
                "finished": step == steps,
                "step": step,
                "steps": steps,
                "epochs": recipe.epochs,
                "method": recipe.method.name,
                "images": len(source),
                "data": source.description,
                "unreadable": {"count": len(bad), "files": bad},
                "seconds_this_start": round(seconds, 1),
                "probe": measures,
                "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "device": str(device)},
                "versions": {"kinfold": __version__, "torch": torch.__version__, "python": platform.python_version()},
            },
        )
    distributed.wait_for_all()
    return outcome


def open_log(folder: Path, run: Run, step: int) -> MetricsLog:
    """Open the log of a run that goes on at `step`: what stands there of later steps is dropped."""
    sinks: list[Sink] = []
    if run.tensorboard:
        sinks.append("tensorboard")
    if run.wandb is not None:
        sinks.append("wandb")
    log = MetricsLog(folder, sinks=sinks, project=run.wandb or "kinfold")
    log.rewind(step)
    return log


def choose_device(name: str) -> torch.device:
    """The device called `name`, or the best one for `auto`. Raises `UserError` for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device: {name!r} is none. Use auto, cpu, cuda, cuda:1 or mps.") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"device: {name} was asked for, but torch sees no CUDA device here. Use device=cpu.")
        local = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", device.index if device.index is not None else local)
        torch.cuda.set_device(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device: mps was asked for, but there is none here. Use device=cpu.")
    return device


def choose_workers(asked: int | None) -> int:
    """Worker processes for this rank: as asked, or the cores that this rank can count on, at most 16."""
    if asked is not None:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 16)
