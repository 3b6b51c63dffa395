# SPDX-License-Identifier: Apache-2.0
"""The documentation holds: commands parse, settings exist, code compiles, links lead on, figures cite files."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer

from kinfold.cli import app
from kinfold.data.sources import open_source
from kinfold.errors import UserError
from kinfold.evaluate import PROTOCOLS, load_protocol
from kinfold.memory import Queue
from kinfold.methods import MoCo
from kinfold.recipe import find_recipe, load

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
NOT_YET = "not measured yet"

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language on a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def code_words(page: Path) -> list[str]:
    """What stands between backticks in the text and the tables of a page."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def commands(page: Path) -> Iterator[list[str]]:
    """The words behind `kinfold` of every command on a page, in blocks and in the text."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += [word for word in code_words(page) if re.search(r"(^| )kinfold [a-z-]", word)]
    for line in lines:
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            if "-m" in words and words[words.index("-m") + 1] == "kinfold":
                yield words[words.index("-m") + 2 :]
            elif "kinfold" in words and (words.index("kinfold") == 0 or "run" in words):
                yield words[words.index("kinfold") + 1 :]


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """The command that the words name, and its parameters; nothing is run. Raises where the words are refused."""
    command: Any = typer.main.get_command(app)
    context: Any = None
    names: list[str] = []
    while True:
        context = command.make_context(names[-1] if names else "kinfold", words, parent=context)
        if not hasattr(command, "resolve_command"):
            return " ".join(names), context.params
        words = [*getattr(context, "_protected_args", []), *context.args]
        if not words:
            return " ".join(names), context.params
        name, command, words = command.resolve_command(context, words)
        names.append(name)


def check(words: list[str]) -> None:
    """Parse a command, and read the recipes and settings that it names."""
    if len(words) == 1 and words[0] in {"pretrain", "evaluate", "embed", "export"}:
        return  # the name of a command in a sentence
    words = [word for word in words if word != "--help"]  # it would print, and end the check
    name, given = parsed(words)
    settings = list(given.get("settings") or [])
    if name == "pretrain":
        default = "digits" if given["data"] == "digits" else "own-images"
        recipe = given["recipe"] or default
        load("own-images" if recipe == "NAME" else recipe, settings, run={"data": given["data"], "out": "out"})
    elif name.startswith("evaluate ") and name != "evaluate report":
        load_protocol(name.removeprefix("evaluate "), given["recipe"], settings)
    elif name == "recipes show":
        find_recipe("own-images" if given["name"] == "NAME" else given["name"])


@each_page
def test_every_command_parses_and_its_recipes_and_settings_exist(page: Path) -> None:
    for words in commands(page):
        if words and words[0] != "--help":
            check(words)


def test_the_check_of_commands_refuses_what_is_wrong() -> None:
    assert sum(len(list(commands(page))) for page in PAGES) > 20
    assert ["demo"] in list(commands(ROOT / "README.md"))
    with pytest.raises(UserError, match="epochs"):
        check(["pretrain", "photos/", "epoch=3"])
    with pytest.raises(UserError, match="no recipe"):
        check(["pretrain", "photos/", "--recipe", "sce/cifar11"])
    with pytest.raises(UserError, match="neighbours"):
        check(["evaluate", "knn", "--backbone", "b", "--data", "d", "neighbors=[3]"])
    with pytest.raises(UserError, match="share"):
        check(["evaluate", "semi-supervised", "share=0.1", "list=1percent.txt"])
    for wrong in (
        ["pretrain", "--quiet"],
        ["pretrian", "photos/"],
        ["evaluate", "knnn", "--backbone", "b", "--data", "d"],
        ["evaluate", "report", "runs", "--publish"],
        ["embed", "run", "photos/", "--output", "x.parquet"],
    ):
        with pytest.raises(Exception) as refused:
            check(wrong)
        assert getattr(refused.value, "exit_code", None) == 2


@each_page
def test_every_setting_in_the_text_exists(page: Path) -> None:
    for word in code_words(page):
        for setting in re.findall(r"(?:^|(?<=\s))\"?([a-z_]+(?:\.[a-z_0-9*]+)*=(?:\{[^}]*\}|[^\s\"=]+))", word):
            if word.startswith(("python ", "kinfold ", "PYTHON", "torchrun ", "DistributedDataParallel")):
                continue
            value = setting.split("=")[1]
            if value.isupper():  # a place for something of the reader's
                setting = setting.replace(value, "x")
            assert accepted(setting), f"{page.name}: {word!r}"


def accepted(setting: str) -> bool:
    """Whether a recipe, a run or a protocol takes a setting."""
    if setting in {"key=value", "out=", "data="}:
        return True
    # Some settings need company: statistics one a channel, one choice of labels, the right end for milestones.
    company = {
        "images.channels": ["images.mean=[0.45]", "images.std=[0.2]"],
        "images.mean": ["images.channels=1", "images.std=[0.2]"],
        "images.std": ["images.channels=1", "images.mean=[0.4]"],
        "share": ["list=names.txt"] if setting == "share=null" else [],
        "list": ["share=null"],
        "iterations": ["milestones=[1]"],
        "pad_crop": ["augment={like: weak, size: 32, scale: [1.0, 1.0], ratio: [1.0, 1.0]}"],
    }.get(setting.split("=")[0], [])
    for recipe in ("own-images", "invp/cifar10"):
        try:
            load(recipe, [*company, setting], run={"data": "-", "out": "-"})
            return True
        except UserError:
            pass
    for protocol in PROTOCOLS:
        try:
            load_protocol(protocol, "default", [*company, setting])
            return True
        except UserError:
            pass
    return False


@each_page
def test_every_recipe_in_the_text_exists(page: Path) -> None:
    for word in code_words(page):
        if re.fullmatch(rf"(moco|ressl|sce|co2|invp|evaluate/({'|'.join(PROTOCOLS)}))/[\w-]*\w", word):
            find_recipe(word)


@each_page
def test_every_file_named_in_the_text_exists(page: Path) -> None:
    to_be_made = {"kinfold/methods/smooth.py", "kinfold/recipes/smooth/"}
    for word in code_words(page):
        if re.fullmatch(r"(kinfold|tests|docs|examples|benchmarks)/[\w./-]*", word) and word not in to_be_made:
            assert (ROOT / word).exists(), f"{page.name}: {word}"


@each_page
def test_every_python_block_compiles_and_its_names_exist(page: Path) -> None:
    for block in blocks(page, "python"):
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kinfold"):
                module = importlib.import_module(node.module or "")
                for name in node.names:
                    assert hasattr(module, name.name), f"{page.name}: {node.module} has no {name.name}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "kinfold":
                assert hasattr(importlib.import_module("kinfold"), node.attr), f"{page.name}: kinfold.{node.attr}"


def test_the_blocks_about_a_loop_of_your_own_run_and_train() -> None:
    space: dict[str, Any] = {}
    for block in blocks(ROOT / "docs" / "your-own-loop.md", "python"):
        exec(compile(block, "your-own-loop.md", "exec"), space)
        if "backbone" in space and "parts" not in space:
            space["parts"] = (space["learner"], space["optimizer"])
    learner, optimizer = space["parts"]
    before = [value.detach().clone() for value in learner.encoder.parameters()]
    space["step"](learner, optimizer, [torch.randn(4, 3, 9, 9) for _ in range(2)], torch.arange(4), 0)
    assert any(bool((a != b).any()) for a, b in zip(before, learner.encoder.parameters()))
    assert int(learner.memory.next) == 4
    assert torch.isfinite(space["loss"])


def test_the_method_in_the_guide_works_and_becomes_moco_at_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "smooth_of_the_guide.py").write_text(blocks(ROOT / "docs" / "new-method.md", "python")[0])
    monkeypatch.syspath_prepend(tmp_path)
    smooth = importlib.import_module("smooth_of_the_guide").Smooth
    memory = Queue(9, 4).double()
    q, k = (torch.nn.functional.normalize(torch.randn(5, 4, dtype=torch.float64), dim=1) for _ in range(2))
    seen, _ = memory.compare(q.requires_grad_(), k, torch.arange(5))
    moco = MoCo(temperature=0.3).loss(seen, 0)["instance"]
    same = smooth(temperature=0.3, smoothing=0.0).loss(seen, 0)["smooth"]
    torch.testing.assert_close(same, moco)
    target = smooth(smoothing=0.5).target(seen)  # [5, 10]
    torch.testing.assert_close(target.sum(1), torch.ones(5, dtype=torch.float64))
    assert float(target[0, 1]) == pytest.approx(0.05)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, made as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@each_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(place), f"{page.name}: {target}"


@each_page
def test_every_test_named_in_the_text_exists(page: Path) -> None:
    for path, name in re.findall(r"(tests/\w+\.py)::(\w+)", page.read_text(encoding="utf-8")):
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{path}::{name}"


def test_every_room_of_the_package_stands_in_the_design() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    rooms = [p.name for p in (ROOT / "kinfold").iterdir() if not p.name.startswith("__")]
    for room in rooms:
        assert f"`kinfold/{room}{'' if '.' in room else '/'}`" in text, room


def test_each_of_the_seven_promises_names_its_tests() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").partition("## Seven promises")[2]
    rows = re.findall(r"^\| ([1-7]) \|(.+)\|$", text, re.M)
    assert [number for number, _ in rows] == list("1234567")
    assert all("::test_" in row for _, row in rows)


def script(name: str) -> ModuleType:
    """One of the scripts under benchmarks, as it is found by its neighbours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module(name)


