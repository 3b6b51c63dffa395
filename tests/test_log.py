# SPDX-License-Identifier: Apache-2.0
"""What a run's log promises: valid JSON, every step once, and a console that fits where it is read."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import pty
import re
import select
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kinfold import distributed
from kinfold.console import Console, _duration, bar
from kinfold.errors import UserError
from kinfold.log import MetricsLog, read_metrics


def lines_of(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


def test_each_write_is_one_line_of_json_that_is_there_at_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "run")
    log.write(10, 1, similarity=5.25, images=256)
    assert lines_of(tmp_path / "run") == ['{"step": 10, "epoch": 1, "similarity": 5.25, "images": 256}']
    log.write(20, 1.5, similarity=torch.tensor(4.5), consistency=np.float32(0.5))
    assert json.loads(lines_of(tmp_path / "run")[1]) == {
        "step": 20,
        "epoch": 1.5,
        "similarity": 4.5,
        "consistency": 0.5,
    }
    log.close()


def test_numbers_that_are_not_finite_stay_valid_json_and_come_back(tmp_path: Path) -> None:
    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is no JSON")

    with MetricsLog(tmp_path) as log:
        log.write(1, 0, a=math.nan, b=math.inf, c=-math.inf, d=torch.tensor(math.nan), e=0.1)
    json.loads(lines_of(tmp_path)[0], parse_constant=refuse)
    (read,) = read_metrics(tmp_path)
    assert math.isnan(read["a"])
    assert math.isnan(read["d"])
    assert (read["b"], read["c"], read["e"]) == (math.inf, -math.inf, 0.1)


def test_a_second_log_on_the_same_folder_goes_on_where_the_first_ended(tmp_path: Path) -> None:
    for step in (1, 2):
        with MetricsLog(tmp_path) as log:
            log.write(step, 0, loss=step)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


@given(to=st.integers(-1, 12), torn=st.integers(0, 40), extra=st.integers(1, 5))
def test_after_a_rewind_no_step_stands_twice_and_none_is_missing(
    tmp_path_factory: pytest.TempPathFactory, to: int, torn: int, extra: int
) -> None:
    folder = tmp_path_factory.mktemp("run")
    with MetricsLog(folder) as log:
        for step in range(10):
            log.write(step, 0, loss=step / 3)
    path = folder / "metrics.jsonl"
    os.truncate(path, path.stat().st_size - torn)
    whole = path.read_bytes().count(b"\n")
    with MetricsLog(folder) as log:
        dropped = log.rewind(to)
        kept = min(whole, max(0, to + 1))
        assert dropped == whole - kept
        for step in range(kept, kept + extra):
            log.write(step, 0, loss=step / 3)
    assert [line["step"] for line in read_metrics(folder)] == list(range(kept + extra))
    assert not (folder / "metrics.jsonl.tmp").exists()


def test_a_line_torn_in_the_middle_is_dropped_by_a_rewind(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "a": 1}\n{"step": 2, "\xff\n[3]\n{"step": 3, "a": 3}\n')
    with MetricsLog(tmp_path) as log:
        assert log.rewind(3) == 2
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 3]


def test_a_run_can_be_read_while_it_writes(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": "NaN"}\n{"step": 2, "a"')
    (read,) = read_metrics(tmp_path)
    assert math.isnan(read["a"])


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log._file.close()
    log._file = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    with pytest.raises(UserError, match=os.strerror(errno.ENOSPC)):
        log.write(1, 0, loss=1.0)


def test_tensorboard_gets_every_number_once_also_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path, sinks=["tensorboard"]) as log:
        for step in range(1, 6):
            log.write(step, 0, loss=step)
    with MetricsLog(tmp_path, sinks=["tensorboard"]) as log:
        log.rewind(3)
        for step in range(4, 8):
            log.write(step, 0, loss=10 * step)
    events = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 40),
        (5, 50),
        (6, 60),
        (7, 70),
    ]


@pytest.mark.parametrize(("sink", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_sink_that_is_not_installed_is_told_with_the_way_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sink: Any, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"pip install 'kinfold\[{sink}\]'"):
        MetricsLog(tmp_path, sinks=[sink])


def test_wandb_sees_one_run_for_one_folder_however_often_it_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[dict[str, Any]] = []
    logged: list[dict[str, float]] = []

    def init(**how: Any) -> Any:
        begun.append(how)
        return SimpleNamespace(log=logged.append, define_metric=lambda *a, **n: None, finish=lambda: None)

    module = ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    for step in (1, 2):
        with MetricsLog(tmp_path, sinks=["wandb"]) as log:
            log.write(step, 0, loss=0.5)
    assert logged == [{"step": 1, "epoch": 0, "loss": 0.5}, {"step": 2, "epoch": 0, "loss": 0.5}]
    assert begun[0] == begun[1]
    assert begun[0]["resume"] == "allow"


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(console: Console, clock: Clock, *, steps: range, seconds: float) -> None:
    with console:
        for step in steps:
            clock.now += seconds
            console.update(step, 3, 812.4, {"similarity": 5.12345, "consistency": 0.25}, 0.125)


def test_in_a_pipe_there_is_a_plain_line_about_every_ten_seconds() -> None:
    stream, clock = io.StringIO(), Clock()
    run(Console(1000, stream=stream, clock=clock), clock, steps=range(1, 41), seconds=1.0)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 5  # at 1, 11, 21, 31 seconds, and how far it came
    assert lines[1] == (
        "step 11/1,000 (1%), 16 min 29 s left, epoch 3, 812 images/s, similarity 5.123, consistency 0.25, data wait 12%"
    )
    assert lines[-1].startswith("step 40/1,000 (4%)")
    assert "\x1b" not in stream.getvalue()


def test_the_last_step_is_told_once() -> None:
    stream, clock = io.StringIO(), Clock()
    run(Console(5, stream=stream, clock=clock), clock, steps=range(1, 6), seconds=0.1)
    assert [line.split(" (")[0] for line in stream.getvalue().splitlines()] == ["step 1/5", "step 5/5"]


def test_the_time_left_follows_the_pace_of_the_last_minute_and_not_the_steps_of_earlier_runs() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(10_000, 9_000, stream=stream, clock=clock)
    with console:
        clock.now += 1_000
        console.update(9_100, 1, 1.0, {}, 0.0)
        for step in range(9_101, 9_301):
            clock.now += 1.0
            console.update(step, 1, 1.0, {}, 0.0)
    assert "2 h 30 min left" in stream.getvalue().splitlines()[0]
    assert "11 min 40 s left" in stream.getvalue().splitlines()[-1]


def test_quiet_leaves_the_warnings_and_other_ranks_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(5, quiet=True, stream=stream, clock=clock)
    run(console, clock, steps=range(1, 6), seconds=60)
    console.say("hello")
    console.warn("[bold] is :not: markup")
    assert stream.getvalue() == "warning: [bold] is :not: markup\n"
    monkeypatch.setenv("RANK", "1")
    stream = io.StringIO()
    console = Console(5, stream=stream, clock=clock)
    run(console, clock, steps=range(1, 6), seconds=60)
    console.say("hello")
    console.warn("hello")
    assert stream.getvalue() == ""


def test_in_a_terminal_a_bar_is_drawn_with_all_that_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    ours, theirs = pty.openpty()
    clock = Clock()
    with open(theirs, "w") as stream:
        console = Console(40, stream=stream, clock=clock)
        run(console, clock, steps=range(1, 31), seconds=1.0)
        console.say("saved")
        stream.flush()
        seen = b""
        while not seen.endswith(b"saved\r\n") and select.select([ours], [], [], 5)[0]:
            seen += os.read(ours, 1 << 16)
    shown = seen.decode()
    words = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\s", "", shown)  # a narrow terminal wraps the words
    os.close(ours)
    for text in (
        "step 30/40",
        "10 s left",
        "epoch 3",
        "812 images/s",
        "similarity 5.123",
        "data wait 12%",
    ):
        assert text.replace(" ", "") in words
    assert "━" in shown
    assert shown.endswith("\x1b[?25hsaved\r\n")  # the cursor is given back


def test_a_bar_counts_in_the_main_process_on_a_terminal_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(text: str | None, stream: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            with bar(text, 3) as advance:
                advance(2)

    monkeypatch.setenv("TERM", "xterm-256color")
    pipe = io.StringIO()
    shown("packing", pipe)
    assert pipe.getvalue() == ""
    ours, theirs = pty.openpty()
    with open(theirs, "w") as terminal:
        shown(None, terminal)
        with monkeypatch.context() as patch:
            patch.setattr(distributed, "rank", lambda: 1)
            shown("packing", terminal)
        terminal.flush()
        assert not select.select([ours], [], [], 0)[0]
        shown("packing", terminal)
        terminal.flush()
        seen = b""
        while select.select([ours], [], [], 0.2)[0]:
            seen += os.read(ours, 1 << 16)
    os.close(ours)
    assert "packing" in seen.decode()
    assert "2/3" in seen.decode()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-1, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (3_725, "1 h 02 min"), (200_000, "2 d 07 h")],
)
def test_durations_are_said_in_two_units(seconds: float, words: str) -> None:
    assert _duration(seconds) == words
