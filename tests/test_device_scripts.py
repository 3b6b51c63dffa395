# SPDX-License-Identifier: Apache-2.0
"""The scripts that want a GPU lose nothing: what fails leaves the rest, and the next command goes on."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from command_lines import ROOT, taken


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Scripts under benchmarks, by name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


@pytest.fixture
def everything(script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """`device_all.py` with a results' folder of its own."""
    made = script("device_all")
    monkeypatch.setattr(made, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    return made


def command(
    everything: ModuleType, monkeypatch: pytest.MonkeyPatch, steps: dict[str, Any], *words: str, out: Path
) -> tuple[Any, dict[str, Any]]:
    """Give the command with these steps: python code, result, and least and most seconds; its exit code and record."""
    made = tuple(
        everything.Step(name, ("-c", code), result, least, most) for name, (code, result, least, most) in steps.items()
    )
    monkeypatch.setattr(everything, "STEPS", made)
    monkeypatch.setattr(sys, "argv", ["device_all.py", "--out", str(out), "--device", "cpu", *words])
    with pytest.raises(SystemExit) as ended:
        everything.main()
    return ended.value.code, json.loads((out / "device-all.json").read_text(encoding="utf-8"))


def has_ended(process: int) -> bool:
    """Whether a process is gone, or waits for nothing but that somebody sees it is."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    state = Path(f"/proc/{process}/stat")
    return state.is_file() and state.read_text().rpartition(")")[2].split()[0] == "Z"


def writing(everything: ModuleType, name: str, more: str = "") -> str:
    """Code that measures: it writes a result and says that it ran."""
    path = everything.RESULTS / f"{name}.json"
    return f"import json; open({str(path)!r}, 'w').write(json.dumps(dict(speed=1, commit=None))); print('ran'){more}"


def test_a_step_that_fails_leaves_the_others_and_all_results_are_brought(
    everything: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    steps = {
        "first": (writing(everything, "a"), "a", 0, 60),
        "broken": (writing(everything, "b", "; raise SystemExit('out of memory')"), "b", 0, 60),
        "last": (writing(everything, "c"), "c", 0, 60),
    }
    code, record = command(everything, monkeypatch, steps, "--commit", "abc", out=tmp_path / "out")
    assert code == 1
    assert [record[name]["state"] for name in steps] == ["done", "failed", "done"]
    brought = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in "abc"}
    assert all(found["speed"] == 1 and found["commit"] == "abc" for found in brought.values())
    assert ["measured_to_the_end_with" in brought[name] for name in "abc"] == [True, False, True]
    assert "out of memory" in (tmp_path / "out" / "broken.log").read_text()


def test_what_is_done_is_not_done_again_until_the_code_is_another(
    everything: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    steps = {"one": (writing(everything, "a"), "a", 0, 60), "plain": ("print('ran')", None, 0, 60)}
    for expected in ("done", "done before"):
        code, record = command(everything, monkeypatch, steps, out=tmp_path / "out")
        assert code == 0
        assert [record[name]["state"] for name in steps] == [expected] * 2
    logs = [tmp_path / "out" / f"{name}.log" for name in steps]
    assert [log.read_text().count("ran") for log in logs] == [1, 1]
    monkeypatch.setattr(everything, "code", lambda *_: "another")
    _, record = command(everything, monkeypatch, steps, out=tmp_path / "out")
    assert [record[name]["state"] for name in steps] == ["done"] * 2
    assert [log.read_text().count("ran") for log in logs] == [2, 2]


def test_a_machine_that_is_new_goes_on_with_the_folder_that_was_carried_to_it(
    everything: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    steps = {"one": (writing(everything, "a"), "a", 0, 60)}
    command(everything, monkeypatch, steps, out=tmp_path / "out")
    monkeypatch.setattr(everything, "RESULTS", tmp_path / "new")
    code, record = command(everything, monkeypatch, steps, out=tmp_path / "out")
    assert (code, record["one"]["state"]) == (0, "done before")


def test_a_step_that_takes_too_long_ends_with_all_its_processes(
    everything: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    child = tmp_path / "child"
    long = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        f"open({str(child)!r}, 'w').write(str(child.pid)); time.sleep(600)"
    )
    monkeypatch.setattr(everything, "SETTLE", 0.2)
    steps = {"long": (long, None, 0, 2), "next": ("print('ran')", None, 0, 60)}
    code, record = command(everything, monkeypatch, steps, out=tmp_path / "out")
    assert code == everything.AGAIN
    assert [record[name]["state"] for name in steps] == ["out of time", "done"]
    assert any(has_ended(int(child.read_text())) or time.sleep(0.1) for _ in range(100))


def test_a_step_is_not_begun_without_the_seconds_that_it_needs(
    everything: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    steps = {"long": ("print('ran')", None, 100, 200), "short": ("raise SystemExit(3)", None, 5, 60)}
    code, record = command(everything, monkeypatch, steps, "--seconds", "40", out=tmp_path / "out")
    assert code == everything.AGAIN
    assert [record[name]["state"] for name in steps] == ["no time", "unfinished"]


def test_every_step_names_a_script_that_takes_its_words(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    everything, sections = script("device_all"), script("performance_sections")
    wanted = {each.name for one in sections.SECTIONS for each in one.files}
    for step in everything.STEPS:
        assert step.result is None or step.result in {*wanted, "device-agrees"}, step.name
        given = argparse.Namespace(
            device="cuda", data="CIFAR10", note="Made anew.", out=tmp_path, settings=["compile=true"], quick=True
        )
        meant = taken(shlex.join(["python", *everything.filled(step, given, 100.0)[1:]]))
        assert meant.quick, step.name
        assert meant.device == "cuda", step.name
        assert getattr(meant, "data", "CIFAR10") == "CIFAR10", step.name


def test_a_recipe_that_is_given_no_end_is_stopped_by_a_signal_alone(script: Callable[[str], ModuleType]) -> None:
    recipe = script("cifar10_gpu")
    threads, before = threading.active_count(), signal.getsignal(signal.SIGTERM)
    with recipe.Clock(math.inf).stopping():
        assert threading.active_count() == threads
        with pytest.raises(SystemExit) as stopped:
            signal.raise_signal(signal.SIGTERM)
        assert stopped.value.code == recipe.UNFINISHED
    assert signal.getsignal(signal.SIGTERM) == before
    with recipe.Clock(60.0).stopping():
        assert threading.active_count() == threads + 1
    with pytest.raises(SystemExit) as stopped, recipe.Clock(0.0).stopping():
        pass
    assert stopped.value.code == recipe.UNFINISHED


def test_the_step_of_a_model_is_measured_as_far_as_memory_goes(
    script: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    step = script("gpu_step")

    def whole(*_: Any, resident: bool) -> dict[str, float]:
        if resident:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB\nand more")
        return {"images_per_second": 96.0, "waiting_for_images": 0.0}

    monkeypatch.setattr(step, "photo", lambda seed, height, width: script("photographs").photo(seed, 40, 40))
    monkeypatch.setattr(step, "flops_of_image", lambda *_, **__: 1e9)
    monkeypatch.setattr(step, "matmul_rate", lambda *_: 1e12)
    monkeypatch.setattr(step, "speed_alone", lambda *_: {"images_per_second": 100.0})
    monkeypatch.setattr(step, "speed_whole", whole)
    monkeypatch.setenv("KINFOLD_CACHE", "")  # which the script sets
    monkeypatch.setattr(sys, "argv", ["gpu_step.py", "--device", "cpu", "--quick", "--part", "whole"])
    with pytest.raises(SystemExit, match="not measured to the end: whole"):
        step.main()
    told = capsys.readouterr().out
    found = json.loads(told[told.index("\n{") :])
    assert found["failed"] == {"on_the_device": "RuntimeError: CUDA out of memory. Tried to allocate 20.00 GiB"}
    assert found["share_of_the_encoders_alone"] == {"from_files": 0.96}
    assert [row[0] for row in found["page"]["table"]["rows"]] == [
        "whole step, from JPEG files",
        "forward and backward alone",
    ]
    assert "out of memory" in found["page"]["text"][-1]


def test_a_search_that_fails_in_its_own_process_leaves_the_others_and_every_size_is_written_at_once(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    search, measured = script("bank_search"), script("measured")
    written: list[dict[str, Any]] = []
    charts: list[list[str]] = []
    one = {"seconds": {"median": 1.0, "least": 1.0, "greatest": 1.0, "all": [1.0]}, "bytes": 10**6}

    def child(command: list[str], **_: Any) -> argparse.Namespace:
        fails = "dense" in command and "2000" in command
        return argparse.Namespace(returncode=-9 if fails else 0, stdout=f"{json.dumps(one)}\n")

    def turns(asked: argparse.Namespace, clusters: int | None = None) -> dict[str, Any]:
        seconds = measured.summary({"blocked": [1.0], "dense": [2.0]})
        alike = {"rows_in_common": 1.0, "similarity_differs_at_most": 0.0}
        return {"rows": asked.rows, "clusters": clusters, "seconds": seconds, **alike}

    monkeypatch.setattr(search.subprocess, "run", child)
    monkeypatch.setattr(search, "together", turns)
    monkeypatch.setattr(search, "write", lambda name, result, **_: written.append(json.loads(json.dumps(result))))
    monkeypatch.setattr(search, "chart", lambda growth, place: charts.append(list(growth)))
    monkeypatch.setattr(sys, "argv", ["bank_search.py", "--rows", "1000", "--growth", "2000", "3000"])
    search.main()
    assert [list(result["growth"]) for result in written] == [[], ["1000"], ["1000", "2000"], ["1000", "2000", "3000"]]
    assert charts == [list(result["growth"]) for result in written[1:]]
    assert [result["page"]["charts"] for result in written] == [[], *[["bank-search.png"]] * 3]
    assert written[-1]["growth"]["2000"] == {"blocked": one, "dense": {"failed": "exit -9"}}
    rows = {row[0]: row[1:] for row in written[-1]["page"]["table"]["rows"]}
    assert rows["2,000"] == ["1.00 (1.00 to 1.00)", "failed (exit -9)", "1.00", ""]
    assert search.page(written[-1]) == written[-1]["page"]


def test_the_row_of_a_recipe_names_its_settings_and_the_page_what_is_to_be_known_of_the_images(
    script: Callable[[str], ModuleType],
) -> None:
    recipe = script("cifar10_gpu")
    result = dict.fromkeys(("images_per_second", "seconds_per_epoch", "seconds", "utilisation", "bf16_flops"), 1.0)
    result |= {"recipe": "sce/cifar10", "settings": ["batch_size=512"], "batch_size": 512}
    result |= {"peak_gpu_memory_mb": None, "epochs": 200, "epochs_done": 7.0}
    plain, noted = (recipe.page({**result, **more}) for more in ({}, {"note": "Drawn by hand."}))
    assert plain["table"]["rows"][0][:3] == ["`sce/cifar10 batch_size=512`", "512", "7 of 200"]
    assert noted["text"] == [*plain["text"], "Drawn by hand."]


def test_from_files_the_steps_whose_images_lay_ready_do_not_count(script: Callable[[str], ModuleType]) -> None:
    step, pages = script("gpu_step"), script("gpu_step_page")
    words = {"batch": 256, "files": 4096, "device": "cpu", "quick": False}

    def stretch(steps: int, workers: int, **how: bool) -> tuple[int, int]:
        given = argparse.Namespace(**{**words, **how}, steps=steps, settings=[f"workers={workers}"])
        found: tuple[int, int] = step.stretch(given, resident=how.get("resident", False))
        return found

    assert stretch(60, 16) == (200, 96)
    assert stretch(60, 2) == (200, 18)
    assert stretch(150, 16) == (246, 96)
    assert stretch(60, 16, resident=True) == stretch(60, 16, quick=True) == (60, 18)
    found = {"images_per_second": 90.0, "waiting_for_images": 0.1}
    result = {
        **dict.fromkeys(("backbone", "size", "batch_size", "precision", "compile", "machine_cores", "steps"), 1),
        "files": 4096,
        "kilobytes_of_a_photograph": 110,
        "batch_norm_splits": [1, 1],
        "rounds": [{}],
        "failed": {},
        "share_of_the_encoders_alone": {},
        "utilisation": {"from_files": 0.4},
    }
    before, now = (
        pages.page({**result, "medians": {"from_files": {**found, **more}}})["text"][1]
        for more in ({}, {"steps": 112, "steps_left_out": 96})
    )
    assert now == f"{before} From files 112 steps count; the 96 before them do not, as workers have made images " + (
        "ahead for these."
    )


def test_a_measurement_that_was_stopped_is_none(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    step = script("gpu_step")
    stopped = argparse.Namespace(step=7, steps=64, folder=tmp_path)
    monkeypatch.setattr(step, "pretrain", lambda *_, **__: stopped)
    given = argparse.Namespace(batch=256, files=4096, device="cpu", quick=False, steps=60, settings=[])
    with pytest.raises(SystemExit, match="stopped at step 7 of 64"):
        step.speed_whole(given, torch.device("cpu"), tmp_path, tmp_path, resident=True)


def broken() -> None:
    """A contender without a compiler."""
    raise RuntimeError("no compiler\nat all")


def test_a_contender_that_fails_leaves_the_others_and_every_case_is_written_at_once(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    augment = script("augment_speed")
    written: list[dict[str, Any]] = []

    def prepared(looks: Any, batch: int, device: torch.device, failed: dict[str, str]) -> dict[str, Any]:
        others = {"kornia": broken if looks[0].size == 224 else int, "torchvision": int}
        return {"both": {"ours": int, **others}}

    monkeypatch.setattr(augment, "prepared", prepared)
    monkeypatch.setattr(augment, "KORNIA", False)
    monkeypatch.setattr(augment, "write", lambda name, result, **_: written.append(json.loads(json.dumps(result))))
    monkeypatch.setattr(torch, "set_num_threads", int)
    monkeypatch.setattr(sys, "argv", ["augment_speed.py", "--threads", "1", "--rounds", "1"])
    augment.main()
    assert [len(result["timed"]) for result in written] == [1, 2, 3, 4]
    assert [list(one["seconds"]) for one in written[-1]["timed"]] == [["ours", "torchvision"]] * 2 + [
        ["ours", "kornia", "torchvision"]
    ] * 2
    page = written[-1]["page"]
    assert page["text"][-1] == "Failed at least once, and left out there: kornia (RuntimeError: no compiler)."
    assert [row[-2] == "" for row in page["table"]["rows"]] == [True, True, False, False]
    assert ["2 cases" in row["question"] for row in page["summary"]] == [True, False]
    with pytest.raises(RuntimeError, match="no compiler"):
        augment.working({"ours": broken}, {})


def test_memory_that_is_still_to_be_read_is_watched_while_files_are_decoded(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    agrees = script("device_agrees")
    how = {"resident": False, "workers": 0}
    assert agrees.memory(how, torch.device("cpu"), tmp_path) == (0.0, 0.0)
    decoders = agrees.checks(torch.device("cuda"))
    assert "memory while files are decoded there" in decoders
    ones = torch.ones

    def written_over(*shape: int, **words: Any) -> torch.Tensor:
        made = ones(*shape, **words)
        made[0, 0, 0] = 7  # as by a decoder that was given memory of others
        return made

    monkeypatch.setattr(torch, "ones", written_over)
    assert agrees.memory(how, torch.device("cpu"), tmp_path) == (6.0, 0.0)


def test_the_step_in_parts_is_whole_with_and_without_each_change(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kinfold.recipe import load

    changes, pages = script("gpu_step_changes"), script("gpu_step_page")
    monkeypatch.setenv("KINFOLD_CACHE", str(tmp_path / "cache"))
    words = ["backbone.name=resnet10_w8", "batch_size=16", "head.hidden=[8]", "memory.size=64", "epochs=9"]
    found = {}
    for name, on in (("plain", set()), ("fused", {"channels-last", "fused"})):
        recipe, run = load(
            "digits",
            [*words, "learning_rate.warmup_epochs=0"],
            run={"data": "digits", "limit": 64, "out": str(tmp_path / name), "device": "cpu", "probe_every": 0},
        )
        found[name] = changes.changed_step(recipe, run, on, steps=2)
        assert all(seconds > 0 for seconds in found[name]["parts_seconds"].values()), found[name]
        assert sum(row["share"] for row in found[name]["kernels"]) <= 1.0001
    page = pages.page({"changes": found, "failed": {}, "backbone": "r", "size": 8, "batch_size": 16})
    assert [row[0] for row in page["table"]["rows"]] == ["plain", "+ fused"]
    assert len(page["table"]["columns"]) == len(page["table"]["rows"][1]) == 4 + 6
