# SPDX-License-Identifier: Apache-2.0
"""Weighted k-nearest neighbours on frozen features: the quickest protocol, with nothing to train.

    similarity  s = cos(query, bank)          the k largest vote
    score of class c = Σ exp(s / T)           over the neighbours of class c

Source: Wu et al., CVPR 2018; the function `knn_predict` of MoCo's CIFAR-10 notebook (golden numbers), and InvP
`main.py`. The nearest are found by `kinfold.kernels.search`, which never holds all similarities.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from kinfold.errors import UserError
from kinfold.evaluate.backbones import FrozenBackbone, Layer
from kinfold.evaluate.labelled import Labelled, labels_of
from kinfold.kernels.search import Found, nearest_rows
from kinfold.settings import settings

# Below this, exp(1 / T) leaves float64.
Temperature = Annotated[float, Field(ge=0.002)]

_ROUND = 1 << 16  # queries whose neighbours are held at a time


@settings
class KNN:
    """Weighted k-NN; every number of neighbours is combined with every temperature, in one pass."""

    neighbours: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (20, 200)
    """k; a set with fewer images lets all of them vote, and says so"""
    temperatures: Annotated[tuple[Temperature, ...], Field(min_length=1)] = (0.07, 0.1)
    """T: a low one lets the nearest decide"""
    features: Layer = "backbone"
    """what is compared: the backbone's features, or the head's embeddings (MoCo notebook, InvP)"""
    leave_one_out: bool = False
    """every image of the training set asks all the others; no test set is used"""


class Neighbours(NamedTuple):
    """The nearest of the bank for a block of queries, nearest first."""

    rows: slice  # which queries these are
    similarity: Tensor  # [q, k], cosine
    places: Tensor  # int64 [q, k], rows of the bank


def knn(backbone: FrozenBackbone, data: Labelled, settings: KNN) -> dict[str, float]:
    """Measure top-1 (and from 6 classes on top-5) accuracy in percent, for every k and T.

    Keys are `top1/k=200,T=0.1`. `best` is the largest top-1: with several k or T it is chosen on the test set, so
    compare single numbers with papers. Raises `UserError` where labels are missing.
    """
    alone = settings.leave_one_out or data.test is None
    if alone and not settings.leave_one_out:
        data.say("There is no test split: every image asks all the others (leave-one-out).")
    test = None if alone else data.test
    labels, asked, classes = labels_of(data.train, test, say=data.say)
    network = backbone.network(settings.features).to(data.device)
    bank, found = data.features(backbone, network, data.train, doing="features of the bank")
    bank_labels = torch.from_numpy(labels[found])  # [N]
    if test is None:
        queries, truth = bank, bank_labels  # [Q, F], [Q]
    else:
        queries, found = data.features(backbone, network, test, doing="features that ask")
        truth = torch.from_numpy(asked[found])
    most = len(bank) - 1 if alone else len(bank)
    if most < 1:
        raise UserError(f"k-NN compares an image with others, but there is only one: {data.train.description}.")
    if max(settings.neighbours) > most:
        data.say(f"{max(settings.neighbours):,} neighbours were asked for; there are {most:,}, and all of them vote.")
    ks = sorted({min(k, most) for k in settings.neighbours})
    device = torch.device(data.device)
    return accuracies(
        queries,
        bank,
        bank_labels,
        truth,
        neighbours=ks,
        temperatures=settings.temperatures,
        classes=classes,
        exclude_self=alone,
        device=device,
    )


def accuracies(
    queries: Tensor,
    bank: Tensor,
    labels: Tensor,
    truth: Tensor,
    *,
    neighbours: list[int],
    temperatures: tuple[float, ...],
    classes: int,
    exclude_self: bool = False,
    device: torch.device | None = None,
) -> dict[str, float]:
    """Give top-1 and top-5 accuracy in percent for every k and T; queries [Q, F], bank [N, F], truth [Q]."""
    hits: dict[str, int] = {}
    temperatures = tuple({f"{t:g}": t for t in temperatures}.values())  # what has one name is counted once
    labels, truth = labels.cpu(), truth.cpu()
    for near in nearest(queries, bank, k=max(neighbours), exclude_self=exclude_self, device=device):
        similarity, votes = near.similarity.cpu().double(), labels[near.places.cpu()]  # [q, k], [q, k]
        own = truth[near.rows, None]  # [q, 1]
        for k in neighbours:
            for temperature in temperatures:
                scores = vote(similarity[:, :k], votes[:, :k], temperature=temperature, classes=classes)  # [q, C]
                # A class that nobody voted for is no answer, though five may be asked for and fewer are voted for.
                first = (rank(scores)[:, :5] == own) & (scores.gather(1, own) > 0)  # [q, 5]
                for top in (1, 5) if classes > 5 else (1,):
                    name = f"top{top}/k={k},T={temperature:g}"
                    hits[name] = hits.get(name, 0) + int(first[:, :top].sum())
    values = {name: 100.0 * count / len(queries) for name, count in hits.items()}
    return {**values, "best": max(value for name, value in values.items() if name.startswith("top1"))}


def knn_scores(
    queries: Tensor,
    bank: Tensor,
    labels: Tensor,
    *,
    k: int,
    temperature: float,
    classes: int,
    exclude_self: bool = False,
    block: int = 4096,
) -> Tensor:
    """Score every class for every query: float64 [Q, C] on the CPU, Σ exp(cosine / T) over the k nearest.

    queries [Q, F] and bank [N, F] of any length, labels int64 [N] in [0, C). With `exclude_self` the bank is the
    queries, and no row meets itself. `rank` puts the classes in order. Raises `ValueError` where k is not in [1, N].
    """
    labels = labels.cpu()
    parts = [
        vote(near.similarity.cpu().double(), labels[near.places.cpu()], temperature=temperature, classes=classes)
        for near in nearest(queries, bank, k=k, exclude_self=exclude_self, block=block)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, classes, dtype=torch.float64)  # [Q, C]


def rank(scores: Tensor) -> Tensor:
    """Put classes in order of falling score [Q, C]: int64 [Q, C]; of equal ones the lower number comes first."""
    return scores.argsort(dim=1, descending=True, stable=True)  # [Q, C]


def vote(similarity: Tensor, votes: Tensor, *, temperature: float, classes: int) -> Tensor:
    """Sum the weights exp(similarity / T) [q, k] over the neighbours' classes [q, k]: [q, C]."""
    scores = similarity.new_zeros(len(similarity), classes)  # [q, C]
    return scores.scatter_add_(1, votes, torch.exp(similarity / temperature))  # [q, C]


