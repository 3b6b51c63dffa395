# SPDX-License-Identifier: Apache-2.0
"""The linear classifier of patches: which maps it sees, where they are, and that it learns and nothing else does."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from mask_layouts import SMALL, opened, shapes, small_resnet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from kinfold.encoders import Backbone, build_backbone
from kinfold.errors import UserError
from kinfold.evaluate import FrozenBackbone
from kinfold.evaluate.backbones import hash_of
from kinfold.evaluate.patches import FrozenMaps, Patches, build_probe, patches
from kinfold.evaluate.resnet import parts
from kinfold.evaluate.resumable import Stopped
from kinfold.evaluate.segmentation import pixels
from kinfold.evaluate.segmentation.pixels import pixel_loss, upsample
from kinfold.reading import parse, read_text, read_yaml
from kinfold.recipe import RECIPES

SHORT = Patches(steps=30, batch_size=8, crops=SMALL, learning_rate=0.1)


def transformer(*, any_size: bool = True) -> FrozenBackbone:
    torch.manual_seed(0)
    module = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2, num_classes=0, dynamic_img_size=any_size
    )
    return FrozenBackbone(module=module, size=32, mean=(0.3,) * 3, std=(0.3,) * 3, description="a small transformer")


def test_the_maps_of_a_resnet_are_its_stages() -> None:
    backbone = small_resnet()
    maps = FrozenMaps(backbone, (-1, 1))
    assert (maps.width, maps.stride, maps.first) == (16 + 64, 2, 0.0)
    images = torch.randn(2, 3, 41, 48)
    body = parts(backbone.module.eval(), of="it")
    with torch.no_grad():
        second = body.stages[1](body.stages[0](body.stem(images)))
        last = body.stages[3](body.stages[2](second))
        found = maps(images)
    assert torch.equal(found[:, :16], second)
    assert torch.equal(found[:, 16:], upsample(last, (21, 24), stride=4, first=0.0))


class _Picking(nn.Module):
    """In the shape of a ResNet, but each stage only takes every so many pixels of one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1, self.maxpool = _pick(2), nn.Identity(), nn.Identity(), nn.Identity()
        for number, stride in enumerate((1, 2, 2, 2), 1):
            block = nn.Sequential()
            block.add_module("conv2", _pick(stride))
            setattr(self, f"layer{number}", nn.Sequential(block))


def _pick(stride: int) -> nn.Conv2d:
    made = nn.Conv2d(1, 1, 3, stride=stride, padding=1, bias=False)
    with torch.no_grad():
        made.weight.zero_()[0, 0, 1, 1] = 1.0
    return made


