# SPDX-License-Identifier: Apache-2.0
"""A table of results as Markdown, LaTeX, JSON and for the terminal; text from result files is escaped in each."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table as Grid
from rich.text import Text

from kinfold import __version__
from kinfold.evaluate.report.answers import REPORT
from kinfold.evaluate.report.published import LEGEND, MARKS, Number
from kinfold.evaluate.report.tables import Cell, Column, Line, PublishedLine, Table

_NONE = "–"
_LABEL = 20  # letters of a row's label in a narrow terminal
MARK = "kinfold evaluate report"
"""stands at the top of every file that a report writes, so that no other file is written over"""


def plain_line(text: str) -> str:
    """One line without control characters, which a terminal would obey."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+", " ", text).strip()


def legend(table: Table, notes: Sequence[str] = ()) -> list[str]:
    """Say what the table's marks, letters and units mean, and the remarks: one line each."""
    cells = [cell for line in table.lines for cell in line.cells.values()]
    lines = [
        f"{name}: " + "; ".join(f"{part}: {text}" for part, text in parts.items())
        for name, parts in table.images.items()
        if parts
    ]
    lines += [f"{protocol}: {unit}" for protocol, unit in table.units.items()]
    if any(cell.over == "pretrainings" for cell in cells):
        lines.append("± (n): mean and standard deviation over n pretrainings that differ in the seed")
    if any(cell.over == "evaluations" for cell in cells):
        lines.append("± (ne): mean and standard deviation over n evaluations of one network that differ in the seed")
    if any("best" in column.metric for column in table.columns):
        lines.append("best: chosen on the test images, as papers do")
    if any((column.protocol, column.metric) == ("voc-svm", "chosen") for column in table.columns):
        lines.append("mAP: of the cost that is best on the test images; chosen: of costs chosen on training images")
    if any(column.subset for column in table.columns):
        lines.append("subset: fewer images than the set has, so no published number compares")
    used = [number for line in table.published for number in line.cells.values()]
    if used:
        lines.append("published numbers: " + "; ".join(_provenances(used)))
        lines.append("sources: " + "; ".join(dict.fromkeys(number.source for number in used)))
    return [plain_line(line) for line in (*lines, *notes)]


def _provenances(used: Sequence[Number]) -> list[str]:
    return [LEGEND[kind] for kind in MARKS if any(number.provenance == kind for number in used)]


def cell_text(cell: Cell | Number | None) -> str:
    """Write what stands in a place of the table."""
    return _NONE if cell is None else cell.text


def markdown(table: Table, notes: Sequence[str], appendix: Sequence[Number]) -> str:
    """Write the table as Markdown."""
    lines = [f"<!-- {MARK} -->", "# Results", ""]
    lines += _markdown_rows(
        ["backbone", *(": ".join([", ".join(c.heading[:3]), c.metric]) for c in table.columns)],
        [
            *([line.label, *(cell_text(line.cells.get(c)) for c in table.columns)] for line in table.lines),
            *([["**published**", *("" for _ in table.columns)]] if table.published else []),
            *([line.label, *(cell_text(line.cells.get(c)) for c in table.columns)] for line in table.published),
        ],
        left=1,
    )
    lines += ["", *(f"- {_markdown(line)}" for line in legend(table, notes))]
    if appendix:
        lines += [
            "",
            "## Published numbers",
            "",
            "Not comparable with the results above unless they stand there too.",
            "",
        ]
        lines += _markdown_rows(_APPENDIX, [_appendix_row(number) for number in appendix], left=3)
        lines += ["", *(f"- {_markdown(line)}" for line in _provenances(appendix))]
    return "\n".join(lines) + "\n"


