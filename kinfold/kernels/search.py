# SPDX-License-Identifier: Apache-2.0
"""Exact search for the rows most similar to each query, in memory that does not grow with the number of rows.

Rows are multiplied in blocks that stay in the processor's cache. On a CPU a block is screened
(`kinfold.kernels.screening`), by each thread for queries of its own. Elsewhere the best are selected from each block as
it is.

Candidates are 64-bit whole numbers, similarity above and row below, so one comparison of numbers settles everything:
the greater similarity wins, of equal ones the lower row. A similarity that is not a number counts as greater than all
others, as in `torch.topk`, so it is found and does not vanish.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any, Literal

import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from kinfold.kernels.screening import LOW, screen

Found = tuple[Tensor, Tensor]
"""Similarity `[Q, c]`, falling, and rows int64 `[Q, c]`."""

Way = Literal["screened", "selected"]
"""How `nearest_rows` looks through similarities."""

_QUERIES = 4096  # queries that meet a block of rows together
_CELLS = 1 << 22  # similarities of a block: 16 MB; half on a CPU, for all threads, a part of the third-level cache
_KEYS = 1 << 22  # candidates that all threads keep at a time: 32 MB
_NARROWEST = 256  # rows of a block, however many queries meet it
_ROOM = 512  # least number of candidates that are collected beside the best
_FEWEST = 16  # queries that are worth a thread

_multiplying = Lock()  # held where the threads of products are set, which are the whole process's


@torch.no_grad()
def nearest_rows_dense(
    queries: Tensor, rows: Tensor, count: int, *, first: int = 0, known: Found | None = None
) -> Found:
    """Say what `nearest_rows` says from one product and one sort: the plain reference.

    Takes memory for all Q · N similarities, several times.
    """
    _check(queries, rows, count, first, known)
    with torch.autocast(queries.device.type, enabled=False):
        similarity = queries @ rows.to(queries.device, queries.dtype).T  # [Q, N]
    places = torch.arange(first, first + len(rows), device=queries.device).expand(similarity.shape)  # [Q, N]
    if known is not None:
        similarity, places = torch.cat([known[0], similarity], dim=1), torch.cat([known[1], places], dim=1)
    similarity, order = similarity.sort(dim=1, descending=True, stable=True)
    return similarity[:, :count], places.gather(1, order)[:, :count]


@torch.no_grad()
def nearest_rows(
    queries: Tensor,
    rows: Tensor,
    count: int,
    *,
    first: int = 0,
    known: Found | None = None,
    way: Way | None = None,
) -> Found:
    """Find for each of `queries` [Q, D] the `count` of `rows` [N, D] with the greatest dot product.

    Gives similarities [Q, c] in the queries' precision, falling, and row numbers int64, counted from `first`, both on
    the queries' device; c is `count`, or all there are if they are fewer. Of equal similarities the lower row wins; one
    that is not a number wins over all others.

    `rows` may be a map of a file, or lie on another device or in another precision: they are fetched block by block.
    A search in parts hands on what is `known` of earlier parts, with lower row numbers. There are two ways to look
    through similarities, and both find the same: a block is `screened` by comparison with what is known (the CPU's
    way), or `selected` from as it is (elsewhere, where the host would have to wait for the number of survivors).
    Queries in double precision, which has no room beside a row, take the reference's way block by block.

    Memory is up to 32 bytes for each candidate of the result, itself included, and blocks of up to 4 million
    similarities, all threads together. No gradient, and no autocast. Raises `ValueError` where shapes do not fit,
    queries are whole numbers, `count` is not positive, row numbers leave 32 bits, or a device is to screen.
    """
    _check(queries, rows, count, first, known)
    on_cpu = queries.device.type == "cpu"
    if way == "screened" and not on_cpu:
        raise ValueError(f"only the CPU screens, and the queries are on {queries.device}; leave way=None")
    queries, rows = queries.detach(), rows.detach()
    count = min(count, len(rows) + (0 if known is None else known[0].shape[1]))
    if not len(queries) or not count:
        return queries.new_empty(len(queries), count), queries.new_empty(len(queries), count, dtype=torch.int64)
    with torch.autocast(queries.device.type, enabled=False):
        if queries.dtype == torch.float64:
            return _by_blocks(queries, rows, count, first, known)
        search = _screened if on_cpu and way != "selected" else _selected
        keys = search(queries, rows, count, first, known)
        similarity, places = _unpack(keys)
        return similarity.to(queries.dtype), places


def _check(queries: Tensor, rows: Tensor, count: int, first: int, known: Found | None) -> None:
    if queries.ndim != 2 or rows.ndim != 2 or queries.shape[1] != rows.shape[1]:
        raise ValueError(f"queries are {tuple(queries.shape)} and rows {tuple(rows.shape)}; give [Q, D] and [N, D]")
    if not queries.dtype.is_floating_point:
        raise ValueError(f"queries are {queries.dtype}; give floating-point numbers")
    if known is not None and not (
        known[0].ndim == 2 and len(known[0]) == len(queries) and known[0].shape == known[1].shape
    ):
        shapes = " and ".join(str(tuple(part.shape)) for part in known)
        raise ValueError(f"known are {shapes} for {len(queries)} queries; give two of [Q, c]")
    if count < 1:
        raise ValueError(f"count is {count}; at least one row is asked for")
    if first < 0 or first + len(rows) > LOW:
        raise ValueError(f"row numbers {first} to {first + len(rows)} do not fit in 32 bits")


def _chunks(queries: int, count: int, threads: int = 1) -> list[slice]:
    """Cut queries into parts of one size, to within one query, that each have their room in memory."""
    most = min(_QUERIES, max(1, _KEYS // threads // (count + max(count, _ROOM))))
    parts = max(-(-queries // most), min(threads, queries // _FEWEST), 1)
    return [slice(queries * i // parts, queries * (i + 1) // parts) for i in range(parts)]


def _part(known: Found | None, some: slice) -> Found | None:
    return None if known is None else (known[0][some], known[1][some])


def _by_blocks(queries: Tensor, rows: Tensor, count: int, first: int, known: Found | None) -> Found:
    """The reference, a block of rows after another."""
    found: list[Found] = []
    for some in _chunks(len(queries), count):
        best, asked = _part(known, some), queries[some]
        width = max(_NARROWEST, _CELLS // len(asked))
        for start in range(0, max(1, len(rows)), width):
            best = nearest_rows_dense(asked, rows[start : start + width], count, first=first + start, known=best)
        assert best is not None
        found.append(best)
    return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])


def _screened(queries: Tensor, rows: Tensor, count: int, first: int, known: Found | None) -> Tensor:
    """Keys [Q, c], falling, by threads that each have queries of their own.

    One product by all threads would leave all but one of them idle while a block is looked through.
    """
    threads = torch.get_num_threads()

    def some_of(some: slice) -> Tensor:
        with torch.no_grad():  # which is told to each thread
            return screen(
                queries[some],
                rows,
                count,
                first,
                _part(known, some),
                width=max(_NARROWEST, _CELLS // 2 // threads // len(queries[some])),  # survivors take as much again
                room=max(count, _ROOM),
            )

    parts = _chunks(len(queries), count, threads)
    if threads == 1 or len(parts) == 1:
        with _threads_a_product(threads):
            return torch.cat([some_of(part) for part in parts])
    with _threads_a_product(1), ThreadPoolExecutor(min(threads, len(parts))) as pool:
        return torch.cat(list(pool.map(some_of, parts)))


@contextmanager
def _threads_a_product(threads: int) -> Iterator[None]:
    """Let one of numpy's products take so many threads, for one search at a time."""
    with _multiplying, _blas().limit(limits=threads):
        yield


