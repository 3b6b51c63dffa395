# SPDX-License-Identifier: Apache-2.0
"""The promises and the authors' numbers with each fast way in place of the plain one: searches, compiled encoders.

The promises themselves are in `test_promises`; here each is asked again of a learner that computes in another way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import test_golden_invp as invp
import test_golden_moco as moco
import test_golden_sce as sce
import test_promises as promises
import torch
from conftest import CASES, Case
from small_trainings import quick_compiler
from torch import Tensor

from kinfold import bank
from kinfold.kernels import search
from kinfold.kernels.search import Found, nearest_rows, nearest_rows_dense
from kinfold.learner import Learner

SEARCHES: dict[str, Callable[..., Found]] = {
    "dense": nearest_rows_dense,
    "screened": partial(nearest_rows, way="screened"),
    "selected": partial(nearest_rows, way="selected"),
}
OF_ENCODERS: list[Callable[[Case], None]] = [
    promises.test_the_gradient_reaches_the_query_and_nothing_else,
    promises.test_a_query_never_meets_its_own_key_among_the_others,
    promises.test_only_the_views_that_a_pair_uses_are_encoded,
    promises.test_forward_reads_and_advance_writes,
]
"""what could be otherwise with compiled encoders"""
PASSES = ("moco", "moco-symmetric", "sce-multi-crop", "co2-batch", "invp")
"""cases with one query and one key view, two of each, more queries than keys, and no key encoder"""
OF_SEARCHES: list[Callable[[Case], None]] = [
    *OF_ENCODERS,
    promises.test_every_term_of_the_loss_trains,
    promises.test_the_gradient_is_that_of_the_loss,
    promises.test_the_own_key_is_one_column_and_the_others_are_other_images,
    promises.test_the_same_views_give_the_same_loss_twice,
    promises.test_micro_batches_are_remembered_like_one_batch,
]


def sentence(promise: Callable[[Case], None]) -> str:
    return promise.__name__.removeprefix("test_")


@pytest.fixture(params=SEARCHES)
def _searched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are found in single precision, where the search has its ways; similarities stay in double."""
    find = SEARCHES[request.param]

    def found(queries: Tensor, rows: Tensor, count: int) -> Found:
        _, places = find(queries.float(), rows.float(), count)  # [Q, M]
        return torch.einsum("qd,qkd->qk", queries, rows[places]), places

    monkeypatch.setattr(bank, "nearest_rows", found)
    for size, value in {"_CELLS": 64, "_NARROWEST": 8, "_ROOM": 4}.items():  # many blocks, and hardly any room
        monkeypatch.setattr(search, size, value)


@pytest.fixture
def _compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every learner has its encoders compiled, as for CUDA graphs."""
    real = Learner.__init__

    def made(self: Learner, **settings: Any) -> None:
        real(self, **settings)
        self.compile_encoders(graphs=True)

    monkeypatch.setattr(Learner, "__init__", made)
    with quick_compiler() as asked:
        yield
    assert asked


@pytest.mark.usefixtures("_searched")
@pytest.mark.parametrize("case", [case for case in CASES if case.method.name == "invp"], ids=lambda case: case.name)  # type: ignore[attr-defined]
@pytest.mark.parametrize("promise", OF_SEARCHES, ids=sentence)
def test_a_promise_holds_however_rows_are_searched(promise: Callable[[Case], None], case: Case) -> None:
    promise(case)


@pytest.mark.usefixtures("_searched")
@pytest.mark.parametrize("name", invp.FILES)
def test_a_step_of_invp_is_the_authors_however_rows_are_searched(name: str) -> None:
    invp.test_a_step_gives_the_authors_losses_gradient_neighbours_and_bank(name)


@pytest.mark.usefixtures("_searched")
def test_three_passes_of_invp_are_the_authors_however_rows_are_searched() -> None:
    invp.test_three_passes_over_the_set_leave_the_authors_bank()


@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize("case", [case for case in CASES if case.name in PASSES], ids=lambda case: case.name)
@pytest.mark.parametrize("promise", OF_ENCODERS, ids=sentence)
def test_a_promise_holds_with_compiled_encoders(promise: Callable[[Case], None], case: Case) -> None:
    promise(case)


@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize("shuffle", [False, True], ids=["in-order", "shuffled-keys"])
@pytest.mark.parametrize("name", sce.STEPS)
def test_a_step_of_sce_is_the_authors_with_compiled_encoders(name: str, shuffle: bool) -> None:
    sce.test_a_whole_training_step_is_the_authors(name, shuffle)


@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize("name", invp.FILES)
def test_a_step_of_invp_is_the_authors_with_compiled_encoders(name: str) -> None:
    invp.test_a_step_gives_the_authors_losses_gradient_neighbours_and_bank(name)


@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize("file", moco.FILES, ids=lambda file: file[0])
def test_a_step_of_moco_is_the_authors_with_compiled_encoders(file: tuple[str, int]) -> None:
    moco.test_a_step_of_moco_gives_the_authors_loss_gradients_and_queue(moco.before_the_step(*file))
