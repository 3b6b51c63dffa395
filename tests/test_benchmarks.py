# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, a quick run leaves no trace, and what a stored result says is what its figures say."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import PIL
import pytest
import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
QUICK = ("bank_search", "features_memory", "loop_overhead", "resident")
"""scripts that need none of the alternatives, and start processes of their own"""


def shown() -> list[str]:
    """The stored results that stand on the page of performance."""
    return [path.stem for path in sorted(RESULTS.glob("*.json")) if "page" in json.loads(path.read_text("utf-8"))]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What all benchmarks share."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("measured")


@pytest.fixture
def pages(measured: ModuleType) -> ModuleType:
    return importlib.import_module("pages")


def kept() -> dict[str, bytes]:
    """All that a benchmark might write in the repository."""
    return {str(path): path.read_bytes() for path in [*RESULTS.iterdir(), *(ROOT / "docs").glob("*.png")]}


def told(output: str, pages: ModuleType) -> dict[str, Any]:
    """The result that a quick run printed last, found to be whole."""
    result: dict[str, Any] = json.loads(("\n" + output)[("\n" + output).rindex("\n{\n") :])
    assert result["question"]
    assert result["machine"]["cores"]
    assert "commit" in result
    if "page" in result:
        assert result["page"] == pages.page_of(result)
    return result


def test_a_quick_run_as_a_command_leaves_what_is_stored_as_it_was(tmp_path: Path, pages: ModuleType) -> None:
    before = kept()
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "augment_speed.py"), "--quick"],
        env={**os.environ, "KINFOLD_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert kept() == before
    assert "page" in told(done.stdout, pages)


@pytest.mark.parametrize("script", QUICK)
def test_a_quick_run_prints_its_result_and_leaves_what_is_stored_as_it_was(
    script: str,
    tmp_path: Path,
    pages: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = kept()
    monkeypatch.setenv("KINFOLD_CACHE", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("sys.argv", [str(ROOT / "benchmarks" / f"{script}.py"), "--quick"])
    importlib.import_module(script).main()
    assert kept() == before
    assert told(capsys.readouterr().out, pages)["versions"]["kinfold"]


@pytest.mark.parametrize("name", shown())
def test_a_stored_result_says_of_its_figures_what_its_script_says(name: str, pages: ModuleType) -> None:
    result = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    assert result["page"] == pages.page_of(result), "run python benchmarks/pages.py"


def test_a_text_that_drifted_from_the_figures_is_noticed_and_mended(
    pages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = json.loads((RESULTS / "knn-speed.json").read_text("utf-8"))
    result["seconds"]["kinfold"]["median"] = 98.76
    (tmp_path / "knn-speed.json").write_text(json.dumps(result), "utf-8")
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["pages.py", "--check"])
    with pytest.raises(SystemExit, match=r"run python benchmarks/pages\.py"):
        pages.main()
    monkeypatch.setattr("sys.argv", ["pages.py"])
    pages.main()
    monkeypatch.setattr("sys.argv", ["pages.py", "--check"])
    pages.main()
    mended = json.loads((tmp_path / "knn-speed.json").read_text("utf-8"))
    assert "98.76" in str(mended["page"]["table"]["rows"])
    assert {key: value for key, value in mended.items() if key != "page"} == {
        key: value for key, value in result.items() if key != "page"
    }


def test_a_result_says_with_which_packages_it_was_measured(
    measured: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "RESULTS", tmp_path / "results")
    path = measured.write("some", {"question": "?"}, alternatives=("scipy",))
    assert path == str(tmp_path / "results" / "some.json")
    found = json.loads(Path(path).read_text("utf-8"))
    wanted = {"numpy": np.__version__, "pillow": PIL.__version__, "torch": torch.__version__}
    wanted["scipy"] = importlib.metadata.version("scipy")
    assert wanted.items() <= found["versions"].items()


def test_a_quick_result_is_the_text_and_no_file(
    measured: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "RESULTS", tmp_path / "results")
    assert json.loads(measured.write("some", {"question": "?"}, quick=True))["question"] == "?"
    assert not (tmp_path / "results").exists()


def test_contenders_take_turns_in_an_order_that_moves_on_and_the_warm_up_does_not_count(measured: ModuleType) -> None:
    calls: list[str] = []
    contenders = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    found = measured.in_turns(contenders, rounds=3, warm_up=1, per=4)
    assert "".join(calls) == "abcbcacababc"
    assert all(len(one["all"]) == 3 for one in found.values())
    assert "times_ours" not in found["a"]
    assert {"times_ours", "median", "least", "greatest"} <= found["b"].keys()


def test_a_ratio_is_the_median_over_the_rounds_and_not_the_ratio_of_the_medians(measured: ModuleType) -> None:
    found = measured.summary({"ours": [1.0, 2.0, 4.0], "other": [2.0, 3.0, 40.0]})
    assert found["other"]["times_ours_each"] == [2.0, 1.5, 10.0]
    assert found["other"]["times_ours"] == 2.0
    assert (found["ours"]["least"], found["ours"]["median"], found["ours"]["greatest"]) == (1.0, 2.0, 4.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.00123, "0.00123"), (0.4968, "0.497"), (1.739, "1.74"), (98.64, "98.6"), (1372.4, "1,372")],
)
def test_a_figure_has_three_digits_or_all_before_the_point(measured: ModuleType, value: float, text: str) -> None:
    assert measured.plain(value) == text


def test_ratios_are_rounded_alike(measured: ModuleType) -> None:
    assert [measured.times(ratio) for ratio in (0.8149, 1.451, 13.88)] == ["0.81×", "1.45×", "13.9×"]


def test_things_are_counted_as_one_says_it(measured: ModuleType) -> None:
    assert [measured.counted(count, "file") for count in (1, 2, 5000)] == ["1 file", "2 files", "5,000 files"]


def test_the_clock_waits_for_a_device_and_not_for_the_processor(
    measured: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[Any] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    measured.synchronise("cpu")
    assert waited == []
    measured.synchronise("cuda:1")
    measured.synchronise(torch.device("cuda", 0))
    assert waited == [torch.device("cuda:1"), torch.device("cuda:0")]


def test_rows_in_clusters_lie_one_behind_the_other_and_have_length_one(measured: ModuleType) -> None:
    search = importlib.import_module("bank_search")
    centres = search.unit_rows(4, 64, "cpu", seed=3)
    rows = search.unit_rows(10_000, 64, "cpu", seed=2, clusters=centres)  # [N, D], more than one block of them
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(10_000))
    own = (rows @ centres.T).argmax(1)  # [N]
    assert own.tolist() == [number * 4 // 10_000 for number in range(10_000)]
