# SPDX-License-Identifier: Apache-2.0
"""The parts of a ResNet, whoever built it: what looks at single stages and blocks takes it apart here."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from kinfold.errors import UserError

_STAGES = ("layer1", "layer2", "layer3", "layer4")


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """A ResNet in the order of its computation; the modules are the network's own, not copies."""

    stem: nn.Sequential
    """[B, C, H, W] to the input of the first stage: convolution, norm, activation, and the pool where there is one"""
    stages: list[nn.Sequential]
    """res2 to res5 as detection counts them, each a sequence of residual blocks"""
    widths: list[int]
    """channels that each stage gives"""

    @property
    def blocks(self) -> list[nn.Module]:
        """All residual blocks in order: 16 of a ResNet-50."""
        return [block for stage in self.stages for block in stage]


def parts(backbone: nn.Module, *, of: str) -> Parts:
    """Take a ResNet of timm or torchvision apart; `of` is its name for people.

    Raises `UserError` where it is something else.
    """
    first = [getattr(backbone, name, None) for name in ("conv1", "bn1")]
    activation = getattr(backbone, "act1", None) or getattr(backbone, "relu", None)
    pool, stages = getattr(backbone, "maxpool", None), [getattr(backbone, name, None) for name in _STAGES]
    stem = [*first, activation, pool]
    if not all(isinstance(module, nn.Module) for module in stem) or not all(
        isinstance(stage, nn.Sequential) and len(stage) for stage in stages
    ):
        raise UserError(
            f"{of} is no ResNet, and this protocol looks at the stages of one. Give a ResNet (resnet18, resnet50, "
            "wide_resnet50_2, ...), or take knn, linear, voc-svm or transfer, which ask for features only."
        )
    return Parts(
        stem=nn.Sequential(*[module for module in stem if isinstance(module, nn.Module)]),
        stages=[stage for stage in stages if isinstance(stage, nn.Sequential)],
        widths=[_width(stage[-1], of=of) for stage in stages if isinstance(stage, nn.Sequential)],
    )


def _width(block: nn.Module, *, of: str) -> int:
    """Channels that a residual block gives: those of its last convolution."""
    for name in ("conv3", "conv2"):
        convolution = getattr(block, name, None)
        if isinstance(convolution, nn.Conv2d):
            return convolution.out_channels
    raise UserError(f"{of} has blocks of the kind {type(block).__name__}, which are no residual blocks known here.")
