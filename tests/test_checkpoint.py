# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint promises: it is whole or it is not there, and the older one stands."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import resource
import signal
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kinfold import checkpoint
from kinfold.errors import UserError


def state_of(step: int, size: int = 1000) -> dict[str, Any]:
    return {
        "weights": OrderedDict(w=torch.full((size,), float(step))),
        "recipe": "method: sce",
        "at": (step, None, 0.5),
    }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def in_a_child(function: Any, *arguments: Any) -> multiprocessing.process.BaseProcess:
    child = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    child.start()
    return child


def test_what_was_saved_comes_back_equal(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state_of(1234), step=1234)
    assert path == tmp_path / "checkpoints" / "step-00001234.pt"
    loaded = checkpoint.load_latest(tmp_path)
    assert loaded is not None
    assert (loaded.path, loaded.step, loaded.skipped) == (path, 1234, [])
    assert torch.equal(loaded.state["weights"]["w"], torch.full((1000,), 1234.0))
    assert loaded.state["recipe"] == "method: sce"
    assert loaded.state["at"] == (1234, None, 0.5)


def test_a_module_and_its_optimiser_come_back_equal(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(8, 3)).square().sum().backward()
    optimiser.step()
    checkpoint.save(tmp_path, {"model": model.state_dict(), "optimiser": optimiser.state_dict()}, step=1)
    loaded = checkpoint.load_latest(tmp_path)
    assert loaded is not None
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state["model"][name], value)
    for i, slot in optimiser.state_dict()["state"].items():
        assert torch.equal(loaded.state["optimiser"]["state"][i]["momentum_buffer"], slot["momentum_buffer"])


def test_a_folder_without_checkpoints_is_a_fresh_start(tmp_path: Path) -> None:
    assert checkpoint.load_latest(tmp_path / "nowhere") is None
    (tmp_path / "checkpoints").mkdir()
    assert checkpoint.load_latest(tmp_path) is None


def test_only_the_newest_are_kept_by_step_and_not_by_spelling(tmp_path: Path) -> None:
    for step in (5, 99_999_999, 100_000_000, 100_000_001):
        checkpoint.save(tmp_path, state_of(step), step=step, keep=2)
    stay = ["step-100000000.pt", "step-100000001.pt"]
    assert names(tmp_path) == sorted(name + end for name in stay for end in ("", ".sha256"))
    loaded = checkpoint.load_latest(tmp_path)
    assert loaded is not None
    assert loaded.step == 100_000_001


def test_the_hash_beside_the_file_is_the_one_sha256sum_would_print(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state_of(7), step=7)
    line = path.with_name(path.name + ".sha256").read_text()
    assert line == f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"


@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
def test_a_damaged_file_is_passed_over_and_named(tmp_path: Path, damage: Any) -> None:
    checkpoint.save(tmp_path, state_of(1), step=1)
    damage(checkpoint.save(tmp_path, state_of(2), step=2))
    loaded = checkpoint.load_latest(tmp_path)
    assert loaded is not None
    assert loaded.step == 1
    assert torch.equal(loaded.state["weights"]["w"], torch.full((1000,), 1.0))
    assert len(loaded.skipped) == 1
    assert "step-00000002.pt: truncated or damaged" in loaded.skipped[0]


def test_every_single_bit_counts(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state_of(1, size=4), step=1)
    newest = checkpoint.save(tmp_path, state_of(2, size=4), step=2)
    whole = newest.read_bytes()
    for position in range(0, len(whole), 97):
        newest.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
        loaded = checkpoint.load_latest(tmp_path)
        assert loaded is not None
        assert loaded.step == 1


def test_a_file_without_its_hash_is_passed_over_and_named(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state_of(1), step=1)
    path = checkpoint.save(tmp_path, state_of(2), step=2)
    path.with_name(path.name + ".sha256").unlink()
    loaded = checkpoint.load_latest(tmp_path)
    assert loaded is not None
    assert loaded.step == 1
    assert "missing" in loaded.skipped[0]


def test_nothing_readable_is_an_error_that_names_each_file(tmp_path: Path) -> None:
    truncate(checkpoint.save(tmp_path, state_of(1), step=1))
    flip_a_bit(checkpoint.save(tmp_path, state_of(2), step=2))
    with pytest.raises(UserError) as error:
        checkpoint.load_latest(tmp_path)
    assert "step-00000001.pt" in str(error.value)
    assert "step-00000002.pt" in str(error.value)


def test_a_newer_format_is_refused_and_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, state_of(1), step=1)
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    checkpoint.save(tmp_path, state_of(2), step=2)
    monkeypatch.undo()
    with pytest.raises(UserError, match="format 2"):
        checkpoint.load_latest(tmp_path)


