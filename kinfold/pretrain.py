# SPDX-License-Identifier: Apache-2.0
"""The loop: epochs, batches, and what is written and shown between the steps. A step itself is in `training`."""

from __future__ import annotations

import os
import platform
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from kinfold import __version__, checkpoint, distributed, health
from kinfold.console import Console, bar
from kinfold.data.loader import Batch, Loader
from kinfold.data.sources import Source, open_source
from kinfold.devices import choose_device, choose_workers, keep_freed_memory
from kinfold.errors import UserError
from kinfold.export import export_backbone
from kinfold.interrupt import Interrupt
from kinfold.log import MetricsLog, Sink, read_metrics
from kinfold.meter import Meter, Rounds
from kinfold.optim import build_optimizer
from kinfold.probes import Probes
from kinfold.reading import to_yaml
from kinfold.recipe import Recipe, Run
from kinfold.run_folder import claimed, open_run_folder, write_encoder, write_summary
from kinfold.training import Training, build_learner

SHOWN = ("knn", "rankme", "alpha_req", "spread", "uniformity", "alignment", "target_entropy", "queue_age")
"""what a probe prints; metrics.jsonl has all of it"""


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


def pretrain(recipe: Recipe, run: Run, *, quiet: bool = False) -> Outcome:
    """Train `recipe` on the images that `run` names until its last epoch, or go on where the folder stopped.

    Raises `UserError` for anything given that cannot work. SIGTERM and Ctrl-C end it after the step under way, with a
    checkpoint.
    """
    began = time.monotonic()
    training = begin(recipe, run, quiet=quiet)
    main = distributed.is_main()
    standing = checkpoint.standing(training.folder)
    found = checkpoint.load_latest(training.folder)
    if found is not None:
        training.restore(found)
        found = found._replace(state={})  # it is large, and all of it is in its place now
    apart = distributed.all_alike(
        {"the step to go on from": training.step, "the images": training.source.fingerprint, "the recipe": recipe}
    )
    if apart:
        raise UserError(
            f"The processes do not agree on {' and '.join(apart)}. data= and out= must be places that all machines see "
            "alike."
        )
    probes = Probes(recipe, run, training.source, training.device, workers=training.loader.workers)
    if run.compile:
        training.learner.compile_encoders(graphs=run.compile == "graphs")
    console = Console(training.steps, training.step, quiet=quiet)
    with claimed(training.folder, recipe, run, standing=standing) if main else nullcontext():
        greet(training, console, found)
        with (
            open_log(training.folder, run, training.step) if main else nullcontext() as log,
            console,
            Interrupt() as interrupt,
        ):
            measures, signal = loop(training, run, probes, log, console, interrupt)
        return finish(training, began, measures, signal)


def greet(training: Training, console: Console, found: checkpoint.Loaded | None) -> None:
    """Say what is about to be done, and what of it is not as it should be."""
    for sentence in (*batch_norm_apart(training), *training.loader.remarks):
        console.warn(sentence)
    console.say(
        f"{training.source.description}; {training.steps} steps of {training.recipe.batch_size} images on "
        f"{training.device}, into {training.folder}"
    )
    if found is not None:
        for broken in found.skipped:
            console.warn(f"{broken}; the checkpoint before it is used")
        console.say(f"resuming from {found.path} at step {training.step}")


