# SPDX-License-Identifier: Apache-2.0
"""Linear classification stops and goes on to the bit, and several processes train as one."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_processes import free_port
from test_resume import assert_equal_to_the_bit, processes

from kinfold import distributed
from kinfold.checkpoint import load_latest
from kinfold.data.sources import Subset, open_source
from kinfold.encoders import Backbone, build_backbone
from kinfold.errors import UserError
from kinfold.evaluate import FrozenBackbone, Labelled, Linear, Stopped
from kinfold.evaluate.linear import Cosine, linear
from kinfold.evaluate.linear.classifier import Classifier
from kinfold.evaluate.resumable import Resumable
from kinfold.views import Augmentation

SMALL = Linear(epochs=3, batch_size=32, learning_rates=(0.1, 1.0), schedule=Cosine(), drop_last=False)
VIEWS = Augmentation(size=8, flip=0.0, scale=(0.5, 1.0))
BLOCKS = {"blocks": (3, 3, 2, 2, 1), "batch_norm": "train", "learning_rates": (0.5,)}
WAYS: dict[str, dict[str, Any]] = {
    "cached": {},
    "views": {"augment": VIEWS},
    "cached blocks": {**BLOCKS},
    "blocks": {**BLOCKS, "augment": VIEWS, "measured": "before", "epochs": 4},
}
STEPS = 12
"""of each: three epochs of four batches"""


class Slow(Subset):
    """Images that are read one by one, as files are: of two sizes, so that the set does not stay on the device."""

    def read(self, i: int) -> Any:
        image = super().read(i)
        return image if i % 2 else np.ascontiguousarray(np.repeat(image, 2, axis=0))  # type: ignore[call-overload]


def measure(
    progress: Path | None, way: str, *, workers: int = 0, cache: Path | None = None, images: int | None = None
) -> dict[str, float]:
    torch.manual_seed(0)
    module = build_backbone(Backbone(name="resnet10_w8", stem="small"), 1)
    backbone = FrozenBackbone(module=module, size=8, resize=8, channels=1, mean=(0.3,), std=(0.38,))
    # The last of four batches has 9 images, or 8 where the loader takes as many as divide over two processes.
    count = images or (104 if "augment" in WAYS[way] else 105)
    data = Labelled(
        train=Slow(open_source("digits"), np.arange(count)),
        test=Subset(open_source("digits", split="test"), np.arange(61)),
        progress=progress,
        workers=workers,
        cache=cache,
        say=lambda text: None,
    )
    return linear(backbone, data, dataclasses.replace(SMALL, **WAYS[way]))


def state_of(folder: Path) -> dict[str, Any]:
    found = load_latest(folder)
    assert found is not None
    assert found.step == STEPS
    return found.state


def stopping_at(count: int) -> Callable[..., Any]:
    """A step of a classifier that sends SIGTERM to its own process at its `count`-th call."""
    step, calls = Classifier.step, iter(range(1, 1_000_000))

    def stop(*arguments: Any, **words: Any) -> torch.Tensor:
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments, **words)

    return stop


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("step", [1, 8, 10], ids=["at the start", "between two epochs", "in the last epoch"])
def test_a_stopped_probe_goes_on_to_the_bit(way: str, step: int, tmp_path: Path) -> None:
    whole = measure(tmp_path / "whole", way)
    heads = 10 // 5 if "blocks" not in way else 5  # calls in a step: two rates, or five maps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classifier, "step", stopping_at(heads * (step - 1) + 1))
        with pytest.raises(Stopped, match=f"Stopped at step {step} of {STEPS}. The same command goes on"):
            measure(tmp_path / "broken", way, cache=tmp_path / "cache")
    # It goes on with what its own file holds, and with features that are found again.
    assert measure(tmp_path / "broken", way, cache=tmp_path / "cache", workers=2 if way == "views" else 0) == whole
    assert_equal_to_the_bit(state_of(tmp_path / "whole"), state_of(tmp_path / "broken"))


def go(folder: str, way: str, workers: int) -> None:
    """Measure with a checkpoint after every step, slowly enough to be killed."""
    torch.set_num_threads(1)
    os.setsid()
    torch.multiprocessing.set_start_method("fork", force=True)
    Resumable.__init__.__kwdefaults__["seconds"] = 0.0
    measure(Path(folder), way, workers=workers)


@pytest.mark.parametrize(("way", "workers"), [("blocks", 2), ("cached", 0)])
def test_a_killed_probe_goes_on_to_the_bit(way: str, workers: int, tmp_path: Path) -> None:
    measure(tmp_path / "whole", way)
    folder = tmp_path / "broken"
    for _ in range(8):  # a kill that came too late or between two epochs is tried again
        shutil.rmtree(folder, ignore_errors=True)
        process = processes.Process(target=go, args=(str(folder), way, workers))
        process.start()
        deadline = time.monotonic() + 100
        while not any(int(path.stem[5:]) >= 5 for path in (folder / "checkpoints").glob("step-*.pt")):
            assert process.is_alive(), f"it ended by itself with {process.exitcode}"
            assert time.monotonic() < deadline
            time.sleep(0.001)
        os.killpg(process.pid or 0, signal.SIGKILL)
        process.join(60)
        found = load_latest(folder)
        assert found is not None
        if found.step % 4 and found.step < STEPS:
            break
    assert found.step % 4, "no kill came in the middle of an epoch"
    assert measure(folder, way) == measure(None, way)
    assert_equal_to_the_bit(state_of(tmp_path / "whole"), state_of(folder))


def rank_of(rank: int, world: int, port: int, out: str) -> None:
    """Measure in all ways as one rank of `world`, and leave values and state in files."""
    torch.set_num_threads(1)
    if world > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
        distributed.start("cpu")
    for way in WAYS:
        values = measure(Path(out, f"{world}", way), way)
        torch.save(values, Path(out, f"{world}-{rank}-{way}.pt"))
    distributed.stop()


def test_one_process_and_two_train_the_same(tmp_path: Path) -> None:
    port = free_port()
    started = [
        processes.Process(target=rank_of, args=(rank, world, port, str(tmp_path)))
        for rank, world in ((0, 1), (0, 2), (1, 2))
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(200)
        assert process.exitcode == 0
    for way in WAYS:
        one, first, second = (torch.load(tmp_path / f"{name}-{way}.pt") for name in ("1-0", "2-0", "2-1"))
        assert first == second
        assert first == pytest.approx(one, abs=100 / 61 + 1e-9)  # an image that lies on an edge may fall
        alone, pair = (state_of(tmp_path / world / way) for world in ("1", "2"))
        for mine, theirs in zip(alone["heads"], pair["heads"], strict=True):
            for kind in ("parameters", "speeds", "statistics"):
                for a, b in zip(mine[kind], theirs[kind], strict=True):
                    torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(pair["losses"], alone["losses"], rtol=1e-5, atol=1e-6)


def test_other_images_are_not_gone_on_with(tmp_path: Path) -> None:
    measure(tmp_path, "cached")
    with pytest.raises(UserError, match="left by a training on other images"):
        measure(tmp_path, "cached", images=110)  # as many batches
