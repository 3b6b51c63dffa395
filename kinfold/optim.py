# SPDX-License-Identifier: Apache-2.0
"""Optimisers, parameter groups, and schedules as pure functions of the step.

A schedule has no state, so a resumed run needs none of it. Formulas are checked against the authors' code (golden
numbers of LARS, SCE's learning rate and momentum, InvP's learning rate).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kinfold.settings import settings
from kinfold.views import Positive

NotNegative = Annotated[float, Field(ge=0.0)]


@settings
class SGD:
    """Stochastic gradient descent with momentum, as in `torch.optim.SGD`."""

    name: Literal["sgd"] = "sgd"
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    weight_decay: NotNegative = 1e-4
    nesterov: bool = False
    decay_all: bool = True
    """weight decay on biases and norms too (MoCo, SCE on CIFAR, InvP); false leaves them out (ReSSL)"""


@settings
class LARS:
    """Layer-wise adaptive rate scaling (You et al., 2017), in the form that MoCo v3 and SCE use."""

    name: Literal["lars"] = "lars"
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    weight_decay: NotNegative = 1e-6
    trust: Positive = 1e-3
    """trust coefficient; biases and norms get neither scaling nor decay"""


@settings
class AdamW:
    """Adam with decoupled weight decay, as in `torch.optim.AdamW`; what vision transformers are trained with."""

    name: Literal["adamw"] = "adamw"
    betas: tuple[NotNegative, NotNegative] = (0.9, 0.999)
    weight_decay: NotNegative = 0.05
    decay_all: bool = False
    """weight decay on biases and norms too"""


@settings
class CosineRate:
    """Half a cosine from the base rate to zero, after a linear warm-up."""

    name: Literal["cosine"] = "cosine"
    base: Positive
    """learning rate for a batch of `base_batch` images; scales linearly with the batch"""
    base_batch: Annotated[int, Field(ge=1)] = 256
    warmup_epochs: Annotated[int, Field(ge=0)] = 0
    warmup_peak: Literal["last-step", "next-step"] = "last-step"
    """whether the last of W warm-up steps has the full rate (SCE: t / (W−1), from 0) or the one after it (t / W)"""
    per: Literal["step", "epoch"] = "step"
    """how often the rate changes"""
    first_epoch: Annotated[int, Field(ge=0)] = 0
    """number of the first epoch in the formula: InvP counts from 1"""
    of_epochs: Annotated[int, Field(ge=1)] | None = None
    """length of the cosine; the run's epochs if not given (InvP: 800 for 799 epochs run)"""


@settings
class StepRate:
    """The base rate, multiplied by `factor` at each milestone."""

    name: Literal["steps"] = "steps"
    base: Positive
    """learning rate for a batch of `base_batch` images; scales linearly with the batch"""
    base_batch: Annotated[int, Field(ge=1)] = 256
    milestones: tuple[Annotated[int, Field(ge=1)], ...]
    """epochs, counted as the first epoch's number says, from which on the rate is lower"""
    factor: Positive = 0.1
    first_epoch: Annotated[int, Field(ge=0)] = 0


@settings
class KeyMomentum:
    """How much of the key encoder stays at each step (m): constant, or from `start` to `end` on a cosine per step."""

    start: Annotated[float, Field(ge=0.0, le=1.0)] = 0.999
    end: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """value at the last step; constant if not given"""


OptimizerSettings = Annotated[SGD | LARS | AdamW, Field(discriminator="name")]
RateSettings = Annotated[CosineRate | StepRate, Field(discriminator="name")]


def learning_rate(
    how: CosineRate | StepRate, *, step: int, steps_per_epoch: int, epochs: int, batch_size: int
) -> float:
    """Give the learning rate of `step` (from 0) in a run of `epochs` with a global batch of `batch_size`.

    Source: SCE `linear_warmup_cosine_annealing_lr.py`; moco `main_moco.py:492`; InvP `utils.py:203-216`.
    """
    base = how.base * batch_size / how.base_batch
    epoch = step // steps_per_epoch + how.first_epoch
    if isinstance(how, StepRate):
        return base * how.factor ** sum(epoch >= milestone for milestone in how.milestones)
    warmup = how.warmup_epochs * steps_per_epoch
    if step < warmup:
        span = warmup - 1 if how.warmup_peak == "last-step" else warmup
        return base * step / max(span, 1)
    length = how.of_epochs or epochs
    if how.per == "epoch":
        done = (epoch - how.warmup_epochs) / max(length - how.warmup_epochs, 1)
    else:
        done = (step + how.first_epoch * steps_per_epoch - warmup) / max(length * steps_per_epoch - warmup, 1)
    return 0.5 * base * (1.0 + math.cos(math.pi * min(done, 1.0)))


