# SPDX-License-Identifier: Apache-2.0
"""docs/performance.md, made from `benchmarks/results/*.json` and from nothing else.

    python benchmarks/performance.py            writes the page
    python benchmarks/performance.py --check    says whether it would change, by its exit code

A result file that stands on the page has an entry "page", written by the script that measured it: a title, paragraphs,
a table, charts, and rows for the summary at the top. `performance_sections.py` says which files are looked for, in
which order, and with which command each is made: where a file is missing the page says "not measured yet".
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from performance_sections import ADVICE, ADVICE_COLUMNS, ADVICE_ROWS, BEFORE, SECTIONS, Section, Wanted

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
NOT_YET = "not measured yet"


def read(name: str) -> dict[str, Any] | None:
    """The result file NAME.json; None where it is not there."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if "page" not in found and name in PAGES:
        found["page"] = PAGES[name](found)
    return found


def loop_page(result: dict[str, Any]) -> dict[str, Any]:
    """The page of benchmarks/loop_overhead.py, whose file also makes a table of the README."""
    medians = result["medians"]
    names = {"kinfold": "`pretrain`, all included", "bare": "encoders alone"}
    rows = [
        [title, f"{medians[name]['images_per_second']:.1f}", f"{medians[name]['peak_memory_mb']:.0f} MB"]
        for name, title in names.items()
    ]
    return {
        "title": "What the loop costs",
        "text": [
            f"`pretrain` beside {result['bare']}: {result['backbone']} at 32 px, batch {result['batch_size']}, "
            f"{len(result['pairs'])} pairs of processes in turns."
        ],
        "table": {"columns": ["loop", "images/s", "peak memory"], "rows": rows},
        "summary": [
            {
                "question": f"images/s of `pretrain`, {result['backbone']} at 32 px",
                "ours": rows[0][1],
                "alternative": f"{rows[1][1]} (encoders alone)",
                "ratio": f"{100 * result['speed_share']:.0f} %",
            }
        ],
    }


def features_page(result: dict[str, Any]) -> dict[str, Any]:
    """The page of benchmarks/features_memory.py, whose file also makes a table of the README."""
    parts = {"extract": "making features", "linear": "linear classifier on them", "knn": "k-NN on them"}
    found = result["parts"]
    disk = f"{result['mb_of_the_features_on_disk'] / 1000:.1f} GB"
    rows = [
        [title, f"{found[p]['mb_own_at_most']:.0f} MB", f"{found[p]['seconds']:.0f} s"] for p, title in parts.items()
    ]
    return {
        "title": "Memory of features",
        "text": [
            f"{result['images']:,} synthetic images, {result['features']:,} features each, {disk} on the disk: the "
            "memory of the process's own at most, beyond what it had after its imports. Pages of mapped files "
            "are not counted."
        ],
        "table": {"columns": ["part", "own memory", "time"], "rows": rows},
        "summary": [
            {
                "question": f"own memory while {result['images']:,} features are made and used",
                "ours": f"{max(found[part]['mb_own_at_most'] for part in parts):.0f} MB",
                "alternative": f"{disk} (all of them at once)",
                "ratio": "",
            }
        ],
    }


PAGES = {"loop-overhead": loop_page, "features-memory": features_page}
"""for files whose scripts write no page"""


def link(name: str) -> str:
    """A Markdown link to a result file, from the page."""
    return f"[{name}.json](../benchmarks/results/{name}.json)"


def cell(text: str) -> str:
    """A text as it may stand in a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table; numbers stand on the right where a column has nothing else."""
    right = [bool(rows) and all(row[i][:1].isdigit() or not row[i] for row in rows) for i in range(len(columns))]
    lines = [f"| {' | '.join(map(cell, columns))} |", f"|{'|'.join('--:' if side else '---' for side in right)}|"]
    return [*lines, *(f"| {' | '.join(map(cell, row))} |" for row in rows)]


def summed_up(wanted: Wanted, result: dict[str, Any]) -> list[list[str]]:
    """The rows of one file in the summary: a script says what it compares, since a name does not."""
    given = result["page"].get("summary", [])
    return [[row["question"], row["ours"], row["alternative"], row["ratio"], link(wanted.name)] for row in given]


def summary() -> list[str]:
    """The table at the top."""
    rows: list[list[str]] = []
    for section in SECTIONS:
        for wanted in section.files:
            result = read(wanted.name)
            if result is None or "page" not in result:
                rows.append([wanted.question, NOT_YET, "", "", f"`{wanted.command}`"])
            else:
                rows += summed_up(wanted, result)
    return table(["question", "ours", "alternative", "ratio", "file or command"], rows)


def circumstances(name: str, result: dict[str, Any]) -> str:
    """Machine, versions, commit, date and command of a file, in one line."""
    about, versions = result["machine"], result["versions"]
    gpu = f", {about['gpu']}" if about.get("gpu") else ""
    changed = " with uncommitted changes" if result.get("uncommitted_changes") else ""
    return (
        f"*{link(name)}: {about['processor']}, {about['threads']} threads on {about['cores']} cores{gpu}; "
        f"{', '.join(f'{package} {version}' for package, version in versions.items())}; "
        f"commit {(result['commit'] or 'unknown')[:10]}{changed}; {result['when'][:10]}; `{result['command']}`*"
    )


def section(about: Section) -> list[str]:
    """One section: the texts, tables and charts of its files, and what is missing."""
    found = [(wanted, read(wanted.name)) for wanted in about.files]
    there = [(wanted, result) for wanted, result in found if result is not None and "page" in result]
    lines = [f"## {about.title}", ""]
    alike = len(there) > 1 and len({str(result["page"]["table"]["columns"]) for _, result in there}) == 1
    for number, (wanted, result) in enumerate(there):
        page = result["page"]
        if alike and number:
            continue
        if len(about.files) > 1 and not alike and page["title"] != about.title:
            lines += [f"**{page['title']}.**", ""]
        lines += [line for paragraph in page["text"] for line in (paragraph, "")]
        own = [result["page"] for _, result in there] if alike else [page]
        lines += [*table(page["table"]["columns"], [row for each in own for row in each["table"]["rows"]]), ""]
        for chart in dict.fromkeys(chart for each in own for chart in each.get("charts", [])):
            lines += [f'<img src="{Path(chart).name}" width="640" alt="{page["title"]}: chart">', ""]
        if not alike:
            lines += [circumstances(wanted.name, result), ""]
    if alike:
        for wanted, result in there:
            lines += [circumstances(wanted.name, result), ""]
    missing = [wanted for wanted, result in found if result is None or "page" not in result]
    if missing:
        lines += [*(f"- {wanted.question}: {NOT_YET}: `{wanted.command}`" for wanted in missing), ""]
    return lines


def made() -> str:
    """The whole page."""
    lines = [BEFORE, *summary(), "", ADVICE, *table(ADVICE_COLUMNS, ADVICE_ROWS), ""]
    for about in SECTIONS:
        lines += section(about)
    return "\n".join(lines).rstrip("\n") + "\n"


def main() -> None:
    """Write the page, or check it."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--check", action="store_true")
    given = words.parse_args()
    new = made()
    if given.check:
        same = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == new
        sys.exit(0 if same else "docs/performance.md is not up to date: run python benchmarks/performance.py")
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
