# SPDX-License-Identifier: Apache-2.0
"""Signs of learning and of collapse that need no labels.

Each measure is a pure function of tensors and returns plain numbers; `read` says in words what they mean.
Features are `[n, d]`, one row an image, as the backbone or the head gives them; some thousand random images
are enough. No number here can replace an evaluation with labels: they tell broken from working, and compare
checkpoints of one run better than runs with different views or widths.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_BLOCK = 1024  # rows at a time: a block of distances is 4 MB


class Entropy(NamedTuple):
    """How many keys share the right answer."""

    nats: float
    perplexity: float  # exp(nats): this many keys with equal shares would have the same entropy


class Age(NamedTuple):
    """How old the remembered keys are, in steps."""

    mean: float
    max: float


def rankme(features: Tensor) -> float:
    """The effective rank of `[n, d]`: exp of the entropy of the normalised singular values.

    Garrido et al., "RankMe" (ICML 2023), with their ε of 1e-7. It lies between 1 and min(n, d): how many
    directions the features really use. Among checkpoints of one set-up, higher is usually better downstream;
    a fall while the loss falls too is a collapse of dimensions. Features of zeros have rank 0; nan where a
    feature is not finite.
    """
    if not _usable(features):
        return math.nan
    # Through the d x d products, in double precision: what squaring loses lies below 1e-8, so below ε.
    values = torch.linalg.eigvalsh(_products(features)).clamp(min=0).sqrt()  # [min(n, d)]
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values / total + 1e-7  # [min(n, d)]
    return float(torch.exp(-(shares * shares.log()).sum()))


def alpha_req(features: Tensor, *, first: int = 5, last: int = 50) -> float:
    """The decay α of the covariance's eigenvalues, λ_i ∝ i^-α, of `[n, d]`.

    Agrawal et al., "α-ReQ" (NeurIPS 2022). About 1 is the best: much less and the features are near to noise
    without structure; much more and a few directions carry everything. The line is fitted to log λ over log i
    by least squares with weights 1/i, so that every octave counts alike, on the eigenvalues `first` to `last`
    counted from 1: the first ones stand off the law, and the tail feels that n is finite. Eigenvalues that
    are zero to double precision are left out. inf where fewer than two are left (collapse); nan where a
    feature is not finite.
    """
    if not _usable(features):
        return math.nan
    if len(features) < 2:
        return math.inf
    wide = _double(features)  # [n, d]
    centred = wide - wide.mean(dim=0)  # [n, d]
    values = torch.linalg.eigvalsh(_products(centred)).flip(0)  # [min(n, d)], falling
    # A rounding error of the mean is all that is left of equal rows: it is measured by the rows themselves.
    floor = max(float(values[0]) * 1e-12, float(features.float().square().sum()) * 1e-13)
    x = torch.arange(1, len(values) + 1, dtype=torch.float64, device=values.device)  # [min(n, d)]
    taken = (values > floor) & (x >= first) & (x <= last)  # [min(n, d)]
    if int(taken.sum()) < 2:
        return math.inf
    x, y = x[taken], values[taken].log()
    weight = 1 / x / (1 / x).sum()  # [taken]
    x = x.log()
    x, y = x - (weight * x).sum(), y - (weight * y).sum()
    return float(-(weight * x * y).sum() / (weight * x * x).sum())


def alignment(q: Tensor, k: Tensor, alpha: float = 2) -> float:
    """The mean distance, to the power `alpha`, between two views of an image: `q [n, d]` and `k [n, d]`, made
    unit.

    Wang & Isola (ICML 2020). 0: views of an image coincide; with `alpha` 2, 2 is what unrelated images have.
    Read it with `uniformity`: a collapse is perfectly aligned.
    """
    q, k = F.normalize(q.float(), dim=1), F.normalize(k.float(), dim=1)  # [n, d]
    return float((q - k).norm(dim=1).pow(alpha).mean())


def uniformity(features: Tensor, t: float = 2) -> float:
    """The log of the mean of exp(-t |x - y|²) over all pairs of different rows of `[n, d]`, made unit.

    Wang & Isola (ICML 2020). 0: all features are one point; near -2t + 2t²/d, which is -3.9 for `t` 2 and d
    128: spread over the whole sphere. Memory is bounded: the n x n distances are visited in blocks.
    """
    if len(features) < 2:
        return math.nan
    x = F.normalize(features.float(), dim=1)  # [n, d]
    total = 0.0
    for i in range(0, len(x), _BLOCK):
        for j in range(i, len(x), _BLOCK):
            distances = (2 - 2 * x[i : i + _BLOCK] @ x[j : j + _BLOCK].T).clamp(min=0)  # [block, block]
            near = distances.mul(-t).exp()  # [block, block]
            total += float((near.triu(1) if i == j else near).sum())
    return math.log(total / (len(x) * (len(x) - 1) / 2))


def spread(features: Tensor) -> float:
    """The mean over dimensions of the standard deviation of the unit features `[n, d]`, times the root of d.

    Chen & He, "SimSiam" (CVPR 2021). 1: spread evenly over the sphere; 0: all images are mapped to one point.
    It is for embeddings: a backbone that ends in ReLU has positive features only, whose spread is lower when
    all is well.
    """
    x = F.normalize(features.float(), dim=1)  # [n, d]
    return float(x.std(dim=0, correction=0).mean()) * math.sqrt(x.shape[1])


def target_entropy(target: Tensor) -> Entropy:
    """The mean entropy of the targets `[B, K]` (probabilities) in nats, and its perplexity.

    Perplexity 1: the target is the own key alone, the others teach nothing; near K: every key is as right as
    any, and the relations teach nothing either. Temperatures and weights of the target set it.
    """
    nats = float(torch.special.entr(_double(target)).sum(dim=1).mean())
    return Entropy(nats, math.exp(nats))


def queue_age(stamps: Tensor, step: int) -> Age:
    """The age of remembered keys: `stamps [K]` are the steps at which they were made, negative for empty
    places.

    In steps. In a full queue the oldest is K / batch steps old; the key encoder has moved on since then, so
    what counts is age against 1 / (1 - momentum), the steps after which the key encoder is another. nan when
    all is empty.
    """
    ages = step - stamps[stamps >= 0].cpu().double()  # [filled]
    if ages.numel() == 0:
        return Age(math.nan, math.nan)
    return Age(float(ages.mean()), float(ages.max()))


def read(measures: dict[str, float], previous: dict[str, float] | None = None) -> list[str]:
    """What the measures mean, in plain words, the worst first; `previous` are those of an earlier look.

    Known names: `spread` (of embeddings), `rankme` and `dimensions` (min(n, d), to hold it against),
    `alpha_req`, `alignment`, `uniformity`, `perplexity` and `keys` (K) of the target, `queue_age_max`,
    `momentum` of the key encoder, `loss`. Any may be missing; others are passed over. An empty list says that
    nothing stands out.

    The limits are rules of thumb: they are chosen so that runs that work pass in silence.
    """
    previous = previous or {}
    broken = [
        f"{name} is {value}: the numbers of the network are no longer finite. "
        f"Go back to the last checkpoint with a lower learning rate or a longer warm-up."
        for name, value in measures.items()
        if math.isnan(value) or (math.isinf(value) and name != "alpha_req")
    ]
    if broken:
        return broken
    return [*_collapse(measures), *_trend(measures, previous), *_target(measures)]


def _collapse(measures: dict[str, float]) -> list[str]:
    told = []
    even = measures.get("spread")
    if even is not None and even < 0.1:
        told.append(
            f"spread {even:.2f}: all images are mapped to nearly one point (collapse). Lower the learning rate, "
            f"lengthen the warm-up, or raise the weight of the own key in the target."
        )
    elif even is not None and even < 0.4:
        told.append(
            f"spread {even:.2f}: the images share most of their direction (1 is even, 0 is collapse). Normal in the "
            f"first epochs; a run that stays here is half collapsed."
        )
    rank, wide = measures.get("rankme"), measures.get("dimensions")
    if rank is not None and wide is not None and rank < 0.05 * wide:
        told.append(
            f"rankme {rank:.1f} of {wide:.0f}: the features use few of their dimensions. Normal in the first epochs; "
            f"later, more varied images, stronger views or a longer queue help."
        )
    decay = measures.get("alpha_req")
    if decay is not None and decay > 2.5:
        told.append(f"alpha_req {decay:.1f}: a few directions carry nearly everything (about 1 is the best).")
    elif decay is not None and decay < 0.3:
        told.append(f"alpha_req {decay:.2f}: the features are near to noise without structure (about 1 is the best).")
    if measures.get("alignment", 2) < 0.05 and measures.get("uniformity", -4) > -0.5:
        told.append(
            f"alignment {measures['alignment']:.3f} with uniformity {measures['uniformity']:.2f}: views of an image "
            f"agree because all images do. That is collapse, not learning."
        )
    elif measures.get("alignment", 0) > 1.5:
        told.append(
            f"alignment {measures['alignment']:.2f}: two views of an image are hardly nearer than two images (2). "
            f"Normal at the start; later, the views are too strong or the learning rate too low."
        )
    return told


def _trend(measures: dict[str, float], previous: dict[str, float]) -> list[str]:
    told = []
    for name, words in (("spread", "the features draw together"), ("rankme", "dimensions are being lost")):
        before, now = previous.get(name), measures.get(name)
        if before and now is not None and now < 0.7 * before:
            told.append(f"{name} fell from {before:.3g} to {now:.3g}: {words}. Keep the earlier checkpoint.")
    before, now = previous.get("loss"), measures.get("loss")
    if before is not None and now is not None and now > before + 0.05 * abs(before):
        told.append(
            f"loss rose from {before:.4g} to {now:.4g}. While a queue fills with keys this is normal: there is more "
            f"to choose among. Afterwards it is not: lower the learning rate."
        )
    return told


def _target(measures: dict[str, float]) -> list[str]:
    told = []
    share, keys = measures.get("perplexity"), measures.get("keys")
    if share is not None and keys is not None and keys > 1 and share > 0.9 * keys:
        told.append(
            f"perplexity {share:,.0f} of {keys:,.0f} keys: the target hardly prefers any key. "
            f"Lower the temperature of the target."
        )
    age, momentum = measures.get("queue_age_max"), measures.get("momentum")
    if age is not None and momentum is not None and momentum < 1 and age > 3 / (1 - momentum):
        told.append(
            f"queue_age_max {age:,.0f} steps: the key encoder has changed since the oldest keys were made (it does in "
            f"about {1 / (1 - momentum):,.0f} steps). Use a shorter queue, a larger batch or more momentum."
        )
    return told


def _usable(features: Tensor) -> bool:
    return features.numel() > 0 and bool(torch.isfinite(features).all())


def _products(x: Tensor) -> Tensor:
    """The smaller of `x xᵀ` and `xᵀ x`, in double precision: same eigenvalues but for zeros, `[min(n, d)] * 2`."""
    if len(x) <= x.shape[1]:
        wide = _double(x)  # [n, d]
        return wide @ wide.T  # [n, n]
    wide = _double(x[:_BLOCK])  # [block, d]
    total = wide.T @ wide  # [d, d]
    for i in range(_BLOCK, len(x), _BLOCK):
        wide = _double(x[i : i + _BLOCK])  # [block, d]
        total += wide.T @ wide
    return total


def _double(x: Tensor) -> Tensor:
    """`x` in double precision, on the CPU where the device has none."""
    return x.cpu().double() if x.device.type == "mps" else x.double()
