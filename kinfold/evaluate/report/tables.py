# SPDX-License-Identifier: Apache-2.0
"""Many results as one table: a row a backbone, a column a question with one of its numbers.

Repetitions become one row: pretrainings that differ in nothing but the seed, and protocols that do. Another recipe,
other settings, other images or another limit is another column, because such numbers do not compare. Published numbers
stand beneath, in the columns whose question they answer.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kinfold.errors import UserError
from kinfold.evaluate.report.answers import SEEDS, Answer, Question
from kinfold.evaluate.report.main_values import MAIN, main_values
from kinfold.evaluate.report.published import Number, Published, compares, numbers, recognise
from kinfold.reading import plain


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One number of one row: the mean over repetitions, with what it is the mean of."""

    mean: float
    std: float | None
    """standard deviation (n − 1); None for a single number"""
    count: int
    over: str | None
    """what the repetitions are: "pretrainings" or "evaluations"; None for a single number"""
    answers: tuple[Answer, ...]

    @property
    def text(self) -> str:
        """Write mean, spread and count; the count of repeated evaluations of one pretraining is marked with an e."""
        if self.std is None:
            return f"{self.mean:.2f}"
        return f"{self.mean:.2f} ± {self.std:.2f} ({self.count}{'e' if self.over == 'evaluations' else ''})"


@dataclass(frozen=True, kw_only=True, eq=False)
class Column:
    """One question, and what people have to know of it."""

    question: Question
    images: str
    """the set's title, or the letter of the images"""
    subset: bool
    changes: str
    """settings that are not the recipe's"""
    settings: dict[str, Any]
    set: str | None
    """the known set that the images are, whole"""
    as_shipped: bool
    """whether the settings are those of the recipe that comes with Kinfold"""

    @property
    def protocol(self) -> str:
        """The protocol's name."""
        return self.question.protocol

    @property
    def recipe(self) -> str:
        """The recipe's name."""
        return self.question.recipe

    @property
    def metric(self) -> str:
        """The number's name."""
        return self.question.metric

    @property
    def heading(self) -> tuple[str, str, str, str]:
        """Protocol, recipe with changes, images, metric."""
        recipe = f"{self.recipe} ({self.changes})" if self.changes else self.recipe
        return self.protocol, recipe, f"{self.images}, subset" if self.subset else self.images, self.metric


@dataclass(frozen=True, kw_only=True, eq=False)
class Line:
    """A row of results."""

    label: str
    cells: dict[Column, Cell]


@dataclass(frozen=True, kw_only=True, eq=False)
class PublishedLine:
    """A row of published numbers."""

    label: str
    cells: dict[Column, Number]


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """All results, and what is published beside them."""

    columns: list[Column]
    lines: list[Line]
    published: list[PublishedLine]
    images: dict[str, dict[str, str]] = field(default_factory=dict)
    """name or letter of the images to the description of each part"""
    units: dict[str, str] = field(default_factory=dict)
    """protocol to what its numbers are"""


Shipped = Callable[[str, str], "dict[str, Any] | None"]


def shipped(protocol: str, recipe: str) -> dict[str, Any] | None:
    """Give the complete settings of a recipe that comes with Kinfold; None where there is none of that name."""
    from kinfold.evaluate import load_protocol  # it imports every protocol, and they this package

    try:
        return plain(load_protocol(protocol, recipe))
    except UserError:
        return None