def test_the_only_good_checkpoint_survives_a_broken_one_of_a_later_step(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state_of(10), step=10, keep=1)
    truncate(checkpoint.save(tmp_path, state_of(30), step=30, keep=2))
    checkpoint.save(tmp_path, state_of(20), step=20, keep=1)
    loaded = checkpoint.load_latest(tmp_path)
    assert loaded is not None
    assert loaded.step == 20
    checkpoint.save(tmp_path, state_of(30), step=30, keep=1)
    assert names(tmp_path) == ["step-00000030.pt", "step-00000030.pt.sha256"]
    loaded = checkpoint.load_latest(tmp_path)
    assert loaded is not None
    assert (loaded.step, loaded.skipped) == (30, [])


@pytest.mark.parametrize("value", [np.float64(1.0), np.zeros(3), {1, 2}, Path("x"), object()])
def test_what_could_not_be_read_back_is_refused_before_writing(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\]"):
        checkpoint.save(tmp_path, {"a": [0, value]}, step=1)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_is_told_and_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    checkpoint.save(tmp_path, state_of(1), step=1)
    before = names(tmp_path)

    def refuse(*arguments: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if call == "write":
        real = Path.open

        class Full:
            """A file that takes its first 4 kB and then has no room."""

            def __init__(self, file: Any) -> None:
                self.file, self.room = file, 4096

            def write(self, data: Any) -> int:
                self.room -= memoryview(data).nbytes
                if self.room < 0:
                    refuse()
                return int(self.file.write(data))

            def __getattr__(self, name: str) -> Any:
                return getattr(self.file, name)

        monkeypatch.setattr(
            Path,
            "open",
            lambda path, *a, **n: Full(real(path, *a, **n)) if path.suffix == ".tmp" else real(path, *a, **n),
        )
    else:
        monkeypatch.setattr(os, call, refuse)
    with pytest.raises(UserError, match="No space left on device") as error:
        checkpoint.save(tmp_path, state_of(2, size=500_000), step=2)
    monkeypatch.undo()
    assert "It takes 2.0 MB" in str(error.value)
    assert "free" in str(error.value)
    assert "The checkpoint of step 1 stands" in str(error.value)
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]
    assert [name for name in names(tmp_path) if name != "step-00000002.pt.sha256"] == before
    loaded = checkpoint.load_latest(tmp_path)
    assert loaded is not None
    assert (loaded.step, loaded.skipped) == (1, [])


def save_with_little_room(folder: Path, report: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    try:
        checkpoint.save(folder, state_of(2, size=1_000_000), step=2)
    except UserError as error:
        report.write_text(str(error))


def test_a_limit_that_the_system_sets_is_told_and_costs_nothing(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state_of(1), step=1)
    before = names(tmp_path)
    child = in_a_child(save_with_little_room, tmp_path, tmp_path / "report")
    child.join(60)
    assert child.exitcode == 0
    message = (tmp_path / "report").read_text()
    assert "It takes 4.0 MB" in message
    assert "The checkpoint of step 1 stands" in message
    assert names(tmp_path) == before


def save_for_ever(folder: Path, first: int) -> None:
    for step in range(first, first + 1_000_000):
        checkpoint.save(folder, state_of(step, size=400_000), step=step)


def test_a_process_killed_at_any_moment_leaves_a_folder_that_loads(tmp_path: Path) -> None:
    step = 0
    checkpoint.save(tmp_path, state_of(step, size=400_000), step=step)
    for i in range(12):
        child = in_a_child(save_for_ever, tmp_path, step + 1)
        time.sleep(0.1 + 0.013 * i)
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        loaded = checkpoint.load_latest(tmp_path)
        assert loaded is not None
        assert loaded.skipped == []
        assert loaded.step >= step
        step = loaded.step
        assert torch.equal(loaded.state["weights"]["w"], torch.full((400_000,), float(step)))
    assert step > 0
    checkpoint.save(tmp_path, state_of(step + 1), step=step + 1, keep=1)
    assert names(tmp_path) == [f"step-{step + 1:08d}.pt", f"step-{step + 1:08d}.pt.sha256"]


def test_a_kill_between_the_hash_and_the_rename_keeps_the_older_file_of_the_same_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint.save(tmp_path, state_of(1), step=1)
    real = os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(target) == path:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, state_of(8), step=1)
    monkeypatch.undo()
    loaded = checkpoint.load_latest(tmp_path)
    assert loaded is not None
    assert torch.equal(loaded.state["weights"]["w"], torch.full((1000,), 1.0))


def test_what_a_killed_run_left_is_removed_by_the_next_save_and_nothing_else_is(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in (
        "step-00000003.pt.tmp",
        "step-00000003.pt.sha256",
        "step-00000002.pt.sha256.tmp",
        "notes.txt",
        "best.pt",
    ):
        (folder / name).write_text("x")
    checkpoint.save(tmp_path, state_of(4), step=4, keep=1)
    assert names(tmp_path) == ["best.pt", "notes.txt", "step-00000004.pt", "step-00000004.pt.sha256"]
