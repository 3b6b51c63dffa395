# SPDX-License-Identifier: Apache-2.0
"""Segmentation: a fully convolutional network on a ResNet, fine-tuned, as in MoCo's appendix.

The last stage keeps the size of its input: its strides are 1 and its 3x3 convolutions have dilation 2, so the output
has a stride of 16 pixels. Two more 3x3 convolutions (256 channels, dilation 6, batch norm, ReLU) and a 1x1 convolution
give the logits, which are interpolated to the pixels. Everything is trained, batch norm included; over several CUDA
devices its statistics are synchronised. Whole images are asked at their own size. Source: He et al., "Momentum
Contrast", 2020, appendix A.4.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import final

import torch
from torch import Tensor, nn

from kinfold import distributed
from kinfold.errors import UserError
from kinfold.evaluate.backbones import FrozenBackbone
from kinfold.evaluate.features import frozen
from kinfold.evaluate.resnet import Parts, parts
from kinfold.evaluate.segmentation.masked import Masked, checked
from kinfold.evaluate.segmentation.pixels import PixelTraining, ask, fit, upsample
from kinfold.randomness import WEIGHTS, seed_of
from kinfold.settings import Count, settings


@final
@settings
class Segmentation(PixelTraining):
    """An FCN with a dilated last stage, fine-tuned."""

    width: Count = 256
    """channels of the two extra convolutions"""
    dilation: Count = 6
    """of the two extra convolutions"""

    def at_size(self, size: int, resize: int | None) -> Segmentation:
        """The same protocol on training crops of another side; test images keep their size."""
        return replace(self, crops=replace(self.crops, size=size))


@final
class FCN(nn.Module):
    """Images [B, c, H, W] to the logits of their pixels [B, C, H, W]."""

    def __init__(self, body: Parts, *, classes: int, width: int, dilation: int, of: str, channels: int) -> None:
        """`body` is taken as it is and dilated: give that of a copy."""
        super().__init__()
        dilate(body.stages[-1])
        self.body = nn.Sequential(body.stem, *body.stages)
        self.head = nn.Sequential(
            *_convolution(body.widths[-1], width, dilation),
            *_convolution(width, width, dilation),
            nn.Conv2d(width, classes, 1),
        )
        before = nn.Sequential(body.stem, *body.stages[:-1])
        self.stride = stride_of(self.body, channels=channels)
        if self.stride != stride_of(before, channels=channels):
            raise UserError(f"{of} makes its maps smaller in the last stage in a way that is not known here.")

    def forward(self, images: Tensor) -> Tensor:
        """Give the logits of every pixel."""
        maps = self.head(self.body(images))  # [B, C, h, w]
        # Convolutions with odd kernels and their padding look at the pixels 0, stride, 2 · stride, …
        return upsample(maps, (images.shape[2], images.shape[3]), stride=self.stride, first=0.0)  # [B, C, H, W]


def segmentation(backbone: FrozenBackbone, data: Masked, settings: Segmentation) -> dict[str, float]:
    """Fine-tune an FCN on a copy of the backbone and ask for every pixel of the test images: in percent.

    `mIoU` is the mean of the classes' IoUs `iou/cat`; `pixel_accuracy`, `class_accuracy`; `classes` is how many have an
    IoU. `background_only` (or `commonest_class_only`) is the mean IoU of one who answers the commonest class always.
    Raises `UserError` where the backbone is no ResNet, or a test image cannot be used.
    """
    network = build_fcn(backbone, len(data.train.classes), settings).to(data.device)
    train, held = checked(data, channels=backbone.channels)
    if distributed.world() > 1 and torch.device(data.device).type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    fit(network.train(), train, data, settings, backbone)
    return ask(network, held, data, backbone)


def build_fcn(backbone: FrozenBackbone, classes: int, settings: Segmentation) -> FCN:
    """Make the network on a copy of the backbone; the head's first weights are a function of the seed."""
    body = parts(copy.deepcopy(backbone.module), of=backbone.description)
    network = FCN(
        body,
        classes=classes,
        width=settings.width,
        dilation=settings.dilation,
        of=backbone.description,
        channels=backbone.channels,
    ).requires_grad_(True)
    generator = torch.Generator().manual_seed(seed_of(WEIGHTS, settings.seed))
    for layer in network.head:
        if isinstance(layer, nn.Conv2d) and layer.bias is None:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        elif isinstance(layer, nn.Conv2d) and layer.bias is not None:
            nn.init.normal_(layer.weight, std=0.01, generator=generator)
            nn.init.zeros_(layer.bias)
    return network


def dilate(stage: nn.Sequential) -> None:
    """Take the strides out of a stage and give its 3x3 convolutions dilation 2, in place."""
    for block in stage:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.AvgPool2d):  # the shortcut of a ResNet-D, where it makes the map smaller
                parent, _, child = name.rpartition(".")
                setattr(block.get_submodule(parent), child, nn.Identity())
            elif isinstance(layer, nn.Conv2d):
                layer.stride = (1, 1)
                if layer.kernel_size == (3, 3):
                    layer.dilation = layer.padding = (2, 2)


def stride_of(body: nn.Module, *, channels: int, side: int = 257) -> int:
    """Give how many pixels lie between two neighbours of a body's output."""
    with frozen(body):
        image = next(body.parameters()).new_zeros(1, channels, side, side)  # [1, c, side, side]
        length = int(body(image).shape[-1])
    return max(1, round((side - 1) / max(length - 1, 1)))


def _convolution(before: int, after: int, dilation: int) -> list[nn.Module]:
    convolution = nn.Conv2d(before, after, 3, padding=dilation, dilation=dilation, bias=False)
    return [convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
