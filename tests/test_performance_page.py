# SPDX-License-Identifier: Apache-2.0
"""docs/performance.md says what the result files say, and says so where there is none."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
ABOUT = {
    "machine": {"processor": "A", "cores": 2, "threads": 1, "gpu": None},
    "versions": {"torch": "2.11"},
    "commit": "0123456789abcdef",
    "uncommitted_changes": False,
    "when": "2026-01-02T03:04:05+00:00",
    "command": "python benchmarks/some.py",
}


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script that makes the page."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("performance")


@pytest.fixture
def results(page: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder in place of benchmarks/results."""
    monkeypatch.setattr(page.result_files, "RESULTS", tmp_path)
    return tmp_path


def write(folder: Path, name: str, result: dict[str, Any]) -> None:
    """A result file as the benchmarks write it."""
    (folder / f"{name}.json").write_text(json.dumps({**result, **ABOUT}), encoding="utf-8")


def section(text: str, title: str) -> str:
    """The lines of one section."""
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_the_page_is_that_of_the_result_files(page: ModuleType) -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.made(), "run python benchmarks/performance.py"


def test_a_page_that_is_not_up_to_date_is_noticed(
    page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "PAGE", tmp_path / "performance.md")
    monkeypatch.setattr("sys.argv", ["performance.py"])
    page.main()
    monkeypatch.setattr("sys.argv", ["performance.py", "--check"])
    with pytest.raises(SystemExit) as ended:
        page.main()
    assert ended.value.code == 0
    with page.PAGE.open("a", encoding="utf-8") as file:
        file.write("a figure of somebody's own\n")
    with pytest.raises(SystemExit, match="not up to date"):
        page.main()


def test_without_files_every_row_says_that_it_is_not_measured_and_how_to(page: ModuleType, results: Path) -> None:
    rows = [line for line in page.summary() if line.startswith("| ")][1:]
    wanted = [each for one in page.SECTIONS for each in one.files]
    assert len(rows) == len(wanted) >= 15
    for row, each in zip(rows, wanted, strict=True):
        assert row == f"| {each.question} | {page.NOT_YET} | `{each.command}` |"
    text = page.made()
    assert text.count(page.NOT_YET) == len(wanted)
    assert "Measured on" not in text
    assert not any(f"## {one.title}\n" in text for one in page.SECTIONS)


def test_a_file_brings_its_text_its_table_its_chart_and_how_it_came_to_be(page: ModuleType, results: Path) -> None:
    shown = {
        "title": "Starting",
        "text": ["First.", "Second."],
        "table": {"columns": ["what", "median", "range"], "rows": [["help | x", "0.2 s", "0.1 to 0.3"]]},
        "charts": ["docs/start.png"],
        "summary": [{"question": "help", "ours": "0.2 s", "alternative": "2 s", "ratio": "10.0×"}],
    }
    write(results, "startup", {"page": shown})
    text = section(page.made(), "Starting")
    assert text.index("First.\n\nSecond.") < text.index("| what | median |") < text.index('<img src="start.png"')
    assert "|---|--:|--:|\n| help \\| x | 0.2 s | 0.1 to 0.3 |" in text
    assert "A, 1 thread on 2 cores; torch 2.11; commit 0123456789; 2026-01-02; `python benchmarks/some.py`" in text
    row = next(row for row in page.summary() if "startup.json" in row)
    assert row == "| help | 0.2 s | **10.0×** as fast as 2 s | [startup](../benchmarks/results/startup.json) |"
    assert " Measured on: A, 2 cores.\n" in page.made()


