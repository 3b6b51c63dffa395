# SPDX-License-Identifier: Apache-2.0
"""Result files read back: what was asked, what came out, and which pretraining the weights are of.

A run folder gives the results in its `evaluate/`; another folder gives its own, those of its `evaluate/` and those of
the runs in it; a file gives itself.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from kinfold.errors import UserError
from kinfold.evaluate.conditions import tell
from kinfold.evaluate.results import FORMAT
from kinfold.reading import read_text, read_yaml

REPORT = "kinfold_report"
"""the key by which the JSON of a report is told from a result"""
SEEDS = ("seed", "draw")
"""settings of a protocol that choose a repetition, not a question"""
FREE: dict[str, tuple[str, ...]] = {
    "knn": ("neighbours", "temperatures"),
    "voc-svm": ("shots",),
    "transfer": ("sets", "download"),
}
"""settings of a protocol that change which numbers there are, and none of them"""
_OF_RUN = re.compile(r" of the run (.*) \([^()]*\)$", re.DOTALL)
_A_SUBSET = re.compile(r"[\d,]+ of ")


@dataclass(frozen=True, kw_only=True)
class Images:
    """A set of images as a result file names it."""

    description: str
    count: int | None
    fingerprint: str
    """all that tells their content from another"""


class Question(NamedTuple):
    """What a number answers; see `Answer.question`."""

    protocol: str
    recipe: str
    settings: str
    images: str
    limit: int | None
    metric: str


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """The run that weights come from; runs that differ in nothing but the seed are repetitions of each other."""

    folder: Path
    recipe: str
    """the recipe without its seed, as JSON"""
    seed: Any
    data: str
    """the images that it learned from"""
    title: str
    """method, backbone and epochs, for people"""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One result file."""

    path: Path
    protocol: str
    recipe: str
    settings: dict[str, Any]
    backbone: dict[str, Any]
    data: dict[str, Any]
    values: dict[str, float]
    """the finite ones"""
    missing: tuple[str, ...] = ()
    """names of values that are no finite number"""
    unit: str
    notes: tuple[str, ...] = ()
    """what the protocol had to remark"""
    limit: int | None
    started: str
    pretraining: Pretraining | None = None

    @property
    def weights(self) -> str:
        """SHA-256 of the weights."""
        return str(self.backbone["weights_sha256"])

    @property
    def repetition(self) -> str:
        """The protocol's seeds, as JSON: results that differ in nothing else are repetitions."""
        return json.dumps({key: self.settings[key] for key in SEEDS if key in self.settings})

    @property
    def asked(self) -> dict[str, Any]:
        """The settings without the seeds."""
        return {key: value for key, value in self.settings.items() if key not in SEEDS}

    def question(self, metric: str) -> Question:
        """Say what one of the numbers answers: protocol, recipe, settings, images, limit and the number's name.

        Numbers compare only where all of it is the same. Settings that only choose which numbers there are do not
        count, and of several sets of images only the one that the number is named after.
        """
        only = FREE.get(self.protocol, ()) if (self.protocol, metric) != ("knn", "best") else ()
        asked = {key: value for key, value in self.asked.items() if key not in only}
        own = self.data.get(metric)
        data = {metric: own} if isinstance(own, dict) else self.data
        images = {name: part.fingerprint for name, part in _images(data)}
        return Question(
            protocol=self.protocol,
            recipe=self.recipe,
            settings=json.dumps(asked, sort_keys=True),
            images=json.dumps(images or data, sort_keys=True),
            limit=self.limit,
            metric=metric,
        )

    def images(self) -> dict[str, Images]:
        """Give the sets of images in `data` by name, such as train and test; inner ones have dotted names."""
        return dict(_images(self.data))

    @property
    def subset(self) -> bool:
        """Whether fewer images were used than the set has."""
        images = self.images()
        if any(_A_SUBSET.match(part.description) for part in images.values()):
            return True
        return self.limit is not None and (not images or any(part.count == self.limit for part in images.values()))


