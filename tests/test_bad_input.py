# SPDX-License-Identifier: Apache-2.0
"""Whatever a person gives, the answer is one clear message or a finished run, and nothing of theirs is lost."""

from __future__ import annotations

import json
import math
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile import bytes_of, on_digits, own, photos
from PIL import Image
from tiny_recipes import tiny

from kinfold.embeddings import embed
from kinfold.errors import UserError
from kinfold.evaluate import evaluate
from kinfold.log import read_metrics
from kinfold.pretrain import pretrain
from kinfold.reading import to_yaml
from kinfold.recipe import load


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINFOLD_CACHE", str(tmp_path / "cache"))


# Folders that hold nothing to learn from.


def test_an_empty_folder_is_said_to_be_empty_and_leaves_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match=r"photos is empty\. Expected images"):
        own(tmp_path / "photos", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_other_files_is_told_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"holds no image; found 1 file: \.txt \(1\)"):
        own(tmp_path / "photos", tmp_path / "run")
    assert bytes_of(tmp_path / "photos") == {"notes.txt": b"x"}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_of_broken_images_ends_with_their_names_and_reasons(tmp_path: Path, workers: int) -> None:
    (tmp_path / "photos").mkdir()
    for i in range(9):
        (tmp_path / "photos" / f"{i}.jpg").write_bytes(b"\xff\xd8\xff and no more")
    with pytest.raises(UserError, match=r"(?s)No readable image: 9 of the 9 .*photos.*0\.jpg: it is damaged"):
        own(tmp_path / "photos", tmp_path / "run", f"workers={workers}")


def test_a_folder_that_is_not_there_is_answered_with_a_near_one(tmp_path: Path) -> None:
    photos(tmp_path / "photos", 1)
    with pytest.raises(UserError, match=r"does not exist\. Did you mean .*photos\?"):
        own(tmp_path / "photo", tmp_path / "run")


