# SPDX-License-Identifier: Apache-2.0
"""A step of InvP at the bank's scale: one search serves all, and the gradient touches only the columns used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kinfold import bank
from kinfold.encoders import Encoder
from kinfold.kernels.search import Found, nearest_rows
from kinfold.learner import Learner
from kinfold.memory import Bank, BankMemory
from kinfold.methods import InvP
from kinfold.views import Augmentation, Views

BATCH, DIMENSION, NEAREST = 16, 6, 24


def learner_of(images: int, *, sets: bool = False) -> Learner:
    """A learner of InvP with a linear encoder, and a bank whose graph joins random images."""
    torch.manual_seed(2)
    made = Learner(
        method=InvP(positives=4, start_epoch=0, sets="paper" if sets else "code"),
        views=Views(augment=(Augmentation(size=2),), pairs=((0, None),)),
        encoder=Encoder(nn.Flatten(), nn.Linear(4, DIMENSION)),
        memory=Bank(images, DIMENSION, BankMemory(nearest=NEAREST, neighbours=3, steps=2, repeats=not sets)),
    )
    bank_of(made).neighbours.random_(0, images)
    return made


def bank_of(learner: Learner) -> Bank:
    assert isinstance(learner.memory, Bank)
    return learner.memory


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int, Found]]:
    """Every search from now on: queries, rows, how many were asked for, and what was found."""
    seen: list[tuple[int, int, int, Found]] = []

    def watched(queries: Tensor, rows: Tensor, count: int) -> Found:
        found = nearest_rows(queries, rows, count)
        seen.append((len(queries), len(rows), count, found))
        return found

    monkeypatch.setattr(bank, "nearest_rows", watched)
    return seen


@pytest.mark.parametrize("sets", [False, True], ids=["lists", "sets"])
def test_one_search_serves_the_loss_and_the_new_neighbours(
    sets: bool, searches: list[tuple[int, int, int, Found]]
) -> None:
    learner = learner_of(500, sets=sets)
    memory = bank_of(learner)
    for step in range(3):
        index = torch.arange(BATCH) + BATCH * step
        losses, memos = learner([torch.randn(BATCH, 1, 2, 2)], index, 0)
        sum(losses.values()).backward()
        learner.advance([memos], momentum=1.0)
        assert len(searches) == step + 1
        queries, rows, count, (_, found) = searches[-1]
        assert (queries, rows, count) == (BATCH, 500, NEAREST)
        # The three nearest; the fourth where the image itself is one of them.
        expected = [[row[3] if image == own else image for image in row[:3]] for own, row in zip(index.tolist(), found)]
        assert memory.neighbours[index].tolist() == torch.tensor(expected).tolist()


@pytest.mark.parametrize("sets", [False, True], ids=["lists", "sets"])
def test_keys_that_were_not_consulted_have_no_part_in_the_gradient(sets: bool) -> None:
    learner = learner_of(300, sets=sets)
    memory = bank_of(learner)
    images, index = torch.randn(BATCH, 1, 2, 2), torch.arange(BATCH) * 7
    weight = learner.encoder.head.weight
    assert isinstance(weight, nn.Parameter)

    # What torch's own gradient makes of the matrix of all similarities.
    q = learner.encoder(images)
    seen, _ = memory.compare(q, None, index)
    assert seen.image is not None
    dense = (q @ memory.points.T).gather(1, seen.image.clamp(min=0)).masked_fill(seen.image < 0, 0.0)
    plain = type(seen)(**{**vars(seen), "by_query": dense})
    (expected,) = torch.autograd.grad(torch.stack(list(learner.method.loss(plain, 0).values())).sum(), weight)

    losses, _ = learner([images], index, 0)
    used = torch.zeros(300, dtype=torch.bool)
    used[seen.image[seen.image >= 0]] = True
    assert 50 < int(used.sum()) < 290
    memory.points.data[~used] = torch.nan  # from here on only who looks at them can tell
    sum(losses.values()).backward()
    torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-6)
    assert memory.points.grad is None


class Sizes(TorchDispatchMode):
    """Notes the largest tensor that is made, and any that has a row or column for every image."""

    def __init__(self, images: int, known: list[Tensor]) -> None:
        super().__init__()
        self.images = images
        self.known = {tensor.data_ptr() for tensor in known}
        self.largest = 0
        self.dense: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, list | tuple) else (result,):
            if isinstance(made, Tensor) and made.data_ptr() not in self.known:
                self.largest = max(self.largest, made.numel())
                if self.images in made.shape:
                    self.dense.append(f"{func} {tuple(made.shape)}")
        return result


@pytest.mark.parametrize("sets", [False, True], ids=["lists", "sets"])
def test_neither_forward_nor_backward_makes_anything_for_every_image(
    sets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = 1 << 15
    monkeypatch.setattr("kinfold.kernels.search._CELLS", cells)
    images = 100_003
    learner = learner_of(images, sets=sets)
    memory = bank_of(learner)
    known = [memory.points, memory.neighbours]
    views, index = [torch.randn(BATCH, 1, 2, 2)], torch.randint(images, (BATCH,))
    columns = BATCH * (1 + NEAREST + 3 + 9)
    with Sizes(images, known) as forward:
        losses, memos = learner(views, index, 0)
    with Sizes(images, known) as backward:
        sum(losses.values()).backward()
    with Sizes(images, known) as after:
        learner.advance([memos], momentum=1.0)
    assert forward.dense == backward.dense == after.dense == []
    assert forward.largest <= max(cells, columns * max(NEAREST, 512))  # blocks of the search, its room, sets met
    assert 0 < backward.largest <= columns * NEAREST
    assert 0 < after.largest <= BATCH * DIMENSION
