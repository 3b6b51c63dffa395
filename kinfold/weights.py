# SPDX-License-Identifier: Apache-2.0
"""Backbones from local files, in the shapes that people's files have.

Published weights are often wrapped: in a dictionary beside an optimiser, in a training wrapper's prefix, as one of two
encoders, or with a classifier. `kinfold.untrusted` reads the file, `kinfold.layouts` knows where the encoder is in it,
`kinfold.architectures` which network it is; here networks are filled: everything that is left has to fit exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from timm.models import adapt_input_conv
from timm.models.resnet import ResNet
from torch import Tensor, nn

from kinfold.architectures import architecture_of, heads_in, heads_of, set_heads
from kinfold.encoders import Backbone, build_backbone
from kinfold.errors import UserError
from kinfold.layouts import Found, find_encoder, wanted
from kinfold.untrusted import read_checkpoint


def load_backbone_weights(backbone: nn.Module, path: Path) -> None:
    """Load weights from a local file into a backbone: safetensors, or a checkpoint; nothing in it is run.

    The file may be a plain state dict, Kinfold's own `encoder.safetensors`, or a checkpoint of any of
    `kinfold.layouts.LAYOUTS`. Classifiers are left out. A first convolution for 3 channels is adapted to the
    backbone's as timm does: summed for one, repeated and scaled for others. Raises `UserError` when keys are missing
    or unknown, or shapes differ, naming them; the backbone is then as it was.

    Only weights are taken: the first convolution of solo-learn's ResNets for CIFAR has padding 2, that of ours 1.
    """
    own = backbone.state_dict()
    found = find_encoder(read_checkpoint(path, setting="weights: "), own.keys())
    state = dict(found.state)
    first = f"{_first_convolution(backbone)}.weight"
    if first in own and first in state:
        state[first] = _adapt(state[first], own[first])
        if _differing(own, state) == [first] and not _missing(own, state) and not _missing(state, own):
            _same_stem(backbone, path, theirs=state[first], ours=own[first])
    heads = heads_of(state)
    if heads is not None and heads_in(backbone) not in (None, heads):
        raise UserError(
            f"weights: {path} is of a transformer with {heads} heads of attention (MoCo v3's), and timm's of the same "
            f"shapes, which is to be trained here, has {heads_in(backbone)}. Evaluate it as it is with "
            "`kinfold evaluate --backbone`, or start from other weights."
        )
    fill(
        backbone,
        state,
        path,
        found,
        setting="weights: ",
        hint="Check backbone.name, backbone.stem and the number of channels.",
    )


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Imported:
    """A backbone that was built after a checkpoint of others."""

    module: nn.Module
    """[B, C, H, W] to features [B, F]"""
    how: Backbone
    channels: int
    found: Found
    assumed: tuple[str, ...]
    """what the weights cannot say, for people"""


def import_backbone(path: Path) -> Imported:
    """Build the network that a checkpoint of others has, and fill it with all weights of the right encoder.

    Raises `UserError` for a file that cannot be read, a layout or an architecture that is not known, and weights that
    do not fit the architecture that their names and shapes speak of.
    """
    found = find_encoder(read_checkpoint(path))
    how = architecture_of(found.state)
    if how is None:
        raise UserError(
            f"{path}: there is no encoder in it that is known here. It has {found.about()}. Wanted are the weights of "
            f"a ResNet or a vision transformer behind one of these names: {wanted()}. Give such a file; in Python, "
            "FrozenBackbone(module=..., size=...) takes any network."
        )
    first = found.state["conv1.weight" if "conv1.weight" in found.state else "patch_embed.proj.weight"]
    channels = int(first.shape[1])
    module: Any = build_backbone(how, channels)
    assumed = []
    if how.stem == "small":
        padding = found.layout.padding
        module.conv1.padding = (padding, padding)
        assumed.append(f"first convolution of stride 1 and padding {padding}, no max-pool")
    heads = heads_of(found.state)
    if heads is not None:
        set_heads(module, heads)
        assumed.append(f"{heads} heads of attention")
    fill(module, found.state, path, found, hint=f"Its names and shapes looked like those of {how.name}.")
    return Imported(module=module, how=how, channels=channels, found=found, assumed=tuple(assumed))


def fill(
    backbone: nn.Module, state: dict[str, Tensor], path: Path, found: Found, *, hint: str, setting: str = ""
) -> None:
    """Put all weights into a backbone; raises `UserError` that ends in `hint` where one is missing, unknown or unfit.

    Counters of batch norm may be missing (torch before 0.4.1 had none). The backbone is as it was after an error.
    """
    own = backbone.state_dict()
    missing, unknown, shapes = _missing(own, state), _missing(state, own), _differing(own, state)
    if missing or unknown or shapes:
        parts = [
            f"{what} {', '.join(names[:4])}{' …' if len(names) > 4 else ''}"
            for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
            if names
        ]
        has = "" if state.keys() & own.keys() else f" The file has {found.about()}."
        raise UserError(f"{setting}{path} does not fit the backbone: {'; '.join(parts)}.{has} {hint}")
    broken = sorted(k for k, v in state.items() if v.is_floating_point() and not bool(v.isfinite().all()))
    if broken:
        raise UserError(
            f"{setting}{path} holds weights that are not finite numbers, in {', '.join(broken[:4])}"
            f"{' …' if len(broken) > 4 else ''}. Its training had gone wrong; take an earlier checkpoint."
        )
    backbone.load_state_dict(state, strict=False)  # strictly compared above, but for counters


def _missing(needed: dict[str, Tensor], there: dict[str, Tensor]) -> list[str]:
    """Names that are needed and not there, but for the counters of batch norm."""
    return sorted(k for k in needed.keys() - there.keys() if not k.endswith("num_batches_tracked"))


def _differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names that both have, with another shape each."""
    return sorted(k for k in one.keys() & other.keys() if one[k].shape != other[k].shape)


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
