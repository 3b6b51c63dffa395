# SPDX-License-Identifier: Apache-2.0
"""The report: what becomes one row, what never shares a column, and where published numbers may stand."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kinfold.encoders import Backbone, build_backbone
from kinfold.errors import UserError
from kinfold.evaluate import FrozenBackbone, evaluate, load_protocol
from kinfold.evaluate.report import Report, report
from kinfold.evaluate.report.answers import gather
from kinfold.evaluate.report.formats import FORMATS, terminal
from kinfold.evaluate.report.main_values import main_values
from kinfold.evaluate.report.plots import draw, low_shot, picture, semi_supervised, spaced
from kinfold.evaluate.report.published import FILE, LEGEND, MARKS, numbers, read_published
from kinfold.evaluate.report.tables import Table, tabulate
from kinfold.reading import plain
from kinfold.recipe import RECIPES

CIFAR10 = ("50,000 images of cifar10, train", 50000), ("10,000 images of cifar10, test", 10000)
CIFAR100 = ("50,000 images of cifar100, train", 50000), ("10,000 images of cifar100, test", 10000)
IMAGENET = ("1,281,167 images in imagenet/train", 1281167), ("50,000 images in imagenet/val", 50000)
VOC07 = ("5,011 images in VOC2007, trainval", 5011), ("4,952 images in VOC2007, test", 4952)
PHOTOS = ("300 images in photos/train", 300), ("90 images in photos/test", 90)
Pair = tuple[tuple[str, int], tuple[str, int]]


def images(part: tuple[str, int]) -> dict[str, Any]:
    return {"description": part[0], "images": part[1], "fingerprint": f"fingerprint of {part}"}


def result(
    protocol: str = "knn",
    recipe: str = "default",
    values: dict[str, Any] | None = None,
    *,
    settings: dict[str, Any] | None = None,
    data: Pair = PHOTOS,
    description: str = "timm's resnet18",
    weights: str = "a" * 64,
    size: int = 224,
    **more: Any,
) -> dict[str, Any]:
    """A result file's content."""
    return {
        "format": 1,
        "protocol": protocol,
        "recipe": recipe,
        "settings": settings if settings is not None else plain(load_protocol(protocol, recipe)),
        "backbone": {"description": description, "weights_sha256": weights, "size": size, "resize": None},
        "data": {"train": images(data[0]), "test": images(data[1])},
        "values": values if values is not None else {"top1/k=20,T=0.1": 50.0},
        "unit": "percent of the test images",
        "notes": [],
        "started": "2026-11-22T20:00:00+00:00",
        **more,
    }


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def make_run(folder: Path, *results: dict[str, Any], method: str = "sce", seed: int = 0, data: str = "photos") -> Path:
    """A run folder with results of its backbone."""
    folder.mkdir(parents=True)
    recipe = {"method": {"name": method}, "backbone": {"name": "resnet18"}, "epochs": 200, "seed": seed}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    write(folder / "summary.json", {"finished": True, "data": data})
    for number, one in enumerate(results):
        about = {
            "description": f"resnet18 of the run {folder.name} ({method})",
            "weights_sha256": f"{folder.name}-{seed}",
        }
        write(folder / "evaluate" / f"{number}.json", {**one, "backbone": {**one["backbone"], **about}})
    return folder


def quiet(*what: Path, **options: Any) -> Report:
    return report(list(what), say=lambda text: None, **options)


def table_of(*what: Path, recipes: Callable[[str, str], dict[str, Any] | None]) -> Table:
    """The table where `recipes` says what the recipes are."""
    return tabulate(gather(what), read_published(), say=lambda text: None, recipes=recipes)


def texts(table: Table) -> list[list[str]]:
    """The numbers of the rows, as they are written; published ones beneath."""
    lines = [*table.lines, *table.published]
    return [[line.cells[c].text if c in line.cells else "" for c in table.columns] for line in lines]


# ---------------------------------------------------------------------------------------------- what becomes one row


def test_a_tiny_table_is_exactly_this_markdown(tmp_path: Path) -> None:
    write(tmp_path / "a.json", result(values={"top1/k=20,T=0.1": 50.0, "top5/k=20,T=0.1": 80.0}))
    write(tmp_path / "b.json", result("linear", values={"last/lr=1": 61.0, "last": 61.0, "best": 62.125}))
    assert quiet(tmp_path).text("markdown") == (
        "<!-- kinfold evaluate report -->\n"
        "# Results\n"
        "\n"
        "| backbone | knn, default, A: top1/k=20,T=0.1 | linear, default, A: last | linear, default, A: best |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| timm's resnet18 | 50.00 | 61.00 | 62.12 |\n"
        "\n"
        "- A: train: 300 images in photos/train; test: 90 images in photos/test\n"
        "- knn: percent of the test images\n"
        "- linear: percent of the test images\n"
        "- best: chosen on the test images, as papers do\n"
    )


