# SPDX-License-Identifier: Apache-2.0
"""InvP against its authors' numbers: losses, gradients, the bank over three passes, schedules, sizes."""

from __future__ import annotations

from functools import partial
from typing import Any

import oracles
import pytest
import torch
from golden import assert_close, load
from torch import Tensor, nn

from kinfold.encoders import Backbone, Encoder, Head, build_backbone, build_head
from kinfold.kernels import search
from kinfold.kernels.search import nearest_rows, nearest_rows_dense
from kinfold.learner import Learner
from kinfold.memory import Bank, BankMemory
from kinfold.methods import InvP
from kinfold.optim import CosineRate, StepRate, learning_rate
from kinfold.views import Augmentation, Views

FILES: dict[str, dict[str, Any]] = {
    "invp_loss_default_l3_P10": {"steps": 3, "positives": 10},
    "invp_loss_l1_P10": {"steps": 1, "positives": 10},
    "invp_loss_l2_P50": {"steps": 2, "positives": 50},
    "invp_loss_l3_easypos": {"steps": 3, "positives": 10, "hard": False},
    "invp_loss_l3_exclusive0": {"steps": 3, "positives": 10, "exclude_own": False},
    "invp_loss_t0.2_l4_P20": {"steps": 4, "positives": 20},
}
WEIGHT = 0.6


def invp_learner(method: InvP, how: BankMemory, points: Tensor, neighbours: Tensor) -> Learner:
    """A learner whose encoder only normalises, with a bank in the given state."""
    bank = Bank(*points.shape, how)
    learner = Learner(
        method=method,
        views=Views(augment=(Augmentation(size=1),), pairs=((0, None),)),
        encoder=Encoder(nn.Identity(), nn.Identity()),
        memory=bank,
    ).double()
    bank.points.copy_(points)
    bank.neighbours.copy_(neighbours)
    return learner


def from_file(name: str, *, paper: bool = False) -> tuple[dict[str, Tensor], Learner]:
    """A golden file, and a learner in its state before the step."""
    golden, kw = load(name), dict(FILES[name])
    steps = kw.pop("steps")
    method = InvP(
        temperature=float(golden["t"]),
        invariance_weight=WEIGHT,
        start_epoch=0,
        sets="paper" if paper else "code",
        **kw,
    )
    how = BankMemory(nearest=24, neighbours=4, steps=steps, momentum=0.5, repeats=not paper)
    return golden, invp_learner(method, how, golden["points_before"], golden["neigh_before"])


@pytest.mark.parametrize("name", FILES)
def test_a_step_gives_the_authors_losses_gradient_neighbours_and_bank(name: str) -> None:
    golden, learner = from_file(name)
    raw = golden["raw"].clone().requires_grad_()
    losses, memos = learner([raw], golden["idx"], 0)
    assert_close(losses["instance"], golden["L_ins"], "instance")
    assert_close(losses["invariance"], WEIGHT * golden["L_inv"], "invariance")
    total = losses["instance"] + losses["invariance"]
    assert_close(total, golden["L_total"], "total")
    total.backward()
    assert_close(raw.grad, golden["grad_raw"], "gradient")

    bank = learner.memory
    assert isinstance(bank, Bank)
    assert torch.equal(bank.neighbours, golden["neigh_before"])  # `forward` only reads
    learner.advance([memos], momentum=1.0)
    assert torch.equal(bank.neighbours, golden["neigh_after"])
    assert_close(bank.points, golden["points_after"], "bank")


@pytest.mark.parametrize("name", FILES)
def test_single_precision_is_enough_for_the_losses(name: str) -> None:
    golden, learner = from_file(name)
    losses, _ = learner.float()([golden["raw"].float()], golden["idx"], 0)
    assert losses["instance"].dtype == torch.float32
    assert float(losses["instance"]) == pytest.approx(float(golden["L_ins"]), rel=1e-5)
    assert float(losses["invariance"]) == pytest.approx(WEIGHT * float(golden["L_inv"]), rel=1e-5)