@torch.no_grad()
def nearest(
    queries: Tensor,
    bank: Tensor,
    *,
    k: int,
    exclude_self: bool = False,
    block: int = 4096,
    bank_block: int | None = None,
    device: torch.device | None = None,
) -> Iterator[Neighbours]:
    """Find the k rows of `bank` [N, F] with the largest cosine for each of `queries` [Q, F], in blocks.

    Both may be maps of files: rows are read, made unit vectors and moved to `device` (that of `queries` if not given)
    block by block, and the bank is read once for every 65,536 queries. Memory is that of `bank_block` rows as they are
    and as unit vectors, of the search among them (`nearest_rows`), and of the neighbours of 65,536 queries, 12 bytes
    each; if not given, the rows are of 128 MB, at most 65,536. With `exclude_self` row i of the bank is query i and not
    among its neighbours. Of rows that are equally near the first comes first. Raises `ValueError` where k is not in
    [1, N], or [1, N − 1] without oneself.
    """
    most = len(bank) - exclude_self
    if not 1 <= k <= most:
        raise ValueError(f"k is {k}; there are {most} rows to choose from")
    where = queries.device if device is None else device
    rows = bank_block or min(1 << 16, max(1024, (1 << 25) // bank.shape[1]))
    for begin in range(0, len(queries), _ROUND):
        starts = range(begin, min(begin + _ROUND, len(queries)), block)
        best: list[Found | None] = [None] * len(starts)  # similarity and places of each block of queries
        for first in range(0, len(bank), rows):
            part = F.normalize(bank[first : first + rows].to(where), dim=1)  # [n, F]
            for number, start in enumerate(starts):
                some = F.normalize(queries[start : min(start + block, begin + _ROUND)].to(where), dim=1)  # [q, F]
                best[number] = nearest_rows(some, part, k + exclude_self, first=first, known=best[number])
            del part  # before the next rows are made unit vectors
        for start, one in zip(starts, best):
            assert one is not None  # the bank has a row
            similarity, places = _without_self(*one, first=start) if exclude_self else one
            yield Neighbours(slice(start, start + len(places)), similarity, places)


def _without_self(similarity: Tensor, places: Tensor, *, first: int) -> Found:
    """Leave out one of the neighbours [q, k + 1] of the queries from `first` on: oneself, or else the last."""
    own = torch.arange(first, first + len(places), device=places.device)  # [q]
    order = (places == own[:, None]).to(torch.uint8).argsort(dim=1, stable=True)[:, :-1]  # [q, k]
    return similarity.gather(1, order), places.gather(1, order)
