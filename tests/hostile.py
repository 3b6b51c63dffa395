# SPDX-License-Identifier: Apache-2.0
"""What tests of bad input share: folders of images, runs at toy width, a look at every byte of a folder."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kinfold.pretrain import Outcome, pretrain
from kinfold.recipe import Run, load
from kinfold.training import Training

OWN = (
    "backbone.name=resnet10_w8",
    "views.augment.*.size=16",
    "head.hidden=[16]",
    "head.out=8",
    "memory.size=64",
    "batch_size=8",
    "epochs=2",
    "learning_rate.warmup_epochs=1",
    "device=cpu",
    "workers=0",
)
"""own-images at toy width"""


def photos(folder: Path, count: int, *, height: int = 20, seed: int = 0) -> Path:
    """A folder of `count` noisy images, a little wider than `height`."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = np.random.default_rng(seed)
    for i in range(count):
        pixels = numbers.integers(0, 256, (height, height + 3, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
    return folder


def own(data: Path, out: Path, *words: str) -> Outcome:
    """Pretrain `own-images` at toy width on a folder."""
    recipe, run = load("own-images", [*OWN, *words], run={"data": str(data), "out": str(out)})
    return pretrain(recipe, run, quiet=True)


def on_digits(out: Path, **changes: Any) -> Run:
    """96 digits: three steps an epoch at 32 images, a checkpoint after each step."""
    values: dict[str, Any] = {"device": "cpu", "workers": 0, "limit": 96, "probe_every": 0, "checkpoint_steps": 1}
    return Run(data="digits", out=str(out), **{**values, **changes})


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def signal_after(monkeypatch: pytest.MonkeyPatch, step: int, *numbers: signal.Signals) -> None:
    """Send this process signals as soon as `step` steps are done, before the loop looks."""
    real = Training.take_step

    def take_step(self: Training, *arguments: Any) -> Any:
        losses = real(self, *arguments)
        if self.step == step:
            for number in numbers:
                signal.raise_signal(number)
        return losses

    monkeypatch.setattr(Training, "take_step", take_step)


def fill_disk(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """From now on there is no room for a file called `name`: neither its bytes nor its name reach the disk."""
    refusal = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    sync, replace = os.fsync, os.replace

    def full_sync(handle: int) -> None:
        if name in Path(os.readlink(f"/proc/self/fd/{handle}")).name:
            raise refusal
        sync(handle)

    def full_replace(source: Any, target: Any, **named: Any) -> None:
        if name == Path(target).name:
            raise refusal
        replace(source, target, **named)

    monkeypatch.setattr(os, "fsync", full_sync)
    monkeypatch.setattr(os, "replace", full_replace)
