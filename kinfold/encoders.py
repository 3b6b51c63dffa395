# SPDX-License-Identifier: Apache-2.0
"""Encoders: a backbone by name, a head, for some methods a predictor, and the unit sphere at the end.

Backbones are timm's, so every architecture there works and their weights can be the start. Batch norm is where a query
could recognise its own key by the company it was normalised in; the papers' remedies are here: split batch norm on one
device, shuffled batches over several, or synchronised statistics.
"""

from __future__ import annotations

import difflib
import re
from typing import Any, Literal

import timm
import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch.nn import functional as F

from kinfold.errors import UserError
from kinfold.settings import Count, settings


@settings
class Backbone:
    """Which network turns an image into features."""

    name: str = "resnet50"
    """any timm name, or `resnet10_wN` / `resnet18_wN`: basic blocks with N, 2N, 4N, 8N channels, for small sets"""
    stem: Literal["standard", "small", "small-stride2"] = "standard"
    """for ResNets: 7x7 stride 2 and max-pool; 3x3 stride 1 without pool (32 px); 3x3 stride 2 without pool"""
    pretrained: bool = False
    """start from the weights that timm publishes under this name (needs the network the first time)"""


@settings
class Head:
    """Linear layers behind the backbone; ReLU after each hidden one."""

    hidden: tuple[Count, ...] = ()
    """widths of the hidden layers; none makes the head one linear layer"""
    out: Count = 128
    """D, the dimension of the embedding"""
    batch_norm: bool = False
    """batch norm in place of the bias of each hidden layer"""
    last: Literal["bias", "plain", "batch-norm"] = "bias"
    """the last layer: with a bias, without, or without and followed by batch norm that has no parameters"""
    init: Literal["default", "xavier"] = "default"
    """torch's initialisation, or Xavier-uniform weights and zero biases (InvP's ResNet-50)"""


@settings
class BatchNorm:
    """What the batch norm of the encoders sees, in one process or several."""

    query_splits: Count = 1
    """groups into which the query encoder's backbone splits the whole batch; over several devices each has its share"""
    key_splits: Count = 1
    """the same for the key encoder"""
    shuffle_keys: bool = False
    """keys are encoded in a shuffled order, across devices where there are several, and put back (shuffled BN)"""
    synchronise: bool = False
    """statistics over the batch of all devices (SyncBN); on one device this is ordinary batch norm"""


