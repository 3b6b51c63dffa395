# SPDX-License-Identifier: Apache-2.0
"""SCE against the numbers of its authors' two code bases: losses, whole training steps, heads."""

from __future__ import annotations

import re

import pytest
import torch
from golden import assert_close, load, part
from torch import Tensor, nn

from kinfold.distributions import log_softmax
from kinfold.encoders import BatchNorm, Encoder, Head, build_head
from kinfold.learner import Learner
from kinfold.memory import Queue
from kinfold.methods import SCE
from kinfold.views import Augmentation, Views

LOSSES = sorted(
    re.fullmatch(r"loss_(tau.*)", key)[1]  # type: ignore[index]
    for key in load("sce_loss")
    if re.fullmatch(r"loss_(tau.*)", key)
)


def queue_of(golden: dict[str, Tensor], *, size: int = 20, batch_keys: bool = False) -> Queue:
    """A queue that holds the golden keys."""
    queue = Queue(size, 12, batch_keys=batch_keys).double()
    if size:
        queue.keys.copy_(golden["queue"].T)
    return queue


def sce_of(setting: str, own_key: str) -> SCE:
    """SCE with the numbers in the name of a golden entry."""
    tau, target, weight = map(float, re.fullmatch(r"tau(.*)_taum(.*)_lam(.*)", setting).groups())  # type: ignore[union-attr]
    return SCE(temperature=tau, target_temperature=target, instance_weight=weight, own_key=own_key)  # type: ignore[arg-type]


def test_the_golden_file_has_all_six_settings() -> None:
    assert len(LOSSES) == 6


@pytest.mark.parametrize("setting", LOSSES)
def test_the_loss_and_its_gradient_are_the_authors(setting: str) -> None:
    golden = load("sce_loss")
    q = golden["q"].clone().requires_grad_()
    seen, _ = queue_of(golden).compare(q, golden["k"], torch.arange(6))
    loss = sce_of(setting, "zero").loss(seen, 0)["similarity"]
    assert_close(loss, golden[f"loss_{setting}"], "loss")
    loss.backward()
    assert_close(q.grad, golden[f"grad_q_{setting}"], "gradient")


@pytest.mark.parametrize("setting", LOSSES)
def test_single_precision_is_enough_for_the_loss(setting: str) -> None:
    golden = load("sce_loss")
    seen, _ = queue_of(golden).float().compare(golden["q"].float(), golden["k"].float(), torch.arange(6))
    loss = sce_of(setting, "zero").loss(seen, 0)["similarity"]
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(golden[f"loss_{setting}"]), rel=1e-5)


@pytest.mark.parametrize("setting", LOSSES)
def test_the_masked_loss_is_the_papers_formula(setting: str) -> None:
    golden = load("sce_loss")
    seen, _ = queue_of(golden).compare(golden["q"], golden["k"], torch.arange(6))
    loss = sce_of(setting, "mask").loss(seen, 0)["similarity"]
    assert_close(loss, golden[f"loss_PAPERMASK_{setting}"], "loss")


def test_targets_and_predictions_are_the_authors() -> None:
    golden = load("sce_loss")
    setting = "tau0.1_taum0.05_lam0.5"
    seen, _ = queue_of(golden).compare(golden["q"], golden["k"], torch.arange(6))
    assert_close(sce_of(setting, "zero").target(seen), golden["target_w_zero_logit"], "zero")
    assert_close(sce_of(setting, "mask").target(seen), golden["target_w_masked_minus_inf"], "mask")
    assert_close(log_softmax(seen.by_query, 0.1), golden["log_p"], "prediction")


@pytest.mark.parametrize(
    ("which", "size", "batch_keys", "own_key"),
    [
        ("queue_only", 20, False, "zero"),
        ("keys_and_queue", 20, True, "mask"),
        ("keys_only", 0, True, "mask"),
    ],
)
def test_keys_of_the_batch_count_as_in_the_second_code_base(
    which: str, size: int, batch_keys: bool, own_key: str
) -> None:
    golden = load("sce_loss_eztorch")
    q = golden["q"].clone().requires_grad_()
    seen, _ = queue_of(golden, size=size, batch_keys=batch_keys).compare(q, golden["k"], torch.arange(6))
    loss = sce_of("tau0.1_taum0.07_lam0.5", own_key).loss(seen, 0)["similarity"]
    assert_close(loss, golden[f"loss_{which}"], "loss")
    loss.backward()
    assert_close(q.grad, golden[f"grad_q_{which}"], "gradient")
    if batch_keys:
        mask = golden[f"mask_{which}"].bool()
        assert torch.equal(mask.int().argmax(1), seen.own)


class Trunk(nn.Module):
    """The toy trunk of the golden files: one layer and tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(9, 10)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.l(x))


def theirs(name: str, prefix: str = "") -> str:
    """The authors' name of our parameter."""
    room, rest = name.split(".", 1)
    rooms = {"backbone": "trunk", "head": "projector", "predictor": "predictor"}
    return f"{prefix}{rooms[room]}.{rest}" if room == "backbone" else f"{prefix}{rooms[room]}.layers.{rest}"


