# SPDX-License-Identifier: Apache-2.0
"""The run folder is a contract: what a run writes, under which names, and who may write there again.

    recipe.yaml  run.yaml        what was asked for, complete
    metrics.jsonl                one line every few steps, and the probes
    checkpoints/                 the newest ones, each whole
    backbone.safetensors  .md    the weights to take away, with their card
    encoder.safetensors          backbone and head together, for protocols that look behind the head
    summary.json                 what came out, what could not be read

The same command on the same folder resumes. Another recipe on it is refused, with the keys that differ.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from kinfold import checkpoint
from kinfold.errors import UserError
from kinfold.log import json_ready
from kinfold.reading import differences, parse, plain, read_text, read_yaml, to_yaml
from kinfold.recipe import Recipe, Run


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Lend the name of a file that takes the place of `path` when all is written to it, also after a power cut.

    Raises `UserError` where the disk refuses; then `path` is as it was.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} could not be written: {reason}. Free some space or choose another out=.") from None
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all. Raises `UserError` where the disk refuses."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


WRITTEN = ("run.yaml", "metrics.jsonl", "summary.json", "backbone.safetensors", "backbone.md", "encoder.safetensors")
"""what a run writes beside recipe.yaml and checkpoints"""


def open_run_folder(recipe: Recipe, run: Run) -> Path:
    """Look whether the folder `run.out` can be that of `recipe`, and change nothing; returns it.

    Raises `UserError` where it belongs to another recipe or to no run, is a file, or cannot be written.
    """
    folder = Path(run.out)
    stored = folder / "recipe.yaml"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out: {folder} is a file. Choose a folder that does not exist yet, or that of an earlier run.")
    if stored.exists():
        apart = differences(plain(recipe), read_yaml(read_text(stored), source=str(stored)))
        if apart:
            raise UserError(
                f"out: {folder} belongs to a run with another recipe. They differ (asked for here, stored there):\n  "
                + "\n  ".join(apart)
                + "\nChoose another out=, or give the same recipe to resume."
            )
    elif folder.is_dir() and (folder / "checkpoints").is_dir() and any((folder / "checkpoints").glob("*.pt")):
        raise UserError(
            f"out: {folder} has checkpoints but no recipe.yaml, so it is unclear whose. Choose another out=."
        )
    elif mine := [name for name in WRITTEN if (folder / name).exists()]:
        raise UserError(
            f"out: {folder} holds {', '.join(mine)}, which a run would write over, but no recipe.yaml, so no run has "
            "made it. Choose another out=."
        )
    above = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"out: {folder} cannot be written: {above} takes no files. Choose another out=.")
    return folder


@contextmanager
def claimed(folder: Path, recipe: Recipe, run: Run, *, standing: list[Path]) -> Iterator[None]:
    """Make the folder that of this run, with `recipe.yaml` and `run.yaml`, and keep others out until it is done.

    Entered when everything else that was given has been found good, so that a mistake leaves nothing behind that would
    refuse its own correction. `standing` are the checkpoints that were there when the newest was read. Raises
    `UserError` where the folder cannot be written, or another process has written checkpoints to it meanwhile.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out: {folder} could not be made: {error.strerror}. Choose another out=.") from None
    with held(folder):
        if checkpoint.standing(folder) != standing:
            raise UserError(f"out: another process has gone on in {folder} meanwhile. Give the same command again.")
        if not (folder / "recipe.yaml").exists():
            write_text(folder / "recipe.yaml", to_yaml(recipe))
        write_text(folder / "run.yaml", to_yaml(run))
        yield


@contextmanager
def held(folder: Path, *, patience: float = 10.0, option: str = "out=") -> Iterator[None]:
    """Keep other runs out of a folder while this one is at work in it, on systems that have file locks.

    `option` is how a person names the folder. Waits `patience` seconds, in which the worker processes of a killed run
    give up. Raises `UserError` after that.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    place = os.open(folder, os.O_RDONLY)
    try:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{option.rstrip('=')}: another process is at work in {folder}. Wait for it, stop it, or "
                        f"choose another {option}."
                    ) from None
                time.sleep(0.2)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        # Let go of it by name: a child that was forked meanwhile has the file open too.
        with suppress(OSError):
            fcntl.flock(place, fcntl.LOCK_UN)
        os.close(place)


def read_recipe(folder: Path) -> Recipe:
    """Read the recipe of a run folder. Raises `UserError` where the folder is none."""
    stored = folder / "recipe.yaml"
    if not stored.is_file():
        raise UserError(
            f"{folder} is no run folder: it has no recipe.yaml. Give the folder that `kinfold pretrain` wrote."
        )
    return parse(Recipe, read_yaml(read_text(stored), source=str(stored)), source=str(stored))


def write_encoder(folder: Path, encoder: nn.Module) -> Path:
    """Write backbone, head and predictor of a query encoder to `encoder.safetensors`, whole or not at all."""
    path = folder / "encoder.safetensors"
    with whole(path) as partial:
        # Copies: safetensors refuses tensors that are not contiguous.
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in encoder.state_dict().items()}, partial)
    return path


def write_summary(folder: Path, summary: dict[str, Any]) -> Path:
    """Write what came out of a run to `summary.json`."""
    path = folder / "summary.json"
    write_text(path, json.dumps(json_ready(summary), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return path
