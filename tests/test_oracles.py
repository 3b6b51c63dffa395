# SPDX-License-Identifier: Apache-2.0
"""Promise 2: every loss equals its formula, computed by loops over single numbers, and has what follows from it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from golden import assert_close
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from kinfold.distributions import (
    cross_entropy,
    hide,
    log_softmax,
    mass,
    mix,
    one_hot,
    softmax,
    symmetric_kl,
)
from kinfold.memory import Bank, BankMemory, Comparison, Queue
from kinfold.methods import CO2, SCE, InvP, MoCo, ReSSL

seeds = st.integers(0, 2**32 - 1)
batches = st.integers(1, 6)
temperatures = st.floats(0.03, 1.0)


class Scene:
    """Random queries, own keys and a queue, with the other keys of each query as the loops want them."""

    def __init__(self, seed: int, batch: int, memory: str, size: int = 9, dimension: int = 5) -> None:
        torch.manual_seed(seed)
        self.q, self.k = (self.units(batch, dimension) for _ in range(2))
        self.queue = Queue(0 if memory == "batch" else size, dimension, batch_keys=memory != "queue").double()
        self.seen: Comparison = self.queue.compare(self.q, self.k, torch.arange(batch))[0]
        remembered = list(self.queue.keys.numpy())
        mates = [[m for j, m in enumerate(self.k.numpy()) if j != i] for i in range(batch)]
        self.others = [(mates[i] if memory != "queue" else []) + remembered for i in range(batch)]

    @staticmethod
    def units(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)

    @property
    def given(self) -> tuple[Any, Any, Any]:
        """Queries, own keys, other keys for the loops."""
        return self.q.numpy(), self.k.numpy(), self.others


scenes = st.one_of(
    st.builds(Scene, seeds, batches, st.sampled_from(["queue", "both"])),
    # With the batch's own keys alone there must be somebody else in it.
    st.builds(Scene, seeds, st.integers(2, 6), st.just("batch")),
)


@given(scene=scenes, temperature=temperatures)
def test_moco_is_its_formula(scene: Scene, temperature: float) -> None:
    loss = MoCo(temperature=temperature).loss(scene.seen, 0)
    assert set(loss) == {"instance"}
    assert_close(loss["instance"], oracles.info_nce(*scene.given, temperature))


@given(scene=scenes, temperature=temperatures, target=temperatures)
def test_ressl_is_its_formula(scene: Scene, temperature: float, target: float) -> None:
    loss = ReSSL(temperature=temperature, target_temperature=target).loss(scene.seen, 0)
    assert set(loss) == {"relation"}
    assert_close(loss["relation"], oracles.ressl(*scene.given, temperature, target))


@given(
    scene=scenes,
    temperature=temperatures,
    target=temperatures,
    weight=st.floats(0.0, 1.0),
    own_key=st.sampled_from(["zero", "mask"]),
)
def test_sce_is_its_formula(scene: Scene, temperature: float, target: float, weight: float, own_key: Any) -> None:
    method = SCE(temperature=temperature, target_temperature=target, instance_weight=weight, own_key=own_key)
    loss = method.loss(scene.seen, 0)
    assert set(loss) == {"similarity"}
    assert_close(loss["similarity"], oracles.sce(*scene.given, temperature, target, weight, own_key))


@given(scene=scenes, temperature=temperatures, sharp=temperatures, weight=st.floats(0.0, 20.0))
def test_co2_is_its_formula(scene: Scene, temperature: float, sharp: float, weight: float) -> None:
    method = CO2(temperature=temperature, consistency_temperature=sharp, consistency_weight=weight)
    loss = method.loss(scene.seen, 0)
    assert set(loss) == {"instance", "consistency"}
    assert_close(loss["instance"], oracles.info_nce(*scene.given, temperature))
    expected = weight * oracles.consistency(*scene.given, sharp)
    # The divergence is a difference of numbers near one: where it is tiny its last digits are rounding.
    assert float(loss["consistency"]) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(
    seed=seeds,
    images=st.integers(6, 25),
    nearest=st.integers(2, 30),
    k=st.integers(1, 4),
    steps=st.integers(1, 3),
    positives=st.integers(1, 30),
    hard=st.booleans(),
    exclude_own=st.booleans(),
    temperature=st.floats(0.05, 1.0),
)
def test_invp_is_the_authors_lists(
    seed: int,
    images: int,
    nearest: int,
    k: int,
    steps: int,
    positives: int,
    hard: bool,
    exclude_own: bool,
    temperature: float,
) -> None:
    bank, q, index = bank_scene(seed, images, BankMemory(nearest=nearest, neighbours=k, steps=steps))
    method = InvP(temperature=temperature, positives=positives, hard=hard, exclude_own=exclude_own, start_epoch=3)
    seen, _ = bank.compare(q, None, index)
    loss = method.loss(seen, 3)
    first, second, _ = oracles.invp_code(
        q.numpy(),
        index.tolist(),
        bank.points.numpy(),
        bank.neighbours.numpy(),
        temperature=temperature,
        nearest=nearest,
        steps=steps,
        positives=positives,
        hard=hard,
        exclude_own=exclude_own,
    )
    assert_close(loss["instance"], first, "instance")
    assert float(loss["invariance"]) == pytest.approx(0.6 * second, rel=1e-8, abs=1e-9)
    assert set(method.loss(seen, 2)) == {"instance"}


@given(
    seed=seeds,
    images=st.integers(6, 25),
    nearest=st.integers(2, 30),
    k=st.integers(1, 4),
    steps=st.integers(1, 3),
    positives=st.integers(1, 30),
    hard=st.booleans(),
    temperature=st.floats(0.05, 1.0),
)
def test_invp_with_sets_is_the_paper(
    seed: int,
    images: int,
    nearest: int,
    k: int,
    steps: int,
    positives: int,
    hard: bool,
    temperature: float,
) -> None:
    how = BankMemory(nearest=nearest, neighbours=k, steps=steps, repeats=False)
    bank, q, index = bank_scene(seed, images, how)
    method = InvP(temperature=temperature, positives=positives, hard=hard, start_epoch=0, sets="paper")
    loss = method.loss(bank.compare(q, None, index)[0], 0)
    first, second = oracles.invp_paper(
        q.numpy(),
        index.tolist(),
        bank.points.numpy(),
        bank.neighbours.numpy(),
        temperature=temperature,
        nearest=nearest,
        steps=steps,
        positives=positives,
        hard=hard,
    )
    assert_close(loss["instance"], first, "instance")
    assert_close(loss["invariance"], 0.6 * second, "invariance")


def bank_scene(seed: int, images: int, how: BankMemory) -> tuple[Bank, Tensor, Tensor]:
    """A bank with a random graph, and queries `[5, 4]`, some of them near their own key."""
    torch.manual_seed(seed)
    bank = Bank(images, 4, how).double()
    bank.neighbours.copy_(torch.randint(images, (images, how.neighbours)))
    index = torch.randperm(images)[:5]
    noise = torch.randn(5, 4, dtype=torch.float64) * torch.tensor([0.1, 0.5, 1.0, 2.0, 5.0])[:, None]
    return bank, F.normalize(bank.points[index] + noise, dim=1), index


@given(scene=scenes, target=temperatures, weight=st.floats(0.0, 1.0))
def test_every_target_is_a_distribution(scene: Scene, target: float, weight: float) -> None:
    own = scene.seen.own[:, None]
    for method in (
        MoCo(),
        ReSSL(target_temperature=target),
        SCE(target_temperature=target, instance_weight=weight),
        SCE(target_temperature=target, instance_weight=weight, own_key="mask"),
        CO2(consistency_temperature=target),
    ):
        mass_of = method.target(scene.seen)
        assert mass_of is not None
        assert (mass_of >= 0).all()
        assert_close(mass_of.sum(1), torch.ones(len(mass_of)), repr(method))
        if isinstance(method, ReSSL | CO2):
            assert not mass_of.gather(1, own).any()


@given(scene=scenes)
def test_sces_target_is_its_formula(scene: Scene) -> None:
    for own_key in ("zero", "mask"):
        target = SCE(own_key=own_key, instance_weight=0.3).target(scene.seen)  # type: ignore[arg-type]
        for i, own in enumerate(scene.seen.own.tolist()):
            expected = oracles.sce_target(scene.k[i].numpy(), scene.others[i], 0.05, 0.3, own_key)
            ours = target[i].tolist()
            assert_close(
                torch.tensor([ours.pop(own), *ours], dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
            )


@given(scene=scenes, temperature=temperatures)
def test_sce_with_all_weight_on_the_own_key_is_moco(scene: Scene, temperature: float) -> None:
    for own_key in ("zero", "mask"):
        sce = SCE(temperature=temperature, instance_weight=1.0, own_key=own_key).loss(scene.seen, 0)  # type: ignore[arg-type]
        moco = MoCo(temperature=temperature).loss(scene.seen, 0)
        assert_close(sce["similarity"], moco["instance"])


@given(scene=scenes, temperature=temperatures, target=temperatures, weight=st.floats(0.0, 1.0))
def test_masked_sce_is_contrast_and_relation_and_a_ceiling(
    scene: Scene, temperature: float, target: float, weight: float
) -> None:
    sce = SCE(temperature=temperature, target_temperature=target, instance_weight=weight, own_key="mask").loss(
        scene.seen, 0
    )["similarity"]
    moco = MoCo(temperature=temperature).loss(scene.seen, 0)["instance"]
    ressl = ReSSL(temperature=temperature, target_temperature=target).loss(scene.seen, 0)["relation"]
    log_others = torch.logsumexp(hide(log_softmax(scene.seen.by_query, temperature), scene.seen.own), 1)
    assert_close(sce, weight * moco + (1 - weight) * (ressl - log_others.mean()))


@given(scene=scenes, temperature=temperatures, weight=st.floats(0.0, 1.0))
def test_the_query_is_pulled_from_where_it_looks_to_where_the_target_looks(
    scene: Scene, temperature: float, weight: float
) -> None:
    memory, batch = scene.queue, len(scene.q)
    for method, term in (
        (MoCo(temperature=temperature), "instance"),
        (ReSSL(temperature=temperature), "relation"),
        (SCE(temperature=temperature, instance_weight=weight), "similarity"),
        (SCE(temperature=temperature, instance_weight=weight, own_key="mask"), "similarity"),
    ):
        q = scene.q.clone().requires_grad_()
        seen, _ = memory.compare(q, scene.k, torch.arange(batch))
        method.loss(seen, 0)[term].backward()
        asked = hide(seen.by_query, seen.own) if isinstance(method, ReSSL) else seen.by_query
        looks, target = softmax(asked, temperature), method.target(seen)  # [B, K] each
        assert target is not None
        assert q.grad is not None
        for i in range(batch):
            candidates = torch.cat([scene.k if memory.batch_keys else scene.k[i : i + 1], memory.keys])
            pull = (looks[i] - target[i]) @ candidates / temperature  # [D]
            assert torch.allclose(q.grad[i] * batch, pull, rtol=1e-8, atol=1e-10)


@given(scene=scenes)
def test_co2_without_consistency_is_moco_and_agreement_costs_nothing(scene: Scene) -> None:
    moco = MoCo(temperature=0.2).loss(scene.seen, 0)["instance"]
    silent = CO2(temperature=0.2, consistency_weight=0.0).loss(scene.seen, 0)
    assert_close(sum(silent.values()), moco)  # type: ignore[arg-type]
    same, _ = scene.queue.compare(scene.k, scene.k, torch.arange(len(scene.k)))
    assert abs(float(CO2(consistency_weight=10.0).loss(same, 0)["consistency"])) < 1e-12


@given(scene=scenes, shift=st.floats(-3.0, 3.0))
def test_a_constant_added_to_all_similarities_changes_nothing(scene: Scene, shift: float) -> None:
    assert scene.seen.by_key is not None
    moved = dataclasses.replace(scene.seen, by_query=scene.seen.by_query + shift, by_key=scene.seen.by_key + 2 * shift)
    # Not SCE with the own key at zero: that zero is a place on the scale.
    for method in (MoCo(), ReSSL(), SCE(own_key="mask"), CO2()):
        for name, value in method.loss(scene.seen, 0).items():
            assert float(method.loss(moved, 0)[name]) == pytest.approx(float(value), rel=1e-8, abs=1e-9)


@given(seed=seeds, rows=batches, columns=st.integers(2, 8), temperature=temperatures)
def test_divergences_are_not_negative_and_zero_only_at_agreement(
    seed: int, rows: int, columns: int, temperature: float
) -> None:
    torch.manual_seed(seed)
    p, q = (log_softmax(torch.randn(rows, columns, dtype=torch.float64), temperature) for _ in range(2))
    assert symmetric_kl(p, q) > 0
    assert symmetric_kl(p, p) == 0
    assert_close(symmetric_kl(p, q), symmetric_kl(q, p))
    assert cross_entropy(p.exp(), q) >= cross_entropy(p.exp(), p)
    halves = [F.kl_div(a, b, reduction="batchmean", log_target=True) for a, b in ((p, q), (q, p))]
    assert_close(symmetric_kl(p, q), 0.5 * (halves[0] + halves[1]))


def test_a_hidden_column_spoils_neither_value_nor_gradient() -> None:
    similarity = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    own = torch.tensor([0, 4, 2])
    target = softmax(hide(torch.randn(3, 5, dtype=torch.float64), own), 0.1)
    asked = log_softmax(hide(similarity, own), 0.2)
    other = log_softmax(hide(torch.randn(3, 5, dtype=torch.float64), own), 0.2)
    for value in (cross_entropy(target, asked), symmetric_kl(other, asked), symmetric_kl(asked, other)):
        (gradient,) = torch.autograd.grad(value, similarity, retain_graph=True)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()
        assert gradient.any(1).all()
        assert not gradient.gather(1, own[:, None]).any()


def test_mass_keeps_its_ratios_where_exponentials_overflow() -> None:
    similarity = torch.tensor([[1.0, 0.9, -1.0]])
    weights = mass(similarity, 0.001)
    assert torch.isfinite(weights).all()
    assert float(weights[0, 1] / weights[0, 0]) == pytest.approx(math.exp(-100.0), rel=1e-3)
    loose = mass(similarity.double(), 0.5)
    assert_close(loose / loose.sum(), softmax(similarity.double(), 0.5))


def test_mixing_is_linear() -> None:
    own = torch.tensor([1, 0])
    a, b = one_hot(own, torch.zeros(2, 3)), torch.full((2, 3), 1 / 3)
    assert torch.equal(a, torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
    assert torch.allclose(mix(a, b, 0.25), 0.25 * a + 0.75 * b)
    assert torch.equal(mix(a, b, 1.0), a)
    assert torch.equal(mix(a, b, 0.0), b)


def test_the_authors_second_term_of_invp_can_fall_below_zero_and_the_papers_cannot() -> None:
    neighbours = np.tile(np.arange(1, 5), (6, 1))
    values: dict[str, float] = {}
    for sets in ("code", "paper"):
        bank = Bank(6, 4, BankMemory(nearest=2, neighbours=4, steps=2, repeats=sets == "code")).double()
        bank.points.copy_(
            torch.tensor([[1.0, 0, 0, 0], [0.9, 0.1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, -1]])
        )
        bank.neighbours.copy_(torch.from_numpy(neighbours))
        method = InvP(temperature=1.0, start_epoch=0, sets=sets)  # type: ignore[arg-type]
        seen, _ = bank.compare(bank.points[:1], None, torch.tensor([0]))
        values[sets] = float(method.loss(seen, 0)["invariance"])
    assert values["code"] < 0 <= values["paper"]
