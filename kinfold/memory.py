# SPDX-License-Identifier: Apache-2.0
"""Question 2, memory: how the keys of other images are remembered.

`Queue` keeps the most recent keys (MoCo and all that stand on it), or none but those of the batch itself; `Bank`
keeps one key per image and joins the images to a graph of neighbours (InvP). `compare` only reads, `remember` only
writes, after the optimiser's step. All state is buffers, so a state dict is everything. In several processes every
rank remembers the gathered batch in one order, so the memories stay equal without being sent; the keys of a bank are
divided, each rank remembering those of its share.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from kinfold import distributed
from kinfold.bank import compare_with_rows, compare_with_shares, fresh_rows, last_of_each, move_rows_
from kinfold.errors import UserError
from kinfold.settings import settings

Memo = tuple[Tensor, ...]
"""What a memory wants back after the step: tensors that are joined along their first axis over micro-batches."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What one pair of views looks like to the memory: cosine similarities with K candidate keys.

    `image` says whose key a column is, -1 where a row has no such column. `nearest` and `reached` are spans of
    columns and only a bank has them.
    """

    by_query: Tensor
    """`[B, K]` as the query encoder sees the keys; carries the gradient"""
    own: Tensor
    """`[B]` int64, the column of each query's own key"""
    by_key: Tensor | None = None
    """`[B, K]` as the key encoder sees them; never carries a gradient; None without a key encoder"""
    image: Tensor | None = None
    """`[B, K]` int64, the image of each column"""
    nearest: slice | None = None
    """the M nearest keys of the bank, by falling similarity"""
    reached: slice | None = None
    """the P images reached by walking the neighbour graph"""


class Memory(nn.Module, ABC):
    """Remembers keys. Abstract; `Queue` and `Bank` are final."""

    @abstractmethod
    def compare(self, q: Tensor, keys: Tensor | None, index: Tensor) -> tuple[Comparison, Memo]:
        """Hold the queries `[B, D]` of this rank's images `index` `[B]` against the remembered keys.

        `keys` `[B · ranks, D]` are the own keys of the whole batch in global order, None without a key encoder.
        """

    @abstractmethod
    def remember(self, memos: list[Memo]) -> None:
        """Write what `compare` asked back, one memo a key view, after the optimiser's step."""


@settings
class QueueMemory:
    """A queue of the most recent keys (MoCo, 2020, section 3.1)."""

    name: Literal["queue"] = "queue"
    size: Annotated[int, Field(ge=1)] = 65536
    """K, how many keys are remembered; any number, the queue wraps"""
    batch_keys: bool = False
    """the keys of the batch itself are candidates too, before the queue's (eztorch's `use_keys`)"""


@settings
class BatchMemory:
    """No memory beyond the step: the candidates are the keys of the gathered batch, as in SimCLR.

    Differs from SimCLR's published form: keys carry no gradient, and a query meets the keys of one view only, while
    SimCLR also has the other images' embeddings of the query's own view among the negatives, 2 (N - 1) in all for N
    images. With `key_momentum.start: 0` and symmetric pairs both views are pulled, each in its turn as the query.
    """

    name: Literal["batch"] = "batch"


@settings
class BankMemory:
    """One key per image of the set, and a graph of neighbours between them (InvP)."""

    name: Literal["bank"] = "bank"
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """how much of an old key stays when its image is seen again (m)"""
    nearest: Annotated[int, Field(ge=2)] = 4096
    """how many nearest keys are consulted (M); a set with fewer images uses all"""
    neighbours: Annotated[int, Field(ge=1)] = 4
    """edges out of each image (k)"""
    steps: Annotated[int, Field(ge=1, le=6)] = 3
    """how far the walk over the graph goes (l): 4 + 16 + 64 images for three steps of four neighbours"""
    repeats: bool = True
    """keep images that the walk meets again, and the starting image (the code); false makes a set (the paper)"""


MemorySettings = Annotated[QueueMemory | BatchMemory | BankMemory, Field(discriminator="name")]


