# SPDX-License-Identifier: Apache-2.0
"""Linear classification of all residual blocks at once: the maps are the backbone's, and no classifier sees another."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kinfold.data.sources import Source, Subset, open_source
from kinfold.encoders import Backbone, build_backbone
from kinfold.errors import UserError
from kinfold.evaluate import FrozenBackbone, Labelled, Linear, load_protocol
from kinfold.evaluate.features import frozen, hash_of
from kinfold.evaluate.linear import linear
from kinfold.evaluate.linear.residual_blocks import BlockMaps, block_maps
from kinfold.evaluate.resnet import parts
from kinfold.views import Augmentation

CPU = torch.device("cpu")
SIDES = (4, 4, 2, 2, 1)


def small(name: str = "resnet10_w8", side: int = 16) -> FrozenBackbone:
    torch.manual_seed(0)
    module = build_backbone(Backbone(name=name, stem="small"), 1)
    with torch.no_grad():  # running statistics of images, as a trained backbone has them
        module.train()(torch.randn(64, 1, side, side))
    return FrozenBackbone(module=module, size=side, resize=side, channels=1, mean=(0.3,), std=(0.38,))


def digits(count: int, split: str = "train") -> Source:
    return Subset(open_source("digits", split=split), np.arange(count))


def test_a_resnet_50_has_the_seventeen_maps_of_the_paper() -> None:
    module = build_backbone(Backbone(name="resnet50"), 3)
    backbone = FrozenBackbone(module=module, size=224, description="a ResNet-50")
    recipe = load_protocol("linear", "invp-imagenet")
    maps = block_maps(backbone, recipe.blocks, size=224, device=CPU, say=pytest.fail)
    assert maps.sides == [12] + [6] * 3 + [4] * 4 + [3] * 6 + [1] * 3
    assert maps.widths == [9216] + [9216] * 3 + [8192] * 4 + [9216] * 6 + [2048] * 3


@pytest.mark.parametrize("maker", ["kinfold", "torchvision"])
def test_the_maps_are_those_that_pass_through_the_backbone(maker: str) -> None:
    if maker == "kinfold":
        backbone, pool = small("resnet18_w8"), "maxpool"
    else:
        from torchvision.models import resnet18

        module = resnet18()
        module.fc = nn.Identity()
        backbone, pool = FrozenBackbone(module=module, size=64, channels=3), "maxpool"
    seen: list[Tensor] = []
    module = backbone.module
    hooks = [module.get_submodule(pool).register_forward_hook(lambda m, i, o: seen.append(o))]
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for block in module.get_submodule(stage).children():
            hooks.append(block.register_forward_hook(lambda m, i, o: seen.append(o)))
    images = torch.randn(3, backbone.channels, backbone.size, backbone.size)
    with frozen(module):
        features = module(images)
    for hook in hooks:
        hook.remove()
    maps = block_maps(backbone, SIDES, size=backbone.size, device=CPU, say=lambda text: None)
    with frozen(maps):
        found = torch.split(maps(images), maps.widths, dim=1)
    assert len(found) == len(seen) == 9
    for one, map_, side in zip(found, seen, maps.sides, strict=True):
        assert torch.equal(one, F.adaptive_avg_pool2d(map_, side).flatten(1))
    assert torch.equal(found[-1], features)


class Alone(nn.Module):
    """One of the maps."""

    def __init__(self, maps: BlockMaps, number: int) -> None:
        super().__init__()
        self.maps, self.number = maps, number

    def forward(self, images: Tensor) -> Tensor:
        return torch.split(self.maps(images), self.maps.widths, dim=1)[self.number]


@pytest.mark.parametrize("augment", [None, Augmentation(size=16, flip=0.0, scale=(0.5, 1.0))], ids=["kept", "views"])
def test_each_block_is_what_it_is_alone(augment: Augmentation | None) -> None:
    backbone = small()
    data = Labelled(train=digits(200), test=digits(100, "test"), say=pytest.fail)
    settings = Linear(
        epochs=2, batch_size=40, learning_rates=(0.3,), blocks=SIDES, batch_norm="train", augment=augment, test_size=16
    )
    together = linear(backbone, data, settings)
    maps = block_maps(backbone, SIDES, size=16, device=CPU, say=pytest.fail)
    for block in range(5):
        one = dataclasses.replace(backbone, module=Alone(maps, block))
        alone = linear(one, data, dataclasses.replace(settings, blocks=None))
        for kind in ("last", "best", "last_top5"):
            # The rows of one map are apart in memory where all lie side by side: sums may end in other last bits.
            assert together[f"{kind}/block={block}"] == pytest.approx(alone[f"{kind}/lr=0.3"], abs=1)
    assert len({together[f"last/block={block}"] for block in range(5)}) > 1
    assert together["last"] == together["last/block=4"]
    assert together["best"] == together[f"best/block={together['best_block']:.0f}"]
    assert together["best"] == max(together[f"best/block={block}"] for block in range(5))


def test_rates_and_blocks_are_named_together() -> None:
    data = Labelled(train=digits(100), test=digits(50, "test"))
    values = linear(small(), data, Linear(epochs=1, batch_size=50, learning_rates=(0.1, 1.0), blocks=SIDES))
    assert {"last/block=0,lr=0.1", "best/block=4,lr=1", "best_epoch/block=2,lr=1"} <= values.keys()


def test_a_map_smaller_than_its_pool_is_pooled_no_finer_and_said() -> None:
    said: list[str] = []
    maps = block_maps(small(side=16), (12, 6, 4, 3, 4), size=16, device=CPU, say=said.append)
    assert maps.sides == [12, 6, 4, 3, 2]
    assert said == [
        "Images of 16 pixels give maps smaller than the pool, so block 4 to 2 x 2 instead of 4 x 4 is pooled."
    ]
    assert maps.widths[-1] == 64 * 2 * 2


def test_other_pools_are_other_features() -> None:
    backbone = small()
    made = [BlockMaps(parts(backbone.module, of="it"), sides) for sides in (SIDES, (4, 4, 2, 1, 1))]
    assert repr(made[0]) != repr(made[1])


def test_a_backbone_without_blocks_is_refused_by_name() -> None:
    backbone = FrozenBackbone(module=nn.Flatten(), size=8, channels=1, mean=(0.3,), std=(0.3,), description="my net")
    data = Labelled(train=digits(50), test=digits(50, "test"))
    with pytest.raises(UserError, match="my net is no ResNet"):
        linear(backbone, data, Linear(epochs=1, blocks=SIDES))


def test_the_backbone_is_the_same_after_all_blocks_to_the_bit() -> None:
    backbone = small()
    module = backbone.module.train()
    before, random = hash_of(module), torch.get_rng_state()
    data = Labelled(train=digits(100), test=digits(50, "test"))
    for augment in (None, Augmentation(size=16, flip=0.0)):
        for norm in ("eval", "train"):
            linear(
                backbone,
                data,
                Linear(epochs=1, batch_size=50, augment=augment, blocks=SIDES, batch_norm=norm, learning_rates=(1.0,)),
            )
            assert hash_of(module) == before
            assert all(child.training for child in module.modules())
            assert all(parameter.grad is None for parameter in module.parameters())
            assert torch.equal(torch.get_rng_state(), random)


def test_test_features_that_take_too_much_are_made_at_every_look(monkeypatch: pytest.MonkeyPatch) -> None:
    class Holed(Subset):
        def read(self, i: int) -> object:  # type: ignore[override]
            return b"no image" if i % 7 == 0 else super().read(i)

    test = Holed(open_source("digits", split="test"), np.arange(100))
    said: list[str] = []
    data = Labelled(train=digits(100), test=test, batch_size=30, say=said.append)
    settings = Linear(
        epochs=3, batch_size=50, learning_rates=(0.1,), blocks=SIDES, augment=Augmentation(size=16, flip=0.0)
    )
    kept = linear(small(), data, settings)
    remarks = [text for text in said if "15 of 100 images do not decode" in text]
    assert len(remarks) == 1
    monkeypatch.setattr("kinfold.evaluate.linear.KEPT_BYTES", 0)
    said.clear()
    assert linear(small(), data, settings) == kept
    assert said == remarks


def test_the_recipe_of_invp_trains_all_blocks_in_one_command(tmp_path: object) -> None:
    from kinfold.evaluate import evaluate

    said: list[str] = []
    result = evaluate(
        "linear", small(), "digits", recipe="invp-imagenet", overrides=["epochs=2", "batch_size=50"], size=16,
        limit=100, device="cpu", out=tmp_path, say=said.append, cache=False,
    )  # type: ignore[arg-type]  # fmt: skip
    assert {f"{kind}/block={block}" for kind in ("last", "best") for block in range(5)} <= result["values"].keys()
    assert result["settings"]["batch_norm"] == "eval"
