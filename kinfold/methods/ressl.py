# SPDX-License-Identifier: Apache-2.0
"""ReSSL: Relational Self-Supervised Learning with Weak Augmentation (Zheng et al., NeurIPS 2021).

Two views of an image should relate to other images alike. The weakly augmented view says how (through the key encoder,
sharply), the strongly augmented one learns to agree. The image's own key is not part of the question.

    t = softmax(k·m / τ_t)        p = softmax(q·m / τ)        ℓ = −Σ t log p        over the other keys m only

| ① views | ② memory | ③ target | ④ divergence |
|---|---|---|---|
| strong asks, weak answers | queue | softmax(k·m / τ_t), own key hidden | cross-entropy, own key hidden |
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from kinfold.distributions import cross_entropy, hide, log_softmax, softmax
from kinfold.memory import Comparison
from kinfold.methods.method import Method
from kinfold.settings import settings
from kinfold.views import Positive


@settings
class ReSSL(Method):
    """Consistency of relations to other images, from a weak view to a strong one."""

    name: Literal["ressl"] = "ressl"
    temperature: Positive = 0.1
    """τ of the query's relations"""
    target_temperature: Positive = 0.04
    """τ_t of the key's relations; lower than τ, so that the target is sharper than the prediction"""

    def target(self, seen: Comparison) -> Tensor:
        """The key's relations to the other images `[B, K]`, zero on the own key."""
        assert seen.by_key is not None, "ReSSL needs a key encoder"
        return softmax(hide(seen.by_key, seen.own), self.target_temperature)

    def loss(self, seen: Comparison, epoch: int) -> dict[str, Tensor]:
        """Cross-entropy of the relations, in nats (ressl.py:68)."""
        prediction = log_softmax(hide(seen.by_query, seen.own), self.temperature)  # [B, K]
        return {"relation": cross_entropy(self.target(seen), prediction)}
