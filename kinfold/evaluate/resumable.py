# SPDX-License-Identifier: Apache-2.0
"""The long protocols stop and go on as pretraining does: to the bit.

A protocol says what its state is; the steps, the bar, the checkpoints and the signals are kept here. All randomness in
the protocols is addressed by seed, epoch and image, so the state is what training has changed, and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from kinfold import checkpoint, distributed
from kinfold.console import bar
from kinfold.errors import UserError
from kinfold.evaluate.conditions import Conditions
from kinfold.interrupt import Interrupt
from kinfold.run_folder import held


@contextmanager
def place_of_progress(folder: Path) -> Iterator[None]:
    """Make the folder where a protocol keeps its progress, and keep other processes out of it that do the same.

    Made before anything is computed, so that a place that takes no files is found at once. An empty one is removed.
    Raises `UserError` where it cannot be made, or another process is at work in it.
    """
    if not distributed.is_main():
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"out: {folder.parent} takes no files ({error.strerror}), so no result could be written. Choose another "
            "out=."
        ) from error
    with held(folder):
        try:
            yield
        finally:
            with suppress(OSError):  # there is something to go on from, or all has been removed already
                folder.rmdir()


class Stopped(Exception):
    """A signal has ended a protocol before its end; what it had reached is on the disk where a place was given."""

    def __init__(self, signal: int, step: int, steps: int, *, kept: bool) -> None:
        super().__init__(
            f"Stopped at step {step:,} of {steps:,}."
            + (" The same command goes on from there." if kept else " Nothing was kept, as no place was given.")
        )
        self.signal = signal


class Resumable:
    """A number of steps, of which some may have been taken by an earlier call.

    `state()` gives what the steps change (tensors and plain values), `restore(state)` takes it back, on entry, before
    the first step. Every process calls; the main one writes, so the state has to be equal on all of them. `part` names
    one of several trainings of a protocol. A checkpoint is written every so many `seconds`, at a signal, at the end.
    """

    step: int
    """steps taken so far"""

    def __init__(
        self,
        conditions: Conditions,
        *,
        state: Callable[[], dict[str, Any]],
        restore: Callable[[dict[str, Any]], None],
        steps: int,
        doing: str,
        part: str | None = None,
        seconds: float = 300.0,
    ) -> None:
        self.step, self.steps = 0, steps
        self._folder = conditions.progress
        if self._folder is not None and part is not None:
            self._folder = self._folder / part
        self._device, self._say = torch.device(conditions.device), conditions.say
        self._state, self._restore = state, restore
        self._doing, self._seconds = doing, seconds
        self._saved = time.monotonic()
        self._open = ExitStack()
        self._interrupt = Interrupt()
        self._advance: Callable[[int], None] = lambda count: None

    def __enter__(self) -> Resumable:
        found = None
        if self._folder is not None:
            try:
                found = checkpoint.load_latest(self._folder)
            except UserError as error:
                raise UserError(f"{error}\nOr remove {self._folder}, and the same command begins again.") from error
        if found is not None:
            for broken in found.skipped:
                self._say(f"{broken}; the one before it is used")
            self._restore(found.state)
            self.step = found.step
            if distributed.is_main():
                self._say(f"{self._doing}: going on at step {self.step:,} of {self.steps:,}")
        self._open.enter_context(self._interrupt)
        # On CUDA, sums in any order would make what is resumed another run.
        self._open.enter_context(torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True))
        self._advance = self._open.enter_context(bar(self._doing, self.steps))
        self._advance(self.step)
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def took_step(self) -> None:
        """Count a step; keep the state where it is time, and raise `Stopped` where a signal has come."""
        self.step += 1
        self._advance(1)
        # Several processes have to stop and to save at the same step, whichever of them was asked to.
        due = int(self._folder is not None and time.monotonic() - self._saved > self._seconds)
        wish = distributed.largest((self._interrupt.signal or 0) * 2 + due, self._device)
        signal, due = divmod(wish, 2)
        if self._folder is not None and (due or signal or self.step == self.steps):
            if distributed.is_main():
                checkpoint.save(self._folder, self._state(), step=self.step)
            distributed.wait_for_all()
            self._saved = time.monotonic()
        if signal:
            raise Stopped(signal, self.step, self.steps, kept=self._folder is not None)
