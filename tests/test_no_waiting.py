# SPDX-License-Identifier: Apache-2.0
"""A step waits for no device, whatever the recipe: the device is one that has no numbers to wait for."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from small_trainings import training_on
from tiny_recipes import tiny
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kinfold.data.fused import fused
from kinfold.data.photometric import photometric
from kinfold.devices import to_device
from kinfold.methods import METHODS
from kinfold.optim import Lars
from kinfold.reading import parse, plain
from kinfold.recipe import Recipe

PAPER = {"name": "invp", "positives": 5, "start_epoch": 1, "sets": "paper"}
PREDICTOR = {"hidden": [24], "out": 16, "batch_norm": True, "last": "plain"}
WATCHED: list[tuple[str, dict[str, Any]]] = [
    ("moco", {"batch_norm": {"key_splits": 4, "query_splits": 4, "shuffle_keys": True}}),
    ("ressl", {}),
    ("sce", {"accumulate": 2, "optimizer": {"name": "lars"}}),
    ("co2", {"memory": {"name": "batch"}, "optimizer": {"name": "adamw"}}),
    ("invp", {}),
    ("invp", {"method": PAPER, "memory": {"name": "bank", "nearest": 64, "repeats": False}}),
    ("moco", {"views": {"pairs": [[0, 1], [1, 0]]}, "memory": {"name": "queue", "size": 200, "batch_keys": True}}),
    ("sce", {"views": {"more": [5, 6], "pairs": [[0, 1], [1, 0], [2, 0], [3, 1]]}, "predictor": PREDICTOR}),
]
"""recipes of every method, with all that a step can do: two views, one, symmetric pairs, several crops"""


def watched(method: str, changes: dict[str, Any]) -> Recipe:
    """The recipe of an entry of `WATCHED`; `views.more` are sizes of crops beside those of `tiny`."""
    values = {**plain(tiny(method)), **changes}
    if "views" in changes:
        own = plain(tiny(method))["views"]
        more = [{**own["augment"][0], "size": size} for size in changes["views"].get("more", [])]
        values["views"] = {**own, "augment": [*own["augment"], *more], "pairs": changes["views"]["pairs"]}
    return parse(Recipe, values, source="test")


LOOKING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.unique_dim.default,
    torch.ops.aten._unique2.default,
}
"""operations whose result the host cannot go on without"""


class Waited(Exception):
    """The host has waited for the device."""


class NoTensorsFromNumbers(TorchFunctionMode):
    """Raises where numbers are made a tensor on another device, which copies them and waits."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type != "cpu":
            raise Waited(f"{func.__name__} on {kwargs['device']}")
        return func(*args, **kwargs)


class NoWaiting(TorchDispatchMode):
    """Raises where an operation on tensors of `device` makes the host wait."""

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.device = device
        self.sent = 0
        self.numbers = NoTensorsFromNumbers()

    def __enter__(self) -> NoWaiting:
        self.numbers.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.numbers.__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in LOOKING and args[0].device.type == self.device:
            raise Waited(f"{func}")
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            if masks:
                raise Waited(f"{func} with a mask")
        if func is torch.ops.aten._to_copy.default:
            self.copied(args[0].device, kwargs.get("device", args[0].device), kwargs.get("non_blocking", False))
        if func is torch.ops.aten.copy_.default:
            self.copied(args[1].device, args[0].device, args[2] if len(args) > 2 else False)
        return func(*args, **kwargs)

    def copied(self, origin: torch.device, goal: torch.device, non_blocking: bool) -> None:
        """Raise for a copy between host and device that is not on its way while the host goes on."""
        if origin.type == goal.type:
            return
        if goal.type != self.device or not non_blocking:
            raise Waited(f"a copy from {origin} to {goal}")
        self.sent += 1


