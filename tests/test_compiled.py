# SPDX-License-Identifier: Apache-2.0
"""Compiled encoders train as plain ones do, and what a graph has given is kept where no replay writes over it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import assert_close
from hostile import on_digits
from small_trainings import quick_compiler, training_on
from test_resume import assert_equal_to_the_bit
from tiny_recipes import tiny
from torch import Tensor, nn

from kinfold.data.loader import Batch
from kinfold.encoders import Encoder
from kinfold.errors import UserError
from kinfold.learner import Learner
from kinfold.memory import Queue
from kinfold.methods import MoCo
from kinfold.pretrain import pretrain
from kinfold.reading import plain
from kinfold.recipe import Recipe
from kinfold.views import Augmentation, Views


def trained(recipe: Recipe, folder: Path, how: bool | str, batches: list[Batch], start: Any = None) -> dict[str, Any]:
    training = training_on(recipe, "cpu", folder, fused=True)
    if start is not None:
        training.learner.load_state_dict(start["learner"])
        training.optimizer.load_state_dict(start["optimizer"])
        training.step = start["step"]
    if how:
        training.learner.compile_encoders(graphs=how == "graphs")
    for batch in batches:
        training.take_step(batch, 0)
    return copy.deepcopy(
        {
            "learner": training.learner.state_dict(),
            "optimizer": training.optimizer.state_dict(),
            "step": training.step,
        }
    )


def test_a_run_goes_on_compiled_and_back(tmp_path: Path) -> None:
    recipe = tiny("moco", batch_norm={"key_splits": 4, "query_splits": 2, "shuffle_keys": True})
    batches = list(training_on(recipe, "cpu", tmp_path).loader.epoch(0))
    expected = trained(recipe, tmp_path, False, batches)
    state = None
    with quick_compiler() as asked:
        for how, batch in zip((False, "graphs", False), batches, strict=True):
            state = trained(recipe, tmp_path, how, [batch], state)
    assert state is not None
    assert_equal_to_the_bit(expected, state)
    assert [each["mode"] for each in asked] == ["reduce-overhead"] * 2


def tiny_learner() -> Learner:
    torch.manual_seed(5)
    return Learner(
        method=MoCo(),
        views=Views(augment=(Augmentation(size=4), Augmentation(size=4)), pairs=((0, 1), (1, 0))),
        encoder=Encoder(nn.Sequential(nn.Conv2d(1, 5, 4), nn.Flatten(), nn.Tanh()), nn.Linear(5, 3)),
        memory=Queue(20, 3),
    )


def test_encoders_are_compiled_for_every_kind_of_batch() -> None:
    learner = tiny_learner()
    compiled = torch._dynamo.utils.counters["stats"]
    # torch's own limit is 8, of what both encoders need together.
    with quick_compiler(), torch._dynamo.config.patch(recompile_limit=8):
        learner.compile_encoders()
        for images in range(2, 9):
            before = compiled["unique_graphs"]
            learner([torch.randn(images, 1, 4, 4) for _ in range(2)], torch.arange(images), 0)
            assert compiled["unique_graphs"] == before + 2


class Replayed(nn.Module):
    """An encoder whose output always lies in the same memory, as that of a CUDA graph does."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.out: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        z: Tensor = self.encoder(images)  # [B, D]
        if torch.is_grad_enabled():
            return z
        self.out = z if self.out is None else self.out.copy_(z)
        return self.out


@pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "shuffled"])
def test_with_graphs_nothing_that_is_kept_lies_in_a_graphs_memory(shuffle: bool) -> None:
    def learner(graphs: bool) -> Learner:
        made = tiny_learner()
        made.shuffle_keys = shuffle
        if graphs:
            made.compile_encoders(graphs=True)
            assert made.key_encoder is not None
            # In place of compiled encoders: code is only made when one is called.
            made.key_encoder = Replayed(Encoder(made.key_encoder.backbone, made.key_encoder.head))  # type: ignore[assignment]
            made.encoder = Encoder(made.encoder.backbone, made.encoder.head)
        return made

    views, index = [torch.randn(6, 1, 4, 4) for _ in range(2)], torch.arange(6)
    expected_losses, expected = learner(False)(views, index, 0)
    graphed = learner(True)
    losses, memos = graphed(views, index, 0)
    replayed: Any = graphed.key_encoder
    replayed(torch.randn(6, 1, 4, 4))  # the next step's replay, before the memory has taken the keys
    assert_close(losses["instance"], expected_losses["instance"])
    for memo, keys in zip(memos, expected, strict=True):
        assert torch.equal(memo[0], keys[0])


def test_graphs_are_refused_where_gradients_are_summed_up(tmp_path: Path) -> None:
    run = on_digits(tmp_path / "run", compile="graphs")
    with pytest.raises(UserError, match=r"compile=graphs is for one process.*accumulate=2.*compile=true"):
        pretrain(tiny("moco", accumulate=2), run, quiet=True)
    assert plain(run)["compile"] == "graphs"
