# SPDX-License-Identifier: Apache-2.0
"""A `Recipe` holds everything that decides a result; a `Run` says where and how it is computed.

A recipe never holds a path or a piece of hardware, and what can be derived is no setting. Recipes are YAML, complete
and flat; on the command line `key=value` changes single settings, of the recipe or of the run, by their dotted names.
What is unknown or of a wrong type is refused at load time, with its path and the nearest right name.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from kinfold.encoders import Backbone, BatchNorm, Head
from kinfold.errors import UserError
from kinfold.memory import BankMemory, MemorySettings
from kinfold.methods import InvP, MethodSettings
from kinfold.optim import KeyMomentum, OptimizerSettings, RateSettings
from kinfold.reading import assign, parse, read_text, read_yaml
from kinfold.settings import Count, settings
from kinfold.views import PRESETS, Views

RECIPES = Path(__file__).parent / "recipes"


@settings
class Images:
    """What the images are, as numbers."""

    channels: Count = 3
    """1 for greyscale, 3 for RGB, more for multispectral arrays"""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """mean of each channel on [0, 1]; ImageNet's unless given"""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """standard deviation of each channel on [0, 1]; ImageNet's unless given"""
    scaled_decode: bool = False
    """decode JPEGs at 1/2, 1/4 or 1/8 of their size where every view's crop keeps 1.5 times its pixels: faster for
    large photos; pixels differ by about one level of 255 on average. For images that workers decode"""

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.channels:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} numbers for {self.channels} channels; give one a channel"
                )
        if min(self.std) <= 0:
            raise ValueError("std: standard deviations are above zero")


@settings
class Recipe:
    """Everything that decides the result of a pretraining, and nothing else."""

    method: MethodSettings
    memory: MemorySettings
    views: Views
    images: Images = Field(default_factory=Images)
    backbone: Backbone = Field(default_factory=Backbone)
    head: Head = Field(default_factory=Head)
    predictor: Head | None = None
    """behind the query encoder's head only (SCE on ImageNet)"""
    batch_norm: BatchNorm = Field(default_factory=BatchNorm)
    key_momentum: KeyMomentum = Field(default_factory=KeyMomentum)
    optimizer: OptimizerSettings
    learning_rate: RateSettings
    batch_size: Count
    """images a step over all devices; each device has its share"""
    accumulate: Count = 1
    """parts in which a device goes through its share, where it does not fit at once; batch norm sees one part"""
    drop_last: bool = True
    """leave out the last, smaller batch of an epoch; InvP keeps it"""
    epochs: Count
    precision: Literal["bf16", "fp32"] = "bf16"
    """number format of the encoders on devices that have bf16; elsewhere, and for every loss, fp32"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    def __post_init__(self) -> None:
        if self.memory.name not in self.method.memories:
            raise ValueError(
                f"memory.name: {self.method.name} stands on a memory of kind {' or '.join(self.method.memories)}, "
                f"but got {self.memory.name!r}"
            )
        if isinstance(self.memory, BankMemory) == bool(self.views.keys):
            raise ValueError(
                "views.pairs: a bank has no key encoder, so its pairs are [[0, null]]; a queue or batch needs a key "
                "view, as in [[0, 1]]"
            )
        if self.predictor is not None and self.predictor.out != self.head.out:
            raise ValueError(
                f"predictor.out: must be head.out ({self.head.out}), because predictions meet keys, but got "
                f"{self.predictor.out}"
            )
        paper = isinstance(self.method, InvP) and self.method.sets == "paper"
        if isinstance(self.memory, BankMemory) and self.memory.repeats == paper:
            raise ValueError(
                f"memory.repeats: method.sets: {'paper' if paper else 'code'} goes with "
                f"repeats: {'false' if paper else 'true'}"
            )
        if self.memory.name == "batch" and (self.batch_size // self.accumulate < 2 or not self.drop_last):
            raise ValueError(
                "memory.name: with batch the other images of the batch are all there is to compare with: it needs "
                "batch_size of at least 2 in each of the accumulated parts, and drop_last: true"
            )
        if self.batch_norm.synchronise and max(self.batch_norm.query_splits, self.batch_norm.key_splits) > 1:
            raise ValueError("batch_norm.synchronise: statistics over the whole batch and splits exclude each other")
        for name in ("query_splits", "key_splits"):
            splits, part = getattr(self.batch_norm, name), self.batch_size // self.accumulate
            if splits > 1 and part < 2 * splits:
                raise ValueError(
                    f"batch_norm.{name}: {splits} groups of a batch of {part} have fewer than 2 images each, too few "
                    "to normalise; use fewer splits or a larger batch_size"
                )
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate: {self.accumulate} does not divide batch_size {self.batch_size}")


@settings
class Run:
    """What a recipe is computed on, where and how.

    `data`, `split`, `limit` and `weights` say what is learned from, and so decide the result too; the rest is not
    meant to change it.
    """

    data: str
    """a folder of images, a parquet file or folder, a tar of shards, `hf:owner/name`, or `digits`"""
    out: str
    """the run folder; the same command on it resumes"""
    split: str = "train"
    """which split of the data to learn from, where it has splits"""
    limit: Count | None = None
    """learn from this many images only, spread evenly over the set"""
    weights: str | None = None
    """local file with backbone weights to start from (safetensors or tensors-only checkpoint)"""
    device: str = "auto"
    """`auto` takes CUDA where there is one; `cpu`, `cuda`, `cuda:1`, `mps`"""
    workers: Annotated[int, Field(ge=0)] | None = None
    """processes that decode images; none for sets that live on the device, else one a core up to 16, if not given"""
    decode: Literal["cpu", "device"] = "cpu"
    """`device`: JPEGs are decoded by an NVIDIA device, at each step, for machines with few cores a device; its pixels
    are not those of `cpu`, above all beside coloured edges, so the two do not train to the same bits"""
    resident: bool | None = None
    """keep the decoded set on the device; decided by its size if not given, and never with `decode=device`"""
    compile: Literal[False, True, "graphs"] = False
    """compile the encoders (torch.compile): slower to start, then faster; `graphs` also replays them as CUDA graphs,
    for small models on one GPU"""
    log_every: Count = 10
    """steps between lines of metrics.jsonl; a GPU is waited for at these steps"""
    checkpoint_every: Count = 1
    """epochs between checkpoints"""
    checkpoint_steps: Count | None = None
    """steps between checkpoints, in addition; for epochs that take hours"""
    probe_every: Annotated[int, Field(ge=0)] = 5
    """epochs between probes; 0 for none"""
    probe_data: str | None = None
    """labelled images for the k-NN probe; a test or validation split of `data` if there is one, else held-out ones"""
    probe_limit: Count = 5000
    """at most this many images on each side of a probe"""
    tensorboard: bool = False
    wandb: str | None = None
    """project name on Weights & Biases"""


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package, such as `sce/cifar10`."""
    return sorted(
        path.relative_to(RECIPES).with_suffix("").as_posix()
        for path in RECIPES.rglob("*.yaml")
        if path.relative_to(RECIPES).parts[0] != "evaluate"
    )