def tabulate(
    answers: Sequence[Answer],
    published: Published,
    *,
    named: Mapping[str, str] | None = None,
    say: Callable[[str], None],
    recipes: Shipped = shipped,
) -> Table:
    """Make the table. `named` says of which known set descriptions are (`recognise`).

    Raises `UserError` where two results answer the same question for the same backbone and seed.
    """
    asked: dict[Question, list[Answer]] = {}
    for answer in sorted(answers, key=_protocol_order):
        for metric in main_values(answer.protocol, list(answer.values)):
            asked.setdefault(answer.question(metric), []).append(answer)
    known = {question: recognise(some[0], published.sets, named or {}) for question, some in asked.items()}
    images = _name_images(known, published)
    references = {(q.protocol, q.recipe): recipes(q.protocol, q.recipe) for q in asked}
    columns: dict[Question, Column] = {}
    for question, some in asked.items():
        reference = references[question.protocol, question.recipe]
        siblings = [q for q in asked if (q.protocol, q.recipe) == (question.protocol, question.recipe)]
        columns[question] = Column(
            question=question,
            images=images[question],
            subset=some[0].subset,
            changes=_changes(question, reference, siblings),
            settings=some[0].asked,
            set=known[question],
            as_shipped=reference is not None and not _differing(json.loads(question.settings), reference),
        )
    found = list(columns.values())
    return Table(
        columns=found,
        lines=_lines(answers, {columns[q]: some for q, some in asked.items()}, say),
        published=_published(published, {columns[q]: some[0] for q, some in asked.items()}),
        images=_describe(found, asked),
        units={some[0].protocol: some[0].unit for some in asked.values() if some[0].unit},
    )


def _describe(columns: Sequence[Column], asked: Mapping[Question, Sequence[Answer]]) -> dict[str, dict[str, str]]:
    """Describe the images behind each name or letter."""
    parts = {column.images: asked[column.question][0].images() for column in columns}
    return {name: {which: part.description for which, part in found.items()} for name, found in parts.items()}


def _protocol_order(answer: Answer) -> int:
    order = list(MAIN)
    return order.index(answer.protocol) if answer.protocol in order else len(order)


def _name_images(known: Mapping[Question, str | None], published: Published) -> dict[Question, str]:
    """Name the images of every question: a known set by its title, others by a letter."""
    by_content: dict[tuple[str, int | None], str] = {}
    letters = 0
    for question, name in known.items():
        content = (question.images, question.limit)
        if content not in by_content:
            title = "" if name is None else published.sets[name].title
            if not title or title in by_content.values():
                title = f"{title} {_letter(letters)}".strip()
                letters += 1
            by_content[content] = title
    return {question: by_content[question.images, question.limit] for question in known}


def _letter(number: int) -> str:
    return chr(ord("A") + number) if number < 26 else f"{_letter(number // 26 - 1)}{_letter(number % 26)}"


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{path}.{key}".lstrip(".")).items()}
    return {path: value}


