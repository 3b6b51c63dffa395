# SPDX-License-Identifier: Apache-2.0
"""The command `kinfold evaluate`: one command a protocol, all with the same words, and the report.

Nothing heavy is imported before a command runs, so that its help answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from kinfold.errors import UserError

DATA_HELP = (
    "A folder of images (nested as you like), a Parquet or Arrow file or folder, tar shards, hf:OWNER/NAME on the Hub, "
    "or `digits`."
)
evaluate_app = typer.Typer(
    help="Measure a backbone by the protocols of the papers; `report` puts results side by side.", no_args_is_help=True
)
PROTOCOLS = {
    "knn": "Weighted k-nearest neighbours: nothing is trained, seconds. DATA with labels.",
    "linear": "A linear classifier on frozen features, rates side by side. DATA with labels.",
    "semi-supervised": "Fine-tune everything on a few labels, 1 % or 10 %. DATA with labels.",
    "fine-tune": "Fine-tune everything on all labels. DATA with labels.",
    "transfer": "Logistic regression on many small sets. DATA: a folder of sets, one set, or torchvision:NAME@FOLDER.",
    "voc-svm": "Linear SVM per class, full and low-shot. DATA in VOC's layout.",
    "voc-logistic": "InvP's multi-label logistic classifier. DATA in VOC's layout.",
    "detection": "Faster or Mask R-CNN, trained from the backbone. DATA in VOC's or COCO's layout.",
    "segmentation": "A fully convolutional network, trained from the backbone. DATA in VOC's or Cityscapes' layout.",
    "patches": "A linear classifier of patches on frozen features. DATA as for segmentation.",
}
"""protocols and what they do in one line; `kinfold.evaluate` has the same, and is too heavy to ask for a help text"""

OUT_HELP = "A folder for the JSON result, or a .json file. Default: evaluate/ in the run folder, or here."


def _protocol(name: str, text: str) -> None:
    """Make the command of one protocol: all have the same words."""

    def command(
        settings: Annotated[
            Optional[list[str]],  # noqa: UP045
            typer.Argument(help="key=value, settings of the protocol, as `kinfold recipes show` writes them."),
        ] = None,
        backbone: Annotated[
            str,
            typer.Option(
                "--backbone", "-b", help="A run folder, a checkpoint or .safetensors file, timm:NAME, torchvision:NAME."
            ),
        ] = "",
        data: Annotated[str, typer.Option("--data", "-d", help="The images. " + DATA_HELP)] = "",
        recipe: Annotated[
            str, typer.Option("--recipe", "-r", help="A paper's variant of the protocol, as in `kinfold recipes`.")
        ] = "default",
        out: Annotated[Optional[Path], typer.Option("--out", "-o", help=OUT_HELP)] = None,  # noqa: UP045
        train_split: Annotated[
            Optional[str],  # noqa: UP045
            typer.Option(help="The split to learn from, where not the usual one."),
        ] = None,
        test_data: Annotated[
            Optional[str],  # noqa: UP045
            typer.Option(help="Another set to be asked, instead of a split of DATA."),
        ] = None,
        test_split: Annotated[
            Optional[str],  # noqa: UP045
            typer.Option(help="The split to be asked, where not the usual one."),
        ] = None,
        device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
        workers: Annotated[Optional[int], typer.Option(help="Processes that decode images.")] = None,  # noqa: UP045
        limit: Annotated[
            Optional[int],  # noqa: UP045
            typer.Option(help="Use this many images of each split only."),
        ] = None,
        size: Annotated[Optional[int], typer.Option(help="Side of the images in pixels.")] = None,  # noqa: UP045
        batch: Annotated[
            int, typer.Option("--batch", help="Images a forward pass of frozen features: less takes less memory.")
        ] = 256,
        cache: Annotated[
            bool, typer.Option("--cache/--no-cache", help="Keep features for the next protocol, in ~/.cache/kinfold.")
        ] = True,
    ) -> None:
        from kinfold import distributed
        from kinfold.evaluate import Stopped
        from kinfold.evaluate import evaluate as measure

        for option, value in (("--backbone", backbone), ("--data", data)):
            if not value:
                raise UserError(
                    f"{option} is missing. For example: kinfold evaluate {name} --backbone runs/mine --data photos/"
                )
        for option, number, least in (("--batch", batch, 1), ("--size", size, 1), ("--workers", workers, 0)):
            if number is not None and number < least:
                raise UserError(f"{option} is {number}; it has to be at least {least}.")
        try:
            result = measure(
                name,
                backbone,
                data,
                recipe=recipe,
                overrides=settings or [],
                train_split=train_split,
                test_data=test_data,
                test_split=test_split,
                out=out,
                device=device,
                workers=workers,
                limit=limit,
                size=size,
                batch_size=batch,
                cache=cache,
            )
        except Stopped as stopped:
            typer.echo(str(stopped), err=True)
            raise typer.Exit(128 + stopped.signal) from None
        if distributed.is_main():
            for key, number in result["values"].items():
                # Rates and decays are small; percentages read best with two digits.
                typer.echo(f"{key:28} {number:{'.2f' if abs(number) >= 0.1 or not number else '.3g'}}")
            typer.echo(f"written to {result['file']}")
        distributed.stop()

    evaluate_app.command(
        name,
        help=text
        + "\n\nIt may be stopped (SIGTERM, Ctrl-C) and goes on with the same command. "
        + f"On several devices: torchrun --nproc-per-node 8 -m kinfold evaluate {name} ...",
        short_help=text,
    )(command)


for _name, _text in PROTOCOLS.items():
    _protocol(_name, _text)


@evaluate_app.command("report")
def evaluate_report(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders, folders of runs or of results, or single result files.")
    ],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--out", "-o", help="A folder for report.md, .tex, .json and the pictures; or one file of such a name."
        ),
    ] = None,
    named: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--set",
            help="NAME=TEXT: images whose description holds TEXT are the set NAME, so that published numbers of it "
            "compare. For example cifar10=my-cifar-folder.",
        ),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Append every published number, also those that compare with nothing.")
    ] = False,
) -> None:
    """Put all results of one or more backbones into one table, with published numbers and how they are known."""
    from kinfold.evaluate.report import report

    known: dict[str, str] = {}
    for word in named or []:
        name, sign, text = word.partition("=")
        if not (name and sign and text):
            raise UserError(f"--set is NAME=TEXT, for example --set cifar10=my-cifar-folder, but got {word!r}.")
        known[name] = text
    made = report(runs, out=out, named=known, published=published)
    made.show()
    for path in made.files:
        typer.echo(f"written to {path}")
