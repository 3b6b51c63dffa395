# SPDX-License-Identifier: Apache-2.0
"""Backbones to evaluate: a run's, an exported file's, anybody's checkpoint, or what timm and torchvision publish."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from kinfold.encoders import Backbone, Encoder, build_backbone, build_head, feature_width
from kinfold.errors import UserError
from kinfold.export import read_backbone, rebuild_backbone
from kinfold.layouts import IMAGENET
from kinfold.run_folder import read_recipe
from kinfold.weights import import_backbone

Layer = Literal["backbone", "head"]

_LARGE, _SMALL = 224, 32


@dataclass(frozen=True, kw_only=True, eq=False)
class FrozenBackbone:
    """A network as evaluation sees it: what it is, and which images it wants."""

    module: nn.Module
    """[B, C, H, W] to features [B, F]"""
    head: nn.Module | None = None
    """[B, F] to [B, D]: the head that it was trained with, where that is known"""
    size: int
    """side of its images in pixels"""
    resize: int | None = None
    """short side of an image before the central crop; chosen by the images if not given (`resize_for`)"""
    channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    description: str = "backbone"
    """one line for people"""
    folder: Path | None = None
    """the run folder that it comes from"""

    def network(self, layer: Layer) -> nn.Module:
        """What gives the features of `layer`: the backbone's, or the unit vectors behind the head.

        Raises `UserError` where the head is asked for and not known.
        """
        if layer == "backbone":
            return self.module
        if self.head is None:
            raise UserError(
                f"features: the head was asked for, but {self.description} has none. Give a run folder, which keeps "
                "the head in encoder.safetensors, or set features=backbone."
            )
        return Encoder(self.module, self.head)

    def to(self, device: str | torch.device) -> FrozenBackbone:
        """Move the network to a device; returns itself."""
        self.module.to(device)
        if self.head is not None:
            self.head.to(device)
        return self


def hash_of(module: nn.Module | None) -> str | None:
    """SHA-256 over names, types, shapes and bytes of all weights: equal weights have it equal in any file."""
    return None if module is None else hash_tensors(module.state_dict())


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_backbone(what: str) -> FrozenBackbone:
    """Load the backbone that `what` names, onto the CPU.

    A run folder; a `.safetensors` file that `kinfold export` wrote; a checkpoint of others (`kinfold.layouts`);
    `timm:NAME` or `torchvision:NAME` with their published weights. Raises `UserError` that says what is missing.
    """
    kind, sign, name = what.partition(":")
    if sign and kind == "timm":
        return _from_timm(name)
    if sign and kind == "torchvision":
        return _from_torchvision(name)
    path = Path(what).expanduser()
    if path.is_dir():
        return _from_run(path)
    if path.is_file():
        if path.name == "encoder.safetensors" and (path.parent / "recipe.yaml").is_file():
            return _from_run(path.parent)
        return _from_file(path) if _is_export(path) else _from_elsewhere(path)
    raise UserError(
        f"{what!r} names no backbone: there is no such file. Give a run folder, a .safetensors file or another "
        "checkpoint (.pth, .pth.tar, .ckpt, ...), timm:NAME or torchvision:NAME."
    )


def _from_run(folder: Path) -> FrozenBackbone:
    """The backbone of a run, and its head where `encoder.safetensors` is there."""
    recipe = read_recipe(folder)
    path = folder / "backbone.safetensors"
    if not path.is_file():
        raise UserError(
            f"{folder} has no backbone.safetensors: its run has not written one yet. Run the same `kinfold pretrain` "
            "command again to finish it."
        )
    state, _ = read_backbone(path)
    module = build_backbone(replace(recipe.backbone, pretrained=False), recipe.images.channels)
    _fill(module, state, path)
    head: nn.Module | None = None
    encoder = folder / "encoder.safetensors"
    if encoder.is_file():
        whole = _tensors(encoder)
        head = build_head(recipe.head, feature_width(module))
        _fill(head, {k.removeprefix("head."): v for k, v in whole.items() if k.startswith("head.")}, encoder)
    return FrozenBackbone(
        module=module,
        head=head,
        size=recipe.views.augment[0].size,
        channels=recipe.images.channels,
        mean=recipe.images.mean,
        std=recipe.images.std,
        description=f"{recipe.backbone.name} of the run {folder.name} ({recipe.method.name})",
        folder=folder,
    )


def _from_file(path: Path) -> FrozenBackbone:
    """The backbone of a file whose metadata say what it is."""
    module, about = rebuild_backbone(path)
    usual = _LARGE if about["stem"] == "standard" else _SMALL
    return FrozenBackbone(
        module=module,
        size=int(about.get("size", usual)),
        channels=int(about["channels"]),
        mean=tuple(float(m) for m in json.loads(about["mean"])),
        std=tuple(float(s) for s in json.loads(about["std"])),
        description=f"{about['name']} from {path.name}",
    )


def _is_export(path: Path) -> bool:
    """Whether a file says that `kinfold export` or a run has written it."""
    if path.suffix != ".safetensors":
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return "kinfold_format" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False  # who reads it in full says what is wrong


def _from_elsewhere(path: Path) -> FrozenBackbone:
    """The backbone of somebody's checkpoint; what the weights do not say is as its layout has it."""
    imported = import_backbone(path)
    how, layout = imported.how, imported.found.layout
    size = _SMALL
    mean, std = layout.small
    if how.stem == "standard":
        mean, std = IMAGENET
        size = int(getattr(imported.module, "pretrained_cfg", {}).get("input_size", (_LARGE,))[-1])
    if imported.channels != 3:
        mean, std = (0.5,) * imported.channels, (0.5,) * imported.channels
    assumed = [f"{size} pixels", f"mean {', '.join(f'{m:g}' for m in mean)}", *imported.assumed]
    return FrozenBackbone(
        module=imported.module.eval(),
        size=size,
        channels=imported.channels,
        mean=mean,
        std=std,
        description=f"{how.name} from {path.name} (layout: {layout.name}; assumed: {'; '.join(assumed)})",
    )