def _images(data: dict[str, Any], above: str = "") -> Iterator[tuple[str, Images]]:
    for name, part in data.items():
        if not isinstance(part, dict):
            continue
        if isinstance(part.get("fingerprint"), str):
            count = part.get("images")
            # Annotations have a fingerprint of their own.
            content = {key: value for key, value in part.items() if key not in ("description", "images")}
            yield (
                f"{above}{name}",
                Images(
                    description=str(part.get("description", "")),
                    count=count if isinstance(count, int) else None,
                    fingerprint=json.dumps(content, sort_keys=True),
                ),
            )
        else:
            yield from _images(part, f"{above}{name}.")


def gather(what: Iterable[str | Path], *, say: Callable[[str], None] = tell) -> list[Answer]:
    """Read the results that run folders, folders and files hold, each file once, in the order given.

    In a folder, JSON that is no result is named and left out. Raises `UserError` for a file that is no result, and
    for a place that has none.
    """
    answers: dict[Path, Answer] = {}
    for given in what:
        place = Path(given).expanduser()
        if os.path.isfile(place):  # Path.is_file raises for a name that is too long
            answers.setdefault(place.resolve(), _place(read_answer(place), say))
            continue
        if not os.path.isdir(place):
            raise UserError(f"{place} is not there. Give run folders, folders of results, or result files (.json).")
        found = 0
        for path in _files(place):
            if path.resolve() in answers:
                found += 1
                continue
            try:
                answer = read_answer(path)
            except UserError as error:
                say(f"Left out: {error}")
            else:
                answers[path.resolve()] = _place(answer, say)
                found += 1
        if not found:
            raise UserError(
                f"{place} has no results: there is no result file in it, in its evaluate/, or in the evaluate/ of the "
                "runs in it. Measure first, for example: kinfold evaluate knn --backbone RUN --data PHOTOS"
            )
    if not answers:
        raise UserError("A report needs results. Give run folders, folders of results, or result files (.json).")
    runs = {answer.weights: answer.pretraining for answer in answers.values() if answer.pretraining is not None}
    # Results of the same weights that lie elsewhere belong to the run too.
    return [replace(answer, pretraining=runs.get(answer.weights)) for answer in answers.values()]


def _files(folder: Path) -> list[Path]:
    if (folder / "recipe.yaml").is_file():
        patterns = ["evaluate/*.json"]
    else:
        patterns = ["*.json", "evaluate/*.json", "*/evaluate/*.json"]
    found = (path for pattern in patterns for path in sorted(folder.glob(pattern)))
    return [path for path in found if path.is_file() and not path.name.startswith(".") and not _is_report(path)]