def test_runs_that_differ_in_the_seed_are_one_row_with_mean_and_deviation(tmp_path: Path) -> None:
    for seed, value in enumerate((60.0, 62.0, 67.0)):
        make_run(tmp_path / f"run{seed}", result(values={"top1/k=20,T=0.1": value}), seed=seed)
    made = quiet(tmp_path)
    assert [line.label for line in made.table.lines] == ["SCE, resnet18, 200 epochs (runs run0, run1, run2)"]
    (cell,) = made.table.lines[0].cells.values()
    assert cell.mean == pytest.approx(63.0, abs=1e-12)
    assert cell.std == pytest.approx((((-3.0) ** 2 + (-1.0) ** 2 + 4.0**2) / 2) ** 0.5, abs=1e-12)
    assert cell.text == "63.00 ± 3.61 (3)"
    assert "over n pretrainings" in made.text("markdown")


def test_runs_of_another_recipe_or_other_images_are_other_rows(tmp_path: Path) -> None:
    make_run(tmp_path / "a", result(), seed=0)
    make_run(tmp_path / "b", result(), seed=1, method="moco")
    make_run(tmp_path / "c", result(), seed=2, data="other photos")
    assert [line.label for line in quiet(tmp_path).table.lines] == [
        "SCE, resnet18, 200 epochs (run a)",
        "MoCo, resnet18, 200 epochs (run b)",
        "SCE, resnet18, 200 epochs (run c)",
    ]


def test_seeds_of_the_protocol_are_repetitions_and_marked_as_such(tmp_path: Path) -> None:
    for seed, value in enumerate((50.0, 54.0)):
        settings = {**plain(load_protocol("linear")), "seed": seed}
        write(tmp_path / f"{seed}.json", result("linear", values={"last": value}, settings=settings))
    made = quiet(tmp_path)
    assert texts(made.table) == [["52.00 ± 2.83 (2e)"]]
    assert "(ne)" in made.text("markdown")


def test_the_spread_over_pretrainings_is_that_of_the_means_over_their_evaluations(tmp_path: Path) -> None:
    for run, values in enumerate(([50.0, 52.0], [60.0, 64.0])):
        settings = [{**plain(load_protocol("linear")), "seed": seed} for seed in (0, 1)]
        both = [result("linear", values={"last": v}, settings=s) for v, s in zip(values, settings)]
        make_run(tmp_path / f"run{run}", *both, seed=run)
    (cell,) = quiet(tmp_path).table.lines[0].cells.values()
    assert (cell.mean, cell.count, cell.over) == (56.5, 2, "pretrainings")
    assert cell.std == pytest.approx(11.0 / 2**0.5, abs=1e-12)  # of 51 and 62


