# SPDX-License-Identifier: Apache-2.0
"""Every recipe loads, says where it comes from, and takes two real steps; published numbers stay what they are."""

from __future__ import annotations

import gzip
import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kinfold.evaluate.knn import KNN
from kinfold.evaluate.linear import Linear, Steps
from kinfold.memory import BankMemory, QueueMemory
from kinfold.optim import build_optimizer, key_momentum, learning_rate
from kinfold.reading import parse, plain, read_yaml
from kinfold.recipe import RECIPES, Recipe, load, recipe_names
from kinfold.training import build_learner

RUN = {"data": "digits", "out": "unused"}
SET = 40
"""images in the toy set"""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe_of(name: str, *overrides: str) -> Recipe:
    return load(name, overrides, run=RUN)[0]


def toy(name: str) -> Recipe:
    """The recipe `name` with everything that costs time made small, and nothing else changed."""
    full = recipe_of(name)
    words = ["backbone.name=resnet10_w8", "views.augment.*.size=16", "batch_size=16", "head.out=16"]
    words.append(f"head.hidden={[16] * len(full.head.hidden)}")
    if full.predictor is not None:
        words += ["predictor.out=16", f"predictor.hidden={[16] * len(full.predictor.hidden)}"]
    if isinstance(full.memory, QueueMemory):
        words.append("memory.size=48")
    if isinstance(full.memory, BankMemory):
        words.append("memory.nearest=24")
    return recipe_of(name, *words)


def value_at(values: Any, path: str) -> Any:
    """The entry of plain values with a dotted name."""
    for part in path.split("."):
        values = values[int(part)] if isinstance(values, list) else values[part]
    return values


