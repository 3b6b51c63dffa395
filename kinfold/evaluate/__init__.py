# SPDX-License-Identifier: Apache-2.0
"""Evaluation: how good a frozen backbone is, by the protocols of the papers.

Every protocol has one signature, `protocol(backbone, data, settings) -> dict[str, float]`, and leaves the backbone as
it was, to the bit. The command and the probes during training call the same functions. A published variant is a recipe
under `recipes/evaluate`.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kinfold import distributed
from kinfold.data.index import cache_root
from kinfold.devices import choose_device, choose_workers
from kinfold.errors import UserError
from kinfold.evaluate.backbones import FrozenBackbone, load_backbone
from kinfold.evaluate.conditions import tell
from kinfold.evaluate.detection import Detection, open_detection
from kinfold.evaluate.detection import detection as by_detection
from kinfold.evaluate.fine_tune import FineTune
from kinfold.evaluate.fine_tune import fine_tune as by_fine_tune
from kinfold.evaluate.knn import KNN
from kinfold.evaluate.knn import knn as by_knn
from kinfold.evaluate.labelled import Labelled, open_labelled
from kinfold.evaluate.linear import Linear
from kinfold.evaluate.linear import linear as by_linear
from kinfold.evaluate.multi_label import open_multi_label
from kinfold.evaluate.patches import Patches
from kinfold.evaluate.patches import patches as by_patches
from kinfold.evaluate.protocol import Protocol, Request
from kinfold.evaluate.results import (
    about_backbone,
    about_machine,
    check_place,
    file_name,
    folder_of,
    versions,
    write_result,
)
from kinfold.evaluate.resumable import Stopped, place_of_progress
from kinfold.evaluate.segmentation import Segmentation
from kinfold.evaluate.segmentation import segmentation as by_segmentation
from kinfold.evaluate.segmentation.masked import open_masked
from kinfold.evaluate.semi_supervised import SemiSupervised
from kinfold.evaluate.semi_supervised import semi_supervised as by_semi_supervised
from kinfold.evaluate.transfer import Transfer, open_transfer
from kinfold.evaluate.transfer import transfer as by_transfer
from kinfold.evaluate.voc_logistic import VOCLogistic
from kinfold.evaluate.voc_logistic import voc_logistic as by_voc_logistic
from kinfold.evaluate.voc_svm import VOCSVM
from kinfold.evaluate.voc_svm import voc_svm as by_voc_svm
from kinfold.reading import assign, parse, plain, read_text, read_yaml
from kinfold.recipe import RECIPES, find_recipe

__all__ = [
    "KNN",
    "PROTOCOLS",
    "FrozenBackbone",
    "Labelled",
    "Linear",
    "Stopped",
    "evaluate",
    "load_backbone",
    "load_protocol",
]

_ACCURACY = "percent of the test images"
_PRECISION = "percent: mean average precision over the classes; AP/... of one class"
_UNION = "percent: mean intersection over union of the classes' pixels; iou/... of one class"

PROTOCOLS: dict[str, Protocol] = {
    "knn": Protocol(settings=KNN, measure=by_knn, open=open_labelled, unit=_ACCURACY),
    "linear": Protocol(
        settings=Linear,
        measure=by_linear,
        open=open_labelled,
        unit=f"{_ACCURACY}; best_epoch counts epochs trained; best_block counts residual blocks, 0 is the stem",
    ),
    "semi-supervised": Protocol(
        settings=SemiSupervised,
        measure=by_semi_supervised,
        open=open_labelled,
        unit=f"{_ACCURACY}; labels is a number of images; grid/... is of held-out images; chosen/... are the rates",
    ),
    "fine-tune": Protocol(
        settings=FineTune,
        measure=by_fine_tune,
        open=open_labelled,
        unit=f"{_ACCURACY}; mean_per_class is the mean of the classes' percentages; best_epoch counts epochs trained",
    ),
    "transfer": Protocol(
        settings=Transfer, measure=by_transfer, open=open_transfer, unit="percent; decay/... is the chosen weight decay"
    ),
    "voc-svm": Protocol(settings=VOCSVM, measure=by_voc_svm, open=open_multi_label, unit=_PRECISION),
    "voc-logistic": Protocol(settings=VOCLogistic, measure=by_voc_logistic, open=open_multi_label, unit=_PRECISION),
    "detection": Protocol(
        settings=Detection, measure=by_detection, open=open_detection, unit="percent: average precision of boxes"
    ),
    "segmentation": Protocol(settings=Segmentation, measure=by_segmentation, open=open_masked, unit=_UNION),
    "patches": Protocol(settings=Patches, measure=by_patches, open=open_masked, unit=_UNION),
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
    return parse(PROTOCOLS[protocol].settings, values, source=source)


def evaluate(
    protocol: str,
    backbone: str | FrozenBackbone,
    data: str,
    *,
    recipe: str = "default",
    overrides: Sequence[str] = (),
    train_split: str | None = None,
    test_data: str | None = None,
    test_split: str | None = None,
    out: Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    limit: int | None = None,
    size: int | None = None,
    resize: int | None = None,
    batch_size: int = 256,
    cache: bool = True,
    say: Callable[[str], None] = tell,
) -> dict[str, Any]:
    """Measure a backbone by a protocol, write the result as JSON, and return it with its `file`.

    `data` is split by its own splits, `test_data` is another set to be asked; each protocol says which splits it takes
    where none are named, and what it does without a test set. `limit` takes that many images of each. `size` and
    `resize` take the place of the backbone's (and the recipe's). Features are kept for the next protocol unless
    `cache` is false. The file goes to `out` (a folder or a .json file), else to `evaluate/` in the run folder, else to
    `evaluate/` here. A long protocol that was stopped goes on when it is called again with the same arguments; several
    processes of torchrun share the work.

    Raises `UserError` for anything given that cannot work, and `Stopped` where a signal has ended it.
    """
    if out is not None:
        check_place(out)
    began = time.monotonic()
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        if distributed.is_main():
            say(text)

    settings = load_protocol(protocol, recipe, overrides)
    how = PROTOCOLS[protocol]
    loaded = load_backbone(backbone) if isinstance(backbone, str) else backbone
    if size is not None or resize is not None:
        settings = _at_size(settings, size, resize)
        loaded = dataclasses.replace(loaded, size=size or loaded.size, resize=resize)
    where = choose_device(device)
    distributed.start(where.type)
    if getattr(settings, "test_size", None) not in (None, loaded.size):
        note(
            f"The images are {settings.test_size} pixels wide here, as the recipe says; {loaded.description} was made "
            f"for {loaded.size}. Set size={loaded.size} to measure it at its own size."
        )
    conditions: dict[str, Any] = {
        "device": str(where),
        "workers": choose_workers(workers),
        "batch_size": batch_size,
        "say": note,
        "cache": cache_root(None) / "features" if cache else None,
    }
    request = Request(data, train_split, test_data, test_split, limit, workers)
    opened = how.open(request, settings, conditions)
    started = datetime.now(UTC)
    result: dict[str, Any] = {
        "format": 1,
        "protocol": protocol,
        "recipe": recipe,
        "settings": plain(settings),
        "backbone": about_backbone(loaded),
        "data": opened.about(),
    }
    place = out if out is not None else (loaded.folder or Path()) / "evaluate"
    progress = folder_of(place) / f"{file_name(result).removesuffix('.json')}.progress"
    path = place if place.suffix == ".json" else place / file_name(result)
    with place_of_progress(progress):
        values = how.measure(loaded.to(where), dataclasses.replace(opened, progress=progress), settings)
        result |= {
            "values": values,
            "unit": how.unit,
            "limit": limit,
            "notes": notes,
            "machine": about_machine(str(where)),
            "versions": versions(),
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - began, 2),
        }
        if distributed.is_main():
            write_result(result, path)
            shutil.rmtree(progress, ignore_errors=True)  # nobody will go on from here
        distributed.wait_for_all()
    return {**result, "file": str(path)}


def _at_size(settings: Any, size: int | None, resize: int | None) -> Any:
    """The settings with the sizes that were asked for in place of the recipe's, where it has any."""
    for name, number in (("size", size), ("resize", resize)):
        if number is not None and number < 1:
            raise UserError(f"{name} is {number}; it is a number of pixels, at least 1.")
    own = getattr(settings, "test_size", None)
    if own is not None and resize is not None and resize < (size or own):
        raise UserError(
            f"resize is {resize}, smaller than the images' size {size or own}. Make it {size or own} or more."
        )
    if size is not None and hasattr(settings, "at_size"):
        return settings.at_size(size, resize)
    changes: dict[str, Any] = {}
    if size is not None and getattr(settings, "augment", None) is not None:
        changes["augment"] = dataclasses.replace(settings.augment, size=size)
    if own is not None:
        if size is not None and resize is None and settings.test_resize is not None:  # in the same proportion
            resize = round(settings.test_resize * size / own)
        changes |= {"test_size": size or own, "test_resize": resize}
    return dataclasses.replace(settings, **changes) if changes else settings