def test_a_result_elsewhere_joins_the_run_whose_weights_it_has(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", result())
    weights = json.loads((run / "evaluate" / "0.json").read_text())["backbone"]["weights_sha256"]
    other = write(tmp_path / "elsewhere" / "linear.json", result("linear", values={"last": 1.0}, weights=weights))
    assert [len(line.cells) for line in quiet(run, other).table.lines] == [2]


def test_a_result_of_another_backbone_in_a_run_folder_stands_by_itself(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", result())
    write(run / "evaluate" / "timm.json", result(values={"top1/k=20,T=0.1": 9.0}))
    write(run / "evaluate" / "b.json", result(description="resnet18 of the run other (sce)", weights="b" * 64))
    said: list[str] = []
    labels = [line.label for line in report([run], say=said.append).table.lines]
    assert labels == ["SCE, resnet18, 200 epochs (run run)", "resnet18 of the run other (sce)", "timm's resnet18"]
    assert len(said) == 1
    assert "is of the run 'other' but lies in 'run'" in said[0]


def test_a_run_that_is_not_finished_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", result())
    write(run / "summary.json", {"finished": False})
    assert quiet(run).table.lines[0].label == "SCE, resnet18, 200 epochs, unfinished (run run)"


def test_one_backbone_at_two_sizes_is_two_rows_that_say_the_size(tmp_path: Path) -> None:
    write(tmp_path / "a.json", result(size=224))
    write(tmp_path / "b.json", result(size=64, values={"top1/k=20,T=0.1": 30.0}))
    assert [line.label for line in quiet(tmp_path).table.lines] == [
        "timm's resnet18 at 224 px",
        "timm's resnet18 at 64 px",
    ]


# ---------------------------------------------------------------------------------------- what never shares a column


@pytest.mark.parametrize(
    "other",
    [
        {"recipe": "moco-notebook"},
        {"data": CIFAR10},
        {"limit": 90},
        {"settings": {**plain(load_protocol("knn")), "leave_one_out": True}},
    ],
    ids=["recipe", "images", "limit", "settings"],
)
def test_what_does_not_compare_has_columns_of_its_own(tmp_path: Path, other: dict[str, Any]) -> None:
    write(tmp_path / "a.json", result())
    write(tmp_path / "b.json", result(**other, weights="b" * 64))
    table = quiet(tmp_path).table
    assert sorted(texts(table)) == [["", "50.00"], ["50.00", ""]]
    assert len({column.heading for column in table.columns}) == 2  # and a reader sees which is which


def test_other_annotations_of_the_same_images_are_other_images(tmp_path: Path) -> None:
    for name in "ab":
        one = result("detection", "mine", {"AP": 50.0}, settings={}, weights=name * 64)
        one["data"]["test"]["annotations"] = name
        write(tmp_path / f"{name}.json", one)
    assert [column.images for column in quiet(tmp_path).table.columns] == ["A", "B"]


def test_settings_that_only_choose_which_numbers_there_are_share_a_column(tmp_path: Path) -> None:
    write(tmp_path / "a.json", result(values={"top1/k=20,T=0.1": 40.0}))
    fewer = {**plain(load_protocol("knn")), "neighbours": [20], "temperatures": [0.1]}
    write(tmp_path / "b.json", result(values={"top1/k=20,T=0.1": 41.0}, settings=fewer, weights="b" * 64))
    assert texts(quiet(tmp_path).table) == [["40.00"], ["41.00"]]


def test_the_best_of_other_lists_of_neighbours_is_another_number(tmp_path: Path) -> None:
    values = {"top1/k=20,T=0.1": 40.0, "top1/k=200,T=0.1": 41.0, "best": 41.0}
    write(tmp_path / "a.json", result(values=values))
    fewer = {**plain(load_protocol("knn")), "neighbours": [5, 200]}
    write(tmp_path / "b.json", result(values=values, settings=fewer, weights="b" * 64))
    assert texts(quiet(tmp_path).table) == [["41.00", "41.00", ""], ["41.00", "", "41.00"]]


def test_changed_settings_stand_in_the_heading(tmp_path: Path) -> None:
    settings = plain(load_protocol("linear", "sce-cifar10", ["epochs=2", "seed=7"]))
    write(tmp_path / "a.json", result("linear", "sce-cifar10", {"last": 1.0}, settings=settings, data=CIFAR10))
    assert quiet(tmp_path).table.columns[0].heading == ("linear", "sce-cifar10 (epochs=2)", "CIFAR-10", "last")


def test_a_subset_is_marked(tmp_path: Path) -> None:
    part = ("50 of 300 images in photos/train", 50), ("50 of 90 images in photos/test", 50)
    write(tmp_path / "a.json", result(data=part, limit=50))
    made = quiet(tmp_path)
    assert made.table.columns[0].heading[2] == "A, subset"
    assert "subset: fewer images" in made.text("latex")


def test_a_transferred_set_is_one_column_whatever_other_sets_were_measured(tmp_path: Path) -> None:
    sets = {name: {"train": images((f"train {name}", 10)), "test": images((f"test {name}", 5))} for name in "xyz"}
    for weights, chosen in (("a", "xy"), ("b", "yz")):
        values = dict.fromkeys(chosen, 50.0) | {"val/y": 1.0, "mean": 50.0}
        settings = {"sets": list(chosen), "decays": 45, "seed": 0}
        one = result("transfer", "mine", values, settings=settings, weights=weights * 64)
        write(tmp_path / f"{weights}.json", {**one, "data": {name: sets[name] for name in chosen}})
    table = quiet(tmp_path).table
    assert [column.metric for column in table.columns] == ["x", "y", "mean", "z", "mean"]
    assert texts(table) == [["50.00", "50.00", "50.00", "", ""], ["", "50.00", "", "50.00", "50.00"]]


@pytest.mark.parametrize(
    ("protocol", "names", "chosen"),
    [
        ("knn", ["top1/k=5,T=1", "top5/k=5,T=1", "best"], ["top1/k=5,T=1"]),
        ("knn", ["top1/k=20,T=0.1", "top1/k=200,T=0.1", "best"], ["top1/k=200,T=0.1", "best"]),
        ("linear", ["last/lr=1", "best/lr=1", "last", "best"], ["last", "best"]),
        (
            "voc-svm",
            ["mAP/full,C=0.5", "mAP/full", "AP/cat", "mAP/k=16,C=0.5", "mAP/k=16", "std/k=16", "mAP/k=2", "mAP11/k=2"],
            ["mAP/k=2", "mAP/k=16", "mAP/full"],
        ),
        ("transfer", ["mean", "food101", "val/food101", "AP/voc2007/cat"], ["food101", "mean"]),
        ("of another day", ["x/y", "score"], ["score"]),
        ("of another day", ["x/y", "x/z"], ["x/y", "x/z"]),
    ],
)
def test_main_values_are_chosen_by_protocol(protocol: str, names: list[str], chosen: list[str]) -> None:
    assert main_values(protocol, names) == chosen


# ------------------------------------------------------------------------------------------------ published numbers


def test_every_published_number_says_where_it_was_read() -> None:
    found = list(numbers(read_published()))
    assert len(found) > 150
    assert all(number.provenance in MARKS and number.source for number in found)
    assert set(MARKS) == set(LEGEND) == {"verified", "third-party", "recalled", "inferred"}


@pytest.mark.parametrize("lacking", ["provenance", "source"])
def test_a_published_number_without_provenance_or_source_is_refused(tmp_path: Path, lacking: str) -> None:
    table = yaml.safe_load(FILE.read_text(encoding="utf-8"))["tables"][0]
    del table[lacking]
    path = tmp_path / "published.yaml"
    path.write_text(yaml.safe_dump({"sets": {}, "tables": [{**table, "set": None}]}), encoding="utf-8")
    with pytest.raises(UserError, match=lacking):
        read_published(path)


@pytest.mark.parametrize(
    ("title", "label", "metric", "text"),
    [
        ("MoCo, ImageNet, linear", "MoCo v2, ResNet-50, 800 epochs", "best", "71.1"),
        ("MoCo, ImageNet, linear", "MoCo v1, ResNet-50, 200 epochs, mean of repeated runs", "best", "60.8 ± 0.2"),
        ("MoCo, VOC detection, Faster R-CNN C4", "supervised, ResNet-50", "AP75", "58.8 (5)"),
        ("SCE, ImageNet, linear", "SCE, ResNet-50, 200 epochs, multi-crop", "best", "75.4"),
        ("SCE, eleven sets, logistic regression", "NNCLR, ResNet-50", "caltech101", "91.3"),
        ("MoCo, VOC detection, Faster R-CNN C4", "MoCo v2, ResNet-50, 800 epochs", "AP75", "64.0 (5)"),
        ("SCE, VOC 2007, linear SVM", "SCE, ResNet-50, 200 epochs, multi-crop", "mAP/k=32", "83.05"),
        ("SCE, COCO, Mask R-CNN C4", "Truncated-Triplet, ResNet-50", "mask/AP", "36.2"),
        ("SCE, CIFAR-10, linear", "SCE, ResNet-18, 200 epochs", "best", "90.34‡"),
        ("SCE, CIFAR-10, linear", "MoCo v2, ResNet-18, 200 epochs", "best", "86.18†"),
        ("CO2, ImageNet, linear", "CO2 on MoCo v1, ResNet-50, 200 epochs", "best", "63.5§"),
        ("CO2, ImageNet, 1 % of the labels, against MoCo", "CO2, ResNet-50", "best/top5", "+3.8 over MoCo"),
        ("InvP, ImageNet, 1 % of the labels", "InvP, ResNet-50, MLP head", "best/top5", "78.2"),
        ("Mini-SSL, Tiny-ImageNet, k-NN", "SCE, ResNet-18, 200 epochs", "top1", "40.66†"),
    ],
)
def test_published_numbers_are_as_read(title: str, label: str, metric: str, text: str) -> None:
    found = [n.text for n in numbers(read_published()) if (n.table.title, n.label, n.metric) == (title, label, metric)]
    assert found == [text]


def test_the_mean_of_a_published_row_of_sets_is_that_of_its_sets() -> None:
    rows: dict[str, dict[str, float]] = {}
    for number in numbers(read_published()):
        if number.table.protocol == "transfer":
            rows.setdefault(number.method, {})[number.metric] = number.value
    assert len(rows) == 5
    for values in rows.values():
        mean = values.pop("mean")
        assert len(values) == 11
        assert mean == pytest.approx(sum(values.values()) / 11, abs=0.06)


def test_what_published_tables_compare_with_exists() -> None:
    for table in read_published().tables:
        for recipe in table.recipes:
            assert (RECIPES / "evaluate" / table.protocol / f"{recipe}.yaml").is_file(), (table.title, recipe)
        names = [name for row in table.rows for name in row.values]
        assert not table.recipes or set(main_values(table.protocol, names)) == set(names), table.title


def test_published_numbers_stand_with_their_mark_in_the_column_that_they_answer(tmp_path: Path) -> None:
    write(tmp_path / "a.json", result("linear", "sce-cifar10", {"last": 80.0, "best": 81.0}, data=CIFAR10))
    made = quiet(tmp_path)
    assert texts(made.table) == [["80.00", "81.00"], ["", "90.34‡"], ["", "86.18†"], ["", "90.20‡"]]
    text = made.text("markdown")
    assert LEGEND["third-party"] in text
    assert LEGEND["recalled"] in text
    assert LEGEND["verified"] not in text  # no such number stands here
    assert "README of pc-cp/MSVQ" in text


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": "moco-imagenet"},
        {"data": (("50,000 images in photos", 50000), ("10,000 images in tests", 10000))},
        {"data": (CIFAR10[0], ("9,999 images of cifar10, test", 9999))},
        {"data": (("20,000 of 50,000 images of cifar10", 20000), CIFAR10[1]), "limit": 20000},
        {"settings": {**plain(load_protocol("linear", "sce-cifar10")), "epochs": 1}},
        {"recipe": "mine", "settings": {"epochs": 1}},
    ],
    ids=["recipe", "name", "count", "subset", "settings", "own recipe"],
)
def test_no_published_number_stands_beside_what_does_not_compare(tmp_path: Path, change: dict[str, Any]) -> None:
    write(
        tmp_path / "a.json",
        result("linear", **{"recipe": "sce-cifar10", "data": CIFAR10, **change}, values={"best": 1.0}),
    )
    assert quiet(tmp_path).table.published == []


