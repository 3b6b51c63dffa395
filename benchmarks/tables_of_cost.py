# SPDX-License-Identifier: Apache-2.0
"""The tables of README.md that say what things cost: the loop, a GPU, a folder's listing, memory of features."""

from __future__ import annotations

from result_files import NOT_YET, link, machine, read

PARTS = {"extract": "making features", "linear": "linear classifier on them", "knn": "k-NN on them"}
GPU = ("moco/cifar10-notebook-asymmetric", "sce/cifar10")


def overhead() -> list[str]:
    """Speed and memory of the loop beside a bare one."""
    head = ["| loop | images/s | peak memory | file or command |", "|---|--:|--:|---|"]
    result = read("loop-overhead")
    if result is None:
        intro = "What does the loop cost? `pretrain` beside a bare loop over the same ResNet-18 encoders at 32 px."
        return [intro, "", *head, f"| both | {NOT_YET} | | `python benchmarks/loop_overhead.py` |"]
    intro = (
        f"What does the loop cost? `pretrain` beside a bare loop ({result['bare']}) over the same {result['backbone']} "
        f"encoders at 32 px, batch {result['batch_size']}; medians of {len(result['pairs'])} interleaved pairs on "
        f"{machine(result)}. `pretrain` runs at {100 * result['speed_share']:.0f} % of the bare loop's speed."
    )
    rows = []
    for which, title in (("kinfold", "`pretrain`, all included"), ("bare", "bare loop")):
        found = result["medians"][which]
        columns = [
            title,
            f"{found['images_per_second']:.1f}",
            f"{found['peak_memory_mb']:,.0f} MB",
            link("loop-overhead"),
        ]
        rows.append(f"| {' | '.join(columns)} |")
    return [intro, "", *head, *rows]


def gpu() -> list[str]:
    """The CIFAR-10 recipes on one GPU."""
    intro = (
        "On a GPU: CIFAR-10 recipes with all their epochs; k-NN as MoCo's notebook measures it "
        "(k = 200, T = 0.1, embeddings of the head), per cent. The notebook's own figure for its 200 epochs is 82.6."
    )
    head = [
        "| recipe | epochs | images/s | k-NN untrained | k-NN trained | machine | file or command |",
        "|---|--:|--:|--:|--:|---|---|",
    ]
    if all(read(f"gpu-{recipe.replace('/', '-')}") is None for recipe in GPU):
        intro += " No accelerator was at hand when this table was made; the commands are ready."
    rows = []
    for recipe in GPU:
        name = f"gpu-{recipe.replace('/', '-')}"
        result = read(name)
        if result is None:
            command = f"`python benchmarks/cifar10_gpu.py {recipe} --data CIFAR10`"
            rows.append(f"| `{recipe}` | {NOT_YET} | | | | | {command} |")
            continue
        columns = [
            f"`{recipe}`",
            f"{min(result['epochs'], result['epochs_done']):.0f} of {result['epochs_of_recipe']}",
            f"{result['images_per_second']:,.0f}",
            *(f"{result[key]:.1f}" if key in result else "" for key in ("knn_untrained", "knn_trained")),
            machine(result),
            link(name),
        ]
        rows.append(f"| {' | '.join(columns)} |")
    return [intro, "", *head, *rows]


def listing() -> list[str]:
    """How long a folder takes to open."""
    result = read("listing-1000000")
    intro = "How long does a folder of a million files take to open, the first and the second time?"
    if result is None:
        return [intro, "", f"{NOT_YET}: `python benchmarks/listing.py --files 1000000`"]
    return [
        intro,
        "",
        "| first | second | after one file was added | file or command |",
        "|--:|--:|--:|---|",
        f"| {result['seconds_first']:.1f} s | {result['seconds_second']:.2f} s "
        f"| {result['seconds_after_one_file_was_added']:.1f} s | {link('listing-1000000')} |",
    ]


def features_memory() -> list[str]:
    """Memory while features of a large set are made and used."""
    result = read("features-memory")
    intro = (
        "How much memory do features of a large set take? A process's own memory at most, beyond what it had after its "
        "imports; pages of mapped files are not counted, as the system may drop them at any time."
    )
    head = ["| part | own memory | time | file or command |", "|---|--:|--:|---|"]
    if result is None:
        command = "`python benchmarks/features_memory.py --images 1281167`"
        return [intro, "", *head, f"| {', '.join(PARTS.values())} | {NOT_YET} | | {command} |"]
    intro += (
        f" {result['images']:,} synthetic images, {result['features']:,} features each: "
        f"{result['mb_of_the_features_on_disk'] / 1000:.1f} GB on the disk, {result['mb_of_a_batch']:.1f} MB a batch. "
        f"Measured on: {machine(result)}."
    )
    rows = [
        f"| {title} | {result['parts'][part]['mb_own_at_most']:,.0f} MB | {result['parts'][part]['seconds']:.0f} s "
        f"| {link('features-memory')} |"
        for part, title in PARTS.items()
    ]
    return [intro, "", *head, *rows]
