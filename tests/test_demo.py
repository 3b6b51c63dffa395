# SPDX-License-Identifier: Apache-2.0
"""The demo leads from images to files that can be opened, and its picture shows the nearest images."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import kinfold.demo
from kinfold import rebuild_backbone
from kinfold.contact_sheet import nearest_sheet
from kinfold.recipe import Recipe, Run, load
from kinfold.training import Training

ROOT = Path(__file__).parents[1]
SIDE, GAP = 8, 4
"""of the pictures on a sheet, and between them, in pixels"""


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the demo take two epochs of a narrow backbone, in this process."""

    def brief(name: str, overrides: Sequence[str], *, run: dict[str, Any]) -> tuple[Recipe, Run]:
        words = ["epochs=2", "learning_rate.warmup_epochs=1", "backbone.name=resnet10_w8", "device=cpu", "workers=0"]
        return load(name, [*overrides, *words], run=run)

    monkeypatch.setattr(kinfold.demo, "load", brief)


def told(text: str) -> dict[str, Path]:
    """What the demo names in its last lines, and where it is."""
    pairs = [line.split(maxsplit=1) for line in text.splitlines() if line.startswith("  ") and "/" in line]
    return {words[0]: Path(words[1].strip()) for words in pairs if len(words) == 2}


@pytest.mark.usefixtures("short")
def test_the_demo_ends_with_files_that_open_and_does_not_train_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "demo"
    kinfold.demo.demo(out)
    said = capsys.readouterr().out
    files = told(said.partition("k-NN accuracy on held-out digits")[2])
    assert list(files) == ["backbone", "embeddings", "neighbours", "evaluation", "metrics"]
    assert all(path.is_file() for path in files.values())

    module, about = rebuild_backbone(files["backbone"])
    features = module.eval()(torch.zeros(1, 1, 8, 8))  # [1, F]
    assert features.ndim == 2
    assert about
    table = pq.read_table(files["embeddings"])
    assert table.num_rows == 1797
    assert sorted(table.column("position").to_pylist()) == list(range(1797))
    with Image.open(files["neighbours"]) as sheet:
        sheet.load()
        # 12 rows of one image and its 8 nearest, 64 pixels each, 4 between them, and a wider gap behind the first
        assert sheet.size == (9 * (64 + 4) + 12, 12 * (64 + 4) + 4)

    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    before, after = importlib.import_module("demo_time").accuracies(out)
    assert f"{before:.1f} % untrained, {after:.1f} % now" in said

    def refuse(*_: object) -> None:
        raise AssertionError("the demo trains again")

    monkeypatch.setattr(Training, "take_step", refuse)
    log = files["metrics"].read_bytes()
    kinfold.demo.demo(out)
    again = capsys.readouterr().out
    assert told(again.partition("k-NN accuracy on held-out digits")[2]) == files
    assert files["metrics"].read_bytes() == log
    weights = rebuild_backbone(files["backbone"])[0].state_dict()
    assert weights.keys() == module.state_dict().keys()
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())


class Plain:
    """Images of one colour each."""

    labels = None
    classes = None
    fingerprint = "colours"
    description = "6 colours"

    def __len__(self) -> int:
        return 6

    def read(self, i: int) -> np.ndarray:  # type: ignore[type-arg]
        """Give image `i`, whose red says which it is."""
        return np.full((SIDE, SIDE, 3), (40 * i, 10, 200), dtype=np.uint8)

    def name(self, i: int) -> str:
        """Give the name of image `i`."""
        return f"{i}.png"


def drawn(path: Path, rows: int, columns: int) -> list[list[int]]:
    """Which image stands in each place of a sheet of `Plain`, by its pixels."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)  # [H, W, 3]
    found = []
    for row in range(rows):
        top = GAP + row * (SIDE + GAP)
        lefts = [GAP + column * (SIDE + GAP) + (2 * GAP if column else 0) for column in range(columns)]
        tiles = [pixels[top : top + SIDE, left : left + SIDE] for left in lefts]  # each [SIDE, SIDE, 3]
        assert all((tile == tile[0, 0]).all() for tile in tiles), "a picture is not where it should be"
        assert all(tile[0, 0, 1:].tolist() == [10, 200] for tile in tiles)
        found.append([int(tile[0, 0, 0]) // 40 for tile in tiles])
    return found


def test_the_nearest_images_are_the_ones_that_are_drawn(tmp_path: Path) -> None:
    # On a circle the nearest are the next; lengths differ, because nearness is a matter of direction. Image 2 could
    # not be read, so the rows of the features are not the numbers of the images.
    degrees = torch.tensor([0.0, 100.0, 10.0, 130.0, 35.0])  # [n]
    lengths = torch.tensor([1.0, 5.0, 0.1, 1.0, 9.0])  # [n]
    features = lengths[:, None] * torch.stack([degrees.deg2rad().cos(), degrees.deg2rad().sin()], dim=1)  # [n, 2]
    positions = np.array([5, 1, 3, 0, 4])
    path = nearest_sheet(Plain(), features, positions, tmp_path / "new" / "sheet.png", asking=5, nearest=2, side=SIDE)
    assert path == tmp_path / "new" / "sheet.png"
    assert drawn(path, rows=5, columns=3) == [[5, 3, 4], [1, 0, 4], [3, 5, 4], [0, 1, 4], [4, 3, 5]]


def test_a_sheet_of_few_images_asks_spread_over_them_and_shows_what_there_is(tmp_path: Path) -> None:
    features = torch.eye(3) + 0.1 * torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])  # [n, 3]
    path = nearest_sheet(Plain(), features, np.array([0, 2, 4]), tmp_path / "sheet.png", asking=2, nearest=8, side=SIDE)
    found = drawn(path, rows=2, columns=3)
    assert [row[0] for row in found] == [0, 4]
    assert [set(row[1:]) for row in found] == [{2, 4}, {0, 2}]