def test_cifar10_is_not_taken_for_cifar100(tmp_path: Path) -> None:
    write(tmp_path / "a.json", result("linear", "sce-cifar10", {"best": 60.0}, data=CIFAR100))
    table = quiet(tmp_path).table
    assert table.columns[0].images == "CIFAR-100"
    assert [line[0] for line in texts(table)] == ["60.00", "63.8", "65.45‡", "59.51†"]


def test_a_person_may_say_which_set_it_is_but_not_how_large(tmp_path: Path) -> None:
    whole = ("50,000 images in mine", 50000), ("10,000 images in mine", 10000)
    write(tmp_path / "a.json", result("linear", "sce-cifar10", {"best": 60.0}, data=whole))
    assert quiet(tmp_path, named={"cifar10": "in Mine"}).table.published != []
    write(tmp_path / "a.json", result("linear", "sce-cifar10", {"best": 60.0}, data=PHOTOS))
    assert quiet(tmp_path, named={"cifar10": "photos"}).table.published == []
    with pytest.raises(UserError, match="no known set 'cifar'"):
        quiet(tmp_path, named={"cifar": "photos"})
    with pytest.raises(UserError, match="'nowhere'"):
        quiet(tmp_path, named={"cifar10": "nowhere"})


def test_a_mean_over_sets_is_compared_only_where_all_sets_are_there(tmp_path: Path) -> None:
    settings = {"decays": 45, "sets": None}
    counts = {name: count or 6000 for t in read_published().tables for name, count in t.tests.items()}
    whole = {name: {"train": images((name, 9)), "test": images((name, count))} for name, count in counts.items()}
    for names, published in ((list(whole), 12), (["food101", "dtd"], 2)):
        data = {name: whole[name] for name in names}
        one = result("transfer", "sce-eleven", dict.fromkeys([*names, "mean"], 50.0), settings=settings)
        path = write(tmp_path / "a.json", {**one, "data": data})
        lines = table_of(path, recipes=lambda protocol, recipe: settings).published
        assert {line.label for line in lines} >= {"SCE, ResNet-50, 200 epochs, multi-crop", "BYOL, ResNet-50"}
        assert all(len(line.cells) == published for line in lines)


