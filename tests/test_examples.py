# SPDX-License-Identifier: Apache-2.0
"""The programs beside the package: the examples learn, and the benchmarks measure what they say."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from kinfold.memory import Comparison, Queue
from kinfold.methods import SCE
from kinfold.recipe import load

ROOT = Path(__file__).parents[1]


def program(path: str) -> ModuleType:
    """Import a program by its path, as it stands."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str((ROOT / path).parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def unit(*shape: int) -> torch.Tensor:
    """Random unit vectors in float64."""
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def printed(path: str, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What a program prints."""
    monkeypatch.setattr(sys, "argv", [path, *words])
    program(path).main()
    return capsys.readouterr().out


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_the_loss_of_the_one_file_example_and_its_gradient_are_those_of_the_package(weight: float) -> None:
    example = program("examples/one_file_sce.py")
    q, k, memory = unit(7, 5).requires_grad_(), unit(7, 5), Queue(11, 5).double()
    theirs = example.similarity_loss(
        q, k, memory.keys, temperature=0.1, target_temperature=0.05, instance_weight=weight
    )
    seen, _ = memory.compare(q, k, torch.arange(7))
    method = SCE(temperature=0.1, target_temperature=0.05, instance_weight=weight, own_key="mask")
    ours = method.loss(seen, 0)["similarity"]
    torch.testing.assert_close(theirs, ours, rtol=1e-12, atol=1e-12)
    pulls = [torch.autograd.grad(loss, q)[0] for loss in (theirs, ours)]
    torch.testing.assert_close(*pulls, rtol=1e-10, atol=1e-12)


def test_the_one_file_example_learns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    told = printed("examples/one_file_sce.py", ["--steps", "50", "--queue", "256"], capsys, monkeypatch)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", told)]
    # The first steps meet a queue of random keys, which is easier than one of images.
    assert losses[-1] < losses[1] - 0.3, told
    accuracies = [float(share) for share in re.findall(r": +([\d.]+) %", told)]
    assert len(accuracies) == 2
    assert min(accuracies) > 80, told


def test_the_one_file_example_never_imports_the_package() -> None:
    text = (ROOT / "examples/one_file_sce.py").read_text(encoding="utf-8")
    assert set(re.findall(r"^(?:from|import) (\w+)", text, re.M)) <= {
        "__future__", "argparse", "copy", "sklearn", "torch", "torchvision",
    }  # fmt: skip


def test_the_loop_of_your_own_learns_and_its_loss_is_the_methods(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = printed("examples/your_own_loop.py", ["--steps", "40"], capsys, monkeypatch)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", told)]
    assert losses[-1] < losses[1] - 0.2, told

    learner = program("examples/your_own_loop.py").build().eval()
    views, index = [torch.randn(6, 1, 8, 8), torch.randn(6, 1, 8, 8)], torch.arange(6)
    terms, _ = learner(views, index, 0)
    q, k = learner.encoder(views[0]), learner.key_encoder(views[1])  # [6, D] each
    by_query, by_key = (torch.cat([(z * k).sum(1, keepdim=True), z @ learner.memory.keys.T], dim=1) for z in (q, k))
    seen = Comparison(by_query=by_query, by_key=by_key, own=torch.zeros(6, dtype=torch.int64))
    torch.testing.assert_close(terms["similarity"], learner.method.loss(seen, 0)["similarity"])


def test_after_a_loop_of_your_own_the_key_encoder_has_followed_and_the_queue_holds_the_last_keys() -> None:
    example = program("examples/your_own_loop.py")
    learner = example.build()
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    example.train(learner, torch.randn(300, 1, 8, 8), steps=2, batch=128)
    after = learner.state_dict()
    rows = (after["memory.keys"] != before["memory.keys"]).any(1)
    assert rows[:256].all()
    assert not rows[256:].any()
    moved = [
        name
        for name, _ in learner.key_encoder.named_parameters()
        if (after[f"key_encoder.{name}"] != before[f"key_encoder.{name}"]).any()
    ]
    assert len(moved) == len(list(learner.key_encoder.parameters()))


def test_the_overhead_benchmark_measures_both_loops_on_the_same_recipe(tmp_path: Path) -> None:
    benchmark = program("benchmarks/loop_overhead.py")
    words = [
        "backbone.name=resnet10_w8",
        "batch_size=8",
        "epochs=1",
        "batch_norm.query_splits=1",
        "batch_norm.key_splits=1",
    ]
    recipe, _ = load("moco/cifar10-notebook-asymmetric", words, run={"data": "-", "out": "-"})
    benchmark.make_images(tmp_path / "images", (benchmark.WARM_UP + 2) * 8)
    ours = benchmark.measure_kinfold(recipe, tmp_path / "images", tmp_path / "run", "cpu")
    bare = benchmark.measure_bare(recipe, 2, "cpu")
    assert ours["images_per_second"] > 0
    assert 0 <= ours["waiting_for_data"] <= 1
    assert bare["images_per_second"] > 0
    assert benchmark.peak_memory("cpu")["peak_memory_mb"] > 50


def test_the_overhead_benchmark_takes_turns_and_gives_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = program("benchmarks/loop_overhead.py")
    order: list[str] = []
    speeds = {"kinfold": iter([90.0, 50.0, 80.0]), "bare": iter([100.0, 100.0, 100.0])}

    def measured(which: str, given: object) -> dict[str, float]:
        order.append(which)
        return {"images_per_second": next(speeds[which]), "peak_memory_mb": 700.0}

    monkeypatch.setattr(benchmark, "one_measurement", measured)
    result = benchmark.compare(SimpleNamespace(pairs=3))
    assert order == ["kinfold", "bare", "bare", "kinfold", "kinfold", "bare"]
    assert result["medians"]["kinfold"]["images_per_second"] == 80.0
    assert result["speed_share"] == 0.8


def test_the_gpu_benchmark_stops_with_its_minutes_and_goes_on_where_it_stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    benchmark = program("benchmarks/cifar10_gpu.py")
    words = ["digits", "--data", "digits", "--device", "cpu", "--quick", "--limit", "256", "--out", str(tmp_path)]
    settings = ["backbone.name=resnet10_w8", "log_every=1", "epochs=1", "learning_rate.warmup_epochs=0"]
    monkeypatch.setattr(sys, "argv", ["cifar10_gpu.py", *words, "--minutes", "0", *settings])
    with pytest.raises(SystemExit) as stopped:
        benchmark.main()
    assert stopped.value.code == benchmark.UNFINISHED
    monkeypatch.setattr(sys, "argv", ["cifar10_gpu.py", *words, "--minutes", "5", *settings])
    benchmark.main()
    written = json.loads(capsys.readouterr().out.split("\n", 1)[1])
    assert written["epochs"] == 1
    assert written["epochs_of_recipe"] == load("digits", run={"data": "-", "out": "-"})[0].epochs
    assert 10 < written["knn_trained"] <= 100
    assert 10 < written["linear"] <= 100
    assert written["images_per_second"] > 0
