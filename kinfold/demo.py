# SPDX-License-Identifier: Apache-2.0
"""The demo: the whole way on the embedded digits, from images without labels to weights, embeddings and a picture."""

from __future__ import annotations

from pathlib import Path

import typer

from kinfold.contact_sheet import nearest_sheet
from kinfold.data.sources import open_source
from kinfold.embeddings import embed
from kinfold.evaluate import evaluate
from kinfold.evaluate.features import extract, load_backbone
from kinfold.log import read_metrics
from kinfold.pretrain import pretrain
from kinfold.recipe import load


def demo(out: Path) -> None:
    """Pretrain on 1,437 handwritten digits, evaluate on 360 others, embed all, and say where everything is.

    Started again with the same folder it goes on, or tells what is there.
    """
    recipe, run = load("digits", [], run={"data": "digits", "out": str(out)})
    done = pretrain(recipe, run)
    if done.signal is not None:
        typer.echo(f"Stopped at step {done.step} of {done.steps}. `kinfold demo` goes on from there.")
        raise typer.Exit(128 + done.signal)
    knn = [line["probe/knn"] for line in read_metrics(out) if "probe/knn" in line]
    result = evaluate("knn", str(out), "digits")
    written = embed(str(out), "digits", out / "embeddings.parquet", split="all")
    backbone = load_backbone(str(out))
    source = open_source("digits", split="test")
    features, positions = extract(
        backbone.module,
        source,
        size=backbone.size,
        resize=None,
        channels=backbone.channels,
        mean=backbone.mean,
        std=backbone.std,
    )
    sheet = nearest_sheet(source, features, positions, out / "neighbours.png")
    typer.echo(f"\nk-NN accuracy on held-out digits: {knn[0]:.1f} % untrained, {knn[-1]:.1f} % now, no label was used.")
    for what, path in (
        ("backbone", out / "backbone.safetensors"),
        ("embeddings", written.path),
        ("neighbours", sheet),
        ("evaluation", result["file"]),
        ("metrics", out / "metrics.jsonl"),
    ):
        typer.echo(f"  {what:11} {path}")
    typer.echo("Next: kinfold pretrain YOUR_FOLDER")
