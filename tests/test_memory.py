# SPDX-License-Identifier: Apache-2.0
"""The queue is the most recent keys, whatever the batch; the bank is one key per image and a graph."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from golden import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from kinfold.kernels.search import nearest_rows
from kinfold.memory import (
    Bank,
    BankMemory,
    BatchMemory,
    Memo,
    Queue,
    QueueMemory,
    build_memory,
)


def units(*shape: int) -> Tensor:
    """Random unit vectors in float64."""
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def ring(queue: Queue) -> Tensor:
    """The keys of a queue from the oldest to the newest."""
    return torch.roll(queue.keys, -int(queue.next), dims=0)


@given(
    size=st.integers(1, 17),
    batches=st.lists(st.lists(st.integers(1, 25), min_size=1, max_size=3), min_size=1, max_size=6),
)
def test_a_queue_holds_the_most_recent_keys_for_any_batch(size: int, batches: list[list[int]]) -> None:
    queue = Queue(size, 3).double()
    expected = list(queue.keys.clone())
    for views in batches:
        keys = [units(count, 3) for count in views]
        queue.remember([(k,) for k in keys])
        # Views in order, in each the images in order; the oldest make room.
        expected = (expected + [row for k in keys for row in k])[-size:]
        assert torch.equal(ring(queue), torch.stack(expected))


@given(size=st.integers(1, 12), batches=st.lists(st.integers(1, 15), min_size=1, max_size=6))
def test_a_queue_knows_the_age_of_its_keys(size: int, batches: list[int]) -> None:
    queue = Queue(size, 2)
    expected = [0] * size
    for count in batches:
        queue.remember([(units(count, 2),)])
        expected = ([age + 1 for age in expected] + [0] * count)[-size:]
        age = queue.written - queue.born
        assert torch.roll(age, -int(queue.next)).tolist() == expected


def test_a_queue_wraps_where_the_batch_does_not_divide_it() -> None:
    queue = Queue(4, 2).double()
    a, b = units(3, 2), units(3, 2)
    queue.remember([(a,)])
    queue.remember([(b,)])
    assert torch.equal(queue.keys, torch.stack([b[1], b[2], a[2], b[0]]))
    assert int(queue.next) == 2


def test_comparing_only_reads() -> None:
    queue, bank = Queue(9, 4).double(), Bank(12, 4, BankMemory(nearest=5)).double()
    for memory, keys in ((queue, units(6, 4)), (bank, None)):
        before = {k: v.clone() for k, v in memory.state_dict().items()}
        memory.compare(units(6, 4).requires_grad_(), keys, torch.arange(6))
        assert all(torch.equal(v, before[k]) for k, v in memory.state_dict().items())


def test_a_queue_refuses_pairs_without_keys() -> None:
    with pytest.raises(ValueError, match="key view"):
        Queue(4, 2).compare(torch.randn(3, 2), None, torch.arange(3))


@pytest.mark.parametrize("batch_keys", [False, True])
def test_a_queue_compares_with_the_own_key_and_every_remembered_one(batch_keys: bool) -> None:
    queue = Queue(7, 4, batch_keys=batch_keys).double()
    q, k = units(5, 4), units(5, 4)
    seen, (kept,) = queue.compare(q, k, torch.arange(5))
    candidates = [[*(k if batch_keys else k[i : i + 1]), *queue.keys] for i in range(5)]
    for i in range(5):
        for j, m in enumerate(candidates[i]):
            assert_close(seen.by_query[i, j], oracles.dot(q[i].numpy(), m.numpy()))
            assert_close(seen.by_key[i, j], oracles.dot(k[i].numpy(), m.numpy()))  # type: ignore[index]
    assert seen.by_query.shape[1] == len(candidates[0])
    assert seen.own.tolist() == ([0, 1, 2, 3, 4] if batch_keys else [0] * 5)
    assert torch.equal(kept, k)


def test_a_recipe_makes_the_memory_it_names() -> None:
    queue = build_memory(QueueMemory(size=5, batch_keys=True), images=9, dimension=3)
    assert isinstance(queue, Queue)
    assert queue.batch_keys
    assert queue.keys.shape == (5, 3)
    assert torch.allclose(queue.keys.norm(dim=1), torch.ones(5))
    nothing = build_memory(BatchMemory(), images=9, dimension=3)
    assert isinstance(nothing, Queue)
    assert nothing.size == 0
    assert nothing.batch_keys
    nothing.remember([(torch.randn(4, 3),)])
    assert nothing.keys.shape == (0, 3)
    bank = build_memory(BankMemory(neighbours=2), images=9, dimension=3)
    assert isinstance(bank, Bank)
    assert bank.points.shape == (9, 3)
    assert bank.neighbours.shape == (9, 2)


graphs = st.integers(0, 2**32 - 1)


@given(
    seed=graphs,
    images=st.integers(1, 30),
    k=st.integers(1, 4),
    steps=st.integers(1, 4),
    repeats=st.booleans(),
)
def test_a_walk_meets_what_breadth_first_search_meets(
    seed: int, images: int, k: int, steps: int, repeats: bool
) -> None:
    bank = Bank(images, 2, BankMemory(neighbours=k, steps=steps, repeats=repeats))
    bank.neighbours.copy_(torch.from_numpy(np.random.default_rng(seed).integers(0, images, (images, k))))
    index = torch.arange(images)
    met = bank.walk(index)
    assert met.shape == (images, sum(k**d for d in range(1, steps + 1)))
    graph = bank.neighbours.numpy()
    for i in range(images):
        if repeats:
            assert met[i].tolist() == oracles.breadth_first(graph, i, steps)
        else:
            found = [j for j in met[i].tolist() if j >= 0]
            assert len(found) == len(set(found))
            assert set(found) == oracles.within_reach(graph, i, steps)


def test_three_steps_over_four_neighbours_meet_eighty_four_images() -> None:
    bank = Bank(500, 2, BankMemory(neighbours=4, steps=3))
    assert bank.walk(torch.arange(2)).shape == (2, 4 + 16 + 64)


def test_one_step_meets_the_neighbours() -> None:
    bank = Bank(50, 2, BankMemory(neighbours=4, steps=1))
    bank.neighbours.copy_(torch.randint(50, (50, 4)))
    index = torch.tensor([3, 7, 3])
    assert torch.equal(bank.walk(index), bank.neighbours[index])


@settings(max_examples=40)
@given(seed=graphs, images=st.integers(1, 40), count=st.integers(1, 45))
def test_a_bank_is_searched_for_what_a_full_sort_finds(seed: int, images: int, count: int) -> None:
    torch.manual_seed(seed)
    bank = Bank(images, 5, BankMemory()).double()
    q = units(3, 5)
    found = nearest_rows(q, bank.points, count)[1]
    for i in range(3):
        assert found[i].tolist() == oracles.most_similar(q[i].numpy(), bank.points.numpy(), count)


def test_an_update_moves_a_key_halfway_and_makes_its_length_one() -> None:
    bank = Bank(10, 4, BankMemory(nearest=5, momentum=0.25)).double()
    before = bank.points.clone()
    q, index = units(3, 4), torch.tensor([7, 0, 4])
    _, memo = bank.compare(q, None, index)
    bank.remember([memo])
    assert_close(bank.points[index].norm(dim=1), torch.ones(3))
    for row, i in enumerate(index.tolist()):
        moved = oracles.unit((0.25 * before[i] + 0.75 * q[row]).numpy())
        assert_close(bank.points[i], torch.from_numpy(moved), f"image {i}")
    others = [i for i in range(10) if i not in index.tolist()]
    assert torch.equal(bank.points[others], before[others])


@given(seed=graphs, images=st.integers(6, 25), k=st.integers(1, 5))
def test_new_neighbours_are_the_nearest_without_the_image_itself(seed: int, images: int, k: int) -> None:
    torch.manual_seed(seed)
    # Fewer nearest keys than neighbours are consulted: the neighbours must not suffer from that.
    bank = Bank(images, 4, BankMemory(nearest=2, neighbours=k)).double()
    index = torch.randperm(images)[:6]
    near_own = F.normalize(bank.points[index] + 0.5 * torch.randn(6, 4, dtype=torch.float64), dim=1)
    points = bank.points.numpy().copy()
    _, memo = bank.compare(near_own, None, index)
    bank.remember([memo])
    for row, i in enumerate(index.tolist()):
        found = oracles.most_similar(near_own[row].numpy(), points, k + 1)
        fresh = bank.neighbours[i].tolist()
        assert fresh == oracles.refreshed(found, i, k)
        assert i not in fresh


@pytest.mark.parametrize("images", [1, 2, 3, 5])
def test_a_set_with_fewer_images_than_neighbours_still_works(images: int) -> None:
    bank = Bank(images, 3, BankMemory(nearest=4096, neighbours=4)).double()
    index = torch.arange(images)
    for _ in range(3):
        seen, memo = bank.compare(units(images, 3), None, index)
        bank.remember([memo])
        assert seen.nearest == slice(1, 1 + images)
        assert torch.isfinite(seen.by_query).all()
    assert ((bank.neighbours >= 0) & (bank.neighbours < images)).all()


@given(seed=graphs, index=st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_an_image_that_stands_twice_in_a_batch_keeps_the_later(seed: int, index: list[int]) -> None:
    torch.manual_seed(seed)
    bank, alone = (Bank(6, 3, BankMemory(nearest=5, neighbours=2)).double() for _ in range(2))
    alone.load_state_dict(bank.state_dict())
    q, positions = units(len(index), 3), torch.tensor(index)
    _, memo = bank.compare(q, None, positions)
    bank.remember([memo])
    last = torch.tensor(sorted({i: row for row, i in enumerate(index)}.values()))
    only_last: Memo = tuple(part[last] for part in memo)
    alone.remember([only_last])
    assert torch.equal(bank.points, alone.points)
    assert torch.equal(bank.neighbours, alone.neighbours)


@pytest.mark.parametrize("repeats", [True, False])
def test_a_banks_columns_are_the_images_it_names(repeats: bool) -> None:
    bank = Bank(15, 4, BankMemory(nearest=6, neighbours=2, steps=2, repeats=repeats)).double()
    bank.neighbours.copy_(torch.randint(15, (15, 2)))
    q, index = units(5, 4), torch.tensor([1, 14, 0, 9, 1])
    seen, _ = bank.compare(q, None, index)
    assert seen.by_key is None
    assert seen.image is not None
    assert torch.equal(seen.image[:, 0], index)
    assert torch.equal(seen.image.gather(1, seen.own[:, None])[:, 0], index)
    for i in range(5):
        for j, image in enumerate(seen.image[i].tolist()):
            if image >= 0:
                assert_close(seen.by_query[i, j], oracles.dot(q[i].numpy(), bank.points[image].numpy()))
    spans = [seen.own.unique().tolist(), list(range(15))[seen.nearest], seen.reached]
    assert spans[0] == [0]
    assert spans[1] == [1, 2, 3, 4, 5, 6]
    assert spans[2] == slice(7, 7 + 2 + 4)


@pytest.mark.parametrize(("images", "nearest"), [(12, 30), (400, 5)])
def test_a_banks_similarities_and_their_gradient_are_those_of_the_plain_form(images: int, nearest: int) -> None:
    bank = Bank(images, 4, BankMemory(nearest=nearest, steps=2, neighbours=2)).double()
    bank.neighbours.random_(0, images)
    raw = torch.randn(40, 4, dtype=torch.float64, requires_grad=True)
    index = torch.arange(40) % images
    seen, _ = bank.compare(raw, None, index)
    assert seen.image is not None
    plain = torch.einsum("bd,bkd->bk", raw, bank.points[seen.image])
    assert_close(seen.by_query.detach(), plain.detach())
    weights = torch.randn_like(plain)
    (ours,) = torch.autograd.grad((weights * seen.by_query).sum(), raw)
    (theirs,) = torch.autograd.grad((weights * plain).sum(), raw)
    assert_close(ours, theirs)
