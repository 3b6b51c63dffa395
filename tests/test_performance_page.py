# SPDX-License-Identifier: Apache-2.0
"""docs/performance.md says what the result files say, and says so where there is none."""

from __future__ import annotations

import importlib
import json
import re
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


def test_without_files_every_row_says_that_it_is_not_measured_and_how_to(
    page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    rows = page.summary()[2:]
    wanted = [each for one in page.SECTIONS for each in one.files]
    assert len(rows) == len(wanted) >= 15
    for row, each in zip(rows, wanted, strict=True):
        assert page.NOT_YET in row
        assert f"`{each.command}`" in row
        assert not re.search(r"\d(×| %| s )", row.replace(each.question, ""))
    assert page.made().count(page.NOT_YET) == 2 * len(wanted)


def test_a_file_brings_its_text_its_table_its_chart_and_how_it_came_to_be(
    page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    shown = {
        "title": "Starting",
        "text": ["First.", "Second."],
        "table": {"columns": ["what", "median"], "rows": [["help | x", "0.2 s"]]},
        "charts": ["docs/start.png"],
        "summary": [{"question": "help", "ours": "0.2 s", "alternative": "2 s", "ratio": "10×"}],
    }
    write(tmp_path, "startup", {"page": shown})
    text = section(page.made(), "Starting")
    assert text.index("First.\n\nSecond.") < text.index("| what | median |") < text.index('<img src="start.png"')
    assert "| help \\| x | 0.2 s |" in text
    assert "A, 1 threads on 2 cores; torch 2.11; commit 0123456789; 2026-01-02; `python benchmarks/some.py`" in text
    assert page.NOT_YET not in text
    row = next(row for row in page.summary() if "startup.json" in row)
    assert row == "| help | 0.2 s | 2 s | 10× | [startup.json](../benchmarks/results/startup.json) |"


def test_files_of_one_question_share_a_table_and_missing_ones_are_named_under_it(
    page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    for name in ("sce-cifar10", "moco-256"):
        shown = {"title": "CIFAR-10 on one GPU", "text": ["Once."], "summary": []}
        write(tmp_path, f"gpu-{name}", {"page": {**shown, "table": {"columns": ["recipe"], "rows": [[name]]}}})
    text = section(page.made(), "CIFAR-10 on one GPU")
    assert text.count("Once.") == text.count("| recipe |") == 1
    assert "| moco-256 |\n| sce-cifar10 |" in text
    assert text.count("commit 0123456789") == text.count(page.NOT_YET) == 2


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