class Queue(Memory):
    """The `size` most recent keys, in a ring that accepts any number of keys at a time."""

    keys: Tensor
    born: Tensor
    next: Tensor
    written: Tensor

    def __init__(self, size: int, dimension: int, *, batch_keys: bool = False) -> None:
        super().__init__()
        self.size = size
        self.batch_keys = batch_keys
        start = F.normalize(torch.randn(size, dimension), dim=1) if size else torch.zeros(0, dimension)  # [K, D]
        self.register_buffer("keys", start)
        self.register_buffer("born", torch.zeros(size, dtype=torch.int64))  # [K] write in which each key came
        self.register_buffer("next", torch.zeros((), dtype=torch.int64))  # row that is written next
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))  # writes so far

    def compare(self, q: Tensor, keys: Tensor | None, index: Tensor) -> tuple[Comparison, Memo]:
        """Columns: the own key, then the queue; with `batch_keys` the whole batch's keys, then the queue."""
        if keys is None:
            raise ValueError("A queue remembers the key encoder's keys: give every pair a key view.")
        keys = keys.detach()
        k = distributed.local_part(keys)  # [B, D]
        with torch.no_grad():
            remembered = self.keys.to(q.dtype)  # [K, D]
        if self.batch_keys:
            candidates = torch.cat([keys.to(q.dtype), remembered])  # [B · ranks + K, D]
            by_query, by_key = q @ candidates.T, k @ candidates.T  # [B, B · ranks + K] each
            own = distributed.global_rows(len(q), q.device)  # [B]
        else:
            by_query = torch.cat([(q * k).sum(1, keepdim=True), q @ remembered.T], dim=1)  # [B, 1 + K]
            by_key = torch.cat([(k * k).sum(1, keepdim=True), k @ remembered.T], dim=1)  # [B, 1 + K]
            own = torch.zeros(len(q), dtype=torch.int64, device=q.device)  # [B]
        return Comparison(by_query=by_query, by_key=by_key, own=own), (keys,)

    @torch.no_grad()
    def remember(self, memos: list[Memo]) -> None:
        """Write the keys of every key view, in the order of the views; the oldest make room."""
        self.written += 1
        if not self.size:
            return
        keys = torch.cat([memo[0] for memo in memos])  # [views · B · ranks, D]
        total = len(keys)
        keys = keys[-self.size :]  # of more keys than fit, the last ones stay
        rows = (self.next + total - len(keys) + torch.arange(len(keys), device=keys.device)) % self.size
        self.keys[rows] = keys.to(self.keys.dtype)
        self.born[rows] = self.written
        self.next.copy_((self.next + total) % self.size)


