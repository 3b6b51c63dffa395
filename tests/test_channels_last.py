# SPDX-License-Identifier: Apache-2.0
"""Images and weights lie with their channels last, as convolutions are fastest; losses and promises are as without.

The authors' files hold vectors, which have no such order.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_promises as promises
import torch
from conftest import CASES, DIMENSION, IMAGES, SIDE, Case
from golden import assert_close
from hostile import on_digits
from tiny_recipes import tiny
from torch import Tensor, nn

from kinfold.encoders import Encoder
from kinfold.pretrain import begin

LAST = torch.channels_last
PROMISES: list[Callable[[Case], None]] = [
    promises.test_the_gradient_reaches_the_query_and_nothing_else,
    promises.test_every_term_of_the_loss_trains,
    promises.test_only_the_views_that_a_pair_uses_are_encoded,
    promises.test_the_key_encoder_starts_as_a_copy_and_follows,
    promises.test_forward_reads_and_advance_writes,
    promises.test_the_same_views_give_the_same_loss_twice,
    promises.test_micro_batches_are_remembered_like_one_batch,
]


def lies_so(tensor: Tensor) -> bool:
    """Whether the channels are last in memory, and nowhere else."""
    return tensor.is_contiguous(memory_format=LAST) and not tensor.is_contiguous()


@pytest.mark.parametrize("method", ["moco", "invp"])
def test_a_step_of_a_run_has_images_and_weights_with_channels_last(method: str, tmp_path: Path) -> None:
    colour: dict[str, Any] = {"images": {"channels": 3, "mean": [0.3] * 3, "std": [0.35] * 3}}
    if method == "moco":
        colour["batch_norm"] = {"key_splits": 2, "shuffle_keys": True}
    training = begin(tiny(method, **colour), on_digits(tmp_path), quiet=True)
    learner = training.learner
    encoders = [learner.encoder] if learner.key_encoder is None else [learner.encoder, learner.key_encoder]
    met: list[bool] = []

    def look(_: nn.Module, given: tuple[Tensor]) -> None:
        if given[0].shape[2] > 1:  # of one pixel there is no order to tell
            met.append(lies_so(given[0]))

    for encoder in encoders:
        for module in encoder.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(look)
    for batch in training.loader.epoch(0):
        kernels = [p for encoder in encoders for p in encoder.parameters() if p.dim() == 4 and p.shape[2] > 1]
        assert len(kernels) >= 9 * len(encoders)
        assert all(map(lies_so, kernels))
        training.take_step(batch, 0)
        momenta = [training.optimizer.state[p]["momentum_buffer"] for p in kernels if p.requires_grad]
        assert all(map(lies_so, momenta))
    assert len(met) >= 3 * len(kernels)
    assert all(met)


@pytest.fixture
def _of_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    """Toy images and their convolution have three channels, so that there is an order to tell."""

    def encoder(self: Case, *, batch_norm: bool = False) -> Encoder:
        norm = [nn.BatchNorm2d(10)] if batch_norm else []
        backbone = nn.Sequential(nn.Conv2d(3, 10, 2), *norm, nn.Flatten(), nn.Tanh(), nn.Linear(40, 10), nn.Tanh())
        return Encoder(backbone, nn.Linear(10, DIMENSION))

    def batch(self: Case, seed: int = 0, *, size: int = 8) -> tuple[list[Tensor], Tensor]:
        source = torch.Generator().manual_seed(1000 + seed)
        views = [torch.randn(size, 3, SIDE, SIDE, generator=source, dtype=torch.float64) for _ in self.views.augment]
        return views, torch.randperm(IMAGES, generator=source)[:size]

    monkeypatch.setattr(Case, "encoder", encoder)
    monkeypatch.setattr(Case, "batch", batch)


@pytest.fixture
def _channels_last(_of_colour: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Toy images and weights have their channels last."""
    learner, batch = Case.learner, Case.batch

    def so(self: Case, **how: Any) -> Any:
        made: Any = learner(self, **how)
        made.to(memory_format=LAST)
        assert lies_so(made.encoder.backbone[0].weight)
        return made

    def given(self: Case, seed: int = 0, *, size: int = 8) -> tuple[list[Tensor], Tensor]:
        views, index = batch(self, seed, size=size)
        return [view.contiguous(memory_format=LAST) for view in views], index

    monkeypatch.setattr(Case, "learner", so)
    monkeypatch.setattr(Case, "batch", given)


@pytest.mark.usefixtures("_of_colour")
def test_losses_gradients_and_state_are_those_of_the_usual_order(case: Case) -> None:
    usual, other = case.learner(), case.learner()
    other.to(memory_format=LAST)  # type: ignore[call-overload]
    for step in range(2):
        views, index = case.batch(step)
        last = [view.contiguous(memory_format=LAST) for view in views]
        expected, memos = usual(views, index, case.epoch)
        found, others = other(last, index, case.epoch)
        for name, value in expected.items():
            assert_close(found[name], value, name)
        promises.total(expected).backward()
        promises.total(found).backward()
        for (name, ours), theirs in zip(other.encoder.named_parameters(), usual.encoder.parameters(), strict=True):
            assert_close(ours.grad, theirs.grad, name)
        usual.advance([memos], momentum=0.9)
        other.advance([others], momentum=0.9)
        for name, value in usual.state_dict().items():
            assert_close(other.state_dict()[name], value, name)


@pytest.mark.usefixtures("_channels_last")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__.removeprefix("test_"))
def test_a_promise_holds_with_channels_last(promise: Callable[[Case], None], case: Case) -> None:
    promise(case)


@pytest.mark.usefixtures("_channels_last")
def test_all_state_is_in_one_state_dict_with_channels_last_and_a_fused_optimiser(case: Case) -> None:
    promises.test_all_state_is_in_one_state_dict(case, 4, True)
