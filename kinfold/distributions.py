# SPDX-License-Identifier: Apache-2.0
"""Questions 3 and 4: distributions over the candidate keys, and how one is held against another.

Everything here is a pure function of tensors `[B, K]`: B queries, K candidate keys. Targets are probabilities,
predictions are log-probabilities. A similarity is divided by its temperature here and nowhere else. A column that
is hidden holds minus infinity as a similarity and zero as a probability; no function here turns it into NaN, in the
value or in the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def one_hot(own: Tensor, like: Tensor) -> Tensor:
    """Put all mass on the column `own` `[B]` of each row, in the shape and type of `like` `[B, K]`."""
    return torch.zeros_like(like).scatter_(1, own[:, None], 1.0)  # [B, K]


def hide(similarity: Tensor, own: Tensor) -> Tensor:
    """Take the column `own` `[B]` out of each row of `similarity` `[B, K]`: no mass can lie on it."""
    return similarity.scatter(1, own[:, None], float("-inf"))  # [B, K]


def at_zero(similarity: Tensor, own: Tensor) -> Tensor:
    """Set the column `own` `[B]` of each row of `similarity` `[B, K]` to zero, as SCE's published code does."""
    return similarity.scatter(1, own[:, None], 0.0)  # [B, K]


def softmax(similarity: Tensor, temperature: float) -> Tensor:
    """Turn similarities `[B, K]` into probabilities; a low temperature makes them sharp."""
    return torch.softmax(similarity / temperature, dim=1)  # [B, K]


def log_softmax(similarity: Tensor, temperature: float) -> Tensor:
    """Turn similarities `[B, K]` into log-probabilities; a low temperature makes them sharp."""
    return torch.log_softmax(similarity / temperature, dim=1)  # [B, K]


def mix(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """Blend two distributions `[B, K]`: `weight` of the first, the rest of the second."""
    return weight * first + (1.0 - weight) * second  # [B, K]


def cross_entropy(target: Tensor, prediction: Tensor) -> Tensor:
    """Average over the batch of −Σ target · log prediction, in nats; `prediction` holds logs.

    Where a target is zero its term is zero, also where the prediction is minus infinity.
    """
    terms = target * prediction.masked_fill(target == 0, 0.0)  # [B, K]
    return -terms.sum(dim=1).mean()


def symmetric_kl(first: Tensor, second: Tensor) -> Tensor:
    """Average over the batch of ½ KL(first‖second) + ½ KL(second‖first), in nats; both `[B, K]` hold logs.

    Columns that are minus infinity in both are outside of both distributions and add nothing. The gradient flows
    through both arguments wherever they carry one.
    """
    outside = torch.isinf(first) & torch.isinf(second)
    first, second = first.masked_fill(outside, 0.0), second.masked_fill(outside, 0.0)
    difference = (first.exp() - second.exp()) * (first - second)  # [B, K]
    return 0.5 * difference.sum(dim=1).mean()


def mass(similarity: Tensor, temperature: float) -> Tensor:
    """Give exp(similarity / temperature) `[B, K]` with each row scaled so that its largest entry is one.

    For ratios of sums within a row the scale cancels, and fp32 neither overflows nor loses the small ones.
    """
    logits = similarity / temperature  # [B, K]
    return torch.exp(logits - logits.detach().amax(dim=1, keepdim=True))  # [B, K]