class Autocast(TorchFunctionMode):
    """torch's mixed precision for devices that it has no rules for: convolutions and linear layers in bfloat16."""

    switched: ClassVar[list[bool]] = []
    """on or off, by depth: the innermost counts"""
    halved = 0

    def __init__(self, device: str, *, dtype: torch.dtype = torch.bfloat16, enabled: bool = True) -> None:
        super().__init__()
        self.enabled = enabled

    def __enter__(self) -> Autocast:
        self.switched.append(self.enabled)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.switched.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.switched[-1] and func in (F.conv2d, F.linear):
            args = tuple(each.bfloat16() if isinstance(each, Tensor) else each for each in args)
            Autocast.halved += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def _autocast_knows_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", Autocast)
    monkeypatch.setattr(Autocast, "halved", 0)


@pytest.mark.usefixtures("_autocast_knows_meta")
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("method", "changes"), WATCHED)
def test_a_step_waits_for_nothing(method: str, changes: dict[str, Any], half: bool, tmp_path: Path) -> None:
    # A tensor on the device "meta" has no numbers: whatever asks for one cannot go on.
    recipe = watched(method, changes)
    training = training_on(recipe, "meta", tmp_path, images=64)
    training.half = half
    batches = list(training.loader.epoch(2))
    with NoWaiting() as told:
        for batch in batches:
            assert all(view.device.type == "meta" for view in batch.views)
            losses = training.take_step(batch, 2)
            assert all(value.dtype == torch.float32 for value in losses.values())
    assert (Autocast.halved > 0) == half
    assert (told.sent > 0) == recipe.batch_norm.shuffle_keys
    assert len(training.unseen) == training.step == 2


@pytest.mark.usefixtures("_autocast_knows_meta")
def test_lars_in_the_form_of_a_gpu_waits_for_nothing(tmp_path: Path) -> None:
    training = training_on(watched("sce", {"optimizer": {"name": "lars"}}), "meta", tmp_path, images=64, fused=True)
    assert isinstance(training.optimizer, Lars)
    assert training.optimizer.foreach  # all parameters at once
    batches = list(training.loader.epoch(0))
    with NoWaiting():
        for batch in batches:
            training.take_step(batch, 0)
    assert len(training.optimizer.state) == len(list(training.learner.encoder.parameters()))


@pytest.mark.usefixtures("_autocast_knows_meta")
@pytest.mark.parametrize("change", [photometric, partial(fused, compiled=False)], ids=["photometric", "fused"])
@pytest.mark.parametrize(("method", "changes"), [WATCHED[0], WATCHED[-1]], ids=["two views", "several crops"])
def test_making_a_batch_from_a_set_that_lives_on_the_device_waits_for_nothing(
    method: str, changes: dict[str, Any], change: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kinfold.data.finish.photometric", change)
    batches = training_on(watched(method, changes), "meta", tmp_path).loader.epoch(0)
    next(batches)  # what is worked out once a run may be waited for
    with NoWaiting() as told:
        assert len(list(batches)) == 2
    assert told.sent > 0


def test_every_method_of_the_package_is_watched() -> None:
    assert {method for method, _ in WATCHED} == set(METHODS)


def test_what_waits_is_noticed() -> None:
    there, mask = torch.zeros(3, device="meta"), torch.zeros(3, dtype=torch.bool, device="meta")

    def fill() -> None:
        there[mask] = there + 1.0

    def numbers() -> Tensor:
        return torch.tensor([1.0], device="meta")

    for asks in (there.sum().item, lambda: there[mask], fill, there.cpu, lambda: torch.ones(3).to("meta"), numbers):
        with NoWaiting(), pytest.raises(Waited):
            asks()
    with NoWaiting() as told:
        torch.ones(3).to("meta", non_blocking=True)
    assert told.sent == 1


def test_nothing_is_read_from_memory_that_was_let_go() -> None:
    # On Apple's devices a copy that is not waited for reads its source later (torch's issue 189690).
    asked: dict[str, bool] = {}

    class Sent:
        def to(self, device: torch.device, *, non_blocking: bool) -> None:
            asked[device.type] = non_blocking

    source: Any = Sent()
    for name in ("cuda", "mps"):
        to_device(source, torch.device(name))
    assert asked == {"cuda": True, "mps": False}
