# SPDX-License-Identifier: Apache-2.0
"""An exported backbone computes the same wherever it is said to load."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kinfold import export
from kinfold.encoders import Backbone, SplitBatchNorm, build_backbone, split_batch_norm
from kinfold.errors import UserError
from kinfold.export import export_backbone, read_backbone, rebuild_backbone

CARD: dict[str, Any] = {
    "name": "resnet18",
    "stem": "standard",
    "channels": 3,
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.2, 0.2),
    "recipe": "method: {name: sce}\n",
}
SLIM: dict[str, Any] = {**CARD, "name": "resnet10_w8", "stem": "small"}


def trained(card: dict[str, Any], splits: int = 1) -> nn.Module:
    """A backbone whose batch norms have seen images, so that every buffer matters."""
    torch.manual_seed(0)
    backbone = build_backbone(Backbone(name=card["name"], stem=card["stem"]), card["channels"])
    split_batch_norm(backbone, splits).train()
    with torch.no_grad():
        backbone(torch.rand(8, card["channels"], 64, 64))
    return backbone.eval()


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    return trained(CARD)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))


def test_timm_loads_it_strictly_and_computes_the_same(tmp_path: Path, resnet18: nn.Module, images: Tensor) -> None:
    path = export_backbone(resnet18, tmp_path / "backbone.safetensors", card=CARD, names="timm")
    model = timm.create_model("resnet18", num_classes=0).eval()
    model.load_state_dict(load_file(path), strict=True)
    torch.testing.assert_close(model(images), resnet18(images))


def test_torchvision_loads_it_but_for_its_classifier(tmp_path: Path, resnet18: nn.Module, images: Tensor) -> None:
    path = export_backbone(resnet18, tmp_path / "backbone.safetensors", card=CARD, names="torchvision")
    model = torchvision.models.resnet18()
    missing, unexpected = model.load_state_dict(load_file(path), strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    model.fc = nn.Identity()
    model.load_state_dict(load_file(path), strict=True)
    torch.testing.assert_close(model.eval()(images), resnet18(images))


def test_the_resnet50_of_timm_and_torchvision_have_the_same_keys_but_for_the_classifier() -> None:
    with torch.device("meta"):
        theirs = torchvision.models.resnet50().state_dict()
        ours = timm.create_model("resnet50", num_classes=0).state_dict()
    assert {name: value.shape for name, value in theirs.items() if not name.startswith("fc.")} == {
        name: value.shape for name, value in ours.items()
    }


@pytest.mark.parametrize("channels", [1, 3])
def test_a_small_stem_is_rebuilt_from_its_file_alone(tmp_path: Path, channels: int) -> None:
    card = {**SLIM, "channels": channels}
    backbone = trained(card)
    path = export_backbone(backbone, tmp_path / "backbone.safetensors", card=card)
    rebuilt, about = rebuild_backbone(path)
    assert not rebuilt.training
    x = torch.rand(2, channels, 32, 32)
    assert torch.equal(rebuilt(x), backbone(x))
    assert about["features"] == str(backbone.num_features)


@pytest.mark.parametrize("stem", ["small", "small-stride2"])
@pytest.mark.parametrize("names", ["timm", "torchvision"])
def test_a_small_stem_is_refused_elsewhere_with_the_way_out(tmp_path: Path, names: Any, stem: str) -> None:
    card = {**CARD, "stem": stem}
    with pytest.raises(UserError, match="rebuild_backbone"):
        export_backbone(trained(card), tmp_path / "backbone.safetensors", card=card, names=names)
    assert list(tmp_path.iterdir()) == []


def test_split_batch_norm_is_exported_as_plain_batch_norm(tmp_path: Path, images: Tensor) -> None:
    backbone = trained(CARD, splits=4)
    assert any(isinstance(module, SplitBatchNorm) for module in backbone.modules())
    path = export_backbone(backbone, tmp_path / "backbone.safetensors", card=CARD, names="timm")
    model = timm.create_model("resnet18", num_classes=0).eval()
    model.load_state_dict(load_file(path), strict=True)
    torch.testing.assert_close(model(images), backbone(images))


def test_what_the_other_library_does_not_have_is_refused(tmp_path: Path, resnet18: nn.Module) -> None:
    path = tmp_path / "backbone.safetensors"
    slim = {**SLIM, "stem": "standard"}
    with pytest.raises(UserError, match="timm has no model 'resnet10_w8'"):
        export_backbone(trained(slim), path, card=slim, names="timm")
    grey = {**CARD, "channels": 1}
    with pytest.raises(UserError, match="takes 3 channels and this one 1"):
        export_backbone(trained(grey), path, card=grey, names="torchvision")
    with pytest.raises(UserError, match="does not take these weights"):
        export_backbone(resnet18, path, card={**CARD, "name": "resnet34"}, names="timm")
    assert list(tmp_path.iterdir()) == []


def test_equal_keys_are_not_enough_when_the_features_differ(tmp_path: Path, resnet18: nn.Module) -> None:
    class Doubled(nn.Module):
        num_features = 512

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

        def state_dict(self, *arguments: Any, **named: Any) -> Any:
            return self.inner.state_dict(*arguments, **named)

    doubled = Doubled()
    doubled.inner = resnet18
    with pytest.raises(UserError, match="computes other features"):
        export_backbone(doubled, tmp_path / "backbone.safetensors", card=CARD, names="timm")


def test_the_metadata_says_what_the_backbone_is(tmp_path: Path) -> None:
    path = export_backbone(trained(SLIM), tmp_path / "new" / "backbone.safetensors", card={**SLIM, "size": 32})
    state, about = read_backbone(path)
    assert all(isinstance(value, Tensor) for value in state.values())
    assert (about["name"], about["stem"], about["recipe"]) == ("resnet10_w8", "small", "method: {name: sce}\n")
    assert json.loads(about["mean"]) == [0.5, 0.4, 0.3]
    assert json.loads(about["kinfold_format"]) == export.FORMAT
    assert "kinfold_version" in about


def test_the_code_in_the_card_runs(
    tmp_path: Path, resnet18: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for names in ("timm", "torchvision"):
        export_backbone(resnet18, tmp_path / "weights.safetensors", card=CARD, names=names)  # type: ignore[arg-type]
        card = (tmp_path / "weights.md").read_text()
        blocks = re.findall(r"```python\n(.*?)```", card, flags=re.S)
        assert len(blocks) == 2
        for block in blocks:
            made: dict[str, Any] = {}
            exec(block, made)
            model = made.get("backbone") or made["model"]
            if hasattr(model, "fc") and not isinstance(model.fc, nn.Identity):
                model.fc = nn.Identity()
            torch.testing.assert_close(model.eval()(images), resnet18(images))
        assert "method: {name: sce}" in card
        assert "[0.5, 0.4, 0.3]" in card


def test_the_card_of_a_small_stem_says_that_others_do_not_take_it(tmp_path: Path) -> None:
    export_backbone(trained(SLIM), tmp_path / "backbone.safetensors", card=SLIM)
    card = (tmp_path / "backbone.md").read_text()
    assert "their models do not take these weights" in card
    assert 'Backbone(name="resnet10_w8", stem="small")' in card


def test_the_backbone_in_training_is_left_as_it_was(tmp_path: Path) -> None:
    backbone = trained(CARD).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    export_backbone(backbone, tmp_path / "backbone.safetensors", card=CARD, names="timm")
    assert backbone.training
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_a_failed_export_keeps_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = trained(SLIM)
    path = export_backbone(backbone, tmp_path / "backbone.safetensors", card=SLIM)
    before = path.read_bytes()

    def refuse(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match="No space left on device"):
        export_backbone(backbone, path, card={**SLIM, "recipe": "another"})
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["backbone.md", "backbone.safetensors"]


def test_files_that_are_not_ours_are_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    with pytest.raises(UserError, match="There is no file"):
        read_backbone(path)
    path.write_bytes(b"\x80\x04 a pickle, perhaps")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        read_backbone(path)
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="nothing in it says which backbone"):
        read_backbone(path)
    save_file({"w": torch.zeros(2)}, path, metadata={"kinfold_format": str(export.FORMAT + 1)})
    with pytest.raises(UserError, match="Update Kinfold"):
        read_backbone(path)
    about = {"kinfold_format": "1", "name": "resnet10_w8", "stem": "small", "channels": "3"}
    save_file({"w": torch.zeros(2)}, path, metadata=about)
    with pytest.raises(UserError, match="do not fit"):
        rebuild_backbone(path)


def test_a_card_without_its_statistics_is_refused(tmp_path: Path) -> None:
    card = {name: value for name, value in SLIM.items() if name != "mean"}
    with pytest.raises(ValueError, match="mean missing"):
        export_backbone(trained(SLIM), tmp_path / "backbone.safetensors", card=card)
    with pytest.raises(UserError, match="safetensors"):
        export_backbone(trained(SLIM), tmp_path / "backbone.pth", card=SLIM)