def test_all_published_numbers_are_listed_when_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "a.json", result())
    made = quiet(tmp_path, published=True)
    for form in FORMATS:
        text = made.text(form)
        assert "Truncated-Triplet" in text
        assert "philippmwirth/co2" in text
    assert "41.7" not in quiet(tmp_path).text("markdown")
    assert made.text("markdown").count("‡") > 10


# ---------------------------------------------------------------------------------------------------------- formats

HOSTILE = "[1] a|b & c_d $5 100% #1 {x} ~ ^ \\input [red]<script>*é*\x1b[31m\nnext"


def test_hostile_text_is_escaped_in_latex(tmp_path: Path) -> None:
    write(
        tmp_path / "a.json",
        result("linear", "sce-cifar10", {"last": 1.0, "best": 2.0}, data=CIFAR10, description=HOSTILE),
    )
    write(tmp_path / "b.json", result(values={"top1/k=20,T=0.1": 3.0}, description=HOSTILE))
    text = quiet(tmp_path, published=True).text("latex")
    bare = re.sub(r"\\[\\{}$&#%_]", "", text)
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0
    assert "\x1b" not in text
    assert "\\input" not in text.partition("\n")[2]
    for tabular in re.findall(r"\\begin\{tabular\}\{(l[lr]+)\}(.*?)\\end\{tabular\}", text, re.DOTALL):
        columns, body = tabular
        for row in re.findall(r"^(.*) \\\\$", body, re.MULTILINE):
            spans = [int(width) for width in re.findall(r"\\multicolumn\{(\d+)\}", row)]
            cells = len(re.findall(r"(?<!\\)&", row)) + 1 + sum(width - 1 for width in spans)
            assert cells == len(columns), row
    assert not re.search(r"\\\\\s*[\[*]", text)  # which would be an option of the line's end
    assert text.count("\\toprule") == text.count("\\bottomrule") == 2


