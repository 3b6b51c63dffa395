# SPDX-License-Identifier: Apache-2.0
"""What a run tells while it runs: `metrics.jsonl` always, TensorBoard and W&B when asked for.

`metrics.jsonl` has one JSON object a line, `{"step": 1200, "epoch": 3, "similarity": 5.12, ...}`, so that any
tool can read it while the run goes on. JSON has no word for numbers that are not finite: they are written as
the strings `"NaN"`, `"Infinity"` and `"-Infinity"`, which `float(...)` reads back, and so does
`read_metrics`.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from torch import Tensor

from kinfold.errors import UserError

FILE = "metrics.jsonl"
Sink = Literal["tensorboard", "wandb"]


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
        line = json_ready({"step": step, "epoch": epoch} | plain)
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
        try:
            self._file.close()
        except OSError as error:  # what could not be written is tried once more
            raise UserError(_cannot_write(self.path, error)) from error
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


def _number(value: float | Tensor) -> float:
    """A plain int or float of what a loop has at hand: numbers, numpy scalars, tensors of one element."""
    if isinstance(value, Tensor) or hasattr(value, "item"):
        value = value.item()
    return value if isinstance(value, int) else float(value)


def json_ready(value: Any) -> Any:
    """Plain values with numbers that JSON does not have as words, which `float` reads back."""
    if isinstance(value, dict):
        return {key: json_ready(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


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
