# SPDX-License-Identifier: Apache-2.0
"""The report: one table of all results of one or more backbones, with what is published beside them, and two pictures.

    report(["runs/a", "runs/b"], out=Path("report"))

writes report.md, report.tex, report.json, and pictures of the low-shot and semi-supervised curves where there are any.
The table is also for the terminal (`Report.show`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from kinfold.errors import UserError
from kinfold.evaluate.conditions import tell
from kinfold.evaluate.report.answers import Answer, gather
from kinfold.evaluate.report.formats import FORMATS, MARK, terminal
from kinfold.evaluate.report.plots import draw
from kinfold.evaluate.report.published import Number, numbers, read_published
from kinfold.evaluate.report.tables import Table, tabulate
from kinfold.run_folder import whole, write_text

_REMARKS = 20
_ENDINGS = {".md": "markdown", ".tex": "latex", ".json": "json"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """A table of results, and how to write it."""

    answers: list[Answer]
    table: Table
    notes: list[str]
    """remarks that a reader of the numbers should know"""
    appendix: list[Number]
    """all published numbers, if they were asked for"""
    files: list[Path]
    """what was written"""

    def text(self, form: str) -> str:
        """Give the report as "markdown", "latex" or "json"."""
        return FORMATS[form][1](self.table, self.notes, self.appendix)

    def show(self, console: Console | None = None) -> None:
        """Print the table."""
        console = console or Console(highlight=False, markup=False, emoji=False)
        console.print(terminal(self.table, self.notes, self.appendix, console))


def report(
    what: Sequence[str | Path],
    *,
    out: Path | None = None,
    named: Mapping[str, str] | None = None,
    published: bool = False,
    say: Callable[[str], None] = tell,
) -> Report:
    """Read the results of run folders, folders and files, make the table, and write it to `out`.

    `out` is a folder, which gets the table in all formats and the pictures, or a file whose ending (.md, .tex, .json)
    says the format; without it nothing is written. `named` says which images are a known set where that cannot be seen,
    by a part of their description: `{"cifar10": "my/photos"}`. With `published` all published numbers are listed too.

    Raises `UserError` for what is no result, for two results of the same question, and for a file that no report wrote.
    """
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        say(text)

    known = read_published()
    named = named or {}
    for name in named:
        if name not in known.sets:
            raise UserError(f"There is no known set {name!r}. There are: {', '.join(known.sets)}.")
    answers = gather(what, say=note)
    for name, part in named.items():
        if not any(part.lower() in text.description.lower() for answer in answers for text in answer.images().values()):
            raise UserError(f"No result is of images whose description has {part!r}, which {name} was said to be.")
    for answer in answers:
        if answer.missing:
            note(f"{answer.path}: no number came out for {', '.join(answer.missing)}.")
    table = tabulate(answers, known, named=named, say=note)
    # What the protocols remarked is for readers, not for the screen again.
    remarks = dict.fromkeys(f"{answer.protocol}: {text}" for answer in answers for text in answer.notes)
    notes += list(remarks)[:_REMARKS]
    if len(remarks) > _REMARKS:
        notes.append(f"{len(remarks) - _REMARKS:,} more remarks stand in the result files.")
    made = Report(
        answers=answers,
        table=table,
        notes=notes,
        appendix=list(numbers(known)) if published else [],
        files=[],
    )
    if out is not None:
        made.files.extend(_write(made, out))
    return made


def _write(made: Report, out: Path) -> list[Path]:
    """Write the files, after a look at all of their places. Raises `UserError` where one is taken."""
    if out.suffix in _ENDINGS and not out.is_dir():
        _check(out)
        _folder(out.parent)
        write_text(out, made.text(_ENDINGS[out.suffix]))
        return [out]
    if not out.is_dir() and (out.exists() or out.suffix):
        raise UserError(
            f"out: {out} is a file, or named like one. Give a folder, or a name that ends in {', '.join(_ENDINGS)}."
        )
    pictures = draw(made.table)
    places = [out / name for name, _ in FORMATS.values()]
    for place in (*places, *(out / name for name in pictures)):
        _check(place)
    _folder(out)
    for place, form in zip(places, FORMATS):
        write_text(place, made.text(form))
    for name, content in pictures.items():
        with whole(out / name) as partial:
            partial.write_bytes(content)
    return [*places, *(out / name for name in pictures)]


def _folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out: {folder} could not be made: {error.strerror}. Choose another.") from None


def _check(place: Path) -> None:
    """Refuse to write over what no report has written."""
    if not place.exists():
        return
    try:
        with place.open("rb") as file:
            mine = MARK.encode() in file.read(4096)
    except OSError:
        mine = False
    if not mine:
        raise UserError(f"out: {place} is there already and was not written by a report. Choose another place.")
