# SPDX-License-Identifier: Apache-2.0
"""Exact search for the rows most similar to each query, without the matrix of all similarities.

Rows are multiplied in blocks that stay in the processor's cache. On a CPU a block is screened: once `count` rows are
known for a query, only what beats the last of them can matter, and in a long search that is little. The survivors are
collected until there is no more room, and then the best of them are kept.

Candidates are 64-bit whole numbers, similarity above and row below, so one comparison of numbers settles everything:
the greater similarity wins, of equal ones the lower row. A similarity that is not a number counts as greater than all
others, as in `torch.topk`, so it is found and does not vanish.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Found = tuple[Tensor, Tensor]
"""Similarity `[Q, c]`, falling, and rows int64 `[Q, c]`."""

_QUERIES = 4096  # queries that meet a block of rows together
_CELLS = 1 << 22  # similarities of a block: 16 MB, on a CPU a part of the third-level cache
_KEYS = 1 << 22  # candidates that are kept at a time: 32 MB
_NARROWEST = 256  # rows of a block, however many queries meet it
_ROOM = 512  # least number of candidates that are collected beside the best
_NOTHING = torch.iinfo(torch.int64).min  # less than every candidate
_LOW = (1 << 32) - 1


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
    screened: bool | None = None,
) -> Found:
    """Find for each of `queries` [Q, D] the `count` of `rows` [N, D] with the greatest dot product.

    Gives similarities [Q, min(count, N)] in the queries' precision, falling, and row numbers int64, counted from
    `first`, both on the queries' device. Of equal similarities the lower row wins; one that is not a number wins over
    all others.

    `rows` may be a map of a file, or lie on another device or in another precision: they are fetched block by block.
    A search in parts hands on what is `known` of earlier parts, with lower row numbers. `screened` chooses how a block
    is looked through: by comparison with what is known (the CPU's way), or by selecting from all of it (elsewhere,
    where the host would have to wait for the number of survivors). Both find the same.

    Never holds all similarities: memory is that of the result, some 16 bytes for each of its candidates, and of blocks
    of up to 4 million similarities. No gradient, and no autocast. Raises
    `ValueError` where shapes do not fit, `count` is not positive, row numbers leave 32 bits, or a device is to screen.
    """
    _check(queries, rows, count, first)
    on_cpu = queries.device.type == "cpu"
    if screened and not on_cpu:
        raise ValueError(f"only the CPU screens, and the queries are on {queries.device}; leave screened=None")
    screened = on_cpu if screened is None else screened
    most = min(_QUERIES, max(1, _KEYS // (count + max(count, _ROOM))))
    chunks = max(1, -(-len(queries) // most))
    each = -(-len(queries) // chunks)  # equal chunks, so that none is a rest of a few queries
    found: list[Found] = []
    with torch.autocast(queries.device.type, enabled=False):
        for begin in range(0, max(1, len(queries)), max(1, each)):
            some = slice(begin, begin + each)
            before = None if known is None else (known[0][some], known[1][some])
            found.append(_search(queries[some], rows, count, first, before, screened))
    return (torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])) if chunks > 1 else found[0]


def _check(queries: Tensor, rows: Tensor, count: int, first: int) -> None:
    if queries.ndim != 2 or rows.ndim != 2 or queries.shape[1] != rows.shape[1]:
        raise ValueError(f"queries are {tuple(queries.shape)} and rows {tuple(rows.shape)}; give [Q, D] and [N, D]")
    if count < 1:
        raise ValueError(f"count is {count}; at least one row is asked for")
    if first < 0 or first + len(rows) > _LOW:
        raise ValueError(f"row numbers {first} to {first + len(rows)} do not fit in 32 bits")


def _search(queries: Tensor, rows: Tensor, count: int, first: int, known: Found | None, screened: bool) -> Found:
    """Search for few queries."""
    width = max(_NARROWEST, _CELLS // max(1, len(queries)))
    if queries.dtype == torch.float64:  # a key has no room for it
        for start in range(0, max(1, len(rows)), width):
            known = nearest_rows_dense(queries, rows[start : start + width], count, first=first + start, known=known)
        assert known is not None
        return known
    width = max(1, min(width, len(rows)))
    count = min(count, len(rows) + (0 if known is None else known[0].shape[1]))
    if not len(queries) or not count:
        return queries.new_empty(len(queries), count), queries.new_empty(len(queries), count, dtype=torch.int64)
    queries = queries.detach()
    best = _Best(len(queries), count, width, queries.device, screened)
    if known is not None:
        best.add(known[0].float(), known[1])
    scratch = torch.empty(len(queries) * width, dtype=queries.dtype, device=queries.device)
    start = 0
    while start < len(rows):
        step = min(width, best.bearable(start + (0 if known is None else first))) if screened else width
        part = rows[start : start + step].to(queries.device, queries.dtype)  # [n, D]
        product = scratch[: len(queries) * len(part)].view(len(queries), len(part))  # [Q, n]
        _multiply(queries, part, product)
        best.meet(product.float(), first + start)
        start += step
    similarity, places = best.found()
    return similarity.to(queries.dtype), places


def _multiply(queries: Tensor, rows: Tensor, out: Tensor) -> None:
    """Write the dot products of queries [Q, D] with rows [n, D] to `out` [Q, n]."""
    if queries.device.type == "cpu" and queries.dtype == torch.float32:
        # numpy's product (OpenBLAS) where torch's (MKL) does not take a processor's widest instructions, as on AMD's:
        # 160 to 180 against 110 to 150 billion operations a second on two cores.
        with np.errstate(all="ignore"):  # what is not a number is found, and needs no warning from here
            np.matmul(queries.numpy(), rows.numpy().T, out=out.numpy())
    else:
        torch.mm(queries, rows.T, out=out)


class _Best:
    """The best candidates of each query so far, and room beside them where more are collected."""

    def __init__(self, queries: int, count: int, width: int, device: torch.device, screened: bool) -> None:
        self.count, self.screened = count, screened
        self.room = max(count, _ROOM) if screened else width
        shape = (queries, count + self.room)
        self.keys = torch.full(shape, _NOTHING, dtype=torch.int64, device=device)  # [Q, count + room]
        self.used = 0  # columns that are in use for every query
        self.least: Tensor | None = None  # [Q, 1] the last of `count` candidates, once there are so many
        if screened:
            self.collected = np.zeros(queries, np.int64)  # [Q] candidates beyond `used`
            self.mask = np.empty(queries * width, np.bool_)

    def bearable(self, seen: int) -> int:
        """How many rows may come next if what survives of them is to find room, after `seen` rows in any order."""
        if self.least is None:  # all of them survive
            return self.keys.shape[1] - self.used
        return max(self.room // 2, seen * self.room // (2 * self.count))

    def meet(self, similarity: Tensor, first: int) -> None:
        """Take the similarities [Q, n] with the rows from `first` on; they come by rising row."""
        if self.screened and self.least is not None and self._screen(similarity, first):
            return
        self.add(similarity, torch.arange(first, first + similarity.shape[1], device=similarity.device))

    def add(self, similarity: Tensor, rows: Tensor) -> None:
        """Take candidates [Q, n] whatever they are, rows [Q, n] or [n]."""
        self._choose()
        start, stop = 0, similarity.shape[1]
        while start < stop:
            step = min(stop - start, self.keys.shape[1] - self.used)
            some = slice(start, start + step)
            self.keys[:, self.used : self.used + step] = _pack(similarity[:, some], rows[..., some])
            self.used, start = self.used + step, start + step
            self._choose()

    def found(self) -> Found:
        """Give the best, in order."""
        self._choose()
        return _unpack(self.keys[:, : self.used].sort(dim=1, descending=True).values)

    def _choose(self) -> None:
        """Keep the `count` best of all candidates, if there are so many, and make room."""
        extent = self.used + (int(self.collected.max()) if self.screened else 0)
        if extent > self.count:
            self.keys[:, : self.count] = self.keys[:, :extent].topk(self.count, dim=1, sorted=False).values
            self.keys[:, self.count : extent] = _NOTHING
        if extent >= self.count and (extent > self.count or self.least is None):
            self.used = self.count
            if self.screened:
                self.collected[:] = 0
                least = _unpack(self.keys[:, : self.count].amin(dim=1, keepdim=True))[0]
                self.least = torch.where(least.isnan(), torch.inf, least)

    def _screen(self, similarity: Tensor, first: int) -> bool:
        """Collect what beats the last of the best; False, and nothing done, where that is much.

        A row that only equals the last one has a higher number, and so cannot take its place.
        """
        queries, width = similarity.shape
        assert self.least is not None
        mask = self.mask[: queries * width]
        np.less_equal(similarity.numpy(), self.least.numpy(), out=mask.reshape(queries, width))
        np.logical_not(mask, out=mask)  # rather than greater: what is not a number survives
        cells = np.flatnonzero(mask)  # [S] by query, then by row
        ends = np.searchsorted(cells, np.arange(queries + 1) * width)  # [Q + 1]
        counts = np.diff(ends)  # [Q]
        if counts.max() > self.room:
            if not self.collected.any():
                return False
            self._choose()  # the last of the best is greater now, and fewer survive
            return self._screen(similarity, first)
        if (self.collected + counts).max() > self.room:
            self._choose()
        query = np.arange(queries)
        row = cells - np.repeat(query * width - first, counts)  # [S]
        place = np.repeat(query * self.keys.shape[1] + self.used + self.collected - ends[:-1], counts)
        place += np.arange(len(cells))  # [S]
        values = similarity.numpy().reshape(-1)[cells]  # [S]
        self.keys.numpy().reshape(-1)[place] = _pack_host(values, row)
        self.collected += counts
        return True


def _pack(similarity: Tensor, rows: Tensor) -> Tensor:
    """Join similarity and row into one number that is greater for the better candidate; both of one shape."""
    similarity = torch.where(similarity.isnan(), torch.nan, similarity.float() + 0.0)  # one NaN, and one zero
    bits = similarity.view(torch.int32)
    # Whole numbers in the order of the similarities.
    rising = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits).to(torch.int64)
    return rising.bitwise_left_shift_(32).bitwise_or_(_LOW - rows)


def _pack_host(similarity: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Say what `_pack` says, in numpy: between two of its products torch's threads would stand in its threads' way."""
    similarity = np.where(np.isnan(similarity), np.float32(np.nan), similarity + np.float32(0.0))
    bits = similarity.view(np.int32)
    rising = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64)
    return (rising << 32) | (_LOW - rows)


def _unpack(keys: Tensor) -> Found:
    rising = (keys >> 32).to(torch.int32)
    bits = rising ^ ((rising >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32), _LOW - (keys & _LOW)
