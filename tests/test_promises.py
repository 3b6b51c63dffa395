# SPDX-License-Identifier: Apache-2.0
"""The promises of the design, each one test, run for every method in every form it is used in.

The second promise is in `test_oracles` and the golden tests.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from golden import assert_close
from torch import Tensor, nn

from kinfold.encoders import BatchNorm, Encoder
from kinfold.learner import Learner
from kinfold.memory import Bank, BankMemory, Queue, build_memory
from kinfold.methods import CO2, SCE, InvP, Method, MoCo, ReSSL
from kinfold.optim import SGD, build_optimizer

if TYPE_CHECKING:
    from conftest import Case


def total(losses: dict[str, Tensor]) -> Tensor:
    """The sum of a loss's terms."""
    return torch.stack(list(losses.values())).sum()


def state_of(module: nn.Module | None) -> dict[str, Tensor]:
    """A copy of a module's state."""
    return {} if module is None else {k: v.detach().clone() for k, v in module.state_dict().items()}


def test_every_method_of_the_package_is_held_to_the_promises(untested_methods: set[str]) -> None:
    assert untested_methods == set()


# 1. The gradient reaches the query encoder, and only it.


def test_the_gradient_reaches_the_query_and_nothing_else(case: Case) -> None:
    learner = case.learner()
    for step in range(2):  # the second step meets keys that the first one left
        views, index = case.batch(step)
        for view in views:
            view.requires_grad_()
        key_encoder, memory = state_of(learner.key_encoder), state_of(learner.memory)
        losses, memos = learner(views, index, case.epoch)
        assert not any(t.requires_grad for memo in memos for t in memo)
        total(losses).backward()
        for name, parameter in learner.encoder.named_parameters():
            assert parameter.grad is not None, name
            assert (parameter.grad != 0).any(), name
        for key, state in ((learner.key_encoder, key_encoder), (learner.memory, memory)):
            if key is not None:
                assert all(p.grad is None and not p.requires_grad for p in key.parameters())
                assert not any(b.requires_grad for b in key.buffers())
                assert all(torch.equal(v, state[k]) for k, v in key.state_dict().items())
        asked = set(learner.views.queries)
        for number, view in enumerate(views):
            assert (view.grad is not None) == (number in asked)
        learner.zero_grad()
        learner.advance([memos], momentum=0.9)


def test_every_term_of_the_loss_trains(case: Case) -> None:
    learner = case.learner()
    views, index = case.batch()
    losses, _ = learner(views, index, case.epoch)
    assert losses
    for name, value in losses.items():
        assert value.shape == ()
        gradients = torch.autograd.grad(value, list(learner.encoder.parameters()), retain_graph=True)
        assert all((g != 0).any() for g in gradients), name


def test_keys_never_carry_a_gradient_even_where_a_caller_gives_one(case: Case) -> None:
    learner = case.learner()
    views, index = case.batch()
    given = nn.functional.normalize(torch.randn(8, 6, dtype=torch.float64), dim=1).requires_grad_()
    keys = None if learner.key_encoder is None else given  # a bank takes none
    seen, memo = learner.memory.compare(learner.encoder(views[0]), keys, index)
    total(learner.method.loss(seen, case.epoch)).backward()
    assert given.grad is None
    assert seen.by_query.requires_grad
    assert seen.by_key is None or not seen.by_key.requires_grad
    target = learner.method.target(seen)
    assert target is None or not target.requires_grad
    assert not any(t.requires_grad for t in memo)


def test_the_gradient_is_that_of_the_loss(case: Case) -> None:
    learner = case.learner()
    views, index = case.batch(size=3)
    q = learner.encoder(views[0]).detach()
    keys = None if learner.key_encoder is None else learner.keys(views[-1], len(views) - 1)
    seen, _ = learner.memory.compare(q, keys, index)

    def loss(by_query: Tensor) -> Tensor:
        return total(learner.method.loss(dataclasses.replace(seen, by_query=by_query), case.epoch))

    # Away from ties: which of two equal keys is the less similar has no derivative.
    point = seen.by_query + 0.05 * torch.randn_like(seen.by_query)  # [B, K]
    assert torch.autograd.gradcheck(loss, point.requires_grad_(), eps=1e-7, atol=1e-6, rtol=1e-4)


# 3. A query never meets its own key among the others.


