# SPDX-License-Identifier: Apache-2.0
"""Semi-supervised evaluation: only the images that keep their labels teach, and rates are chosen on these alone."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_fine_tune import STILL, Spy, around, halves, module, recipe
from test_linear import Halves

from kinfold.data.label_lists import draw_per_class
from kinfold.data.sources import open_source, split_off
from kinfold.encoders import Backbone, build_backbone
from kinfold.errors import UserError
from kinfold.evaluate.backbones import FrozenBackbone, hash_of
from kinfold.evaluate.fine_tune import FineTune, fine_tune
from kinfold.evaluate.labelled import Labelled
from kinfold.evaluate.linear import Cosine
from kinfold.evaluate.resumable import Stopped
from kinfold.evaluate.semi_supervised import SemiSupervised, semi_supervised
from kinfold.evaluate.tuning import rates
from kinfold.reading import plain, read_text, read_yaml
from kinfold.recipe import RECIPES, find_recipe
from kinfold.views import Augmentation

QUICK = SemiSupervised(
    share=0.2, epochs=8, batch_size=20, backbone_rates=(0.02,), head_factors=(5.0,), schedule=Cosine(), augment=STILL
)  # fmt: skip


class Counted(Halves):
    """Images that remember which of them were read."""

    def __init__(self, count: int, seed: int) -> None:
        super().__init__(count, seed)
        self.seen: set[int] = set()

    def read(self, i: int) -> np.ndarray:
        self.seen.add(i)
        return super().read(i)


def lied_about(labels: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The labels of `kept`, and wrong ones for all others; so many of each class as before."""
    wrong = (labels + 1) % 4
    wrong[kept] = labels[kept]
    return wrong


def test_only_the_share_that_was_drawn_is_learned_from() -> None:
    train, said = Counted(400, 0), []
    assert train.labels is not None
    kept = draw_per_class(train.labels, share=0.2, seed=0)
    values = semi_supervised(around(module()), Labelled(train=train, test=Halves(60, 1), say=said.append), QUICK)
    assert train.seen == set(kept.tolist())
    assert values["labels"] == len(kept)
    assert values["top1"] == 100
    counts = np.bincount(train.labels[kept])
    assert len(said) == 1
    assert f"{len(kept)} images have labels, {counts.min()} to {counts.max()} of each of 4 classes" in said[0]
    assert "20 % of each class, seed 0, draw 0" in said[0]


def test_another_draw_teaches_other_images() -> None:
    train = Counted(400, 0)
    assert train.labels is not None
    data = Labelled(train=train, test=Halves(60, 1), say=lambda text: None)
    semi_supervised(around(module()), data, dataclasses.replace(QUICK, epochs=1, draw=3))
    assert train.seen == set(draw_per_class(train.labels, share=0.2, seed=0, draw=3).tolist())


def test_all_labels_are_fine_tuning() -> None:
    data = halves(say=lambda text: None)
    values = semi_supervised(around(module()), data, dataclasses.replace(QUICK, share=1.0, epochs=2))
    same = {name: getattr(QUICK, name) for name in ("batch_size", "schedule", "augment")}
    whole = fine_tune(around(module()), data, FineTune(epochs=2, backbone_rate=0.02, head_factor=5.0, **same))
    assert values == {"labels": 90.0, **whole}


@pytest.mark.parametrize("with_test", [True, False])
def test_a_list_says_which_images_are_learned_from(with_test: bool, tmp_path: Path) -> None:
    train, said = Counted(200, 0), []
    assert train.labels is not None
    chosen = np.arange(0, 200, 4)
    path = tmp_path / "few.txt"
    path.write_text("".join(f"{train.name(int(i))}\n" for i in chosen))
    if with_test:
        train.labels = lied_about(train.labels, chosen)
    settings = dataclasses.replace(QUICK, share=None, list=str(path))
    data = Labelled(train=train, test=Halves(60, 1) if with_test else None, say=said.append)
    values = semi_supervised(around(module()), data, settings)
    assert values["labels"] == 50
    assert values["top1"] == 100
    if with_test:
        assert train.seen == set(chosen.tolist())
    else:
        assert said[0].startswith("There is no test split: the 150 images that")


