# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning: a copy learns as a loop by hand would, the backbone stays, and what was stopped goes on to the bit."""

from __future__ import annotations

import copy
import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_linear import Halves
from test_processes import free_port
from test_resume import processes
from torch import nn
from torch.nn import functional as F

from kinfold import distributed
from kinfold.checkpoint import load_latest
from kinfold.data.any_crop import AnyCrop
from kinfold.encoders import Backbone, build_backbone
from kinfold.errors import UserError
from kinfold.evaluate.accuracies import accuracies
from kinfold.evaluate.backbones import FrozenBackbone, hash_of
from kinfold.evaluate.conditions import Conditions
from kinfold.evaluate.fine_tune import FineTune, fine_tune
from kinfold.evaluate.labelled import Labelled
from kinfold.evaluate.linear import Cosine, Steps
from kinfold.evaluate.linear.classifier import first_weights
from kinfold.evaluate.resumable import Resumable, Stopped
from kinfold.evaluate.tuning import Diverged, Task, rates, tune
from kinfold.randomness import ORDER, permutation
from kinfold.reading import parse, plain, read_text, read_yaml
from kinfold.recipe import RECIPES, find_recipe
from kinfold.views import Augmentation

STILL = Augmentation(size=4, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
QUICK = FineTune(epochs=4, batch_size=20, backbone_rate=0.02, head_factor=5.0, schedule=Cosine(), augment=STILL)


def recipe(name: str, kind: type[Any] = FineTune, folder: str = "fine-tune") -> Any:
    text = read_text(find_recipe(name, folder=RECIPES / "evaluate" / folder))
    return parse(kind, read_yaml(text, source=name), source=name)


def module(norm: type[nn.Module] = nn.BatchNorm2d, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Conv2d(1, 6, 3, padding=1), norm(6), nn.ReLU(), nn.Dropout(dropout), nn.Flatten()]
    return nn.Sequential(*layers)


def around(inside: nn.Module) -> FrozenBackbone:
    return FrozenBackbone(module=inside, size=4, channels=1, mean=(0.4,), std=(0.3,))


def halves(**how: Any) -> Labelled:
    return Labelled(train=Halves(90, 0), test=Halves(60, 1), **how)


class Spy(nn.Module):
    """Something in front of a network that is called with each batch and its mode; part of no state."""

    def __init__(self, inside: nn.Module, see: Callable[[torch.Tensor, bool], None]) -> None:
        super().__init__()
        self.inside = inside
        self.see = see

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.see(images, self.training)
        return self.inside(images)  # type: ignore[no-any-return]

    def __deepcopy__(self, memo: dict[int, Any]) -> Spy:
        return Spy(copy.deepcopy(self.inside, memo), self.see)


def final(folder: Path) -> dict[str, Any]:
    found = load_latest(folder)
    assert found is not None
    return found.state


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["history"] == other["history"]
    assert one["network"].keys() == other["network"].keys()
    for name, value in one["network"].items():
        assert torch.equal(value, other["network"][name]), name
    for number, state in one["optimizer"]["state"].items():
        assert torch.equal(state["momentum_buffer"], other["optimizer"]["state"][number]["momentum_buffer"])


def test_training_is_that_of_a_loop_by_hand(tmp_path: Path) -> None:
    settings = FineTune(
        epochs=5, batch_size=20, backbone_rate=0.01, head_factor=5.0, first_head_factor=50.0, weight_decay=0.01,
        schedule=Steps(milestones=(2, 4), factor=0.1), augment=STILL, seed=7,
    )  # fmt: skip
    data = halves(progress=tmp_path)
    fine_tune(around(module().eval()), data, settings)

    own, train = module().train(), Halves(90, 0)
    classifier = nn.Linear(96, 4)
    for parameter, value in zip(classifier.parameters(), first_weights("default", 4, 96, seed=7)):
        parameter.data.copy_(value)
    optimizer = torch.optim.SGD([{"params": own.parameters()}, {"params": classifier.parameters()}], lr=0, momentum=0.9)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.01
    images = (torch.from_numpy(train.images).permute(0, 3, 1, 2) / 255 - 0.4) / 0.3
    labels = torch.from_numpy(train.labels)
    by_epoch = [(0.01, 0.5), (0.01, 0.05), (0.001, 0.005), (0.001, 0.005), (0.0001, 0.0005)]
    for epoch, (slow, fast) in enumerate(by_epoch):
        order = torch.from_numpy(permutation(ORDER, 7, epoch, n=90))
        for some in torch.split(order, 20):  # the last has ten
            optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = slow, fast
            loss = F.cross_entropy(classifier(own(images[some])), labels[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network = final(tmp_path)["network"]
    moved = own.state_dict()
    assert not torch.allclose(moved["1.running_mean"], torch.zeros(6), atol=0.01)
    for name, value in moved.items():
        torch.testing.assert_close(network[f"backbone.{name}"], value, rtol=1e-4, atol=1e-5)
    for name, value in classifier.state_dict().items():
        torch.testing.assert_close(network[f"classifier.{name}"], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_backbone_is_the_same_after_as_before_to_the_bit(training: bool) -> None:
    inside = build_backbone(Backbone(name="resnet10_w8", stem="small"), 1).train(training).requires_grad_(False)
    before, random = hash_of(inside), torch.get_rng_state()
    data = Labelled(train=Halves(40, 0, side=8), test=Halves(20, 1, side=8))
    backbone = FrozenBackbone(module=inside, size=8, channels=1, mean=(0.4,), std=(0.3,))
    fine_tune(backbone, data, dataclasses.replace(QUICK, epochs=2, augment=None))
    assert hash_of(inside) == before
    assert all(child.training == training for child in inside.modules())
    assert all(p.grad is None and not p.requires_grad for p in inside.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_steps_are_in_training_mode_and_measurements_are_not() -> None:
    seen: list[tuple[int, bool, bool]] = []
    spy = Spy(module(), lambda images, training: seen.append((len(images), training, torch.is_grad_enabled())))
    fine_tune(around(spy.eval()), halves(), dataclasses.replace(QUICK, epochs=2, measure_every=5))
    steps = [(20, True, True)] * 4 + [(10, True, True)]
    asked = [(60, False, False)]
    assert seen == [(1, False, False), *steps, *asked, *steps, *asked]  # the first asks how wide features are


def test_what_is_separable_is_learned_and_last_and_best_are_kept_apart(tmp_path: Path) -> None:
    values = fine_tune(around(module()), halves(say=pytest.fail, progress=tmp_path), QUICK)
    assert values["top1"] == values["mean_per_class"] == values["best/top1"] == 100
    assert "top5" not in values  # with four classes it is 100 always
    assert 1 <= values["best_epoch"] <= 4
    turned = Halves(60, 1)
    assert turned.labels is not None
    turned.labels = (turned.labels + 1) % 4  # the better it learns, the worse it does
    slow = dataclasses.replace(QUICK, epochs=8, backbone_rate=0.001)
    values = fine_tune(around(module()), dataclasses.replace(halves(), test=turned), slow)
    assert values["top1"] == 0 < values["best/top1"]
    assert values["best_epoch"] < 8


@pytest.mark.parametrize(("epochs", "every", "measured"), [(7, 3, [1, 4, 7]), (6, 3, [1, 4, 6]), (2, 1, [1, 2])])
def test_the_first_and_the_last_epoch_are_measured_always(
    epochs: int, every: int, measured: list[int], tmp_path: Path
) -> None:
    fine_tune(
        around(module()), halves(progress=tmp_path), dataclasses.replace(QUICK, epochs=epochs, measure_every=every)
    )
    assert [scores["epoch"] for scores in final(tmp_path)["history"]] == measured


def test_accuracies_are_those_counted_by_hand() -> None:
    class Told(nn.Module):
        """Logits by the image's first pixel: its class first, then the classes below it."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            answer = images[:, 0, 0, 0].round().long()
            logits = -((torch.arange(8)[None] - answer[:, None]) % 8).float().neg()
            return torch.where((answer == 7)[:, None], torch.nan, -logits)

    source = Halves(12, 0)
    answers = np.array([0, 0, 0, 0, 1, 1, 2, 2, 7, 7, 3, 3])
    source.images[:, 0, 0, 0] = answers
    labels = np.array([0, 0, 0, 1, 1, 5, 2, 7, 7, 7, 3, 3])
    backbone = FrozenBackbone(module=nn.Flatten(), size=4, channels=1, mean=(0.0,), std=(1 / 255,))
    bad: dict[int, str] = {}
    found = accuracies(Told(), backbone, Conditions(batch_size=5), source, labels, 8, size=4, resize=None, bad=bad)
    # Who gives no numbers is right about nothing. The first five of answer a are a, a + 1, .., a + 4.
    assert found["top1"] == pytest.approx(100 * 7 / 12)
    assert found["top5"] == pytest.approx(100 * 9 / 12)
    assert found["mean_per_class"] == pytest.approx(100 * np.mean([3 / 3, 1 / 2, 1 / 1, 2 / 2, 0 / 1, 0 / 3]))
    assert bad == {}


def test_the_rates_of_the_recipes_are_those_of_the_authors() -> None:
    settings = recipe("invp")
    expected = {
        0: (1e-3, 5e-2),
        1: (1e-3, 5e-3),
        49: (1e-3, 5e-3),
        50: (1e-4, 5e-4),
        70: (1e-5, 5e-5),
        80: (1e-6, 5e-6),
    }
    for epoch, pair in expected.items():
        now = rates(settings, settings.backbone_rate, settings.head_factor, epoch=epoch, step=0, steps=1)
        assert now == pytest.approx(pair)
    assert (settings.epochs, settings.batch_size, settings.weight_decay, settings.measure_every) == (81, 128, 1e-6, 5)
    cars = recipe("invp-cars")
    assert cars.augment.scale == (0.2, 1.0)
    assert cars.train_resize is None
    same = {"augment": settings.augment, "train_resize": 256}
    assert dataclasses.replace(cars, **same) == settings


@pytest.mark.parametrize(
    "path", sorted((RECIPES / "evaluate" / "fine-tune").glob("*.yaml")), ids=lambda path: path.stem
)
def test_a_recipe_is_complete(path: Path) -> None:
    assert plain(recipe(path.stem)).keys() == read_yaml(read_text(path), source=path.stem).keys()


def test_another_size_keeps_the_proportions() -> None:
    made = recipe("invp").at_size(112, None)
    assert (made.augment.size, made.train_resize, made.test_size, made.test_resize) == (112, 128, 112, 128)
    assert recipe("invp").at_size(112, 120).test_resize == 120
    assert recipe("default").at_size(112, None) == recipe("default")


def test_crops_are_windows_of_the_photo_anywhere_and_others_in_every_epoch() -> None:
    class Photos(Halves):
        """Eight photos of 4 x 6 pixels: every pixel is another."""

        def __init__(self) -> None:
            super().__init__(8, 0)
            self.images = np.arange(8 * 24, dtype=np.uint8).reshape(8, 4, 6, 1)

    seen: list[list[float]] = []
    spy = Spy(nn.Flatten(), lambda images, training: seen.append(images.tolist()) if training else None)
    settings = FineTune(
        epochs=30, batch_size=8, train_resize=4, backbone_rate=1.0,
        augment=Augmentation(size=3, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0), test_size=3, measure_every=99,
    )  # fmt: skip
    backbone = FrozenBackbone(module=spy, size=3, channels=1, mean=(0.0,), std=(1 / 255,))
    fine_tune(backbone, Labelled(train=Photos(), test=Photos()), settings)
    corners = []
    for batch in seen:
        for image in np.rint(np.array(batch)[:, 0]).astype(int):
            top, left = divmod(image[0, 0] % 24, 6)
            photo = Photos().images[image[0, 0] // 24, :, :, 0]
            assert np.array_equal(image, photo[top : top + 3, left : left + 3])
            corners.append((image[0, 0] // 24, top, left))
    places = [(top, left) for _, top, left in corners]
    assert set(places) == {(top, left) for top in range(2) for left in range(4)}
    assert min(places.count(place) for place in set(places)) > 240 / 8 / 3
    assert len({sorted(corners)[i] for i in range(30)}) > 4  # one photo, thirty epochs
    assert AnyCrop(Photos(), 1, 0.75, seed=0).read(3).tolist() == AnyCrop(Photos(), 1, 0.75, seed=0).read(3).tolist()


def test_workers_cut_what_one_process_cuts(tmp_path: Path) -> None:
    cut = Augmentation(size=3, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    settings = dataclasses.replace(QUICK, epochs=2, train_resize=4, augment=cut, test_size=4)
    inside = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, 8))
    for workers in (0, 2):
        fine_tune(around(inside), halves(workers=workers, progress=tmp_path / f"{workers}"), settings)
    assert_equal(final(tmp_path / "0"), final(tmp_path / "2"))


class Stop(Exception):
    """What a test ends a training with."""


@pytest.mark.parametrize("at", [3, 8, 10, 15])  # steps of 5 an epoch: in the middle, and at an epoch's end
@pytest.mark.parametrize("how", ["signal", "death"])
def test_a_training_that_was_stopped_goes_on_to_the_bit(
    how: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0

    def see(images: torch.Tensor, training: bool) -> None:
        nonlocal count
        count += training
        if training and how == "signal" and count == at:
            os.kill(os.getpid(), signal.SIGTERM)
        if training and how == "death" and count == at + 1:
            raise Stop

    settings = dataclasses.replace(QUICK, measure_every=2, augment=None)  # crops and flips by address
    inside = module(dropout=0.3)
    values = fine_tune(
        around(Spy(inside, lambda images, training: None)), halves(progress=tmp_path / "whole"), settings
    )

    if how == "death":  # without a signal there is only what was kept on the way: here, after every second step
        original = Resumable.took_step

        def took_step(self: Resumable) -> None:
            self._seconds = -1.0 if self.step % 2 else 1e9
            original(self)

        monkeypatch.setattr(Resumable, "took_step", took_step)
    data = halves(progress=tmp_path / "stopped", say=lambda text: None)
    with pytest.raises(Stopped if how == "signal" else Stop):
        fine_tune(around(Spy(inside, see)), data, settings)
    done = count
    kept = load_latest(tmp_path / "stopped")
    assert kept is not None
    assert kept.step == (at if how == "signal" else at // 2 * 2)
    count = 100
    assert fine_tune(around(Spy(inside, see)), data, settings) == values
    assert count - 100 == 20 - kept.step  # nothing was done twice
    assert done < 20
    assert_equal(final(tmp_path / "stopped"), final(tmp_path / "whole"))


def test_other_images_are_not_gone_on_with(tmp_path: Path) -> None:
    fine_tune(around(module()), halves(progress=tmp_path), QUICK)
    other = dataclasses.replace(halves(progress=tmp_path), train=Halves(90, 3))
    with pytest.raises(UserError, match="left by a training on other images"):
        fine_tune(around(module()), other, QUICK)


def as_one_of(rank: int, world: int, port: int, norm: bool, out: str) -> None:
    """Fine-tune as one process of `world`, and leave the values and the state in files."""
    torch.set_num_threads(1)
    if world > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
        distributed.start("cpu")
    inside = module() if norm else module(nn.Identity)
    data = Labelled(train=Halves(91, 0), test=Halves(61, 1), progress=Path(out) / f"{world}", say=lambda text: None)
    rate = 0.02 if norm else 0.0003  # with the slow one some answers are wrong, other ones in each process
    values = fine_tune(
        around(inside), data, dataclasses.replace(QUICK, batch_size=30, drop_last=True, backbone_rate=rate)
    )
    torch.save(values, f"{out}/{world}-{rank}.pt")
    distributed.stop()


@pytest.mark.parametrize("norm", [False, True])
def test_one_process_and_two_learn_the_same(norm: bool, tmp_path: Path) -> None:
    port, out = free_port(), str(tmp_path)
    started = [processes.Process(target=as_one_of, args=(rank, 2, port, norm, out)) for rank in range(2)]
    started.append(processes.Process(target=as_one_of, args=(0, 1, port, norm, out)))
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        assert process.exitcode == 0
    values = {name: torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")}
    assert values["2-0"] == values["2-1"]
    one, two = final(tmp_path / "1")["network"], final(tmp_path / "2")["network"]
    if norm:  # each normalises its own images: not the same, but both learn, and what is kept is of both
        assert values["2-0"]["top1"] > 90
        assert not torch.equal(one["backbone.1.running_mean"], two["backbone.1.running_mean"])
        torch.testing.assert_close(one["backbone.1.running_mean"], two["backbone.1.running_mean"], rtol=0.1, atol=0.05)
        return
    assert values["2-0"] == values["1-0"]
    assert 30 < values["1-0"]["top1"] < 95
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-6, atol=1e-6)


def test_a_set_smaller_than_a_batch_is_one_batch_and_said() -> None:
    said: list[str] = []
    data = Labelled(train=Halves(17, 0), test=Halves(9, 1), say=said.append)
    fine_tune(around(module()), data, dataclasses.replace(QUICK, batch_size=128))
    assert said == ["batch_size is 128; there are 17 training images, so a batch has 17 of them."]


def test_unreadable_images_are_said_and_never_learned_from() -> None:
    class Holed(Halves):
        def read(self, i: int) -> np.ndarray:
            return b"no image" if i % 5 == 0 else super().read(i)  # type: ignore[return-value]

    said: list[str] = []
    train, test = Holed(200, 0), Holed(50, 1)
    for some in (train, test):
        assert some.labels is not None
        some.labels[::5] = (some.labels[::5] + 1) % 4  # an unreadable image's label is wrong
    data = Labelled(train=train, test=test, say=said.append)
    values = fine_tune(around(module()), data, dataclasses.replace(QUICK, epochs=6))
    assert values["top1"] == 100
    assert [text.split(" images")[0] for text in said] == ["40 of 200", "10 of 50"]


def test_without_a_test_split_a_fifth_is_held_out_and_said() -> None:
    said: list[str] = []
    values = fine_tune(around(module()), Labelled(train=Halves(100, 0), say=said.append), QUICK)
    assert values["top1"] == 100
    assert ["held out" in text for text in said] == [True]


def test_a_class_that_nobody_has_shown_is_named() -> None:
    said: list[str] = []
    train = Halves(90, 0)
    assert train.labels is not None
    train.labels[train.labels == 2] = 1
    values = fine_tune(around(module()), Labelled(train=train, test=Halves(60, 1), say=said.append), QUICK)
    assert len(said) == 1
    assert "there is no training image" in said[0]
    assert said[0].endswith(": c")
    assert values["mean_per_class"] <= 75


def test_images_without_a_label_are_refused() -> None:
    train = Halves(90, 0)
    assert train.labels is not None
    train.labels[4] = -1
    with pytest.raises(UserError, match="1 of 90 images have no label"):
        fine_tune(around(module()), Labelled(train=train, test=Halves(60, 1)), QUICK)


def test_a_rate_that_diverges_is_an_error_that_names_it() -> None:
    train, test = Halves(90, 0), Halves(60, 1)
    task = Task(train, np.asarray(train.labels), test, np.asarray(test.labels), 4)
    with pytest.raises(Diverged, match=r"tuning: the loss is not finite at step \d+ of 20.*1e\+30 for the backbone"):
        tune(
            around(module()), halves(), task, FineTune(epochs=4, batch_size=20), backbone_rate=1e30, head_factor=1.0,
            doing="tuning",
        )  # fmt: skip


def test_half_precision_off_cuda_is_said_and_not_done() -> None:
    said: list[str] = []
    values = fine_tune(around(module()), halves(say=said.append), dataclasses.replace(QUICK, precision="bf16"))
    assert said == ["precision: bf16 is for CUDA devices; on cpu everything is computed in fp32."]
    assert values == fine_tune(around(module()), halves(), QUICK)


@pytest.mark.parametrize(
    "changes",
    [
        {"test_resize": 100},
        {"test_size": 32, "test_resize": 30},
        {"train_resize": 256},
        {"train_resize": 3, "augment": STILL},
        {"train_resize": 8, "augment": Augmentation(size=4)},
        {"backbone_rate": 0.0},
        {"first_head_factor": -1.0},
        {"epochs": 0},
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes)) if "test_size" not in changes else "test_resize"):
        FineTune(**changes)
