# SPDX-License-Identifier: Apache-2.0
"""Evaluation: how good a frozen backbone is, by the protocols of the papers.

Every protocol has one signature, `protocol(backbone, data, settings) -> dict[str, float]`, and leaves the backbone as
it was, to the bit. The command and the probes during training call the same functions. A published variant is a recipe
under `recipes/evaluate`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kinfold.data.decode import Undecodable
from kinfold.data.sources import Source, open_source
from kinfold.devices import choose_device, choose_workers
from kinfold.errors import UserError
from kinfold.evaluate.backbones import FrozenBackbone, load_backbone
from kinfold.evaluate.knn import KNN
from kinfold.evaluate.knn import knn as by_knn
from kinfold.evaluate.labelled import Labelled, tell
from kinfold.evaluate.linear import Linear
from kinfold.evaluate.linear import linear as by_linear
from kinfold.evaluate.results import about_backbone, about_machine, about_source, check_place, versions, write_result
from kinfold.reading import assign, parse, plain, read_text, read_yaml
from kinfold.recipe import RECIPES, find_recipe

__all__ = ["KNN", "PROTOCOLS", "FrozenBackbone", "Labelled", "Linear", "evaluate", "load_backbone", "load_protocol"]

PROTOCOLS: dict[str, tuple[type[Any], Callable[[FrozenBackbone, Labelled, Any], dict[str, float]]]] = {
    "knn": (KNN, by_knn),
    "linear": (Linear, by_linear),
}


def load_protocol(protocol: str, recipe: str = "default", overrides: Sequence[str] = ()) -> Any:
    """Read the settings of a protocol from a recipe of its folder (or a file), changed by `key=value` words.

    Raises `UserError` with the path of what is wrong.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"There is no protocol {protocol!r}. There are: {', '.join(PROTOCOLS)}.")
    path = find_recipe(recipe, folder=RECIPES / "evaluate" / protocol)
    source = f"evaluate/{protocol}/{recipe}"
    values = read_yaml(read_text(path), source=source)
    if not isinstance(values, dict):
        raise UserError(f"{source}: a recipe is a mapping of settings, but this file holds {type(values).__name__}.")
    for word in overrides:
        key, sign, text = word.partition("=")
        if not sign or not key:
            raise UserError(f"{word!r} is no setting. Write key=value, for example epochs=50 or neighbours=[200].")
        assign(values, key, read_yaml(text, source=word) if text.strip() else None)
    return parse(PROTOCOLS[protocol][0], values, source=source)


def evaluate(
    protocol: str,
    backbone: str | FrozenBackbone,
    data: str,
    *,
    recipe: str = "default",
    overrides: Sequence[str] = (),
    train_split: str = "train",
    test_data: str | None = None,
    test_split: str = "test",
    out: Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    limit: int | None = None,
    size: int | None = None,
    resize: int | None = None,
    batch_size: int = 256,
    say: Callable[[str], None] = tell,
) -> dict[str, Any]:
    """Measure a backbone on labelled images, write the result as JSON, and return it with its `file`.

    `data` is split by its own splits, `test_data` is another set to be asked. Without either, k-NN leaves each image
    out in turn and the linear classifier holds a fifth out. `limit` takes that many images of each. `size` and
    `resize` take the place of the backbone's (and the recipe's). The file goes to `out` (a folder or a .json file),
    else to `evaluate/` in the run folder, else to `evaluate/` here.

    Raises `UserError` for anything given that cannot work.
    """
    if out is not None:
        check_place(out)
    began = time.monotonic()
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        say(text)

    settings = load_protocol(protocol, recipe, overrides)
    train = open_source(data, split=train_split, limit=limit)
    test = _test_source(data, train, test_data, test_split, limit, note)
    loaded = load_backbone(backbone) if isinstance(backbone, str) else backbone
    if size is not None:
        loaded = dataclasses.replace(loaded, size=size, resize=resize)
        settings = _at_size(settings, size, resize)
    elif resize is not None:
        loaded = dataclasses.replace(loaded, resize=resize)
    where = choose_device(device)
    if isinstance(settings, Linear) and settings.test_size not in (None, loaded.size):
        note(
            f"The images are {settings.test_size} pixels wide here, as the recipe says; {loaded.description} was made "
            f"for {loaded.size}. Set size={loaded.size} to measure it at its own size."
        )
    labelled = Labelled(
        train=train,
        test=test,
        device=str(where),
        workers=_workers(train, workers, choose_workers),
        batch_size=batch_size,
        say=note,
    )
    started = datetime.now(UTC)
    values = PROTOCOLS[protocol][1](loaded.to(where), labelled, settings)
    result: dict[str, Any] = {
        "format": 1,
        "protocol": protocol,
        "recipe": recipe,
        "settings": plain(settings),
        "backbone": about_backbone(loaded),
        "data": {"train": about_source(train), "test": about_source(test)},
        "values": values,
        "unit": "percent of the test images; best_epoch is a number of an epoch, from 1",
        "notes": notes,
        "machine": about_machine(str(where)),
        "versions": versions(),
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - began, 2),
    }
    folder = loaded.folder if loaded.folder is not None else Path()
    path = write_result(result, out if out is not None else folder / "evaluate")
    return {**result, "file": str(path)}


def _test_source(
    data: str, train: Source, other: str | None, split: str, limit: int | None, say: Callable[[str], None]
) -> Source | None:
    """The images to be asked: another set, or the test split of the same; None where there is none."""
    if other is not None:
        try:
            given = open_source(other, split=split, limit=limit)
        except UserError:
            given = open_source(other, limit=limit)  # a set without splits is all test
        if given.fingerprint == train.fingerprint:  # every image would find itself
            say("The test images are the training images, so each is left out when it asks.")
            return None
        return given
    try:
        test = open_source(data, split=split, limit=limit)
    except UserError:
        if split != "test":  # asked for by name
            raise
        return None
    if test.labels is None and train.labels is not None and split == "test":
        say(f"The test split has no labels and is not used: {test.description}.")
        return None
    return None if test.fingerprint == train.fingerprint else test


def _workers(source: Source, asked: int | None, choose: Callable[[int | None], int]) -> int:
    """Processes that decode: none where images come decoded or are few, for starting them takes longer."""
    if asked is None and (len(source) < 2000 or _comes_decoded(source)):
        return 0
    return choose(asked)


def _comes_decoded(source: Source) -> bool:
    try:
        return not isinstance(source.read(0), bytes)
    except (Undecodable, OSError):
        return False


def _at_size(settings: Any, size: int, resize: int | None) -> Any:
    """Put a size into the settings that name one."""
    if not isinstance(settings, Linear):
        return settings
    augment = None if settings.augment is None else dataclasses.replace(settings.augment, size=size)
    if settings.test_size is None:
        return dataclasses.replace(settings, augment=augment)
    if resize is None and settings.test_resize is not None:  # as much is cut off at the edges as the recipe says
        resize = round(settings.test_resize * size / settings.test_size)
    return dataclasses.replace(settings, augment=augment, test_size=size, test_resize=resize)
