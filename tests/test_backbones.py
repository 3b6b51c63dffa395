# SPDX-License-Identifier: Apache-2.0
"""Backbones to evaluate come back as they were written, with their head and their numbers, or with a message."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from kinfold.encoders import Encoder, build_backbone, build_head
from kinfold.errors import UserError
from kinfold.evaluate import evaluate
from kinfold.evaluate.backbones import FrozenBackbone, hash_of, load_backbone
from kinfold.evaluate.features import frozen
from kinfold.export import export_backbone
from kinfold.reading import to_yaml
from kinfold.recipe import Recipe, load
from kinfold.run_folder import write_encoder, write_text

IMAGES = torch.linspace(-2, 2, 3 * 8 * 8).sin().view(3, 1, 8, 8)


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, Encoder, Recipe]:
    """A run folder as pretraining leaves it, and what was trained."""
    recipe, _ = load("digits", ["backbone.name=resnet10_w8"], run={"data": "digits", "out": str(tmp_path)})
    backbone = build_backbone(recipe.backbone, 1)
    encoder = Encoder(backbone, build_head(recipe.head, int(backbone.num_features)))  # type: ignore[arg-type]
    encoder(IMAGES)  # running statistics that are not the first ones
    folder = tmp_path / "run"
    folder.mkdir()
    write_text(folder / "recipe.yaml", to_yaml(recipe))
    card = {
        "name": recipe.backbone.name,
        "stem": recipe.backbone.stem,
        "channels": 1,
        "mean": list(recipe.images.mean),
        "std": list(recipe.images.std),
        "size": 8,
    }
    export_backbone(backbone, folder / "backbone.safetensors", card=card)
    write_encoder(folder, encoder)
    return folder, encoder, recipe


def features(network: nn.Module) -> torch.Tensor:
    with frozen(network):
        found: torch.Tensor = network(IMAGES)
    return found


def test_a_run_folder_gives_backbone_head_and_numbers_back(run: tuple[Path, Encoder, Recipe]) -> None:
    folder, encoder, recipe = run
    found = load_backbone(str(folder))
    assert (found.size, found.channels, found.mean, found.std) == (8, 1, recipe.images.mean, recipe.images.std)
    assert found.folder == folder
    assert hash_of(found.module) == hash_of(encoder.backbone)
    assert torch.equal(features(found.network("backbone")), features(encoder.backbone))
    assert torch.equal(features(found.network("head")), features(encoder))


def test_an_exported_file_gives_the_same_backbone_and_no_head(run: tuple[Path, Encoder, Recipe]) -> None:
    folder, encoder, recipe = run
    found = load_backbone(str(folder / "backbone.safetensors"))
    assert (found.size, found.channels, found.mean, found.std) == (8, 1, recipe.images.mean, recipe.images.std)
    assert torch.equal(features(found.module), features(encoder.backbone))
    with pytest.raises(UserError, match="has none"):
        found.network("head")


def test_the_encoder_file_of_a_run_is_the_run(run: tuple[Path, Encoder, Recipe]) -> None:
    folder, encoder, recipe = run
    found = load_backbone(str(folder / "encoder.safetensors"))
    assert (found.size, found.mean, found.folder) == (8, recipe.images.mean, folder)
    assert torch.equal(features(found.network("head")), features(encoder))


def test_a_result_lies_in_the_run_folder(run: tuple[Path, Encoder, Recipe]) -> None:
    folder, _, _ = run
    result = evaluate("knn", str(folder), "digits", recipe="invp", device="cpu", limit=50, say=lambda text: None)
    assert Path(result["file"]).parent == folder / "evaluate"


def test_a_run_without_weights_says_how_to_get_them(run: tuple[Path, Encoder, Recipe]) -> None:
    folder, _, _ = run
    (folder / "backbone.safetensors").unlink()
    with pytest.raises(UserError, match=r"no backbone\.safetensors.*Run the same"):
        load_backbone(str(folder))


@pytest.mark.parametrize("name", ["backbone.safetensors", "encoder.safetensors"])
def test_a_file_that_was_cut_short_is_a_message(run: tuple[Path, Encoder, Recipe], name: str) -> None:
    folder, _, _ = run
    path = folder / name
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=name):
        load_backbone(str(folder))


def test_weights_of_another_network_are_refused(run: tuple[Path, Encoder, Recipe]) -> None:
    folder, _, recipe = run
    other = dataclasses.replace(recipe, backbone=dataclasses.replace(recipe.backbone, name="resnet10_w16"))
    write_text(folder / "recipe.yaml", to_yaml(other))
    with pytest.raises(UserError, match="does not fit"):
        load_backbone(str(folder))


@pytest.mark.parametrize(("name", "dimension"), [("resnet18", 512), ("mobilenet_v3_small", 1024)])
def test_torchvisions_models_give_what_their_classifier_sees(
    monkeypatch: pytest.MonkeyPatch, name: str, dimension: int
) -> None:
    real = torchvision.models.get_model
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: real(name, weights=None))
    found = load_backbone(f"torchvision:{name}")
    with frozen(found.module):
        assert found.module(torch.zeros(2, 3, 64, 64)).shape == (2, dimension)
    assert (found.size, found.resize, found.channels) == (224, 256, 3)


def test_timms_models_bring_their_own_size_and_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    real = timm.create_model

    def unfetched(name: str, pretrained: bool, **options: Any) -> Any:
        return real(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", unfetched)
    found = load_backbone("timm:resnet10t")
    about: Any = found.module.pretrained_cfg
    assert isinstance(found, FrozenBackbone)
    assert found.size == about["input_size"][-1]
    assert found.resize == int(found.size / about["crop_pct"])
    assert found.mean == tuple(about["mean"])


def test_weights_that_cannot_be_fetched_are_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*arguments: object, **options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(torchvision.models, "get_model", offline)
    for what in ("timm:resnet18", "torchvision:resnet18"):
        with pytest.raises(UserError, match=rf"{what} could not be fetched \(no route to host\)"):
            load_backbone(what)