def key_momentum(how: KeyMomentum, *, step: int, steps: int) -> float:
    """Give the momentum of `step` (from 0) in a run of `steps`: 1 − (1 − m₀)(cos(π t / (S − 1)) + 1) / 2 for end 1.

    Source: SCE `momentum_base.py:87-143`.
    """
    if how.end is None:
        return how.start
    share = (math.cos(math.pi * step / max(steps - 1, 1)) + 1.0) / 2.0  # 1 at the start, 0 at the end
    return how.end - (how.end - how.start) * share


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling: each weight's step is scaled by |p| / |g|.

    For tensors of two or more dimensions g ← g + wd·p, then g ← trust·|p|/|g| · g (unscaled where either norm is
    zero); for others neither. Then μ ← momentum·μ + g and p ← p − lr·μ. Differs from `timm.optim.Lars` in where decay
    and learning rate enter, by 1e-4 and more after three steps. Source: SCE `optimizers/lars.py`, MoCo v3.

    `foreach` goes through all parameters at once, which on a GPU starts far fewer kernels than the plain loop; None
    does so where they are on a GPU. Both forms have the same state, and results that agree to rounding.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})
        # No part of the state: a run goes on in the other form.
        self.foreach = foreach

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            for p in moved:
                if "mu" not in self.state[p]:
                    self.state[p]["mu"] = torch.zeros_like(p)
            if not moved:
                continue
            if all(p.is_cuda for p in moved) if self.foreach is None else self.foreach:
                self._together(group, moved)
            else:
                self._one_by_one(group, moved)
        return loss

    def _one_by_one(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """The plain form, which says what a step is."""
        for p in parameters:
            g = p.grad
            assert g is not None
            if p.ndim > 1:
                g = g.add(p, alpha=group["weight_decay"])
                g = g * _trusted(torch.linalg.vector_norm(p), torch.linalg.vector_norm(g), group["trust"])
            self.state[p]["mu"].mul_(group["momentum"]).add_(g)
            p.add_(self.state[p]["mu"], alpha=-group["lr"])

    def _together(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """The same for all parameters at once, as lists."""
        weights = [p for p in parameters if p.ndim > 1]
        others = [p for p in parameters if p.ndim <= 1]
        slopes: list[Tensor] = []
        if weights:
            slopes = list(torch._foreach_add([_slope(p) for p in weights], weights, alpha=group["weight_decay"]))
            sizes = torch.stack(torch._foreach_norm(weights))  # [weights]
            ratios = _trusted(sizes, torch.stack(torch._foreach_norm(slopes)), group["trust"])  # [weights]
            torch._foreach_mul_(slopes, list(ratios.unbind()))
        mus = [self.state[p]["mu"] for p in (*weights, *others)]
        torch._foreach_mul_(mus, group["momentum"])
        torch._foreach_add_(mus, [*slopes, *(_slope(p) for p in others)])
        torch._foreach_add_([*weights, *others], mus, alpha=-group["lr"])


def _slope(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _trusted(size: Tensor, slope: Tensor, trust: float) -> Tensor:
    """What a weight's gradient is scaled by, from both norms, of any shape; one where either norm is zero."""
    ratio = trust * size / slope
    return torch.where((size > 0) & (slope > 0), ratio, torch.ones_like(ratio))


def build_optimizer(how: SGD | LARS | AdamW, model: nn.Module, *, fused: bool | None = None) -> torch.optim.Optimizer:
    """Make the optimiser for the parameters of `model` that take a gradient; the rate is set at each step.

    `fused` updates all parameters in a few kernels, with results that agree with the plain form to rounding; false is
    the plain form, one parameter after the other, and None fuses where they are on a GPU. A state of either form, from
    any device, can be loaded.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    # On a GPU torch's own choice in place of a fused form is the one for lists, which is not the plain one either.
    foreach = False if fused is False else None
    if fused is None:
        fused = all(p.is_cuda for p in trained)
    if isinstance(how, LARS):
        return Lars(
            trained, lr=0.0, momentum=how.momentum, weight_decay=how.weight_decay, trust=how.trust, foreach=fused
        )
    groups: list[dict[str, Any]] = [{"params": trained}]
    if not how.decay_all:
        groups = [
            {"params": [p for p in trained if p.ndim > 1]},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
    shared: dict[str, Any] = {
        "lr": 0.0,
        "weight_decay": how.weight_decay,
        "fused": fused or None,
        "foreach": foreach,
    }
    optimizer: torch.optim.Optimizer
    if isinstance(how, SGD):
        optimizer = torch.optim.SGD(groups, momentum=how.momentum, nesterov=how.nesterov, **shared)
    else:
        optimizer = torch.optim.AdamW(groups, betas=how.betas, **shared)
    optimizer.register_load_state_dict_pre_hook(_in_own_form)
    optimizer.register_load_state_dict_post_hook(_in_own_layout)
    return optimizer


def _in_own_form(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A state to load, with this optimiser's way of computing in place of the one that it was saved with.

    torch saves how a step is computed along with the state, and takes it over; but that belongs to the device.
    """
    own = optimizer.param_groups[0]
    form = {name: own[name] for name in ("fused", "foreach", "capturable") if name in own}
    return {**state, "param_groups": [{**group, **form} for group in state["param_groups"]]}


@torch.no_grad()
def _in_own_layout(optimizer: torch.optim.Optimizer) -> None:
    """Lay a loaded state out in memory as the parameters are: a fused step goes through both number by number."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
