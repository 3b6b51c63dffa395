# SPDX-License-Identifier: Apache-2.0
"""The rows of a bank: found and compared with as by the plain form, the same whether divided over processes or not."""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import partial
from typing import Any

import oracles
import pytest
import torch
from golden import assert_close
from hypothesis import given
from hypothesis import strategies as st
from test_processes import free_port
from test_resume import processes
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kinfold import bank, distributed
from kinfold.bank import compare_with_rows, fresh_rows, last_of_each, move_rows_
from kinfold.errors import UserError
from kinfold.kernels.search import nearest_rows
from kinfold.memory import Bank, BankMemory, Memo, build_memory

RANKS, B, DIMENSION = 3, 4, 5
SCENES = {
    "shares of 16 and 17": (50, BankMemory(nearest=6, neighbours=2, steps=2)),
    "more nearest keys than a share has": (50, BankMemory(nearest=30, neighbours=3, steps=3, repeats=False)),
    "more nearest keys than there are": (13, BankMemory(nearest=64, neighbours=4, steps=2)),
    "shares of one row and two": (4, BankMemory(nearest=3, neighbours=2, steps=2)),
}


def plain(q: Tensor, points: Tensor, images: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `compare_with_rows` says, from all similarities at once and torch's own gradient."""
    everything = q @ points.T
    found = everything.detach().sort(dim=1, descending=True, stable=True).indices[:, :count]
    looked = everything.gather(1, images.clamp(min=0)).masked_fill(images < 0, 0.0)
    return everything.gather(1, found), found, looked


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 40),
    count=st.integers(1, 45),
    picked=st.integers(1, 9),
    fetched=st.sampled_from([1, 64, 2**22]),
)
def test_rows_are_compared_with_as_by_the_plain_form(
    seed: int, rows: int, count: int, picked: int, fetched: int
) -> None:
    torch.manual_seed(seed)
    points = torch.randn(rows, DIMENSION, dtype=torch.float64)
    q = torch.randn(7, DIMENSION, dtype=torch.float64, requires_grad=True)
    images = torch.randint(-1, rows, (7, picked))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bank, "_FETCHED", fetched)
        ours = compare_with_rows(q, points, images, count)
    theirs = plain(q, points, images, count)
    assert torch.equal(ours[1], theirs[1])
    weights = [torch.randn_like(theirs[0]), torch.randn_like(theirs[2])]
    gradients: list[Tensor] = []
    for nearest, _, looked in (ours, theirs):
        gradients += torch.autograd.grad((weights[0] * nearest).sum() + (weights[1] * looked).sum(), q)
    assert_close(ours[0].detach(), theirs[0].detach(), "nearest")
    assert_close(ours[2].detach(), theirs[2].detach(), "looked up")
    assert_close(gradients[0], gradients[1], "gradient")


def test_of_equal_rows_the_lowest_image_comes_first() -> None:
    points = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    _, found, _ = compare_with_rows(torch.tensor([[1.0, 0.0]]), points, torch.tensor([[0]]), 3)
    assert found.tolist() == [[1, 3, 0]]


@given(images=st.lists(st.integers(0, 6), min_size=1, max_size=15))
def test_the_last_of_each_image_is_the_one_a_loop_finds(images: list[int]) -> None:
    last = {image: position for position, image in enumerate(images)}
    assert last_of_each(torch.tensor(images)).tolist() == [last[image] for image in images]


@given(
    images=st.lists(st.integers(0, 11), min_size=1, max_size=10),
    first=st.integers(0, 11),
    rows=st.integers(1, 12),
)
def test_rows_move_where_they_are_and_no_others_do(images: list[int], first: int, rows: int) -> None:
    torch.manual_seed(0)
    points = torch.randn(rows, 3, dtype=torch.float64)
    features = torch.randn(12, 3, dtype=torch.float64)
    before = points.clone()
    move_rows_(points, torch.tensor(images), features[images], keep=0.25, first=first)
    for row in range(rows):
        if first + row in images:
            moved = oracles.unit((0.25 * before[row] + 0.75 * features[first + row]).numpy())
            assert_close(points[row], torch.from_numpy(moved))
        else:
            assert torch.equal(points[row], before[row])