def loop(
    training: Training, run: Run, probes: Probes, log: MetricsLog | None, console: Console, interrupt: Interrupt
) -> tuple[dict[str, float], int | None]:
    """Train to the last epoch or to a signal; returns the last probe, and the signal if one stopped it."""
    loader, recipe = training.loader, training.recipe
    per_epoch = loader.steps_per_epoch
    measures: dict[str, float] = {}
    batch: Batch | None = None
    terms: dict[str, float] = {}
    meter, rounds, told = Meter(), Rounds(training.step), 0

    def probe_if_due(epochs: int, seen: dict[str, float] | None = None) -> None:
        """After so many epochs, look at the encoder where the run asks for it; the main process does, others wait."""
        if not run.probe_every or (epochs % run.probe_every and epochs != recipe.epochs):
            return
        if log is not None:
            before = dict(measures)
            measures.clear()
            measures.update(seen or probes.measure(training.learner, batch, epochs))
            measures["momentum"] = training.momentum
            if terms:
                measures["loss"] = terms["loss"]
            if not seen:
                log.write(training.step, epochs, **{f"probe/{name}": value for name, value in measures.items()})
            shown = [f"{name} {measures[name]:.4g}" for name in SHOWN if name in measures]
            console.say(f"after {epochs} epochs: {', '.join(shown)}")
            for sentence in health.read(measures, before) if epochs else ():
                console.say(f"  {sentence}")
        distributed.wait_for_all()
        meter.read()

    if training.step % per_epoch == 0:  # before the first epoch, or where a run was stopped before it could look
        seen = None if log is None else probed(training.folder, training.step)
        probe_if_due(training.step // per_epoch, seen)
    for epoch in range(training.step // per_epoch, recipe.epochs):
        for batch in meter.over(loader.epoch(epoch, training.step % per_epoch)):
            rate, losses = training.rate, training.take_step(batch, epoch)
            step, last = training.step, training.step == training.steps
            told = name_unreadable(loader, training.source, console, told)
            tell = step % run.log_every == 0 or last
            due = step % per_epoch == 0 and (epoch + 1) % run.checkpoint_every == 0
            due = due or (run.checkpoint_steps is not None and step % run.checkpoint_steps == 0)
            # One process hears a signal at once; several have to stop at the same step, whichever was asked to.
            signal = (interrupt.signal or 0) if distributed.world() == 1 else 0
            if tell or due or step % per_epoch == 0 or rounds.due(step):
                training.look()
                signal = rounds.agree(step, interrupt.signal or 0, training.device)
            if tell:
                terms, (speed, waiting) = numbers(losses), meter.read()
                console.update(step, epoch, speed, terms, waiting)
                if log is not None:
                    extra = {"rate": rate, "images_per_second": speed, "waiting": waiting}
                    log.write(step, epoch, **terms, **extra, unreadable=len(loader.bad))
            if due or signal or last:
                if log is not None:
                    log.sync()
                training.save()
            if signal and not last:
                return measures, signal
        probe_if_due(epoch + 1)
    return measures, None


def batch_norm_apart(training: Training) -> list[str]:
    """Say where batch norm sees smaller batches in several processes than the recipe has in one."""
    world, recipe = distributed.world(), training.recipe
    if world == 1 or recipe.batch_norm.synchronise:
        return []
    whole = recipe.batch_size // recipe.accumulate
    part = whole // world
    ways = "set batch_norm.synchronise=true, or the splits to a multiple of the processes"
    said = []
    encoders = (("query", training.learner.encoder), ("key", training.learner.key_encoder))
    for name, encoder in encoders:
        splits = getattr(recipe.batch_norm, f"{name}_splits")
        if encoder is None:
            continue
        if splits < world and any(isinstance(m, nn.BatchNorm2d) for m in encoder.backbone.modules()):
            said.append(
                f"batch_norm.{name}_splits is {splits}, but {world} processes make {world} groups of {part} images: "
                f"this run is not the one that one process would make; {ways}"
            )
        elif any(isinstance(m, nn.BatchNorm1d) for m in encoder.modules()):
            said.append(
                f"the batch norm in the {name} encoder's head sees the {part} images of one process, not all "
                f"{whole}: this run is not the one that one process would make; set "
                "batch_norm.synchronise=true if that matters"
            )
    return said


def probed(folder: Path, step: int) -> dict[str, float]:
    """What a probe at `step` has written to the log before; empty if there was none."""
    lines = [line for line in read_metrics(folder) if line["step"] == step]
    return {k.removeprefix("probe/"): v for line in lines for k, v in line.items() if k.startswith("probe/")}


def begin(recipe: Recipe, run: Run, *, quiet: bool) -> Training:
    """Join the other processes, open folder and images, and make everything that trains, in its first state."""
    device = choose_device(run.device)
    if device.type == "cpu":
        keep_freed_memory()
    distributed.start(device.type)
    if run.compile == "graphs" and (recipe.accumulate > 1 or distributed.world() > 1):
        # A graph's gradients lie in memory that its next replay writes over: they cannot be summed up or sent in peace.
        raise UserError(
            "compile=graphs is for one process that takes a batch in one part, but there are "
            f"{distributed.world()} process(es) and accumulate={recipe.accumulate}. Take compile=true: models large "
            "enough for that gain nothing from graphs."
        )
    folder = open_run_folder(recipe, run)
    source = open_source(run.data, split=run.split, limit=run.limit)
    with bar(None if quiet or not distributed.is_main() else "reading the images", len(source)) as advance:
        loader = Loader(
            source,
            recipe.views,
            channels=recipe.images.channels,
            mean=recipe.images.mean,
            std=recipe.images.std,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            workers=choose_workers(run.workers),
            device=device,
            rank=distributed.rank(),
            world=distributed.world(),
            resident=run.resident,
            drop_last=recipe.drop_last,
            accumulate=recipe.accumulate,
            epochs=recipe.epochs,
            scaled_decode=recipe.images.scaled_decode,
            decode=run.decode,
            compiled=bool(run.compile) and device.type == "cuda",  # a CPU makes views faster without
            progress=advance,
        )
    learner = build_learner(recipe, images=len(source), weights=Path(run.weights) if run.weights else None)
    part = recipe.batch_size // (distributed.world() * recipe.accumulate)
    if part < 2 and any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in learner.modules()):
        raise UserError(
            f"batch_size: {recipe.batch_size} gives {part} image to each of {distributed.world()} process(es) times "
            f"{recipe.accumulate} accumulated part(s), but batch norm needs at least 2. Raise batch_size."
        )
    learner.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if recipe.batch_norm.synchronise:
        learner.synchronise_batch_norm()
    optimizer = build_optimizer(recipe.optimizer, learner.encoder)
    return Training(
        recipe=recipe,
        folder=folder,
        source=source,
        loader=loader,
        learner=learner.train(),
        optimizer=optimizer,
        device=device,
    )


def numbers(losses: dict[str, Tensor]) -> dict[str, float]:
    """Terms of the loss and their sum as numbers, averaged over the ranks."""
    stacked = torch.stack(list(losses.values()))
    distributed.average_([stacked])
    terms = {f"loss/{name}": value for name, value in zip(losses, stacked.tolist())}
    return {"loss": sum(terms.values()), **terms}


def name_unreadable(loader: Loader, source: Source, console: Console, told: int, *, most: int = 10) -> int:
    """Warn of the images that turned out unreadable, the first `most` by name; returns how many were told of."""
    if len(loader.bad) == told or told > most:
        return told
    for position, reason in list(loader.bad.items())[told:most]:
        console.warn(f"{source.name(position)} could not be read ({reason}); another image takes its place")
    if told <= most < len(loader.bad):
        console.warn("more images could not be read; summary.json will name them all")
    return max(told, min(len(loader.bad), most + 1))


def finish(training: Training, began: float, measures: dict[str, float], signal: int | None) -> Outcome:
    """Write weights and summary, and say what was done."""
    recipe, folder, source = training.recipe, training.folder, training.source
    unreadable = distributed.join(training.loader.bad)
    bad = {source.name(position): reason for position, reason in sorted(unreadable.items())}
    seconds = time.monotonic() - began
    facts = {
        "method": recipe.method.name,
        "step": training.step,
        "steps": training.steps,
        "images": len(source),
        "data": source.description,
    }
    if distributed.is_main():
        card = {
            "name": recipe.backbone.name,
            "stem": recipe.backbone.stem,
            "channels": recipe.images.channels,
            "mean": list(recipe.images.mean),
            "std": list(recipe.images.std),
            "size": recipe.views.augment[0].size,
            "recipe": to_yaml(recipe),
            **facts,
        }
        export_backbone(training.learner.encoder.backbone, folder / "backbone.safetensors", card=card)
        write_encoder(folder, training.learner.encoder)
        write_summary(
            folder,
            {
                "finished": training.step == training.steps,
                **facts,
                "epochs": recipe.epochs,
                "unreadable": {"count": len(bad), "files": bad},
                "seconds_this_start": round(seconds, 1),
                "probe": measures,
                "reading": health.read(measures),
                "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "device": str(training.device)},
                "versions": {"kinfold": __version__, "torch": torch.__version__, "python": platform.python_version()},
            },
        )
    distributed.wait_for_all()
    return Outcome(
        folder=folder,
        step=training.step,
        steps=training.steps,
        signal=signal,
        seconds=seconds,
        measures=dict(measures),
        bad=bad,
    )


def open_log(folder: Path, run: Run, step: int) -> MetricsLog:
    """Open the log of a run that goes on at `step`: what stands there of later steps is dropped."""
    sinks: list[Sink] = []
    if run.tensorboard:
        sinks.append("tensorboard")
    if run.wandb is not None:
        sinks.append("wandb")
    log = MetricsLog(folder, sinks=sinks, project=run.wandb or "kinfold")
    log.rewind(step if step else -1)
    return log
