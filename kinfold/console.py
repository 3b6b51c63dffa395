# SPDX-License-Identifier: Apache-2.0
"""What a person sees while a run or another long piece of work goes on: a bar in a terminal, lines elsewhere."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import IO, Self

from rich.console import Console as Terminal
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kinfold import distributed

_PLAIN_EVERY = 10.0  # seconds between lines where there is no terminal
_WINDOW = 60.0  # seconds of the recent past from which the time left is told


class Console:
    """Progress for a person: a bar in a terminal, a line about every ten seconds elsewhere (a pipe, a batch
    job).

    Everything goes to the error stream, so that the output stream carries results only. `quiet` leaves
    warnings. On ranks other than 0 nothing is printed at all.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        quiet: bool = False,
        *,
        stream: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._terminal = Terminal(file=stream or sys.stderr, highlight=False, markup=False, emoji=False)
        self._speaks = int(os.environ.get("RANK", "0")) == 0
        self._quiet = quiet or not self._speaks
        self._total = total_steps
        self._step = start_step
        self._clock = clock
        self._recent = deque([(clock(), start_step)])
        self._told_at = -math.inf
        self._facts: list[str] = []
        self._told = True
        self._live: Live | None = None

    def __enter__(self) -> Self:
        self._recent = deque([(self._clock(), self._step)])
        if not self._quiet and self._terminal.is_terminal and not self._terminal.is_dumb_terminal:
            self._live = Live(
                console=self._terminal,
                get_renderable=self._picture,
                refresh_per_second=4,
                # What others print appears above the bar; results that go to a file must go on to go there.
                redirect_stdout=sys.stdout.isatty(),
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif not self._told:
            self._tell()

    def update(
        self, step: int, epoch: float, images_per_second: float, losses: dict[str, float], waiting: float
    ) -> None:
        """Show that `step` steps are done; `waiting` is the share of time, 0 to 1, spent waiting for data."""
        now = self._clock()
        self._step = step
        self._recent.append((now, step))
        while len(self._recent) > 2 and now - self._recent[1][0] > _WINDOW:
            self._recent.popleft()
        self._facts = [
            f"epoch {epoch:g}" if epoch == int(epoch) else f"epoch {epoch:.2f}",
            f"{images_per_second:,.0f} images/s",
            *(f"{name} {value:.4g}" for name, value in losses.items()),
            f"data wait {waiting:.0%}",
        ]
        self._told = False
        if self._live is None and (now - self._told_at >= _PLAIN_EVERY or step >= self._total):
            self._told_at = now
            self._tell()

    def say(self, text: str) -> None:
        """Print `text` above the bar."""
        if not self._quiet:
            self._terminal.print(text, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print `text` as a warning, also when quiet."""
        if self._speaks:
            self._terminal.print(Text.assemble(("warning: ", "yellow"), text), soft_wrap=True)

    def _left(self) -> str:
        """The time left, at the pace of the last minute."""
        (then, before), (now, step) = self._recent[0], self._recent[-1]
        if step <= before or now <= then:
            return "time left unknown"
        return f"{_duration((self._total - step) * (now - then) / (step - before))} left"

    def _tell(self) -> None:
        self._told = True
        if not self._quiet:
            share = self._step / self._total if self._total else 1.0
            done = f"step {self._step:,}/{self._total:,} ({share:.0%})"
            self._terminal.print(", ".join([done, self._left(), *self._facts]), soft_wrap=True)

    def _picture(self) -> Group:
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        bar.add_column(no_wrap=True)
        bar.add_row(
            ProgressBar(total=max(self._total, 1), completed=self._step if self._total else 1),
            f"step {self._step:,}/{self._total:,}",
            self._left(),
        )
        return Group(bar, Text(" · ".join(self._facts), style="dim", overflow="ellipsis"))


@contextmanager
def bar(text: str | None, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar over `total` on a terminal; yields what to call with the number of things done.

    Nothing is shown without a text, where the errors do not go to a terminal, or by another process than the main one.
    """
    terminal = Terminal(stderr=True)
    if text is None or not terminal.is_terminal or not distributed.is_main():
        yield lambda count: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=terminal, transient=True) as progress:
        task = progress.add_task(text, total=total)
        yield lambda count: progress.advance(task, count)


def _duration(seconds: float) -> str:
    """Seconds as people say them: `42 s`, `3 min 20 s`, `5 h 07 min`, `2 d 03 h`."""
    whole = max(0, round(seconds))
    for size, big, small, part in ((86400, "d", "h", 3600), (3600, "h", "min", 60), (60, "min", "s", 1)):
        if whole >= size:
            return f"{whole // size} {big} {whole % size // part:02d} {small}"
    return f"{whole} s"
