# SPDX-License-Identifier: Apache-2.0
"""Losses that nobody waited for are looked at in time and told with their own step; processes look up together."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hostile import on_digits
from small_trainings import as_on_a_gpu, fail_at, training_on
from test_resume import assert_equal_to_the_bit
from tiny_recipes import tiny

from kinfold import checkpoint, distributed, meter
from kinfold.errors import UserError
from kinfold.log import read_metrics
from kinfold.pretrain import pretrain


def test_looking_later_changes_no_result(tmp_path: Path) -> None:
    pretrain(tiny("sce"), on_digits(tmp_path / "at-once"), quiet=True)
    with as_on_a_gpu():
        pretrain(tiny("sce"), on_digits(tmp_path / "later", log_every=4), quiet=True)
    first, second = checkpoint.load_latest(tmp_path / "at-once"), checkpoint.load_latest(tmp_path / "later")
    assert first is not None
    assert second is not None
    assert_equal_to_the_bit(first.state, second.state)


@pytest.mark.parametrize("log_every", [4, 1000])
def test_a_line_of_metrics_holds_the_losses_of_its_own_step_however_seldom_it_is_written(
    log_every: int, tmp_path: Path
) -> None:
    with as_on_a_gpu():
        for folder, often in (("all", 1), ("few", log_every)):
            pretrain(tiny("co2"), on_digits(tmp_path / folder, log_every=often), quiet=True)
    every = {line["step"]: line for line in read_metrics(tmp_path / "all")}
    few = read_metrics(tmp_path / "few")
    assert list(every) == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in few] == [step for step in (4, 6) if step == 6 or log_every == 4]
    for line in few:
        for name in ("loss", "loss/instance", "loss/consistency", "rate", "epoch"):
            assert line[name] == every[line["step"]][name], name


@pytest.mark.parametrize("settings", [{"log_every": 6}, {"log_every": 100, "checkpoint_steps": 3}], ids=repr)
def test_a_loss_seen_later_names_its_own_step_and_images_and_nothing_is_written_after_it(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meter.Rounds, "due", lambda *_: False)
    recipe, folder = tiny("moco", epochs=4), tmp_path / "run"
    with as_on_a_gpu() as patch:
        fail_at(patch, 4)
        with pytest.raises(UserError, match=r"not finite at step 4: \w+ nan") as told:
            pretrain(
                recipe, on_digits(folder, **{"checkpoint_steps": 2, "checkpoint_every": 100, **settings}), quiet=True
            )
    steps = [path.stem for path in checkpoint.standing(folder)]
    assert steps[0] <= "step-00000004"
    # The checkpoint of step 4 holds the weights that have just failed.
    good = next(step for step in steps if step < "step-00000004")
    assert f"{good}.pt" in str(told.value)
    assert all(line["step"] <= 4 for line in read_metrics(folder))
    training = training_on(recipe, "cpu", tmp_path)
    batch = list(training.loader.epoch(1))[1]  # three steps an epoch
    names = [training.source.name(int(position)) for position in batch.index]
    assert (folder / "not-finite-00000004-0.txt").read_text(encoding="utf-8").splitlines() == names


def test_a_probe_looks_at_no_encoder_that_a_bad_step_has_ruined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meter.Rounds, "due", lambda *_: False)
    with as_on_a_gpu() as patch:
        fail_at(patch, 1)
        run = on_digits(tmp_path / "run", log_every=100, checkpoint_steps=None, checkpoint_every=100, probe_every=1)
        with pytest.raises(UserError, match="not finite at step 1"):
            pretrain(tiny("moco"), run, quiet=True)
    assert [line["epoch"] for line in read_metrics(tmp_path / "run")] == [0]


def test_a_checkpoint_that_is_asked_for_directly_looks_first(tmp_path: Path) -> None:
    with as_on_a_gpu() as patch:
        training = training_on(tiny("moco"), "cpu", tmp_path)
        fail_at(patch, 0, float("inf"))
        for batch in training.loader.epoch(0):
            training.take_step(batch, 0)
    with pytest.raises(UserError, match="not finite at step 0: instance inf"):
        training.save()
    assert checkpoint.standing(tmp_path) == []


def test_a_process_whose_loss_was_ruined_by_another_one_says_whose_step_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with as_on_a_gpu():
        training = training_on(tiny("moco"), "cpu", tmp_path)
        for batch in training.loader.epoch(0):
            training.take_step(batch, 0)
    monkeypatch.setattr(distributed, "largest", lambda number, device: max(number, -1))
    with pytest.raises(UserError, match="not finite at step 1 in another process"):
        training.look()


# When the processes look up together.


def test_rounds_come_about_once_a_second_at_the_slowest_processs_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now, others = [0.0], [0]
    monkeypatch.setattr(meter, "time", SimpleNamespace(monotonic=lambda: now[0]))
    rounds = meter.Rounds(10)
    assert not rounds.due(10)
    assert rounds.due(11)
    now[0] = 0.1
    assert rounds.agree(11, 0, torch.device("cpu")) == 0
    assert (rounds.due(20), rounds.due(21)) == (False, True)
    monkeypatch.setattr(distributed, "largest", lambda number, device: max(number, others[0]))
    others[0] = 500_000  # another process takes half a second for a step
    now[0] = 1.1
    rounds.agree(21, 0, torch.device("cpu"))
    assert (rounds.due(22), rounds.due(23)) == (False, True)
    others[0] = 60_000_000
    rounds.agree(23, 0, torch.device("cpu"))
    assert rounds.due(24)
    others[0] = 0
    now[0] = 1.1001
    rounds.agree(24, 0, torch.device("cpu"))
    assert (rounds.due(123), rounds.due(124)) == (False, True)  # a hundred steps at most


def test_a_signal_to_one_process_reaches_all_at_the_next_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "largest", lambda number, device: max(number, int(signal.SIGTERM)))
    assert meter.Rounds(0).agree(1, 0, torch.device("cpu")) == signal.SIGTERM