def test_a_list_of_all_images_without_a_test_set_is_refused(tmp_path: Path) -> None:
    train = Halves(20, 0)
    path = tmp_path / "all.txt"
    path.write_text("".join(f"{train.name(i)}\n" for i in range(20)))
    with pytest.raises(UserError, match="none is left to be asked"):
        semi_supervised(around(module()), Labelled(train=train), dataclasses.replace(QUICK, share=None, list=str(path)))


def test_a_class_that_the_list_leaves_out_is_named(tmp_path: Path) -> None:
    train, said = Halves(80, 0), []
    assert train.labels is not None
    path = tmp_path / "three.txt"
    path.write_text("".join(f"{train.name(int(i))}\n" for i in np.flatnonzero(train.labels != 3)))
    settings = dataclasses.replace(QUICK, share=None, list=str(path), epochs=1)
    semi_supervised(around(module()), Labelled(train=train, test=Halves(60, 1), say=said.append), settings)
    assert "Of 1 classes there is no training image" in said[0]
    assert said[0].endswith(": d")


def test_without_a_test_split_the_same_fifth_is_asked_whatever_the_share() -> None:
    asked = split_off(Halves(200, 0), 0.2, 0)[1].positions
    for share in (0.1, 0.5):
        train = Counted(200, 0)
        assert train.labels is not None
        data = Labelled(train=train, say=lambda text: None)
        values = semi_supervised(around(module()), data, dataclasses.replace(QUICK, share=share, epochs=1))
        assert set(asked.tolist()) <= train.seen
        assert len(train.seen) == 40 + values["labels"]


def test_rates_are_chosen_on_the_labelled_images_and_published() -> None:
    # The test set's labels are turned round: who learns is wrong there, so its choice would be another.
    turned = Halves(60, 1)
    assert turned.labels is not None
    turned.labels = (turned.labels + 1) % 4
    train, said = Counted(400, 0), []
    data = Labelled(train=train, test=turned, say=said.append)
    settings = dataclasses.replace(QUICK, backbone_rates=(1e-6, 0.02, 1e30), head_factors=(1.0, 5.0))
    values = semi_supervised(around(module()), data, settings)
    grid = {name: value for name, value in values.items() if name.startswith("grid/")}
    assert set(grid) == {f"grid/lr={rate},x={x}" for rate in ("1e-06", "0.02", "1e+30") for x in (1, 5)}
    assert grid["grid/lr=0.02,x=5"] == 100 > grid["grid/lr=1e-06,x=5"]
    assert grid["grid/lr=1e+30,x=5"] == 0
    assert sum("the loss is not finite" in text for text in said) == 2
    assert values["chosen/backbone_rate"] == 0.02
    assert values["chosen/head_factor"] == next(x for x in (1.0, 5.0) if grid[f"grid/lr=0.02,x={x:g}"] == 100)
    assert values["top1"] == 0
    assert len(train.seen) == values["labels"]
    alone = dataclasses.replace(
        settings, backbone_rates=(0.02,), head_factors=(values["chosen/head_factor"],)
    )  # fmt: skip
    assert values.items() >= semi_supervised(around(module()), data, alone).items()


def test_a_grid_that_was_stopped_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    steps, stops = 0, {7, 30, 53}  # in the first cell, in the second, and in the training on all labels

    def see(images: torch.Tensor, training: bool) -> None:
        nonlocal steps
        steps += training
        if training and steps in stops:
            os.kill(os.getpid(), signal.SIGTERM)

    settings = dataclasses.replace(QUICK, epochs=5, backbone_rates=(0.002, 0.02), measure_every=3)
    data = Labelled(train=Halves(400, 0), test=Halves(60, 1), say=lambda text: None)
    stopped = dataclasses.replace(data, progress=tmp_path)
    for at in sorted(stops):
        with pytest.raises(Stopped):
            semi_supervised(around(Spy(module(), see)), stopped, settings)
        assert steps == at
    values = semi_supervised(around(Spy(module(), see)), stopped, settings)
    done, steps, stops = steps, 0, set()
    assert semi_supervised(around(Spy(module(), see)), data, settings) == values
    assert done == steps > 53  # nothing was done twice


