# SPDX-License-Identifier: Apache-2.0
"""What tests of the step share: a run in motion on digits, a stand-in for a GPU's loop, and one for a compiler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kinfold.data.loader import Loader
from kinfold.data.sources import open_source
from kinfold.memory import Comparison
from kinfold.methods import MoCo
from kinfold.optim import build_optimizer
from kinfold.recipe import Recipe
from kinfold.training import Training, build_learner


def training_on(
    recipe: Recipe,
    device: str,
    folder: Path,
    *,
    images: int = 96,
    dtype: torch.dtype = torch.float32,
    fused: bool | None = None,
    **how: Any,
) -> Training:
    """A run in its first state; `how` goes to the loader."""
    source = open_source("digits", limit=images)
    loader = Loader(
        source,
        recipe.views,
        channels=1,
        mean=recipe.images.mean,
        std=recipe.images.std,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        device=device,
        drop_last=recipe.drop_last,
        **{"resident": True, **how},
    )
    learner = build_learner(recipe, images=len(source)).train().to(device, dtype)
    return Training(
        recipe=recipe,
        folder=folder,
        source=source,
        loader=loader,
        learner=learner,
        optimizer=build_optimizer(recipe.optimizer, learner.encoder, fused=fused),
        device=torch.device(device),
    )


def fail_at(patch: pytest.MonkeyPatch, number: int, spoil: float = float("nan")) -> None:
    """Make MoCo's loss of step `number` no number."""
    calls = 0
    real = MoCo.loss

    def loss(self: MoCo, seen: Comparison, epoch: int) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        terms = real(self, seen, epoch)
        return {name: value * (spoil if calls == number + 1 else 1.0) for name, value in terms.items()}

    patch.setattr(MoCo, "loss", loss)


@contextmanager
def as_on_a_gpu() -> Iterator[pytest.MonkeyPatch]:
    """Losses are looked at where a GPU's would be: at some steps only."""
    real = Training.__post_init__

    def made(self: Training) -> None:
        real(self)
        self.looks_at_once = False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "__post_init__", made)
        yield patch


@contextmanager
def quick_compiler(**more: Any) -> Iterator[list[dict[str, Any]]]:
    """torch.compile up to the point where code would be made; gives what it was asked for. `more` are its settings."""
    asked: list[dict[str, Any]] = []
    real = torch.compile

    def compile_(call: Any, **settings: Any) -> Any:
        asked.append(settings)
        return real(call, backend="eager", dynamic=settings["dynamic"], **more)

    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", compile_)
        yield asked
