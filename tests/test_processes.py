# SPDX-License-Identifier: Apache-2.0
"""Promise 7: one process and several train the same, for every method, with a queue and with a bank."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_trainings import quick_compiler, training_on
from test_resume import processes
from tiny_recipes import tiny

from kinfold import distributed
from kinfold.checkpoint import load_latest
from kinfold.methods import METHODS
from kinfold.pretrain import batch_norm_apart, numbers
from kinfold.reading import parse, plain, to_yaml
from kinfold.recipe import Recipe
from kinfold.training import Training, build_learner

STEPS = 4
IMAGES = 301  # no multiple of the processes, so that a bank's shares differ


def join(rank: int, world: int, port: int) -> None:
    """Become one rank of `world`."""
    torch.set_num_threads(1)
    if world > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
        distributed.start("cpu")


def in_double(rank: int, world: int, values: dict[str, Any], out: str) -> Training:
    """A run in double precision that stands at the beginning of its third epoch."""
    recipe = parse(Recipe, values, source="test")
    how: dict[str, Any] = {"rank": rank, "world": world, "resident": False}
    training = training_on(recipe, "cpu", Path(out), images=IMAGES, dtype=torch.float64, **how)
    training.step = 2 * training.loader.steps_per_epoch
    return training


def take(training: Training, steps: int) -> list[float]:
    """Take the next steps of the third epoch; returns their losses."""
    losses = []
    for _, batch in zip(range(steps), training.loader.epoch(2, training.step % training.loader.steps_per_epoch)):
        terms = training.take_step(batch._replace(views=[view.double() for view in batch.views]), 2)
        losses.append(numbers(terms)["loss"])
    return losses


def train(rank: int, world: int, port: int, values: dict[str, Any], out: str, compiled: bool = False) -> None:
    """Take four steps as one rank of `world`, and leave the state in a file."""
    join(rank, world, port)
    training = in_double(rank, world, values, out)
    with quick_compiler() if compiled else nullcontext():
        if compiled:
            training.learner.compile_encoders()
        losses = take(training, STEPS)
    torch.save({"state": training.learner.state_dict(), "losses": losses}, f"{out}/{world}-{rank}.pt")
    distributed.stop()


def go_on(rank: int, world: int, port: int, values: dict[str, Any], out: str) -> None:
    """Take two steps from the last checkpoint on, as one rank of `world`, and leave another."""
    join(rank, world, port)
    training = in_double(rank, world, values, out)
    found = load_latest(Path(out))
    if found is not None:
        training.restore(found)
    take(training, 2)
    training.save()
    distributed.stop()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def both_ways(recipe: Recipe, tmp_path: Path, *, compiled: bool = False) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train as one process and as two, these `compiled`; returns what the one has, and what each of the two has."""
    values = plain(recipe)
    alone = processes.Process(target=train, args=(0, 1, 0, values, str(tmp_path)))
    port = free_port()
    ranks = [(rank, 2, port, values, str(tmp_path), compiled) for rank in range(2)]
    pair = [processes.Process(target=train, args=arguments) for arguments in ranks]
    for process in (alone, *pair):
        process.start()
    for process in (alone, *pair):
        process.join(120)
        assert process.exitcode == 0
    one = torch.load(tmp_path / "1-0.pt", weights_only=True)
    return one, [torch.load(tmp_path / f"2-{rank}.pt", weights_only=True) for rank in range(2)]