def _is_report(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return f'"{REPORT}"'.encode() in file.read(64)
    except OSError:
        return False


def read_answer(path: Path) -> Answer:
    """Read one result file. Raises `UserError` that says what it is instead."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({_line(str(error))}). Measure again, or remove it.") from None
    lacking = [f"{key} ({kind.__name__})" for key, kind in _WANTED.items() if not _has(found, key, kind)]
    if not lacking and not _has(found["backbone"], "weights_sha256", str):
        lacking = ["backbone.weights_sha256 (str)"]
    if lacking:
        raise UserError(f"{path} is no result of `kinfold evaluate`: it lacks {', '.join(lacking)}.")
    if found["format"] != FORMAT:
        raise UserError(
            f"{path} has format {found['format']}; this version of Kinfold reads format {FORMAT}. Use the version that "
            f"wrote it ({_line(str(found.get('versions', {})))})."
        )
    values: dict[str, float] = {}
    for name, value in found["values"].items():
        if isinstance(value, bool) or not (isinstance(value, int | float | str) or value is None):
            raise UserError(f"{path}: the value {name!r} is no number but {_line(repr(value))}.")
        number = _number(value)
        if number is None:
            raise UserError(f"{path}: the value {name!r} is no number but {_line(repr(value))}.")
        if math.isfinite(number):
            values[name] = number
    limit, notes = found.get("limit"), found.get("notes")
    return Answer(
        path=path,
        protocol=found["protocol"],
        recipe=Path(found["recipe"]).stem or "settings",
        settings=found["settings"],
        backbone=found["backbone"],
        data=found["data"],
        values=values,
        missing=tuple(name for name in found["values"] if name not in values),
        unit=str(found.get("unit", "")),
        notes=tuple(note for note in notes if isinstance(note, str)) if isinstance(notes, list) else (),
        limit=limit if isinstance(limit, int) else None,
        started=str(found.get("started", "")),
    )


_WANTED: dict[str, type] = {
    "format": int,
    "protocol": str,
    "recipe": str,
    "settings": dict,
    "backbone": dict,
    "data": dict,
    "values": dict,
}


def _has(found: Any, key: str, kind: type) -> bool:
    return isinstance(found, dict) and isinstance(found.get(key), kind)


def _number(value: float | str | None) -> float | None:
    """A number, or one of the words that stand for what JSON does not have."""
    if value is None:
        return math.nan
    if isinstance(value, str) and value not in ("NaN", "Infinity", "-Infinity"):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _line(text: str) -> str:
    short = " ".join(text.split())
    return short if len(short) <= 160 else short[:157] + "..."


def _place(answer: Answer, say: Callable[[str], None]) -> Answer:
    """Find the run that a result lies in, if it is of that run's backbone."""
    folder = answer.path.resolve().parent.parent
    named = _OF_RUN.search(str(answer.backbone.get("description", "")))
    if answer.path.resolve().parent.name != "evaluate" or named is None or not (folder / "recipe.yaml").is_file():
        return answer
    if named[1] not in ("", folder.name):
        say(
            f"{answer.path} is of the run {named[1]!r} but lies in {folder.name!r}, so it stands by itself and not as "
            "a repetition of that run."
        )
        return answer
    return replace(answer, pretraining=read_pretraining(folder))


_METHODS = {"moco": "MoCo", "ressl": "ReSSL", "sce": "SCE", "co2": "CO2", "invp": "InvP"}


def read_pretraining(folder: Path) -> Pretraining:
    """Read what a run folder says about itself. Raises `UserError` where its recipe cannot be read."""
    stored = folder / "recipe.yaml"
    recipe = read_yaml(read_text(stored), source=str(stored))
    if not isinstance(recipe, dict):
        raise UserError(f"{stored} is no recipe: it holds {type(recipe).__name__}. Was it changed by hand?")
    summary: Any = None
    if (folder / "summary.json").is_file():
        try:
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            summary = None
    summary = summary if isinstance(summary, dict) else {}
    method = _name(recipe.get("method"))
    epochs = f"{recipe.get('epochs')} epochs" + ("" if summary.get("finished") is True else ", unfinished")
    return Pretraining(
        folder=folder,
        recipe=json.dumps({key: value for key, value in recipe.items() if key != "seed"}, sort_keys=True, default=str),
        seed=recipe.get("seed", 0),
        data=str(summary.get("data") or _run_data(folder)),
        title=", ".join([_METHODS.get(method, method), _name(recipe.get("backbone")), epochs]),
    )


def _name(part: Any) -> str:
    return str(part.get("name", "?")) if isinstance(part, dict) else str(part)


def _run_data(folder: Path) -> str:
    """The images that a run without a summary was given."""
    if not (folder / "run.yaml").is_file():
        return ""
    run = read_yaml(read_text(folder / "run.yaml"), source=str(folder / "run.yaml"))
    return (
        json.dumps([run.get(key) for key in ("data", "split", "limit")], default=str) if isinstance(run, dict) else ""
    )
