# SPDX-License-Identifier: Apache-2.0
"""The CPU's way to look through similarities, in numpy: what cannot be among the best is passed over.

Once `count` rows are known for a query, only what beats the last of them can matter, and in a long search that is
little. The survivors are collected until there is no more room, and then the best of them are kept.

In numpy and not in torch, whose every operation would start threads in each of the threads that screen, and whose
product (MKL) does not take the widest instructions of AMD's processors. Only half
precision, which numpy cannot multiply fast, is left to torch.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LOW = (1 << 32) - 1
"""the half of a key that says which row; lower rows have greater keys"""
NOTHING = torch.iinfo(torch.int64).min
"""less than every key"""

_PACKED = 1 << 18  # candidates that are packed at a time, each for a moment several numbers of 8 bytes

Keys = NDArray[np.int64]
Floats = NDArray[np.float32]


def screen(
    queries: Tensor,
    rows: Tensor,
    count: int,
    first: int,
    known: tuple[Tensor, Tensor] | None,
    *,
    width: int,
    room: int,
) -> Tensor:
    """Keys int64 [Q, count], falling, of the best of `rows` [N, D] for `queries` [Q, D] and of what is `known`.

    Rows are counted from `first`, and those that are known have lower numbers. A block has up to `width` rows, and
    `room` candidates beside the best are collected for each query. There are at least `count` candidates.
    """
    best = _Best(len(queries), count, width, room)
    if known is not None:
        best.add(known[0].float().numpy(), known[1].numpy())
    scratch = np.empty(len(queries) * width, np.float32)
    start = 0
    while start < len(rows):
        step = min(width, best.bearable(start + (0 if known is None else first)))
        part = rows[start : start + step].to(queries.device, queries.dtype)  # [n, D]
        best.meet(_products(queries, part, scratch), first + start)
        start += step
    return torch.from_numpy(best.found())


def _products(queries: Tensor, rows: Tensor, scratch: Floats) -> Floats:
    """Dot products of queries [Q, D] with rows [n, D]: [Q, n], in `scratch` where that holds their precision."""
    if queries.dtype != torch.float32:
        return (queries @ rows.T).float().numpy()
    products = scratch[: len(queries) * len(rows)].reshape(len(queries), len(rows))  # [Q, n]
    with np.errstate(all="ignore"):  # what is not a number is found, and needs no warning from here
        np.matmul(queries.numpy(), rows.numpy().T, out=products)
    return products


class _Best:
    """The best candidates of each query so far, and room beside them where more are collected."""

    def __init__(self, queries: int, count: int, width: int, room: int) -> None:
        self.count, self.room = count, room
        self.keys = np.full((queries, count + room), NOTHING, np.int64)  # [Q, count + room]
        self.used = 0  # columns that are in use for every query
        self.collected = np.zeros(queries, np.int64)  # [Q] candidates beyond `used`
        self.least: Floats | None = None  # [Q, 1] the last of `count` candidates, once there are so many
        self.mask = np.empty(queries * width, np.bool_)

    def bearable(self, seen: int) -> int:
        """How many rows may come next if what survives of them is to find room, after `seen` rows in any order."""
        if self.least is None:  # all of them survive
            return self.keys.shape[1] - self.used
        return max(self.room // 2, seen * self.room // (2 * self.count))

    def meet(self, similarity: Floats, first: int) -> None:
        """Take the similarities [Q, n] with the rows from `first` on; they come by rising row."""
        if self.least is None or not self._screen(similarity, self.least, first):
            self.add(similarity, np.arange(first, first + similarity.shape[1])[None, :])

    def add(self, similarity: Floats, rows: Keys) -> None:
        """Take candidates [Q, n] whatever they are, rows [Q, n] or [1, n]."""
        self._choose()
        start, stop = 0, similarity.shape[1]
        while start < stop:
            step = min(stop - start, self.keys.shape[1] - self.used, max(1, _PACKED // len(self.keys)))
            some = slice(start, start + step)
            self.keys[:, self.used : self.used + step] = _pack(similarity[:, some], rows[:, some])
            self.used, start = self.used + step, start + step
            if self.used == self.keys.shape[1]:
                self._choose()
        self._choose()

    def found(self) -> Keys:
        """Give the best, in order."""
        self._choose()
        self.keys[:, : self.count].sort(axis=1)
        return self.keys[:, : self.count][:, ::-1].copy()

    def _choose(self) -> None:
        """Keep the `count` best of all candidates, if there are so many, and make room."""
        extent = self.used + int(self.collected.max())
        if extent > self.count:
            self.keys[:, :extent].partition(extent - self.count, axis=1)
            self.keys[:, : self.count] = self.keys[:, extent - self.count : extent]
            self.keys[:, self.count : extent] = NOTHING
        if extent >= self.count and (extent > self.count or self.least is None):
            self.used = self.count
            self.collected[:] = 0
            least = _similarity(self.keys[:, : self.count].min(axis=1, keepdims=True))  # [Q, 1]
            self.least = np.where(np.isnan(least), np.float32(np.inf), least)

    def _screen(self, similarity: Floats, least: Floats, first: int) -> bool:
        """Collect what beats the last of the best; False, and nothing done, where that is much.

        A row that only equals the last one has a higher number, and so cannot take its place.
        """
        queries, width = similarity.shape
        mask = self.mask[: queries * width]
        np.less_equal(similarity, least, out=mask.reshape(queries, width))
        np.logical_not(mask, out=mask)  # rather than greater: what is not a number survives
        cells = np.flatnonzero(mask)  # [S] by query, then by row
        ends = np.searchsorted(cells, np.arange(queries + 1) * width)  # [Q + 1]
        counts = np.diff(ends)  # [Q]
        if counts.max() > self.room:
            if not self.collected.any():
                return False
            self._choose()  # the last of the best is greater now, and fewer survive
            assert self.least is not None
            return self._screen(similarity, self.least, first)
        if (self.collected + counts).max() > self.room:
            self._choose()
        query = np.arange(queries)
        row = cells - np.repeat(query * width - first, counts)  # [S]
        place = np.repeat(query * self.keys.shape[1] + self.used + self.collected - ends[:-1], counts)
        place += np.arange(len(cells))  # [S]
        self.keys.reshape(-1)[place] = _pack(similarity.reshape(-1)[cells], row)
        self.collected += counts
        return True


def _pack(similarity: Floats, rows: Keys) -> Keys:
    """Join similarities and rows, which are broadcast, into numbers that are greater for the better candidate."""
    similarity = np.where(np.isnan(similarity), np.float32(np.nan), similarity + np.float32(0.0))  # one NaN, one zero
    bits = similarity.view(np.int32)
    rising = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64)  # in the order of the similarities
    keys: Keys = (rising << 32) | (LOW - rows)
    return keys


def _similarity(keys: Keys) -> Floats:
    """The similarities in keys."""
    rising = (keys >> 32).astype(np.int32)
    return (rising ^ ((rising >> 31) & 0x7FFFFFFF)).view(np.float32)