@cache
def _blas() -> Any:
    """The libraries that multiply for this process; to look for them takes a while."""
    return ThreadpoolController().select(user_api="blas")


def _selected(queries: Tensor, rows: Tensor, count: int, first: int, known: Found | None) -> Tensor:
    """Keys [Q, c], falling, selected from each block and the best of those before; the host waits for nothing."""
    found: list[Tensor] = []
    for some in _chunks(len(queries), count):
        asked, before = queries[some], _part(known, some)
        width = max(_NARROWEST, _CELLS // len(asked))
        best = asked.new_empty(len(asked), 0, dtype=torch.int64) if before is None else _pack(before[0], before[1])
        for start in range(0, len(rows), width):
            part = rows[start : start + width].to(asked.device, asked.dtype)  # [n, D]
            places = torch.arange(first + start, first + start + len(part), device=asked.device)  # [n]
            best = torch.cat([best, _pack(asked @ part.T, places)], dim=1)  # [q, c + n]
            best = best.topk(min(count, best.shape[1]), dim=1, sorted=False).values  # [q, c]
        found.append(best.sort(dim=1, descending=True).values[:, :count])
    return torch.cat(found)


def _pack(similarity: Tensor, rows: Tensor) -> Tensor:
    """Join similarities and rows, which are broadcast, into numbers that are greater for the better candidate."""
    similarity = torch.where(similarity.isnan(), torch.nan, similarity.float() + 0.0)  # one NaN, and one zero
    bits = similarity.view(torch.int32)
    # Whole numbers in the order of the similarities.
    rising = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits).to(torch.int64)
    return rising.bitwise_left_shift_(32).bitwise_or_(LOW - rows)


def _unpack(keys: Tensor) -> Found:
    rows = LOW - (keys & LOW)
    rising = (keys >> 32).to(torch.int32)
    return (rising ^ ((rising >> 31) & 0x7FFFFFFF)).view(torch.float32), rows
