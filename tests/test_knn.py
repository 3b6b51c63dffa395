# SPDX-License-Identifier: Apache-2.0
"""Weighted k-NN: golden numbers, a double loop written from the formula, and the promises of every protocol."""

from __future__ import annotations

import io
import json
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kinfold.data.sources import Subset, open_source
from kinfold.encoders import Backbone, Encoder, Head, build_backbone, build_head
from kinfold.errors import UserError
from kinfold.evaluate import KNN, FrozenBackbone, Labelled, evaluate, load_protocol
from kinfold.evaluate.features import extract, frozen, hash_of, load_backbone, resize_for
from kinfold.evaluate.knn import accuracies, knn, knn_scores, nearest, rank
from kinfold.evaluate.labelled import labels_of, open_labelled
from kinfold.evaluate.protocol import Request

GOLDEN = Path(__file__).parent / "golden" / "moco_knn_predict.npz"


class Arrays:
    """A source in memory."""

    def __init__(
        self, images: list[np.ndarray | bytes], labels: list[int] | None, classes: tuple[str, ...] | None = None
    ) -> None:
        self.images = images
        self.labels = None if labels is None else np.array(labels, np.int64)
        self.classes = classes
        self.fingerprint = f"{len(images)}-{labels}"
        self.description = f"{len(images)} arrays"

    def __len__(self) -> int:
        return len(self.images)

    def read(self, i: int) -> bytes | np.ndarray:
        return self.images[i]

    def name(self, i: int) -> str:
        return f"array {i}"


def loop_scores(
    queries: Tensor, bank: Tensor, labels: Tensor, k: int, temperature: float, classes: int, exclude_self: bool
) -> np.ndarray:
    """The formula, one number at a time."""
    scores = np.zeros((len(queries), classes))
    for q, query in enumerate(queries.double()):
        found = []
        for n, key in enumerate(bank.double()):
            if not (exclude_self and n == q):
                found.append((float(query @ key / (query.norm() * key.norm())), int(labels[n])))
        for similarity, label in sorted(found, reverse=True)[:k]:
            scores[q, label] += math.exp(similarity / temperature)
    return scores


@pytest.fixture(scope="module")
def backbone() -> FrozenBackbone:
    torch.manual_seed(0)
    module = build_backbone(Backbone(name="resnet10_w8", stem="small"), 1)
    module.train()
    return FrozenBackbone(module=module, size=8, channels=1, mean=(0.3,), std=(0.38,), description="a small one")


def test_scores_and_ranks_are_those_of_the_moco_notebook() -> None:
    golden = np.load(GOLDEN)
    scores = knn_scores(
        torch.from_numpy(golden["feature"]),
        torch.from_numpy(golden["bank"]).T,
        torch.from_numpy(golden["labels"]),
        k=int(golden["k"]),
        temperature=float(golden["t"]),
        classes=5,
    )
    np.testing.assert_allclose(scores.numpy(), golden["scores_independent"], rtol=1e-9)
    np.testing.assert_array_equal(rank(scores).numpy(), golden["pred"])


