# SPDX-License-Identifier: Apache-2.0
"""How a run is computed changes no bit of it: where its images live, who decodes, what is compiled, when it looks.

Two ways of making views are not equal to the bit, by design: the compiled form of the augmentations on a device, and
decoding at a fraction. With either a run is still a function of its recipe and its images.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile import on_digits, signal_after
from PIL import Image
from small_trainings import as_on_a_gpu, quick_compiler
from test_resume import assert_equal_to_the_bit
from tiny_recipes import tiny

from kinfold import checkpoint
from kinfold.data import finish, fused
from kinfold.methods import METHODS
from kinfold.optim import build_optimizer
from kinfold.pretrain import pretrain
from kinfold.reading import plain
from kinfold.recipe import Recipe, Run

WAYS: dict[str, list[dict[str, Any]]] = {
    "by workers, looked at later": [{"resident": False, "workers": 2, "log_every": 4, "later": True}],
    "stopped in the middle of an epoch and gone on in another way": [
        {"resident": False, "workers": 0, "stop": 2, "checkpoint_steps": 1000},
        {"resident": True, "later": True, "log_every": 1000, "stop": 5},
        {"resident": False, "workers": 1, "checkpoint_steps": 2},
    ],
}
"""the starts of a run, each with what is not as in the plain one; `stop` is the step of a signal"""
COMPILED: list[dict[str, Any]] = [
    {"resident": False, "workers": 0, "compile": True, "stop": 2},
    {"resident": True, "later": True, "log_every": 3},
]


def state_after(recipe: Recipe, folder: Path, starts: list[dict[str, Any]], **common: Any) -> dict[str, Any]:
    """The last checkpoint of a run that was started so often."""
    for number, how in enumerate(starts):
        how = {"limit": 104, **common, **how}  # three steps an epoch, and eight images over
        stop, later = how.pop("stop", None), how.pop("later", False)
        with ExitStack() as stack:
            if later:
                stack.enter_context(as_on_a_gpu())
            if how.get("compile"):
                stack.enter_context(quick_compiler())
            if stop is not None:
                signal_after(stack.enter_context(pytest.MonkeyPatch.context()), stop, signal.SIGTERM)
            data = how.pop("data", "digits")
            run = Run(**{**plain(on_digits(folder, **how)), "data": data})
            done = pretrain(recipe, run, quiet=True)
        assert (done.step == stop) if stop is not None else (done.step == done.steps), number
    found = checkpoint.load_latest(folder)
    assert found is not None
    return dict(found.state)


@pytest.mark.parametrize("method", list(METHODS))
def test_how_a_run_is_computed_changes_no_bit(method: str, tmp_path: Path) -> None:
    recipe = tiny(method, batch_norm={"key_splits": 4, "shuffle_keys": method != "invp"})
    expected = state_after(recipe, tmp_path / "plain", [{"resident": True}])
    for way, starts in WAYS.items():
        assert_equal_to_the_bit(expected, state_after(recipe, tmp_path / way, starts), way)


@pytest.mark.parametrize("method", ["sce", "invp"])
def test_a_run_with_a_fused_optimiser_is_compiled_in_parts_and_the_same(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kinfold.pretrain.build_optimizer", partial(build_optimizer, fused=True))
    recipe = tiny(method)
    expected = state_after(recipe, tmp_path / "plain", [{"resident": True}])
    assert_equal_to_the_bit(expected, state_after(recipe, tmp_path / "compiled", COMPILED))


@pytest.fixture
def _fused_augmentations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Views are made as on a GPU with `compile`: by the compiled form, up to the point where code would be made."""
    fused._compiled.cache_clear()
    monkeypatch.setattr(finish, "photometric", fused.fused)
    with quick_compiler(fullgraph=True) as asked:
        yield
    assert asked
    fused._compiled.cache_clear()


@pytest.mark.usefixtures("_fused_augmentations")
@pytest.mark.parametrize("method", ["sce", "invp"])
def test_a_run_with_compiled_augmentations_is_the_same_in_any_way(method: str, tmp_path: Path) -> None:
    recipe = tiny(method)
    expected = state_after(recipe, tmp_path / "plain", [{"resident": True}])
    for way, starts in WAYS.items():
        assert_equal_to_the_bit(expected, state_after(recipe, tmp_path / way, starts), way)


def test_a_run_that_decodes_at_a_fraction_is_the_same_in_any_way(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    source = np.random.default_rng(0)
    for number in range(40):
        small = Image.fromarray(source.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        small.resize((96, 72)).save(photos / f"{number:02}.jpg", quality=90)
    states = {}
    for scaled in (True, False):
        images = {"channels": 3, "mean": [0.5] * 3, "std": [0.3] * 3, "scaled_decode": scaled}
        recipe = tiny("sce", images=images, batch_size=8)
        common = {"data": str(photos), "limit": 24}
        folder = tmp_path / str(scaled)
        states[scaled] = state_after(recipe, folder / "plain", [{"workers": 0}], **common)
        if scaled:
            starts = [{"workers": 2, "stop": 2}, {"workers": 0, "resident": False, "later": True, "log_every": 5}]
            assert_equal_to_the_bit(states[True], state_after(recipe, folder / "other", starts, **common))
    weights = [state["learner"]["encoder.backbone.conv1.weight"] for state in states.values()]
    assert not torch.equal(*weights)  # decoding at a fraction did happen
