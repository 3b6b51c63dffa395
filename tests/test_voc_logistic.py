# SPDX-License-Identifier: Apache-2.0
"""InvP's logistic regression on VOC: its features, its loss, its precision, and that it goes on to the bit."""

from __future__ import annotations

import dataclasses
import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from kinfold.encoders import Backbone, build_backbone
from kinfold.errors import UserError
from kinfold.evaluate.backbones import FrozenBackbone, hash_of
from kinfold.evaluate.multi_label import MultiLabel
from kinfold.evaluate.resumable import Stopped
from kinfold.evaluate.voc_logistic import Cut, VOCLogistic, loss, precision, voc_logistic
from kinfold.reading import parse, read_text, read_yaml
from kinfold.recipe import RECIPES
from kinfold.views import Augmentation

SIDE = 16
CLASSES = ("left", "right")


class Halves:
    """Images whose left or right half, or both, are bright; classes are the halves."""

    labels = None
    classes = None

    def __init__(self, count: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.present = random.choice(np.array([-1, 1, 1, 0], np.int8), (count, 2))
        self.images = random.integers(0, 60, (count, SIDE, SIDE, 1), dtype=np.uint8)
        self.images[:, :, : SIDE // 2] += 150 * (self.present[:, 0] == 1)[:, None, None, None].astype(np.uint8)
        self.images[:, :, SIDE // 2 :] += 150 * (self.present[:, 1] == 1)[:, None, None, None].astype(np.uint8)
        self.fingerprint = f"{count}-{seed}"
        self.description = f"{count} halves"

    def __len__(self) -> int:
        return len(self.images)

    def read(self, i: int) -> np.ndarray:
        pixels: np.ndarray = self.images[i]
        return pixels

    def name(self, i: int) -> str:
        return f"half {i}"


def data(said: list[str] | None = None, **changes: Any) -> MultiLabel:
    train, test = Halves(48, 0), Halves(40, 1)
    fields: dict[str, Any] = {"train": train, "present": train.present, "test": test, "asked": test.present}
    return MultiLabel(**{**fields, **changes}, classes=CLASSES, say=(said if said is not None else []).append)


def small(name: str = "resnet18_w8") -> FrozenBackbone:
    torch.manual_seed(0)
    module = build_backbone(Backbone(name=name, stem="small"), 1)
    return FrozenBackbone(module=module, size=SIDE, channels=1, mean=(0.4,), std=(0.3,))


SHORT = VOCLogistic(
    steps=14,
    batch_size=16,
    every=5,
    learning_rate=0.3,
    measure_every=4,
    augment=Augmentation(size=SIDE, scale=(0.8, 1.0), flip=0.0),
    test_size=SIDE,
    test_flip=0.0,
)
"""three steps an epoch; the last epoch is not a whole one"""


@pytest.mark.parametrize("name", ["resnet18_w8", "resnet10_w8"])
def test_features_are_what_the_last_block_is_given_in_two_by_two_means(name: str) -> None:
    backbone = small(name)
    images = torch.randn(3, 1, 32, 32)
    seen: list[Tensor] = []
    last = list(backbone.module.get_submodule("layer4").children())[-1]
    handle = last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    backbone.module.eval()(images)
    handle.remove()
    side = seen[0].shape[2] // 2
    cells = [seen[0][:, :, top : top + side, left : left + side] for top in (0, side) for left in (0, side)]
    expected = torch.stack([cell.mean(dim=(2, 3)) for cell in cells], dim=2).flatten(1)  # [3, W · 4]
    plain, mirrored = (Cut(backbone.module, pool=2, mirrored=how, of="it").eval() for how in (False, True))
    torch.testing.assert_close(plain(images), expected)
    torch.testing.assert_close(mirrored(images.flip(3)), expected)
    assert hash_of(plain) != hash_of(mirrored)  # kept features of the one are not taken for the other


def test_a_backbone_that_is_no_resnet_is_refused_by_its_name() -> None:
    odd = FrozenBackbone(
        module=nn.Flatten(), size=SIDE, channels=1, mean=(0.4,), std=(0.3,), description="a strange one"
    )
    with pytest.raises(UserError, match="a strange one is no ResNet"):
        voc_logistic(odd, data(), SHORT)


def test_the_loss_is_a_sum_over_classes_and_a_mean_over_images_without_the_difficult() -> None:
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    present = torch.tensor([[1, -1, 0], [0, 0, 0], [1, 1, 1], [-1, -1, -1], [0, 1, -1]])
    total = 0.0
    for i in range(5):
        for c in range(3):
            p = 1 / (1 + math.exp(-float(logits[i, c].detach())))
            total -= {1: math.log(p), -1: math.log(1 - p), 0: 0.0}[int(present[i, c])]
    found = loss(logits, present)
    assert float(found.detach()) == pytest.approx(total / 5, rel=1e-12)
    found.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert (logits.grad[present == 0] == 0).all()
    assert (logits.grad[present != 0] != 0).all()


def test_precision_is_scikit_learns_and_a_lead_of_a_hundred_thousandth_does_not_count() -> None:
    random = np.random.default_rng(0)
    scores, positive = random.integers(0, 5, 40).astype(float), random.random(40) < 0.3
    expected = average_precision_score(positive, scores - 1e-5 * positive)
    assert precision(scores, positive) == pytest.approx(expected, rel=1e-12)
    lead = np.array([0.5 + 9e-6, 0.5]), np.array([True, False])
    assert (precision(*lead), average_precision_score(*lead[::-1])) == (0.5, 1.0)


def test_what_can_be_told_apart_is_told_apart_and_the_backbone_stays_as_it_was() -> None:
    backbone = small()
    backbone.module.train()
    before = hash_of(backbone.module)
    found = data()
    values = voc_logistic(backbone, found, SHORT)
    assert hash_of(backbone.module) == before
    assert all(module.training for module in backbone.module.modules())
    counted = [found.asked[:, c][found.asked[:, c] != 0] == 1 for c in range(2)]
    chance = 100 * np.mean([shown.mean() for shown in counted])
    assert values["mAP/last"] > chance + 15
    assert values["mAP/best"] >= values["mAP/last"] == pytest.approx((values["AP/left"] + values["AP/right"]) / 2)
    assert values["best_step"] in (4, 8, 12, 14)


def test_rates_are_halved_after_every_so_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    real = torch.optim.SGD.step

    def step(self: torch.optim.SGD, *arguments: Any, **named: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        assert (self.param_groups[0]["momentum"], self.param_groups[0]["weight_decay"]) == (0.9, 1e-6)
        return real(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    voc_logistic(small(), data(), SHORT)
    assert rates == [0.3] * 5 + [0.15] * 5 + [0.075] * 4


def test_a_stopped_training_goes_on_to_the_bit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flipping = dataclasses.replace(SHORT, test_flip=0.5)
    whole = voc_logistic(small(), data(), flipping)
    real, calls = torch.optim.SGD.step, 0

    def interrupted(self: torch.optim.SGD, *arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            signal.raise_signal(signal.SIGTERM)
        return real(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.SGD, "step", interrupted)
    with pytest.raises(Stopped, match="step 6 of 14"):
        voc_logistic(small(), data(progress=tmp_path), flipping)
    assert voc_logistic(small(), data(progress=tmp_path), flipping) == whole
    assert calls == 14
    # What is finished is not trained any further.
    assert voc_logistic(small(), data(progress=tmp_path), flipping) == whole
    assert calls == 14


def test_test_images_are_mirrored_as_the_seed_says(monkeypatch: pytest.MonkeyPatch) -> None:
    always, never = (voc_logistic(small(), data(), dataclasses.replace(SHORT, test_flip=p)) for p in (1.0, 0.0))
    test = Halves(40, 1)
    test.images = test.images[:, :, ::-1].copy()
    assert voc_logistic(small(), data(test=test), dataclasses.replace(SHORT, test_flip=1.0)) == never
    assert always["mAP/last"] != never["mAP/last"]
    sometimes = [voc_logistic(small(), data(), dataclasses.replace(SHORT, test_flip=0.5)) for _ in range(2)]
    assert sometimes[0] == sometimes[1] != never


def test_a_diverged_layer_is_at_chance_and_says_so() -> None:
    said: list[str] = []
    values = voc_logistic(small(), data(said), dataclasses.replace(SHORT, learning_rate=1e38, weight_decay=1.0))
    asked = data().asked
    chance = [100 * (asked[:, c] == 1).sum() / (asked[:, c] != 0).sum() for c in range(2)]
    assert values["mAP/last"] == pytest.approx(np.mean(chance))
    assert any("Diverged" in text for text in said)


def test_a_class_that_no_test_image_shows_is_left_out() -> None:
    said: list[str] = []
    asked = data().asked.copy()
    asked[:, 0] = -1
    values = voc_logistic(small(), data(said, asked=asked), SHORT)
    assert values["mAP/last"] == values["AP/right"]
    assert "AP/left" not in values
    assert any("1 of 2 classes are in no test image" in text for text in said)


def test_a_set_smaller_than_a_batch_is_one_and_that_is_said() -> None:
    said: list[str] = []
    settings = dataclasses.replace(SHORT, batch_size=256, steps=2)
    values = voc_logistic(small(), data(said), settings)
    assert any("batch_size is 256; there are 48 images, so a batch is 48" in text for text in said)
    assert values == voc_logistic(small(), data(), dataclasses.replace(settings, batch_size=48))


@pytest.mark.parametrize(
    "path", sorted((RECIPES / "evaluate" / "voc-logistic").glob("*.yaml")), ids=lambda path: path.stem
)
def test_recipes_say_everything(path: Path) -> None:
    values = read_yaml(read_text(path), source=path.name)
    assert isinstance(values, dict)
    assert values.keys() == {field.name for field in dataclasses.fields(VOCLogistic)}
    found = parse(VOCLogistic, values, source=path.name)
    assert found.augment.scale == (0.2, 1.0)
