# SPDX-License-Identifier: Apache-2.0
"""Split batch norm against the authors' numbers and against loops, in every memory layout; and synchronised."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from golden import assert_close, load
from torch import Tensor, nn

from kinfold import distributed
from kinfold.encoders import (
    Backbone,
    BatchNorm,
    Encoder,
    Head,
    SplitBatchNorm,
    build_backbone,
    build_head,
    split_batch_norm,
)
from kinfold.errors import UserError
from kinfold.learner import Learner
from kinfold.memory import Queue
from kinfold.methods import MoCo
from kinfold.recipe import load as load_recipe
from kinfold.views import Augmentation, Views

LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels-last"])
def test_output_and_running_statistics_are_the_authors(layout: torch.memory_format) -> None:
    golden = load("moco_splitbn")
    norm = SplitBatchNorm(3, int(golden["num_splits"])).double()
    y = norm(golden["x"].contiguous(memory_format=layout))
    assert_close(y, golden["y"], "y")
    assert_close(norm.running_mean, golden["running_mean"], "mean")  # type: ignore[arg-type]
    assert_close(norm.running_var, golden["running_var"], "variance")  # type: ignore[arg-type]
    assert int(norm.num_batches_tracked) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels-last"])
@pytest.mark.parametrize(("images", "splits"), [(8, 4), (8, 8), (9, 4), (11, 8), (6, 8), (5, 1)])
def test_any_batch_is_normalised_in_interleaved_groups(images: int, splits: int, layout: torch.memory_format) -> None:
    x = torch.randn(images, 3, 2, 4, dtype=torch.float64)
    norm = SplitBatchNorm(3, splits).double()
    y = norm(x.contiguous(memory_format=layout))
    expected, mean, var = oracles.split_batch_norm(x.numpy(), min(splits, images))
    assert_close(y, torch.from_numpy(expected), "y")
    assert_close(norm.running_mean, torch.from_numpy(mean), "mean")  # type: ignore[arg-type]
    assert_close(norm.running_var, torch.from_numpy(var), "variance")  # type: ignore[arg-type]


@pytest.mark.parametrize("images", [8, 10], ids=["even", "uneven"])
def test_the_gradient_is_that_of_plain_batch_norm_on_each_group(images: int) -> None:
    def gradients(norm: nn.BatchNorm2d, groups: list[slice]) -> list[Tensor]:
        x = source.clone().requires_grad_()
        y = torch.zeros_like(x)
        for group in groups:
            y = y.index_add(0, torch.arange(images)[group], norm(x[group]))
        return list(torch.autograd.grad((y * probe).sum(), [x, norm.weight, norm.bias]))

    source, probe = (torch.randn(images, 3, 2, 2, dtype=torch.float64) for _ in range(2))
    plain, split = nn.BatchNorm2d(3).double(), SplitBatchNorm(3, 4).double()
    for norm in (plain, split):
        norm.weight.data = torch.tensor([0.5, 1.5, -1.0], dtype=torch.float64)
    ours = gradients(split, [slice(None)])
    theirs = gradients(plain, [slice(s, None, 4) for s in range(4)])
    for given, expected in zip(ours, theirs, strict=True):
        assert_close(given, expected)


def test_in_evaluation_it_is_ordinary_batch_norm() -> None:
    plain, split = nn.BatchNorm2d(3).eval(), SplitBatchNorm(3, 4).eval()
    for norm in (plain, split):
        norm.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))  # type: ignore[union-attr]
    x = torch.randn(7, 3, 2, 2)
    assert torch.equal(plain(x), split(x))


def test_every_batch_norm_of_a_resnet_is_split_and_keeps_its_state() -> None:
    model = build_backbone(Backbone(name="resnet10_w8", stem="small"))
    model(torch.randn(4, 3, 16, 16))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    split_batch_norm(model, 2)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert all(isinstance(m, SplitBatchNorm) and m.splits == 2 for m in norms)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_query_and_key_encoders_have_the_splits_they_were_given() -> None:
    def splits(module: nn.Module) -> set[int]:
        return {
            m.splits if isinstance(m, SplitBatchNorm) else 1 for m in module.modules() if isinstance(m, nn.BatchNorm2d)
        }

    view = Augmentation(size=16)
    for query, key in ((1, 8), (4, 4), (2, 1)):
        trunk = build_backbone(Backbone(name="resnet10_w8", stem="small"))
        learner = Learner(
            method=MoCo(),
            views=Views(augment=(view, view)),
            encoder=Encoder(trunk, nn.Linear(64, 4)),
            memory=Queue(8, 4),
            batch_norm=BatchNorm(query_splits=query, key_splits=key),
        )
        assert learner.key_encoder is not None
        assert splits(learner.encoder) == {query}
        assert splits(learner.key_encoder) == {key}


def test_a_group_sees_only_its_own_images() -> None:
    norm = SplitBatchNorm(2, 4, track_running_stats=False).double()
    x = torch.randn(8, 2, 3, 3, dtype=torch.float64)
    changed = x.clone()
    changed[1] += 5.0  # image 1 is in the group of 1 and 5
    moved = (norm(x) - norm(changed)).abs().amax((1, 2, 3)) > 1e-9
    assert np.flatnonzero(moved.numpy()).tolist() == [1, 5]


@pytest.mark.parametrize("side", [1, 3])
@pytest.mark.parametrize("channels", [1, 5])
def test_channels_last_images_are_given_what_others_are_and_stay_so(side: int, channels: int) -> None:
    def gradients(x: Tensor) -> list[Tensor]:
        norm = SplitBatchNorm(channels, 4).double()
        norm.weight.data = torch.linspace(0.5, 2, channels, dtype=torch.float64)
        y = norm(x.requires_grad_())
        assert (
            channels == 1
            or side == 1
            or y.is_contiguous(memory_format=torch.channels_last) == x.is_contiguous(memory_format=torch.channels_last)
        )
        found = torch.autograd.grad((y * probe).sum(), [x, norm.weight, norm.bias])
        return [y, *found, norm.running_mean, norm.running_var]  # type: ignore[list-item]

    probe = torch.randn(8, channels, side, side, dtype=torch.float64)
    x = torch.randn(8, channels, side, side, dtype=torch.float64)
    plain_, last = gradients(x.clone()), gradients(x.clone(memory_format=torch.channels_last))
    for given, expected in zip(last, plain_, strict=True):
        assert_close(given, expected)


def synchronisable() -> Learner:
    """A learner with batch norm in its backbones, behind hidden layers and at the end of its heads."""
    view = Augmentation(size=16)
    head = build_head(Head(hidden=(8,), out=4, batch_norm=True, last="batch-norm"), 64)
    learner = Learner(
        method=MoCo(),
        views=Views(augment=(view, view)),
        encoder=Encoder(build_backbone(Backbone(name="resnet10_w8", stem="small")), head),
        memory=Queue(8, 4),
        batch_norm=BatchNorm(synchronise=True),
    )
    learner.encoder(torch.randn(4, 3, 16, 16))  # running statistics that are not the first ones
    return learner


def kinds(learner: Learner) -> list[type[nn.Module]]:
    return [type(m) for m in learner.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def test_in_one_process_there_is_nothing_to_synchronise() -> None:
    learner = synchronisable()
    before = list(learner.modules())
    learner.synchronise_batch_norm()
    assert all(now is then for now, then in zip(learner.modules(), before, strict=True))
    assert set(kinds(learner)) == {nn.BatchNorm1d, nn.BatchNorm2d}


def test_synchronised_statistics_are_refused_where_torch_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = synchronisable()
    monkeypatch.setattr(distributed, "world", lambda: 2)
    with pytest.raises(UserError, match=r"CUDA devices only.*batch_norm\.synchronise=false"):
        learner.synchronise_batch_norm()
    assert set(kinds(learner)) == {nn.BatchNorm1d, nn.BatchNorm2d}


def test_every_batch_norm_is_synchronised_and_nothing_else_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnCuda:
        device = torch.device("cuda", 0)

    learner = synchronisable()
    images = torch.randn(4, 3, 16, 16)
    state = learner.state_dict(keep_vars=True)
    values = {name: value.clone() for name, value in state.items()}
    parameters = list(learner.parameters())
    count = len(kinds(learner))
    learner.eval()
    z = learner.encoder(images)
    with monkeypatch.context() as patch:  # as though the learner lay on the first of two GPUs
        patch.setattr(distributed, "world", lambda: 2)
        patch.setattr(Learner, "step", OnCuda, raising=False)
        learner.synchronise_batch_norm()
    assert learner.key_encoder is not None
    assert kinds(learner) == [nn.SyncBatchNorm] * count
    assert count == 2 * (len([m for m in learner.key_encoder.modules() if isinstance(m, nn.SyncBatchNorm)]))
    assert all(now is then for now, then in zip(learner.parameters(), parameters, strict=True))
    after = learner.state_dict(keep_vars=True)
    assert after.keys() == state.keys()
    for name, value in after.items():
        assert value is state[name], name
        assert torch.equal(value, values[name]), name
    assert not any(parameter.requires_grad for parameter in learner.key_encoder.parameters())
    assert not any(module.training for module in learner.modules())
    assert torch.equal(learner.encoder(images), z)


@pytest.mark.parametrize("splits", ["query_splits", "key_splits"])
def test_a_recipe_does_not_split_and_synchronise_at_once(splits: str) -> None:
    changes = ["batch_norm.shuffle_keys=false", "batch_norm.synchronise=true"]
    run = {"data": "digits", "out": "unused"}
    assert load_recipe("digits", [*changes, "batch_norm.query_splits=1", "batch_norm.key_splits=1"], run=run)[0]
    with pytest.raises(UserError, match=r"batch_norm\.synchronise: .* exclude each other"):
        load_recipe("digits", [*changes, f"batch_norm.{splits}=2"], run=run)
