# SPDX-License-Identifier: Apache-2.0
"""Weights from files as people have them: every wrapping gives the same backbone, or a message that says why."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kinfold.encoders import Backbone, Encoder, Head, build_backbone, build_head
from kinfold.errors import UserError
from kinfold.run_folder import write_encoder
from kinfold.weights import load_backbone_weights

VIT, RESNET = "vit_tiny_patch16_224", "resnet18"
NOT_OURS = torch.zeros(8)
"""stands for heads, predictors and classifiers"""


@pytest.fixture(scope="module")
def published() -> dict[str, dict[str, Tensor]]:
    """The weights of whole classifiers by architecture, as their authors would publish them."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return {name: timm.create_model(name, num_classes=10).state_dict() for name in (VIT, RESNET)}


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def other(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the same names that must not be taken."""
    return {name: torch.zeros_like(value) for name, value in state.items()}


def moco(state: dict[str, Tensor]) -> dict[str, Any]:
    encoders = {**under("module.encoder_q.", state), **under("module.encoder_k.", other(state))}
    rest = {"module.encoder_q.fc.0.bias": NOT_OURS, "module.queue": NOT_OURS, "module.queue_ptr": NOT_OURS}
    return {"epoch": 200, "arch": "resnet", "state_dict": {**encoders, **rest}, "optimizer": {"state": {}}}


def dino(prefix: str, state: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "student": {**under("module.backbone.", other(state)), "module.head.mlp.0.weight": NOT_OURS},
        "teacher": {**under(f"{prefix}backbone.", state), f"{prefix}head.mlp.0.weight": NOT_OURS},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_tiny"),
    }


FORMS: dict[str, Any] = {
    "plain": lambda s: s,
    "module": lambda s: under("module.", s),
    "backbone": lambda s: {**under("backbone.", s), "head.0.weight": NOT_OURS, "predictor.0.weight": NOT_OURS},
    "module-backbone": lambda s: under("module.backbone.", s),
    "moco": moco,
    "dino": lambda s: dino("", s),
    "dino-module": lambda s: dino("module.", s),
    "dino-flat": lambda s: {**under("student.backbone.", other(s)), **under("teacher.backbone.", s)},
    "student-only": lambda s: {"student": under("module.backbone.", s)},
    "state-dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": s, "args": argparse.Namespace()},
    "nested": lambda s: {"model": {"state_dict": under("module.", s)}},
    "distilled": lambda s: {**s, "head_dist.weight": NOT_OURS, "classifier.weight": NOT_OURS},
}


@pytest.mark.parametrize("name", [VIT, RESNET])
@pytest.mark.parametrize("form", FORMS)
def test_weights_load_however_they_are_wrapped(
    form: str, name: str, published: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    torch.save(FORMS[form](published[name]), path)
    backbone = build_backbone(Backbone(name=name))
    load_backbone_weights(backbone, path)
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, published[name][key]), key


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_the_features_are_those_of_the_published_model(
    suffix: str, published: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(published[RESNET], path)  # type: ignore[operator]
    source: Any = timm.create_model(RESNET, num_classes=10)
    source.load_state_dict(published[RESNET])
    backbone = build_backbone(Backbone(name=RESNET))
    load_backbone_weights(backbone, path)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = source.eval().forward_head(source.forward_features(images), pre_logits=True)
        torch.testing.assert_close(backbone.eval()(images), expected)


@pytest.mark.parametrize("name", [VIT, RESNET])
@pytest.mark.parametrize("channels", [1, 5])
def test_other_channels_are_adapted_as_timm_does(
    channels: int, name: str, published: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(published[name], path)
    expected = timm.create_model(
        name,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(path), "num_classes": 10},
        in_chans=channels,
        num_classes=0,
    ).state_dict()
    torch.save({"teacher": under("backbone.", published[name])}, tmp_path / "weights.pth")
    for file in (path, tmp_path / "weights.pth"):
        backbone = build_backbone(Backbone(name=name), channels)
        load_backbone_weights(backbone, file)
        found = backbone.state_dict()
        assert found.keys() == expected.keys()
        for key, value in found.items():
            assert torch.equal(value, expected[key]), key


def test_a_resnet_of_our_own_takes_its_colour_weights_for_grey_images(tmp_path: Path) -> None:
    colour, grey = (build_backbone(Backbone(name="resnet10_w8", stem="small"), channels) for channels in (3, 1))
    save_file(colour.state_dict(), tmp_path / "colour.safetensors")
    load_backbone_weights(grey, tmp_path / "colour.safetensors")
    images = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(grey.eval()(images), colour.eval()(images.expand(-1, 3, -1, -1)))


def test_the_encoder_of_a_run_is_a_start_for_the_next(tmp_path: Path) -> None:
    how = Backbone(name="resnet10_w8", stem="small")
    head, predictor = build_head(Head(hidden=(32,), out=16), 64), build_head(Head(out=16), 16)
    encoder = Encoder(build_backbone(how), head, predictor)
    write_encoder(tmp_path, encoder)
    backbone = build_backbone(how)
    load_backbone_weights(backbone, tmp_path / "encoder.safetensors")
    expected = encoder.backbone.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        ("standard", "small", r"convolution is 7x7, stem: small has 3x3.*backbone\.stem=standard"),
        ("standard", "small-stride2", r"convolution is 7x7, stem: small-stride2 has 3x3.*backbone\.stem=standard"),
        ("small", "standard", r"convolution is 3x3, stem: standard has 7x7.*backbone\.stem=small"),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_stem_of_another_size_is_named(theirs: Any, ours: Any, message: str, channels: int, tmp_path: Path) -> None:
    save_file(build_backbone(Backbone(name="resnet10_w8", stem=theirs)).state_dict(), tmp_path / "w.safetensors")
    backbone = build_backbone(Backbone(name="resnet10_w8", stem=ours), channels)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    with pytest.raises(UserError, match=message):
        load_backbone_weights(backbone, tmp_path / "w.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("run-by-the-pickle"),))  # type: ignore[return-value]


@pytest.mark.parametrize("where", ["as a weight", "in the namespace"])
def test_weights_that_would_run_code_are_refused(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    evil: dict[str, Any] = {"conv1.weight": _Evil()}
    if where == "as a weight":
        (tmp_path / "evil.pth").write_bytes(pickle.dumps(evil))
    else:
        torch.save({"args": argparse.Namespace(**evil), "model": {}}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="refused"):
        load_backbone_weights(build_backbone(Backbone(name="resnet10_w8")), tmp_path / "evil.pth")
    assert not (tmp_path / "run-by-the-pickle").exists()


def test_weights_of_another_network_are_refused_with_the_keys(tmp_path: Path) -> None:
    state = build_backbone(Backbone(name="resnet10_w8")).state_dict()
    save_file(state, tmp_path / "w8.safetensors")
    with pytest.raises(UserError, match="of another shape"):
        load_backbone_weights(build_backbone(Backbone(name="resnet10_w16")), tmp_path / "w8.safetensors")
    with pytest.raises(UserError, match=r"missing layer1\.1"):
        load_backbone_weights(build_backbone(Backbone(name="resnet18_w8")), tmp_path / "w8.safetensors")
    with pytest.raises(UserError, match="there is no file"):
        load_backbone_weights(build_backbone(Backbone(name="resnet18_w8")), tmp_path / "none.safetensors")
    save_file({**state, "mask_token": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(UserError, match="unknown mask_token"):
        load_backbone_weights(build_backbone(Backbone(name="resnet10_w8")), tmp_path / "more.safetensors")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds no tensors by name"):
        load_backbone_weights(build_backbone(Backbone(name="resnet10_w8")), tmp_path / "list.pth")


def test_grey_weights_do_not_pretend_to_know_colours(tmp_path: Path) -> None:
    save_file(build_backbone(Backbone(name="resnet10_w8"), 1).state_dict(), tmp_path / "grey.safetensors")
    with pytest.raises(UserError, match=r"of another shape conv1\.weight.*number of channels"):
        load_backbone_weights(build_backbone(Backbone(name="resnet10_w8"), 3), tmp_path / "grey.safetensors")


def test_pretrained_asks_timm_for_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = timm.create_model, []

    def create(name: str, *, pretrained: bool, **options: Any) -> nn.Module:
        asked.append((name, pretrained, options["in_chans"]))
        return real(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", create)
    build_backbone(Backbone(name=RESNET, pretrained=True), 5)
    build_backbone(Backbone(name=RESNET), 1)
    assert asked == [(RESNET, True, 5), (RESNET, False, 1)]


def test_pretrained_without_a_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"resnet18 could not be fetched.*weights=FILE"):
        build_backbone(Backbone(name=RESNET, pretrained=True))


def test_pretrained_is_refused_where_nobody_has_published_weights() -> None:
    with pytest.raises(UserError, match="no published weights for resnet10_w8"):
        build_backbone(Backbone(name="resnet10_w8", pretrained=True))