class Straight(nn.Module):
    """A backbone that gives an image's pixels as they are, and has a parameter."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer = nn.Linear(size, size, bias=False)
        self.layer.weight.data = torch.eye(size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.flatten(1))
        return out


def floor(method: Method, others: int) -> float:
    """The loss of a query that is its own key and at right angles to all others."""
    t = 1.0 / method.temperature  # type: ignore[attr-defined]
    own = math.log1p(others * math.exp(-t))  # −log of the own key's probability
    if isinstance(method, ReSSL):
        return math.log(others)
    if isinstance(method, SCE):
        relation = 0.0 if method.own_key == "mask" else 1 / (1 + others)
        return own + (1 - method.instance_weight) * (1 - relation) * t
    return own  # CO2: query and key agree about the others


def test_a_query_never_meets_its_own_key_among_the_others(case: Case) -> None:
    method: Any = dataclasses.replace(case.method, temperature=0.02)  # type: ignore[type-var]
    batch, steps = 4, 5
    images = batch * steps
    size = images + 13
    learner = Learner(
        method=method,
        views=case.views,
        encoder=Encoder(Straight(size), nn.Identity()),
        memory=build_memory(case.memory, images=images, dimension=size),
    ).double()
    basis = torch.eye(size, dtype=torch.float64)
    memory = learner.memory
    if isinstance(memory, Queue):
        # Each new image is at right angles to all that came before, and to the start of the queue.
        memory.keys.copy_(basis[images : images + memory.size])
        others = memory.size + (batch - 1 if memory.batch_keys else 0)
    else:
        assert isinstance(memory, Bank)
        memory.points.copy_(basis[:images])
        others = memory.how.nearest - 1
    for step in range(steps):
        index = torch.arange(batch) + step * batch
        image = basis[index].view(batch, 1, 1, size)
        # Before propagation starts: the walk is not about the own key.
        losses, memos = learner([image] * len(learner.views.augment), index, 0)
        loss = float(total(losses).detach())
        # InvP adds 1e-7 to its ratio.
        assert loss == pytest.approx(floor(method, others), rel=1e-6, abs=2e-7)
        if isinstance(method, MoCo | CO2 | InvP):
            assert loss < 0.01 * math.log(2)
        learner.advance([memos], momentum=0.9)


def test_the_own_key_is_one_column_and_the_others_are_other_images(case: Case) -> None:
    learner = case.learner()
    for step in range(4):
        views, index = case.batch(step)
        keys = None
        if learner.key_encoder is not None:
            keys = learner.keys(views[-1], len(views) - 1)
            seen, _ = learner.memory.compare(keys, keys, index)
            at_own = seen.by_query.gather(1, seen.own[:, None])
            assert_close(at_own, torch.ones_like(at_own))
            rest = seen.by_query.scatter(1, seen.own[:, None], -1.0)
            assert (rest < 1 - 1e-6).all()
        losses, memos = learner(views, index, case.epoch)
        assert torch.isfinite(total(losses))
        learner.advance([memos], momentum=0.9)


# 4. Only the views that a pair uses are encoded.


def test_only_the_views_that_a_pair_uses_are_encoded(case: Case) -> None:
    learner = case.learner()
    views, index = case.batch()
    met: dict[str, list[Tensor]] = {"query": [], "key": []}
    handles = [
        module.register_forward_pre_hook(lambda _, args, who=who: met[who].append(args[0]))
        for who, encoder in (("query", learner.encoder), ("key", learner.key_encoder))
        if encoder is not None
        for module in (encoder.backbone,)
    ]
    learner(views, index, case.epoch)
    for handle in handles:
        handle.remove()
    left = sorted({asks for asks, _ in case.pairs})
    right = sorted({answers for _, answers in case.pairs if answers is not None})
    for who, expected in (("query", left), ("key", right)):
        assert len(met[who]) == len(expected)
        for images, view in zip(met[who], expected, strict=True):
            assert torch.equal(images, views[view])


# 5. All state is in one state dict.


def run(learner: Learner, case: Case, steps: range, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Take training steps and give the losses."""
    found = []
    for step in steps:
        views, index = case.batch(step)
        losses, memos = learner(views, index, case.epoch)
        total(losses).backward()
        optimizer.step()
        optimizer.zero_grad()
        learner.advance([memos], momentum=0.9)
        found.append(total(losses).detach())
    return found


@pytest.mark.parametrize(("key_splits", "fused"), [(1, False), (4, True)], ids=["whole", "split and fused"])
def test_all_state_is_in_one_state_dict(case: Case, key_splits: int, fused: bool) -> None:
    how = BatchNorm(shuffle_keys=True, key_splits=key_splits, query_splits=1)

    def sgd(learner: Learner) -> torch.optim.Optimizer:
        optimizer = build_optimizer(SGD(), learner.encoder, fused=fused)
        optimizer.param_groups[0]["lr"] = 0.1
        return optimizer

    first = case.learner(seed=1, batch_norm=how)
    optimizer = sgd(first)
    run(first, case, range(4), optimizer)
    state, optimizer_state = copy.deepcopy(first.state_dict()), copy.deepcopy(optimizer.state_dict())
    expected = run(first, case, range(4, 7), optimizer)

    second = case.learner(seed=2, batch_norm=how)
    second_optimizer = sgd(second)
    run(second, case, range(20, 23), second_optimizer)  # anything it has by itself must not matter
    second.load_state_dict(state)
    second_optimizer.load_state_dict(optimizer_state)
    torch.manual_seed(12345)
    found = run(second, case, range(4, 7), second_optimizer)
    assert [float(v) for v in found] == [float(v) for v in expected]
    assert first.state_dict().keys() == second.state_dict().keys()
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_a_state_that_lacks_the_memory_is_refused(case: Case) -> None:
    learner = case.learner()
    state = {k: v for k, v in learner.state_dict().items() if not k.startswith("memory.")}
    assert len(state) < len(learner.state_dict())
    with pytest.raises(RuntimeError, match="memory"):
        learner.load_state_dict(state)


