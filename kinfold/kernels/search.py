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

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Literal

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


@torch.no_grad()
def nearest_rows_dense(
    queries: Tensor, rows: Tensor, count: int, *, first: int = 0, known: Found | None = None
) -> Found:
    """Say what `nearest_rows` says from one product and one sort: the plain reference.

    Takes memory for all Q · N similarities, several times.
    """
    _check(queries, rows, count, first)
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

    Gives similarities [Q, min(count, N)] in the queries' precision, falling, and row numbers int64, counted from
    `first`, both on the queries' device. Of equal similarities the lower row wins; one that is not a number wins over
    all others.

    `rows` may be a map of a file, or lie on another device or in another precision: they are fetched block by block.
    A search in parts hands on what is `known` of earlier parts, with lower row numbers. There are two ways to look
    through similarities, and both find the same: a block is `screened` by comparison with what is known (the CPU's
    way), or `selected` from as it is (elsewhere, where the host would have to wait for the number of survivors).

    Memory is that of the result, some 16 bytes for each of its candidates, and of blocks of up to 4 million
    similarities, all threads together. No gradient, and no autocast. Raises `ValueError` where shapes do not fit,
    `count` is not positive, row numbers leave 32 bits, or a device is to screen.
    """
    _check(queries, rows, count, first)
    on_cpu = queries.device.type == "cpu"
    if way == "screened" and not on_cpu:
        raise ValueError(f"only the CPU screens, and the queries are on {queries.device}; leave way=None")
    queries, rows = queries.detach(), rows.detach()
    count = min(count, len(rows) + (0 if known is None else known[0].shape[1]))
    if not len(queries) or not count:
        return queries.new_empty(len(queries), count), queries.new_empty(len(queries), count, dtype=torch.int64)
    with torch.autocast(queries.device.type, enabled=False):
        if queries.dtype == torch.float64:  # a key has no room for it
            return _by_blocks(queries, rows, count, first, known)
        search = _screened if on_cpu and way != "selected" else _selected
        keys = search(queries, rows, count, first, known)
        similarity, places = _unpack(keys)
        return similarity.to(queries.dtype), places


def _check(queries: Tensor, rows: Tensor, count: int, first: int) -> None:
    if queries.ndim != 2 or rows.ndim != 2 or queries.shape[1] != rows.shape[1]:
        raise ValueError(f"queries are {tuple(queries.shape)} and rows {tuple(rows.shape)}; give [Q, D] and [N, D]")
    if count < 1:
        raise ValueError(f"count is {count}; at least one row is asked for")
    if first < 0 or first + len(rows) > LOW:
        raise ValueError(f"row numbers {first} to {first + len(rows)} do not fit in 32 bits")


def _chunks(queries: int, count: int, threads: int = 1) -> list[slice]:
    """Cut queries into parts of nearly one size, none of them a rest of a few, that each have their room in memory."""
    most = min(_QUERIES, max(1, _KEYS // threads // (count + max(count, _ROOM))))
    parts = max(-(-queries // most), min(threads, queries // _FEWEST), 1)
    each = -(-queries // parts)
    return [slice(start, start + each) for start in range(0, queries, each)]


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
        return torch.cat([some_of(part) for part in parts])
    with _libraries().limit(limits=1, user_api="blas"), ThreadPoolExecutor(min(threads, len(parts))) as pool:
        return torch.cat(list(pool.map(some_of, parts)))


@cache
def _libraries() -> ThreadpoolController:
    """The libraries of this process that have threads of their own; to look for them takes a while."""
    return ThreadpoolController()


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
    """Join similarity and row into one number that is greater for the better candidate; both of one shape."""
    similarity = torch.where(similarity.isnan(), torch.nan, similarity.float() + 0.0)  # one NaN, and one zero
    bits = similarity.view(torch.int32)
    # Whole numbers in the order of the similarities.
    rising = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits).to(torch.int64)
    return rising.bitwise_left_shift_(32).bitwise_or_(LOW - rows)


def _unpack(keys: Tensor) -> Found:
    rising = (keys >> 32).to(torch.int32)
    bits = rising ^ ((rising >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32), LOW - (keys & LOW)