@pytest.mark.parametrize("exclude_self", [False, True])
def test_scores_are_those_of_the_double_loop(exclude_self: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    bank = torch.randn(23, 6, generator=generator, dtype=torch.float64) * 3
    queries = bank if exclude_self else torch.randn(9, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (23,), generator=generator)
    scores = knn_scores(queries, bank, labels, k=7, temperature=0.2, classes=4, exclude_self=exclude_self, block=4)
    expected = loop_scores(queries, bank, labels, 7, 0.2, 4, exclude_self)
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize(("block", "bank_block"), [(1, 1), (3, 2), (4, 5), (100, 7), (5, 100)])
@pytest.mark.parametrize("exclude_self", [False, True])
def test_blocks_of_any_size_find_the_same_neighbours(block: int, bank_block: int, exclude_self: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    bank = torch.randn(17, 5, generator=generator, dtype=torch.float64)
    unit = nn.functional.normalize(bank, dim=1)
    similarity = unit @ unit.T
    if exclude_self:
        similarity.fill_diagonal_(-torch.inf)
    expected = similarity.topk(6, dim=1)
    found = list(nearest(bank, bank, k=6, exclude_self=exclude_self, block=block, bank_block=bank_block))
    assert [part.rows.start for part in found] == list(range(0, 17, block))
    torch.testing.assert_close(torch.cat([part.similarity for part in found]), expected.values)
    assert torch.equal(torch.cat([part.places for part in found]), expected.indices)


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that is made, in memory of its own."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {one.untyped_storage().data_ptr() for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in given:
                self.numbers = max(self.numbers, made.numel())
        return result


@pytest.mark.parametrize("exclude_self", [False, True])
def test_a_larger_bank_takes_no_more_memory(exclude_self: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    block, rows, width, k = 64, 256, 8, 5
    for name, value in {"_ROOM": 16, "_CELLS": block * rows, "_NARROWEST": 1}.items():
        monkeypatch.setattr(f"kinfold.kernels.search.{name}", value)
    most = block * (rows + k + 1)  # similarities of a block of queries with a block of rows and what is known
    for count in (6_000, 24_000):
        bank = torch.randn(count, width)
        tracemalloc.start()  # what numpy holds
        try:
            with Largest() as made:
                found = list(nearest(bank[:80], bank, k=k, exclude_self=exclude_self, block=block, bank_block=rows))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert sum(len(near.places) for near in found) == 80
        assert 0 < made.numbers <= most
        assert peak < 16 * most
    assert 16 * most < count * width * 4 / 2


def test_rounds_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    bank, queries = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (17, 23))
    expected = list(nearest(queries, bank, k=6, block=3, bank_block=4))
    monkeypatch.setattr("kinfold.evaluate.knn._ROUND", 7)
    found = list(nearest(queries, bank, k=6, block=3, bank_block=4))
    assert [row for part in found for row in range(23)[part.rows]] == list(range(23))
    assert torch.equal(torch.cat([p.places for p in found]), torch.cat([p.places for p in expected]))
    torch.testing.assert_close(torch.cat([p.similarity for p in found]), torch.cat([p.similarity for p in expected]))


def test_of_equally_near_images_the_first_are_neighbours_and_nobody_is_its_own() -> None:
    bank = torch.ones(9, 3)
    (near,) = nearest(bank, bank, k=3, exclude_self=True, bank_block=2)
    first = [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
    assert near.places.tolist() == first + [[0, 1, 2]] * 5
    (near,) = nearest(bank, bank, k=3)
    assert near.places.tolist() == [[0, 1, 2]] * 9


def test_all_combinations_in_one_pass_are_those_of_one_at_a_time() -> None:
    generator = torch.Generator().manual_seed(3)
    bank = nn.functional.normalize(torch.randn(60, 5, generator=generator, dtype=torch.float64), dim=1)
    queries = nn.functional.normalize(torch.randn(40, 5, generator=generator, dtype=torch.float64), dim=1)
    labels, truth = torch.arange(60) % 7, torch.arange(40) % 7
    together = accuracies(queries, bank, labels, truth, neighbours=[3, 20], temperatures=(0.05, 1.0), classes=7)
    for k in (3, 20):
        for temperature in (0.05, 1.0):
            scores = knn_scores(queries, bank, labels, k=k, temperature=temperature, classes=7)
            order, voted = rank(scores), scores.gather(1, truth[:, None])[:, 0] > 0
            top1 = 100 * (order[:, 0] == truth).double().mean().item()
            top5 = 100 * ((order[:, :5] == truth[:, None]).any(1) & voted).double().mean().item()
            assert together[f"top1/k={k},T={temperature:g}"] == pytest.approx(top1)
            assert together[f"top5/k={k},T={temperature:g}"] == pytest.approx(top5)
    assert together["best"] == max(value for name, value in together.items() if name.startswith("top1"))


def test_a_low_temperature_neither_overflows_nor_forgets_the_order() -> None:
    bank = torch.eye(3)
    scores = knn_scores(bank, bank, torch.arange(3), k=3, temperature=0.002, classes=3)
    assert torch.isfinite(scores).all()
    assert torch.equal(scores.argmax(1), torch.arange(3))


def test_more_neighbours_than_images_is_refused_in_the_core_and_said_in_the_protocol(
    backbone: FrozenBackbone,
) -> None:
    with pytest.raises(ValueError, match="k is 3"):
        knn_scores(torch.eye(3), torch.eye(3), torch.arange(3), k=3, temperature=0.1, classes=3, exclude_self=True)
    said: list[str] = []
    small = Subset(open_source("digits"), np.arange(50))
    values = knn(backbone, Labelled(train=small, say=said.append), KNN(neighbours=(5, 200), temperatures=(0.1,)))
    assert set(values) >= {"top1/k=5,T=0.1", "top1/k=49,T=0.1", "top5/k=49,T=0.1", "best"}
    assert any("200 neighbours were asked for; there are 49" in text for text in said)
    assert any("leave-one-out" in text for text in said)


def test_digits_are_told_apart_far_above_chance(backbone: FrozenBackbone) -> None:
    data = Labelled(train=open_source("digits"), test=open_source("digits", split="test"), say=pytest.fail)
    values = knn(backbone, data, KNN(neighbours=(20,), temperatures=(0.07,)))
    assert 50 < values["top1/k=20,T=0.07"] <= 100
    assert values["top5/k=20,T=0.07"] >= values["top1/k=20,T=0.07"]


def test_leave_one_out_never_meets_itself() -> None:
    # Every image has a class of its own, so only an image that meets itself is right.
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 255, (4, 4, 1), dtype=np.uint8) for _ in range(12)]
    flat = FrozenBackbone(module=nn.Flatten(), size=4, channels=1, mean=(0.5,), std=(0.5,))
    unique = Arrays(images, list(range(12)))
    settings = KNN(neighbours=(1,), temperatures=(0.1,), leave_one_out=True)
    assert knn(flat, Labelled(train=unique), settings)["top1/k=1,T=0.1"] == 0
    twins = Arrays(images + images, list(range(12)) * 2)
    assert knn(flat, Labelled(train=twins), settings)["top1/k=1,T=0.1"] == 100


def test_the_backbone_is_the_same_after_as_before_to_the_bit(backbone: FrozenBackbone) -> None:
    module = backbone.module
    next(module.children()).eval()  # a mode that is mixed must come back mixed
    modes = [child.training for child in module.modules()]
    state = {name: value.clone() for name, value in module.state_dict().items()}
    before = hash_of(module)
    random = torch.get_rng_state()
    knn(backbone, Labelled(train=Subset(open_source("digits"), np.arange(80)), say=lambda text: None), KNN())
    assert [child.training for child in module.modules()] == modes
    assert any(modes)
    assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())
    assert hash_of(module) == before
    assert all(p.grad is None and p.requires_grad for p in module.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    with torch.no_grad():
        next(iter(module.parameters())).view(-1)[0].add_(1e-3)
    assert hash_of(module) != before


def test_modes_come_back_after_an_error() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
    model[1].eval()

    def fail() -> None:
        with frozen(model):
            assert not model[0].training
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        fail()
    assert model.training
    assert model[0].training
    assert not model[1].training


def test_an_image_that_does_not_decode_is_left_out_with_its_label_and_named() -> None:
    generator = np.random.default_rng(0)
    images: list[np.ndarray | bytes] = []
    labels = []
    for i in range(20):  # two classes: the left half is bright, or the right half
        image = generator.integers(0, 40, (4, 4, 1), dtype=np.uint8)
        image[:, slice(0, 2) if i % 2 else slice(2, 4)] += 200
        images.append(image)
        labels.append(i % 2)
    images.insert(3, b"no image")
    labels.insert(3, 1)
    said: list[str] = []
    flat = FrozenBackbone(module=nn.Flatten(), size=4, channels=1, mean=(0.5,), std=(0.5,))
    data = Labelled(train=Arrays(images, labels), say=said.append)
    values = knn(flat, data, KNN(neighbours=(3,), temperatures=(0.1,), leave_one_out=True))
    assert values == {"top1/k=3,T=0.1": 100.0, "best": 100.0}
    assert len(said) == 1
    assert "1 of 21 images do not decode" in said[0]
    assert "array 3 (" in said[0]


def test_features_that_are_not_finite_are_refused_and_named() -> None:
    broken = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    nn.init.constant_(broken[1].weight, float("nan"))
    with pytest.raises(UserError, match="not finite, first for array 0"):
        extract(
            broken,
            Arrays([np.zeros((4, 4, 1), np.uint8)] * 3, None),
            size=4, resize=None, channels=1, mean=(0.5,), std=(0.5,),
        )  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_features_are_the_backbones_own_in_order(backbone: FrozenBackbone, workers: int) -> None:
    source = Subset(open_source("digits"), np.arange(40))
    features, positions = extract(
        backbone.module, source, size=8, resize=None, channels=1, mean=(0.3,), std=(0.38,), batch_size=16,
        workers=workers, normalise=True,
    )  # fmt: skip
    images = torch.stack([torch.from_numpy(np.asarray(source.read(i))) for i in range(40)]).permute(0, 3, 1, 2)
    with frozen(backbone.module):
        expected = nn.functional.normalize(backbone.module((images / 255 - 0.3) / 0.38), dim=1)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert positions.tolist() == list(range(40))


def test_the_short_side_is_chosen_by_the_images() -> None:
    square = Arrays([b"broken", np.zeros((32, 32, 3), np.uint8)], None)
    assert resize_for(square, 32) is None
    assert resize_for(square, 28) == 32
    assert resize_for(square, 28, 30) == 30
    wide = Arrays([np.zeros((32, 32, 3), np.uint8), np.zeros((32, 40, 3), np.uint8)], None)
    assert resize_for(wide, 32) == 37


def test_missing_labels_say_how_to_give_them() -> None:
    images: list[np.ndarray | bytes] = [np.zeros((4, 4, 1), np.uint8)] * 4
    with pytest.raises(UserError, match=r"folder of its own.*label column"):
        labels_of(Arrays(images, None), None)
    with pytest.raises(UserError, match="2 of 4 images have no label"):
        labels_of(Arrays(images, [0, -1, 1, -1]), None)
    with pytest.raises(UserError, match="same label"):
        labels_of(Arrays(images, [3, 3, 3, 3]), None)


def test_classes_of_two_sets_are_matched_by_name() -> None:
    images: list[np.ndarray | bytes] = [np.zeros((4, 4, 1), np.uint8)] * 3
    train = Arrays(images, [0, 1, 2], ("ant", "bee", "cat"))
    _, asked, classes = labels_of(train, Arrays(images[:2], [0, 1], ("bee", "cat")))
    assert asked.tolist() == [1, 2]
    assert classes == 3
    with pytest.raises(UserError, match="lack: dog"):
        labels_of(train, Arrays(images[:2], [0, 1], ("bee", "dog")))


def test_labels_may_be_any_numbers_and_unseen_ones_are_said() -> None:
    images: list[np.ndarray | bytes] = [np.zeros((4, 4, 1), np.uint8)] * 3
    said: list[str] = []
    first, second, classes = labels_of(
        Arrays(images, [1990, 2020, 1990]), Arrays(images, [2020, 2005, 1990]), say=said.append
    )
    assert (first.tolist(), second.tolist(), classes) == ([0, 2, 0], [2, 1, 0], 3)
    assert len(said) == 1
    assert "Of 1 classes there is no training image" in said[0]


def test_the_head_is_measured_as_unit_vectors_and_missed_with_a_message(backbone: FrozenBackbone) -> None:
    with pytest.raises(UserError, match="features=backbone"):
        backbone.network("head")
    head = build_head(Head(hidden=(16,), out=4), int(backbone.module.num_features))  # type: ignore[arg-type]
    with_head = FrozenBackbone(module=backbone.module, head=head, size=8, channels=1, mean=(0.3,), std=(0.38,))
    images = torch.randn(5, 1, 8, 8)
    with frozen(backbone.module), torch.no_grad():
        found = with_head.network("head").eval()(images)
        torch.testing.assert_close(found, Encoder(backbone.module, head)(images))
        torch.testing.assert_close(found.norm(dim=1), torch.ones(5))


def test_a_result_says_what_it_is_a_result_of(backbone: FrozenBackbone, tmp_path: Path) -> None:
    result = evaluate(
        "knn", backbone, "digits", overrides=["neighbours=[5]", "temperatures=[0.1]"], out=tmp_path, limit=200,
        device="cpu", say=lambda text: None,
    )  # fmt: skip
    stored = json.loads(Path(result["file"]).read_text())
    assert stored["values"] == result["values"]
    assert list(tmp_path.iterdir()) == [Path(result["file"])]
    assert stored["settings"] == {
        "neighbours": [5], "temperatures": [0.1], "features": "backbone", "leave_one_out": False
    }  # fmt: skip
    assert stored["backbone"]["weights_sha256"] == hash_of(backbone.module)
    assert stored["data"]["train"]["images"] == 200
    assert stored["data"]["train"]["fingerprint"] == open_source("digits", limit=200).fingerprint
    assert stored["data"]["test"]["images"] == 200
    assert {"kinfold", "torch", "python"} <= set(stored["versions"])
    again = evaluate(
        "knn", backbone, "digits", overrides=["neighbours=[5]", "temperatures=[0.1]"], out=tmp_path, limit=200,
        device="cpu", say=lambda text: None,
    )  # fmt: skip
    assert again["file"] == result["file"]
    assert again["values"] == result["values"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_protocol("knnn"), "no protocol 'knnn'"),
        (lambda: load_protocol("knn", "moco-notebok"), "moco-notebook"),
        (lambda: load_protocol("knn", overrides=["neighbors=[5]"]), "Did you mean neighbours"),
        (lambda: load_protocol("knn", overrides=["neighbours=5"]), "neighbours"),
        (lambda: load_protocol("knn", overrides=["temperatures=[0]"]), "temperatures"),
        (lambda: load_protocol("knn", overrides=["neighbours"]), "key=value"),
        (lambda: load_backbone("no/such/thing"), "names no backbone"),
        (lambda: load_backbone("torchvision:resnet17"), "resnet18"),
        (lambda: load_backbone("timm:resnet17x"), "no model 'resnet17x'"),
    ],
)
def test_a_wrong_name_is_refused_with_the_right_one(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no recipe\.yaml"):
        load_backbone(str(tmp_path))


def test_a_temperature_that_is_given_twice_counts_once() -> None:
    bank, labels = torch.eye(6), torch.arange(6) // 2
    words: dict[str, Any] = {"neighbours": [2], "classes": 3, "exclude_self": True}
    once = accuracies(bank, bank, labels, labels, temperatures=(0.1,), **words)
    assert accuracies(bank, bank, labels, labels, temperatures=(0.1, 0.1), **words) == once


def test_a_test_set_with_the_names_of_the_training_set_is_another_set(tmp_path: Path) -> None:
    for part in ("learn", "ask"):
        for name in ("ant", "bee"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.fromarray(np.full((8, 8), len(part), np.uint8)).save(tmp_path / part / name / "0.png")
    learn, ask = str(tmp_path / "learn"), str(tmp_path / "ask")
    said: list[str] = []
    opened = open_labelled(Request(learn, test_data=ask), KNN(), {"say": said.append})
    assert opened.test is not None
    assert opened.test.description.startswith(f"2 images in {ask}")
    assert not said
    assert open_labelled(Request(learn, test_data=learn), KNN(), {"say": said.append}).test is None


def test_where_all_splits_are_learned_from_none_of_them_asks() -> None:
    opened = open_labelled(Request("digits", train_split="all"), KNN(), {"say": lambda text: None})
    assert (len(opened.train), opened.test) == (1797, None)


def test_a_class_without_a_vote_is_not_among_the_first_five() -> None:
    bank, labels = torch.eye(6), torch.arange(6)
    truth = (labels + 1) % 6  # everyone is wrong: the nearest, oneself, has another class
    values = accuracies(bank, bank, labels, truth, neighbours=[1], temperatures=(0.1,), classes=6)
    assert values == {"top1/k=1,T=0.1": 0.0, "top5/k=1,T=0.1": 0.0, "best": 0.0}


def test_a_test_split_that_cannot_be_read_is_not_taken_for_none(tmp_path: Path) -> None:
    image = io.BytesIO()
    Image.new("L", (8, 8)).save(image, "png")
    rows = Dataset.from_dict({"image": [{"bytes": image.getvalue()}] * 2, "label": [0, 1]})
    for split in ("train", "test"):
        rows.to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    whole = open_labelled(Request(str(tmp_path)), KNN(), {"say": lambda text: None})
    assert whole.test is not None
    broken = tmp_path / "test-00000-of-00001.parquet"
    broken.write_bytes(broken.read_bytes()[:-20])
    with pytest.raises(UserError, match="cannot be read as parquet"):
        open_labelled(Request(str(tmp_path)), KNN(), {"say": lambda text: None})
    broken.unlink()
    assert open_labelled(Request(str(tmp_path)), KNN(), {"say": lambda text: None}).test is None
