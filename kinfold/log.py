# SPDX-License-Identifier: Apache-2.0
"""What a run tells while it runs: `metrics.jsonl` always, the console, TensorBoard and W&B when asked for.

`metrics.jsonl` has one JSON object a line, `{"step": 1200, "epoch": 3, "similarity": 5.12, ...}`, so that any
tool can read it while the run goes on. JSON has no word for numbers that are not finite: they are written as
the strings `"NaN"`, `"Infinity"` and `"-Infinity"`, which `float(...)` reads back, and so does
`read_metrics`.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

from rich.console import Console as Terminal
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from torch import Tensor

from kinfold.errors import UserError

FILE = "metrics.jsonl"
Sink = Literal["tensorboard", "wandb"]

_PLAIN_EVERY = 10.0  # seconds between lines where there is no terminal
_WINDOW = 60.0  # seconds of the recent past from which the time left is told


class MetricsLog:
    """The numbers of a run, appended to `metrics.jsonl` and handed to the sinks that were asked for.

    For one process of a run: the one that writes its files. A line is written as soon as it is whole, so that
    what was said survives a crash; a line that a killed process left unfinished is cut off when the file is
    opened.

    Raises `UserError` when a sink is asked for and not installed, or the file cannot be written.
    """

    def __init__(self, folder: Path, *, sinks: Sequence[Sink] = (), project: str = "kinfold") -> None:
        self.path = folder / FILE
        self._sinks: list[_TensorBoard | _WandB] = []
        for sink in sinks:
            self._sinks.append(_TensorBoard(folder) if sink == "tensorboard" else _WandB(folder, project))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                _cut_unfinished_line(self.path)
            self._file = self.path.open("a", buffering=1, encoding="utf-8")
        except OSError as error:
            raise UserError(_cannot_write(self.path, error)) from error

    def write(self, step: int, epoch: float, **values: float | Tensor) -> None:
        """Append the named numbers of `step`; tensors are of one element."""
        plain = {name: _number(value) for name, value in values.items()}
        line = {"step": step, "epoch": epoch} | {name: _json(value) for name, value in plain.items()}
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(_cannot_write(self.path, error)) from error
        for sink in self._sinks:
            sink.write(step, epoch, plain)

    def rewind(self, step: int) -> int:
        """Drop the lines of steps after `step`, and any that are no JSON; returns how many.

        For a resume from the checkpoint of `step`: the steps after it are done again, and no step stands
        twice. The file is replaced in one move, so a kill leaves the old or the new one. Sinks are rewound
        with it: call this before the first `write`.
        """
        self._file.close()
        kept, dropped = [], 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            values = _parse(line)
            if values is not None and values["step"] <= step:
                kept.append(line)
            else:
                dropped += 1
        temporary = self.path.with_name(FILE + ".tmp")
        try:
            if dropped:
                with temporary.open("wb") as file:
                    file.writelines(kept)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self.path)
            self._file = self.path.open("a", buffering=1, encoding="utf-8")
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(_cannot_write(self.path, error)) from error
        for sink in self._sinks:
            sink.rewind(step)
        return dropped

    def sync(self) -> None:
        """Bring what was written to the disk: before a checkpoint, so that none is ahead of its log."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(_cannot_write(self.path, error)) from error

    def close(self) -> None:
        self._file.close()
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of the run's `metrics.jsonl`, numbers as numbers; none when there is no file.

    An unfinished last line is left out, so a run can be read while it writes.
    """
    path = folder / FILE
    if not path.exists():
        return []
    lines = (_parse(line) for line in path.read_bytes().splitlines(keepends=True))
    return [{name: _back(value) for name, value in line.items()} for line in lines if line is not None]


class _TensorBoard:
    """Scalars for TensorBoard in `<folder>/tensorboard`."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(_not_installed("tensorboard", error)) from error
        self._open: Callable[..., Any] = SummaryWriter
        self._folder = folder / "tensorboard"
        self._purge: int | None = None
        self._writer: Any = None

    def write(self, step: int, epoch: float, values: dict[str, float]) -> None:
        if self._writer is None:  # opened late: where a run resumes is only known after `rewind`
            self._writer = self._open(str(self._folder), purge_step=self._purge)
        for name, value in {"epoch": epoch, **values}.items():
            self._writer.add_scalar(name, value, step)

    def rewind(self, step: int) -> None:
        """TensorBoard hides what it has of later steps when the next file says where it goes on."""
        self.close()
        self._purge = step + 1

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None


class _WandB:
    """Scalars for Weights & Biases, one W&B run for one run folder, however often it is resumed."""

    def __init__(self, folder: Path, project: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(_not_installed("wandb", error)) from error
        self._wandb = wandb
        self._folder = folder
        self._project = project
        self._run: Any = None

    def write(self, step: int, epoch: float, values: dict[str, float]) -> None:
        if self._run is None:
            identity = self._folder / "wandb-id.txt"
            if not identity.exists():
                identity.write_text(uuid.uuid4().hex[:12])
            self._run = self._wandb.init(
                project=self._project,
                name=self._folder.name,
                id=identity.read_text().strip(),
                dir=str(self._folder),
                resume="allow",
            )
            # W&B's own step never goes back and ours may: ours is a value, and the axis of the others.
            self._run.define_metric("*", step_metric="step")
        self._run.log({"step": step, "epoch": epoch, **values})

    def rewind(self, step: int) -> None:
        """Nothing is taken back at W&B: the repeated steps are logged again, with the same numbers."""

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
        self._run = None


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


def _duration(seconds: float) -> str:
    """Seconds as people say them: `42 s`, `3 min 20 s`, `5 h 07 min`, `2 d 03 h`."""
    whole = max(0, round(seconds))
    for size, big, small, part in ((86400, "d", "h", 3600), (3600, "h", "min", 60), (60, "min", "s", 1)):
        if whole >= size:
            return f"{whole // size} {big} {whole % size // part:02d} {small}"
    return f"{whole} s"


def _number(value: float | Tensor) -> float:
    """A plain int or float of what a loop has at hand: numbers, numpy scalars, tensors of one element."""
    if isinstance(value, Tensor) or hasattr(value, "item"):
        value = value.item()
    return value if isinstance(value, int) else float(value)


def _json(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _back(value: Any) -> float:
    return float(value) if isinstance(value, str) else value  # type: ignore[no-any-return]


def _parse(line: bytes) -> dict[str, Any] | None:
    """The object on a whole line; None for a torn one."""
    if not line.endswith(b"\n"):
        return None
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) and isinstance(values.get("step"), int) else None


def _cut_unfinished_line(path: Path) -> None:
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def _not_installed(sink: str, error: ImportError) -> str:
    return f"The log was asked to go to {sink}, which is not installed ({error}). pip install 'kinfold[{sink}]'"


def _cannot_write(path: Path, error: OSError) -> str:
    reason = error.strerror or error
    return f"{path} could not be written: {reason}. Make room, or give a folder that can be written."
