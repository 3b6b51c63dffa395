# SPDX-License-Identifier: Apache-2.0
"""The formulas of the papers as plain loops over single numbers, written apart from the package.

Slow and obvious on purpose: nothing here is vectorised over queries or keys, and nothing comes from `kinfold`. Keys of
other images are given per query (`others[i]` is a list of vectors), because with batch keys every query has its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Rows = NDArray[np.float64] | Sequence[Vector]


def dot(a: Vector, b: Vector) -> float:
    """Inner product, one term after the other."""
    return math.fsum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def unit(a: Vector) -> Vector:
    """The vector at length one."""
    return np.asarray(a) / math.sqrt(dot(a, a))


def probabilities(logits: Sequence[float]) -> list[float]:
    """Softmax."""
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / math.fsum(weights) for w in weights]


def log_probabilities(logits: Sequence[float]) -> list[float]:
    """Logarithm of the softmax."""
    top = max(logits)
    whole = top + math.log(math.fsum(math.exp(x - top) for x in logits))
    return [x - whole for x in logits]


def mean(values: Sequence[float]) -> float:
    """Average."""
    return math.fsum(values) / len(values)


def info_nce(q: Rows, k: Rows, others: Sequence[Rows], temperature: float) -> float:
    """MoCo: −log of the probability of the own key among itself and the others."""
    losses = []
    for i in range(len(q)):
        logits = [dot(q[i], k[i]) / temperature] + [dot(q[i], m) / temperature for m in others[i]]
        losses.append(-log_probabilities(logits)[0])
    return mean(losses)


def ressl(q: Rows, k: Rows, others: Sequence[Rows], temperature: float, target_temperature: float) -> float:
    """ReSSL: cross-entropy from the key's to the query's distribution over the others."""
    losses = []
    for i in range(len(q)):
        target = probabilities([dot(k[i], m) / target_temperature for m in others[i]])
        prediction = log_probabilities([dot(q[i], m) / temperature for m in others[i]])
        losses.append(-math.fsum(t * p for t, p in zip(target, prediction, strict=True)))
    return mean(losses)


def sce_target(k: Vector, others: Rows, target_temperature: float, instance_weight: float, own_key: str) -> list[float]:
    """SCE's target of one query, the own key first: masked out of the relations, or in them at logit zero."""
    relations = [dot(k, m) / target_temperature for m in others]
    if own_key == "mask":
        shares = [0.0, *probabilities(relations)]
    else:
        shares = probabilities([0.0, *relations])
    own = [1.0] + [0.0] * len(others)
    return [instance_weight * o + (1.0 - instance_weight) * s for o, s in zip(own, shares, strict=True)]


def sce(
    q: Rows,
    k: Rows,
    others: Sequence[Rows],
    temperature: float,
    target_temperature: float,
    instance_weight: float,
    own_key: str,
) -> float:
    """SCE: cross-entropy with the soft target; the own key stays in the prediction."""
    losses = []
    for i in range(len(q)):
        target = sce_target(k[i], others[i], target_temperature, instance_weight, own_key)
        logits = [dot(q[i], k[i]) / temperature] + [dot(q[i], m) / temperature for m in others[i]]
        losses.append(-math.fsum(t * p for t, p in zip(target, log_probabilities(logits), strict=True)))
    return mean(losses)


def consistency(q: Rows, k: Rows, others: Sequence[Rows], temperature: float) -> float:
    """CO2's second term: ½ KL(P‖Q) + ½ KL(Q‖P) over the others only, before its weight."""
    losses = []
    for i in range(len(q)):
        log_p = log_probabilities([dot(k[i], m) / temperature for m in others[i]])
        log_q = log_probabilities([dot(q[i], m) / temperature for m in others[i]])
        forth = math.fsum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))
        back = math.fsum(math.exp(b) * (b - a) for a, b in zip(log_p, log_q, strict=True))
        losses.append(0.5 * forth + 0.5 * back)
    return mean(losses)


def breadth_first(neighbours: NDArray[np.int64], start: int, steps: int) -> list[int]:
    """All images met by walking up to `steps` edges, layer after layer, with repeats."""
    met: list[int] = []
    layer = [start]
    for _ in range(steps):
        layer = [int(b) for a in layer for b in neighbours[a]]
        met += layer
    return met