def header(path: Path) -> str:
    """The comment lines at the top of a recipe, as one line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(line.removeprefix("#").strip() for line in lines[:first])


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_takes_two_steps_at_toy_width(name: str) -> None:
    recipe = toy(name)
    learner = build_learner(recipe, images=SET)
    learner.train()
    optimizer = build_optimizer(recipe.optimizer, learner.encoder)
    weights = {n: p.detach().clone() for n, p in learner.encoder.named_parameters()}
    remembered = {n: b.clone() for n, b in learner.memory.named_buffers()}
    randomness = torch.Generator().manual_seed(0)
    # The second step is in the last epoch, where every term of every method acts.
    for step, epoch in enumerate((0, recipe.epochs - 1)):
        views = [
            torch.randn(16, recipe.images.channels, v.size, v.size, generator=randomness) for v in recipe.views.augment
        ]  # each [B, C, S, S]
        index = torch.randperm(SET, generator=randomness)[:16]  # [B]
        losses, memos = learner(views, index, epoch)
        loss = torch.stack(list(losses.values())).sum()
        assert math.isfinite(loss.item()), losses
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                recipe.learning_rate,
                step=step,
                steps_per_epoch=2,
                epochs=recipe.epochs,
                batch_size=recipe.batch_size,
            )
        unreached = [n for n, p in learner.encoder.named_parameters() if p.grad is None]
        assert not unreached
        optimizer.step()
        optimizer.zero_grad()
        learner.advance([memos], momentum=key_momentum(recipe.key_momentum, step=step, steps=100))
    moved = [n for n, p in learner.encoder.named_parameters() if not torch.equal(p, weights[n])]
    # LARS steps of the toy batch are so short that some weights of a layer round back, but not all of any layer's.
    assert any(n.startswith("backbone.conv1") for n in moved)
    assert any(n.startswith("head.") for n in moved)
    assert all(torch.isfinite(p).all() for p in learner.parameters())
    assert any(not torch.equal(b, remembered[n]) for n, b in learner.memory.named_buffers())
    assert int(learner.step) == 2


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_says_where_it_comes_from(name: str) -> None:
    text = header(RECIPES / f"{name}.yaml")
    assert "Settings:" in text
    assert "Claim" in text
    assert "Reproduced here:" in text
    assert any(tag in text for tag in ("verified", "recalled", "inferred")), "where do the numbers come from?"


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_needs_no_other_file(name: str) -> None:
    values = read_yaml((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"), source=name)
    needed = {"method", "memory", "views", "images", "backbone", "head", "batch_norm", "optimizer", "learning_rate"}
    needed |= {"batch_size", "epochs", "precision", "seed"}
    if values["memory"]["name"] != "bank":
        needed.add("key_momentum")
    assert needed <= values.keys()
    # Of these every setting that the method has is written out.
    assert plain(recipe_of(name))["method"].keys() == values["method"].keys()


@pytest.mark.parametrize("name", recipe_names())
def test_the_table_of_recipes_has_every_recipe(name: str) -> None:
    table = Path(__file__).parents[1] / "docs" / "recipes.md"
    rows = [line for line in table.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{name}` |")]
    assert len(rows) == 1


def test_the_table_of_recipes_has_no_recipe_that_is_gone() -> None:
    table = Path(__file__).parents[1] / "docs" / "recipes.md"
    named = {line.split("`")[1] for line in table.read_text(encoding="utf-8").splitlines() if line.startswith("| `")}
    files = {path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml")}
    assert named == files


PUBLISHED: list[tuple[str, str, Any]] = [
    ("moco/imagenet-v1", "method.temperature", 0.07),
    ("moco/imagenet-v1", "memory.size", 65536),
    ("moco/imagenet-v1", "learning_rate.milestones", [120, 160]),
    ("moco/imagenet-v1", "head.hidden", []),
    ("moco/imagenet-v1", "views.augment.0.jitter", [0.4, 0.4, 0.4, 0.4]),
    ("moco/imagenet-v1", "views.augment.1.grey_first", True),
    ("moco/imagenet-v2", "method.temperature", 0.2),
    ("moco/imagenet-v2", "key_momentum.start", 0.999),
    ("moco/imagenet-v2", "head.hidden", [2048]),
    ("moco/imagenet-v2", "views.augment.1.blur", 0.5),
    ("moco/imagenet-v2-800", "epochs", 800),
    ("moco/cifar10-notebook-asymmetric", "views.augment.0.scale", [0.08, 1.0]),
    ("moco/cifar10-notebook-asymmetric", "views.augment.0.blur", 0.0),
    ("moco/cifar10-notebook-asymmetric", "key_momentum.start", 0.99),
    ("moco/cifar10-notebook-symmetric", "views.combine", "sum"),
    ("moco/cifar10-notebook-symmetric", "views.pairs", [[0, 1], [1, 0]]),
    ("moco/cifar10-notebook-symmetric", "batch_norm.query_splits", 8),
    ("moco/cifar10-notebook-symmetric", "batch_norm.key_splits", 8),
    ("ressl/imagenet", "memory.size", 131072),
    ("ressl/imagenet", "method.target_temperature", 0.04),
    ("ressl/imagenet", "head.out", 512),
    ("ressl/imagenet", "optimizer.decay_all", False),
    ("co2/imagenet-moco-v1", "method.consistency_weight", 10.0),
    ("co2/imagenet-moco-v1", "method.consistency_temperature", 0.04),
    ("co2/imagenet-moco-v2", "method.consistency_weight", 0.3),
    ("co2/imagenet-moco-v2", "method.consistency_temperature", 0.05),
    ("sce/cifar10", "method.target_temperature", 0.05),
    ("sce/cifar10", "batch_norm.query_splits", 1),
    ("sce/cifar10", "batch_norm.key_splits", 8),
    ("sce/imagenet-100", "method.target_temperature", 0.07),
    ("sce/imagenet-100", "views.augment.0.jitter", [0.4, 0.4, 0.2, 0.1]),
    ("sce/imagenet-100", "key_momentum.end", 1.0),
    ("sce/imagenet-1000", "optimizer.weight_decay", 1.5e-6),
    ("sce/imagenet-300", "optimizer.weight_decay", 1e-6),
    ("sce/imagenet-multi-crop", "head.hidden", [4096, 4096]),
    ("sce/imagenet-multi-crop", "views.augment.5.size", 96),
    ("invp/imagenet-mlp", "method.positives", 50),
    ("invp/imagenet-mlp", "method.temperature", 0.2),
    ("invp/imagenet-mlp", "optimizer.weight_decay", 1e-4),
    ("invp/imagenet-mlp", "head.init", "xavier"),
    ("invp/imagenet-linear", "method.temperature", 0.07),
    ("invp/cifar10", "method.positives", 20),
    ("invp/cifar10", "views.augment.0.flip", 0.0),
    ("invp/cifar10", "drop_last", False),
    ("invp/cifar100", "memory.steps", 4),
    ("invp/svhn", "images.mean", [0.4914, 0.4822, 0.4465]),
]


@pytest.mark.parametrize(("name", "path", "value"), PUBLISHED)
def test_a_published_number_stands_in_its_recipe(name: str, path: str, value: Any) -> None:
    assert value_at(plain(recipe_of(name)), path) == value


PEAKS = [
    ("moco/imagenet-v2", 0.03),
    ("moco/cifar10-notebook-asymmetric", 0.06),
    ("ressl/imagenet", 0.05),
    ("sce/cifar10", 0.06),
    ("sce/imagenet-100", 9.6),
    ("sce/imagenet-200", 4.8),
    ("sce/imagenet-1000", 4.8),
    ("co2/imagenet-moco-v1", 0.03),
]


@pytest.mark.parametrize(("name", "peak"), PEAKS)
def test_the_learning_rate_rises_to_the_published_one(name: str, peak: float) -> None:
    recipe, steps = recipe_of(name), 7
    rates = [
        learning_rate(
            recipe.learning_rate,
            step=step,
            steps_per_epoch=steps,
            epochs=recipe.epochs,
            batch_size=recipe.batch_size,
        )
        for step in range(recipe.epochs * steps)
    ]
    assert max(rates) == pytest.approx(peak, rel=1e-12)
    assert rates[-1] < 0.011 * peak


def test_invp_runs_epochs_1_to_799_of_800() -> None:
    recipe = recipe_of("invp/cifar10")
    rates = [
        learning_rate(
            recipe.learning_rate, step=e, steps_per_epoch=1, epochs=recipe.epochs, batch_size=recipe.batch_size
        )
        for e in range(recipe.epochs)
    ]
    expected = [0.015 * (1 + math.cos(math.pi * e / 800)) for e in range(1, 800)]
    assert rates == pytest.approx(expected, abs=1e-12)


def test_in_multi_crop_every_view_asks_each_large_one_but_itself() -> None:
    views = recipe_of("sce/imagenet-multi-crop").views
    expected = {(asks, answers) for answers in (0, 1) for asks in range(6) if asks != answers}
    assert len(views.pairs) == 10
    assert set(views.pairs) == expected
    assert views.combine == "mean"


def test_the_names_are_listed_without_those_of_evaluation() -> None:
    names = recipe_names()
    assert {"own-images", "digits", "invp/digits", "sce/cifar10", "moco/imagenet-v2"} <= set(names)
    assert not [name for name in names if name.startswith("evaluate")]


def test_the_default_recipe_is_the_one_for_own_images() -> None:
    assert load(run=RUN)[0] == recipe_of("own-images")


def test_own_images_takes_several_steps_an_epoch_in_a_folder_of_a_few_hundred() -> None:
    recipe = recipe_of("own-images")
    assert 300 // recipe.batch_size >= 4
    assert recipe.batch_size % recipe.batch_norm.key_splits == 0


@pytest.mark.parametrize("name", ["digits", "invp/digits"])
def test_digits_are_never_mirrored(name: str) -> None:
    assert all(view.flip == 0.0 for view in recipe_of(name).views.augment)


@pytest.mark.parametrize("name", ["digits", "invp/digits"])
def test_the_statistics_of_the_digits_are_those_of_the_set(name: str) -> None:
    # Read from scikit-learn's file, because importing all of scikit-learn takes longer than the other tests here.
    package = importlib.util.find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    with gzip.open(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", "rt") as lines:
        pixels = np.loadtxt(lines, delimiter=",")[:, :-1] / 16.0  # [N, 64]
    images = recipe_of(name).images
    assert images.mean[0] == pytest.approx(pixels.mean(), abs=1e-3)
    assert images.std[0] == pytest.approx(pixels.std(), abs=1e-3)


PROTOCOLS: dict[str, type[KNN] | type[Linear]] = {"knn": KNN, "linear": Linear}
VARIANTS = sorted(f"{kind}/{path.stem}" for kind in PROTOCOLS for path in (RECIPES / "evaluate" / kind).glob("*.yaml"))


def variant(name: str) -> Any:
    """The settings of an evaluation recipe such as `linear/sce-cifar10`."""
    text = (RECIPES / "evaluate" / f"{name}.yaml").read_text(encoding="utf-8")
    return parse(PROTOCOLS[name.split("/")[0]], read_yaml(text, source=name), source=name)


@pytest.mark.parametrize("name", VARIANTS)
def test_an_evaluation_recipe_is_complete_and_its_protocol_accepts_it(name: str) -> None:
    text = (RECIPES / "evaluate" / f"{name}.yaml").read_text(encoding="utf-8")
    assert read_yaml(text, source=name).keys() == plain(variant(name)).keys()
    assert "verified" in header(RECIPES / "evaluate" / f"{name}.yaml") or name.endswith("/default")


def test_evaluation_has_the_published_variants() -> None:
    assert {"knn/moco-notebook", "knn/invp", "linear/moco-imagenet", "linear/sce-imagenet"} <= set(VARIANTS)
    assert {"linear/sce-cifar10", "linear/ressl-imagenet", "linear/invp-cifar10", "linear/invp-svhn"} <= set(VARIANTS)
    assert {"linear/sce-imagenet-moco", "linear/invp-imagenet"} <= set(VARIANTS)


def test_the_k_nn_variants_have_the_published_neighbours_and_temperatures() -> None:
    assert variant("knn/moco-notebook") == KNN(neighbours=(200,), temperatures=(0.1,), features="head")
    assert variant("knn/invp") == KNN(neighbours=(200,), temperatures=(0.07,), features="head")


def test_the_linear_protocol_of_sce_on_imagenet_learns_at_four_tenths() -> None:
    how = variant("linear/sce-imagenet")
    assert how.learning_rates[0] * how.batch_size / how.base_batch == pytest.approx(0.4)
    assert (how.epochs, how.weight_decay, how.schedule.name) == (90, 0.0, "cosine")


def test_the_linear_protocol_of_invp_on_imagenet_learns_at_one_for_120_epochs() -> None:
    how = variant("linear/invp-imagenet")
    assert (how.learning_rates, how.base_batch, how.batch_size, how.epochs) == ((1.0,), None, 256, 120)
    assert how.schedule == Steps(milestones=(50, 80, 100), factor=0.1)
    assert "Differs" in header(RECIPES / "evaluate" / "linear" / "invp-imagenet.yaml")


@pytest.mark.parametrize(
    ("name", "schedule", "pad", "flip"),
    [
        ("linear/moco-imagenet", Steps(milestones=(60, 80), factor=0.1), None, 0.5),
        ("linear/sce-imagenet-moco", Steps(milestones=(60, 80), factor=0.1), None, 0.5),
        ("linear/sce-cifar10", Steps(milestones=(60, 80), factor=0.1), 4, 0.5),
        ("linear/invp-cifar10", Steps(milestones=(40, 60, 80), factor=0.2), None, 0.5),
        ("linear/invp-svhn", Steps(milestones=(40, 60, 80), factor=0.2), None, 0.0),
    ],
)
def test_the_linear_protocols_with_rate_30_are_told_apart(
    name: str, schedule: Steps, pad: int | None, flip: float
) -> None:
    how = variant(name)
    assert how.learning_rates == (30.0,)
    assert how.base_batch is None
    assert (how.schedule, how.pad_crop, how.augment.flip) == (schedule, pad, flip)