def test_the_backbone_is_the_same_after_as_before_to_the_bit() -> None:
    inside = module()
    before = hash_of(inside)
    data = Labelled(train=Halves(100, 0), test=Halves(60, 1), say=lambda text: None)
    semi_supervised(around(inside), data, dataclasses.replace(QUICK, epochs=1, head_factors=(1.0, 2.0)))
    assert hash_of(inside) == before


def test_a_tenth_of_the_digits_labels_tell_them_apart() -> None:
    torch.manual_seed(0)
    inside = build_backbone(Backbone(name="resnet10_w8", stem="small"), 1)
    backbone = FrozenBackbone(module=inside, size=8, channels=1, mean=(0.3,), std=(0.35,))
    data = Labelled(train=open_source("digits"), test=open_source("digits", split="test"), say=lambda text: None)
    settings = SemiSupervised(
        share=0.1, epochs=8, batch_size=32, backbone_rates=(0.03,), head_factors=(5.0,), schedule=Cosine(),
        augment=Augmentation(size=8, scale=(0.7, 1.0), flip=0.0), measure_every=8,
    )  # fmt: skip
    values = semi_supervised(backbone, data, settings)
    assert values["top1"] > 50  # five times chance
    assert values["top1"] <= values["top5"] <= 100
    assert values["best/top5"] >= values["top5"]


def test_negative_labels_are_refused_before_anything_is_drawn() -> None:
    train = Halves(90, 0)
    assert train.labels is not None
    train.labels[:2] = -1
    with pytest.raises(UserError, match="2 of 90 images have no label"):
        semi_supervised(around(module()), Labelled(train=train, test=Halves(60, 1)), QUICK)


NAMES = sorted(path.stem for path in (RECIPES / "evaluate" / "semi-supervised").glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_complete(name: str) -> None:
    text = read_text(find_recipe(name, folder=RECIPES / "evaluate" / "semi-supervised"))
    settings = recipe(name, SemiSupervised, "semi-supervised")
    assert plain(settings).keys() == read_yaml(text, source=name).keys()


def test_the_rates_of_the_recipes_are_those_of_the_authors() -> None:
    one, ten = (recipe(name, SemiSupervised, "semi-supervised") for name in ("invp-1", "invp-10"))
    assert (one.share, ten.share) == (0.01, 0.1)
    assert dataclasses.replace(one, share=0.1) == ten
    expected = {0: (1.2e-3, 0.06), 14: (1.2e-3, 0.06), 15: (1.2e-4, 0.06), 20: (1.2e-5, 0.06), 25: (1.2e-6, 0.06)}
    for epoch, pair in expected.items():
        now = rates(one, one.backbone_rates[0], one.head_factors[0], epoch=epoch, step=0, steps=1)
        assert now == pytest.approx(pair)
    assert (one.epochs, one.batch_size, one.weight_decay, one.momentum, one.measure_every) == (30, 128, 1e-5, 0.9, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": None}, "give one of the two"),
        ({"list": "few.txt"}, "give one of the two"),
        ({"share": 0.0}, "share"),
        ({"share": 1.5}, "share"),
        ({"backbone_rates": ()}, "backbone_rates"),
        ({"test_resize": 100}, "test_resize"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SemiSupervised(**changes)


def test_rates_are_not_chosen_by_classes_that_have_one_label() -> None:
    said: list[str] = []
    data = Labelled(train=Halves(60, 0), test=Halves(20, 1), say=said.append)
    settings = dataclasses.replace(QUICK, share=0.01, epochs=1, backbone_rates=(0.02, 0.1))
    values = semi_supervised(around(module()), data, settings)
    assert values["labels"] == 4
    assert not any(name.startswith("grid/") for name in values)
    assert any("one labelled image" in text for text in said)
