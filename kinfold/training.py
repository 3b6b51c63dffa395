# SPDX-License-Identifier: Apache-2.0
"""One run in motion: the step, and what is saved of it.

Schedules are functions of the step, everything random is a function of its address, and all state is in the learner and
the optimiser. So those two and the number of the step are a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kinfold import __version__, checkpoint, distributed
from kinfold.data.loader import Batch, Loader
from kinfold.data.sources import Source
from kinfold.encoders import Encoder, build_backbone, build_head, feature_width
from kinfold.errors import UserError
from kinfold.learner import Learner
from kinfold.memory import Memo, build_memory
from kinfold.optim import key_momentum, learning_rate
from kinfold.randomness import STEP, WEIGHTS, seed_of
from kinfold.reading import plain
from kinfold.recipe import Recipe
from kinfold.weights import load_backbone_weights


def build_learner(recipe: Recipe, *, images: int, weights: Path | None = None) -> Learner:
    """Make the learner that a recipe describes, for a set of `images`; its first state is a function of the seed.

    `weights` is a local file for the backbone. Leaves torch's global random state as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(WEIGHTS, recipe.seed))
        backbone = build_backbone(recipe.backbone, recipe.images.channels)
        if weights is not None:
            load_backbone_weights(backbone, weights)
        head = build_head(recipe.head, feature_width(backbone))
        _fit_patches(backbone, recipe)
        predictor = None if recipe.predictor is None else build_head(recipe.predictor, recipe.head.out)
        return Learner(
            method=recipe.method,
            views=recipe.views,
            encoder=Encoder(backbone, head, predictor),
            memory=build_memory(recipe.memory, images=images, dimension=recipe.head.out),
            batch_norm=recipe.batch_norm,
            seed=recipe.seed,
        )


