# SPDX-License-Identifier: Apache-2.0
"""A linear classifier with softmax cross-entropy and SGD, on features that need no gradient.

    y = γ (x − mean) / √(var + ε) + β        where it has a batch norm in front; else y = x
    logits = y Wᵀ + b                        slope = ∂loss/∂logits = (softmax − onehot) / B
    ∂W = slopeᵀ y    ∂b = Σ slope    ∂γ = Σ (slope W) x̂    ∂β = Σ slope W

The gradients are written out, so many classifiers of the same features cost no graph. The arithmetic is that of
`torch.optim.SGD` on `nn.BatchNorm1d` and `nn.Linear`, weight decay on all of their parameters.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kinfold import distributed
from kinfold.randomness import WEIGHTS, seed_of

Init = Literal["normal", "default", "fan-out"]
BatchNorm = Literal["none", "eval", "train"]

_EPSILON = 1e-5
_FOLLOW = 0.1  # share of the newest batch in the running statistics


class Classifier:
    """One linear layer and what it learns with; several processes that hold shares of a batch stay equal.

    `batch_norm` "train" normalises by the statistics of the whole batch and keeps running ones to answer with; "eval"
    uses running statistics that never move from mean 0 and variance 1, so only γ and β act.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, *, momentum: float, weight_decay: float, batch_norm: BatchNorm = "none"
    ) -> None:
        self.weight = weight.clone()  # [C, F]
        self.bias = bias.clone()  # [C]
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.batch_norm = batch_norm
        self.parameters = [self.weight, self.bias]
        features = weight.shape[1]
        if batch_norm != "none":
            self.scale, self.shift = weight.new_ones(features), weight.new_zeros(features)  # [F], [F]
            self.mean, self.var = weight.new_zeros(features), weight.new_ones(features)  # [F], [F]
            self.parameters += [self.scale, self.shift]
        self._speeds = [torch.zeros_like(parameter) for parameter in self.parameters]

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Give the logits [B, C] of features [B, F]."""
        return F.linear(self._affine(self._normal(x, learn=False)), self.weight, self.bias)  # [B, C]

    @torch.no_grad()
    def step(self, x: Tensor, target: Tensor, rate: float, *, whole: int | None = None) -> Tensor:
        """Take a step on features [B, F] and labels [B]; gives the batch's mean loss before it, a scalar.

        With several processes `whole` is the number of images that all of them hold together; all call, also one that
        holds none.
        """
        # Each process divides by its even share of the batch, so the mean over the processes is that over the images.
        share = len(x) if whole is None else whole / distributed.world()
        normal = self._normal(x, learn=True)  # [B, F]
        y = self._affine(normal)  # [B, F]
        logs = torch.log_softmax(F.linear(y, self.weight, self.bias), dim=1)  # [B, C]
        own = target[:, None]  # [B, 1]
        loss = -logs.gather(1, own).sum() / share
        slope = logs.exp().scatter_add_(1, own, -torch.ones_like(logs[:, :1])).div_(share)  # [B, C]
        gradients = [slope.T @ y, slope.sum(dim=0)]  # [C, F], [C]
        if self.batch_norm != "none":
            back = slope @ self.weight  # [B, F]
            gradients += [(back * normal).sum(dim=0), back.sum(dim=0)]  # [F], [F]
        distributed.average_([*gradients, loss])
        for parameter, gradient, speed in zip(self.parameters, gradients, self._speeds):
            if self.weight_decay:
                gradient = gradient.add(parameter, alpha=self.weight_decay)
            speed.mul_(self.momentum).add_(gradient)
            parameter.add_(speed, alpha=-rate)
        return loss

    def _affine(self, normal: Tensor) -> Tensor:
        return normal if self.batch_norm == "none" else torch.addcmul(self.shift, normal, self.scale)  # [B, F]

    def _normal(self, x: Tensor, *, learn: bool) -> Tensor:
        """Normalise features [B, F]; learning from them moves the running statistics."""
        if self.batch_norm == "none":
            return x
        mean, var = self.mean, self.var  # [F], [F]
        if self.batch_norm == "train" and learn:
            count = x.new_tensor(float(len(x)))
            mean = x.sum(dim=0)  # [F]
            distributed.average_([count, mean])
            mean = mean / count
            var = (x - mean).square_().sum(dim=0)  # [F]
            distributed.average_([var])
            var = var / count
            images = count * distributed.world()
            self.mean.lerp_(mean, _FOLLOW)
            self.var.lerp_(var * images / (images - 1).clamp(min=1), _FOLLOW)
        return (x - mean) * torch.rsqrt(var + _EPSILON)  # [B, F]

    def state(self) -> dict[str, Any]:
        """Give what learning has changed, for a checkpoint."""
        statistics = [self.mean, self.var] if self.batch_norm == "train" else []
        return {"parameters": self.parameters, "speeds": self._speeds, "statistics": statistics}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        mine = self.state()
        for name, kept in state.items():
            for tensor, value in zip(mine[name], kept, strict=True):
                tensor.copy_(value)


def first_weights(init: Init, classes: int, features: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Give the classifier's first weight [C, F] and bias [C], a function of the seed."""
    generator = torch.Generator().manual_seed(seed_of(WEIGHTS, seed))
    weight, bias = torch.empty(classes, features), torch.zeros(classes)  # [C, F], [C]
    if init == "default":
        bound = 1.0 / math.sqrt(features)
        return weight.uniform_(-bound, bound, generator=generator), bias.uniform_(-bound, bound, generator=generator)
    deviation = 0.01 if init == "normal" else math.sqrt(2.0 / classes)
    return weight.normal_(0.0, deviation, generator=generator), bias


@torch.no_grad()
def hits(classifier: Classifier, x: Tensor, y: Tensor) -> Tensor:
    """Count of x [b, F] those whose label y [b] is first, and among the first five: int64 [2]."""
    logits = classifier(x)  # [b, C]
    hit = logits.topk(min(5, logits.shape[1]), dim=1).indices == y[:, None]  # [b, 5]
    # A classifier that has diverged says nothing, and so is right about nothing.
    hit &= torch.isfinite(logits).all(dim=1, keepdim=True)
    return torch.stack([hit[:, 0].sum(), hit.any(1).sum()])  # [2]