def tables() -> ModuleType:
    """The script that makes the README's tables."""
    return script("tables")


def test_the_figures_in_the_readme_are_those_of_the_result_files() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tables().rewritten(text) == text, "run python benchmarks/tables.py"


def test_every_row_of_figures_cites_a_result_file_or_says_that_there_is_none() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    between = text.partition(tables().BEGIN)[2].partition(tables().END)[0]
    rows = [row for row in re.findall(r"^\|(.+)\|$", between, re.M) if "---" not in row and "| file" not in row]
    assert len(rows) >= 11  # the demo, five methods and the digits, the loop, the listing, two recipes
    for row in rows:
        cited = re.findall(r"\(benchmarks/results/([\w-]+\.json)\)", row)
        assert (NOT_YET in row) != bool(cited), row
        for name in cited:
            result = json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))
            assert {"machine", "versions", "commit", "when"} <= result.keys()


def test_a_result_file_becomes_a_row_with_mean_and_deviation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tables()
    monkeypatch.setattr(script("result_files"), "RESULTS", tmp_path)
    assert all(NOT_YET in row for row in made.learning()[4:])
    runs = [
        {"seed": seed, "knn_untrained": 30.0, "knn_trained": 30.0 + gain, "gain": gain, "seconds": 100.0}
        for seed, gain in enumerate([9.0, 10.0, 11.0])
    ]
    about = {"machine": {"processor": "A", "cores": 2, "threads": 1, "gpu": None}}
    (tmp_path / "learning-sce.json").write_text(json.dumps({"runs": runs, **about}))
    row = next(row for row in made.learning() if row.startswith("| SCE"))
    assert "| 40.0 ± 1.0 | +10.0 ± 1.0 | 0, 1, 2 | 100 s | [learning-sce.json]" in row
    loops = {
        which: {"images_per_second": speed, "peak_memory_mb": 700.0} for which, speed in (("kinfold", 27), ("bare", 30))
    }
    overhead = {
        "medians": loops,
        "speed_share": 0.9,
        "pairs": [1, 2, 3],
        "bare": "b",
        "backbone": "r",
        "batch_size": 32,
    }
    (tmp_path / "loop-overhead.json").write_text(json.dumps({**overhead, **about}))
    assert "90 % of the bare loop" in made.overhead()[0]
    assert "| 27.0 | 700 MB |" in made.overhead()[4]
    assert "No accelerator was at hand" in made.gpu()[0]
    assert all(NOT_YET in row for row in made.evaluation()[4:])
    protocol = {"value": "mIoU", "percent": 12.34, "chance_percent": 3.5, "asked_percent": 4.2, "seconds": 99.7}
    protocol["backbone"] = "resnet10_w32"
    (tmp_path / "evaluation-patches.json").write_text(json.dumps({**protocol, **about}))
    assert "Measured on: A, 1 of 2 cores. Backbone: resnet10_w32." in made.evaluation()[0]
    assert "| `mIoU` | 12.3 | 4.2 | 3.5 | 100 s | [evaluation-patches.json]" in made.evaluation()[-1]
    assert sum(NOT_YET in row for row in made.evaluation()) == len(made.EVALUATION) - 1
    assert NOT_YET in made.features_memory()[-1]
    parts = {part: {"mb_own_at_most": 41.6, "seconds": 7.2} for part in script("tables_of_cost").PARTS}
    memory = {"images": 1281167, "features": 2048, "mb_of_the_features_on_disk": 10495.3, "mb_of_a_batch": 2.1}
    (tmp_path / "features-memory.json").write_text(json.dumps({**memory, "parts": parts, **about}))
    assert "1,281,167 synthetic images, 2,048 features each: 10.5 GB on the disk" in made.features_memory()[0]
    assert "| k-NN on them | 42 MB | 7 s | [features-memory.json]" in made.features_memory()[-1]
    assert NOT_YET in made.demo()[-1]
    (tmp_path / "demo.json").write_text(
        json.dumps({"seconds": 61.4, "knn_untrained": 90.04, "knn_trained": 95.0, **about})
    )
    assert made.demo()[-1] == "| 61 s | 90.0 | 95.0 | [demo.json](benchmarks/results/demo.json) |"


