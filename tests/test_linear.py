# SPDX-License-Identifier: Apache-2.0
"""Linear classification: its step is torch's, rates do not meet, and what separates is separated."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import nn
from torch.nn import functional as F

from kinfold.data.sources import Subset, open_source
from kinfold.encoders import Backbone, build_backbone
from kinfold.errors import UserError
from kinfold.evaluate import FrozenBackbone, Labelled, Linear, _at_size, evaluate, load_protocol
from kinfold.evaluate.features import hash_of
from kinfold.evaluate.linear import Cosine, Steps, fit, linear, share_of_rate
from kinfold.evaluate.linear.batches import Cached, Kept, pad_crop
from kinfold.evaluate.linear.classifier import Classifier, first_weights, hits
from kinfold.views import Augmentation

WHOLE = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}


class Halves:
    """Images whose label is which quarter is bright: linearly separable as they are."""

    def __init__(self, count: int, seed: int, side: int = 4) -> None:
        random = np.random.default_rng(seed)
        self.labels: np.ndarray | None = random.integers(0, 4, count)
        self.images = random.integers(0, 60, (count, side, side, 1), dtype=np.uint8)
        half = side // 2
        for image, label in zip(self.images, self.labels):
            top, left = half * (label // 2), half * (label % 2)
            image[top : top + half, left : left + half] += 150
        self.classes = ("a", "b", "c", "d")
        self.fingerprint = f"{count}-{seed}"
        self.description = f"{count} halves"

    def __len__(self) -> int:
        return len(self.images)

    def read(self, i: int) -> np.ndarray:
        return self.images[i]

    def name(self, i: int) -> str:
        return f"half {i}"


def flat(side: int = 4) -> FrozenBackbone:
    return FrozenBackbone(module=nn.Flatten(), size=side, channels=1, mean=(0.5,), std=(0.5,))


def test_steps_are_those_of_torch_sgd_on_a_linear_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(6, 5, dtype=torch.float64)
    own = Classifier(layer.weight.detach(), layer.bias.detach(), momentum=0.9, weight_decay=0.01)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0, momentum=0.9, weight_decay=0.01)
    for rate in (0.5, 0.5, 0.05, 2.0):
        x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 5, (8,), generator=generator)
        optimizer.param_groups[0]["lr"] = rate
        loss = F.cross_entropy(layer(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(own.step(x, y, rate), loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(own.weight, layer.weight.detach(), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(own.bias, layer.bias.detach(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_steps_with_batch_norm_are_those_of_torch(kind: Literal["train", "eval"]) -> None:
    generator = torch.Generator().manual_seed(0)
    norm, layer = nn.BatchNorm1d(6, dtype=torch.float64), nn.Linear(6, 5, dtype=torch.float64)
    norm.train(kind == "train")
    weight, bias = layer.weight.detach(), layer.bias.detach()
    own = Classifier(weight, bias, momentum=0.9, weight_decay=0.01, batch_norm=kind)
    optimizer = torch.optim.SGD([*norm.parameters(), *layer.parameters()], lr=0.3, momentum=0.9, weight_decay=0.01)
    for _ in range(4):
        x = 3 + 2 * torch.randn(8, 6, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 5, (8,), generator=generator)
        loss = F.cross_entropy(layer(norm(x)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(own.step(x, y, 0.3), loss.detach(), rtol=1e-10, atol=0)
    for mine, theirs in zip(own.parameters, [layer.weight, layer.bias, norm.weight, norm.bias]):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-9, atol=1e-10)
    assert norm.running_mean is not None
    torch.testing.assert_close(own.mean, norm.running_mean)
    torch.testing.assert_close(own.var, norm.running_var)
    torch.testing.assert_close(own(x), layer(norm.eval()(x)).detach())
    # Trap: in evaluation mode its statistics are the first ones, so nothing is normalised.
    assert torch.equal(own.mean, torch.zeros_like(own.mean)) == (kind == "eval")


def probe(
    x: torch.Tensor, y: torch.Tensor, settings: Linear, *, batch: int | None = None, classes: int
) -> tuple[Classifier, float, torch.Tensor]:
    """Train one classifier on features as the protocol does: it, its last training loss, and its accuracies."""
    weight, bias = first_weights(settings.init, classes, x.shape[1], seed=0)
    head = Classifier(weight, bias, momentum=settings.momentum, weight_decay=settings.weight_decay)
    device = torch.device("cpu")
    batches = Cached(x, y, batch=batch or len(x), seed=0, drop_last=False, device=device)
    asked = Kept(x, y, device=device)
    history, losses = fit([[head]], batches, asked, Labelled(train=Halves(1, 0)), settings, scale=1.0)
    return head, float(losses), history[-1, 0, 0]


def test_the_probe_of_two_points_reaches_the_optimum_in_closed_form() -> None:
    # Points at ±e of two classes: W = (w, −w) e with 1 / (1 + exp(2 w)) = decay · w.
    decay = 0.03
    x = torch.tensor([[0.6, 0.8], [-0.6, -0.8]]).repeat(20, 1)
    y = torch.tensor([0, 1]).repeat(20)
    settings = Linear(epochs=400, learning_rates=(1.0,), weight_decay=decay, schedule=Cosine())
    head, loss, accuracy = probe(x, y, settings, classes=2)
    w = brentq(lambda w: 1 / (1 + math.exp(2 * w)) - decay * w, 0, 100)
    torch.testing.assert_close(head.weight, w * torch.tensor([[0.6, 0.8], [-0.6, -0.8]]), rtol=1e-4, atol=1e-4)
    assert loss == pytest.approx(math.log1p(math.exp(-2 * w)), rel=1e-3)
    assert accuracy.tolist() == [100, 100]


def test_the_probe_of_separable_features_reaches_the_optimum_of_logistic_regression() -> None:
    from sklearn.linear_model import LogisticRegression

    random = np.random.default_rng(0)
    y = random.integers(0, 4, 300)
    x = (4 * np.eye(6)[y] + random.normal(size=(300, 6))).astype(np.float32)
    decay = 0.01
    # The probe's bias decays too: a feature that is always one.
    other = LogisticRegression(C=1 / (len(x) * decay), fit_intercept=False, tol=1e-8, max_iter=1000)
    other.fit(np.hstack([x, np.ones((300, 1))]), y)
    settings = Linear(epochs=400, learning_rates=(1.0,), weight_decay=decay, schedule=Cosine())
    head, _, accuracy = probe(torch.from_numpy(x), torch.from_numpy(y), settings, classes=4)
    found = torch.cat([head.weight, head.bias[:, None]], dim=1).numpy()
    np.testing.assert_allclose(found, other.coef_, rtol=1e-3, atol=1e-3)
    assert accuracy[0] > 97
    # Small batches whose rate falls to zero end beside it.
    short = Linear(epochs=40, learning_rates=(0.1,), weight_decay=decay, schedule=Cosine())
    head, _, _ = probe(torch.from_numpy(x), torch.from_numpy(y), short, batch=32, classes=4)
    found = torch.cat([head.weight, head.bias[:, None]], dim=1).numpy()
    assert np.abs(found - other.coef_).max() < 0.05


def test_what_is_separable_is_separated() -> None:
    data = Labelled(train=Halves(400, 0), test=Halves(100, 1), say=pytest.fail)
    values = linear(flat(), data, Linear(epochs=10, batch_size=32, learning_rates=(1.0,)))
    assert values["last"] == values["last/lr=1"] == values["best"] == 100
    assert "last_top5/lr=1" not in values  # with four classes it is 100 always


def test_each_rate_is_to_the_bit_what_it_is_alone() -> None:
    data = Labelled(train=Halves(200, 0), test=Halves(100, 1))
    settings = Linear(epochs=3, batch_size=32, learning_rates=(0.001, 0.01, 0.1), schedule=Cosine())
    together = linear(flat(), data, settings)
    for rate in settings.learning_rates:
        alone = linear(flat(), data, dataclasses.replace(settings, learning_rates=(rate,)))
        for kind in ("last", "best", "best_epoch"):
            assert together[f"{kind}/lr={rate:g}"] == alone[f"{kind}/lr={rate:g}"]
    assert len({together[f"last/lr={rate:g}"] for rate in settings.learning_rates}) > 1


def test_last_is_chosen_by_the_training_loss_and_best_on_the_test_set() -> None:
    # The test set's labels are turned round: the better a rate learns, the worse it does there.
    turned = Halves(100, 1)
    assert turned.labels is not None
    turned.labels = (turned.labels + 1) % 4
    data = Labelled(train=Halves(200, 0), test=turned)
    values = linear(flat(), data, Linear(epochs=5, batch_size=50, learning_rates=(1e-6, 1.0)))
    assert values["last"] == values["last/lr=1"] < values["last/lr=1e-06"]
    assert values["best"] == max(values["best/lr=1"], values["best/lr=1e-06"])


def test_best_is_the_best_epoch_and_last_the_last_one() -> None:
    data = Labelled(train=Halves(120, 0), test=Halves(60, 1))
    settings = Linear(epochs=6, batch_size=20, learning_rates=(3.0,), schedule=Steps(milestones=(100,)))
    # With a constant rate, a run of n epochs ends where a longer run is after n: so `last` of each gives the history.
    history = [linear(flat(), data, dataclasses.replace(settings, epochs=n))["last"] for n in range(1, 7)]
    values = linear(flat(), data, settings)
    assert values["last"] == history[-1]
    assert values["best"] == max(history)
    assert values["best_epoch/lr=3"] == 1 + history.index(max(history))


def test_a_rate_that_diverges_is_said_and_never_chosen() -> None:
    said: list[str] = []
    data = Labelled(train=Halves(100, 0), test=Halves(50, 1), say=said.append)
    values = linear(flat(), data, Linear(epochs=2, batch_size=20, learning_rates=(1e38, 0.5)))
    assert values["last"] == values["last/lr=0.5"] > 50
    assert values["last/lr=1e+38"] == 0
    assert said == ["lr=1e+38 diverged: its training loss is not finite. Leave it out or lower it."]


def test_top_five_counts_the_first_five() -> None:
    classifier = Classifier(torch.eye(7), torch.zeros(7), momentum=0.0, weight_decay=0.0)
    x = torch.arange(7.0).expand(7, 7)  # class 6 is first, then 5, ...
    assert hits(classifier, x, torch.arange(7)).tolist() == [1, 5]


def test_rates_scale_with_the_batch_where_a_base_is_given() -> None:
    data = Labelled(train=Halves(100, 0), test=Halves(50, 1))
    settings = Linear(epochs=2, batch_size=50, learning_rates=(0.002,))
    scaled = linear(flat(), data, dataclasses.replace(settings, base_batch=25))
    direct = linear(flat(), data, dataclasses.replace(settings, learning_rates=(0.004,)))
    assert scaled["last"] == direct["last"] != linear(flat(), data, settings)["last"]


def test_schedules_are_those_of_the_papers() -> None:
    invp = load_protocol("linear", "invp-cifar10").schedule
    shares = [share_of_rate(invp, epoch=epoch, step=0, steps=1) for epoch in (39, 40, 59, 60, 80)]
    assert shares == pytest.approx([1, 0.2, 0.2, 0.04, 0.008])
    cosine = [share_of_rate(Cosine(), epoch=0, step=step, steps=4) for step in range(4)]
    assert cosine == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)])


def test_first_weights_have_the_spread_that_was_asked_for() -> None:
    for init, spread in (("normal", 0.01), ("fan-out", math.sqrt(2 / 50))):
        weight, bias = first_weights(init, 50, 400, seed=0)  # type: ignore[arg-type]
        assert weight.std().item() == pytest.approx(spread, rel=0.03)
        assert bias.abs().max() == 0
    weight, bias = first_weights("default", 50, 400, seed=0)
    assert weight.abs().max().item() == pytest.approx(1 / 20, rel=0.01)
    assert 0 < bias.abs().max() <= 1 / 20
    again, _ = first_weights("default", 50, 400, seed=0)
    other, _ = first_weights("default", 50, 400, seed=1)
    assert torch.equal(weight, again)
    assert not torch.equal(weight, other)


def test_the_padded_crop_is_torchvisions_for_every_shift() -> None:
    from torchvision.transforms.v2 import functional as tv

    pad, side, mean, std = 2, 5, (0.4, 0.5), (0.2, 0.3)
    shifts = [(top, left) for top in range(2 * pad + 1) for left in range(2 * pad + 1)]
    images = torch.rand(len(shifts), 2, side, side, generator=torch.Generator().manual_seed(0))
    u = (np.array(shifts) + 0.999) / (2 * pad + 1)
    found = pad_crop(tv.normalize(images, list(mean), list(std)), pad, mean=mean, std=std, u=u)
    for image, (top, left), crop in zip(images, shifts, found):
        expected = tv.normalize(tv.crop(tv.pad(image, [pad]), top, left, side, side), list(mean), list(std))
        torch.testing.assert_close(crop, expected)


def test_augmented_training_sees_other_images_every_epoch_and_the_same_every_time() -> None:
    seen: list[torch.Tensor] = []

    class Watching(nn.Flatten):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images.clone())
            return super().forward(images)

    backbone = dataclasses.replace(flat(), module=Watching())
    data = Labelled(train=Halves(40, 0), test=Halves(20, 1))
    settings = Linear(
        epochs=2, batch_size=40, learning_rates=(0.1,), pad_crop=1, augment=Augmentation(size=4, flip=0.5, **WHOLE)
    )  # fmt: skip
    values = linear(backbone, data, settings)
    _, first, second = seen  # the test images, then an epoch each
    pixels = [np.sort(batch.reshape(40, -1).sum(1).numpy()) for batch in (first, second)]
    assert not np.allclose(pixels[0], pixels[1])
    seen.clear()
    assert linear(backbone, data, settings) == values
    assert torch.equal(seen[1], first)
    assert torch.equal(seen[2], second)


def test_augmented_and_cached_features_agree_where_nothing_varies() -> None:
    data = Labelled(train=Halves(120, 0), test=Halves(60, 1))
    settings = Linear(epochs=2, batch_size=30, learning_rates=(0.01,))
    still = dataclasses.replace(settings, augment=Augmentation(size=4, flip=0.0, **WHOLE))
    assert linear(flat(), data, still) == linear(flat(), data, settings)


def test_labels_follow_the_image_that_stands_in_for_an_unreadable_one() -> None:
    class Holed(Halves):
        def read(self, i: int) -> np.ndarray:
            return b"no image" if i % 5 == 0 else super().read(i)  # type: ignore[return-value]

    broken = Holed(300, 0)
    assert broken.labels is not None
    broken.labels[::5] = (broken.labels[::5] + 1) % 4  # an unreadable image's label is wrong
    said: list[str] = []
    settings = Linear(epochs=8, batch_size=30, learning_rates=(1.0,))
    for augment in (None, Augmentation(size=4, flip=0.0, **WHOLE)):
        data = Labelled(train=broken, test=Halves(100, 1), say=said.append)
        assert linear(flat(), data, dataclasses.replace(settings, augment=augment))["last"] == 100
    assert all("60 of 300 images do not decode" in text for text in said)
    assert said


def test_without_a_test_split_a_fifth_is_held_out_and_said() -> None:
    said: list[str] = []
    values = linear(
        flat(), Labelled(train=Halves(200, 0), say=said.append), Linear(epochs=8, batch_size=20, learning_rates=(1.0,))
    )
    assert values["last"] == 100
    assert ["held out" in text for text in said] == [True]


def test_a_small_set_is_one_batch_and_said() -> None:
    said: list[str] = []
    data = Labelled(train=Halves(30, 0), test=Halves(30, 1), say=said.append)
    for augment in (None, Augmentation(size=4, **WHOLE)):
        said.clear()
        linear(flat(), data, Linear(epochs=1, augment=augment))
        assert said == ["batch_size is 256; there are 30 training images, so a batch is all of them."]


def test_the_last_batch_is_kept_where_it_is_asked_for() -> None:
    data = Labelled(train=Halves(50, 0), test=Halves(30, 1))
    short = Linear(epochs=1, batch_size=49, learning_rates=(0.01,))
    counted = []

    class Counting(Classifier):
        def step(self, x: torch.Tensor, target: torch.Tensor, rate: float, *, whole: int | None = None) -> torch.Tensor:
            counted.append(len(x))
            return super().step(x, target, rate, whole=whole)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kinfold.evaluate.linear.Classifier", Counting)
        linear(flat(), data, short)
        linear(flat(), data, dataclasses.replace(short, drop_last=False))
    assert counted == [49, 49, 1]


def test_measuring_before_each_epoch_sees_one_epoch_less() -> None:
    data = Labelled(train=Halves(120, 0), test=Halves(60, 1))
    settings = Linear(epochs=4, batch_size=20, learning_rates=(0.003,), schedule=Steps(milestones=(100,)))
    before = linear(flat(), data, dataclasses.replace(settings, measured="before"))
    after = linear(flat(), data, dataclasses.replace(settings, epochs=3))
    assert before["last"] == after["last"]
    assert before["best"] == after["best"]
    assert before["best_epoch/lr=0.003"] == after["best_epoch/lr=0.003"]
    # The first measurement is of the first weights: an epoch of none.
    turned = Halves(60, 1)
    assert turned.labels is not None
    turned.labels = (turned.labels + 1) % 4
    worse = Labelled(train=Halves(120, 0), test=turned)
    assert linear(flat(), worse, dataclasses.replace(settings, measured="before"))["best_epoch/lr=0.003"] == 0


def test_outputs_without_a_class_are_never_right_and_said() -> None:
    said: list[str] = []
    data = Labelled(train=Halves(200, 0), test=Halves(60, 1), say=said.append)
    settings = Linear(epochs=10, batch_size=20, learning_rates=(1.0,), classes=10)
    assert linear(flat(), data, settings)["last"] == 100
    assert said == ["The classifier has 10 outputs for 4 classes, as classes says."]
    with pytest.raises(UserError, match="classes is 3, but the images have 4 classes"):
        linear(flat(), data, dataclasses.replace(settings, classes=3))


def test_features_in_a_map_of_a_file_are_read_batch_by_batch(tmp_path: Path) -> None:
    class Rows(torch.Tensor):
        """Features that tell how many of them are taken at once."""

        taken: ClassVar[list[int]] = []

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            found = super().__torch_function__(function, types, args, kwargs or {})
            if function is torch.Tensor.__getitem__:
                cls.taken.append(len(found))
                return found.as_subclass(torch.Tensor)
            return found

    np.save(tmp_path / "features.npy", np.random.default_rng(0).normal(size=(1000, 3)).astype(np.float32))
    x = torch.from_numpy(np.load(tmp_path / "features.npy", mmap_mode="c"))  # [1000, 3]
    y = torch.arange(1000) % 2
    device = torch.device("cpu")
    mapped = Cached(x.as_subclass(Rows), y, batch=64, seed=0, drop_last=False, device=device)
    held = Cached(x.clone(), y, batch=64, seed=0, drop_last=False, device=device)
    for share, other in zip(mapped.epoch(3, 2), held.epoch(3, 2), strict=True):
        assert torch.equal(share.x, other.x)
        assert torch.equal(share.y, other.y)
    assert Rows.taken == [64] * 13 + [40]
    Rows.taken.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kinfold.evaluate.linear.batches._ASKED_ROWS", 300)
        assert torch.equal(torch.cat([some for some, _ in Kept(x.as_subclass(Rows), y, device=device).blocks()]), x)
    assert Rows.taken == [300, 300, 300, 100]


def test_the_backbone_is_the_same_after_as_before_to_the_bit() -> None:
    module = build_backbone(Backbone(name="resnet10_w8", stem="small"), 1).train()
    backbone = FrozenBackbone(module=module, size=8, channels=1, mean=(0.3,), std=(0.38,))
    before, random = hash_of(module), torch.get_rng_state()
    some = Subset(open_source("digits"), np.arange(100))
    for augment in (None, Augmentation(size=8, flip=0.0)):
        linear(backbone, Labelled(train=some, test=some), Linear(epochs=1, batch_size=50, augment=augment))
        assert hash_of(module) == before
        assert all(child.training for child in module.modules())
        assert all(parameter.grad is None for parameter in module.parameters())
        assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("learning_rates=[]", "learning_rates"),
        ("learning_rates=[-1]", "learning_rates"),
        ("pad_crop=4", "pad_crop"),
        ("test_resize=100", "test_resize"),
        ("schedule={name: stepss}", "schedule"),
        ("epoch=3", "Did you mean epochs"),
        ("blocks=[12, 6, 4]", "blocks"),
        ("batch_norm=on", "batch_norm"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(word: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_protocol("linear", "moco-imagenet", [word])


def test_a_size_takes_the_place_of_the_recipes(tmp_path: object) -> None:
    module = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    backbone = FrozenBackbone(module=module, size=8, channels=1, mean=(0.3,), std=(0.38,))
    result = evaluate(
        "linear", backbone, "digits", recipe="moco-imagenet", overrides=["epochs=1"], size=8, limit=100, device="cpu",
        out=tmp_path, say=lambda text: None,
    )  # type: ignore[arg-type]  # fmt: skip
    settings = result["settings"]
    assert (settings["augment"]["size"], settings["test_size"], settings["test_resize"]) == (8, 8, 9)
    assert settings["schedule"] == {"name": "steps", "milestones": [60, 80], "factor": 0.1}


@pytest.mark.parametrize("protocol", ["linear", "fine-tune", "semi-supervised", "voc-svm", "voc-logistic", "transfer"])
def test_sizes_that_are_asked_for_take_the_place_of_every_recipes(protocol: str) -> None:
    settings = load_protocol(protocol, overrides=["test_size=224", "test_resize=256"])
    for size, resize, own in ((112, None, (112, 128)), (112, 120, (112, 120)), (None, 300, (224, 300))):
        changed = _at_size(settings, size, resize)
        assert (changed.test_size, changed.test_resize) == own
    with pytest.raises(UserError, match="resize is 100, smaller than the images' size 112"):
        _at_size(settings, 112, 100)
    with pytest.raises(UserError, match="size is 0; it is a number of pixels"):
        _at_size(settings, 0, None)
    without = load_protocol(protocol, overrides=["test_size=null", "test_resize=null"])
    assert _at_size(without, None, 300) == without
