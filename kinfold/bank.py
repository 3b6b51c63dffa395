# SPDX-License-Identifier: Apache-2.0
"""The rows of a bank, divided over the processes: found, compared with, written, each by the rank that holds it.

`[N, D]` rows for N images are consecutive shares of nearly the same size, one a rank (`distributed.share`). A rank
searches its share for the queries of all ranks, so each query is held against every row once, wherever it was asked:

    queries [B, D]      gathered to Q = B · ranks, in global order
    its share           the M nearest of it for all Q, and the rows looked up that it has
    dealt back          [ranks, B, M], of which the rank that asks keeps the M nearest

What travels are similarities and row numbers, never rows: 12 · M bytes a query and rank, and 4 · M for the gradient.
The gradient goes the same way back; an owner adds up its rows, each weighted with the gradient of its similarity, and
the sums of the owners are added. With all rows in one place nothing travels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kinfold import distributed
from kinfold.kernels.search import nearest_rows

_FETCHED = 2**22  # numbers fetched at once when rows are looked up: 16 MB in single precision


class _Similar(torch.autograd.Function):
    """Similarities `[Q, M + P]` of queries with chosen rows, where those of the first M are known from the search.

    `picked` is -1 where a row is not here: the similarity is 0, with no gradient. Neither direction holds the rows
    `[Q, M + P, D]` at once: half a gigabyte for 256 queries with 4,181 rows of 128.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, points: Tensor, known: Tensor, found: Tensor, picked: Tensor) -> Tensor:
        ctx.save_for_backward(points, torch.cat([found, picked], dim=1))
        size = max(1, _FETCHED // (picked.shape[1] * points.shape[1]))
        looked = [
            torch.einsum("qd,qpd->qp", some, points[rows.clamp(min=0)]).masked_fill(rows < 0, 0.0)  # [<= size, P]
            for some, rows in zip(torch.split(q, size), torch.split(picked, size))
        ]
        return torch.cat([known, torch.cat(looked)], dim=1)  # [Q, M + P]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        points, rows = ctx.saved_tensors
        weights = gradient.masked_fill(rows < 0, 0.0)  # [Q, M + P]
        # The sum of the chosen rows, each with its gradient as weight.
        bag = F.embedding_bag(rows.clamp(min=0), points, per_sample_weights=weights, mode="sum")  # [Q, D]
        return bag, None, None, None, None


def compare_with_rows(
    q: Tensor, points: Tensor, images: Tensor, count: int, *, first: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Hold queries `[Q, D]` against the rows `[N, D]` of the images from `first` on.

    Returns similarity and image `[Q, M]` of the M = min(count, N) nearest, by falling similarity and of equal ones the
    lowest image first, and the similarity `[Q, P]` of the `images` `[Q, P]`, 0 where an image is not among the rows.
    The gradient reaches the queries.
    """
    with torch.no_grad():
        known, found = nearest_rows(q.detach(), points, count)  # [Q, M] each
        here = (images >= first) & (images < first + len(points))  # [Q, P]
        picked = torch.where(here, images - first, -1)  # [Q, P]
    similar: Tensor = _Similar.apply(q, points, known, found, picked)  # [Q, M + P]
    width = found.shape[1]
    return similar[:, :width], found + first, similar[:, width:]


def compare_with_shares(
    q: Tensor, points: Tensor, images: Tensor, count: int, *, rows: range, total: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Hold the queries of all ranks against a bank of `total` images, divided over them; the points are of `rows`.

    Queries `[Q, D]` and images `[Q, P]` are in global order, Q = B · ranks. Returns what `compare_with_rows` would for
    this rank's B queries and the whole bank, and carries the gradient to the ranks that the queries are from.
    """
    similarity, found, looked = compare_with_rows(q, points, images, count, first=rows.start)
    most = min(count, -(-total // distributed.world()))  # shares differ by a row; what travels must not
    missing = most - found.shape[1]
    values = torch.cat([F.pad(similarity, (0, missing), value=float("-inf")), looked], dim=1)  # [Q, most + P]
    values = distributed.deal(values)  # [ranks, B, most + P]
    found = distributed.deal(F.pad(found, (0, missing), value=-1))  # [ranks, B, most]
    # Shares come in the order of their images and each by falling similarity, so a stable sort keeps the lowest first.
    similarity, order = values[:, :, :most].transpose(0, 1).flatten(1).sort(dim=1, descending=True, stable=True)
    found = found.transpose(0, 1).flatten(1).gather(1, order)  # [B, ranks · most]
    kept = min(count, total)
    # Each image is looked up by the one rank that has it: the others' zeros change nothing.
    return similarity[:, :kept], found[:, :kept], values[:, :, most:].sum(0)


@torch.no_grad()
def move_rows_(points: Tensor, images: Tensor, features: Tensor, *, keep: float, first: int = 0) -> None:
    """Move the rows of `images` `[Q]` towards `features` `[Q, D]`: v ← unit(keep · v + (1 − keep) · f).

    `points` are the rows from `first` on; other images are passed over. An image that stands there twice must have
    the same features both times.
    """
    rows = images - first  # [Q]
    here = (rows >= 0) & (rows < len(points))  # [Q]
    # What is not here writes the same as something that is (or the old row, if nothing is): selecting by a mask would
    # make a device wait, for the size of the result is known only there.
    stand_in = torch.where(here, torch.arange(len(rows), device=rows.device), here.int().argmax())  # [Q]
    rows = rows[stand_in].clamp(0, len(points) - 1)  # [Q]
    old = points[rows]  # [Q, D]
    new = F.normalize(torch.lerp(features[stand_in].to(points.dtype), old, keep), dim=1)  # [Q, D]
    points[rows] = torch.where(here.any(), new, old)


def last_of_each(images: Tensor) -> Tensor:
    """For each position of `images` `[Q]` the last position `[Q]` that has the same image."""
    ordered, order = images.sort(stable=True)
    return order[torch.searchsorted(ordered, images, right=True) - 1]  # [Q]


def fresh_rows(images: int, dimension: int, rows: range, *, block: int = 65536) -> Tensor:
    """These rows of a new bank `[N, D]` with entries in ±√(3/D), so of a length of about one.

    All N are drawn, a block at a time, so that a row is the same for any number of processes.
    """
    bound = (3.0 / dimension) ** 0.5
    points = torch.empty(len(rows), dimension)  # [rows, D]
    for start in range(0, images, block):
        drawn = torch.empty(min(block, images - start), dimension).uniform_(-bound, bound)  # [<= block, D]
        low, high = max(rows.start, start), min(rows.stop, start + len(drawn))
        if low < high:
            points[low - rows.start : high - rows.start] = drawn[low - start : high - start]
    return points
