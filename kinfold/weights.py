# SPDX-License-Identifier: Apache-2.0
"""The start of a backbone from a local file, in the shapes that people's files have.

Published weights are often wrapped: in a dictionary beside an optimiser, in a training wrapper's prefix, as one of two
encoders, or with a classifier. What surely is no part of the backbone is taken off; everything else has to fit exactly.
"""

from __future__ import annotations

import argparse
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from timm.models import adapt_input_conv
from timm.models.resnet import ResNet
from torch import Tensor, nn

from kinfold.errors import UserError

# A teacher is the better of the two encoders: it stands first.
_WRAPPERS = ("teacher", "student", "state_dict", "model", "backbone")
# Where one of these prefixes is, the backbone is behind it, and the rest is heads, predictors, queues, other encoders.
_PREFIXES = ("teacher.", "student.", "encoder_q.", "backbone.")
_CLASSIFIER = re.compile(r"(fc|head|head_dist|classifier)\.")


def load_backbone_weights(backbone: nn.Module, path: Path) -> None:
    """Load weights from a local file: safetensors, or a tensors-only checkpoint; nothing in it is run.

    The file may be a plain state dict, Kinfold's own `encoder.safetensors`, or a checkpoint of MoCo (`encoder_q`) or
    DINO (`teacher` before `student`), wrapped as `state_dict` or `model`, with the prefixes `module.` and `backbone.`.
    Classifiers are left out. A first convolution for 3 channels is adapted to the backbone's as timm does: summed for
    one, repeated and scaled for others. Raises `UserError` when keys are missing or unknown, or shapes differ, naming
    them; the backbone is then as it was.
    """
    own = backbone.state_dict()
    state = _bare(_read(path), own)
    first = f"{_first_convolution(backbone)}.weight"
    if first in own and first in state:
        state[first] = _adapt(state[first], own[first])
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    missing = [k for k in missing if not k.endswith("num_batches_tracked")]
    shapes = sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
    if shapes == [first] and not missing and not unknown:
        _same_stem(backbone, path, theirs=state[first], ours=own[first])
    if missing or unknown or shapes:
        parts = [
            f"{what} {', '.join(names[:4])}{' …' if len(names) > 4 else ''}"
            for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
            if names
        ]
        raise UserError(
            f"weights: {path} does not fit the backbone: {'; '.join(parts)}. Check backbone.name, backbone.stem and "
            "the number of channels."
        )
    backbone.load_state_dict(state, strict=False)


def _read(path: Path) -> dict[str, Any]:
    """What is in the file, with every dictionary around the weights taken off."""
    if not path.is_file():
        raise UserError(f"weights: there is no file {path}. Give a .safetensors or .pth file.")
    state: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            # DINO keeps its command line beside the weights: a namespace, which holds values and runs nothing.
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, pickle.UnpicklingError):  # torch's message goes on to recommend the danger
            reason = "it is no checkpoint, or holds objects besides tensors"
        raise UserError(
            f"weights: {path} could not be read as tensors ({reason}). Give a .safetensors file "
            "or a checkpoint that holds only tensors; files that would run code are refused."
        ) from error
    if not isinstance(state, dict):
        raise UserError(f"weights: {path} holds no tensors by name, but a {type(state).__name__}. Give a state dict.")
    weights: dict[str, Any] = state
    while inner := next((weights[name] for name in _WRAPPERS if isinstance(weights.get(name), dict)), None):
        weights = inner
    return weights


def _bare(state: dict[str, Any], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that the backbone itself would give them, without classifiers."""
    state = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}
    before: dict[str, Tensor] | None = None
    while before is None or before.keys() != state.keys():
        before = state
        if not any(k.startswith("module.") for k in own):
            state = {k.removeprefix("module."): v for k, v in state.items()}
        for prefix in _PREFIXES:
            inside = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            if inside and not any(k.startswith(prefix) for k in own):
                state = inside
                break
    return {k: v for k, v in state.items() if k in own or not _CLASSIFIER.match(k)}


def _first_convolution(backbone: nn.Module) -> str:
    """The name of the module that sees the image; empty where the architecture does not say."""
    about = getattr(backbone, "pretrained_cfg", None) or {}
    name = about.get("first_conv") or ("conv1" if isinstance(backbone, ResNet) else "")
    return name if isinstance(name, str) else ""


def _adapt(theirs: Tensor, ours: Tensor) -> Tensor:
    """A convolution `[O, 3, h, w]` for as many channels as `ours` `[O, C, h, w]` has; any other shape as it is."""
    if theirs.dim() == 4 and ours.dim() == 4 and theirs.shape[1] == 3 and ours.shape[1] != 3:
        return adapt_input_conv(ours.shape[1], theirs)  # [O, C, h, w]
    return theirs


def _same_stem(backbone: nn.Module, path: Path, *, theirs: Tensor, ours: Tensor) -> None:
    """Raise `UserError` where a ResNet fits but for the size of its first kernel, which backbone.stem decides."""
    if not isinstance(backbone, ResNet) or theirs.dim() != 4 or theirs.shape[:2] != ours.shape[:2]:
        return
    if isinstance(backbone.maxpool, nn.Identity):
        stem, other = ("small" if backbone.conv1.stride == (1, 1) else "small-stride2"), "standard"  # type: ignore[union-attr]
    else:
        stem, other = "standard", "small"
    sizes = [f"{kernel.shape[2]}x{kernel.shape[3]}" for kernel in (theirs, ours)]
    raise UserError(
        f"weights: {path} does not fit the backbone: its first convolution is {sizes[0]}, stem: {stem} has {sizes[1]}. "
        f"Use backbone.stem={other}."
    )
