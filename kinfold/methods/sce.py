# SPDX-License-Identifier: Apache-2.0
"""SCE: Similarity Contrastive Estimation for Self-Supervised Soft Contrastive Learning (Denize et al., WACV 2023).

Contrast and relation in one: the right answer lies partly on the own key and partly where the key encoder sees
similarity to other images.

    s = softmax(k·m / τ_m), own key masked        w = λ one-hot + (1 − λ) s
    p = softmax(q·[k, m] / τ)                     ℓ = −Σ w log p

| ① views | ② memory | ③ target | ④ divergence |
|---|---|---|---|
| strong asks, weak answers; symmetric; multi-crop | queue | λ one-hot + (1−λ) softmax(k·m/τ_m) | cross-entropy |

λ = 1 is MoCo. With λ = 0 only relations are left, but unlike in ReSSL the own key stays in the denominator of p.
With the masked target, ℓ = λ InfoNCE + (1 − λ) (ReSSL − log(1 − p(k))).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from kinfold.distributions import at_zero, cross_entropy, hide, log_softmax, mix, one_hot, softmax
from kinfold.memory import Comparison
from kinfold.methods.method import Method
from kinfold.settings import settings
from kinfold.views import Positive


@settings
class SCE(Method):
    """Soft contrast: the own key, and the images that the key encoder finds similar."""

    name: Literal["sce"] = "sce"
    temperature: Positive = 0.1
    """τ of the prediction"""
    target_temperature: Positive = 0.05
    """τ_m of the relations; lower than τ: 0.05 on CIFAR-10, 0.07 on ImageNet"""
    instance_weight: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """λ, the share of the target that lies on the own key before the relations are added"""
    own_key: Literal["zero", "mask"] = "zero"
    """what the own key is among the relations: at logit zero (the authors' code) or masked out (the paper).

    Default `zero`: the authors' code, with which the published numbers were presumably made (inferred). At zero the
    own key keeps a share 1 / (1 + Σ exp(k·m / τ_m)) of the relations: about 5e-5 with 4,096 random keys of 128
    dimensions, so on real queues the two train alike; with a handful of keys (`memory: batch`) they differ, and
    `mask` is the formula.
    """

    def target(self, seen: Comparison) -> Tensor:
        """The target distribution w `[B, K]`; rows sum to one."""
        assert seen.by_key is not None, "SCE needs a key encoder"
        others = (at_zero if self.own_key == "zero" else hide)(seen.by_key, seen.own)  # [B, K]
        relations = softmax(others, self.target_temperature)  # [B, K]
        return mix(one_hot(seen.own, seen.by_query), relations, self.instance_weight)  # [B, K]

    def loss(self, seen: Comparison, epoch: int) -> dict[str, Tensor]:
        """Cross-entropy with the soft target, in nats (sce.py:95-127)."""
        return {"similarity": cross_entropy(self.target(seen), log_softmax(seen.by_query, self.temperature))}
