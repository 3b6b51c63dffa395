# SPDX-License-Identifier: Apache-2.0
"""The scripts that want a GPU lose nothing: what fails leaves the rest, and the next command goes on."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


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


def test_every_step_names_a_script_that_takes_its_words(script: Callable[[str], ModuleType]) -> None:
    everything, sections = script("device_all"), script("performance_sections")
    wanted = {each.name for one in sections.SECTIONS for each in one.files}
    for step in everything.STEPS:
        assert step.result is None or step.result in {*wanted, "device-agrees"}, step.name
        files = [ROOT / word for word in step.words if word.endswith(".py")]
        assert files, step.name
        assert all(file.is_file() for file in files), step.name
        text = files[0].read_text(encoding="utf-8")
        assert all(f'"{word}"' in text for word in step.words if word.startswith("--")), step.name
        if step.words[0].startswith("benchmarks/"):
            assert '"--quick"' in text, step.name


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