def find_recipe(name: str, *, folder: Path = RECIPES) -> Path:
    """Find a recipe by its name or as a file. Raises `UserError` with the nearest names if there is none."""
    for path in (folder / f"{name}.yaml", Path(name)):
        if os.path.isfile(path):  # Path.is_file raises for a name that is too long
            return path
    names = sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml"))
    ends = [n for n in names if name in n]
    near = ends or difflib.get_close_matches(name, names, n=4, cutoff=0.4)
    hint = f" Did you mean {', '.join(near[:4])}?" if near else ""
    raise UserError(f"There is no recipe {name!r}, and no such file.{hint} `kinfold recipes` lists them all.")


def load(
    recipe: str = "own-images", overrides: Sequence[str] = (), *, run: dict[str, Any] | None = None
) -> tuple[Recipe, Run]:
    """Read a recipe by name or file, change it as the `key=value` words say, and check all of it.

    Words whose first name is a setting of `Run` change the run. Raises `UserError` with the path of what is wrong.
    """
    path = find_recipe(recipe)
    values = read_yaml(read_text(path), source=str(recipe))
    if not isinstance(values, dict):
        found = {"NoneType": "nothing", "list": "a list"}.get(type(values).__name__, "a single value")
        raise UserError(f"{recipe}: a recipe is a mapping of settings (name: value), but this file holds {found}.")
    run_values: dict[str, Any] = dict(run or {})
    run_names = {f.name for f in fields(Run)}  # type: ignore[arg-type]
    recipe_settings = {f.name for f in fields(Recipe)}  # type: ignore[arg-type]
    for word in overrides:
        key, sign, text = word.partition("=")
        if not sign or not key:
            raise UserError(f"{word!r} is no setting. Write key=value, for example epochs=100 or workers=4.")
        value = read_yaml(text, source=word) if text.strip() else None
        first = key.split(".")[0]
        if first in run_names:
            run_values[key] = value
        elif first in recipe_settings:
            assign(values, key, value)
        else:
            near = difflib.get_close_matches(first, sorted(run_names | recipe_settings), n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UserError(f"{key}: there is no such setting.{hint} `kinfold recipes show NAME` shows them.")
    return parse(Recipe, values, source=str(recipe)), parse(Run, run_values, source="run")


def json_schema() -> dict[str, Any]:
    """The JSON schema of recipe files, presets of views (`like: moco-v2`) included."""
    schema = TypeAdapter(Recipe).json_schema()
    schema["$defs"]["Augmentation"]["properties"]["like"] = {
        "enum": list(PRESETS),
        "description": "a preset, under the settings that stand beside it",
    }
    return schema