def test_a_share_of_a_new_bank_is_a_piece_of_the_whole() -> None:
    torch.manual_seed(4)
    whole = torch.empty(90, 3).uniform_(-1.0, 1.0)
    for rows in (range(90), range(30), range(30, 61), range(89, 90)):
        for block in (7, 64, 65536):
            torch.manual_seed(4)
            assert torch.equal(fresh_rows(90, 3, rows, block=block), whole[rows.start : rows.stop])


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shares_join_to_the_whole_and_differ_by_one_row_at_most(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world", lambda: world)
    for count in (7, 8, 20, 1_281_167):
        shares = [distributed.share(count, rank) for rank in range(world)]
        assert [shares[0].start, *[rows.stop for rows in shares]] == [*[rows.start for rows in shares], count]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_bank_is_not_divided_over_more_processes_than_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world", lambda: 4)
    with pytest.raises(UserError, match="3 images cannot be divided over 4 processes"):
        build_memory(BankMemory(), images=3, dimension=2)


class Watching(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the largest tensor that is made, and what would make an accelerator wait."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = {tensor.data_ptr() for tensor in known}
        self.largest = 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "aten.equal")):
            self.waits.append(name)
        if "index" in name and len(args) > 1 and isinstance(args[1], list | tuple):
            self.waits += [name for part in args[1] if isinstance(part, Tensor) and part.dtype == torch.bool]
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, list | tuple) else (result,):
            if isinstance(made, Tensor) and made.data_ptr() not in self.known:
                self.largest = max(self.largest, made.numel())
        return result


def step_of(memory: Bank, index: Tensor) -> None:
    """Compare, go backward and remember, as a step does."""
    q = F.normalize(torch.randn(len(index), memory.points.shape[1]), dim=1).requires_grad_()
    seen, memo = memory.compare(q, None, index)
    torch.autograd.backward(seen.by_query.exp().sum())
    memory.remember([memo])


def test_no_step_holds_a_similarity_for_every_image() -> None:
    images, batch = 400_000, 64
    memory = Bank(images, 4, BankMemory(nearest=32))
    with Watching([memory.points, memory.neighbours]) as watched:
        step_of(memory, torch.randint(images, (batch,)))
    assert watched.largest < images * batch // 4


def test_what_is_remembered_takes_no_work_for_every_image() -> None:
    memory = Bank(5_000, 4, BankMemory(nearest=32))
    memo: Memo = (torch.randint(5_000, (16,)), torch.randn(16, 4), torch.randint(5_000, (16, 4)))
    with Watching([memory.points, memory.neighbours]) as watched:
        memory.remember([memo])
    assert 0 < watched.largest <= 64


