# SPDX-License-Identifier: Apache-2.0
"""MoCo: Momentum Contrast for Unsupervised Visual Representation Learning (He et al., CVPR 2020; Chen et al., 2020).

A query has one right answer among many keys: the key of the same image, made by a slowly moving copy of the encoder.
The other keys come from a queue, so that there are many of them whatever the batch.

    p = softmax(q·[k, m_1 … m_K] / τ)        ℓ = −log p(k)

| ① views | ② memory | ③ target | ④ divergence |
|---|---|---|---|
| strong, strong | queue | one-hot on the own key | cross-entropy |

v1 and v2 differ in head, augmentation, temperature (0.07, 0.2) and schedule, which are the recipe's. The symmetric form
of the CIFAR-10 notebook is `views.pairs: [[0, 1], [1, 0]]` with `combine: sum`. With `memory: batch` this is close to
SimCLR's objective. Differs from it: keys carry no gradient, and a query meets the keys of one view only; SimCLR also
has the other images' embeddings of the query's own view among the negatives, 2 (N − 1) in all for N images.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from kinfold.distributions import cross_entropy, log_softmax, one_hot
from kinfold.memory import Comparison
from kinfold.methods.method import Method
from kinfold.settings import settings
from kinfold.views import Positive


@settings
class MoCo(Method):
    """Instance discrimination against remembered keys (InfoNCE)."""

    name: Literal["moco"] = "moco"
    temperature: Positive = 0.2
    """τ, divides the similarities: 0.07 in v1, 0.2 in v2, 0.1 in the CIFAR-10 notebook"""

    def target(self, seen: Comparison) -> Tensor:
        """All mass on the own key `[B, K]`."""
        return one_hot(seen.own, seen.by_query)

    def loss(self, seen: Comparison, epoch: int) -> dict[str, Tensor]:
        """InfoNCE, in nats (moco/builder.py, `forward`)."""
        return {"instance": cross_entropy(self.target(seen), log_softmax(seen.by_query, self.temperature))}
