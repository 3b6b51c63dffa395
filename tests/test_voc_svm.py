# SPDX-License-Identifier: Apache-2.0
"""The VOC machines: each is the one that scikit-learn trains, and what counts, is drawn or is missing is said."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.svm import LinearSVC
from torch import nn
from voc_layout import annotation, thing, write_devkit

from kinfold.data.annotated.voc import Presence
from kinfold.errors import UserError
from kinfold.evaluate.average_precision import all_point, curve, eleven_point
from kinfold.evaluate.backbones import FrozenBackbone, hash_of
from kinfold.evaluate.multi_label import MultiLabel, open_multi_label
from kinfold.evaluate.protocol import Request
from kinfold.evaluate.voc_svm import VOCSVM, Machines, choose_costs, drawn, parts_of, unit, voc_svm
from kinfold.reading import parse, read_text, read_yaml
from kinfold.recipe import RECIPES

SIDE = 4
CLASSES = ("cat", "dog", "cow")


class Pixels:
    """Images in memory."""

    labels = None
    classes = None

    def __init__(self, images: np.ndarray) -> None:
        self.images = images
        self.fingerprint = str(hash(images.tobytes()))
        self.description = f"{len(images)} images"

    def __len__(self) -> int:
        return len(self.images)

    def read(self, i: int) -> np.ndarray:
        pixels: np.ndarray = self.images[i]
        return pixels

    def name(self, i: int) -> str:
        return f"image {i}"


def some(count: int, *, seed: int, noise: int = 160) -> tuple[Pixels, Presence]:
    """Noisy images with a brighter row for each class they show; one in eight is difficult."""
    random = np.random.default_rng(seed)
    present = random.choice(np.array([-1, -1, -1, -1, 1, 1, 1, 0], np.int8), (count, len(CLASSES)))
    images = random.integers(0, noise, (count, SIDE, SIDE, 1))
    images[:, : len(CLASSES), :, 0] += 60 * (present != -1)[:, :, None]
    return Pixels(images.clip(0, 255).astype(np.uint8)), present


def data(said: list[str] | None = None, **changes: Any) -> MultiLabel:
    train, present = some(60, seed=0)
    test, asked = some(50, seed=1)
    fields: dict[str, Any] = {"train": train, "present": present, "test": test, "asked": asked, "classes": CLASSES}
    return MultiLabel(**{**fields, **changes}, say=(said if said is not None else []).append)


def flat() -> FrozenBackbone:
    module = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten())
    return FrozenBackbone(module=module, size=SIDE, channels=1, mean=(0.4,), std=(0.3,))


def pixels_of(source: Pixels) -> np.ndarray:
    """What `flat` makes of images, at unit length."""
    x = (source.images.reshape(len(source), -1) / 255 - 0.4) / 0.3 / np.sqrt(1 + 1e-5)
    length = np.sqrt((x**2).sum(axis=1, keepdims=True)) + 1e-5
    features: np.ndarray = x / length
    return features


@pytest.mark.parametrize("difficult", ["negative", "ignore"])
def test_values_are_those_of_a_loop_over_classes_with_scikit_learn(difficult: str) -> None:
    given = data()
    values = voc_svm(flat(), given, VOCSVM(costs=(0.5, 8.0), difficult=difficult, shots=()))  # type: ignore[arg-type]
    x, x_test = pixels_of(given.train), pixels_of(given.test)  # type: ignore[arg-type]
    for cost in (0.5, 8.0):
        areas, elevens = [], []
        for number in range(len(CLASSES)):
            label, truth = given.present[:, number], given.asked[:, number]
            learned = np.ones(60, bool) if difficult == "negative" else label != 0
            counted = np.ones(50, bool) if difficult == "negative" else truth != 0
            machine = LinearSVC(
                C=cost, class_weight={1: 2, -1: 1}, penalty="l2", loss="squared_hinge", tol=1e-4, dual=True,
                max_iter=2000, intercept_scaling=1.0, random_state=123,
            )  # fmt: skip
            machine.fit(x[learned], np.where(label[learned] == 1, 1, -1))
            found = curve(machine.decision_function(x_test[counted]), truth[counted] == 1)
            areas.append(100 * all_point(found))
            elevens.append(100 * eleven_point(found))
        assert values[f"mAP/full,C={cost:g}"] == pytest.approx(np.mean(areas), abs=1e-9)
        assert values[f"mAP11/full,C={cost:g}"] == pytest.approx(np.mean(elevens), abs=1e-9)
    assert values["best"] == values["mAP/full"] == max(values["mAP/full,C=0.5"], values["mAP/full,C=8"])
    assert values["chosen"] == pytest.approx(np.mean([values[f"AP/{name}"] for name in CLASSES]))


def test_the_two_ways_with_difficult_images_differ() -> None:
    one, other = (voc_svm(flat(), data(), VOCSVM(difficult=how, shots=())) for how in ("negative", "ignore"))
    assert one["best"] != other["best"]


def test_features_have_unit_length_but_for_a_hundred_thousandth() -> None:
    x = np.array([[3.0, 4.0], [0.0, 0.0], [3e-5, 4e-5]], np.float32)
    expected = [[3 / 5.00001, 4 / 5.00001], [0.0, 0.0], [3e-5 / 6e-5, 4e-5 / 6e-5]]
    np.testing.assert_allclose(unit(x), expected, rtol=1e-6)


def test_the_backbone_and_repeated_results_are_the_same_to_the_bit() -> None:
    backbone = flat()
    backbone.module.train()
    before = hash_of(backbone.module)
    first = voc_svm(backbone, data(), VOCSVM(shots=(2,)))
    assert (hash_of(backbone.module), backbone.module.training) == (before, True)
    assert voc_svm(backbone, data(), VOCSVM(shots=(2,))) == first
    assert voc_svm(backbone, data(), VOCSVM(shots=(2,), seed=1))["mAP/k=2"] != first["mAP/k=2"]


def test_a_class_that_no_test_image_shows_is_named_and_left_out_of_the_mean() -> None:
    said: list[str] = []
    asked = data().asked.copy()
    asked[:, 1] = np.where(asked[:, 1] == 1, 0, asked[:, 1])
    values = voc_svm(flat(), data(said, asked=asked), VOCSVM(shots=()))
    assert values["best"] == pytest.approx((values["AP/cat"] + values["AP/cow"]) / 2)
    assert "AP/dog" not in values
    assert any("1 of 3 classes are in no test image" in text and text.endswith(": dog") for text in said)
    with pytest.raises(UserError, match="No test image shows any"):
        voc_svm(flat(), data(asked=np.full_like(asked, -1)), VOCSVM(shots=()))


@pytest.mark.parametrize("everywhere", [1, -1])
def test_a_class_that_cannot_be_learned_scores_alike_and_is_named(everywhere: int) -> None:
    said: list[str] = []
    present = data().present.copy()
    present[:, 2] = everywhere
    values = voc_svm(flat(), data(said, present=present), VOCSVM(shots=(), costs=(0.5, 5.0)))
    assert values["AP/cow"] == pytest.approx(100 * (data().asked[:, 2] == 1).mean())
    assert any("Not to be learned" in text and text.endswith(": cow") for text in said)


def test_machines_that_do_not_converge_are_counted() -> None:
    said: list[str] = []
    voc_svm(flat(), data(said), VOCSVM(shots=(), costs=(1e6,), iterations=2))
    assert any("3 machines had not converged after 2 iterations" in text for text in said)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_draw_holds_k_images_of_each_class_and_those_of_smaller_draws(k: int) -> None:
    present = data().present
    rows = drawn(present, k, draw=0, seed=0)
    assert len(rows) == k * len(CLASSES)
    for number in range(len(CLASSES)):
        own = rows[number * k : (number + 1) * k]
        assert (present[own, number] == 1).all()
        assert len(set(own.tolist())) == k
    assert set(rows.tolist()) <= set(drawn(present, k + 1, draw=0, seed=0).tolist())
    assert rows.tolist() != drawn(present, k, draw=1, seed=0).tolist()
    assert rows.tolist() != drawn(present, k, draw=0, seed=1).tolist()


def test_an_image_of_two_classes_may_be_drawn_twice() -> None:
    present = np.array([[1, 1], [-1, -1]], np.int8)
    assert drawn(present, 1, draw=0, seed=0).tolist() == [0, 0]


def test_low_shot_values_are_the_best_cost_of_the_mean_over_draws() -> None:
    given, costs = data(), (0.1, 5.0)
    values = voc_svm(flat(), given, VOCSVM(costs=costs, shots=(3,), draws=4))
    x, x_test = pixels_of(given.train), pixels_of(given.test)  # type: ignore[arg-type]
    machines, table = Machines(VOCSVM()), np.zeros((4, 2))
    for draw in range(4):
        rows = drawn(given.present, 3, draw=draw, seed=0)
        for place, cost in enumerate(costs):
            scores = machines.scores(x[rows], given.present[rows], x_test, [0, 1, 2], cost)
            table[draw, place] = machines.precisions(scores, given.asked, [0, 1, 2])[:, 0].mean()
    means = table.mean(axis=0)
    assert values["by_cost/k=3,C=0.1"] == pytest.approx(means[0])
    assert values["by_cost/k=3,C=5"] == pytest.approx(means[1])
    assert values["mAP/k=3"] == pytest.approx(means.max())
    assert values["std/k=3"] == pytest.approx(table[:, means.argmax()].std(ddof=1))


def test_a_class_with_fewer_than_k_images_gives_all_and_says_so() -> None:
    said: list[str] = []
    present = data().present.copy()
    present[np.flatnonzero(present[:, 0] == 1)[3:], 0] = -1
    assert len(drawn(present, 8, draw=0, seed=0)) == 3 + 8 + 8
    voc_svm(flat(), data(said, present=present), VOCSVM(shots=(2, 8)))
    assert any(text.startswith("Fewer than 8 training images") and "cat (3)" in text for text in said)


@given(st.lists(st.sampled_from([-1, 0, 1]), min_size=1, max_size=40), st.integers(2, 5), st.integers(0, 99))
def test_every_part_gets_its_share_of_each_kind_of_image(values: list[int], folds: int, seed: int) -> None:
    present = np.array(values, np.int8)
    part = parts_of(present, folds, seed=seed, number=0)
    for value in (-1, 0, 1):
        counts = np.bincount(part[present == value], minlength=folds)
        assert len(counts) == folds
        assert counts.max() - counts.min() <= 1


def test_costs_are_chosen_on_held_out_training_images() -> None:
    costs = (0.1, 1.0, 10.0)
    train, present = some(60, seed=1)
    given, x = data(train=train, present=present), pixels_of(train)
    places = choose_costs(Machines(VOCSVM(costs=costs)), x, present, [0, 1, 2])
    for number in range(3):
        target = np.where(present[:, number] == 1, 1, -1)
        part = parts_of(present[:, number], 3, seed=0, number=number)
        means = []
        for cost in costs:
            found = []
            for fold in range(3):
                machine = LinearSVC(C=cost, class_weight={1: 2, -1: 1}, max_iter=2000, random_state=5, dual=True)
                machine.fit(x[part != fold], target[part != fold])
                scores = machine.decision_function(x[part == fold])
                found.append(all_point(curve(scores, target[part == fold] == 1)))
            means.append(np.mean(found))
        assert places[number] == np.argmax(means)
    assert len(set(places.tolist())) > 1
    values = voc_svm(flat(), given, VOCSVM(costs=costs, shots=()))
    alone = [voc_svm(flat(), given, VOCSVM(costs=(costs[place],), shots=())) for place in places]
    expected = np.mean([values_of[f"AP/{name}"] for name, values_of in zip(CLASSES, alone)])
    assert values["chosen"] == pytest.approx(expected)


def test_a_class_with_one_image_gets_the_first_cost() -> None:
    x, present = some(30, seed=3)
    present[:, 1] = -1
    present[4, 1] = 1
    assert choose_costs(Machines(VOCSVM(costs=(0.3, 2.0))), pixels_of(x), present, [1]).tolist() == [0]


def test_images_that_do_not_decode_are_left_out_with_their_labels() -> None:
    said: list[str] = []
    given = data()

    class Holed(Pixels):
        def read(self, i: int) -> np.ndarray:
            return np.zeros((2, 2, 2, 2), np.uint8) if i in (0, 7) else super().read(i)

    holed = dataclasses.replace(given, train=Holed(given.train.images), say=said.append)  # type: ignore[attr-defined]
    rest = np.setdiff1d(np.arange(60), [0, 7])
    whole = dataclasses.replace(given, train=Pixels(given.train.images[rest]), present=given.present[rest])  # type: ignore[attr-defined]
    settings = VOCSVM(shots=(2,))
    assert voc_svm(flat(), holed, settings) == voc_svm(flat(), whole, settings)
    assert any("2 of 60 images do not decode" in text for text in said)


def test_a_resize_without_a_size_is_refused() -> None:
    with pytest.raises(ValueError, match="test_resize: 256"):
        VOCSVM(test_resize=256)


@pytest.mark.parametrize("path", sorted((RECIPES / "evaluate" / "voc-svm").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_say_everything(path: Path) -> None:
    values = read_yaml(read_text(path), source=path.name)
    assert isinstance(values, dict)
    assert values.keys() == {field.name for field in dataclasses.fields(VOCSVM)}
    parse(VOCSVM, values, source=path.name)


def kit(root: Path, **splits: list[str]) -> Path:
    """A year of VOC with six images, a cat in every second."""
    ids = [f"{number:06}" for number in range(6)]
    xml = {id: annotation(thing("cat" if int(id) % 2 else "dog")) for id in ids}
    return write_devkit(root, xml, splits)


def opened(path: Path, said: list[str] | None = None, **words: Any) -> MultiLabel:
    conditions = {"device": "cpu", "say": (said if said is not None else []).append}
    return open_multi_label(Request(str(path), **words), None, conditions)


def names(data: MultiLabel) -> tuple[list[str], list[str]]:
    return tuple([Path(source.name(i)).stem for i in range(len(source))] for source in (data.train, data.test))  # type: ignore[return-value]


def test_trainval_is_learned_from_and_test_is_asked(tmp_path: Path) -> None:
    root = kit(tmp_path / "VOC2007", trainval=["000003", "000000"], train=["000003"], val=["000000"], test=["000001"])
    found = opened(root)
    assert names(found) == (["000003", "000000"], ["000001"])
    cat, dog = found.classes.index("cat"), found.classes.index("dog")
    assert found.present[:, [cat, dog]].tolist() == [[1, -1], [-1, 1]]
    assert found.asked[:, [cat, dog]].tolist() == [[1, -1]]
    assert found.about()["train"]["images"] == 2


def test_without_a_test_split_val_is_asked_and_that_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    root = kit(tmp_path / "VOC2012", trainval=["000003", "000000"], train=["000003"], val=["000000"])
    assert names(opened(root, said)) == (["000003"], ["000000"])
    assert any("no test split" in text for text in said)


def test_of_several_years_the_one_with_a_test_set_is_taken(tmp_path: Path) -> None:
    kit(tmp_path / "VOC2007", trainval=["000003"], test=["000001"])
    kit(tmp_path / "VOC2012", trainval=["000004", "000002"])
    assert names(opened(tmp_path)) == (["000003"], ["000001"])
    both = opened(tmp_path, train_split="2007_trainval+2012_trainval")
    assert names(both) == (["000003", "000004", "000002"], ["000001"])
    assert len(both.present) == 3


def test_another_set_can_be_asked(tmp_path: Path) -> None:
    learned = kit(tmp_path / "a" / "VOC2012", trainval=["000004", "000002"])
    other = kit(tmp_path / "b" / "VOC2007", test=["000001"])
    assert names(opened(learned, test_data=str(other))) == (["000004", "000002"], ["000001"])


def test_images_in_both_splits_are_refused(tmp_path: Path) -> None:
    root = kit(tmp_path / "VOC2012", trainval=["000003", "000000"], train=["000003"], val=["000000"])
    with pytest.raises(UserError, match="1 images are both in trainval and in val, first 000000"):
        opened(root, train_split="trainval")


def test_a_limit_takes_the_labels_of_the_images_it_takes(tmp_path: Path) -> None:
    root = kit(tmp_path / "VOC2007", trainval=["000003", "000000", "000005", "000002", "000004"], test=["000001"])
    found = opened(root, limit=3)
    cat, kept = found.classes.index("cat"), names(found)[0]
    assert len(kept) == len(found.present) == 3
    assert kept != names(opened(root))[0][:3]
    assert found.present[:, cat].tolist() == [1 if int(id) % 2 else -1 for id in kept]