class SplitBatchNorm(nn.BatchNorm2d):
    """Batch norm that normalises groups of the batch apart, as several devices would; running statistics are means.

    Group s of S holds the images s, s + S, s + 2S, … (MoCo CIFAR-10 notebook; SCE `split_batch_norm.py`). The last,
    smaller batch of an epoch need not divide by S. Evaluation mode is ordinary batch norm.
    """

    def __init__(self, num_features: int, splits: int, **settings: Any) -> None:
        super().__init__(num_features, **settings)
        self.splits = splits

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[B, C, H, W]`."""
        if not self.training or self.splits == 1:
            return super().forward(x)
        # A map of one pixel gives a group of one image a single value a channel, which cannot be normalised.
        most = len(x) if x.shape[2] * x.shape[3] > 1 else max(1, len(x) // 2)
        splits = min(self.splits, most)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        mean, var = self.running_mean, self.running_var
        if len(x) % splits == 0:
            c = x.shape[1]
            grouped = _groups_as_channels(x, splits)  # [B / S, S · C, H, W]
            means = None if mean is None else mean.repeat(splits)
            variances = None if var is None else var.repeat(splits)
            weight = None if self.weight is None else self.weight.repeat(splits)
            bias = None if self.bias is None else self.bias.repeat(splits)
            y = F.batch_norm(grouped, means, variances, weight, bias, True, self.momentum or 0.0, self.eps)
            if mean is not None and var is not None and means is not None and variances is not None:
                with torch.no_grad():
                    mean.copy_(means.view(splits, c).mean(0))
                    var.copy_(variances.view(splits, c).mean(0))
            return _channels_as_groups(y, splits)  # [B, C, H, W]
        y = torch.empty_like(x)
        found = []
        for s in range(splits):
            means, variances = (None if t is None else t.clone() for t in (mean, var))
            y[s::splits] = F.batch_norm(
                x[s::splits], means, variances, self.weight, self.bias, True, self.momentum or 0.0, self.eps
            )
            found.append((means, variances))
        if mean is not None and var is not None:
            with torch.no_grad():
                mean.copy_(torch.stack([m for m, _ in found if m is not None]).mean(0))
                var.copy_(torch.stack([v for _, v in found if v is not None]).mean(0))
        return y


def _groups_as_channels(x: Tensor, splits: int) -> Tensor:
    """Lay the groups of `[B, C, H, W]` side by side as channels, `[B / S, S · C, H, W]`: one call normalises all.

    In the memory format that x has. A channels-last tensor moves in runs of C numbers; a plain `reshape` would
    transpose it twice, which takes longer than the normalisation.
    """
    n, c, h, w = x.shape
    if not _is_channels_last(x):
        return x.reshape(n // splits, splits * c, h, w)
    apart = x.permute(0, 2, 3, 1).reshape(n // splits, splits, h, w, c)
    joined = apart.permute(0, 2, 3, 1, 4).reshape(n // splits, h, w, splits * c)
    return joined.permute(0, 3, 1, 2)  # [B / S, S · C, H, W]


def _channels_as_groups(y: Tensor, splits: int) -> Tensor:
    """Undo `_groups_as_channels`."""
    groups, channels, h, w = y.shape
    n, c = groups * splits, channels // splits
    if not _is_channels_last(y):
        return y.reshape(n, c, h, w)
    apart = y.permute(0, 2, 3, 1).reshape(groups, h, w, splits, c)
    return apart.permute(0, 3, 1, 2, 4).reshape(n, h, w, c).permute(0, 3, 1, 2)  # [B, C, H, W]


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def split_batch_norm(module: nn.Module, splits: int) -> nn.Module:
    """Put a `SplitBatchNorm` in place of every plain `BatchNorm2d` inside `module`, with its state.

    A network without batch norm stays as it is. Raises `UserError` where it has batch norm of another kind only (timm's
    fused norm and activation in EfficientNets, for one), which would go on to leak.
    """
    if splits == 1:
        return module
    other = {type(m).__name__ for m in module.modules() if isinstance(m, nn.BatchNorm2d)} - {"BatchNorm2d"}
    if other:
        raise UserError(
            f"batch_norm: splitting works on plain BatchNorm2d, but this backbone has {', '.join(sorted(other))}. Set "
            "batch_norm.query_splits and batch_norm.key_splits to 1, or use a ResNet."
        )
    _replace_batch_norm(module, splits)
    return module


def _replace_batch_norm(module: nn.Module, splits: int) -> None:
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            split = SplitBatchNorm(
                child.num_features,
                splits,
                eps=child.eps,
                momentum=child.momentum,
                affine=child.affine,
                track_running_stats=child.track_running_stats,
            )
            split.load_state_dict(child.state_dict())
            setattr(module, name, split)
        else:
            _replace_batch_norm(child, splits)


def feature_width(backbone: nn.Module) -> int:
    """F, the number of features that a backbone gives.

    timm's `num_features` is that of its last map; some architectures widen it afterwards and say so elsewhere.
    """
    return int(getattr(backbone, "head_hidden_size", None) or backbone.num_features)  # type: ignore[arg-type]


_SLIM = re.compile(r"resnet(10|18)_w(\d+)")


def build_backbone(how: Backbone, channels: int = 3) -> nn.Module:
    """Make the backbone `how` for images of `channels` channels: `[B, C, H, W]` to features `[B, F]`.

    F is its `feature_width`. ResNets start as their papers have them: timm's zero-initialised last batch norm of each
    block is switched off. Raises `UserError` for an unknown name or a stem that the architecture does not have.
    """
    slim = _SLIM.fullmatch(how.name)
    model: Any
    if slim:
        layers, width = {"10": (1, 1, 1, 1), "18": (2, 2, 2, 2)}[slim[1]], int(slim[2])
        if how.pretrained:
            raise UserError(f"backbone.pretrained: there are no published weights for {how.name}; leave it out.")
        model = ResNet(
            BasicBlock,  # type: ignore[arg-type]  # timm's annotation says an instance, its code takes the class
            layers,
            channels=tuple(width * 2**i for i in range(4)),
            num_classes=0,
            in_chans=channels,
            stem_width=width,
            zero_init_last=False,
        )
        if width != 64:  # timm's plain stem always has 64 channels
            model.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
            model.bn1 = nn.BatchNorm2d(width)
            first = model.layer1[0]
            first.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
            first.downsample = None
            model.init_weights(zero_init_last=False)
    else:
        if not timm.is_model(how.name):
            near = difflib.get_close_matches(how.name, timm.list_models(), n=5)
            hint = f" Similar names: {', '.join(near)}." if near else ""
            raise UserError(
                f"backbone.name: timm has no model {how.name!r}.{hint} `timm.list_models()` lists them all."
            )
        options: dict[str, Any] = {"num_classes": 0, "in_chans": channels}
        if re.match(r"(se)?res(net|next)|wide_resnet", how.name):
            options["zero_init_last"] = False
        if re.match(r"(vit|deit|eva)", how.name):
            options["dynamic_img_size"] = True
        try:
            model = timm.create_model(how.name, pretrained=how.pretrained, **options)
        except (OSError, RuntimeError, ValueError) as error:
            if not how.pretrained:
                raise
            raise UserError(
                f"backbone.pretrained: the weights of {how.name} could not be fetched ({str(error).splitlines()[0]}). "
                "Connect to the network once, or give a local file with weights=FILE."
            ) from error
    if how.stem != "standard":
        _small_stem(model, how, channels)
    return model  # type: ignore[no-any-return]


def _small_stem(model: Any, how: Backbone, channels: int) -> None:
    """Replace the first convolution by 3x3 and take the max-pool out, as all papers do at 32 px."""
    if not isinstance(model, ResNet) or not isinstance(model.conv1, nn.Conv2d):
        raise UserError(f"backbone.stem: {how.stem!r} is for ResNets; {how.name} has its own. Use stem: standard.")
    stride = 1 if how.stem == "small" else 2
    stem = nn.Conv2d(channels, model.conv1.out_channels, 3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    setattr(model, "conv1", stem)  # noqa: B010  # timm's types know only its own stem
    setattr(model, "maxpool", nn.Identity())  # noqa: B010


def build_head(how: Head, features: int) -> nn.Sequential:
    """Make a head from `features` inputs to `how.out` outputs: `[B, F]` to `[B, D]`."""
    layers: list[nn.Module] = []
    for width in how.hidden:
        layers.append(nn.Linear(features, width, bias=not how.batch_norm))
        if how.batch_norm:
            layers.append(nn.BatchNorm1d(width))
        layers.append(nn.ReLU(inplace=True))
        features = width
    layers.append(nn.Linear(features, how.out, bias=how.last == "bias"))
    if how.last == "batch-norm":
        layers.append(nn.BatchNorm1d(how.out, affine=False))
    head = nn.Sequential(*layers)
    if how.init == "xavier":
        for layer in head:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
    return head


class Encoder(nn.Module):
    """Backbone, head, for a query encoder perhaps a predictor, and the unit sphere: images to `[B, D]`."""

    def __init__(self, backbone: nn.Module, head: nn.Module, predictor: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.predictor = predictor

    def forward(self, images: Tensor) -> Tensor:
        """Embed `[B, C, H, W]` as unit vectors `[B, D]`; in half precision the last step is done in fp32."""
        z = self.head(self.backbone(images))  # [B, D]
        if self.predictor is not None:
            z = self.predictor(z)  # [B, D]
        with torch.autocast(images.device.type, enabled=False):
            wide = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
            return F.normalize(wide, dim=1)  # [B, D]