def test_hostile_text_stays_one_cell_in_markdown(tmp_path: Path) -> None:
    write(tmp_path / "a.json", result(description=HOSTILE, notes=["a\n# heading | <b>"]))
    text = quiet(tmp_path).text("markdown")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 3
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3}
    assert "<script" not in text.replace("\\<", "")
    assert "\x1b" not in text
    assert "\n# heading" not in text


def test_a_narrow_terminal_breaks_no_number_and_obeys_no_text(tmp_path: Path) -> None:
    values = {"last": 12.345, "best": 23.456}
    for seed in (0, 1):
        for number, recipe in enumerate(("sce-cifar10", "moco-cifar10", "invp-cifar10")):
            settings = {**plain(load_protocol("linear", recipe)), "seed": seed}
            one = result("linear", recipe, values, settings=settings, data=CIFAR10, description=HOSTILE)
            write(tmp_path / f"{number}-{seed}.json", one)
    made = quiet(tmp_path)
    for width in (40, 60, 200):
        out = io.StringIO()
        console = Console(file=out, width=width, markup=False, highlight=False)
        console.print(terminal(made.table, made.notes, [], console))
        text = out.getvalue()
        assert text.count("12.35 ± 0.00 (2e)") == 3
        assert "90.34‡" in text
        assert "[red]" in text
        assert "\x1b" not in text
        assert max(len(line) for line in text.splitlines()) <= width


def test_the_json_names_the_files_and_seeds_behind_each_number(tmp_path: Path) -> None:
    for seed, value in enumerate((0.1 + 0.2, 62.0)):
        make_run(tmp_path / f"run{seed}", result(values={"top1/k=20,T=0.1": value}), seed=seed)
    found = json.loads(quiet(tmp_path).text("json"))
    (cell,) = found["rows"][0]["cells"]
    assert found["columns"][cell["column"]]["metric"] == "top1/k=20,T=0.1"
    assert [(one["value"], one["pretraining_seed"]) for one in cell["results"]] == [(0.1 + 0.2, 0), (62.0, 1)]
    assert cell["results"][1]["file"] == str(tmp_path / "run1" / "evaluate" / "0.json")


# ------------------------------------------------------------------------------------------------------------ files


def test_a_folder_gets_all_formats_and_the_next_report_does_not_read_them(tmp_path: Path) -> None:
    write(tmp_path / "a.json", result())
    first = quiet(tmp_path, out=tmp_path)
    assert [path.name for path in first.files] == ["report.md", "report.tex", "report.json"]  # no curves, no pictures
    before = {path: path.read_bytes() for path in first.files}
    said: list[str] = []
    again = report([tmp_path], out=tmp_path, say=said.append)
    assert said == []
    assert {path: path.read_bytes() for path in again.files} == before


def test_a_file_gets_the_format_of_its_ending(tmp_path: Path) -> None:
    write(tmp_path / "a.json", result())
    made = quiet(tmp_path, out=tmp_path / "new" / "table.tex")
    assert made.files == [tmp_path / "new" / "table.tex"]
    assert made.files[0].read_text(encoding="utf-8") == made.text("latex")


def test_what_no_report_wrote_is_not_written_over(tmp_path: Path) -> None:
    write(tmp_path / "a.json", result())
    mine = tmp_path / "out" / "report.tex"
    mine.parent.mkdir()
    mine.write_text("my thesis")
    for out in (mine, mine.parent, tmp_path / "a.json"):
        with pytest.raises(UserError, match="was not written by a report"):
            quiet(tmp_path, out=out)
    assert mine.read_text() == "my thesis"
    assert [path.name for path in mine.parent.iterdir()] == ["report.tex"]
    with pytest.raises(UserError, match="is a file"):
        quiet(tmp_path / "a.json", out=_touch(tmp_path / "plain"))


def _touch(path: Path) -> Path:
    path.touch()
    return path


# ---------------------------------------------------------------------------------------------------- hostile input


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is no JSON"),
        (b"[1, 2]", "is no result"),
        (b'{"protocol": "knn", "values": {}}', r"it lacks format \(int\), recipe \(str\), settings"),
        (json.dumps(result(format=2, versions={"kinfold": "9.9"})).encode(), "has format 2.*9.9"),
        (json.dumps(result(values={"top1/k=20,T=0.1": "high"})).encode(), "'top1/k=20,T=0.1' is no number"),
        (json.dumps(result(values={"top1/k=20,T=0.1": True})).encode(), "is no number"),
        (json.dumps(result(values={"top1/k=20,T=0.1": [1]})).encode(), "is no number"),
        (json.dumps({**result(), "backbone": {}}).encode(), "weights_sha256"),
    ],
)
def test_a_file_that_is_no_result_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "foreign.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"foreign\.json.*{words}"):
        quiet(path)
    write(tmp_path / "good.json", result())
    said: list[str] = []
    assert texts(report([tmp_path], say=said.append).table) == [["50.00"]]
    assert len(said) == 1
    assert re.search(rf"foreign\.json.*{words}", said[0])


