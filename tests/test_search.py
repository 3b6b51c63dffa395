# SPDX-License-Identifier: Apache-2.0
"""The search for nearest rows: the same as one product and one sort, whatever the rows are and however they come."""

from __future__ import annotations

import math
import threading
import tracemalloc
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_info, threadpool_limits
from torch import Tensor

from kinfold.kernels import screening, search
from kinfold.kernels.search import Way, nearest_rows, nearest_rows_dense

EVERY = pytest.mark.parametrize("way", ["screened", "selected"])


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and room so small that a toy search has many of them, and gets to every branch."""
    monkeypatch.setattr(search, "_QUERIES", 7)
    monkeypatch.setattr(search, "_CELLS", 160)
    monkeypatch.setattr(search, "_NARROWEST", 1)
    monkeypatch.setattr(search, "_ROOM", 12)


def whole(*shape: int, most: int = 3, seed: int = 0) -> Tensor:
    """Small whole numbers: every product is exact, and many are equal."""
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Equal to the bit, order included."""
    assert found[1].dtype == torch.int64
    assert torch.equal(found[1], expected[1])
    assert found[0].dtype == expected[0].dtype
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0, equal_nan=True)


def test_the_reference_is_a_loop_over_pairs() -> None:
    queries, rows = whole(4, 3), whole(30, 3, seed=1)
    similarity, places = nearest_rows_dense(queries, rows, 9, first=100)
    for query, found, where in zip(queries.tolist(), similarity.tolist(), places.tolist()):
        every = [(-sum(a * b for a, b in zip(query, row)), 100 + n) for n, row in enumerate(rows.tolist())]
        assert list(zip(found, where)) == [(-value, n) for value, n in sorted(every)[:9]]


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@given(
    queries=st.integers(0, 16), rows=st.integers(0, 300), count=st.integers(1, 40), most=st.integers(0, 5),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_the_search_is_its_reference_and_of_equal_rows_the_first_wins(
    dtype: torch.dtype, way: Way, queries: int, rows: int, count: int, most: int, seed: int
) -> None:
    asked, bank = whole(queries, 3, most=most, seed=seed).to(dtype), whole(rows, 3, most=most, seed=seed + 1).to(dtype)
    found = nearest_rows(asked, bank, count, first=5, way=way)
    assert found[0].shape == (queries, min(count, rows))
    assert_same(found, nearest_rows_dense(asked, bank, count, first=5))


@EVERY
@pytest.mark.parametrize("count", [1, 20, 400, 1000])
@pytest.mark.parametrize("order", ["rising", "falling", "equal", "zero"])
def test_rows_in_the_worst_order_are_found(order: str, count: int, way: Way) -> None:
    numbers = torch.arange(400.0)
    steps = {"rising": numbers, "falling": -numbers, "equal": numbers * 0 + 2, "zero": numbers * 0}[order]
    rows, queries = steps[:, None].expand(-1, 2), whole(9, 2)
    assert_same(nearest_rows(queries, rows, count, way=way), nearest_rows_dense(queries, rows, count))


@EVERY
def test_what_is_not_a_number_is_found_first_and_infinities_keep_their_places(way: Way) -> None:
    rows, queries = whole(300, 2), whole(10, 2, seed=3).abs() + 1
    rows[17], rows[203], rows[204, 0] = torch.nan, torch.nan, -torch.nan
    rows[40], rows[250], rows[260] = torch.inf, torch.inf, -torch.inf
    queries[4] = torch.nan  # it is as near to all rows
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = nearest_rows(queries, rows, 5, way=way)
    assert found[1][0].tolist() == [17, 203, 204, 40, 250]
    assert found[1][4].tolist() == [0, 1, 2, 3, 4]
    assert_same(found, nearest_rows_dense(queries, rows, 5))
    last = nearest_rows(queries, rows, 300, way=way)
    assert last[1][0, -1] == 260
    assert_same(last, nearest_rows_dense(queries, rows, 300))


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_search_in_parts_is_the_whole_search(dtype: torch.dtype, way: Way) -> None:
    queries, rows = whole(10, 3).to(dtype), whole(200, 3, seed=1).to(dtype)
    known = None
    for start, stop in ((0, 6), (6, 6), (6, 130), (130, 200)):
        known = nearest_rows(queries, rows[start:stop], 8, first=start, known=known, way=way)
    assert known is not None
    assert_same(known, nearest_rows(queries, rows, 8))
    parts = nearest_rows_dense(queries, rows[:50], 8)
    assert_same(nearest_rows_dense(queries, rows[50:], 8, first=50, known=parts), known)


@EVERY
def test_minus_zero_is_zero_and_the_first_of_them_wins(way: Way) -> None:
    known = torch.tensor([[-0.0, -1.0]]), torch.tensor([[0, 1]])
    similarity, places = nearest_rows(torch.ones(1, 1), torch.zeros(40, 1), 2, first=2, known=known, way=way)
    assert places.tolist() == [[0, 2]]
    assert similarity.tolist() == [[0, 0]]


@EVERY
def test_rounded_products_differ_from_the_references_by_rounding(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_CELLS", 1 << 13)
    generator = torch.Generator().manual_seed(0)
    queries, rows = torch.randn(40, 24, generator=generator), torch.randn(3000, 24, generator=generator)
    similarity, places = nearest_rows(queries, rows, 50, way=way)
    expected = nearest_rows_dense(queries, rows, 50)
    torch.testing.assert_close(similarity, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.einsum("qd,qkd->qk", queries, rows[places]), similarity, rtol=1e-5, atol=1e-5)
    assert (places == expected[1]).float().mean() > 0.99
    assert all(len(set(some)) == 50 for some in places.tolist())


@EVERY
def test_strided_queries_maps_of_files_and_other_precisions_are_searched(way: Way, tmp_path: Path) -> None:
    queries, rows = whole(3, 20)[:, ::2].T, whole(4, 260, seed=1).T[:, :3]
    expected = nearest_rows_dense(queries.contiguous(), rows.contiguous(), 7)
    assert_same(nearest_rows(queries, rows, 7, way=way), expected)
    np.save(tmp_path / "rows.npy", rows.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "rows.npy", mmap_mode="c"))
    assert_same(nearest_rows(queries, mapped, 7, way=way), expected)
    assert_same(nearest_rows(queries, rows.half(), 7, way=way), expected)


@EVERY
def test_neither_gradient_nor_autocast_reaches_in(way: Way) -> None:
    queries, rows = torch.randn(5, 6).requires_grad_(), torch.randn(90, 6).requires_grad_()
    expected = nearest_rows(queries, rows, 4, way=way)
    with torch.autocast("cpu", torch.bfloat16):
        found = nearest_rows(queries, rows, 4, way=way)
        dense = nearest_rows_dense(queries, rows, 4)
    assert_same(found, expected)
    assert not found[0].requires_grad
    assert not dense[0].requires_grad
    torch.testing.assert_close(dense[0], found[0], rtol=1e-5, atol=1e-5)


@EVERY
@pytest.mark.parametrize("order", ["random", "rising"])
def test_all_similarities_are_never_in_memory(order: str, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def watched(pack: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def watching(similarity: Any, rows: Any) -> Any:
            sizes.append(math.prod(similarity.shape))
            return pack(similarity, rows)

        return watching

    for module in (search, screening):
        monkeypatch.setattr(module, "_pack", watched(module._pack))
    monkeypatch.setattr(search, "_CELLS", 1 << 12)
    rows = torch.randn(20000, 1) if order == "random" else torch.arange(20000.0)[:, None]
    queries = torch.ones(7, 1)
    tracemalloc.start()
    nearest_rows(queries, rows, 10, way=way)
    host = tracemalloc.get_traced_memory()[1]  # what numpy holds
    tracemalloc.stop()
    assert max(sizes) <= 1 << 12
    assert host < 7 * 20000
    if way == "screened" and order == "random":  # most rows are passed over
        assert sum(sizes) < 7 * 20000 / 10


@pytest.mark.parametrize(
    ("queries", "rows", "count", "first", "message"),
    [
        ((2, 3), (4, 2), 1, 0, r"queries are \(2, 3\) and rows \(4, 2\)"),
        ((3,), (4, 3), 1, 0, r"\[Q, D\]"),
        ((2, 3), (4, 3), 0, 0, "count is 0"),
        ((2, 3), (4, 3), 1, 2**32 - 3, "32 bits"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    queries: tuple[int, ...], rows: tuple[int, ...], count: int, first: int, message: str
) -> None:
    for find in (nearest_rows, nearest_rows_dense):
        with pytest.raises(ValueError, match=message):
            find(torch.zeros(queries), torch.zeros(rows), count, first=first)


@pytest.mark.parametrize("shapes", [((1, 4), (1, 4)), ((8, 4), (8, 4)), ((5, 4), (5, 3)), ((5,), (5,))])
def test_what_is_known_of_other_queries_is_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    known = torch.zeros(shapes[0]), torch.zeros(shapes[1], dtype=torch.int64)
    for find in (nearest_rows, nearest_rows_dense):
        with pytest.raises(ValueError, match="known are"):
            find(torch.zeros(5, 3), torch.zeros(4, 3), 1, first=9, known=known)


def test_whole_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"torch.int64; give floating-point"):
        nearest_rows(torch.zeros(5, 3, dtype=torch.int64), torch.zeros(4, 3), 1)


def test_other_devices_do_not_screen() -> None:
    with pytest.raises(ValueError, match="only the CPU screens"):
        nearest_rows(torch.zeros(2, 3, device="meta"), torch.zeros(4, 3, device="meta"), 1, way="screened")


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_each_thread_screens_for_queries_of_its_own(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_QUERIES", 4096)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    shares: list[tuple[int, int]] = []

    def watched(queries: Tensor, *given: Any, **named: Any) -> Tensor:
        shares.append((threading.get_ident(), len(queries)))
        assert not torch.is_grad_enabled()
        assert products() == {1}
        return screening.screen(queries, *given, **named)

    monkeypatch.setattr(search, "screen", watched)
    queries, rows = whole(50, 3), whole(300, 3, seed=1)
    assert_same(nearest_rows(queries, rows, 9), nearest_rows_dense(queries, rows, 9))
    assert len(shares) == threads
    assert sum(queries for _, queries in shares) == 50
    assert (threading.get_ident() in dict(shares)) == (threads == 1)


def products() -> set[int]:
    """How many threads products take."""
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def test_products_take_as_many_threads_as_before_after_a_search_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_QUERIES", 4096)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def failing(*given: Any, **named: Any) -> Tensor:
        raise RuntimeError("no memory")

    with threadpool_limits(2, user_api="blas"):
        before = products()
        nearest_rows(whole(50, 3), whole(300, 3, seed=1), 9)
        assert products() == before
        monkeypatch.setattr(search, "screen", failing)
        with pytest.raises(RuntimeError, match="no memory"):
            nearest_rows(whole(50, 3), whole(300, 3, seed=1), 9)
        assert products() == before == {2}


def test_searches_at_one_time_leave_products_their_threads() -> None:
    queries, rows = whole(50, 3), whole(300, 3, seed=1)
    expected = nearest_rows_dense(queries, rows, 9)
    before = products()
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: nearest_rows(queries, rows, 9), range(40)):
            assert_same(found, expected)
    assert products() == before


@EVERY
def test_the_highest_row_numbers_are_found(way: Way) -> None:
    rows = whole(40, 3, seed=1)
    first = 2**32 - 1 - len(rows)
    found = nearest_rows(whole(9, 3), rows, 40, first=first, way=way)
    assert found[1].max() == 2**32 - 2
    assert_same(found, nearest_rows_dense(whole(9, 3), rows, 40, first=first))


@EVERY
def test_vectors_of_no_width_and_more_known_than_asked_for_are_searched(way: Way) -> None:
    with torch.inference_mode():
        found = nearest_rows(torch.ones(9, 0), torch.ones(40, 0), 3, way=way)
    assert found[1].tolist() == [[0, 1, 2]] * 9
    known = nearest_rows(whole(9, 3), whole(40, 3, seed=1), 20, way=way)
    rows = whole(40, 3, seed=2)
    assert_same(
        nearest_rows(whole(9, 3), rows, 4, first=40, known=known, way=way),
        nearest_rows_dense(whole(9, 3), rows, 4, first=40, known=known),
    )
