# SPDX-License-Identifier: Apache-2.0
"""Embeddings as a table: every readable image once, in order, with what made it, whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

from kinfold.data.sources import open_source
from kinfold.embeddings import embed
from kinfold.encoders import Backbone, build_backbone
from kinfold.errors import UserError
from kinfold.evaluate import FrozenBackbone
from kinfold.evaluate.features import extract, hash_of


@pytest.fixture(scope="module")
def backbone() -> FrozenBackbone:
    torch.manual_seed(0)
    module = build_backbone(Backbone(name="resnet10_w8", stem="small"), 3)
    return FrozenBackbone(module=module, size=16, description="a small one")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eight photos in two classes, one of them cut short."""
    random = np.random.default_rng(0)
    folder = tmp_path / "photos"
    for i in range(8):
        place = folder / ("bees" if i % 2 else "ants") / f"{i} é.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(place)
    broken = folder / "bees" / "3 é.png"
    broken.write_bytes(broken.read_bytes()[:200])
    return folder


@pytest.mark.parametrize("row_group", [1, 3, 100])
def test_every_readable_image_is_a_row_in_order(
    backbone: FrozenBackbone, photos: Path, tmp_path: Path, row_group: int
) -> None:
    written = embed(backbone, str(photos), tmp_path / "new" / "e.parquet", device="cpu", row_group=row_group)
    table = pq.read_table(written.path)
    source = open_source(str(photos))
    features, positions = extract(
        backbone.module, source, size=16, resize=18, channels=3, mean=backbone.mean, std=backbone.std
    )
    assert (written.images, written.dimension) == (7, 64)
    assert table["position"].to_pylist() == positions.tolist()
    assert table["path"].to_pylist() == [source.name(int(i)) for i in positions]
    assert source.labels is not None
    assert table["label"].to_pylist() == source.labels[positions].tolist()
    found = np.stack(table["embedding"].to_numpy())
    np.testing.assert_allclose(found, features.numpy(), rtol=1e-4, atol=1e-5)
    assert found.dtype == np.float32
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: float>[64]"
    about = pq.ParquetFile(written.path).metadata
    groups = [about.row_group(i).num_rows for i in range(about.num_row_groups)]
    assert max(groups) < 2 * row_group  # an unreadable image may leave a batch short, which the next one fills


def test_an_image_that_does_not_decode_is_named_with_the_reason(
    backbone: FrozenBackbone, photos: Path, tmp_path: Path
) -> None:
    written = embed(backbone, str(photos), tmp_path / "e.parquet", device="cpu")
    assert len(written.bad) == 1
    ((name, reason),) = written.bad.items()
    assert name.endswith("3 é.png")
    assert reason


def test_the_table_says_which_weights_made_it(backbone: FrozenBackbone, tmp_path: Path) -> None:
    written = embed(backbone, "digits", tmp_path / "e.parquet", device="cpu", limit=20, normalise=True)
    about = {k.decode(): v.decode() for k, v in pq.read_schema(written.path).metadata.items()}
    assert about["kinfold.weights_sha256"] == hash_of(backbone.module)
    assert about["kinfold.size"] == "16"
    assert json.loads(about["kinfold.classes"]) == list("0123456789")
    assert about["kinfold.data_fingerprint"] == open_source("digits", split="all", limit=20).fingerprint
    vectors = np.stack(pq.read_table(written.path)["embedding"].to_numpy())
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)


def test_images_without_labels_have_null(backbone: FrozenBackbone, photos: Path, tmp_path: Path) -> None:
    written = embed(backbone, str(photos / "ants"), tmp_path / "e.parquet", device="cpu")
    assert pq.read_table(written.path)["label"].to_pylist() == [None] * 4


def test_a_name_that_is_no_utf8_is_shown_as_escapes(backbone: FrozenBackbone, photos: Path, tmp_path: Path) -> None:
    original = os.fsencode(photos / "ants" / "0 é.png")
    os.rename(original, os.path.join(os.path.dirname(original), b"caf\xe9.png"))
    written = embed(backbone, str(photos), tmp_path / "e.parquet", device="cpu")
    assert any(path.endswith("caf\\xe9.png") for path in pq.read_table(written.path)["path"].to_pylist())


def test_a_run_that_breaks_leaves_the_old_table_and_nothing_else(
    backbone: FrozenBackbone, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out" / "e.parquet"
    embed(backbone, str(photos), out, device="cpu")
    before = out.read_bytes()

    class Breaking(nn.Flatten):
        calls = 0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().forward(images)

    broken = dataclasses.replace(backbone, module=Breaking())
    with pytest.raises(KeyboardInterrupt):
        embed(broken, str(photos), out, device="cpu", row_group=2)
    assert out.read_bytes() == before
    assert list(out.parent.iterdir()) == [out]


def test_a_disk_that_refuses_is_a_message_and_leaves_nothing(
    backbone: FrozenBackbone, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", refuse)
    with pytest.raises(UserError, match=r"No space left on device.*Make room"):
        embed(backbone, str(photos), tmp_path / "out" / "e.parquet", device="cpu")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_place_that_cannot_hold_a_table_is_refused_before_the_work(backbone: FrozenBackbone, tmp_path: Path) -> None:
    for out, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "e.csv", r"as \.parquet"),
        (Path("/dev/null/e.parquet"), "not a folder"),
    ):
        with pytest.raises(UserError, match=message):
            embed(backbone, "digits", out, device="cpu")


def test_the_backbone_is_the_same_after_as_before(backbone: FrozenBackbone, tmp_path: Path) -> None:
    backbone.module.train()
    before = hash_of(backbone.module)
    embed(backbone, "digits", tmp_path / "e.parquet", device="cpu", limit=30)
    assert backbone.module.training
    assert hash_of(backbone.module) == before
