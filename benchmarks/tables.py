# SPDX-License-Identifier: Apache-2.0
"""The tables of results in README.md, made from `benchmarks/results/*.json` and from nothing else.

    python benchmarks/tables.py            rewrites what stands between the two markers
    python benchmarks/tables.py --check    says whether it would change, by its exit code

A row without a file says "not measured yet".
"""

from __future__ import annotations

import argparse
import statistics
import sys

from result_files import NOT_YET, ROOT, link, machine, read, spread
from tables_of_cost import features_memory, gpu, listing, overhead

BEGIN, END = "<!-- results -->", "<!-- /results -->"

DIGITS = "invp --name invp-digits --recipe invp/digits --data digits --k 20"
LEARNING = {
    "moco": ("MoCo", "moco --data CIFAR10"),
    "ressl": ("ReSSL", "ressl --data CIFAR10"),
    "sce": ("SCE", "sce --data CIFAR10 --seeds 0 1 2"),
    "co2": ("CO2", "co2 --data CIFAR10"),
    "invp": ("InvP, second term from epoch 6 on", "invp --data CIFAR10"),
    "invp-digits": ("InvP on the 1,437 digits, k = 20", f"{DIGITS} --seeds 0 1 2"),
}
EVALUATION = {
    "knn": ("k-NN", "cifar10"),
    "linear-cifar10": ("linear", "cifar10"),
    "linear-tiny-imagenet": ("linear", "tiny-imagenet-200-32px"),
    "linear-blocks": ("linear, all blocks", "cifar10"),
    "semi-supervised": ("semi-supervised", "cifar10"),
    "fine-tune": ("fine-tune", "imagenette-224-subset"),
    "transfer": ("transfer", "imagenette-224-subset"),
    "voc-svm": ("VOC SVM", "voc2012-mini200"),
    "voc-logistic": ("VOC logistic", "voc2012-mini200"),
    "detection": ("detection", "bccd-voc"),
    "segmentation": ("segmentation", "voc2012-mini200"),
    "patches": ("patches", "voc2012-mini200"),
}
"""results of benchmarks/evaluation.py: name to protocol and set"""
SETS = {
    "cifar10": "CIFAR-10",
    "tiny-imagenet-200-32px": "Tiny-ImageNet, 32 px",
    "imagenette-224-subset": "Imagenette, subset",
    "voc2012-mini200": "200 images of VOC 2012",
    "bccd-voc": "BCCD, blood cells",
}


def learning() -> list[str]:
    """k-NN before and after a small pretraining, one row a method."""
    rows = []
    for method, (title, words) in LEARNING.items():
        result = read(f"learning-{method}")
        command = f"`python benchmarks/learning.py {words}`"
        if result is None:
            rows.append(f"| {title} | {NOT_YET} | | | | | {command} |")
            continue
        runs = result["runs"]
        columns = [
            title,
            spread([run["knn_untrained"] for run in runs]),
            spread([run["knn_trained"] for run in runs]),
            spread([run["gain"] for run in runs], sign=True),
            f"{', '.join(str(run['seed']) for run in runs)}",
            f"{statistics.median(run['seconds'] for run in runs):.0f} s",
            link(f"learning-{method}"),
        ]
        rows.append(f"| {' | '.join(columns)} |")
    where = next((machine(found) for method in LEARNING if (found := read(f"learning-{method}"))), None)
    intro = (
        "Does it learn? 10,000 CIFAR-10 images, a small ResNet, recipes under `benchmarks/recipes`; weighted k-NN "
        "(k = 200, T = 0.1) on the backbone's features, all 10,000 test images, per cent; mean ± standard deviation "
        "over the seeds. "
        "These recipes are made for two cores and are no paper's setting, so the methods are not ranked by them."
    )
    head = [
        "| method | k-NN untrained | k-NN trained | gain | seeds | time a run (median) | file or command |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    return [intro if where is None else f"{intro} Measured on: {where}.", "", *head, *rows]


def demo() -> list[str]:
    """The demo's time, and what it learns."""
    head = ["| time | k-NN untrained | k-NN trained | file or command |", "|--:|--:|--:|---|"]
    intro = (
        "How long does `kinfold demo` take, start to end, and what does it learn? k-NN on held-out digits, per cent."
    )
    result = read("demo")
    if result is None:
        return [intro, "", *head, f"| {NOT_YET} | | | `python benchmarks/demo_time.py` |"]
    columns = [
        f"{result['seconds']:.0f} s",
        f"{result['knn_untrained']:.1f}",
        f"{result['knn_trained']:.1f}",
        link("demo"),
    ]
    return [f"{intro} Measured on: {machine(result)}.", "", *head, f"| {' | '.join(columns)} |"]


def evaluation() -> list[str]:
    """Every protocol from end to end, beside chance."""
    results = {name: read(f"evaluation-{name}") for name in EVALUATION}
    found = [result for result in results.values() if result is not None]
    intro = (
        "Does every protocol of `kinfold evaluate` run from end to end on two cores, and is its figure better than "
        "chance? A small backbone and short schedules that are no paper's, per cent; the time is that of the whole "
        "command. Chance is 100 / classes for accuracies, the mean of random orders for the two VOC classifiers, "
        "calling everything background for masks, and 0 for detection; what is asked for is the margin that "
        "the script states. The result files have all settings and values."
    )
    if found:
        places, backbones = (list(dict.fromkeys(each)) for each in zip(*((machine(r), r["backbone"]) for r in found)))
        intro += f" Measured on: {'; '.join(places)}. Backbone: {'; '.join(backbones)}."
    head = [
        "| protocol | images | value | result | asked for | chance | time | file or command |",
        "|---|---|---|--:|--:|--:|--:|---|",
    ]
    rows = []
    for name, (title, data) in EVALUATION.items():
        result, images = results[name], SETS[data]
        if result is None:
            command = f"`python benchmarks/evaluation.py --backbone RUN --data DATA --only {name}`"
            rows.append(f"| {title} | {images} | {NOT_YET} | | | | | {command} |")
            continue
        columns = [
            title,
            images,
            f"`{result['value']}`",
            f"{result['percent']:.1f}",
            f"{result['asked_percent']:.1f}",
            f"{result['chance_percent']:.1f}",
            f"{result['seconds']:.0f} s",
            link(f"evaluation-{name}"),
        ]
        rows.append(f"| {' | '.join(columns)} |")
    return [intro, "", *head, *rows]


def block() -> str:
    """All tables, with the markers around them."""
    made = (demo(), learning(), evaluation(), features_memory(), overhead(), listing(), gpu())
    return "\n".join([BEGIN, "", *(line for table in made for line in (*table, "")), END])


def rewritten(text: str) -> str:
    """A README's text with the tables as the result files have them now."""
    before, first, rest = text.partition(BEGIN)
    _, second, after = rest.partition(END)
    if not first or not second:
        raise SystemExit(f"README.md lacks the markers {BEGIN} and {END}.")
    return before + block() + after


def main() -> None:
    """Rewrite README.md, or check it."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--check", action="store_true")
    given = words.parse_args()
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = rewritten(old)
    if given.check:
        sys.exit(0 if new == old else "README.md is not up to date: run python benchmarks/tables.py")
    readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
