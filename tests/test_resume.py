# SPDX-License-Identifier: Apache-2.0
"""Promise 5: a run that was killed goes on bit for bit, for every method, in the middle of an epoch."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_recipes import tiny
from torch import multiprocessing

from kinfold.checkpoint import load_latest
from kinfold.methods import METHODS
from kinfold.pretrain import pretrain
from kinfold.reading import to_yaml
from kinfold.recipe import load

IMAGES = 150  # four and a half steps of 32 an epoch


# The imports are done once: every run is a process of its own, forked from a server that has them.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["kinfold.pretrain", "sklearn.datasets"])


def go(folder: str, recipe: str, workers: int) -> None:
    """Run, or go on, as the command does; ends with 128 and the signal that stopped it."""
    torch.set_num_threads(1)
    os.setsid()  # so that its worker processes can be killed with it
    multiprocessing.set_start_method("fork", force=True)  # workers start as they do under the command
    asked, where = load(
        recipe,
        [
            f"workers={workers}",
            f"limit={IMAGES}",
            "resident=false",
            "checkpoint_steps=2",
            "checkpoint_every=1000",
            "probe_every=0",
            "log_every=1",
        ],
        run={"data": "digits", "out": folder, "device": "cpu"},
    )
    done = pretrain(asked, where, quiet=True)
    if done.signal is not None:
        sys.exit(128 + done.signal)


def run(folder: Path, recipe: Path, workers: int) -> None:
    process = processes.Process(target=go, args=(str(folder), str(recipe), workers))
    process.start()
    process.join(240)
    assert process.exitcode == 0


def kill_at(folder: Path, recipe: Path, workers: int, step: int, how: signal.Signals) -> int:
    """Start a run, send it `how` once the checkpoint of `step` is there, and return its exit code."""
    process = processes.Process(target=go, args=(str(folder), str(recipe), workers))
    process.start()
    deadline = time.monotonic() + 200
    while not any(int(p.stem[5:]) >= step for p in (folder / "checkpoints").glob("step-*.pt")):
        assert process.is_alive(), f"the run ended by itself with {process.exitcode}"
        assert time.monotonic() < deadline, "the run wrote no checkpoint in time"
        time.sleep(0.002)
    assert process.pid is not None
    if how == signal.SIGKILL:
        os.killpg(process.pid, how)
    else:
        os.kill(process.pid, how)
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def assert_equal_to_the_bit(first: object, second: object, where: str = "") -> None:
    if isinstance(first, dict):
        assert isinstance(second, dict)
        assert first.keys() == second.keys(), where
        for key in first:
            assert_equal_to_the_bit(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, list | tuple):
        assert isinstance(second, list | tuple)
        assert len(first) == len(second), where
        for i, (a, b) in enumerate(zip(first, second)):
            assert_equal_to_the_bit(a, b, f"{where}[{i}]")
    elif isinstance(first, torch.Tensor):
        assert isinstance(second, torch.Tensor)
        assert torch.equal(first, second), f"{where} differs by {(first.double() - second.double()).abs().max()}"
    else:
        assert first == second, where


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("method", list(METHODS))
def test_a_killed_run_ends_with_the_state_of_an_uninterrupted_one(method: str, workers: int, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(tiny(method, batch_norm={"key_splits": 4, "shuffle_keys": True})))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(whole, recipe, workers)
    steps = load_latest(whole)
    assert steps is not None
    # A random moment in one of the epochs; a kill that came at an epoch's end or too late is tried again elsewhere.
    for _ in range(8):
        shutil.rmtree(broken, ignore_errors=True)
        step = random.SystemRandom().choice([2, 6])
        assert kill_at(broken, recipe, workers, step, signal.SIGKILL) == -signal.SIGKILL
        found = load_latest(broken)
        assert found is not None
        if found.step % found.state["steps_per_epoch"] and found.step < steps.step:
            break
    print(f"killed after the checkpoint of step {found.step}")
    assert found.step % found.state["steps_per_epoch"], "no kill came in the middle of an epoch"
    # The other number of workers after the restart: what a run computes does not depend on it.
    run(broken, recipe, 2 - workers)
    resumed = load_latest(broken)
    assert resumed is not None
    assert_equal_to_the_bit(steps.state, resumed.state)

    lines = [json.loads(line) for line in (broken / "metrics.jsonl").read_text().splitlines()]
    trained = [line["step"] for line in lines if "loss" in line]
    assert trained == list(range(1, steps.step + 1)), "a step is missing in the metrics, or stands twice"
    reference = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [x["loss"] for x in lines if "loss" in x] == [x["loss"] for x in reference if "loss" in x]


def test_the_number_of_workers_changes_no_bit(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(tiny("sce", epochs=1)))
    states = []
    for workers in (0, 2):
        run(tmp_path / str(workers), recipe, workers)
        found = load_latest(tmp_path / str(workers))
        assert found is not None
        states.append(found.state)
    assert_equal_to_the_bit(states[0], states[1])


def test_sigterm_writes_a_checkpoint_and_exits_cleanly(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(tiny("moco", epochs=200)))
    folder = tmp_path / "run"
    code = kill_at(folder, recipe, 0, 3, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    found = load_latest(folder)
    assert found is not None
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["finished"] is False
    assert summary["step"] == found.step
    assert not list((folder / "checkpoints").glob("*.tmp"))