class Bank(Memory):
    """One key per image, moved a little each time its image is seen, and each image's nearest neighbours.

    Source: InvP's `objective.py` at cad924e (MemoryBank_v1). The rows start un-normalised with a length of about
    one, as there, and have length one from their first update on.

    In several processes each holds the rows of its share only (`divided`; False keeps all of them on every rank, which
    is the plain form), and `compare` and `state_dict` are for all of them together. The main process's state dict has
    all rows, the others' their own; either can be loaded, so a run goes on in any number of processes. The graph stays
    on every rank: 8 · N · k bytes are 41 MB for 1.28 million images with four neighbours, and a walk over a divided
    graph would ask the other ranks once a step of the walk.
    """

    points: Tensor
    neighbours: Tensor
    rows: range
    """the images whose keys are here"""

    def __init__(self, images: int, dimension: int, how: BankMemory, *, divided: bool = True) -> None:
        super().__init__()
        self.how = how
        self.images = images
        self.rows = distributed.share(images) if divided else range(images)
        self.register_buffer("points", fresh_rows(images, dimension, self.rows))  # [N, D], or [share of N, D]
        # Until an image is seen its neighbours are image 0; propagation starts after that.
        self.register_buffer("neighbours", torch.zeros(images, how.neighbours, dtype=torch.int64))  # [N, k]

    def compare(self, q: Tensor, keys: Tensor | None, index: Tensor) -> tuple[Comparison, Memo]:
        """Columns: the own key, the M nearest of the bank, the images reached by the walk.

        One search serves the nearest keys and the new neighbours. Similarities are in the precision of the bank.
        """
        q = q.to(self.points.dtype)
        everyone, asked = distributed.gather(index), distributed.gather_with_gradient(q)  # [B · ranks], [B · ranks, D]
        wanted = max(self.how.nearest, self.how.neighbours + 1)
        if len(self.rows) < self.images:
            named = torch.cat([everyone[:, None], self.walk(everyone)], dim=1)  # [B · ranks, 1 + P]
            similarity, found, looked = compare_with_shares(
                asked, self.points, named, wanted, rows=self.rows, total=self.images
            )  # [B, M], [B, M], [B, 1 + P]
            named = distributed.local_part(named)  # [B, 1 + P]
        else:
            named = torch.cat([index[:, None], self.walk(index)], dim=1)  # [B, 1 + P]
            similarity, found, looked = compare_with_rows(q, self.points, named, wanted)  # [B, M], [B, M], [B, 1 + P]
        count = min(self.how.nearest, found.shape[1])
        seen = Comparison(
            by_query=torch.cat([looked[:, :1], similarity[:, :count], looked[:, 1:]], dim=1),  # [B, 1 + M + P]
            own=torch.zeros(len(q), dtype=torch.int64, device=q.device),
            image=torch.cat([named[:, :1], found[:, :count], named[:, 1:]], dim=1),  # [B, 1 + M + P]
            nearest=slice(1, 1 + count),
            reached=slice(1 + count, count + named.shape[1]),
        )
        fresh = self.without_self(found, index)  # [B, k]
        return seen, (everyone, asked.detach(), distributed.gather(fresh))

    def walk(self, index: Tensor) -> Tensor:
        """Images `[B, P]` met by going up to `steps` edges from the images `index` `[B]`, breadth first.

        P is k + k² + …; without repeats, columns of images met before and of the start are -1.
        """
        frontier = index[:, None]  # [B, 1]
        layers = []
        for _ in range(self.how.steps):
            frontier = self.neighbours[frontier].flatten(1)  # [B, k ** depth]
            layers.append(frontier)
        met = torch.cat(layers, dim=1)  # [B, P]
        if self.how.repeats:
            return met
        order = torch.sort(met, dim=1, stable=True)
        again = torch.zeros_like(met, dtype=torch.bool)
        again[:, 1:] = order.values[:, 1:] == order.values[:, :-1]
        repeated = torch.zeros_like(again).scatter(1, order.indices, again)
        return met.masked_fill(repeated | (met == index[:, None]), -1)  # [B, P]

    def without_self(self, found: Tensor, index: Tensor) -> Tensor:
        """Neighbours `[B, k]` out of the nearest `[B, >= k + 1]`: the (k+1)-th takes the place of the image itself.

        The order of the k is therefore not always that of similarity (objective.py, `update_nn`).
        """
        k = self.how.neighbours
        if found.shape[1] <= k:  # a set of hardly more images than neighbours
            found = torch.cat([found, found[:, -1:].expand(-1, k + 1 - found.shape[1])], dim=1)
        first = found[:, :k]
        return torch.where(first == index[:, None], found[:, k : k + 1], first)  # [B, k]

    @torch.no_grad()
    def remember(self, memos: list[Memo]) -> None:
        """Move the keys of the images just seen: v ← unit(m v + (1 − m) f), and give them new neighbours.

        An image that stands twice in a batch (a replaced unreadable one) keeps the later of the two.
        """
        for index, features, fresh in memos:
            last = last_of_each(index)  # [B · ranks]
            move_rows_(self.points, index, features[last], keep=self.how.momentum, first=self.rows.start)
            self.neighbours[index] = fresh[last]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if len(self.rows) < self.images:
            whole = distributed.join_rows(self.points, self.images)  # [N, D] in the main process
            if whole is not None:
                destination[prefix + "points"] = whole

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        name = prefix + "points"
        if name in state_dict and len(state_dict[name]) == self.images:
            state_dict = {**state_dict, name: state_dict[name][self.rows.start : self.rows.stop]}
        super()._load_from_state_dict(state_dict, prefix, *rest)


def build_memory(how: QueueMemory | BatchMemory | BankMemory, *, images: int, dimension: int) -> Memory:
    """Make the memory that a recipe asks for; `images` is the size of the set, `dimension` that of a key."""
    if isinstance(how, BankMemory):
        if images < 2:
            raise UserError(f"memory: a bank compares images, but the set has {images}. Give at least two images.")
        world = distributed.world()
        if images < world:
            raise UserError(
                f"memory: {images} images cannot be divided over {world} processes; start {images} at most."
            )
        return Bank(images, dimension, how)
    if isinstance(how, BatchMemory):
        return Queue(0, dimension, batch_keys=True)
    return Queue(how.size, dimension, batch_keys=how.batch_keys)