def assert_alike(recipe: Recipe, tmp_path: Path, *, compiled: bool = False) -> None:
    one, pair = both_ways(recipe, tmp_path, compiled=compiled)
    start = build_learner(recipe, images=IMAGES).double().state_dict()
    moved = [name for name, value in one["state"].items() if not torch.equal(value, start[name])]
    assert any(name.startswith("encoder.backbone") for name in moved)
    assert any(name.startswith("memory.") for name in moved)
    for rank, other in enumerate(pair):
        assert other["losses"] == pytest.approx(one["losses"], rel=1e-9)
        for name, value in one["state"].items():
            if rank and name == "memory.points":  # of a bank each rank holds its share, and the main process saves all
                value = value[IMAGES // 2 :]
            torch.testing.assert_close(other["state"][name], value, rtol=1e-6, atol=1e-9, msg=f"{name} on rank {rank}")
    for name, value in pair[0]["state"].items():
        mine = value[IMAGES // 2 :] if name == "memory.points" else value
        assert torch.equal(mine, pair[1]["state"][name]), f"{name} differs between the ranks"


@pytest.mark.parametrize("method", list(METHODS))
def test_one_process_and_two_train_the_same(method: str, tmp_path: Path) -> None:
    # Split batch norm in one process is plain batch norm in two; keys are shuffled over the ranks.
    splits = {"query_splits": 2, "key_splits": 2, "shuffle_keys": method != "invp"}
    assert_alike(tiny(method, batch_norm=splits, epochs=4), tmp_path)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("moco", {"memory": {"name": "batch"}}),
        ("sce", {"memory": {"name": "queue", "size": 100, "batch_keys": True}}),
        ("co2", {"accumulate": 2, "batch_norm": {"query_splits": 2, "key_splits": 2}}),
    ],
    ids=["the keys of the batch", "queue and batch", "accumulation"],
)
def test_other_memories_and_accumulation_train_the_same(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    splits = {"batch_norm": {"query_splits": 2, "key_splits": 2}}
    symmetric = {"views": {**plain(tiny(name))["views"], "pairs": [[0, 1], [1, 0]]}}
    assert_alike(tiny(name, **{**splits, **symmetric, **changes, "epochs": 4}), tmp_path)


def test_two_processes_with_compiled_encoders_train_as_one_without(tmp_path: Path) -> None:
    splits = {"query_splits": 2, "key_splits": 2, "shuffle_keys": True}
    assert_alike(tiny("moco", batch_norm=splits, epochs=4), tmp_path, compiled=True)


def test_a_bank_of_sets_and_accumulation_train_the_same(tmp_path: Path) -> None:
    # The nearest keys asked for are more than a share has.
    changes = {
        "method": {"name": "invp", "positives": 5, "start_epoch": 1, "sets": "paper"},
        "memory": {"name": "bank", "nearest": 200, "repeats": False},
        "drop_last": True,
        "accumulate": 2,
    }
    values = plain(tiny("invp", batch_norm={"query_splits": 2}, epochs=4))
    assert_alike(parse(Recipe, {**values, **changes}, source="test"), tmp_path)


def test_a_run_with_a_bank_goes_on_in_another_number_of_processes(tmp_path: Path) -> None:
    values = plain(tiny("invp", batch_norm={"query_splits": 2}, epochs=4))
    states = []
    for name, worlds in (("one", (1, 1, 1)), ("one, two and one", (1, 2, 1))):
        folder = tmp_path / name
        folder.mkdir()
        for world in worlds:
            if world == 1:
                go_on(0, 1, 0, values, str(folder))
                continue
            port = free_port()
            group = [processes.Process(target=go_on, args=(rank, 2, port, values, str(folder))) for rank in range(2)]
            for process in group:
                process.start()
            for process in group:
                process.join(120)
                assert process.exitcode == 0
        found = load_latest(folder)
        assert found is not None
        states.append(found.state)
    assert states[1]["step"] == states[0]["step"]
    assert len(states[0]["learner"]["memory.points"]) == IMAGES
    for name, value in states[0]["learner"].items():
        torch.testing.assert_close(states[1]["learner"][name], value, rtol=1e-6, atol=1e-9, msg=name)


def test_a_step_in_parts_is_the_step_in_one(tmp_path: Path) -> None:
    # Without batch norm, which sees one part at a time, the parts add up to the whole.
    views = dict(plain(tiny("co2"))["views"])
    views["augment"] = [{**view, "size": 16} for view in views["augment"]]
    states = []
    for parts in (1, 4):
        recipe = tiny("co2", accumulate=parts, backbone={"name": "vit_tiny_patch16_224"}, epochs=4, views=views)
        folder = tmp_path / str(parts)
        folder.mkdir()
        train(0, 1, 0, plain(recipe), str(folder))
        states.append(torch.load(folder / "1-0.pt", weights_only=True))
    assert states[1]["losses"] == pytest.approx(states[0]["losses"], rel=1e-9)
    for name, value in states[0]["state"].items():
        torch.testing.assert_close(states[1]["state"][name], value, rtol=1e-7, atol=1e-10, msg=name)


def test_several_processes_say_where_batch_norm_sees_less(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(**changes: Any) -> list[str]:
        recipe = tiny("sce", **changes)
        training = SimpleNamespace(recipe=recipe, learner=build_learner(recipe, images=100))
        return batch_norm_apart(training)  # type: ignore[arg-type]

    assert said() == []
    monkeypatch.setattr(distributed, "world", lambda: 2)
    assert any("query_splits is 1, but 2 processes make 2 groups of 16 images" in text for text in said())
    assert said(batch_norm={"query_splits": 2, "key_splits": 4}) == []
    head = {"hidden": [8], "out": 4, "batch_norm": True}
    assert any("head" in text for text in said(batch_norm={"query_splits": 2, "key_splits": 2}, head=head))
    assert said(batch_norm={"synchronise": True}) == []


def disagree(rank: int, port: int, out: str) -> None:
    """Tell the other rank two facts, one of them another."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    distributed.start("cpu")
    Path(out, f"{rank}.txt").write_text(",".join(distributed.all_alike({"step": 7, "images": f"of rank {rank}"})))
    distributed.stop()


def test_ranks_find_out_what_they_do_not_agree_on(tmp_path: Path) -> None:
    port = free_port()
    pair = [processes.Process(target=disagree, args=(rank, port, str(tmp_path))) for rank in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(60)
        assert process.exitcode == 0
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == ["images", "images"]


@pytest.mark.parametrize(
    ("device", "told"),
    [("cuda", ("nccl", torch.device("cuda", 3))), ("cpu", ("gloo", None))],
    ids=["cuda", "cpu"],
)
def test_processes_join_on_the_device_that_each_has_chosen(
    device: str, told: tuple[str, torch.device | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda kind, **how: asked.append((kind, how["device_id"]))
    )
    distributed.start(device)
    assert asked == [told]


def test_torchrun_starts_two_processes_and_leaves_one_run_folder(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(tiny("sce", epochs=1, batch_norm={"query_splits": 2, "key_splits": 2})))
    words = [
        "pretrain",
        "digits",
        "-q",
        "--recipe",
        str(recipe),
        "limit=150",
        "workers=0",
        "probe_every=0",
        "device=cpu",
    ]
    module = ["-m", "kinfold", *words]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), *module]
    for name, start in (("one", module), ("two", torchrun)):
        done = subprocess.run(
            [sys.executable, *start, "--out", str(tmp_path / name)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=240,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr.decode()
    one, two = load_latest(tmp_path / "one"), load_latest(tmp_path / "two")
    assert one is not None
    assert two is not None
    for name, value in one.state["learner"].items():
        torch.testing.assert_close(two.state["learner"][name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert (tmp_path / "two" / "backbone.safetensors").is_file()


def test_sigterm_to_torchrun_leaves_one_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(tiny("moco", epochs=400, batch_norm={"query_splits": 2, "key_splits": 2})))
    words = ["digits", "-q", "--recipe", str(recipe), "limit=150", "workers=0", "probe_every=0", "device=cpu"]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    command = [*torchrun, "-m", "kinfold", "pretrain", *words, "checkpoint_every=1000"]
    process = subprocess.Popen(
        [sys.executable, *command, "--out", str(tmp_path / "run")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists() or len(log.read_text().splitlines()) < 2:
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not list((tmp_path / "run" / "checkpoints").glob("*.pt"))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    found = load_latest(tmp_path / "run")
    assert found is not None
    assert found.step > 0