def _markdown_rows(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    ruler = ["---" if place < left else "---:" for place in range(len(head))]
    bold = re.compile(r"^\*\*(\w+)\*\*$")
    return [
        f"| {' | '.join(line)} |"
        for line in (
            [_markdown(word) for word in head],
            ruler,
            *([word if bold.match(word) else _markdown(word) for word in row] for row in rows),
        )
    ]


def _markdown(text: str) -> str:
    """Text that Markdown and HTML take as it stands."""
    return re.sub(r"([\\`*_{}\[\]<>|#~$])", r"\\\1", plain_line(text)).replace("&", "&amp;")


_APPENDIX = ("method", "backbone", "protocol", "images", "metric", "number", "source")


def _appendix_row(number: Number) -> list[str]:
    about = number.label.removeprefix(f"{number.method}, ")
    images = number.table.set or number.table.title
    share = "".join(f", {key}={value:g}" for key, value in number.table.settings.items())
    return [number.method, about, number.table.protocol, images + share, number.metric, number.text, number.source]


def latex(table: Table, notes: Sequence[str], appendix: Sequence[Number]) -> str:
    """Write the table as LaTeX with the rules of booktabs: \\input it where \\usepackage{booktabs} is loaded."""
    lines = [f"% {MARK}: needs \\usepackage{{booktabs}}", f"\\begin{{tabular}}{{l{'r' * len(table.columns)}}}"]
    lines.append("\\toprule")
    for level in range(4):
        lines.append(" & ".join(["", *_spanning(table.columns, level)]).strip() + " \\\\")
        lines += _rules(table.columns) if level == 0 else []
    lines.append("\\midrule")
    lines += [_latex_row(line, table.columns) for line in table.lines]
    if table.published:
        lines += ["\\midrule", f"\\multicolumn{{{len(table.columns) + 1}}}{{l}}{{\\emph{{published}}}} \\\\"]
        lines += [_latex_row(line, table.columns) for line in table.published]
    lines += ["\\bottomrule", "\\end{tabular}"]
    lines += _latex_notes(legend(table, notes))
    if appendix:
        lines += ["", "\\begin{tabular}{lllllrl}", "\\toprule", " & ".join(_APPENDIX) + " \\\\", "\\midrule"]
        lines += [" & ".join(_latex(word) for word in _appendix_row(number)) + " \\\\" for number in appendix]
        lines += ["\\bottomrule", "\\end{tabular}"]
        lines += _latex_notes(_provenances(appendix))
    return "\n".join(lines) + "\n"


def _latex_notes(lines: Sequence[str]) -> list[str]:
    """Small paragraphs under a table."""
    return ["", "{\\footnotesize", *(f"\\noindent {_latex(line)}\\par" for line in lines), "}"]


def _spanning(columns: Sequence[Column], level: int) -> list[str]:
    """The headings of one level; equal neighbours under the same heading above share one."""
    words: list[str] = []
    start = 0
    for place in range(1, len(columns) + 1):
        if place < len(columns) and columns[place].heading[: level + 1] == columns[start].heading[: level + 1]:
            continue
        word, width = _latex(columns[start].heading[level]), place - start
        words.append(f"\\multicolumn{{{width}}}{{c}}{{{word}}}" if width > 1 else word)
        start = place
    return words


def _rules(columns: Sequence[Column]) -> list[str]:
    """A thin rule under each protocol."""
    protocols = [column.protocol for column in columns]
    starts = [place for place in range(len(columns)) if place == 0 or protocols[place] != protocols[place - 1]]
    ends = [*starts[1:], len(columns)]
    return [f"\\cmidrule(lr){{{start + 2}-{end + 1}}}" for start, end in zip(starts, ends)]


def _latex_row(line: Line | PublishedLine, columns: Sequence[Column]) -> str:
    return " & ".join([_latex(line.label), *(_latex(cell_text(line.cells.get(c))) for c in columns)]) + " \\\\"


_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "[": "{[}",  # after a line's end it would begin an option, and so would a star
    "*": "{*}",
    "×": r"$\times$",
    "±": r"$\pm$",
    "−": r"$-$",
    "–": r"--",
    "†": r"$^{\dagger}$",
    "‡": r"$^{\ddagger}$",
    "§": r"$^{\S}$",
}


def _latex(text: str) -> str:
    """Text that LaTeX takes as it stands."""
    return "".join(_LATEX.get(letter, letter) for letter in plain_line(text))


