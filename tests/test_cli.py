# SPDX-License-Identifier: Apache-2.0
"""The command: what it prints, where its files are, and how it ends when something is wrong."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from hostile import bytes_of
from PIL import Image
from tiny_recipes import tiny

from kinfold.cli import default_folder, main
from kinfold.errors import UserError
from kinfold.export import rebuild_backbone
from kinfold.reading import plain, to_yaml
from kinfold.recipe import load, recipe_names


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


def command(*words: object, capture: pytest.CaptureFixture[str]) -> Ended:
    """Run the command in this process."""
    capture.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["kinfold", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    out, err = capture.readouterr()
    return Ended(code, out, err)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the command on 96 digits."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.yaml").write_text(to_yaml(tiny("sce", epochs=1)))
    words = ["pretrain", "digits", "-r", folder / "tiny.yaml", "-o", folder / "run", "-q"]
    with pytest.MonkeyPatch.context() as patch:
        settings = ["limit=96", "device=cpu", "workers=0", "probe_limit=64"]
        patch.setattr(sys, "argv", ["kinfold", *map(str, words), *settings])
        with pytest.raises(SystemExit) as ended:
            main()
    assert not ended.value.code
    return folder / "run"


def test_help_is_answered_without_importing_what_is_slow() -> None:
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "kinfold", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0
    for word in ("pretrain", "evaluate", "embed", "export", "pack", "recipes", "demo"):
        assert word in ended.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in ended.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & {"torch", "torchvision", "timm", "numpy", "datasets", "sklearn", "pydantic", "PIL"}


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    from kinfold import __version__

    assert command("--version", capture=capsys).out == f"kinfold {__version__}\n"


def test_packing_says_what_it_made_and_what_to_run_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (60, 40), "teal").save(folder / f"{name}.jpg")
    (folder / "c.jpg").write_bytes(b"no image")
    ended = command(
        "pack", folder, tmp_path / "out", "--short-side", 20, "--format", "webdataset", "--workers", 0, capture=capsys
    )
    assert ended.code == 0
    first, second, third = ended.out.splitlines()
    assert first.startswith(f"2 images are in {tmp_path / 'out'}, 1 file: 0.0 MB before, 0.0 MB now. 0 kept")
    assert second == f"1 could not be read and were left out: {folder / 'c.jpg'}"
    assert third == f"Next: kinfold pretrain {tmp_path / 'out'}"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["pack.json", "train-00000-of-00001.tar"]


def test_ctrl_c_while_packing_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*words: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kinfold.data.pack.pack", interrupted)
    ended = command("pack", "digits", tmp_path / "out", capture=capsys)
    assert (ended.code, ended.out) == (130, "Stopped. The same command goes on from there.\n")


# Ends.


@pytest.mark.parametrize(
    "words",
    [
        ("pretrain", "no-such-folder"),
        ("pretrain", "digits", "epocs=3"),
        ("pretrain", "digits", "--recipe", "no/such"),
        ("pretrain", "digits", "device=nonsense"),
        ("evaluate", "knn", "--data", "digits"),
        ("evaluate", "knn", "--data", "digits", "--backbone", "no-such-run"),
        ("embed", "no-such-run", "digits"),
        ("embed", "no-such-run", "digits", "--limit", "0"),
        ("export", "no-such-run", "x.safetensors"),
        ("pack", "no-such-folder", "packed"),
        ("pack", "digits", "packed", "--quality", "0"),
        ("pack", "digits", "packed", "--format", "zip"),
        ("pack", "digits", "packed", "--workers", "-1"),
        ("pack", "digits", "packed", "--split", "dev"),
        ("recipes", "show", "digit"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = command(*words, capture=capsys)
    assert ended.code == 2
    assert ended.out == ""
    assert ended.err.startswith("error: ")
    assert ended.err.count("error: ") == 1
    assert "Traceback" not in ended.err
    assert bytes_of(tmp_path) == {}


@pytest.mark.parametrize(
    "words", [("--batch", "0"), ("--size", "-1"), ("--workers", "-1")], ids=lambda words: words[0].lstrip("-")
)
def test_an_option_of_evaluation_that_is_too_small_is_named(
    words: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    ended = command("evaluate", "knn", "--data", "digits", "--backbone", "x", *words, capture=capsys)
    assert ended.code == 2
    assert ended.err.startswith(f"error: {words[0]} is {words[1]}; it has to be at least ")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CPUAllocator: can't allocate memory: 39 GB")])
def test_memory_that_is_not_enough_is_one_message(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*words: object, **named: object) -> None:
        raise error

    monkeypatch.setattr("kinfold.evaluate.evaluate", full)
    ended = command("evaluate", "knn", "--data", "digits", "--backbone", "x", capture=capsys)
    assert ended.code == 2
    assert ended.err.startswith("error: The memory is not enough (")


@pytest.mark.parametrize(
    "words",
    [
        ("pretrain",),
        ("no-such-command",),
        ("evaluate", "knm", "--data", "digits", "--backbone", "x"),
        ("pretrain", "digits", "--no-such-option"),
    ],
)
def test_a_misuse_of_the_command_is_exit_code_2(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    ended = command(*words, capture=capsys)
    assert ended.code == 2
    assert "Usage" in ended.err


@pytest.mark.parametrize("place", [0, 2, 3])
def test_the_traceback_is_shown_where_it_is_asked_for(place: int, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pretrain", "digits", "epocs=3"]
    words.insert(place, "--traceback")
    with pytest.raises(UserError, match="epocs"):
        command(*words, capture=capsys)


def test_a_refusal_of_the_system_is_a_message_and_a_fault_of_the_program_is_not(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kinfold import export

    def full(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device", "x.safetensors")

    monkeypatch.setattr(export, "export_file", full)
    ended = command("export", run, "x.safetensors", capture=capsys)
    assert (ended.code, ended.err.startswith("error: x.safetensors: No space left on device.")) == (2, True)

    def broken(*arguments: object, **named: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(export, "export_file", broken)
    with pytest.raises(ZeroDivisionError):
        command("export", run, "x.safetensors", capture=capsys)


# Recipes.


def test_recipes_are_listed_each_with_its_first_line(capsys: pytest.CaptureFixture[str]) -> None:
    listed = command("recipes", capture=capsys)
    assert listed == command("recipes", "list", capture=capsys)
    lines = [line.split(None, 1) for line in listed.out.splitlines()]
    assert {name for name, _ in lines} >= set(recipe_names())
    assert all(len(about) > 10 for _, about in lines)


def test_a_recipe_is_shown_as_it_is_or_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = command("recipes", "show", "sce/cifar10", capture=capsys).out
    assert shown.startswith("#")
    complete = command("recipes", "show", "sce/cifar10", "--complete", capture=capsys).out
    (tmp_path / "as-it-is.yaml").write_text(shown)
    (tmp_path / "complete.yaml").write_text(complete)
    where = {"data": "x", "out": "y"}
    recipe, _ = load("sce/cifar10", run=where)
    assert load(str(tmp_path / "as-it-is.yaml"), run=where)[0] == recipe
    assert load(str(tmp_path / "complete.yaml"), run=where)[0] == recipe
    assert yaml.safe_load(complete) == plain(recipe)
    changed = command("recipes", "show", "sce/cifar10", "epochs=7", capture=capsys).out
    assert yaml.safe_load(changed)["epochs"] == 7


def faults(value: Any, schema: dict[str, Any], root: dict[str, Any], path: str = "") -> list[str]:
    """Where a value does not fit a JSON schema: the words of the standard that pydantic writes."""
    known = {"title", "description", "default", "discriminator", "$defs"}
    if "$ref" in schema:
        inner = root["$defs"][schema["$ref"].removeprefix("#/$defs/")]
        return faults(value, inner, root, path) + faults(
            value, {k: v for k, v in schema.items() if k != "$ref"}, root, path
        )
    found: list[str] = []
    for word, asked in sorted(schema.items(), key=lambda item: item[0] != "type"):  # other words depend on it
        if word in ("anyOf", "oneOf"):
            fitting = sum(not faults(value, option, root, path) for option in asked)
            ok = fitting >= 1 if word == "anyOf" else fitting == 1
        elif word == "type":
            kinds: dict[str, Any] = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
            number = isinstance(value, int | float) and not isinstance(value, bool)
            ok = number if asked == "number" else number and value == int(value) if asked == "integer" else False
            ok = ok or isinstance(value, kinds.get(asked, ()))
        elif word == "properties":
            found += [x for k, v in value.items() if k in asked for x in faults(v, asked[k], root, f"{path}.{k}")]
            ok = True
        elif word == "additionalProperties":
            assert asked is False
            ok = set(value) <= set(schema["properties"])
        elif word == "required":
            ok = set(asked) <= set(value)
        elif word in ("items", "prefixItems"):
            options = [asked] * len(value) if word == "items" else asked
            found += [x for i, (v, s) in enumerate(zip(value, options)) for x in faults(v, s, root, f"{path}.{i}")]
            ok = True
        elif word in ("const", "enum"):
            ok = value in (asked if word == "enum" else [asked])
        elif word in ("minItems", "maxItems"):
            ok = len(value) >= asked if word == "minItems" else len(value) <= asked
        elif word in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            signed = math.copysign(1, -1 if "ax" in word else 1)
            ok = value * signed > asked * signed or (value == asked and not word.startswith("ex"))
        else:
            assert word in known, f"the schema says {word!r}, which is not looked at here"
            continue
        if not ok:
            found.append(f"{path}: {word}")
            if word == "type":
                break
    return found


def test_the_schema_accepts_every_recipe_as_it_is_and_complete_and_refuses_wrong_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from kinfold.reading import read_yaml
    from kinfold.recipe import find_recipe

    schema = json.loads(command("recipes", "schema", capture=capsys).out)
    for name in recipe_names():
        values = read_yaml(find_recipe(name).read_text(encoding="utf-8"), source=name)
        assert faults(values, schema, schema) == [], f"{name} as it is"
    recipe, _ = load("sce/cifar10", run={"data": "x", "out": "y"})
    complete = json.loads(json.dumps(plain(recipe)))
    assert faults(complete, schema, schema) == []
    assert faults({**complete, "epocs": 3}, schema, schema) == [": additionalProperties"]
    assert faults({**complete, "epochs": "many"}, schema, schema) == [".epochs: type"]
    assert faults({**complete, "epochs": 0}, schema, schema) == [".epochs: minimum"]
    assert faults({**complete, "method": {"name": "scee"}}, schema, schema) == [".method: oneOf"]


# What a finished run is good for.


def test_a_pretraining_says_where_its_files_are_and_resumes_to_nothing_more_to_do(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, metrics = (run / "encoder.safetensors").read_bytes(), (run / "metrics.jsonl").read_text()
    words = ["limit=96", "device=cpu", "workers=0", "probe_limit=64"]
    ended = command("pretrain", "digits", "-r", run.parent / "tiny.yaml", "-o", run, *words, capture=capsys)
    assert ended.code == 0
    assert "Done: 3 steps" in ended.out
    for path in re.findall(r"^  \w+ +(\S+)$", ended.out, flags=re.MULTILINE):
        assert Path(path).is_file()
    assert "resuming from" in ended.err
    assert len(weights) == len((run / "encoder.safetensors").read_bytes())
    assert (run / "metrics.jsonl").read_text().startswith(metrics)


@pytest.mark.parametrize(("protocol", "words"), [("knn", ["neighbours=[5]"]), ("linear", ["epochs=1"])])
def test_an_evaluation_prints_its_numbers_and_leaves_the_run_as_it_was(
    run: Path, capsys: pytest.CaptureFixture[str], protocol: str, words: list[str]
) -> None:
    before = bytes_of(run)
    options = ["-b", run, "-d", "digits", "--device", "cpu", "--limit", "60"]
    ended = command("evaluate", protocol, *options, *words, capture=capsys)
    assert ended.code == 0, ended.err
    *numbers, last = ended.out.splitlines()
    result = json.loads(Path(last.removeprefix("written to ")).read_text())
    assert {line.split()[0] for line in numbers} == set(result["values"])
    assert all(0 <= float(line.split()[-1]) <= 100 for line in numbers)
    new = bytes_of(run).keys() - before.keys()
    assert {name: content for name, content in bytes_of(run).items() if name not in new} == before
    assert [Path(name).parent.name for name in new] == ["evaluate"]


def test_embeddings_are_a_table_with_a_row_an_image(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "e.parquet"
    ended = command("embed", run, "digits", "-o", out, "--limit", "40", "--device", "cpu", capture=capsys)
    assert (ended.code, "40 embeddings of 64 numbers" in ended.out) == (0, True)
    table = pq.read_table(out)
    assert table.num_rows == 40
    assert table.column_names == ["position", "path", "label", "embedding"]


def test_an_export_with_a_small_stem_says_why_timm_cannot_take_it_and_how_it_goes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "backbone.safetensors"
    refused = command("export", run, out, "--names", "timm", capture=capsys)
    assert refused.code == 2
    assert "the small stem" in refused.err
    assert not out.exists()
    assert command("export", run, out, "--names", "nobody", capture=capsys).code == 2
    done = command("export", run, out, "--names", "kinfold", capture=capsys)
    assert (done.code, out.with_suffix(".md").is_file()) == (0, True)
    assert rebuild_backbone(out)[1]["names"] == "kinfold"


def test_the_default_run_folder_has_the_names_of_recipe_and_data(tmp_path: Path) -> None:
    (tmp_path / "My photos.v2").mkdir()
    assert default_folder("own-images", str(tmp_path / "My photos.v2") + "/") == Path("runs/own-images-My photos")
    assert default_folder("sce/cifar10", "hf:uoft-cs/cifar10") == Path("runs/sce-cifar10-uoft-cs-cifar10")
    assert default_folder("digits", "x" * 5000).parent == Path("runs")
