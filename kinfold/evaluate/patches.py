# SPDX-License-Identifier: Apache-2.0
"""Patches: a linear classifier on the maps of a frozen backbone says of which class each pixel is.

It asks what the features hold place by place, where `linear` asks for the whole image and `segmentation` lets the
backbone learn on. Any ResNet, and any network of timm that gives its intermediate maps: vision transformers (a feature
a patch), ConvNeXt and others. Logits are interpolated to the pixels; whole images are asked at their own size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from kinfold import distributed
from kinfold.errors import UserError
from kinfold.evaluate.backbones import FrozenBackbone
from kinfold.evaluate.features import frozen
from kinfold.evaluate.resnet import parts
from kinfold.evaluate.segmentation.masked import Masked, checked
from kinfold.evaluate.segmentation.pixels import PixelTraining, ask, fit, upsample
from kinfold.randomness import WEIGHTS, seed_of
from kinfold.settings import settings


@final
@settings
class Patches(PixelTraining):
    """A linear classifier of the places of a frozen backbone's maps."""

    optimizer: Literal["sgd", "adamw"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0.0)] = 1e-3
    layers: Annotated[tuple[int, ...], Field(min_length=1)] = (-1,)
    """stages of a ResNet, blocks of a transformer, counted from 0 or, as -1, from the end; several are joined"""
    batch_norm: bool = True
    """normalise each feature over the places of the batch before the classifier; nothing is learned in it"""

    def at_size(self, size: int, resize: int | None) -> Patches:
        """The same protocol on training crops of another side; test images keep their size."""
        return replace(self, crops=replace(self.crops, size=size))


@final
class Probe(nn.Module):
    """Images [B, c, H, W] to the logits of their pixels [B, C, H, W]: frozen maps, and a classifier that is trained."""

    def __init__(self, maps: FrozenMaps, *, classes: int, batch_norm: bool) -> None:
        super().__init__()
        self.maps = maps
        self.norm = nn.BatchNorm2d(maps.width, affine=False) if batch_norm else nn.Identity()
        self.linear = nn.Conv2d(maps.width, classes, 1)
        nn.init.zeros_(self.linear.bias)  # type: ignore[arg-type]  # it has one

    def forward(self, images: Tensor) -> Tensor:
        """Give the logits of every pixel."""
        logits = self.linear(self.norm(self.maps(images)))  # [B, C, h, w]
        size = images.shape[2], images.shape[3]
        return upsample(logits, size, stride=self.maps.stride, first=self.maps.first)  # [B, C, H, W]


@final
class FrozenMaps:
    """Images [B, c, H, W] to the joined maps [B, F, h, w] of some layers, as fine as the finest of them.

    The backbone is lent for each call. Raises `UserError` where it gives no maps, or has no such layer.
    """

    width: int
    """F, features at each place"""
    stride: int
    """pixels between two places"""
    first: float
    """the pixel that the first place looks at"""

    def __init__(self, backbone: FrozenBackbone, layers: tuple[int, ...]) -> None:
        self._module, self._of = backbone.module, backbone.description
        self._maps, centred = _maps_of(backbone, layers)
        self._centred = centred
        self._cell = 1
        # Images are filled up to whole cells where a network cuts them into patches; convolutions have no such borders.
        side = 257 if centred else backbone.size
        image = next(self._module.parameters()).new_zeros(1, backbone.channels, side, side)  # [1, c, side, side]
        with frozen(self._module):
            found = self._given(image)
        strides = [max(1, round((side - centred) / max(each.shape[-1] - centred, 1))) for each in found]
        self.width = sum(each.shape[1] for each in found)
        self.stride = min(strides)
        self.first = 0.0 if centred else (self.stride - 1) / 2
        self._coarser = [stride // self.stride for stride in strides]
        self._cell = 1 if centred else max(strides)
        with frozen(self._module):
            self._given(image.new_zeros(1, backbone.channels, side, side + max(strides)))

    def __call__(self, images: Tensor) -> Tensor:
        """Give the maps; without gradients."""
        below, beside = (-length % self._cell for length in images.shape[2:])
        with frozen(self._module):
            maps = self._given(F.pad(images, (0, beside, 0, below)))
        height, width = maps[self._coarser.index(1)].shape[2:]
        # Each place of a coarser map goes where it looks, so that what is joined is of the same pixels.
        joined = [
            m
            if times == 1
            else upsample(m, (height, width), stride=times, first=0.0 if self._centred else (times - 1) / 2)
            for m, times in zip(maps, self._coarser)
        ]
        return torch.cat(joined, dim=1).float()  # [B, F, h, w]

    def _given(self, images: Tensor) -> list[Tensor]:
        try:
            return self._maps(images)
        except (AssertionError, RuntimeError, ValueError, IndexError) as error:
            raise UserError(
                f"{self._of} gives no maps of images of {images.shape[3]} x {images.shape[2]} pixels "
                f"({' '.join(str(error).split())[:200]}). Other layers may be there, or the network takes one size "
                "only: ResNets, ConvNeXts and vision transformers with dynamic_img_size take any."
            ) from error


def patches(backbone: FrozenBackbone, data: Masked, settings: Patches) -> dict[str, float]:
    """Train a linear classifier on the maps and ask for every pixel of the test images: in percent.

    The values are those of `segmentation`. The backbone stays as it is, to the bit. Raises `UserError` where it gives
    no maps, or a test image cannot be used.
    """
    backbone.module.to(data.device)
    probe = build_probe(backbone, len(data.train.classes), settings).to(data.device)
    train, held = checked(data, channels=backbone.channels)
    if distributed.world() > 1 and torch.device(data.device).type == "cuda":
        probe = nn.SyncBatchNorm.convert_sync_batchnorm(probe)  # type: ignore[no-untyped-call]
    fit(probe.train(), train, data, settings, backbone)
    return ask(probe, held, data, backbone)


def build_probe(backbone: FrozenBackbone, classes: int, settings: Patches) -> Probe:
    """Make the classifier of a backbone's maps; its first weights are a function of the seed, its biases zero."""
    probe = Probe(FrozenMaps(backbone, settings.layers), classes=classes, batch_norm=settings.batch_norm)
    generator = torch.Generator().manual_seed(seed_of(WEIGHTS, settings.seed))
    nn.init.normal_(probe.linear.weight, std=0.01, generator=generator)
    return probe


def _maps_of(backbone: FrozenBackbone, layers: tuple[int, ...]) -> tuple[Callable[[Tensor], list[Tensor]], bool]:
    """What gives the maps of the layers, and whether its places look at pixels 0, stride, 2 · stride, … (ResNets)."""
    module: Any = backbone.module
    try:
        body = parts(module, of=backbone.description)
    except UserError as error:
        if not hasattr(module, "forward_intermediates"):
            raise UserError(
                f"{backbone.description} gives no maps: it is neither a ResNet nor a network of timm with "
                "forward_intermediates. Give one of those."
            ) from error
        return lambda images: list(
            module.forward_intermediates(images, indices=list(layers), norm=True, intermediates_only=True)
        ), False
    count = len(body.stages)
    wrong = [layer for layer in layers if not -count <= layer < count]
    if wrong:
        raise UserError(f"layers: {backbone.description} has stages 0 to {count - 1}, but {wrong[0]} was asked for.")
    wanted = sorted({layer % count for layer in layers})

    def maps(images: Tensor) -> list[Tensor]:
        x, found = body.stem(images), []  # [B, c, h, w]
        for stage in body.stages[: wanted[-1] + 1]:
            x = stage(x)
            found.append(x)
        return [found[place] for place in wanted]

    return maps, True