def test_a_result_file_carries_no_folder_of_the_machine_that_made_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    measured = importlib.import_module("measured")
    data = tmp_path / "photos"
    for number in range(3):
        place = data / "train" / f"class {number}"
        place.mkdir(parents=True)
        (place / "1.png").write_bytes(b"an image, by its name")
    source = open_source(str(data), limit=2, cache=tmp_path / "cache")
    assert str(data) in source.description
    assert measured.without_folder(source.description, f"{data}/") == "2 of 3 images, split train (3 classes)"
    monkeypatch.setattr("sys.argv", ["benchmarks/learning.py", "sce", "--data", f"{data}/"])
    assert measured.circumstances()["command"] == "python benchmarks/learning.py sce --data photos"


def test_the_tables_of_recipes_claim_no_reproduction_without_a_file() -> None:
    for page in PAGES:
        rows = [
            line.strip("|").split("|") for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")
        ]
        column = None
        for cells in rows:
            words = [cell.strip() for cell in cells]
            if "reproduced" in words or "measured" in words:
                column = next(i for i, word in enumerate(words) if word in ("reproduced", "measured"))
            elif column is not None and len(words) > column and not set(words[column]) <= set("-: "):
                cell = words[column]
                assert NOT_YET in cell or re.search(r"benchmarks/results/[\w-]+\.json", cell), f"{page.name}: {cell}"
            if set("".join(words)) <= set("-: "):
                continue
            if len(words) <= (column or 0):
                column = None