@pytest.mark.parametrize("side", [60, 64, 65, 97])
def test_joined_maps_of_a_resnet_look_at_the_same_pixels_in_images_of_every_size(side: int) -> None:
    backbone = FrozenBackbone(module=_Picking(), size=64, channels=1, mean=(0.5,), std=(0.5,))
    maps = FrozenMaps(backbone, (1, -1))
    found = maps(torch.arange(side, dtype=torch.float32).expand(1, 1, side, side))  # [1, 2, h, w]: where each looks
    assert (maps.stride, found.shape[3]) == (4, -(-side // 4))
    inner = (found.shape[3] - 1) // 4 * 4 + 1  # up to the last place of the coarser map
    assert torch.allclose(found[0, 1, :, :inner], found[0, 0, :, :inner])


def test_the_maps_of_a_transformer_are_its_patches_and_images_are_filled_up_to_whole_ones() -> None:
    backbone = transformer()
    maps = FrozenMaps(backbone, (-1,))
    assert (maps.width, maps.stride, maps.first) == (16, 8, 3.5)
    images = torch.randn(2, 3, 30, 41)
    with torch.no_grad():
        tokens = backbone.module.eval().forward_features(F.pad(images, (0, 7, 0, 2)))[:, 1:]  # type: ignore[operator]
    assert torch.allclose(maps(images), tokens.unflatten(1, (4, 6)).permute(0, 3, 1, 2), atol=1e-6)
    probe = build_probe(backbone, 5, SHORT)
    assert probe(images).shape == (2, 5, 30, 41)


def test_networks_of_timm_that_are_neither_give_maps_too() -> None:
    module = build_backbone(Backbone(name="test_convnext"))
    maps = FrozenMaps(FrozenBackbone(module=module, size=64), (0, -1))
    assert (maps.stride, maps.first) == (4, 1.5)
    assert maps(torch.zeros(1, 3, 50, 70)).shape[2:] == (64 // 4, 96 // 4)


def test_a_network_without_maps_or_of_one_size_only_or_without_the_layer_is_refused() -> None:
    with pytest.raises(UserError, match="no-maps gives no maps: it is neither a ResNet nor a network of timm"):
        FrozenMaps(FrozenBackbone(module=nn.Flatten(), size=32, description="no-maps"), (-1,))
    with pytest.raises(UserError, match="a small transformer gives no maps of images of 40 x 32 pixels"):
        FrozenMaps(transformer(any_size=False), (-1,))
    with pytest.raises(UserError, match="a small transformer gives no maps of images of 32 x 32"):
        FrozenMaps(transformer(), (7,))
    with pytest.raises(UserError, match="has stages 0 to 3, but 4 was asked for"):
        FrozenMaps(small_resnet(), (4,))


@pytest.mark.parametrize("kind", ["resnet", "transformer"])
def test_shapes_are_found_and_the_backbone_stays_as_it_was(kind: str, tmp_path: Path) -> None:
    backbone = small_resnet() if kind == "resnet" else transformer()
    backbone.module.train()
    before = hash_of(backbone.module)
    gradients = [p.requires_grad for p in backbone.module.parameters()]
    layers = (0,) if kind == "resnet" else (-1,)
    found = patches(backbone, opened(shapes(tmp_path)), dataclasses.replace(SHORT, layers=layers))
    assert found["background_only"] < 30.0
    assert found["mIoU"] > 45.0
    assert hash_of(backbone.module) == before
    assert all(module.training for module in backbone.module.modules())
    assert [p.requires_grad for p in backbone.module.parameters()] == gradients
    assert all(p.grad is None for p in backbone.module.parameters())


class Colours(nn.Module):
    """A backbone whose maps are the image itself: the classes are separable by colour."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(()))

    def forward_intermediates(self, images: Tensor, **_: Any) -> list[Tensor]:
        return [F.avg_pool2d(images, 2)]


def test_what_is_separable_by_a_plane_is_separated(tmp_path: Path) -> None:
    backbone = FrozenBackbone(module=Colours(), size=32, mean=(0.3,) * 3, std=(0.3,) * 3)
    found = patches(backbone, opened(shapes(tmp_path)), dataclasses.replace(SHORT, steps=60))
    assert found["mIoU"] > 90.0  # all but the pixels on the edges


def test_a_stopped_probe_goes_on_to_the_bit(tmp_path: Path) -> None:
    root, how = shapes(tmp_path / "data", train=20, test=2), dataclasses.replace(SHORT, steps=7, layers=(-2, -1))
    whole = patches(small_resnet(), opened(root), how)
    calls = iter(range(100))

    def stop(logits: Tensor, truth: Tensor) -> Tensor:
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return pixel_loss(logits, truth)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixels, "pixel_loss", stop)
        with pytest.raises(Stopped, match="Stopped at step 3 of 7"):
            patches(small_resnet(), opened(root, progress=tmp_path / "kept"), how)
    assert patches(small_resnet(), opened(root, progress=tmp_path / "kept"), how) == whole


def test_the_first_weights_are_a_function_of_the_seed() -> None:
    first, again, other = (
        build_probe(small_resnet(), 3, dataclasses.replace(SHORT, seed=seed)).linear.weight for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_every_recipe_says_all_settings() -> None:
    for path in sorted((RECIPES / "evaluate" / "patches").glob("*.yaml")):
        values = read_yaml(read_text(path), source=path.stem)
        assert values.keys() == {field.name for field in dataclasses.fields(Patches)}, path.stem
        assert parse(Patches, values, source=path.stem).steps > 1
