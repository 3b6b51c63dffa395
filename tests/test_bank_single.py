# SPDX-License-Identifier: Apache-2.0
"""A bank in single precision, as runs have it: divided over processes it finds, loses, learns and remembers the same.

In single precision the search has its fast ways, which double precision passes by. What may differ is rounding, sums of
a few products in another order: 1e-5 of a loss, and of a gradient's greatest number; 1e-4 from the second step on, as
every step's rounding goes into the next, and for the bank at the end of an epoch. Images and neighbours are the same.
"""

from __future__ import annotations

import os
import time
from functools import partial
from multiprocessing.connection import wait
from typing import Any

import pytest
import torch
from test_processes import free_port
from test_resume import processes
from torch import Tensor
from torch.nn import functional as F

from kinfold import bank, distributed
from kinfold.kernels import search
from kinfold.kernels.search import nearest_rows, nearest_rows_dense
from kinfold.memory import Bank, BankMemory
from kinfold.methods import InvP

IMAGES, BATCH, DIMENSION, PIXELS = 53, 12, 8, 5  # images and their last batch divide by neither 2 nor 3
WORLDS = (2, 3)
HOWS = {
    "lists": (BankMemory(nearest=9, neighbours=2, steps=2), InvP(positives=3, start_epoch=0)),
    "sets": (
        BankMemory(nearest=40, neighbours=3, steps=2, repeats=False),
        InvP(positives=3, start_epoch=0, sets="paper"),
    ),
}
WAYS = {
    "dense": nearest_rows_dense,
    "screened": partial(nearest_rows, way="screened"),
    "selected": partial(nearest_rows, way="selected"),
}


def epoch_of(how: str, way: str, rank: int, world: int, leave: int) -> dict[str, Any]:
    """An epoch of InvP with a linear encoder; the last batch is short by `leave` images, which do not divide.

    Returns each step's losses, images, gradient and new neighbours, the bank at the end, and in one process also how
    far apart the most alike of all similarities of a query with the bank were.
    """
    memory_settings, method = HOWS[how]
    torch.manual_seed(7)
    memory = Bank(IMAGES, DIMENSION, memory_settings)
    source = torch.Generator().manual_seed(24)
    memory.neighbours.random_(0, IMAGES, generator=source)
    pixels = torch.randn(IMAGES, PIXELS, generator=source)
    weight = torch.randn(PIXELS, DIMENSION, generator=source).requires_grad_()
    told: dict[str, Any] = {"losses": [], "images": [], "gradients": [], "neighbours": [], "apart": []}
    order = torch.randperm(IMAGES, generator=source)[: IMAGES - leave]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bank, "nearest_rows", WAYS[way])
        for name, value in {"_CELLS": 64, "_NARROWEST": 4, "_ROOM": 6}.items():  # many blocks, and hardly any room
            patch.setattr(search, name, value)
        for index in order.split(BATCH):
            index = index[rank::world]
            q = F.normalize(pixels[index] @ weight, dim=1)  # [B, D]
            if world == 1:
                similarity = (q.detach() @ memory.points.T).sort(dim=1).values  # [B, N]
                told["apart"].append(float(similarity.diff(dim=1).min()))
            seen, memo = memory.compare(q, None, index)
            assert seen.by_query.dtype == torch.float32
            terms = torch.stack(list(method.loss(seen, 0).values()))
            (gradient,) = torch.autograd.grad(terms.sum(), weight)
            terms = terms.detach()
            distributed.average_([terms, gradient])  # as DistributedDataParallel does
            memory.remember([memo])
            with torch.no_grad():
                weight -= 0.05 * gradient
            for kind, found in (("losses", terms), ("images", seen.image), ("gradients", gradient)):
                told[kind].append(found)
            told["neighbours"].append(memo[2])
    return {**told, "bank": dict(memory.state_dict()), "weight": weight.detach()}


