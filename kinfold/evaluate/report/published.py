# SPDX-License-Identifier: Apache-2.0
"""Published numbers, each with where it was read, and the rule that says beside which results one may stand.

The numbers are data, in `published.yaml`. A number without a provenance is refused when the file is read.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from kinfold.errors import UserError
from kinfold.evaluate.report.answers import Answer, Images
from kinfold.reading import parse, read_text, read_yaml
from kinfold.settings import Count, settings

FILE = Path(__file__).with_name("published.yaml")
Provenance = Literal["verified", "third-party", "recalled", "inferred"]
Text = Annotated[str, Field(min_length=1)]

MARKS: dict[str, str] = {"verified": "", "third-party": "†", "recalled": "‡", "inferred": "§"}
LEGEND: dict[str, str] = {
    "verified": "no mark: verified, read in the authors' own file or page",
    "third-party": "† third-party: read in a file of others than the authors",
    "recalled": "‡ recalled from memory of the paper, seen in no file: orientation, not a target",
    "inferred": "§ inferred: computed from other published numbers",
}


@settings
class Value:
    """One published number; what is not given here is said by its table."""

    value: float
    std: float | None = None
    seeds: Count | None = None
    provenance: Provenance | None = None
    source: Text | None = None
    over: Text | None = None
    """the number is a gain over this method, not a result"""


@settings
class PublishedRow:
    """What was published of one network."""

    method: Text
    variant: str = ""
    epochs: Count | None = None
    values: Annotated[dict[str, float | Value], Field(min_length=1)]


@settings
class PublishedTable:
    """Numbers of one protocol on one set, from one source."""

    title: Text
    protocol: Text
    recipes: tuple[Text, ...] = ()
    """recipes that measure the same; none: the source does not say enough about its protocol"""
    set: Text | None = None
    """name under `sets`"""
    tests: dict[str, Count | None] = Field(default_factory=dict)
    """where the names of the values are sets instead: the images that each asks, where that is known"""
    settings: dict[str, Any] = Field(default_factory=dict)
    """settings that must be these beside the recipe's, such as the share of the labels"""
    backbone: Text
    epochs: Count | None = None
    seeds: Count | None = None
    provenance: Provenance
    source: Text
    rows: Annotated[tuple[PublishedRow, ...], Field(min_length=1)]

    @property
    def decimals(self) -> int:
        """Decimals that the table is printed with: those of its longest number."""
        values = [value for row in self.rows for value in row.values.values()]
        plain = [value.value if isinstance(value, Value) else value for value in values]
        return max(len(repr(number).partition(".")[2]) for number in plain)


@settings
class KnownSet:
    """How a set of images is recognised."""

    title: Text
    words: Annotated[tuple[Text, ...], Field(min_length=1)]
    """one of them stands in its description, in any case"""
    train: Count | None = None
    """images to learn from"""
    test: Count | None = None
    """images to be asked"""


@settings
class Published:
    """All of `published.yaml`."""

    sets: dict[str, KnownSet]
    tables: tuple[PublishedTable, ...]


class Number(NamedTuple):
    """One published number with all that must be said beside it."""

    table: PublishedTable
    method: str
    variant: str
    epochs: int | None
    metric: str
    value: float
    std: float | None
    seeds: int | None
    provenance: Provenance
    source: str
    over: str | None

    @property
    def label(self) -> str:
        """Name the network: method, backbone, epochs, variant."""
        epochs = "" if self.epochs is None else f"{self.epochs} epochs"
        return ", ".join(part for part in (self.method, self.table.backbone, epochs, self.variant) if part)

    @property
    def text(self) -> str:
        """Write the number as published, with its mark."""
        spread = "" if self.std is None else f" ± {self.std:g}"
        seeds = "" if self.seeds is None else f" ({self.seeds})"
        gain = "" if self.over is None else f" over {self.over}"
        sign = "" if self.over is None else "+"
        return f"{self.value:{sign}.{self.table.decimals}f}{spread}{seeds}{gain}{MARKS[self.provenance]}"


@functools.cache
def read_published(path: Path = FILE) -> Published:
    """Read the file of published numbers. Raises `UserError` for a number without provenance or an unknown set."""
    found = parse(Published, read_yaml(read_text(path), source=path.name), source=path.name)
    for table in found.tables:
        if table.set is not None and table.set not in found.sets:
            raise UserError(f"{path.name}: {table.title}: the set {table.set!r} is not described under sets.")
    return found


def numbers(published: Published) -> Iterator[Number]:
    """Give every number, in the file's order."""
    for table in published.tables:
        for row in table.rows:
            for metric, given in row.values.items():
                value = given if isinstance(given, Value) else Value(value=given)
                yield Number(
                    table=table,
                    method=row.method,
                    variant=row.variant,
                    epochs=row.epochs or table.epochs,
                    metric=metric,
                    value=value.value,
                    std=value.std,
                    seeds=value.seeds or table.seeds,
                    provenance=value.provenance or table.provenance,
                    source=value.source or table.source,
                    over=value.over,
                )


def compares(number: Number, answer: Answer, *, metric: str, known: str | None) -> bool:
    """Say whether a published number answers the question of a result's `metric`.

    The protocol, a recipe that measures the same, the images (`known` is the set that they were recognised as), the
    number's name and the settings that the table names must all be right; a gain stands beside no result.
    """
    table = number.table
    if number.over is not None or (answer.protocol, metric) != (table.protocol, number.metric):
        return False
    if answer.recipe not in table.recipes or any(answer.asked.get(k) != v for k, v in table.settings.items()):
        return False
    if table.set is not None or not table.tests:
        return known is not None and known == table.set
    asked = answer.images()
    # A mean over sets needs all of them.
    wanted = {metric: table.tests[metric]} if metric in table.tests else table.tests
    counts = {name: asked[f"{name}.test"].count if f"{name}.test" in asked else None for name in wanted}
    return not answer.subset and all(
        found is not None and wanted[name] in (None, found) for name, found in counts.items()
    )


def recognise(answer: Answer, sets: Mapping[str, KnownSet], named: Mapping[str, str]) -> str | None:
    """Say which known set the images of a result are, whole; None where that is not certain.

    Both counts must be right, and a word of the set must stand in the description. `named` gives descriptions (or a
    part of them) that the person says are of a set, by its name; then only the counts are asked.
    """
    if answer.subset:
        return None
    images = answer.images()
    text = "\n".join(part.description for part in images.values()).lower()
    said = [name for name, part in named.items() if part.lower() in text]
    found = said or [name for name, known in sets.items() if _has_word(text, known)]
    fitting = [name for name in found if _counts(images, sets[name])]
    return fitting[0] if len(fitting) == 1 else None


def _has_word(text: str, known: KnownSet) -> bool:
    """A whole word: `cifar10` does not stand in `cifar100`."""
    return any(re.search(rf"(?<![a-z0-9]){re.escape(word)}(?![a-z0-9])", text) for word in known.words)


def _counts(images: Mapping[str, Images], known: KnownSet) -> bool:
    """Both counts of a known set are those of the images; a set of unknown size is never certain."""
    wanted = {"train": known.train, "test": known.test}
    return known.test is not None and all(
        count is None or (part in images and images[part].count == count) for part, count in wanted.items()
    )