def test_a_place_without_results_is_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    write(tmp_path / "good" / "a.json", result())
    for what in ([empty], [tmp_path / "good", empty]):
        with pytest.raises(UserError, match="empty has no results"):
            quiet(*what)
    for name in ("nowhere", "n" * 3000):
        with pytest.raises(UserError, match=f"{name} is not there"):
            quiet(tmp_path / name)
    with pytest.raises(UserError, match="needs results"):
        quiet()


def test_a_value_that_is_no_finite_number_is_left_out_and_said(tmp_path: Path) -> None:
    write(tmp_path / "a.json", result("linear", values={"last": "NaN", "best": 5.0, "other": None}))
    said: list[str] = []
    made = report([tmp_path], say=said.append)
    assert texts(made.table) == [["5.00"]]
    assert len(said) == 1
    assert said[0].endswith("a.json: no number came out for last, other.")
    assert said[0] in json.loads(made.text("json"))["notes"]


def test_a_run_whose_recipe_cannot_be_read_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", result())
    for text in ("a: [", "- 1"):
        (run / "recipe.yaml").write_text(text)
        with pytest.raises(UserError, match=r"run/recipe\.yaml"):
            quiet(run)


def test_two_answers_to_one_question_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "a.json", result(values={"top1/k=20,T=0.1": 50.0}))
    write(tmp_path / "b.json", result(values={"top1/k=20,T=0.1": 51.0}))
    with pytest.raises(UserError, match=r"same weights: .*a\.json .* says 50, .*b\.json .* says 51"):
        quiet(tmp_path)