class Backwards(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes rows from the last to the first: where a row comes twice, the order is a device's own."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.index_put_.default:
            into, (rows,), values = args
            return func(into, [rows.flip(0)], values.flip(0))
        return func(*args, **(kwargs or {}))


def test_an_image_that_stands_twice_is_remembered_alike_in_any_order_of_writing() -> None:
    index = torch.tensor([3, 1, 3, 3, 0, 1])
    memo: Memo = (index, torch.randn(6, 4), torch.randint(5, (6, 2)))
    states = []
    for way in (nullcontext(), Backwards()):  # type: ignore[no-untyped-call]
        torch.manual_seed(1)
        memory = Bank(5, 4, BankMemory(neighbours=2))
        with way:
            memory.remember([memo])
        states.append(memory.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


@pytest.mark.parametrize("repeats", [True, False])
def test_no_step_waits_for_the_device(repeats: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # The search has a way for devices other than a CPU, which is the one that must not wait.
    monkeypatch.setattr(bank, "nearest_rows", partial(nearest_rows, way="selected"))
    memory = Bank(300, 4, BankMemory(nearest=32, repeats=repeats))
    with Watching([]) as watched:
        step_of(memory, torch.randint(300, (16,)))
    assert watched.waits == []


# Several processes.


def steps_of(memory: Bank, scene: int, rank: int, world: int) -> list[Tensor]:
    """Three steps of the images that this rank of `world` has; returns all that it saw, and its gradients."""
    source = torch.Generator().manual_seed(scene)
    memory.neighbours.random_(0, memory.images, generator=source)
    saw = []
    for _ in range(3):
        index = torch.randint(memory.images, (B * RANKS,), generator=source)  # with images that stand there twice
        raw = torch.randn(B * RANKS, DIMENSION, generator=source, dtype=torch.float64)
        raw, index = raw[rank::world].clone().requires_grad_(), index[rank::world]
        q = F.normalize(raw, dim=1)
        seen, memo = memory.compare(q, None, index)
        assert seen.image is not None
        columns = torch.linspace(-1.0, 1.0, seen.by_query.shape[1], dtype=torch.float64)
        torch.autograd.backward((columns * seen.by_query.exp()).masked_fill(seen.image < 0, 0.0).sum())
        memory.remember([memo])
        assert raw.grad is not None
        saw += [seen.by_query.detach().masked_fill(seen.image < 0, 0.0), seen.image, raw.grad, memo[2]]
    return saw


def one_rank(rank: int, port: int, out: str) -> None:
    """Go through all scenes as one of three processes, divided and not, and leave what was seen in a file."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(RANKS))
    distributed.start("cpu")
    told: dict[str, Any] = {}
    for number, (name, (images, how)) in enumerate(SCENES.items()):
        for divided in (True, False):
            torch.manual_seed(number)
            memory = Bank(images, DIMENSION, how, divided=divided).double()
            saw = steps_of(memory, number, rank, RANKS)
            state = memory.state_dict()
            again = Bank(images, DIMENSION, how, divided=divided).double()
            again.load_state_dict(state)
            own = torch.equal(again.points, memory.points)
            again.load_state_dict(torch.load(f"{out}/{number}.pt", weights_only=True))
            told[f"{name}, {divided}"] = {
                "saw": saw,
                "state": dict(state),
                "own": own,
                "of one process": again.points.clone(),
            }
    torch.save(told, f"{out}/rank-{rank}.pt")
    distributed.stop()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[tuple[list[Tensor], Bank]], list[dict[str, Any]]]:
    """What one process saw of each scene, with its bank at the end, and what each of three processes tells."""
    out = tmp_path_factory.mktemp("ranks")
    alone = []
    for number, (images, how) in enumerate(SCENES.values()):
        torch.manual_seed(number)
        memory = Bank(images, DIMENSION, how).double()
        alone.append((steps_of(memory, number, 0, 1), memory))
        torch.save(memory.state_dict(), out / f"{number}.pt")
    port = free_port()
    group = [processes.Process(target=one_rank, args=(rank, port, str(out))) for rank in range(RANKS)]
    for process in group:
        process.start()
    for process in group:
        process.join(120)
        assert process.exitcode == 0
    return alone, [torch.load(out / f"rank-{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("divided", [True, False], ids=["divided", "on every rank"])
@pytest.mark.parametrize("scene", SCENES)
def test_a_divided_bank_shows_and_remembers_what_a_whole_one_does(scene: str, divided: bool, ranks: Any) -> None:
    alone, told = ranks
    saw, memory = alone[list(SCENES).index(scene)]
    for rank, each in enumerate(told):
        for ours, theirs in zip(each[f"{scene}, {divided}"]["saw"], saw, strict=True):
            mine = theirs if len(ours) == len(theirs) else theirs[rank::RANKS]  # what is remembered is gathered
            torch.testing.assert_close(ours, mine, rtol=1e-9, atol=1e-12)
    state = told[0][f"{scene}, {divided}"]["state"]
    for name, value in memory.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("scene", SCENES)
def test_each_rank_holds_its_share_and_the_main_process_saves_all_of_them(scene: str, ranks: Any) -> None:
    images, told = SCENES[scene][0], ranks[1]
    whole = told[0][f"{scene}, True"]["state"]["points"]
    assert len(whole) == images
    for rank in range(1, RANKS):
        rows = range(images * rank // RANKS, images * (rank + 1) // RANKS)
        assert torch.equal(told[rank][f"{scene}, True"]["state"]["points"], whole[rows.start : rows.stop])


@pytest.mark.parametrize("scene", SCENES)
def test_a_state_can_be_loaded_by_another_number_of_processes(scene: str, ranks: Any) -> None:
    alone, told = ranks
    (images, how), (_, memory) = SCENES[scene], alone[list(SCENES).index(scene)]
    for rank, each in enumerate(told):
        found = each[f"{scene}, True"]
        assert found["own"]
        rows = range(images * rank // RANKS, images * (rank + 1) // RANKS)
        assert torch.equal(found["of one process"], memory.points[rows.start : rows.stop])
    whole = Bank(images, DIMENSION, how).double()
    whole.load_state_dict(told[0][f"{scene}, True"]["state"])
    assert torch.equal(whole.points, told[0][f"{scene}, True"]["state"]["points"])
