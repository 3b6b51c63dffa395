# SPDX-License-Identifier: Apache-2.0
"""Backbones by name, stems, channels, and what cannot be had."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kinfold.encoders import (
    Backbone,
    Encoder,
    Head,
    SplitBatchNorm,
    build_backbone,
    build_head,
    split_batch_norm,
)
from kinfold.errors import UserError


@pytest.mark.parametrize(
    ("name", "stem", "side"),
    [
        ("resnet10_w8", "small", 8),
        ("resnet10_w8", "small-stride2", 16),
        ("resnet18_w16", "standard", 32),
        ("resnet18", "small", 16),
        ("vit_tiny_patch16_224", "standard", 48),
        ("convnext_atto", "standard", 32),
    ],
)
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_backbone_turns_images_of_any_channels_into_its_features(
    name: str, stem: str, side: int, channels: int
) -> None:
    backbone = build_backbone(Backbone(name=name, stem=stem), channels).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        features = backbone(torch.randn(2, channels, side, side))
    assert features.shape == (2, backbone.num_features)
    assert torch.isfinite(features).all()


def test_the_small_stem_keeps_the_resolution_and_has_no_pool() -> None:
    backbone = build_backbone(Backbone(name="resnet18", stem="small"))
    assert backbone.conv1.kernel_size == (3, 3)
    assert backbone.conv1.stride == (1, 1)
    assert isinstance(backbone.maxpool, nn.Identity)
    assert build_backbone(Backbone(name="resnet18", stem="small-stride2")).conv1.stride == (2, 2)


@pytest.mark.parametrize("name", ["resnet10_w8", "resnet18", "resnet50"])
def test_no_block_starts_as_the_identity(name: str) -> None:
    # timm zeroes the last batch norm of each block unless told otherwise; the papers' networks do not.
    weights = [m.weight for m in build_backbone(Backbone(name=name)).modules() if isinstance(m, nn.BatchNorm2d)]
    assert all((weight == 1).all() for weight in weights)


def test_an_unknown_backbone_is_refused_with_near_names() -> None:
    with pytest.raises(UserError, match=r"'resnet51'.*resnet50"):
        build_backbone(Backbone(name="resnet51"))


def test_a_small_stem_is_for_resnets() -> None:
    with pytest.raises(UserError, match="stem"):
        build_backbone(Backbone(name="vit_tiny_patch16_224", stem="small"))


def test_batch_norm_that_cannot_be_split_is_refused_and_none_at_all_is_fine() -> None:
    with pytest.raises(UserError, match="BatchNormAct2d"):
        split_batch_norm(build_backbone(Backbone(name="efficientnet_b0")), 2)
    plain = build_backbone(Backbone(name="vit_tiny_patch16_224"))
    assert split_batch_norm(plain, 2) is plain
    split = split_batch_norm(build_backbone(Backbone(name="resnet10_w8")), 2)
    kinds = {type(m) for m in split.modules() if isinstance(m, nn.BatchNorm2d)}
    assert kinds == {SplitBatchNorm}


def test_an_encoder_ends_on_the_unit_sphere_in_full_precision() -> None:
    backbone = build_backbone(Backbone(name="resnet10_w8", stem="small"))
    encoder = Encoder(backbone, build_head(Head(hidden=(32,), out=16), 64), build_head(Head(out=16), 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q = encoder(torch.randn(4, 3, 8, 8))
    assert q.dtype == torch.float32
    torch.testing.assert_close(q.norm(dim=1), torch.ones(4))


def test_heads_are_built_as_asked() -> None:
    head = build_head(Head(hidden=(8, 6), out=4, batch_norm=True, last="batch-norm"), 10)
    assert [type(layer).__name__ for layer in head] == [
        *("Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d")
    ]
    assert all(layer.bias is None for layer in head if isinstance(layer, nn.Linear))
    assert head[-1].affine is False
    xavier = build_head(Head(hidden=(50,), out=4, init="xavier"), 10)
    assert float(xavier[0].bias.detach().abs().max()) == 0.0
    assert float(xavier[0].weight.detach().abs().max()) <= (6 / 60) ** 0.5