# How the key encoder moves, and what forward and advance may touch.


def test_the_key_encoder_starts_as_a_copy_and_follows(case: Case) -> None:
    learner = case.learner()
    if learner.key_encoder is None:
        assert isinstance(case.memory, BankMemory)
        learner.follow(0.5)
        return
    query = dict(learner.encoder.named_parameters())
    key = dict(learner.key_encoder.named_parameters())
    assert query.keys() == key.keys()
    assert all(torch.equal(key[n], query[n]) and key[n] is not query[n] for n in key)
    with torch.no_grad():
        for parameter in query.values():
            parameter.add_(torch.randn_like(parameter))
    before = {n: p.clone() for n, p in key.items()}
    learner.follow(1.0)
    assert all(torch.equal(key[n], before[n]) for n in key)
    learner.follow(0.75)
    for n in key:
        assert_close(key[n], 0.75 * before[n] + 0.25 * query[n], n)
    learner.follow(0.0)
    assert all(torch.equal(key[n], query[n]) for n in key)


def test_forward_reads_and_advance_writes(case: Case) -> None:
    learner = case.learner()
    views, index = case.batch()
    before = state_of(learner)
    _, memos = learner(views, index, case.epoch)
    assert all(torch.equal(v, before[k]) for k, v in learner.state_dict().items())
    learner.advance([memos], momentum=0.5)
    changed = {k for k, v in learner.state_dict().items() if not torch.equal(v, before[k])}
    assert "step" in changed
    assert not any(name.startswith("encoder.") for name in changed)
    assert any(name.startswith("memory.") for name in changed)


def test_the_same_views_give_the_same_loss_twice(case: Case) -> None:
    learner = case.learner()
    views, index = case.batch()
    first, second = (total(learner(views, index, case.epoch)[0]) for _ in range(2))
    assert torch.equal(first, second)


def test_micro_batches_are_remembered_like_one_batch(case: Case) -> None:
    whole, parts = case.learner(), case.learner()
    views, index = case.batch()
    _, memos = whole(views, index, case.epoch)
    whole.advance([memos], momentum=0.9)
    pieces = [parts([v[rows] for v in views], index[rows], case.epoch)[1] for rows in (slice(0, 4), slice(4, 8))]
    parts.advance(pieces, momentum=0.9)
    for name, value in whole.state_dict().items():
        assert_close(value, parts.state_dict()[name], name)


@pytest.mark.parametrize("images", [2, 3, 7])
def test_any_batch_size_trains(case: Case, images: int) -> None:
    learner = case.learner()
    for step in range(3):
        views, index = case.batch(step, size=images)
        losses, memos = learner(views, index, case.epoch)
        total(losses).backward()
        assert all(torch.isfinite(p.grad).all() for p in learner.encoder.parameters() if p.grad is not None)
        learner.advance([memos], momentum=0.9)
        assert all(torch.isfinite(b).all() for b in learner.buffers())


def test_losses_of_several_pairs_are_averaged_or_summed(case: Case) -> None:
    learner = case.learner()
    views, index = case.batch()
    mean = learner(views, index, case.epoch)[0]
    learner.views = dataclasses.replace(case.views, combine="sum")  # type: ignore[type-var]
    summed = learner(views, index, case.epoch)[0]
    one_by_one: dict[str, Tensor] = {}
    for pair in case.pairs:
        queries = learner.encoder(views[pair[0]])
        keys = None if pair[1] is None else learner.keys(views[pair[1]], pair[1])
        for name, value in learner.method.loss(learner.memory.compare(queries, keys, index)[0], case.epoch).items():
            one_by_one[name] = one_by_one.get(name, torch.zeros(())) + value
    assert mean.keys() == summed.keys() == one_by_one.keys()
    for name in mean:
        assert_close(summed[name], one_by_one[name], name)
        assert_close(mean[name] * len(case.pairs), one_by_one[name], name)


def test_embeddings_are_unit_vectors_in_single_precision_also_where_the_encoders_run_in_half(
    case: Case,
) -> None:
    learner = case.learner().float()
    views, index = case.batch()
    small = [view.float() for view in views]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q = learner.encoder(small[0])
        losses, memos = learner(small, index, case.epoch)
    assert q.dtype == torch.float32
    assert torch.allclose(q.norm(dim=1), torch.ones(8), atol=1e-6)
    assert all(value.dtype == torch.float32 for value in losses.values())
    assert all(t.dtype in (torch.float32, torch.int64) for memo in memos for t in memo)
    exact, _ = learner(small, index, case.epoch)
    # Two digits of the encoders are lost, none of the loss: the same embeddings would give the same numbers.
    for name, value in losses.items():
        assert float(value.detach()) == pytest.approx(float(exact[name].detach()), rel=0.2, abs=0.2)
