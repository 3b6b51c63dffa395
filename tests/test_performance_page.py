# SPDX-License-Identifier: Apache-2.0
"""docs/performance.md says what the result files say, and says so where there is none."""

from __future__ import annotations

import ast
import importlib
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from command_lines import ROOT, named, taken

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


def test_the_files_that_also_make_tables_of_the_readme_have_a_place(page: ModuleType) -> None:
    text = page.made()
    for title, name in (("What the loop costs", "loop-overhead"), ("Memory of features", "features-memory")):
        result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        assert page.NOT_YET not in section(text, title)
        assert result["commit"][:10] in section(text, title)


def test_a_file_without_its_page_is_told_and_not_taken_for_missing(page: ModuleType, results: Path) -> None:
    write(results, "knn-speed", {"question": "?"})
    with pytest.raises(SystemExit, match=r"knn-speed\.json .* run python benchmarks/pages\.py"):
        page.made()


def test_every_command_that_the_page_can_name_is_one_that_its_script_takes(page: ModuleType) -> None:
    sections = importlib.import_module("performance_sections")
    rows = [f"`{each.command}`" for one in sections.SECTIONS for each in one.files]
    text = [sections.BEFORE, sections.MISSING, sections.ADVICE, *(cell for row in sections.ADVICE_ROWS for cell in row)]
    commands = [command for part in [*text, *rows] for command in named(part)]
    assert len(commands) >= len(rows) + 2  # the page's own, and that for everything on a GPU
    for command in commands:
        taken(command)


PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.py")]


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_every_command_of_a_benchmark_in_the_text_is_one_that_its_script_takes(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        lines = (ast.get_docstring(ast.parse(text)) or "").splitlines()
        text = "\n".join(f"`{line.strip()}`" for line in lines if line.startswith("    "))
    for command in named(text):
        taken(command.partition("   ")[0])


def test_a_command_that_its_script_refuses_is_noticed() -> None:
    everything = "python benchmarks/device_all.py"
    assert taken(f"{everything} --data CIFAR10 --out measured").data == "CIFAR10"
    for wrong in (everything, f"{everything} --out measured --limit 3"):
        with pytest.raises(SystemExit) as refused:
            taken(wrong)
        assert refused.value.code == 2


def test_a_command_takes_all_the_time_that_it_needs_unless_it_is_told_otherwise() -> None:
    assert taken("python benchmarks/device_all.py --out measured").seconds == math.inf
    assert taken("python benchmarks/cifar10_gpu.py sce/cifar10 --data CIFAR10").minutes == math.inf
    assert taken("python benchmarks/cifar10_gpu.py sce/cifar10 --data CIFAR10 --minutes 9").minutes == 9


def test_what_is_no_comparison_is_not_counted(page: ModuleType, results: Path) -> None:
    again, search = "3 s (ours, the first time), 4 s (ours, alone)", "1 s (a, 10 rows), 9 s (a, 90 rows)"
    rows = [
        {"question": "again", "ours": "1 s", "alternative": again, "ratio": ""},
        {"question": "search", "ours": "1 to 2 s", "alternative": search, "ratio": "0.50×, 4.50×"},
    ]
    shown = {"title": "t", "text": [], "table": {"columns": ["a"], "rows": []}, "summary": rows}
    write(results, "startup", {"page": shown})
    assert page.first_of_all().startswith("**Behind in 1 of 2 comparisons; ")
    assert f"| {again} |" in page.made()
    assert "0.50× as fast as 1 s (a, 10 rows): slower<br>**4.50×** as fast as 9 s (a, 90 rows)" in page.made()
