# SPDX-License-Identifier: Apache-2.0
"""What a ResNet sees after its stem and after each residual block, in one pass: 17 maps of a ResNet-50.

Each map is pooled by means to a square whose side its stage says, and flattened. Source: InvP
`models/LinearModelMulti.py`, whose sides 12, 6, 4, 3 and 1 give about 9,000 features each (after Zhang et al., 2017).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kinfold.evaluate.backbones import FrozenBackbone
from kinfold.evaluate.features import frozen
from kinfold.evaluate.resnet import Parts, parts


class BlockMaps(nn.Module):
    """Images [B, C, S, S] to the pooled maps of stem and blocks, side by side: [B, Σ widths].

    The modules are the backbone's own, not copies. `sides` has one entry for the stem and one for each stage.
    """

    def __init__(self, backbone: Parts, sides: Sequence[int]) -> None:
        super().__init__()
        self.stem = backbone.stem
        self.blocks = nn.ModuleList(backbone.blocks)
        along = [sides[0]]
        for stage, side in zip(backbone.stages, sides[1:]):
            along += [side] * len(stage)
        self.sides = along
        """of each map, the stem's first"""
        self.widths: list[int] = []
        """features of each map; known when `fit` has seen an image"""

    def forward(self, images: Tensor) -> Tensor:
        """Give the pooled maps, flattened and joined."""
        pooled = [
            F.adaptive_avg_pool2d(x, side).flatten(1)  # [B, c · side²]
            for x, side in zip(self._maps(images), self.sides)
        ]
        return torch.cat(pooled, dim=1)  # [B, Σ widths]

    def fit(self, image: Tensor, say: Callable[[str], None]) -> None:
        """Look at one image [1, C, S, S]: no pool is finer than its map, which would only repeat pixels."""
        small: list[str] = []
        with frozen(self):
            for number, x in enumerate(self._maps(image)):
                least = min(x.shape[2:])
                if least < self.sides[number]:
                    small.append(
                        f"{number} to {least} x {least} instead of {self.sides[number]} x {self.sides[number]}"
                    )
                    self.sides[number] = least
                self.widths.append(x.shape[1] * self.sides[number] ** 2)
        if small:
            side = image.shape[-1]
            say(f"Images of {side} pixels give maps smaller than the pool, so block {', '.join(small)} is pooled.")

    def extra_repr(self) -> str:
        """Name the pools: features of others are other features."""
        return f"sides={self.sides}"

    def _maps(self, images: Tensor) -> Iterator[Tensor]:
        x = self.stem(images)  # [B, c, h, w]
        yield x
        for block in self.blocks:
            x = block(x)
            yield x


def block_maps(
    backbone: FrozenBackbone, sides: Sequence[int], *, size: int, device: torch.device, say: Callable[[str], None]
) -> BlockMaps:
    """Make the maps of `backbone` for images of `size` pixels; `sides` are the pools of stem and four stages.

    Raises `UserError` where the backbone is no ResNet.
    """
    maps = BlockMaps(parts(backbone.module, of=backbone.description), sides).to(device)
    maps.fit(torch.zeros(1, backbone.channels, size, size, device=device), say)
    return maps