def test_the_table_of_protocols_has_every_trial_of_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location("benchmark_of_evaluation", ROOT / "benchmarks" / "evaluation.py")
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, benchmark)  # dataclasses look there for annotations
    spec.loader.exec_module(benchmark)
    listed = {f"evaluation-{name}": data for name, (_, data) in tables().EVALUATION.items()}
    assert {trial.file: trial.data for trial in benchmark.TRIALS} == listed
    for trial in benchmark.TRIALS:
        check(["evaluate", trial.protocol, *trial.words])


def test_every_protocol_has_a_command_and_its_values_on_the_pages() -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert all(f"\nkinfold evaluate {name} " in text and f"\n| `{name}` |" in text for name in PROTOCOLS)


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda file: file.stem)
def test_a_committed_result_names_no_folder_of_the_machine_that_made_it(file: Path) -> None:
    assert not re.search(r"/(tmp|home|root|Users|var|mnt|work)/", file.read_text(encoding="utf-8"))


def test_a_protocol_that_was_measured_reached_its_margin() -> None:
    for file in (ROOT / "benchmarks" / "results").glob("evaluation-*.json"):
        found = json.loads(file.read_text(encoding="utf-8"))
        assert found["percent"] >= found["asked_percent"] > found["chance_percent"], file.name