def as_json(table: Table, notes: Sequence[str], appendix: Sequence[Number]) -> str:
    """Write everything that the table knows as JSON: every number with the files that it is made of."""
    numbered = {column: place for place, column in enumerate(table.columns)}
    found = {
        REPORT: 1,
        "made_by": MARK,
        "version": __version__,
        "columns": [
            {
                "protocol": c.protocol,
                "recipe": c.recipe,
                "changes": c.changes,
                "images": c.images,
                "subset": c.subset,
                "metric": c.metric,
                "settings": c.settings,
            }
            for c in table.columns
        ],
        "rows": [
            {
                "backbone": line.label,
                "cells": [{"column": numbered[c], **_json_cell(cell, c.metric)} for c, cell in line.cells.items()],
            }
            for line in table.lines
        ],
        "published": [
            {
                "network": line.label,
                "cells": [{"column": numbered[c], **_json_number(number)} for c, number in line.cells.items()],
            }
            for line in table.published
        ],
        "appendix": [
            {
                "network": number.label,
                "protocol": number.table.protocol,
                "set": number.table.set,
                "settings": number.table.settings,
                "metric": number.metric,
                **_json_number(number),
            }
            for number in appendix
        ],
        "images": table.images,
        "units": table.units,
        "notes": list(notes),
    }
    return json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _json_cell(cell: Cell, metric: str) -> dict[str, Any]:
    return {
        "mean": cell.mean,
        "std": cell.std,
        "n": cell.count,
        "over": cell.over,
        "results": [
            {
                "file": str(answer.path),
                "value": answer.values[metric],
                "weights_sha256": answer.weights,
                "pretraining_seed": None if answer.pretraining is None else answer.pretraining.seed,
                "protocol_seeds": json.loads(answer.repetition),
                "started": answer.started,
            }
            for answer in cell.answers
        ],
    }


def _json_number(number: Number) -> dict[str, Any]:
    return {
        "value": number.value,
        "std": number.std,
        "seeds": number.seeds,
        "gain_over": number.over,
        "provenance": number.provenance,
        "source": number.source,
    }


def terminal(table: Table, notes: Sequence[str], appendix: Sequence[Number], console: Console) -> RenderableType:
    """Lay the table out for a terminal: where it is too wide, as several tables of fewer columns."""
    parts: list[RenderableType] = []
    rest = table.columns
    while rest or not parts:
        take = len(rest)
        while take > 1 and _LABEL + sum(_width(table, c) + 3 for c in rest[:take]) > console.width:
            take -= 1
        parts += [_grid(table, rest[:take]), Text()]
        rest = rest[take:]
    parts += [Text(line) for line in legend(table, notes)]
    if appendix:
        parts += [Text("\nPublished numbers; only those in the table above compare", style="bold")]
        parts += [Text(line) for line in (*_appendix_lines(appendix), "", *_provenances(appendix))]
    return Group(*parts)


def _appendix_lines(appendix: Sequence[Number]) -> list[str]:
    """Published numbers as lines: each table's title and source, and a line a network."""
    lines: list[str] = []
    for _, table in itertools.groupby(appendix, key=lambda number: id(number.table)):
        some = list(table)
        lines += ["", f"{some[0].table.title} ({some[0].table.source})"]
        for (label, source), values in itertools.groupby(some, key=lambda number: (number.label, number.source)):
            words = ", ".join(f"{number.metric} {number.text}" for number in values)
            lines.append(f"  {label}: {words}" + ("" if source == some[0].table.source else f" ({source})"))
    return lines


def _width(table: Table, column: Column) -> int:
    """Letters that a column needs so that no number is broken."""
    numbers = [*(line.cells.get(column) for line in table.lines), *(n.cells.get(column) for n in table.published)]
    return max(len(cell_text(number)) for number in numbers)


def _grid(table: Table, columns: Sequence[Column]) -> Grid:
    """Lay some of the columns out; a line of published numbers stands only where it has one."""
    published = [line for line in table.published if any(c in line.cells for c in columns)]
    grid = Grid(show_edge=False, pad_edge=False)
    grid.add_column("", overflow="fold", min_width=_LABEL, max_width=2 * _LABEL)
    for column in columns:
        width = _width(table, column)
        heading = Text("\n".join(plain_line(word) for word in column.heading))
        grid.add_column(heading, justify="right", min_width=width, max_width=max(width, 16), overflow="fold")
    _add(grid, table.lines, columns)
    if published:
        grid.add_section()
        grid.add_row(Text("published", style="italic"))
        _add(grid, published, columns, style="dim")
    return grid


def _add(
    grid: Grid, lines: Sequence[Line] | Sequence[PublishedLine], columns: Sequence[Column], style: str = ""
) -> None:
    for line in lines:
        cells = [Text(cell_text(line.cells.get(c)), no_wrap=True) for c in columns]
        grid.add_row(Text(plain_line(line.label)), *cells, style=style)


FORMATS: dict[str, tuple[str, Callable[[Table, Sequence[str], Sequence[Number]], str]]] = {
    "markdown": ("report.md", markdown),
    "latex": ("report.tex", latex),
    "json": ("report.json", as_json),
}
"""name of a format to its file and its function"""
