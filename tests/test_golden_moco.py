# SPDX-License-Identifier: Apache-2.0
"""One step of MoCo as the authors' code takes it, from images to the queue."""

from __future__ import annotations

import pytest
import torch
from golden import assert_close, load
from torch import Tensor, nn

from kinfold.encoders import Encoder
from kinfold.learner import Learner
from kinfold.memory import Queue
from kinfold.methods import MoCo
from kinfold.views import Augmentation, Views


class Backbone(nn.Module):
    """The toy encoder of the golden file: one layer and tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.l(x))


def head_of(layers: int) -> nn.Module:
    if layers == 1:
        return nn.Linear(10, 16)
    return nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 16))


def ours(name: str) -> str:
    """Our name of a parameter that the authors call `l.…` or `fc.…`."""
    return name.replace("fc.", "head.") if name.startswith("fc.") else f"backbone.{name}"


FILES = [("moco_infonce_v1_T0.07", 1), ("moco_infonce_v2_T0.2_mlp", 2)]


def before_the_step(name: str, layers: int) -> tuple[dict[str, Tensor], Learner]:
    """The golden file, and a learner with its state before the step."""
    golden = load(name)
    view = Augmentation(size=1)
    learner = Learner(
        method=MoCo(temperature=float(golden["T"])),
        views=Views(augment=(view, view)),
        encoder=Encoder(Backbone(), head_of(layers)),
        memory=Queue(32, 16),
    ).double()
    learner.encoder.load_state_dict({ours(k.removeprefix("q.")): v for k, v in golden.items() if k.startswith("q.")})
    assert learner.key_encoder is not None
    learner.key_encoder.load_state_dict(
        {ours(k.removeprefix("k_before.")): v for k, v in golden.items() if k.startswith("k_before.")}
    )
    assert isinstance(learner.memory, Queue)
    learner.memory.keys.copy_(golden["queue_before"].T)
    learner.memory.next.copy_(golden["ptr_before"].squeeze())
    return golden, learner


@pytest.fixture(params=FILES, ids=lambda p: p[0])
def stepped(request: pytest.FixtureRequest) -> tuple[dict[str, Tensor], Learner]:
    """A golden file, and a learner with its state before the step."""
    return before_the_step(*request.param)


def test_a_step_of_moco_gives_the_authors_loss_gradients_and_queue(
    stepped: tuple[dict[str, Tensor], Learner],
) -> None:
    golden, learner = stepped
    # Their code moves the key encoder at the start of the step, before the keys.
    learner.follow(float(golden["m"]))
    losses, memos = learner([golden["im_q"], golden["im_k"]], torch.arange(8), 0)
    assert_close(losses["instance"], golden["loss"], "loss")
    sum(losses.values()).backward()
    for name, parameter in learner.encoder.named_parameters():
        theirs = name.replace("head.", "fc.").replace("backbone.", "")
        assert_close(parameter.grad, golden[f"grad_q.{theirs}"], name)
    memory = learner.memory
    assert isinstance(memory, Queue)
    assert_close(memory.keys, golden["queue_before"].T, "queue before the step's end")
    learner.advance([memos], momentum=1.0)
    assert_close(memory.keys, golden["queue_after"].T, "queue")
    assert int(golden["ptr_before"]) == 24
    assert int(memory.next) == int(golden["ptr_after"]) == 0


def test_the_key_encoder_follows_as_the_authors_does(stepped: tuple[dict[str, Tensor], Learner]) -> None:
    golden, learner = stepped
    learner.follow(float(golden["m"]))
    assert learner.key_encoder is not None
    for name, parameter in learner.key_encoder.named_parameters():
        theirs = name.replace("head.", "fc.").replace("backbone.", "")
        assert_close(parameter, golden[f"k_after.{theirs}"], name)


def test_queries_keys_and_logits_are_the_authors(stepped: tuple[dict[str, Tensor], Learner]) -> None:
    golden, learner = stepped
    learner.follow(float(golden["m"]))
    q, k = learner.encoder(golden["im_q"]), learner.keys(golden["im_k"], 1)
    assert_close(q, golden["q"], "q")
    assert_close(k, golden["k"], "k")
    seen, _ = learner.memory.compare(q, k, torch.arange(8))
    assert_close(seen.by_query / golden["T"], golden["logits"], "logits")
    assert torch.equal(seen.own, golden["labels"])