STEPS = {
    # (query view, key view), with the predictor or without: asymmetric, then every crop against the other globals
    "sce_step_asym_2crops_nopred": (((1, 0),), False),
    "sce_step_asym_1global_3online": (((1, 0), (2, 0), (3, 0)), False),
    "sce_step_sym_2crops_pred": (((1, 0), (0, 1)), True),
    "sce_step_sym_2global_2local_pred": (((1, 0), (2, 0), (3, 0), (0, 1), (2, 1), (3, 1)), True),
}


@pytest.mark.parametrize("shuffle", [False, True], ids=["in-order", "shuffled-keys"])
@pytest.mark.parametrize("name", STEPS)
def test_a_whole_training_step_is_the_authors(name: str, shuffle: bool) -> None:
    golden = load(name)
    pairs, predicts = STEPS[name]
    images = [golden[f"X{v}"] for v in range(4) if f"X{v}" in golden]
    projector = build_head(Head(hidden=(14,), out=8, batch_norm=True), 10)
    predictor = build_head(Head(hidden=(14,), out=8, batch_norm=True, last="plain"), 8) if predicts else None
    learner = Learner(
        method=SCE(temperature=0.1, target_temperature=0.07, instance_weight=0.5),
        views=Views(augment=tuple(Augmentation(size=1) for _ in images), pairs=pairs),
        encoder=Encoder(Trunk(), projector, predictor),
        memory=Queue(24, 8),
        # One group holds all images, so their order must not show in the result.
        batch_norm=BatchNorm(shuffle_keys=shuffle),
    ).double()
    init = part(golden, "init.")
    key_encoder, memory = learner.key_encoder, learner.memory
    assert key_encoder is not None
    assert isinstance(memory, Queue)
    learner.encoder.load_state_dict({n: init[theirs(n)] for n in learner.encoder.state_dict()})
    key_encoder.load_state_dict({n: init[theirs(n, "momentum_")] for n in key_encoder.state_dict()})
    memory.keys.copy_(init["queue"].T)
    memory.next.copy_(init["queue_ptr"].squeeze())

    losses, memos = learner(images, torch.arange(6), 0)
    assert_close(losses["similarity"], golden["loss"], "loss")
    sum(losses.values()).backward()
    gradients = part(golden, "grad.")
    named = dict(learner.encoder.named_parameters())
    assert {theirs(n) for n in named} == set(gradients)
    for n, parameter in named.items():
        assert_close(parameter.grad, gradients[theirs(n)], n)

    learner.advance([memos], momentum=0.99)
    assert_close(memory.keys, golden["queue_after"].T, "queue")
    assert int(memory.next) == int(golden["ptr_after"])
    for n, parameter in key_encoder.named_parameters():
        assert_close(parameter, golden[f"ema_after.{theirs(n, 'momentum_')}"], n)


HEADS = {
    "CIFAR-10 projector": (Head(hidden=(512,), out=128, batch_norm=True), 512, 328_832),
    "ImageNet projector": (
        Head(hidden=(2048, 2048), out=256, batch_norm=True, last="batch-norm"),
        2048,
        8_921_088,
    ),
    "multi-crop projector": (
        Head(hidden=(4096, 4096), out=256, batch_norm=True, last="batch-norm"),
        2048,
        26_230_784,
    ),
    "ImageNet predictor": (Head(hidden=(4096,), out=256, batch_norm=True, last="plain"), 256, 2_105_344),
}
SHAPES = {
    "CIFAR-10 projector": {
        "0.weight": [512, 512],
        "1.weight": [512],
        "1.bias": [512],
        "3.weight": [128, 512],
        "3.bias": [128],
    },
    "ImageNet projector": {
        "0.weight": [2048, 2048],
        "1.weight": [2048],
        "1.bias": [2048],
        "3.weight": [2048, 2048],
        "4.weight": [2048],
        "4.bias": [2048],
        "6.weight": [256, 2048],
    },
    "multi-crop projector": {
        "0.weight": [4096, 2048],
        "1.weight": [4096],
        "1.bias": [4096],
        "3.weight": [4096, 4096],
        "4.weight": [4096],
        "4.bias": [4096],
        "6.weight": [256, 4096],
    },
    "ImageNet predictor": {
        "0.weight": [4096, 256],
        "1.weight": [4096],
        "1.bias": [4096],
        "3.weight": [256, 4096],
    },
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_have_the_authors_parameters(name: str) -> None:
    how, features, count = HEADS[name]
    with torch.device("meta"):
        head = build_head(how, features)
    assert {n: list(p.shape) for n, p in head.named_parameters()} == SHAPES[name]
    assert sum(p.numel() for p in head.parameters()) == count
