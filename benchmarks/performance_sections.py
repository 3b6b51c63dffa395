# SPDX-License-Identifier: Apache-2.0
"""What stands on docs/performance.md beside the figures: the files it looks for, how each is made, the advice."""

from __future__ import annotations

from dataclasses import dataclass

WITH = "uv run --with-requirements benchmarks/alternatives.txt python"


@dataclass(frozen=True)
class Wanted:
    """A result file that the page has a place for."""

    name: str
    """the file is benchmarks/results/NAME.json"""
    question: str
    """what it answers, for the summary while there is no file"""
    command: str
    """how it is made"""


@dataclass(frozen=True)
class Section:
    """Files of one question; their tables become one where they have the same columns."""

    title: str
    files: tuple[Wanted, ...]


SECTIONS = (
    Section(
        "Making views of photographs",
        (
            Wanted(
                "loader-speed",
                "two views of 500 x 375 JPEGs, images/s on one core",
                f"{WITH} benchmarks/loader_speed.py",
            ),
        ),
    ),
    Section(
        "Augmentations on the device",
        (
            Wanted(
                "augment-speed",
                "augmenting a batch at 224 and 32 px, on the CPU",
                f"{WITH} benchmarks/augment_speed.py",
            ),
            Wanted(
                "gpu-augment-speed",
                "augmenting a batch at 224 and 32 px, on one GPU",
                f"{WITH} benchmarks/augment_speed.py --device cuda",
            ),
        ),
    ),
    Section(
        "End to end",
        (
            Wanted(
                "against-lightly",
                "pretraining MoCo v2 at 32 px, images/s on two cores",
                f"{WITH} benchmarks/against_lightly.py --data CIFAR10",
            ),
        ),
    ),
    Section(
        "What the loop costs",
        (
            Wanted(
                "loop-overhead",
                "`pretrain` beside its encoders alone, ResNet-18 at 32 px, two cores",
                "python benchmarks/loop_overhead.py",
            ),
        ),
    ),
    Section(
        "Small sets live on the device",
        (
            Wanted(
                "resident", "start-up and views of CIFAR-10, on the CPU", "python benchmarks/resident.py --data CIFAR10"
            ),
            Wanted(
                "resident-cuda",
                "start-up and views of CIFAR-10, on one GPU",
                "python benchmarks/resident.py --data CIFAR10 --device cuda",
            ),
        ),
    ),
    Section(
        "Starting",
        (Wanted("startup", "help, import, first step on 100,000 files", "python benchmarks/startup.py"),),
    ),
    Section(
        "Searching InvP's bank",
        (
            Wanted(
                "bank-search", "the 4,096 nearest of 1,281,167 rows for 256 queries", "python benchmarks/bank_search.py"
            ),
            Wanted(
                "bank-search-cuda",
                "the 4,096 nearest of 1,281,167 rows for 256 queries, on one GPU",
                "python benchmarks/bank_search.py --device cuda",
            ),
        ),
    ),
    Section(
        "k-NN evaluation",
        (
            Wanted(
                "knn-speed",
                "k-NN of 10,000 queries among 50,000 rows of 512 features",
                f"{WITH} benchmarks/knn_speed.py",
            ),
        ),
    ),
    Section(
        "Memory of features",
        (
            Wanted(
                "features-memory",
                "memory while features of 1.28 million images are made and used",
                "python benchmarks/features_memory.py --images 1281167",
            ),
        ),
    ),
    Section(
        "CIFAR-10 on one GPU",
        tuple(
            Wanted(
                f"gpu-{name}",
                f"`{recipe}`, batch {batch}, 200 epochs on one GPU",
                f"python benchmarks/cifar10_gpu.py {recipe} --data CIFAR10{words}",
            )
            for name, recipe, batch, words in (
                ("moco-cifar10-notebook-asymmetric", "moco/cifar10-notebook-asymmetric", 512, ""),
                ("moco-256", "moco/cifar10-notebook-asymmetric", 256, " --name moco-256 batch_size=256"),
                ("sce-cifar10", "sce/cifar10", 256, ""),
                ("sce-512", "sce/cifar10", 512, " --name sce-512 batch_size=512"),
            )
        ),
    ),
    Section(
        "ResNet-50 at 224 px on one GPU",
        tuple(
            Wanted(f"gpu-step-{part}", question, f"python benchmarks/gpu_step.py --part {part}")
            for part, question in (
                ("whole", "SCE, two crops, from memory and from JPEG files: the step beside its encoders alone"),
                ("changes", "SCE, two crops: the step in parts before and after each change"),
            )
        ),
    ),
)

BEFORE = """\
# Performance

<!-- Made by `python benchmarks/performance.py` from the files under benchmarks/results: change those, not this. -->

How fast each part is beside what one would take instead: another library, or the plain form. Where something is
compared, contenders took turns, unless the section says otherwise, so that a machine that slows down for a while
favours nobody. Figures are medians; the file of each row has machine, versions, commit and single measurements. "1.45×
as fast" says that the other takes 1.45 times as long: the median of the rounds' own ratios, so not always the quotient
of the two figures beside it.

`python` stands for `python3 -m uv run python`, and `uv` for `python3 -m uv`. lightly, kornia and faiss are installed
for these scripts only.
"""

MISSING = """\
**Not measured yet.** Each is one command, and `python benchmarks/device_all.py --data CIFAR10 --out measured` runs all
that want a GPU. CIFAR10 is a folder of CIFAR-10 as Parquet.
"""

ADVICE = """\
## What to set

Only the encoders are arithmetic that a method asks for; all else is there to keep them busy. Two figures say what
limits a run: how near its images per second come to those of the encoders alone (`benchmarks/loop_overhead.py`), and
`waiting` in `metrics.jsonl`, the share of the time spent waiting for images. [Scaling](scaling.md) explains the
settings. What is said of GPUs is what the design expects, and holds as far as rows above have figures.
"""

ADVICE_COLUMNS = ["you have", "what limits it", "what to set"]
ADVICE_ROWS = [
    [
        "two CPU cores",
        "the encoders, for sets that lie decoded in memory; decoding, for photographs",
        "a small backbone and small views (`backbone.name=resnet10_w32`, 32 px); `limit=10000` to try things; "
        "`probe_every=0` where nobody looks",
    ],
    [
        "one GPU, a small set",
        "starting many small kernels, where the network is small",
        "nothing: the set lives on the device unasked; `compile=true` for runs of many epochs, `compile=graphs` where "
        "the network is so small that starting its kernels takes longer than running them",
    ],
    [
        "one GPU, photographs",
        "decoding, where `waiting` is far from zero",
        "one worker a core (unasked); where the photographs are far larger than the views, "
        "`kinfold pack photos/ packed/` once or `images.scaled_decode=true`; `decode=device` where there are few cores",
    ],
    [
        "eight GPUs",
        "decoding, as the cores are shared by more; then the exchange of gradients and keys",
        "`torchrun` with a process a GPU, the cores are divided among them unasked; `checkpoint_steps=2000` where "
        "epochs take hours",
    ],
]