def with_ties(way: str, rank: int, world: int) -> dict[str, Any]:
    """One step of whole numbers: every product and sum is exact, and most similarities stand several times."""
    memory = Bank(IMAGES, DIMENSION, BankMemory(nearest=30, neighbours=4, steps=2))
    source = torch.Generator().manual_seed(3)
    rows = torch.randint(-1, 2, (IMAGES, DIMENSION), generator=source).float()
    rows[-(IMAGES // 2) :] = rows[: IMAGES // 2]  # the same rows in other shares
    memory.points.copy_(rows[memory.rows.start : memory.rows.stop])
    memory.neighbours.random_(0, IMAGES, generator=source)
    index = torch.randperm(IMAGES, generator=source)[:BATCH][rank::world]
    q = torch.randint(-2, 3, (BATCH, DIMENSION), generator=source).float()[rank::world].clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bank, "nearest_rows", WAYS[way])
        for name, value in {"_CELLS": 64, "_NARROWEST": 4, "_ROOM": 6}.items():
            patch.setattr(search, name, value)
        seen, memo = memory.compare(q, None, index)
    columns = torch.arange(seen.by_query.shape[1]).remainder(7).sub(3).float()
    torch.autograd.backward((columns * seen.by_query).sum())
    assert q.grad is not None
    assert seen.image is not None
    return {"similarity": seen.by_query.detach(), "images": seen.image, "gradient": q.grad, "neighbours": memo[2]}


def one_rank(rank: int, world: int, port: int, out: str) -> None:
    """Go through all as one of several processes, and leave what was seen in a file."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    distributed.start("cpu")
    rest = IMAGES % BATCH % world
    told: dict[str, Any] = {f"{how}, {way}": epoch_of(how, way, rank, world, rest) for how in HOWS for way in WAYS}
    told |= {f"ties, {way}": with_ties(way, rank, world) for way in WAYS}
    torch.save(told, f"{out}/{world}-{rank}.pt")
    distributed.stop()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each process of two and of three tells."""
    out = tmp_path_factory.mktemp("single")
    ports = {world: free_port() for world in WORLDS}
    group = [
        processes.Process(target=one_rank, args=(rank, world, ports[world], str(out)))
        for world in WORLDS
        for rank in range(world)
    ]
    for process in group:
        process.start()
    deadline = time.monotonic() + 120
    while (left := deadline - time.monotonic()) > 0 and not any(process.exitcode for process in group):
        running = [process.sentinel for process in group if process.exitcode is None]
        if not running:
            break
        wait(running, timeout=left)
    for process in group:
        if process.exitcode is None:  # waits for one that failed
            process.kill()
            process.join()
    assert [process.exitcode for process in group] == [0] * len(group)
    return {
        world: [torch.load(out / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)] for world in WORLDS
    }


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", HOWS)
def test_an_epoch_with_a_divided_bank_is_that_of_one_process(
    how: str, way: str, world: int, told: dict[int, list[dict[str, Any]]]
) -> None:
    alone = epoch_of(how, "dense", 0, 1, IMAGES % BATCH % world)
    assert len(alone["losses"]) == 5
    assert min(alone["apart"]) > 1e-6, "rounding decides which is nearer: take another seed"
    assert not torch.equal(alone["neighbours"][0], alone["bank"]["neighbours"][: len(alone["neighbours"][0])])
    for rank in range(world):
        ours = told[world][rank][f"{how}, {way}"]
        for step, expected in enumerate(alone["losses"]):
            torch.testing.assert_close(ours["losses"][step], expected, rtol=1e-4 if step else 1e-5, atol=0)
            assert torch.equal(ours["images"][step], alone["images"][step][rank::world])
            assert torch.equal(ours["neighbours"][step], alone["neighbours"][step])
            near = (1e-4 if step else 1e-5) * float(alone["gradients"][step].abs().max())
            torch.testing.assert_close(ours["gradients"][step], alone["gradients"][step], rtol=0, atol=near)
        torch.testing.assert_close(ours["weight"], alone["weight"], rtol=1e-4, atol=1e-4)
        points, whole = ours["bank"]["points"], alone["bank"]["points"]
        rows = range(IMAGES) if rank == 0 else range(IMAGES * rank // world, IMAGES * (rank + 1) // world)
        torch.testing.assert_close(points, whole[rows.start : rows.stop], rtol=1e-4, atol=1e-4)
        assert torch.equal(ours["bank"]["neighbours"], alone["bank"]["neighbours"])
        assert torch.equal(ours["weight"], told[world][0][f"{how}, {way}"]["weight"])  # no rank goes its own way


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("way", WAYS)
def test_of_equal_keys_in_several_shares_the_lowest_image_is_taken(
    way: str, world: int, told: dict[int, list[dict[str, Any]]]
) -> None:
    alone = with_ties("dense", 0, 1)
    similarity: Tensor = alone["similarity"][:, 1:31]
    assert (similarity[:, 1:] == similarity[:, :-1]).float().mean() > 0.5
    for rank in range(world):
        ours = told[world][rank][f"ties, {way}"]
        for name in ("similarity", "images", "gradient"):
            assert torch.equal(ours[name], alone[name][rank::world]), name
        assert torch.equal(ours["neighbours"], alone["neighbours"])
