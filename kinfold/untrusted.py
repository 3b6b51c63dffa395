# SPDX-License-Identifier: Apache-2.0
"""Files of tensors from strangers: read with nothing in them run.

Pickles are read by torch's `weights_only` reader. It refuses all but tensors and plain values; checkpoints of training
loops hold their settings besides, which are harmless and of no use here, so a short list of names is stood in for.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from kinfold.errors import UserError


class _Nothing:
    """What stands in for harmless things in a checkpoint that are not needed: it keeps nothing and does nothing."""

    def __new__(cls, *values: object, **named: object) -> _Nothing:
        return object.__new__(cls)

    def __init__(self, *values: object, **named: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


# Settings, counters and paths that training loops keep beside the weights. None of these is imported or made: a
# `_Nothing` or an empty dictionary is put in its place, so that a checkpoint may hold them and still runs nothing.
_HARMLESS = (
    "argparse.Namespace",
    *(f"builtins.{name}" for name in ("dict", "list", "tuple", "int", "float", "str", "bool")),
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "WindowsPath")),
    *(f"pathlib._local.{name}" for name in ("Path", "PosixPath", "WindowsPath")),
    "typing.Any",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"numpy.dtypes.{kind}DType" for kind in ("Float64", "Float32", "Float16", "Int64", "Int32", "Bool", "Str")),
    *(f"omegaconf.{name}Config" for name in ("dictconfig.Dict", "listconfig.List")),
    *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata")),
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "String", "Integer", "Float", "Boolean")),
    *(
        f"{package}.callbacks.{name}"
        for package in ("pytorch_lightning", "lightning.pytorch")
        for name in ("model_checkpoint.ModelCheckpoint", "early_stopping.EarlyStopping")
    ),
)
_HARMLESS_DICTIONARIES = (
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
)
_STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    *((_Nothing, name) for name in _HARMLESS),
    *((OrderedDict, name) for name in _HARMLESS_DICTIONARIES),
]


def read_checkpoint(path: Path, *, setting: str = "") -> dict[str, Any]:
    """Read what a file of tensors holds, onto the CPU, with no code of it run.

    Raises `UserError`, with `setting` in front, that says what the file is instead.
    """
    _look_at(path, setting)
    state: Any
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            with torch.serialization.safe_globals(_STAND_INS), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about how the file was pickled, to whoever had written it
                state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, SafetensorError) as error:  # an archive that ends too early, a disk that fails
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(_unread(path, setting, reason)) from error
    except Exception as error:  # torch's message goes on to recommend the danger; of other files it knows nothing
        named = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        reason = "it is no checkpoint, or was cut short, or holds objects besides tensors"
        if named is not None:
            reason = f"it asks for {named[1]}, which weights_only=True does not run"
        raise UserError(_unread(path, setting, reason)) from error
    if not isinstance(state, dict):
        kind = type(state).__name__
        raise UserError(f"{setting}{path} holds no tensors by name, but a {kind}. Give a state dict.")
    if state.keys() == {"format", "step", "state"}:
        raise UserError(f"{setting}{path} is a checkpoint of a Kinfold run, made to go on with it. Give {_ours(path)}.")
    return state


def _unread(path: Path, setting: str, reason: str) -> str:
    return (
        f"{setting}{path} could not be read as tensors ({reason}). Give a .safetensors file or a checkpoint that "
        "holds only tensors (torch.save(model.state_dict(), ...)), whole; files that would run code are refused."
    )


def _ours(path: Path) -> str:
    run = path.parent.parent
    return f"the run folder {run}" if (run / "recipe.yaml").is_file() else "the run folder, or its backbone.safetensors"


def _look_at(path: Path, setting: str) -> None:
    """Raise `UserError` where a file is seen to be no checkpoint by how it begins."""
    if path.is_dir():
        raise UserError(f"{setting}{path} is a folder. Give a .safetensors or .pth file in it.")
    if not path.is_file():
        raise UserError(f"{setting}there is no file {path}. Give a .safetensors or .pth file.")
    try:
        with path.open("rb") as file:
            start = file.read(256)
    except OSError as error:
        raise UserError(f"{setting}{path} could not be read: {error.strerror}. Check its permissions.") from error
    if not start:
        raise UserError(f"{setting}{path} is empty. Fetch it again.")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{setting}{path} is a pointer of Git LFS and not the file itself. Fetch it with `git lfs pull`."
        )
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{setting}{path} is a web page and not a checkpoint. Fetch the file itself.")