@pytest.mark.parametrize("way", ["dense", "screened", "selected"])
@pytest.mark.parametrize("name", FILES)
def test_every_way_to_search_gives_the_authors_losses_and_images(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden, learner = from_file(name)
    for size, value in {"_CELLS": 64, "_NARROWEST": 8, "_ROOM": 4}.items():  # many blocks, and hardly any room
        monkeypatch.setattr(search, size, value)
    ways = {"dense": nearest_rows_dense, "screened": partial(nearest_rows, way="screened")}
    ways["selected"] = partial(nearest_rows, way="selected")
    monkeypatch.setattr("kinfold.bank.nearest_rows", ways[way])
    losses, _ = learner.float()([golden["raw"].float()], golden["idx"], 0)
    assert float(losses["instance"]) == pytest.approx(float(golden["L_ins"]), rel=1e-5)
    assert float(losses["invariance"]) == pytest.approx(WEIGHT * float(golden["L_inv"]), rel=1e-5)
    q = nn.functional.normalize(golden["raw"].float(), dim=1)
    seen, _ = learner.memory.compare(q, None, golden["idx"])
    assert seen.image is not None
    assert torch.equal(seen.image[:, seen.nearest], golden["background_idx"])


@pytest.mark.parametrize("name", FILES)
def test_the_walk_and_the_nearest_are_the_authors(name: str) -> None:
    golden, learner = from_file(name)
    bank = learner.memory
    assert isinstance(bank, Bank)
    assert torch.equal(bank.walk(golden["idx"]), golden["neighs"])
    q = nn.functional.normalize(golden["raw"], dim=1)
    assert torch.equal(nearest_rows(q, bank.points, 24)[1], golden["background_idx"])
    seen, _ = bank.compare(q, None, golden["idx"])
    assert seen.image is not None
    assert torch.equal(seen.image[:, seen.reached], golden["neighs"])
    assert torch.equal(seen.image[:, seen.nearest], golden["background_idx"])


@pytest.mark.parametrize("name", FILES)
def test_the_loops_take_the_positives_that_the_authors_take(name: str) -> None:
    golden, kw = load(name), {"hard": True, "exclude_own": True, **FILES[name]}
    q = nn.functional.normalize(golden["raw"], dim=1).numpy()
    first, second, taken = oracles.invp_code(
        q,
        golden["idx"].tolist(),
        golden["points_before"].numpy(),
        golden["neigh_before"].numpy(),
        temperature=float(golden["t"]),
        nearest=24,
        **kw,
    )
    assert_close(first, golden["L_ins"], "instance")
    assert_close(second, golden["L_inv"], "invariance")
    assert [sorted(row) for row in taken] == [sorted(row) for row in golden["hard_pos_idx"].tolist()]


@pytest.mark.parametrize("name", FILES)
def test_with_sets_the_second_term_is_the_papers(name: str) -> None:
    golden, learner = from_file(name, paper=True)
    losses, _ = learner([golden["raw"]], golden["idx"], 0)
    assert_close(losses["invariance"], WEIGHT * golden["paper_loss_inv"], "invariance")


def test_new_neighbours_leave_the_image_itself_out_as_the_authors_do() -> None:
    golden = load("invp_update_nn")
    bank = Bank(12, 4, BankMemory(neighbours=4))
    fresh = bank.without_self(golden["background_idx"], golden["point_idx"])
    assert torch.equal(fresh, golden["result"])


def test_three_passes_over_the_set_leave_the_authors_bank() -> None:
    golden = load("invp_state_trace")
    learner = invp_learner(
        InvP(temperature=0.2, positives=6, start_epoch=0, invariance_weight=1.0),
        BankMemory(nearest=12, neighbours=4, steps=3, momentum=0.5),
        golden["points0"],
        torch.zeros(20, 4, dtype=torch.int64),
    )
    found: dict[str, list[Tensor]] = {"instance": [], "invariance": []}
    for e, order in enumerate(golden["order"]):
        for index in order.split(5):
            losses, memos = learner([golden["raw"][e, index]], index, e)
            learner.advance([memos], momentum=1.0)
            for name, value in losses.items():
                found[name].append(value)
    bank = learner.memory
    assert isinstance(bank, Bank)
    assert_close(torch.stack(found["instance"]), golden["L_ins"], "instance")
    assert_close(torch.stack(found["invariance"]), golden["L_inv"], "invariance")
    assert_close(bank.points, golden["points_final"], "bank")
    assert torch.equal(bank.neighbours, golden["neigh_final"])


@pytest.mark.parametrize(("ramp", "key"), [("step", "binary"), ("gaussian", "gaussian")])
def test_the_second_term_comes_in_as_the_authors_do(ramp: str, key: str) -> None:
    golden = load("invp_schedules")
    method = InvP(start_epoch=30, ramp=ramp)  # type: ignore[arg-type]
    # Their epochs count from 1; ours are completed ones.
    ours = [method.ramped(int(epoch) - 1) for epoch in golden["ramp_epoch"]]
    assert_close(torch.tensor(ours, dtype=torch.float64), golden[key], ramp)


@pytest.mark.parametrize("key", ["lr_cos", "lr_step"])
def test_learning_rates_are_the_authors(key: str) -> None:
    golden = load("invp_schedules")
    how: CosineRate | StepRate
    if key == "lr_cos":
        how = CosineRate(base=0.03, base_batch=128, per="epoch", first_epoch=1, of_epochs=800)
    else:
        how = StepRate(base=0.03, base_batch=128, milestones=(400, 600, 700), first_epoch=1)
    for epoch, expected in zip(golden["lr_epoch"].tolist(), golden[key], strict=True):
        first = (epoch - 1) * 7
        for step in (first, first + 6):  # the rate is the same in the whole epoch
            rate = learning_rate(how, step=step, steps_per_epoch=7, epochs=799, batch_size=128)
            assert_close(rate, expected, f"epoch {epoch}")


def test_a_fresh_bank_has_the_authors_statistics() -> None:
    golden = load("invp_schedules")
    bank = Bank(4000, 128, BankMemory())
    lengths = bank.points.double().norm(dim=1)
    # 4,000 lengths of standard deviation 0.04: their mean has one of 6e-4, so that 5e-3 is eight of them.
    assert abs(lengths.mean() - golden["bank_init_norm_mean"]) < 5e-3
    assert abs(lengths.std() - golden["bank_init_norm_std"]) < 5e-3
    assert bank.points.abs().max() <= (3 / 128) ** 0.5 * (1 + 1e-6)
    assert abs(bank.points.abs().max() - golden["bank_init_max_abs"]) < 1e-4
    assert not bank.neighbours.any()


@pytest.mark.parametrize(
    ("backbone", "head", "total", "in_head"),
    [
        (Backbone(name="resnet18", stem="small"), Head(), 11_234_496, 65_664),
        (Backbone(name="resnet18", stem="small"), Head(hidden=(512,)), 11_497_152, 328_320),
        (Backbone(name="resnet50"), Head(), 23_770_304, 262_272),
        (Backbone(name="resnet50"), Head(hidden=(2048,), init="xavier"), 27_966_656, 4_458_624),
    ],
    ids=["resnet18-linear", "resnet18-mlp", "resnet50-linear", "resnet50-mlp"],
)
def test_networks_have_as_many_parameters_as_the_authors(
    backbone: Backbone, head: Head, total: int, in_head: int
) -> None:
    with torch.device("meta"):
        trunk = build_backbone(backbone)
        top = build_head(head, int(trunk.num_features))  # type: ignore[arg-type]
    assert sum(p.numel() for p in top.parameters()) == in_head
    assert sum(p.numel() for p in trunk.parameters()) + in_head == total
