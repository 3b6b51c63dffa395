# SPDX-License-Identifier: Apache-2.0
"""The loop as a whole: what it writes, that looking changes nothing, and that it learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_resume import assert_equal_to_the_bit
from tiny_recipes import tiny

from kinfold.checkpoint import load_latest
from kinfold.export import rebuild_backbone
from kinfold.log import read_metrics
from kinfold.methods import METHODS
from kinfold.pretrain import Outcome, pretrain
from kinfold.reading import plain
from kinfold.recipe import Recipe, Run
from kinfold.run_folder import read_recipe


def go(folder: Path, recipe: Recipe, **settings: Any) -> Outcome:
    run = {"data": "digits", "limit": 150, "device": "cpu", "workers": 0, "log_every": 2, "probe_every": 1, **settings}
    return pretrain(recipe, Run(out=str(folder), **run), quiet=True)


@pytest.mark.parametrize("method", list(METHODS))
def test_looking_changes_nothing(method: str, tmp_path: Path) -> None:
    # Dropout would draw other numbers after a probe that consumed some; batch norm would move.
    recipe = tiny(method, batch_norm={"query_splits": 2})
    go(tmp_path / "watched", recipe, probe_every=1)
    go(tmp_path / "alone", recipe, probe_every=0)
    watched, alone = load_latest(tmp_path / "watched"), load_latest(tmp_path / "alone")
    assert watched is not None
    assert alone is not None
    assert_equal_to_the_bit(watched.state, alone.state)


def test_a_run_folder_holds_what_its_contract_says(tmp_path: Path) -> None:
    recipe = tiny("sce")
    done = go(tmp_path / "run", recipe)
    names = {path.name for path in done.folder.iterdir()}
    assert names == {
        *("recipe.yaml", "run.yaml", "metrics.jsonl", "checkpoints", "summary.json"),
        *("backbone.safetensors", "backbone.md", "encoder.safetensors"),
    }
    assert read_recipe(done.folder) == recipe
    summary = json.loads((done.folder / "summary.json").read_text())
    assert summary["finished"] is True
    assert summary["step"] == summary["steps"] == done.step == 8
    assert summary["unreadable"] == {"count": 0, "files": {}}

    found = load_latest(done.folder)
    assert found is not None
    backbone, about = rebuild_backbone(done.folder / "backbone.safetensors")
    assert about["name"] == "resnet10_w8"
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, found.state["learner"][f"encoder.backbone.{name}"]), name
    encoder = load_file(done.folder / "encoder.safetensors")
    assert {name.split(".")[0] for name in encoder} == {"backbone", "head"}


def test_metrics_tell_losses_speed_waiting_and_health(tmp_path: Path) -> None:
    lines = read_metrics(go(tmp_path / "run", tiny("co2")).folder)
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == [2, 4, 6, 8]
    for line in trained:
        assert line["loss"] == pytest.approx(line["loss/instance"] + line["loss/consistency"])
        assert line["images_per_second"] > 0
        assert 0 <= line["waiting"] <= 1
    probes = [line for line in lines if "probe/knn" in line]
    assert [line["epoch"] for line in probes] == [0, 1, 2]
    wanted = ["knn", "rankme", "alpha_req", "alignment", "uniformity", "spread", "target_entropy", "queue_age"]
    assert all(f"probe/{name}" in probes[-1] for name in wanted)


def test_a_finished_run_started_again_trains_no_step_and_keeps_its_weights(tmp_path: Path) -> None:
    first = go(tmp_path / "run", tiny("moco"))
    before = load_file(first.folder / "encoder.safetensors")
    again = go(tmp_path / "run", tiny("moco"))
    assert again.step == first.step
    assert_equal_to_the_bit(before, load_file(again.folder / "encoder.safetensors"))
    assert again.measures["knn"] == pytest.approx(first.measures["knn"])


def test_symmetric_and_multi_crop_views_train(tmp_path: Path) -> None:
    views = plain(tiny("sce"))["views"]
    small = {**views["augment"][0], "size": 5}
    several = {"augment": [*views["augment"], small], "pairs": [[0, 1], [1, 0], [2, 0], [2, 1]]}
    recipe = tiny("sce", views=several, predictor={"hidden": [24], "out": 16, "batch_norm": True, "last": "plain"})
    done = go(tmp_path / "run", recipe, probe_every=0)
    found = load_latest(done.folder)
    assert found is not None
    # Two key views of 32 images a step, eight steps, into a ring of 200.
    assert int(found.state["learner"]["memory.next"]) == 2 * 32 * 8 % 200


def test_half_a_minute_of_digits_teaches_kinship(tmp_path: Path) -> None:
    recipe = tiny(
        "sce", epochs=12, backbone={"name": "resnet10_w16", "stem": "small"}, memory={"name": "queue", "size": 512}
    )
    done = go(tmp_path / "run", recipe, limit=1437, probe_every=12)
    knn = [line["probe/knn"] for line in read_metrics(done.folder) if "probe/knn" in line]
    assert knn[-1] > knn[0] + 5, f"k-NN went from {knn[0]} to {knn[-1]}"


@pytest.mark.parametrize("rest", [2, 4, 7])
def test_a_short_last_batch_with_splits_and_parts_trains(rest: int, tmp_path: Path) -> None:
    recipe = tiny("invp", batch_norm={"query_splits": 4}, accumulate=4, epochs=1)
    done = go(tmp_path / "run", recipe, limit=64 + rest, probe_every=0)
    assert done.step == 3
