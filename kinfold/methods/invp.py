# SPDX-License-Identifier: Apache-2.0
"""InvP: Unsupervised Representation Learning by Invariance Propagation (Wang et al., NeurIPS 2020).

Neighbours of neighbours are likely of one kind even where they look different. The bank's images form a graph of
nearest neighbours; walking it a few steps from an image reaches others, and of these the *least* similar are what there
is to learn.

    a term for the image itself        ℓ_ins = −log S(own) / S(top M)
    a term for the hard positives      ℓ_inv = −log S(P least similar of those reached) / denominator
    S(·) = Σ exp(v·x / τ) over the bank's keys v        ℓ = ℓ_ins + λ ω(epoch) ℓ_inv

| ① views | ② memory | ③ target | ④ divergence |
|---|---|---|---|
| one view, no key encoder | bank + neighbour graph | own key; then hard positives | −log of the mass on the positives |

Paper and authors' code differ, and both are here (`sets`). The code walks with repeats, leaves easy positives in the
denominator and the hard ones out of it, so that its second term can fall below zero, and adds 1e-7 to each ratio; the
paper has sets: positives P(i) without repeats, denominator = (top M without what was reached) and the hard positives.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kinfold.distributions import mass
from kinfold.memory import Comparison
from kinfold.methods.method import Method
from kinfold.settings import settings
from kinfold.views import Positive


@settings
class InvP(Method):
    """Instance discrimination over a bank, and invariance to the images that a graph walk reaches."""

    memories: ClassVar[tuple[str, ...]] = ("bank",)

    name: Literal["invp"] = "invp"
    temperature: Positive = 0.2
    """τ: 0.2 with an MLP head, 0.07 with a linear one"""
    positives: Annotated[int, Field(ge=1)] = 50
    """P, how many of the reached images count: 50 on ImageNet, 20 on CIFAR-10"""
    hard: bool = True
    """take the least similar of the reached images; false takes the most similar (the paper's ablation)"""
    invariance_weight: Annotated[float, Field(ge=0.0)] = 0.6
    """λ of the second term"""
    start_epoch: Annotated[int, Field(ge=0)] = 30
    """completed epochs before the second term acts (T): neighbours mean nothing earlier"""
    ramp: Literal["step", "gaussian"] = "step"
    """ω: nothing then all at `start_epoch`; or exp(−5 (1 − e/start)²) from the first epoch on, e counted from 1"""
    exclude_own: bool = True
    """take the image's own key out of the second term's denominator (`exclusive` in the code); `sets: code` only"""
    sets: Literal["code", "paper"] = "code"
    """the authors' lists or the paper's sets. Default `code`: it is the only code there is, and golden numbers exist
    for it. Whether the published CIFAR and SVHN numbers were made with exactly it is unknown.

    `paper` wants `memory.repeats: false`. Read literally the paper keeps the image itself among the negatives; here
    it is left out, as the code's `exclusive` does: which one the authors meant is unknown.
    """

    def ramped(self, epoch: int) -> float:
        """ω after `epoch` completed epochs (objective.py:15-21, whose epochs count from 1)."""
        if epoch >= self.start_epoch or self.start_epoch == 0:
            return 1.0
        if self.ramp == "step":
            return 0.0
        return math.exp(-5.0 * (1.0 - (epoch + 1) / self.start_epoch) ** 2)

    def loss(self, seen: Comparison, epoch: int) -> dict[str, Tensor]:
        """The two terms, in nats (objective.py:109-146), the second one only where its weight is not zero."""
        assert seen.nearest is not None, "InvP needs a bank"
        assert seen.reached is not None
        assert seen.image is not None
        s = mass(seen.by_query, self.temperature)  # [B, 1 + M + P]
        top, own = s[:, seen.nearest], s.gather(1, seen.own[:, None]).squeeze(1)  # [B, M], [B]
        is_own = seen.image[:, seen.nearest] == seen.image.gather(1, seen.own[:, None])  # [B, M]
        others = top.masked_fill(is_own, 0.0)  # [B, M]
        if self.sets == "code":
            instance = -torch.log(own / top.sum(1) + 1e-7)
        else:
            instance = -torch.log(own / (others.sum(1) + own))
        terms = {"instance": instance.mean()}
        weight = self.invariance_weight * self.ramped(epoch)
        if weight == 0.0:
            return terms

        reached, there = s[:, seen.reached], seen.image[:, seen.reached] >= 0  # [B, P]
        far = reached.masked_fill(~there, float("inf") if self.hard else float("-inf"))
        count = min(self.positives, far.shape[1])
        chosen = far.topk(count, dim=1, largest=not self.hard).indices  # [B, <= P]
        hits = (reached * there).gather(1, chosen).sum(1)  # [B]
        if self.sets == "code":
            # The code subtracts the own key whether it is among the top M or not.
            outside = torch.where(is_own.any(1), 0.0, own)  # [B]
            rest = others.sum(1) - outside if self.exclude_own else top.sum(1)
            invariance = -torch.log(hits / rest + 1e-7)
            return {**terms, "invariance": weight * invariance.mean()}
        met = (seen.image[:, seen.nearest, None] == seen.image[:, None, seen.reached]).any(2)  # [B, M]
        denominator = others.masked_fill(met, 0.0).sum(1) + hits
        # An image whose walk reaches only itself has no positives: it adds nothing.
        alone = hits == 0
        invariance = -torch.log(torch.where(alone, 1.0, hits) / torch.where(alone, 1.0, denominator))
        return {**terms, "invariance": weight * invariance.mean()}
