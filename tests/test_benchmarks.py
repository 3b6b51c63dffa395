# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, a quick run leaves no trace, and what a stored result says is what its figures say."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import PIL
import PIL.Image
import pytest
import torch

from kinfold.kernels.search import nearest_rows

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
QUICK = ("bank_search", "features_memory", "loop_overhead", "resident")
"""scripts that need none of the alternatives, and start processes of their own"""


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


def test_a_stored_result_says_of_its_figures_what_its_script_says(pages: ModuleType) -> None:
    stored = pages.stored()
    assert {"loop-overhead", "features-memory", "knn-speed"} <= {path.stem for path in stored}
    for path in stored:
        result = json.loads(path.read_text("utf-8"))
        assert result.get("page") == pages.page_of(result), f"{path.name}: run python benchmarks/pages.py"


def test_a_text_that_drifted_from_the_figures_is_noticed_and_mended(
    pages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = json.loads((RESULTS / "knn-speed.json").read_text("utf-8"))
    result["seconds"]["kinfold"]["median"] = 98.76
    (tmp_path / "knn-speed.json").write_text(json.dumps(result), "utf-8")
    pageless = json.loads((RESULTS / "loop-overhead.json").read_text("utf-8"))
    pageless.pop("page", None)
    (tmp_path / "loop-overhead.json").write_text(json.dumps(pageless), "utf-8")
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
    assert json.loads((tmp_path / "loop-overhead.json").read_text("utf-8"))["page"]["title"] == "What the loop costs"


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


def test_results_of_other_devices_have_names_of_their_own(measured: ModuleType) -> None:
    assert [f"resident{measured.suffix(device)}" for device in ("cpu", "cuda")] == ["resident", "resident-cuda"]


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


def test_a_search_that_finds_something_else_than_dense_is_not_published(
    measured: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = importlib.import_module("bank_search")
    asked = argparse.Namespace(device="cpu", rows=300, queries=4, width=8, nearest=5, rounds=1)
    assert search.together(asked)["similarity_differs_at_most"] < 1e-6
    monkeypatch.setattr(search, "nearest_rows", lambda queries, bank, count: nearest_rows(queries, bank[:150], count))
    with pytest.raises(SystemExit, match="do not find the same"):
        search.together(asked)


def test_the_page_of_starting_compares_round_by_round_and_takes_no_import_for_an_alternative(
    measured: ModuleType,
) -> None:
    startup = importlib.import_module("startup")
    ways = {name: [10.0, 20.0, 30.0] for name in startup.OURS}
    ways["by workers, first"] = [1.0, 2.0, 4.0]
    ways["by workers, again"] = [1.0, 1.0, 1.0]
    ways |= {"ImageFolder, 0 workers": [2.0, 3.0, 40.0], "ImageFolder, 2 workers": [50.0, 60.0, 70.0]}
    commands = {name: [0.2 + 0.1 * number] * 2 for number, name in enumerate(startup.COMMANDS)}
    parts = {"imports": 1.5, "listing, first": 0.5, "listing, again": 0.01}
    starts = {"ways": measured.summary(ways), "parts": parts}
    page = startup.page({"files": 100_000, "commands": measured.summary(commands), "starts": starts})
    assert [len(row) for row in page["table"]["rows"]] == [3] * (len(commands) + len(ways))
    told = [(row["ours"], row["alternative"], row["ratio"]) for row in page["summary"]]
    assert told == [
        ("2.0 s", "3.0 s (torchvision's ImageFolder, 0 workers, first batch only)", "2.00×"),  # of 2, 1.5 and 10
        ("1.0 s (by workers, again)", "3.0 s (the same)", "3.00×"),
        ("0.20 s", "0.40 s (`import torch`)", ""),
    ]


def loader_result(measured: ModuleType, loader: ModuleType, **large: list[float]) -> dict[str, Any]:
    """A result of loader_speed.py with made-up figures."""
    core = {loader.OURS: [1.0, 2.0, 4.0], loader.WHOLE: [2.0, 4.0, 4.0]}
    core |= {name: [4.0, 8.0, 80.0] for name in (loader.PIL, loader.TORCHVISION, loader.LIGHTLY)}
    return {
        "images": 2,
        "bytes": 242_000,
        "one_core": measured.summary({name: [s / 1000 for s in all_] for name, all_ in core.items()}),
        "large_photo_size": [4000, 3000],
        "large_photo": measured.summary({"at a fraction": [0.06, 0.06], "in full": [0.2, 0.2], **large}),
        "two_workers": {"images_per_second": 300.0, "waiting": 0.02},
        "packing": {"seconds_an_image": 0.3, "short_side": 512, "bytes_before": 8e6, "bytes_after": 8e5},
    }


def test_views_of_photographs_are_compared_round_by_round_and_packed_ones_where_measured(measured: ModuleType) -> None:
    loader = importlib.import_module("loader_speed")
    before, packed = (loader.page(loader_result(measured, loader, **more)) for more in ({}, {"packed": [0.005, 0.005]}))
    assert [row[3] for row in packed["table"]["rows"]] == ["1", "2.00×", "4.00×", "4.00×", "4.00×"]
    assert [row["ratio"] for row in packed["summary"]] == ["4.00×, 4.00×, 4.00×", "2.00×, 2.00×, 2.00×", ""]
    assert len(before["summary"]) == 2
    assert "200 ms in full and 60.0 ms with images.scaled_decode=true." in before["text"][2]
    assert "5.00 ms: the other two take 40.0× and 12.0× as long." in packed["text"][2]
    assert "300 ms a photo, once, and made 8.00 MB into 0.800 MB" in packed["text"][2]


def test_a_packed_photo_is_a_small_one(measured: ModuleType) -> None:
    loader = importlib.import_module("loader_speed")
    files = loader.Files([loader.photo(0, 600, 800)], 2)
    shrunk, found = loader.packed(files)
    assert len(shrunk) == 2
    assert [PIL.Image.open(io.BytesIO(shrunk.read(i))).size for i in range(2)] == [(683, 512)] * 2
    assert found["bytes_after"] == 2 * len(shrunk.read(0)) < found["bytes_before"] == 2 * len(files.read(0))


def test_the_page_of_the_bank_names_the_sizes_at_which_ours_is_slower(measured: ModuleType) -> None:
    search = importlib.import_module("bank_search")
    turns = measured.summary({"blocked": [1.0, 2.0], "dense": [2.0, 3.0]})

    def one(seconds: float) -> dict[str, Any]:
        return {"seconds": {"median": seconds, "least": seconds, "greatest": seconds}, "bytes": 10**8}

    growth: dict[str, Any] = {
        "1000": {"blocked": one(0.4), "dense": one(0.2)},
        "3000": {"blocked": one(1.0), "dense": one(4.0)},
        "9000": {"blocked": one(2.0), "dense": None},
    }
    result = {
        "queries": 256,
        "nearest": 100,
        "width": 128,
        "device": "cpu",
        "threads": 2,
        "growth": growth,
        "together": {
            "rows": 3000,
            "seconds": turns,
            "rows_in_common": 0.5,
            "similarity_differs_at_most": 2.4e-7,
        },
    }
    page = search.page(result)
    assert any("both find: 50.000 % (random); the n-th" in text and "2e-07" in text for text in page["text"])
    assert any("Slower than dense at N = 1,000 (0.50× as fast), each way" in text for text in page["text"])
    row = next(row for row in page["summary"] if "process of its own" in row["question"])
    assert row["ours"] == "0.400 to 1.00 s"
    assert row["alternative"] == "0.200 s (dense, 1,000 rows), 4.00 s (dense, 3,000 rows)"
    assert row["ratio"] == "0.50×, 4.00×"
    growth["1000"]["dense"] = one(0.5)
    assert not any("Slower" in text for text in search.page(result)["text"])


def test_a_set_on_another_device_has_a_page_of_its_own(measured: ModuleType) -> None:
    resident = importlib.import_module("resident")
    seconds = {"resident": [1e-5, 1e-5], "torchvision, 0 workers": [1e-3, 1e-3]}
    result = {
        "images": 50_000,
        "batch": 256,
        "workers": 2,
        "threads": 1,
        "start_up_seconds": {name: {"median": 1.0} for name in ("first time", "second time", "no decoded images kept")},
        "views": {
            "seconds_an_image": measured.summary(seconds),
            "parts_of_ours": {"crops": {"median": 5e-6}, "numbers": {"median": 1e-6}},
        },
    }
    here, there = (resident.page({**result, "device": device}) for device in ("cpu", "cuda"))
    assert here["title"] != there["title"]
    assert here["table"]["columns"] != there["table"]["columns"]  # else the page would put both into one table
    assert "the views are copied to the device" in there["text"][1]
    assert [row["ratio"] for row in there["summary"]] == ["", "100.0×"]
