# SPDX-License-Identifier: Apache-2.0
"""CO2: Consistent Contrast for Unsupervised Visual Representation Learning (Wei et al., ICLR 2021).

Contrast says that every other image is equally wrong. CO2 adds what the key already knows about them: the query should
be as similar to each other image as the key is, both read with one sharp temperature.

    Q = softmax(q·m / τ_con)        P = softmax(k·m / τ_con)        over the other keys m only
    ℓ = InfoNCE(q, k, m; τ) + α (½ KL(P‖Q) + ½ KL(Q‖P))

| ① views | ② memory | ③ target | ④ divergence |
|---|---|---|---|
| as MoCo | queue | one-hot; and softmax(k·m/τ_con), own key hidden | cross-entropy + α · symmetric KL |

The gradient reaches the query through Q in both halves; P is constant. α = 0 is MoCo. The published values of α and
τ_con are recalled, not seen in a file: 10 and 0.04 on MoCo v1, 0.3 and 0.05 on MoCo v2. No official code exists; the
regulariser in lightly differs (own key included, own second queue, and no gradient since the end of 2024, commit
d9b8de19).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from kinfold.distributions import cross_entropy, hide, log_softmax, one_hot, softmax, symmetric_kl
from kinfold.memory import Comparison
from kinfold.methods.method import Method
from kinfold.settings import settings
from kinfold.views import Positive


@settings
class CO2(Method):
    """MoCo with a consistency term between the query's and the key's view of the other images."""

    name: Literal["co2"] = "co2"
    temperature: Positive = 0.2
    """τ of the contrastive term: 0.07 on MoCo v1, 0.2 on v2"""
    consistency_temperature: Positive = 0.05
    """τ_con, one for both distributions: 0.04 on MoCo v1, 0.05 on v2 (recalled)"""
    consistency_weight: Annotated[float, Field(ge=0.0)] = 0.3
    """α: 10 on MoCo v1, 0.3 on v2 (recalled)"""

    def target(self, seen: Comparison) -> Tensor:
        """P, the key's view of the other images `[B, K]`, zero on the own key."""
        assert seen.by_key is not None, "CO2 needs a key encoder"
        return softmax(hide(seen.by_key, seen.own), self.consistency_temperature)

    def loss(self, seen: Comparison, epoch: int) -> dict[str, Tensor]:
        """InfoNCE and the weighted consistency, both in nats."""
        assert seen.by_key is not None, "CO2 needs a key encoder"
        asked = log_softmax(hide(seen.by_query, seen.own), self.consistency_temperature)  # [B, K] log Q
        answered = log_softmax(hide(seen.by_key, seen.own), self.consistency_temperature)  # [B, K] log P
        instance = cross_entropy(one_hot(seen.own, seen.by_query), log_softmax(seen.by_query, self.temperature))
        return {"instance": instance, "consistency": self.consistency_weight * symmetric_kl(answered, asked)}
