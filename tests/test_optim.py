# SPDX-License-Identifier: Apache-2.0
"""Optimisers and schedules against the authors' numbers and their own formulas."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from golden import assert_close, load
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kinfold.optim import (
    LARS,
    SGD,
    AdamW,
    CosineRate,
    KeyMomentum,
    Lars,
    StepRate,
    build_optimizer,
    key_momentum,
    learning_rate,
)


@pytest.mark.parametrize("foreach", [False, True], ids=["one by one", "together"])
def test_three_steps_of_lars_are_the_authors(foreach: bool) -> None:
    golden = load("sce_lars")
    names = ("W", "b", "Z")
    parameters = {n: nn.Parameter(golden[f"{n}0"].clone()) for n in names}
    optimizer = Lars(parameters.values(), lr=4.8, momentum=0.9, weight_decay=0.01, trust=0.001, foreach=foreach)
    for step in range(3):
        for n in names:
            parameters[n].grad = golden[f"g{n}{step}"].clone()
        optimizer.step()
        for n in names:
            assert_close(parameters[n], golden[f"{n}{step + 1}"], f"{n} after step {step}")


@pytest.mark.parametrize("foreach", [False, True], ids=["one by one", "together"])
def test_lars_leaves_the_gradient_as_it_was_and_parameters_without_one_alone(foreach: bool) -> None:
    weight, idle = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.randn(3, 2)
    before = weight.grad.clone()
    Lars([weight, idle], lr=1.0, weight_decay=0.1, foreach=foreach).step()
    assert torch.equal(weight.grad, before)
    assert torch.equal(idle, torch.ones(2, 2))


def test_lars_together_is_lars_one_by_one_to_the_bit_on_a_cpu() -> None:
    # Weights of zero and gradients of zero are not scaled; biases are neither scaled nor decayed.
    torch.manual_seed(2)
    starts = [torch.randn(4, 3, 2), torch.randn(5), torch.zeros(3, 3), torch.randn(2, 2), torch.randn(())]
    slopes = [[torch.randn_like(p) for p in starts] for _ in range(3)]
    ends = []
    for foreach in (False, True):
        parameters = [nn.Parameter(p.clone()) for p in starts]
        optimizer = Lars(parameters, lr=0.3, weight_decay=0.01, foreach=foreach)
        for some in slopes:
            for p, g in zip(parameters, some, strict=True):
                p.grad = g.clone()
            parameters[3].grad = torch.zeros(2, 2)
            optimizer.step()
        ends.append([*parameters, *(optimizer.state[p]["mu"] for p in parameters)])
    for first, second in zip(*ends, strict=True):
        assert torch.equal(first, second)


def steps_of(
    net: nn.Module, optimizer: torch.optim.Optimizer, steps: range, *, sizes: tuple[float, ...] = (0.1, 0.05)
) -> None:
    """Take steps with gradients that are a function of the step's number."""
    for step in steps:
        source = torch.Generator().manual_seed(step)
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=source) if p.requires_grad else None
        for group in optimizer.param_groups:
            group["lr"] = sizes[step % len(sizes)]
        optimizer.step()


HOWS = [SGD(), SGD(nesterov=True, decay_all=False), AdamW(), LARS()]


@pytest.mark.parametrize("how", HOWS, ids=repr)
def test_a_fused_step_is_the_plain_one(how: SGD | AdamW | LARS) -> None:
    nets = []
    for fused in (False, True):
        torch.manual_seed(4)
        nets.append(Net())
        steps_of(nets[-1], build_optimizer(how, nets[-1], fused=fused), range(20))
    for plain, fast in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("how", HOWS, ids=repr)