def _differing(asked: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Settings that have another value; one that only one of the two knows came or went with a version."""
    first, second = _flat(asked), _flat({k: v for k, v in reference.items() if k not in SEEDS})
    return {key: value for key, value in first.items() if key in second and second[key] != value}


def _changes(question: Question, reference: dict[str, Any] | None, siblings: Sequence[Question]) -> str:
    """Say what sets a question apart: from its recipe, or where that is not known, from others of the same recipe."""
    mine = json.loads(question.settings)
    if reference is not None:
        apart = _differing(mine, reference)
    else:
        others = [json.loads(other.settings) for other in siblings]
        apart = {key: value for other in others for key, value in _differing(mine, other).items()}
    words = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in apart.items()]
    return ", ".join(word if len(word) <= 40 else word[:37] + "..." for word in words)


def _published(published: Published, columns: Mapping[Column, Answer]) -> list[PublishedLine]:
    """Put every number into the columns whose question it answers; rows of the same network are one."""
    lines: dict[str, dict[Column, Number]] = {}
    for number in numbers(published):
        for column, one in columns.items():
            if column.as_shipped and compares(number, one, metric=column.metric, known=column.set):
                lines.setdefault(number.label, {}).setdefault(column, number)
    return [PublishedLine(label=label, cells=cells) for label, cells in lines.items()]


def _lines(
    answers: Sequence[Answer], columns: Mapping[Column, Sequence[Answer]], say: Callable[[str], None]
) -> list[Line]:
    rows: dict[tuple[Any, ...], list[Answer]] = {}
    for answer in answers:
        rows.setdefault(_row(answer), []).append(answer)
    labels = _labels(rows)
    said: set[str] = set()

    def once(text: str) -> None:
        if text not in said:
            said.add(text)
            say(text)

    lines = []
    for key in rows:
        cells = {}
        for column, some in columns.items():
            own = _distinct([answer for answer in some if _row(answer) == key], column.metric, once)
            if own:
                cells[column] = _cell(own, column.metric)
        lines.append(Line(label=labels[key], cells=cells))
    return lines


def _distinct(answers: Sequence[Answer], metric: str, say: Callable[[str], None]) -> list[Answer]:
    """Leave out copies. Raises `UserError` where two results answer the same question differently."""
    first: dict[tuple[str, str], Answer] = {}
    for answer in answers:
        seed = answer.weights if answer.pretraining is None else json.dumps(answer.pretraining.seed)
        other = first.setdefault((seed, answer.repetition), answer)
        if other is answer:
            continue
        if (other.values[metric], other.weights) == (answer.values[metric], answer.weights):
            say(f"{answer.path} says the same as {other.path} and counts once.")
            continue
        what = "different weights of one pretraining" if other.weights != answer.weights else "the same weights"
        raise UserError(
            f"Two results answer the same question ({answer.protocol}, recipe {answer.recipe}, {metric}; same settings,"
            f" images and seeds) for {what}: {other.path} ({other.started}) says {other.values[metric]:g}, "
            f"{answer.path} ({answer.started}) says {answer.values[metric]:g}. Give only the one that should count, or "
            "move the other away."
        )
    return list(first.values())


def _row(answer: Answer) -> tuple[Any, ...]:
    """Tell backbones apart: by the pretraining but for its seed, else by the weights; and by the size of images."""
    size = (answer.backbone.get("size"), answer.backbone.get("resize"))
    run = answer.pretraining
    return ("weights", answer.weights, *size) if run is None else ("run", run.recipe, run.data, *size)


def _cell(answers: Sequence[Answer], metric: str) -> Cell:
    """Mean and spread: over pretrainings where there are several, each with the mean of its evaluations."""
    weights: dict[str, list[float]] = {}
    for answer in answers:
        weights.setdefault(answer.weights, []).append(answer.values[metric])
    means = [statistics.fmean(values) for values in weights.values()]
    repeated = means if len(means) > 1 else next(iter(weights.values()))
    single = len(repeated) == 1
    return Cell(
        mean=statistics.fmean(repeated),
        std=None if single else statistics.stdev(repeated),
        count=len(repeated),
        over=None if single else "pretrainings" if len(means) > 1 else "evaluations",
        answers=tuple(answers),
    )


def _labels(rows: Mapping[tuple[Any, ...], Sequence[Answer]]) -> dict[tuple[Any, ...], str]:
    """Name the rows, each by as little as tells it from the others."""
    forms: list[Callable[[tuple[Any, ...], Sequence[Answer]], str]] = [
        lambda key, members: "",
        lambda key, members: f" at {members[0].backbone.get('size')} px",
        lambda key, members: f" [{members[0].weights[:8]}]",
        lambda key, members: f" resized to {members[0].backbone.get('resize')}",
    ]
    labels = {key: _label(members) for key, members in rows.items()}
    for form in forms:
        taken = list(labels.values())
        labels = {
            key: label + form(key, rows[key]) if taken.count(label) > 1 else label for key, label in labels.items()
        }
    return labels


def _label(members: Sequence[Answer]) -> str:
    run = members[0].pretraining
    if run is None:
        return " ".join(str(members[0].backbone.get("description", "backbone")).split())
    names = list(dict.fromkeys(a.pretraining.folder.name for a in members if a.pretraining is not None))
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"{run.title} ({'run' if len(names) == 1 else 'runs'} {shown})"