def _fit_patches(backbone: nn.Module, recipe: Recipe) -> None:
    """Raise `UserError` where a view cannot be cut into the patches of a vision transformer."""
    patch = getattr(getattr(backbone, "patch_embed", None), "patch_size", None)
    side = patch[0] if isinstance(patch, tuple) else patch
    for number, view in enumerate(recipe.views.augment):
        if isinstance(side, int) and view.size % side:
            below = max(view.size // side, 1) * side
            raise UserError(
                f"views.augment.{number}.size: {recipe.backbone.name} cuts images into patches of {side} pixels, which "
                f"do not fill {view.size}. Take a multiple of {side}, for example {below}."
            )


class Taken(NamedTuple):
    """A step that was given to the device."""

    step: int
    losses: dict[str, Tensor]
    """its terms, scalars"""
    images: Tensor
    """int64 [B]: positions in the source of what this rank saw"""


@dataclass(kw_only=True)
class Training:
    """A learner, its optimiser, its images, and how many steps they have taken together."""

    recipe: Recipe
    folder: Path
    source: Source
    loader: Loader
    learner: Learner
    optimizer: torch.optim.Optimizer
    device: torch.device
    step: int = 0
    unseen: list[Taken] = field(default_factory=list, init=False)
    """steps whose losses nobody has looked at yet"""

    def __post_init__(self) -> None:
        self.half = (
            self.recipe.precision == "bf16"
            and self.device.type == "cuda"
            and torch.cuda.is_bf16_supported(including_emulation=False)
        )
        # On a CPU the losses are there when a step returns; elsewhere looking at them waits for all that was asked for.
        self.looks_at_once = self.device.type == "cpu"
        self.wrapped: nn.Module = self.learner
        if distributed.world() > 1:
            # Buffers are equal on all ranks by construction: sending rank 0's would cost time and hide a fault.
            self.wrapped = DistributedDataParallel(self.learner, broadcast_buffers=False)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.loader.steps_per_epoch * self.recipe.epochs

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return learning_rate(
            self.recipe.learning_rate,
            step=self.step,
            steps_per_epoch=self.loader.steps_per_epoch,
            epochs=self.recipe.epochs,
            batch_size=self.recipe.batch_size,
        )

    @property
    def momentum(self) -> float:
        """How much of the key encoder stays at the next step."""
        return key_momentum(self.recipe.key_momentum, step=self.step, steps=self.steps)

    def take_step(self, batch: Batch, epoch: int) -> dict[str, Tensor]:
        """Forward, backward, step, advance, on one batch in `recipe.accumulate` parts.

        Returns the terms of the loss, scalars averaged over this rank's batch. A GPU is not waited for: whether the
        losses were finite says `look`. On a CPU looking costs nothing, so `UserError` is raised where they are not,
        before anything has changed.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        # Whatever draws from torch's own generators (dropout, stochastic depth) does so as a function of the step.
        torch.manual_seed(seed_of(STEP, self.recipe.seed, self.step, distributed.rank()))
        self.optimizer.zero_grad(set_to_none=True)
        total: dict[str, Tensor] = {}
        memos: list[list[Memo]] = []
        parts = split(batch, self.recipe.accumulate)
        for number, part in enumerate(parts):
            if isinstance(self.wrapped, DistributedDataParallel):
                self.wrapped.require_backward_grad_sync = number == len(parts) - 1
            share = len(part.index) / len(batch.index)
            views = [view.contiguous(memory_format=torch.channels_last) for view in part.views]
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.half):
                losses, memo = self.wrapped(views, part.index, epoch)
            loss = share * torch.stack(list(losses.values())).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            memos.append(memo)
            for name, value in losses.items():
                total[name] = total.get(name, torch.zeros_like(value)) + share * value.detach()
        self.unseen.append(Taken(self.step, total, batch.index))
        if self.looks_at_once:
            self.look()
        self.optimizer.step()
        self.learner.advance(memos, momentum=self.momentum)
        self.step += 1
        return total

    def look(self) -> None:
        """Wait for the device, and look at the losses of all steps since the last look.

        Raises `UserError` with the first step at which one was not finite, in all processes at once. To be called at
        the same step in each of them, before a checkpoint is written and before losses are told.
        """
        if not self.unseen:
            return
        sums = torch.stack([torch.stack(list(taken.losses.values())).sum() for taken in self.unseen])  # [steps]
        good = torch.isfinite(sums).tolist()
        bad = next((taken for taken, fine in zip(self.unseen, good) if not fine), None)
        # A loss that is no number makes the next step's no number in every process: only the first one tells why.
        ours = self.step + 1 if bad is None else bad.step
        first = -distributed.largest(-ours, self.device)
        self.unseen.clear()
        if bad is not None and bad.step == first:
            raise UserError(self._not_finite(bad))
        if first <= self.step:
            raise UserError(f"The loss is not finite at step {first} in another process, which says more.")

    def _not_finite(self, bad: Taken) -> str:
        """The message for a loss that is no number; all names of the batch go to a file."""
        terms = ", ".join(f"{name} {float(value)}" for name, value in bad.losses.items())
        names = [self.source.name(position) for position in bad.images.tolist()]
        where = self.folder / f"not-finite-{bad.step:08d}-{distributed.rank()}.txt"
        try:
            where.write_text("\n".join(names) + "\n", encoding="utf-8")
            more = f" and {len(names) - 4} more, all in {where}" if len(names) > 4 else ""
        except OSError:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        # One of this very step holds the weights that gave this loss, so it is not a good one.
        found = [p for p in checkpoint.standing(self.folder) if p.stem != f"step-{bad.step:08d}"]
        last = f"The last good checkpoint is {found[0]}." if found else "There is no checkpoint from before."
        return (
            f"The loss is not finite at step {bad.step}: {terms}. Images of this batch: {', '.join(names[:4])}{more}. "
            f"{last} Lower learning_rate.base, raise method.temperature, or set precision=fp32, and start a new run "
            "folder."
        )

    def save(self) -> None:
        """Write a checkpoint; the main process does, the others wait.

        Raises `UserError` where a loss or a weight is not finite: nobody could go on from that.
        """
        self.look()
        for name, weight in self.learner.encoder.named_parameters():
            if not torch.isfinite(weight).all():
                raise UserError(
                    f"After step {self.step} the weights {name} are not finite, so no checkpoint is written. Lower "
                    "learning_rate.base, or set precision=fp32, and start a new run folder."
                )
        self.loader.bad.update(distributed.join(self.loader.bad))
        learner = self.learner.state_dict()  # in every process: a divided bank is put together
        if distributed.is_main():
            state = {
                "learner": learner,
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "recipe": plain(self.recipe),
                "data": self.source.fingerprint,
                "images": len(self.source),
                "steps_per_epoch": self.loader.steps_per_epoch,
                "unreadable": dict(self.loader.bad),
                "kinfold": __version__,
            }
            checkpoint.save(self.folder, state, step=self.step)
        distributed.wait_for_all()

    def restore(self, found: checkpoint.Loaded) -> None:
        """Go on from a checkpoint. Raises `UserError` where the images are not those that it was written with."""
        if found.state["data"] != self.source.fingerprint:
            raise UserError(
                f"The images have changed since {found.path} was written: {found.state['images']} then, "
                f"{len(self.source)} now, or other names. A run cannot go on with other images; choose another out=, "
                "or bring the images back."
            )
        before, now = found.state["steps_per_epoch"], self.loader.steps_per_epoch
        if before != now:
            raise UserError(
                f"{found.path} was written with {before} steps an epoch, and {distributed.world()} process(es) make it "
                f"{now}. Start as many processes as before."
            )
        self.learner.load_state_dict(found.state["learner"])
        self.optimizer.load_state_dict(found.state["optimizer"])
        self.loader.bad.update(found.state["unreadable"])
        self.step = int(found.state["step"])


def split(batch: Batch, parts: int) -> list[Batch]:
    """Cut a batch into at most `parts` consecutive ones of nearly the same size."""
    if len(batch.index) % parts or len(batch.index) < 2 * parts:  # the last batch of an epoch
        parts = max(1, min(parts, len(batch.index) // 2))  # batch norm has no use for one image
    if parts == 1:
        return [batch]
    views = [view.tensor_split(parts) for view in batch.views]
    return [Batch(list(images), index) for *images, index in zip(*views, batch.index.tensor_split(parts))]
