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
import itertools
import re
import sys
from pathlib import Path
from typing import Any

import result_files
from performance_sections import ADVICE, ADVICE_COLUMNS, ADVICE_ROWS, BEFORE, MISSING, SECTIONS, Section, Wanted
from result_files import NOT_YET, ROOT

PAGE = ROOT / "docs" / "performance.md"


def read(name: str) -> dict[str, Any] | None:
    """The result file NAME.json with its page; None where there is no file."""
    found = result_files.read(name)
    if found is not None and "page" not in found:
        sys.exit(f"{name}.json does not say what stands on the page: run python benchmarks/pages.py")
    return found


def link(name: str) -> str:
    """A Markdown link to a result file, from the page."""
    return f"[{name}](../benchmarks/results/{name}.json)"


def cell(text: str) -> str:
    """A text as it may stand in a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table; numbers stand on the right where a column has nothing else."""
    number = re.compile(r"([\d.,]+( to [\d.,]+| \([\d.,]+ to [\d.,]+\))?( ?[\w%×/]+)?)?")
    right = [bool(rows) and all(number.fullmatch(row[i]) for row in rows) for i in range(len(columns))]
    lines = [f"| {' | '.join(map(cell, columns))} |", f"|{'|'.join('--:' if side else '---' for side in right)}|"]
    return [*lines, *(f"| {' | '.join(map(cell, row))} |" for row in rows)]


def least(ratio: str) -> float | None:
    """The ratio as a number, the smaller end of a range; None where it is a share or nothing."""
    found = re.fullmatch(r"([\d.,]+)( to [\d.,]+)?×", ratio)
    return float(found[1].replace(",", "")) if found else None


def in_words(ratio: str, ours: str, other: str) -> str:
    """What a ratio of the summary says of ours beside the other, as a person would say it."""
    number = least(ratio)
    if number is None:
        return f"{ratio} of {other}" if ratio.endswith("%") else other
    if re.search(r"\b[MG]B$", ours):
        return f"**{ratio}** less memory than {other}" if number >= 1 else f"{ratio}: more memory than {other}"
    return f"**{ratio}** as fast as {other}" if number >= 1 else f"{ratio} as fast as {other}: slower"


def compared(row: dict[str, str]) -> list[tuple[str, str]]:
    """The alternatives of a row of the summary, each with its own ratio."""
    others, ratios = re.split(r"(?<=\)), ", row["alternative"]), row["ratio"].split(", ")
    return list(zip(others, ratios)) if len(others) == len(ratios) else [(row["alternative"], row["ratio"])]


def glance(wanted: Wanted, rows: list[dict[str, str]]) -> list[str]:
    """One row of the summary, of rows with one question; all that it is held against stands under each other."""
    words = [in_words(ratio, row["ours"], other) for row in rows for other, ratio in compared(row)]
    return [rows[0]["question"], rows[0]["ours"], "<br>".join(words), link(wanted.name)]


def told(result: dict[str, Any]) -> list[list[dict[str, str]]]:
    """The rows that a file has in the summary, those of one question together."""
    rows = result["page"].get("summary", [])
    return [list(group) for _, group in itertools.groupby(rows, key=lambda row: (row["question"], row["ours"]))]


def summary() -> list[str]:
    """The tables at the top: what was measured, and what was not."""
    rows: list[list[str]] = []
    missing: list[list[str]] = []
    for wanted in (each for section in SECTIONS for each in section.files):
        result = read(wanted.name)
        if result is None:
            missing.append([wanted.question, NOT_YET, f"`{wanted.command}`"])
        else:
            rows += [glance(wanted, together) for together in told(result)]
    lines = table(["what", "ours", "ours is", "file"], rows) if rows else []
    if missing:
        lines += ["", *MISSING.splitlines(), "", *table(["what", "ours", "command"], missing)]
    return lines


def circumstances(name: str, result: dict[str, Any]) -> str:
    """Machine, versions, commit, date and command of a file, in one line."""
    about, versions = result["machine"], result["versions"]
    gpu = f", {about['gpu']}" if about.get("gpu") else ""
    threads = f"{about['threads']} thread{'' if about['threads'] == 1 else 's'}"
    changed = " with uncommitted changes" if result.get("uncommitted_changes") else ""
    return (
        f"*{link(name)}: {about['processor']}, {threads} on {about['cores']} cores{gpu}; "
        f"{', '.join(f'{package} {version}' for package, version in versions.items())}; "
        f"commit {(result['commit'] or 'unknown')[:10]}{changed}; {result['when'][:10]}; `{result['command']}`*"
    )


def section(about: Section) -> list[str]:
    """One section: the texts, tables and charts of its files; nothing where there are none yet."""
    there = [(wanted, result) for wanted in about.files if (result := read(wanted.name)) is not None]
    if not there:
        return []
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
    return lines


def first_of_all() -> str:
    """In how many comparisons ours is behind, what is still to be measured, and on which machines it was."""
    results = [read(wanted.name) for one in SECTIONS for wanted in one.files]
    there = [result for result in results if result is not None]
    ratios = [least(ratio) for found in there for rows in told(found) for row in rows for _, ratio in compared(row)]
    numbers = [ratio for ratio in ratios if ratio is not None]
    machines = dict.fromkeys(
        f"{each['processor']}, {each['cores']} cores{f', {gpu}' if (gpu := each.get('gpu')) else ''}"
        for each in (result["machine"] for result in there)
    )
    behind = f"Behind in {sum(ratio < 1 for ratio in numbers)} of {len(numbers)} comparisons; " if numbers else ""
    where = f" Measured on: {'; '.join(machines)}." if machines else ""
    return f"**{behind}{len(results) - len(there)} of {len(results)} questions are still to be measured.**{where}"


def made() -> str:
    """The whole page."""
    lines = [BEFORE, first_of_all(), "", *summary(), "", ADVICE]
    lines += [*table(ADVICE_COLUMNS, ADVICE_ROWS), ""]
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