def test_the_summary_says_in_words_which_is_faster(page: ModuleType) -> None:
    for ratio, ours, expected in (
        ("0.81×", "4.91 s", "0.81× as fast as 4 (b): slower"),
        ("1.00×", "4.91 s", "**1.00×** as fast as 4 (b)"),
        ("4.0 to 12.3×", "3 to 5", "**4.0 to 12.3×** as fast as 4 (b)"),
        ("0.9 to 12.3×", "3 to 5", "0.9 to 12.3× as fast as 4 (b): slower"),
        ("1,234.5×", "98.6 MB", "**1,234.5×** less memory than 4 (b)"),
        ("0.50×", "2 GB", "0.50×: more memory than 4 (b)"),
        ("92 %", "29.1", "92 % of 4 (b)"),
        ("", "29.1", "4 (b)"),
    ):
        assert page.in_words(ratio, ours, "4 (b)") == expected


def test_each_alternative_of_a_row_has_its_own_ratio(page: ModuleType) -> None:
    wanted = page.SECTIONS[0].files[0]
    given = {"question": "q", "ours": "388", "alternative": "47 (one, all of it), 83 (two)", "ratio": "8.2×, 0.9×"}
    assert page.glance(wanted, [given])[2] == (
        "**8.2×** as fast as 47 (one, all of it)<br>0.9× as fast as 83 (two): slower"
    )
    assert page.glance(wanted, [{**given, "ratio": "8.2×"}])[2] == f"**8.2×** as fast as {given['alternative']}"


def test_the_page_begins_with_how_often_ours_is_behind_and_what_is_missing(page: ModuleType, results: Path) -> None:
    files = sum(len(one.files) for one in page.SECTIONS)
    assert page.first_of_all() == f"**{files} of {files} questions are still to be measured.**"
    row = {"question": "200 nearest", "ours": "4.91 s"}
    rows = [
        {**row, "alternative": "18.61 s (scikit-learn)", "ratio": "3.60×"},
        {**row, "alternative": "4.20 s (faiss)", "ratio": "0.81×"},
        {"question": "share", "ours": "9", "alternative": "10 (all)", "ratio": "90 %"},
    ]
    shown = {"title": "k-NN", "text": [], "table": {"columns": ["a"], "rows": []}, "summary": rows}
    write(results, "knn-speed", {"page": shown})
    assert page.first_of_all() == (
        f"**Behind in 1 of 2 comparisons; {files - 1} of {files} questions are still to be measured.** "
        "Measured on: A, 2 cores."
    )
    first, second = [line for line in page.summary() if "knn-speed.json" in line]
    assert "| **3.60×** as fast as 18.61 s (scikit-learn)<br>0.81× as fast as 4.20 s (faiss): slower |" in first
    assert "| 90 % of 10 (all) |" in second


def test_files_of_one_question_share_a_table(page: ModuleType, results: Path) -> None:
    for name in ("sce-cifar10", "moco-256"):
        shown = {"title": "CIFAR-10 on one GPU", "text": ["Once."], "summary": []}
        write(results, f"gpu-{name}", {"page": {**shown, "table": {"columns": ["recipe"], "rows": [[name]]}}})
    text = section(page.made(), "CIFAR-10 on one GPU")
    assert text.count("Once.") == text.count("| recipe |") == 1
    assert "| moco-256 |\n| sce-cifar10 |" in text
    assert text.count("commit 0123456789") == 2
    assert page.NOT_YET not in text


def test_the_files_of_the_loop_and_of_the_features_have_a_place_though_they_bring_no_page(page: ModuleType) -> None:
    text = page.made()
    for title, name in (("What the loop costs", "loop-overhead"), ("Memory of features", "features-memory")):
        result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        assert page.NOT_YET not in section(text, title)
        assert result["commit"][:10] in section(text, title)


def test_every_script_that_a_missing_row_names_takes_the_words_it_is_given(page: ModuleType) -> None:
    for wanted in (each for one in page.SECTIONS for each in one.files):
        words = wanted.command.partition("python ")[2].split()
        script = ROOT / words[0]
        assert script.is_file(), wanted.command
        text = script.read_text(encoding="utf-8")
        assert all(f'"{word}"' in text for word in words if word.startswith("--")), wanted.command
        assert "benchmarks/alternatives.txt" not in wanted.command or (ROOT / "benchmarks/alternatives.txt").is_file()
