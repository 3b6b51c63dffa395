# SPDX-License-Identifier: Apache-2.0
"""CO2 against golden numbers of its formula (there is no official code), with gradients."""

from __future__ import annotations

import pytest
import torch
from golden import assert_close, load
from torch import Tensor

from kinfold.distributions import hide, log_softmax, symmetric_kl
from kinfold.memory import Comparison, Queue
from kinfold.methods import CO2

TRIPLES = [(0.07, 0.04, 10.0), (0.2, 0.05, 0.3), (0.1, 0.05, 1.0)]


def seen_by(golden: dict[str, Tensor]) -> tuple[Tensor, Comparison]:
    """The golden queries with a gradient, and how the golden queue compares with them."""
    queue = Queue(20, 12).double()
    queue.keys.copy_(golden["queue"].T)
    q = golden["q"].clone().requires_grad_()
    return q, queue.compare(q, golden["p"], torch.arange(6))[0]


@pytest.mark.parametrize("triple", TRIPLES, ids=str)
def test_both_terms_and_their_gradients_are_those_of_the_formula(triple: tuple[float, float, float]) -> None:
    golden = load("co2_loss_INDEPENDENT")
    temperature, consistency_temperature, weight = triple
    name = f"tauins{temperature}_taucon{consistency_temperature}_alpha{weight}"
    q, seen = seen_by(golden)
    method = CO2(temperature=temperature, consistency_temperature=consistency_temperature, consistency_weight=weight)
    losses = method.loss(seen, 0)
    assert_close(losses["instance"], golden[f"L_ins_{name}"], "instance")
    assert_close(losses["consistency"], weight * golden[f"L_con_{name}"], "consistency")
    assert_close(sum(losses.values()), golden[f"L_total_{name}"], "total")  # type: ignore[arg-type]

    (instance,) = torch.autograd.grad(losses["instance"], q, retain_graph=True)
    (consistency,) = torch.autograd.grad(losses["consistency"], q, retain_graph=True)
    assert_close(instance, golden[f"grad_q_ins_{name}"], "gradient of the instance term")
    # The file's consistency gradient has no weight in it; its total has.
    assert_close(consistency / weight, golden[f"grad_q_con_{name}"], "gradient of the consistency term")
    assert_close(instance + consistency, golden[f"grad_q_total_{name}"], "gradient of the total")


@pytest.mark.parametrize("triple", TRIPLES, ids=str)
def test_the_two_distributions_and_both_halves_are_those_of_the_formula(
    triple: tuple[float, float, float],
) -> None:
    golden = load("co2_loss_INDEPENDENT")
    name = "tauins{}_taucon{}_alpha{}".format(*triple)
    _, seen = seen_by(golden)
    assert seen.by_key is not None
    method = CO2(consistency_temperature=triple[1])
    target = method.target(seen)
    log_p = log_softmax(hide(seen.by_key, seen.own), triple[1])
    log_q = log_softmax(hide(seen.by_query, seen.own), triple[1])
    assert torch.equal(target[:, 0], torch.zeros(6, dtype=torch.float64))
    if triple == TRIPLES[0]:  # the file has the distributions themselves for this one
        assert_close(target[:, 1:], golden[f"P_{name}"], "P")
        assert_close(log_q[:, 1:].exp(), golden[f"Q_{name}"], "Q")
    halves = 0.5 * golden[f"kl_P_Q_{name}"] + 0.5 * golden[f"kl_Q_P_{name}"]
    for i in range(6):
        assert_close(symmetric_kl(log_p[i : i + 1], log_q[i : i + 1]), halves[i], f"row {i}")