def _tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}. Copy or write it again.") from error
    return tensors


def _fill(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Put all weights into `module`; every one must be there and fit."""
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{path} does not fit the network that its recipe names: {reason}. Was one of the two replaced?"
        ) from error


def _from_timm(name: str) -> FrozenBackbone:
    known = timm.is_model(name)
    try:
        module: Any = build_backbone(Backbone(name=name, pretrained=True), 3)
    except Exception as error:  # the hub's client has many ways to say that there is no network
        if not known:
            raise
        raise UserError(_offline(f"timm:{name}", error)) from error
    about = module.pretrained_cfg
    size = int(about["input_size"][-1])
    return FrozenBackbone(
        module=module,
        size=size,
        resize=math.floor(size / float(about.get("crop_pct") or 0.875)),
        mean=tuple(about["mean"]),
        std=tuple(about["std"]),
        description=f"timm's {name}",
    )


def _from_torchvision(name: str) -> FrozenBackbone:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise UserError(f"torchvision has no classifier {name!r}; it has {', '.join(known)}.")
    weights = models.get_model_weights(name).DEFAULT
    try:
        module = models.get_model(name, weights=weights)
    except Exception as error:  # urllib's errors, or a hash that does not agree
        raise UserError(_offline(f"torchvision:{name}", error)) from error
    last = [n for n, m in module.named_modules() if isinstance(m, nn.Linear)]
    if not last:
        raise UserError(f"torchvision:{name} does not end in a linear classifier; its features are not defined here.")
    parent, _, child = last[-1].rpartition(".")
    setattr(module.get_submodule(parent), child, nn.Identity())
    transform = weights.transforms()
    return FrozenBackbone(
        module=module,
        size=int(transform.crop_size[0]),
        resize=int(transform.resize_size[0]),
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        description=f"torchvision's {name} ({weights.name})",
    )


def _offline(what: str, error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:  # the first of a chain says it best
        cause = cause.__cause__
    reason = " ".join(str(cause).split())[:200] or type(cause).__name__
    return (
        f"The weights of {what} could not be fetched ({reason}). Connect to the network once, or give a local "
        "run folder or a file with weights."
    )
