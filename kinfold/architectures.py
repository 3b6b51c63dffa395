# SPDX-License-Identifier: Apache-2.0
"""The name of an architecture from the names and shapes of its weights.

ResNets tell their blocks and widths, vision transformers their width, depth and patch. What weights do not tell is said
by whoever knows the source: the stride of a 3x3 stem, and how many heads the attention of a transformer has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import timm
from timm.layers.attention import Attention
from torch import Tensor, nn

from kinfold.encoders import Backbone

Blocks = tuple[int, ...]

_BASIC: dict[Blocks, str] = {(2, 2, 2, 2): "resnet18", (3, 4, 6, 3): "resnet34"}
_SLIM: dict[Blocks, str] = {(1, 1, 1, 1): "resnet10", (2, 2, 2, 2): "resnet18"}
# Blocks a stage, and of the first 3x3 convolution how many channels it gives and how many each of them sees.
_BOTTLENECK: dict[tuple[Blocks, int, int], str] = {
    ((2, 2, 2, 2), 64, 64): "resnet26",
    ((3, 4, 6, 3), 64, 64): "resnet50",
    ((3, 4, 6, 3), 128, 128): "wide_resnet50_2",
    ((3, 4, 6, 3), 128, 4): "resnext50_32x4d",
    ((3, 4, 23, 3), 64, 64): "resnet101",
    ((3, 4, 23, 3), 128, 128): "wide_resnet101_2",
    ((3, 4, 23, 3), 128, 4): "resnext101_32x4d",
    ((3, 4, 23, 3), 256, 8): "resnext101_32x8d",
    ((3, 4, 23, 3), 256, 4): "resnext101_64x4d",
    ((3, 8, 36, 3), 64, 64): "resnet152",
}
_VIT = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large", (1280, 32): "huge"}
_MOCO_HEADS = {192: 12, 384: 12}


def architecture_of(state: Mapping[str, Tensor]) -> Backbone | None:
    """Name the network that has these weights; None where it is none that is known.

    The name says what it looks like; only filling that network with all weights shows that it is one. A 3x3 stem is
    taken for `small`: stride 1 and no max-pool, as in all papers at 32 px.
    """
    return _resnet(state) or _vit(state)


def _resnet(state: Mapping[str, Tensor]) -> Backbone | None:
    first, inner = state.get("conv1.weight"), state.get("layer1.0.conv2.weight")
    if first is None or inner is None or first.dim() != 4 or inner.dim() != 4:
        return None
    blocks = tuple(
        len({m[1] for k in state if (m := re.match(rf"layer{stage}\.(\d+)\.", k))}) for stage in (1, 2, 3, 4)
    )
    width = inner.shape[0]
    if "layer1.0.conv3.weight" in state:
        name = _BOTTLENECK.get((blocks, inner.shape[0], inner.shape[1]))
    elif width == 64 and blocks in _BASIC:
        name = _BASIC[blocks]
    else:
        name = f"{_SLIM[blocks]}_w{width}" if blocks in _SLIM else None
    kernel = tuple(first.shape[2:])
    if name is None or kernel not in ((7, 7), (3, 3)):
        return None
    return Backbone(name=name, stem="standard" if kernel == (7, 7) else "small")


def _vit(state: Mapping[str, Tensor]) -> Backbone | None:
    patches, positions = state.get("patch_embed.proj.weight"), state.get("pos_embed")
    if patches is None or positions is None or patches.dim() != 4 or positions.dim() != 3:
        return None
    depth = len({m[1] for k in state if (m := re.match(r"blocks\.(\d+)\.", k))})
    kind = _VIT.get((patches.shape[0], depth))
    side = math.isqrt(positions.shape[1] - 1)
    patch = patches.shape[2]
    name = f"vit_{kind}_patch{patch}_{side * patch}"
    if kind is None or side * side != positions.shape[1] - 1 or not timm.is_model(name):
        return None
    return Backbone(name=name)


def heads_of(state: Mapping[str, Tensor]) -> int | None:
    """How many heads the attention has where it is another number than timm's; None where it is timm's.

    MoCo v3's small transformer has 12 heads of 32 and not 6 of 64 (facebookresearch/moco-v3 vits.py), and solo-learn's
    tiny one 12 as well. The weights have the same shapes; what gives them away is that positions are fixed there, and
    that of the class token is zero.
    """
    positions = state.get("pos_embed")
    if positions is None or positions.dim() != 3 or bool(positions[:, 0].any()):
        return None
    return _MOCO_HEADS.get(positions.shape[2])


def set_heads(backbone: nn.Module, heads: int) -> None:
    """Give the attention of a timm transformer another number of heads; its weights stay as they are."""
    for module in backbone.modules():
        if isinstance(module, Attention):
            module.num_heads, module.head_dim = heads, module.num_heads * module.head_dim // heads
            module.scale = module.head_dim**-0.5


def heads_in(backbone: nn.Module) -> int | None:
    """How many heads the attention of a network has; None where it has no attention."""
    return next((module.num_heads for module in backbone.modules() if isinstance(module, Attention)), None)