# Folders that hold something.


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_files_among_good_ones_are_counted_named_and_replaced(
    tmp_path: Path, workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    for number, kind in enumerate(("cats", "dogs")):
        photos(tmp_path / "photos" / kind, 10, seed=number)
    bad = {"cats/empty.jpg": b"", "cats/text.png": b"hello", "dogs/cut.jpg": b"\xff\xd8\xff"}
    for name, content in bad.items():
        (tmp_path / "photos" / name).write_bytes(content)
    done = own(tmp_path / "photos", tmp_path / "run", f"workers={workers}", "log_every=1")
    names = {str(tmp_path / "photos" / name) for name in bad}
    assert done.step == done.steps == 4
    assert set(done.bad) == names
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["unreadable"]["count"] == 3
    assert set(summary["unreadable"]["files"]) == names
    assert [line["unreadable"] for line in read_metrics(tmp_path / "run") if "loss" in line][-1] == 3
    warned = capfd.readouterr().err
    assert all(f"{name} could not be read" in warned for name in names)
    assert 0 <= done.measures["knn"] <= 100
    assert done.measures["dimensions"] == 20  # images that the probe could read


def test_an_image_of_one_pixel_trains_among_others(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", 15)
    Image.new("RGB", (1, 1), (200, 10, 10)).save(folder / "dot.png")
    done = own(folder, tmp_path / "run")
    assert (done.step, done.bad) == (4, {})


def test_images_of_every_kind_in_nested_folders_train_together(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (18, 25, 4), dtype=np.uint8)
    colour = Image.fromarray(pixels[..., :3])
    kinds = {
        "a/grey.png": colour.convert("L"),
        "a/b/palette.gif": colour.convert("P"),
        "a/b/transparent.png": Image.fromarray(pixels),
        "c/print.jpg": colour.convert("CMYK"),
        "c/d/deep.png": Image.fromarray(pixels[..., 0].astype(np.uint16) * 257),
        "ink.png": colour.convert("1"),
        "page.tiff": colour,
        "web.webp": colour,
    }
    for name, image in kinds.items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    done = own(tmp_path / "photos", tmp_path / "run")
    assert (done.step, done.bad) == (2, {})


def test_fewer_images_than_a_batch_name_a_batch_that_works_and_the_same_folder_takes_it(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", 5)
    with pytest.raises(UserError, match=r"only 5 images in .* Lower batch_size to 5 or less, .* batch_size=4"):
        own(folder, tmp_path / "run")
    done = own(folder, tmp_path / "run", "batch_size=4", "batch_norm.key_splits=2")
    assert done.step == 2


def test_a_single_image_is_no_set(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", 1)
    with pytest.raises(UserError, match=r"only 1 image in .* Add images"):
        own(folder, tmp_path / "run")
    with pytest.raises(UserError, match="batch norm needs at least 2"):
        own(folder, tmp_path / "run", "batch_size=1", "batch_norm.key_splits=1")


def test_a_last_batch_of_one_image_is_left_out_because_batch_norm_cannot_use_it(tmp_path: Path) -> None:
    done = pretrain(tiny("invp", epochs=1), on_digits(tmp_path / "run", limit=65), quiet=True)
    assert done.step == 2


def test_parts_of_a_last_batch_hold_two_images_or_more(tmp_path: Path) -> None:
    done = pretrain(tiny("invp", epochs=1, accumulate=4), on_digits(tmp_path / "run", limit=69), quiet=True)
    assert done.step == 3


def test_numbers_that_json_has_not_are_words_in_the_summary(tmp_path: Path) -> None:
    own(photos(tmp_path / "photos", 2), tmp_path / "run", "batch_size=2", "batch_norm.key_splits=1")

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    summary = json.loads((tmp_path / "run" / "summary.json").read_text(), parse_constant=refuse)
    assert float(summary["probe"]["alpha_req"]) == math.inf, "two images have no spectrum to fit"


# Recipes and settings.

DIGITS = to_yaml(tiny("moco"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DIGITS.replace("epochs: 2", "epocs: 2", 1), "unknown setting. Did you mean"),
        (DIGITS.replace("batch_size: 32", "batch_size: many"), 'batch_size: .*valid integer, but got "many"'),
        (DIGITS.replace("batch_size: 32", "batch_size: true"), "batch_size: .*valid integer, but got true"),
        (DIGITS + "seed: 4\n", r"line \d+: the key 'seed' stands twice"),
        (DIGITS.replace("name: moco", "name: mocco"), "method.name: 'mocco' is none; there are co2, invp, moco"),
        (DIGITS.replace("base: 0.1", "base: .nan"), "learning_rate.base: .*valid number"),
        (DIGITS.replace("base: 0.1", "base: 1e999"), "learning_rate.base: .*finite number"),
        ("method: [1, 2", "not valid YAML"),
        ("", "a recipe is a mapping .* holds nothing"),
        ("- 1\n- 2\n", "a recipe is a mapping .* holds a list"),
        ("moco", "a recipe is a mapping .* holds a single value"),
        ("{[1]: 2}", "a key is a word"),
        ("method: !!set {a, b}", "not valid YAML"),
        ("method: !!python/object/apply:os.getpid []", "not valid YAML"),
        ("a: " + "[" * 5000, "no setting"),
        (b"\x89PNG\r\n\x1a\n\x00\xff", "no text in UTF-8"),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_place_that_is_wrong(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=f"(?s)mine.yaml.*{message}"):
        load(str(path), run={"data": "digits", "out": "run"})


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("epocs=3", "Did you mean epochs"),
        ("method.temprature=3", "method.temprature: unknown setting. Did you mean temperature"),
        ("views.augment.7.size=3", "a number from 0 to 1"),
        ("views.augment.²=3", "a number from 0 to 1"),
        ("epochs.x=3", "epochs is a single value"),
        ("epochs", "Write key=value"),
        ("epochs=0", "epochs: .*greater than or equal to 1"),
        ("epochs=1.5", "epochs: .*valid integer"),
        ("batch_size=0", "batch_size: .*greater than or equal to 1"),
        ("workers=-1", "workers: .*greater than or equal to 0"),
        ("limit=0", "limit: .*greater than or equal to 1"),
        ("method.temperature=nan", "method.temperature: .*valid number"),
        ("method.temperature=1e400", "method.temperature: .*finite number"),
        ("device=", "device: .*valid string"),
    ],
)
def test_a_wrong_word_is_refused_with_its_name(word: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load("digits", [word], run={"data": "digits", "out": "run"})


@pytest.mark.parametrize(
    ("name", "message"),
    [("digit", "Did you mean digits"), ("no/such.yaml", "no such file"), ("x" * 5000, "no such file")],
)
def test_a_recipe_that_is_not_there_is_answered_with_near_ones(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(name)


def test_a_name_that_is_no_text_is_told_to_be_renamed() -> None:
    with pytest.raises(UserError, match=r"no UTF-8 text.*rename"):
        load("digits", run={"data": "photos\udcff", "out": "run"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "nonsense"}, "device: 'nonsense' is none"),
        ({"device": "meta"}, "device: 'meta' is not supported"),
        ({"weights": "/no/such.pth"}, "weights: there is no file"),
        ({"wandb": "project"}, r"not installed .*kinfold\[wandb\]"),
    ],
)
def test_a_run_that_cannot_start_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # whether it is installed here or not
    with pytest.raises(UserError, match=message):
        pretrain(tiny("moco"), on_digits(tmp_path / "run", **changes), quiet=True)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_cuda_without_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device: cuda was asked for, but torch sees no CUDA device"):
        pretrain(tiny("moco"), on_digits(tmp_path / "run", device="cuda"), quiet=True)


def test_a_limit_above_the_set_takes_all_of_it(tmp_path: Path) -> None:
    done = own(photos(tmp_path / "photos", 8), tmp_path / "run", "limit=1000", "epochs=1")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["images"] == 8
    assert done.step == 1


def test_views_that_patches_do_not_fill_are_refused_with_a_size_that_works(tmp_path: Path) -> None:
    words = ("backbone.name=vit_tiny_patch16_224", "views.augment.*.size=40", "batch_norm.key_splits=1")
    with pytest.raises(UserError, match=r"views\.augment\.0\.size: .*patches of 16 pixels.*for example 32"):
        own(photos(tmp_path / "photos", 8), tmp_path / "run", *words)


class _Code:
    """A pickle of this would run a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran-code",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_Code(), "would run code.*refused"),
        ([1, 2], "no tensors by name, but a list"),
        ({"conv1.weight": torch.zeros(3)}, "does not fit the backbone: missing .*of another shape conv1.weight"),
        (None, "is empty"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_no_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    if isinstance(content, _Code):
        path.write_bytes(pickle.dumps(content, protocol=2))
    elif content is None:
        path.touch()
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=f"(?s){message}"):
        pretrain(tiny("moco"), on_digits(tmp_path / "run", weights=str(path)), quiet=True)
    assert not (tmp_path / "ran-code").exists()


# Labels that a protocol needs.


def test_protocols_that_compare_labels_say_where_labels_come_from(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", 8)
    own(folder, tmp_path / "run", "epochs=1")
    for protocol in ("knn", "linear"):
        with pytest.raises(UserError, match=r"There are no labels.*folder of its own"):
            evaluate(protocol, str(tmp_path / "run"), str(folder), workers=0, say=lambda text: None)
    assert embed(str(tmp_path / "run"), str(folder), tmp_path / "e.parquet", workers=0).images == 8


def test_a_probe_without_labels_or_with_other_classes_is_refused_before_the_first_step(tmp_path: Path) -> None:
    for number, kind in enumerate(("cats", "dogs")):
        photos(tmp_path / "photos" / kind, 4, seed=number)
        photos(tmp_path / "others" / kind.upper(), 4, seed=number)
    plain = photos(tmp_path / "plain", 4)
    with pytest.raises(UserError, match="probe_data has none"):
        own(tmp_path / "photos", tmp_path / "run", f"probe_data={plain}")
    with pytest.raises(UserError, match=r"probe_data: .*classes.*CATS, DOGS"):
        own(tmp_path / "photos", tmp_path / "run", f"probe_data={tmp_path / 'others'}")
    assert not (tmp_path / "run").exists()
    done = own(tmp_path / "photos", tmp_path / "run", f"probe_data={tmp_path / 'photos'}", "epochs=1")
    assert done.measures["knn"] < 100, "the images asked are those that answer, and none may find itself"


def test_a_probe_of_one_image_measures_what_one_image_can_tell(tmp_path: Path) -> None:
    done = pretrain(tiny("moco", epochs=1), on_digits(tmp_path / "run", probe_every=1, probe_limit=1), quiet=True)
    assert "rankme" in done.measures