def test_each_form_goes_on_from_its_own_state_to_the_bit_and_from_the_others_closely(
    how: SGD | AdamW | LARS, fused: bool
) -> None:
    def run(forms: tuple[bool, bool]) -> list[torch.Tensor]:
        torch.manual_seed(4)
        net = Net()
        first = build_optimizer(how, net, fused=forms[0])
        steps_of(net, first, range(5))
        second = build_optimizer(how, net, fused=forms[1])
        before = [group.get("fused") for group in second.param_groups]
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        assert [group.get("fused") for group in second.param_groups] == before
        steps_of(net, second, range(5, 10))
        return [p.detach() for p in net.parameters()]

    torch.manual_seed(4)
    whole = Net()
    steps_of(whole, build_optimizer(how, whole, fused=fused), range(10))
    same, other = run((fused, fused)), run((not fused, fused))
    for expected, own, near in zip(whole.parameters(), same, other, strict=True):
        assert torch.equal(own, expected)
        torch.testing.assert_close(near, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("how", HOWS, ids=repr)
def test_a_state_from_weights_in_another_memory_format_can_be_gone_on_from(how: SGD | AdamW | LARS) -> None:
    def go_on(steps: range, fused: bool, last: bool, state: dict[str, Any] | None = None) -> tuple[nn.Module, Any]:
        net = nn.Conv2d(3, 4, 3)
        nn.init.constant_(net.weight, 0.1)
        nn.init.zeros_(net.bias)
        if last:
            net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = build_optimizer(how, net, fused=fused)
        if state is not None:
            optimizer.load_state_dict(copy.deepcopy(state))
        for step in steps:
            source = torch.Generator().manual_seed(step)
            for p in net.parameters():
                p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=source))
            for group in optimizer.param_groups:
                group["lr"] = 0.1
            optimizer.step()
        return net, optimizer.state_dict()

    for last in (True, False):
        state = go_on(range(3), False, not last)[1]
        expected, found = go_on(range(3, 6), False, not last, state)[0], go_on(range(3, 6), True, last, state)[0]
        for theirs, ours in zip(expected.parameters(), found.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_on_a_cpu_the_plain_form_is_taken_unless_asked_otherwise() -> None:
    assert not any(group["fused"] for group in build_optimizer(SGD(), Net()).param_groups)
    assert all(group["fused"] for group in build_optimizer(SGD(), Net(), fused=True).param_groups)


@pytest.mark.parametrize("how", [SGD(), SGD(decay_all=False), AdamW()], ids=repr)
def test_the_plain_form_is_plain_wherever_the_parameters_are_and_lists_are_left_to_torch(how: SGD | AdamW) -> None:
    for fused, foreach in ((False, False), (True, None), (None, None)):
        optimizer = build_optimizer(how, Net(), fused=fused)
        assert {group["foreach"] for group in optimizer.param_groups} == {foreach}
        optimizer.load_state_dict(build_optimizer(how, Net()).state_dict())
        assert {group["foreach"] for group in optimizer.param_groups} == {foreach}


def test_lars_resumes_from_its_state() -> None:
    def run(interrupt: bool) -> torch.Tensor:
        torch.manual_seed(1)
        weight = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
        optimizer = Lars([weight], lr=0.5, weight_decay=0.01)
        for step in range(4):
            if interrupt and step == 2:
                state = optimizer.state_dict()
                optimizer = Lars([weight], lr=0.1)
                optimizer.load_state_dict(state)
            weight.grad = torch.randn(4, 3, dtype=torch.float64)
            optimizer.step()
        return weight.detach()

    assert torch.equal(run(False), run(True))


@pytest.mark.parametrize(
    ("key", "warmup", "base"), [("spe5_ep8_wu2_base0.06", 2, 0.06), ("spe5_ep8_wu0_base0.1", 0, 0.1)]
)
def test_the_cosine_with_warm_up_is_that_of_sce(key: str, warmup: int, base: float) -> None:
    golden = load("sce_lr_schedule")
    how = CosineRate(base=base, warmup_epochs=warmup)
    for step in range(40):
        rate = learning_rate(how, step=step, steps_per_epoch=5, epochs=8, batch_size=256)
        assert_close(rate, golden[f"lr_{key}"][step], f"step {step}")
        assert_close(rate, golden[f"closed_{key}"][step], f"step {step}")


def test_the_key_momentum_is_that_of_sce() -> None:
    golden = load("sce_momentum_schedule")
    how = KeyMomentum(start=float(golden["initial_momentum"]), end=1.0)
    steps = int(golden["max_steps"]) + 1
    for step, expected in zip(golden["step"].tolist(), golden["momentum"], strict=True):
        assert_close(key_momentum(how, step=step, steps=steps), expected, f"step {step}")
    assert key_momentum(KeyMomentum(start=0.99), step=57, steps=steps) == 0.99


def test_mocos_schedules_change_once_an_epoch() -> None:
    cosine = CosineRate(base=0.03, per="epoch")
    steps = StepRate(base=0.03, milestones=(120, 160))
    for epoch in (0, 1, 60, 119, 120, 159, 160, 199):
        for step in (epoch * 3, epoch * 3 + 2):
            rate = learning_rate(cosine, step=step, steps_per_epoch=3, epochs=200, batch_size=256)
            assert_close(rate, 0.03 * 0.5 * (1 + math.cos(math.pi * epoch / 200)))
            rate = learning_rate(steps, step=step, steps_per_epoch=3, epochs=200, batch_size=256)
            assert_close(rate, 0.03 * (0.1 if epoch >= 120 else 1) * (0.1 if epoch >= 160 else 1))


def test_a_warm_up_to_the_next_step_is_a_straight_line_through_the_origin() -> None:
    how = CosineRate(base=1.0, warmup_epochs=2, warmup_peak="next-step")
    rates = [learning_rate(how, step=t, steps_per_epoch=4, epochs=10, batch_size=256) for t in range(9)]
    assert rates == pytest.approx([t / 8 for t in range(9)], abs=1e-12)


@given(
    batch=st.integers(1, 8192),
    spe=st.integers(1, 50),
    epochs=st.integers(1, 30),
    warmup=st.integers(0, 10),
    per=st.sampled_from(["step", "epoch"]),
    peak=st.sampled_from(["last-step", "next-step"]),
)
def test_rates_scale_with_the_batch_and_stay_between_zero_and_the_base(
    batch: int, spe: int, epochs: int, warmup: int, per: str, peak: str
) -> None:
    how = CosineRate(base=0.06, warmup_epochs=warmup, per=per, warmup_peak=peak)  # type: ignore[arg-type]
    full = 0.06 * batch / 256
    for step in range(0, spe * epochs, max(1, spe * epochs // 20)):
        rate = learning_rate(how, step=step, steps_per_epoch=spe, epochs=epochs, batch_size=batch)
        one = learning_rate(how, step=step, steps_per_epoch=spe, epochs=epochs, batch_size=256)
        assert rate == pytest.approx(one * batch / 256, rel=1e-12)
        assert 0.0 <= rate <= full * (1 + 1e-12)


class Net(nn.Module):
    """A weight, a bias, a norm, and a weight that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


@pytest.mark.parametrize("how", [SGD(decay_all=True), SGD(decay_all=False), AdamW(), LARS()], ids=repr)
def test_only_trained_parameters_are_optimised_and_decay_spares_whom_it_should(
    how: SGD | AdamW | LARS,
) -> None:
    net = Net()
    optimizer = build_optimizer(how, net)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert set(decay) == {id(p) for p in net.parameters() if p.requires_grad}
    assert decay[id(net.layer.weight)] == how.weight_decay
    spared = not isinstance(how, LARS) and not how.decay_all
    for small in (net.layer.bias, net.norm.weight, net.norm.bias):
        assert decay[id(small)] == (0.0 if spared else how.weight_decay)


def test_lars_neither_scales_nor_decays_biases_and_norms() -> None:
    net = Net()
    optimizer = build_optimizer(LARS(weight_decay=0.5), net)
    optimizer.param_groups[0]["lr"] = 2.0
    before = net.layer.bias.detach().clone()
    net.layer.bias.grad = torch.ones(4)
    optimizer.step()
    assert torch.equal(net.layer.bias, before - 2.0)
