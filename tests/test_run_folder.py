# SPDX-License-Identifier: Apache-2.0
"""One run a folder at a time, and files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny_recipes import tiny

from kinfold import checkpoint
from kinfold.errors import UserError
from kinfold.recipe import Run
from kinfold.run_folder import claimed, held, whole


def test_a_folder_is_one_runs_at_a_time(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(UserError, match="another process is at work"), held(tmp_path, patience=0):
        pass
    with held(tmp_path, patience=0):
        pass


def test_a_folder_is_free_when_its_run_ends_though_a_child_lives_on(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with held(tmp_path):
        child = os.fork()
        if child == 0:
            os.close(writing)
            os.read(reading, 1)  # until the parent is done
            os._exit(0)
    try:
        with held(tmp_path, patience=0):
            pass
    finally:
        os.close(writing)
        os.close(reading)
        os.waitpid(child, 0)


def test_a_folder_in_which_another_run_went_on_is_refused_and_its_run_yaml_stands(tmp_path: Path) -> None:
    recipe, run = tiny("moco"), Run(data="digits", out=str(tmp_path))
    before = checkpoint.standing(tmp_path)
    with claimed(tmp_path, recipe, run, standing=before):
        text = (tmp_path / "run.yaml").read_text()
        checkpoint.save(tmp_path, {"step": 3}, step=3)
    other = Run(data="digits", out=str(tmp_path), limit=7)
    with pytest.raises(UserError, match="gone on"), claimed(tmp_path, recipe, other, standing=before):
        pass
    assert (tmp_path / "run.yaml").read_text() == text


def test_a_file_that_fails_half_way_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text("old")

    def write_half() -> None:
        with whole(path) as partial:
            partial.write_text("ne")
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        write_half()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
