# SPDX-License-Identifier: Apache-2.0
"""Run folders of others, broken checkpoints, a full disk, signals: a message, and every byte still there."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import bytes_of, fill_disk, on_digits, own, photos, signal_after
from small_trainings import fail_at
from test_resume import assert_equal_to_the_bit
from tiny_recipes import tiny

from kinfold import checkpoint
from kinfold.errors import UserError
from kinfold.evaluate import evaluate
from kinfold.export import export_file, read_backbone
from kinfold.pretrain import pretrain
from kinfold.reading import to_yaml


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINFOLD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run of six steps; only read."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    pretrain(tiny("moco"), on_digits(folder), quiet=True)
    return folder


def stop_at(step: int, folder: Path) -> None:
    """Leave a run folder that a SIGTERM has stopped after `step` steps."""
    with pytest.MonkeyPatch.context() as patch:
        signal_after(patch, step, signal.SIGTERM)
        assert pretrain(tiny("moco"), on_digits(folder), quiet=True).signal == signal.SIGTERM


def assert_goes_on(folder: Path, finished: Path) -> None:
    """Start again and end as an undisturbed run does, to the bit."""
    assert pretrain(tiny("moco"), on_digits(folder), quiet=True).step == 6
    ended, expected = checkpoint.load_latest(folder), checkpoint.load_latest(finished)
    assert ended is not None
    assert expected is not None
    assert_equal_to_the_bit(expected.state, ended.state)
    weights = [read_backbone(run / "backbone.safetensors")[0] for run in (finished, folder)]
    assert_equal_to_the_bit(*weights)


# Folders that belong to something else.


def test_a_run_folder_of_another_recipe_is_refused_with_what_differs_and_not_touched(tmp_path: Path) -> None:
    stop_at(2, tmp_path / "run")
    before = bytes_of(tmp_path / "run")
    other = tiny("moco", epochs=5, memory={"name": "queue", "size": 300})
    with pytest.raises(UserError, match=r"(?s)another recipe.*memory\.size: 300 here, 200.*epochs: 5 here, 2"):
        pretrain(other, on_digits(tmp_path / "run"), quiet=True)
    assert bytes_of(tmp_path / "run") == before


def test_a_run_folder_of_other_images_is_refused_and_not_touched(tmp_path: Path) -> None:
    photos(tmp_path / "photos", 8)
    own(tmp_path / "photos", tmp_path / "run", "epochs=1")
    before = bytes_of(tmp_path / "run")
    photos(tmp_path / "photos", 9)
    with pytest.raises(UserError, match=r"(?s)images have changed since .*8 then, 9 now"):
        own(tmp_path / "photos", tmp_path / "run", "epochs=1")
    assert bytes_of(tmp_path / "run") == before


@pytest.mark.parametrize("name", ["run.yaml", "metrics.jsonl", "summary.json", "backbone.md"])
def test_a_folder_with_files_of_ones_own_is_not_written_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=rf"holds {name}, which a run would write over"):
        pretrain(tiny("moco"), on_digits(tmp_path), quiet=True)
    assert bytes_of(tmp_path) == {name: b"mine"}


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[1", b"- 1", b"name: my cake"])
def test_a_recipe_of_something_else_in_the_folder_is_not_taken_for_a_run(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"recipe\.yaml|another recipe"):
        pretrain(tiny("moco"), on_digits(tmp_path), quiet=True)
    assert bytes_of(tmp_path) == {"recipe.yaml": content}


def test_a_file_in_the_place_of_the_run_folder_stays_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    for out in (tmp_path / "run", tmp_path / "run" / "below"):
        with pytest.raises(UserError, match=r"is a file|takes no files"):
            pretrain(tiny("moco"), on_digits(out), quiet=True)
    assert (tmp_path / "run").read_text() == "mine"


def test_a_place_where_no_folder_can_be_made_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match=r"cannot be written: .* takes no files"):
        pretrain(tiny("moco"), on_digits(tmp_path / "run"), quiet=True)


def test_a_card_and_a_result_never_take_the_place_of_a_file_of_ones_own(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("# My notes\n")
    (tmp_path / "package.json").write_text('{"name": "mine"}')
    before = bytes_of(tmp_path)
    with pytest.raises(UserError, match=r"notes\.md, which is no card"):
        export_file(finished, tmp_path / "notes.safetensors", names="kinfold")
    with pytest.raises(UserError, match="no result of an evaluation"):
        evaluate("knn", str(finished), "digits", out=tmp_path / "package.json")
    with pytest.raises(UserError, match=r"notes\.md is a file"):
        evaluate("knn", str(finished), "digits", out=tmp_path / "notes.md")
    assert bytes_of(tmp_path) == before
    export_file(finished, tmp_path / "mine.safetensors", names="kinfold")
    export_file(finished, tmp_path / "mine.safetensors", names="kinfold")  # its own card is replaced


def test_evaluation_adds_to_the_run_folder_and_changes_nothing_in_it(tmp_path: Path) -> None:
    stop_at(2, tmp_path / "run")
    before = bytes_of(tmp_path / "run")
    evaluate("knn", str(tmp_path / "run"), "digits", limit=80, workers=0, say=lambda text: None)
    after = bytes_of(tmp_path / "run")
    assert {name: content for name, content in after.items() if not name.startswith("evaluate")} == before
    assert len(after) == len(before) + 1


# Checkpoints.


def test_a_truncated_checkpoint_is_told_on_the_console_and_the_one_before_goes_on(
    tmp_path: Path, finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stop_at(4, tmp_path / "run")
    broken = tmp_path / "run" / "checkpoints" / "step-00000004.pt"
    broken.write_bytes(broken.read_bytes()[:-100])
    capfd.readouterr()
    assert_goes_on(tmp_path / "run", finished)
    assert "warning: step-00000004.pt: truncated or damaged" in (said := capfd.readouterr().err)
    assert "the checkpoint before it is used" in said


def test_when_every_checkpoint_is_broken_the_run_does_not_start_over_and_deletes_none(tmp_path: Path) -> None:
    stop_at(3, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("*.pt"):
        path.write_bytes(b"no longer")
    before = bytes_of(tmp_path / "run")
    with pytest.raises(UserError, match=r"(?s)No checkpoint .* can be read.*step-00000003.*step-00000002"):
        pretrain(tiny("moco"), on_digits(tmp_path / "run"), quiet=True)
    assert bytes_of(tmp_path / "run") == before


@pytest.mark.parametrize(
    "name",
    ["step-00000004.pt", "metrics.jsonl", "backbone.safetensors", "encoder.safetensors", "summary.json", "run.yaml"],
)
def test_a_disk_that_is_full_for_one_file_costs_no_checkpoint_and_a_later_start_goes_on(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    stop_at(3, tmp_path / "run")
    before = bytes_of(tmp_path / "run")
    with monkeypatch.context() as patch:
        fill_disk(patch, name)
        with pytest.raises(UserError, match=f"{'checkpoint of step 4' if '.pt' in name else name}.*No space left"):
            pretrain(tiny("moco"), on_digits(tmp_path / "run"), quiet=True)
    after = bytes_of(tmp_path / "run")
    assert not [left for left in after if ".tmp" in left or ".partial" in left]
    found = checkpoint.load_latest(tmp_path / "run")
    assert found is not None
    assert found.skipped == []
    if found.step == 3:
        checkpoints = {left: content for left, content in after.items() if left.endswith(".pt")}
        assert checkpoints == {left: content for left, content in before.items() if left.endswith(".pt")}
    assert_goes_on(tmp_path / "run", finished)


def test_a_limit_on_the_size_of_files_ends_the_command_with_a_message_and_the_checkpoint_stands(
    tmp_path: Path, finished: Path
) -> None:
    stop_at(3, tmp_path / "run")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(tiny("moco")))
    before = bytes_of(tmp_path / "run" / "checkpoints")
    words = ["device=cpu", "workers=0", "limit=96", "probe_every=0", "checkpoint_steps=1"]
    ended = subprocess.run(
        [sys.executable, "-m", "kinfold", "pretrain", "digits", "-r", recipe, "-o", tmp_path / "run", *words],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 2
    assert "error: The checkpoint of step 4 could not be written" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "Exception ignored" not in ended.stderr
    left = bytes_of(tmp_path / "run" / "checkpoints")
    assert {name: left[name] for name in before} == before
    assert_goes_on(tmp_path / "run", finished)


# Losses that are no number, and signals.


def test_a_loss_that_is_not_finite_names_the_step_the_images_and_the_last_good_checkpoint(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_at(patch, 4)
        with pytest.raises(UserError, match=r"not finite at step 4: \w+ nan") as told:
            pretrain(tiny("moco"), on_digits(tmp_path / "run"), quiet=True)
    assert "digits, number" in str(told.value)
    # The checkpoint of step 4 holds the weights that have just failed.
    assert "The last good checkpoint is" in str(told.value)
    assert "step-00000003.pt" in str(told.value)
    assert_goes_on(tmp_path / "run", finished)


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(2, tmp_path / "run")
    before = bytes_of(tmp_path / "run" / "checkpoints")
    real = torch.optim.SGD.step

    def step(self: torch.optim.SGD, *arguments: Any) -> None:
        real(self, *arguments)
        with torch.no_grad():
            self.param_groups[0]["params"][0].mul_(float("inf"))

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    with pytest.raises(UserError, match=r"After step 3 the weights .* are not finite, so no checkpoint is written"):
        pretrain(tiny("moco"), on_digits(tmp_path / "run"), quiet=True)
    assert bytes_of(tmp_path / "run" / "checkpoints") == before


def test_a_second_ctrl_c_ends_at_once_and_the_run_goes_on_later(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        signal_after(patch, 3, signal.SIGINT, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            pretrain(tiny("moco"), on_digits(tmp_path / "run"), quiet=True)
    found = checkpoint.load_latest(tmp_path / "run")
    assert found is not None
    assert found.step == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_goes_on(tmp_path / "run", finished)


def test_a_signal_before_the_first_step_is_heard_after_it(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kinfold.probes import Probes

    real = Probes.measure

    def measure(self: Probes, *arguments: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Probes, "measure", measure)
        done = pretrain(tiny("moco"), on_digits(tmp_path / "run", probe_every=5), quiet=True)
    assert (done.step, done.signal) == (1, signal.SIGTERM)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["finished"] is False
    assert_goes_on(tmp_path / "run", finished)


def test_ctrl_c_in_a_terminal_reaches_the_workers_too_and_still_ends_cleanly(tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(to_yaml(tiny("moco", epochs=500)))
    words = ["device=cpu", "workers=2", "resident=false", "limit=96", "probe_every=0", "checkpoint_steps=1"]
    run = subprocess.Popen(
        [sys.executable, "-m", "kinfold", "pretrain", "digits", "-r", recipe, "-o", out, *words],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group of its own, as a terminal gives to a command
    )
    while run.poll() is None and not list((out / "checkpoints").glob("*.pt")):
        with pytest.raises(subprocess.TimeoutExpired):
            run.wait(0.05)
    os.killpg(run.pid, signal.SIGINT)
    said, warned = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGINT, warned
    assert "Stopped at step" in said
    assert "Traceback" not in warned
    assert checkpoint.load_latest(out) is not None