def test_an_older_state_of_a_run_is_not_taken_for_a_repetition(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", result(), result())
    path = run / "evaluate" / "1.json"
    older = json.loads(path.read_text())
    write(path, {**older, "backbone": {**older["backbone"], "weights_sha256": "of epoch 3"}})
    with pytest.raises(UserError, match="for different weights of one pretraining"):
        quiet(run)


def test_copies_of_a_result_count_once(tmp_path: Path) -> None:
    first = write(tmp_path / "a" / "x.json", result())
    write(tmp_path / "b" / "x.json", result())
    said: list[str] = []
    made = report([tmp_path / "a", first, tmp_path / "b"], say=said.append)
    assert texts(made.table) == [["50.00"]]
    assert len(said) == 1
    assert "says the same as" in said[0]


def test_remarks_of_the_protocols_stand_under_the_table_once(tmp_path: Path) -> None:
    write(tmp_path / "a.json", result(notes=["every image asks all the others"]))
    write(tmp_path / "b.json", result(notes=["every image asks all the others"], weights="b" * 64, description="other"))
    assert quiet(tmp_path).text("markdown").count("knn: every image asks all the others") == 1


# --------------------------------------------------------------------------------------------------------- pictures


def svm(values: dict[int, float], full: float, **options: Any) -> dict[str, Any]:
    shots = {f"mAP/k={k}": value for k, value in values.items()} | {f"std/k={k}": 1.5 for k in values}
    return result("voc-svm", "sce-voc07", {**shots, "mAP/full": full}, settings={"costs": [0.5]}, data=VOC07, **options)


def test_low_shot_curves_have_the_numbers_their_spread_and_the_published_ones(tmp_path: Path) -> None:
    write(tmp_path / "a.json", svm({16: 70.0, 2: 40.0}, 80.0))
    (panel,) = low_shot(table_of(tmp_path, recipes=lambda protocol, recipe: {"costs": [0.5]}))
    own, *published = panel.curves
    assert [(p.x, p.y, p.spread) for p in own.points] == [(2.0, 40.0, 1.5), (16.0, 70.0, 1.5), (32.0, 80.0, 0.0)]
    assert panel.ticks == ((2.0, "2"), (16.0, "16"), (32.0, "all"))
    assert [curve.label for curve in published] == [
        "MoCo v2, ResNet-50, published",
        "ReSSL, ResNet-50, published",
        "SCE, ResNet-50, 200 epochs, multi-crop, published",
    ]
    assert [(p.x, p.y) for p in published[2].points] == [(16.0, 79.47), (32.0, 88.24)]
    assert any("verified" in remark for remark in panel.remarks)
    assert "band: ± 1 standard deviation over draws of images" in panel.remarks


def test_the_band_of_several_pretrainings_is_their_spread(tmp_path: Path) -> None:
    for seed, value in enumerate((70.0, 72.0)):
        make_run(tmp_path / f"run{seed}", svm({2: value - 30, 16: value}, 80.0), seed=seed)
    (panel,) = low_shot(table_of(tmp_path, recipes=lambda protocol, recipe: None))
    (curve,) = panel.curves
    assert [point.spread for point in curve.points] == pytest.approx([2**0.5, 2**0.5, 0.0])
    assert "band: ± 1 standard deviation over pretrainings" in panel.remarks


def few_labels(folder: Path, weights: str, *, best: bool) -> None:
    for share, top1 in ((0.01, 30.0), (0.1, 60.0)):
        values = {"top1": top1, "top5": top1 + 20}
        values |= {f"best/{name}": value + 1 for name, value in values.items()} if best else {}
        one = result(
            "semi-supervised",
            f"invp-{100 * share:g}",
            values,
            settings={"share": share, "seed": 0},
            data=IMAGENET,
            weights=weights * 64,
            description=weights,
        )
        write(folder / f"{weights}-{share}.json", one)


def test_semi_supervised_curves_join_the_shares_of_a_family_of_recipes(tmp_path: Path) -> None:
    few_labels(tmp_path, "a", best=True)
    few_labels(tmp_path, "b", best=True)
    table = table_of(tmp_path, recipes=lambda protocol, recipe: {"share": float(recipe.partition("-")[2]) / 100})
    top1, top5 = semi_supervised(table)
    assert top1.y_label == "top-1, best epoch (%)"
    assert [[(p.x, p.y) for p in curve.points] for curve in top1.curves] == [[(1.0, 31.0), (10.0, 61.0)]] * 2
    assert [curve.label for curve in top5.curves] == ["a", "b", "× InvP, ResNet-50, MLP head, published: 78.2"]


def test_semi_supervised_curves_without_a_best_epoch_are_of_the_last(tmp_path: Path) -> None:
    few_labels(tmp_path, "a", best=False)
    panels = semi_supervised(table_of(tmp_path, recipes=lambda protocol, recipe: None))
    assert [panel.y_label for panel in panels] == ["top-1, last epoch (%)", "top-5, last epoch (%)"]
    assert [curve.label for panel in panels for curve in panel.curves] == ["a", "a"]


def test_pictures_are_drawn_the_same_each_time_and_hold_every_label(tmp_path: Path) -> None:
    few_labels(tmp_path, "a", best=True)
    write(tmp_path / "svm.json", svm({2: 40.0, 16: 70.0}, 80.0, description="R&D <$5> net", weights="b" * 64))
    table = table_of(tmp_path, recipes=lambda protocol, recipe: None)
    drawn = draw(table)
    assert list(drawn) == ["low-shot.svg", "low-shot.png", "semi-supervised.svg", "semi-supervised.png"]
    assert drawn["low-shot.png"].startswith(b"\x89PNG")
    svg = drawn["low-shot.svg"].decode()
    for words in ("R&amp;D &lt;$5&gt; net", "mAP (%)", "training images a class", "sce-voc07, VOC 2007"):
        assert words in svg
    assert picture(low_shot(table), "svg") == drawn["low-shot.svg"]
    made = quiet(tmp_path, out=tmp_path / "out")
    assert {path.name for path in made.files} == {*(name for name, _ in FORMATS.values()), *drawn}
    quiet(tmp_path, out=tmp_path / "out")  # pictures are known as a report's own


@given(
    st.lists(st.tuples(st.floats(-0.5, 1.5), st.floats(0.01, 0.2)), min_size=1, max_size=12).filter(
        lambda things: sum(size for _, size in things) <= 1.0
    )
)
def test_labels_lie_in_the_panel_in_their_order_and_none_over_another(things: list[tuple[float, float]]) -> None:
    wanted, sizes = [centre for centre, _ in sorted(things)], [size for _, size in sorted(things)]
    found = spaced(wanted, sizes)
    edges = [(centre - size / 2, centre + size / 2) for centre, size in zip(found, sizes)]
    assert edges[0][0] >= -1e-9
    assert edges[-1][1] <= 1 + 1e-9
    assert all(below[1] <= above[0] + 1e-9 for below, above in itertools.pairwise(edges))


def test_labels_that_have_room_stay_where_they_belong() -> None:
    assert spaced([0.2, 0.5, 0.8], [0.1, 0.1, 0.1]) == pytest.approx([0.2, 0.5, 0.8])
    assert spaced([0.5, 0.5], [0.1, 0.1]) == pytest.approx([0.45, 0.55])


# ------------------------------------------------------------------------------------------------------ end to end


def test_a_measured_backbone_is_reported(tmp_path: Path) -> None:
    backbone = FrozenBackbone(
        module=build_backbone(Backbone(name="resnet10_w8", stem="small"), 1).eval(),
        size=8,
        channels=1,
        mean=(0.3,),
        std=(0.35,),
        description="untrained",
    )
    measured = evaluate("knn", backbone, "digits", limit=60, out=tmp_path, device="cpu", say=lambda text: None)
    made = quiet(tmp_path)
    assert made.table.lines[0].label == "untrained"
    assert all(column.subset for column in made.table.columns)
    assert [cell.mean for cell in made.table.lines[0].cells.values()] == [
        measured["values"][column.metric] for column in made.table.columns
    ]