def within_reach(neighbours: NDArray[np.int64], start: int, steps: int) -> set[int]:
    """The images at graph distance 1 to `steps`, by the textbook queue; never the start."""
    distance = {start: 0}
    waiting = [start]
    while waiting:
        a = waiting.pop(0)
        if distance[a] == steps:
            continue
        for b in neighbours[a]:
            if int(b) not in distance:
                distance[int(b)] = distance[a] + 1
                waiting.append(int(b))
    return set(distance) - {start}


def most_similar(f: Vector, points: Rows, count: int) -> list[int]:
    """Images of the `count` most similar keys, best first."""
    return sorted(range(len(points)), key=lambda j: -dot(f, points[j]))[:count]


def refreshed(found: Sequence[int], image: int, k: int) -> list[int]:
    """InvP's new neighbours: the first k found, the image itself replaced in place by the one after them."""
    first = list(found[:k])
    if image in first:
        first[first.index(image)] = found[k]
    return first


def invp_code(
    f: Rows,
    index: Sequence[int],
    points: Rows,
    neighbours: NDArray[np.int64],
    *,
    temperature: float,
    nearest: int,
    steps: int,
    positives: int,
    hard: bool,
    exclude_own: bool,
) -> tuple[float, float, list[list[int]]]:
    """InvP as the authors coded it: the two terms before their weight, and the images taken as positives."""
    first, second, taken = [], [], []
    for i in range(len(f)):
        similarity = [math.exp(dot(f[i], p) / temperature) for p in points]
        top = math.fsum(sorted(similarity, reverse=True)[:nearest])
        own = similarity[index[i]]
        first.append(-math.log(own / top + 1e-7))
        met = breadth_first(neighbours, index[i], steps)
        met.sort(key=lambda j: similarity[j] if hard else -similarity[j])
        chosen = met[:positives]
        hits = math.fsum(similarity[j] for j in chosen)
        second.append(-math.log(hits / (top - own if exclude_own else top) + 1e-7))
        taken.append(chosen)
    return mean(first), mean(second), taken


def invp_paper(
    f: Rows,
    index: Sequence[int],
    points: Rows,
    neighbours: NDArray[np.int64],
    *,
    temperature: float,
    nearest: int,
    steps: int,
    positives: int,
    hard: bool,
) -> tuple[float, float]:
    """InvP as the paper writes it, with sets: the own key is in the first denominator and never in the second."""
    first, second = [], []
    for i in range(len(f)):
        similarity = [math.exp(dot(f[i], p) / temperature) for p in points]
        top = set(sorted(range(len(points)), key=lambda j: -similarity[j])[:nearest])
        own = similarity[index[i]]
        first.append(-math.log(own / math.fsum(similarity[j] for j in top | {index[i]})))
        reach = within_reach(neighbours, index[i], steps)
        ordered = sorted(reach, key=lambda j: similarity[j] if hard else -similarity[j])
        chosen = set(ordered[:positives])
        if not chosen:
            second.append(0.0)
            continue
        hits = math.fsum(similarity[j] for j in chosen)
        against = math.fsum(similarity[j] for j in top - reach - {index[i]})
        second.append(-math.log(hits / (against + hits)))
    return mean(first), mean(second)


def split_batch_norm(
    x: NDArray[np.float64], splits: int, eps: float = 1e-5, momentum: float = 0.1
) -> tuple[NDArray[np.float64], Vector, Vector]:
    """Normalise the images s, s + S, s + 2S, … apart; running statistics from 0 and 1 are means over the groups."""
    y = np.empty_like(x)
    channels = x.shape[1]
    running_mean, running_var = np.zeros((splits, channels)), np.ones((splits, channels))
    for s in range(splits):
        for c in range(channels):
            values = [float(v) for n in range(s, len(x), splits) for v in x[n, c].ravel()]
            centre = mean(values)
            spread = mean([(v - centre) ** 2 for v in values])
            unbiased = spread * len(values) / (len(values) - 1)
            running_mean[s, c] = momentum * centre
            running_var[s, c] = (1 - momentum) + momentum * unbiased
            for n in range(s, len(x), splits):
                y[n, c] = (x[n, c] - centre) / math.sqrt(spread + eps)
    return y, running_mean.mean(0), running_var.mean(0)
