# SPDX-License-Identifier: Apache-2.0
"""Faster R-CNN and Mask R-CNN on a ResNet, with the heads that the papers of this family use: C4 and FPN.

    C4   stem, res2, res3, res4 → one map → regions of 14 x 14 → res5, batch norm → mean → classes and boxes
    FPN  stem, res2, ..., res5 → a pyramid of maps → regions of 7 x 7 → two linear layers → classes and boxes

Sources: Ren et al., NeurIPS 2015; He et al., ICCV 2017; Lin et al., CVPR 2017; MoCo `detection/` for the batch norm
behind res5 and all numbers; built of torchvision's parts. The network that is given is copied, never changed.
Differs: torchvision's loss of the boxes is smooth within 1/9, detectron2's is not; anchors are whole pixels; the
pyramid's regions are not shifted by half a pixel; masks are laid onto whole pixels of their box.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import (
    RoIHeads,
    fastrcnn_loss,
    maskrcnn_inference,
    maskrcnn_loss,
)
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from kinfold.evaluate.backbones import FrozenBackbone
from kinfold.evaluate.resnet import Parts, parts
from kinfold.randomness import WEIGHTS, seed_of
from kinfold.settings import Count, settings
from kinfold.views import Positive, Probability

_PROBE = 512  # pixels: side of the image whose maps tell the strides; a multiple of every stride


@settings
class RCNN:
    """What is built on the backbone; the defaults are detectron2's, which MoCo leaves as they are."""

    head: Literal["c4", "fpn"] = "c4"
    masks: bool = False
    """outlines too: Mask R-CNN"""
    batch_norm: Literal["train", "frozen"] = "train"
    """the backbone's: trained, over all devices together on CUDA, or kept as it is"""
    new_norm: bool = True
    """batch norm behind res5 (C4) or in the pyramid (FPN), as in MoCo"""
    anchors: Annotated[tuple[Positive, ...], Field(min_length=1)] = (32.0, 64.0, 128.0, 256.0, 512.0)
    """sides in pixels; FPN: one for each map, which are five"""
    ratios: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.5, 1.0, 2.0)
    """height / width"""
    samples: Count = 256
    """anchors of an image that the proposer learns from in a step, half of them on objects where there are so many"""
    candidates: tuple[Count, Count] = (12000, 6000)
    """boxes with the largest scores before overlapping ones are removed, in training and test (FPN: of each map)"""
    proposals: tuple[Count, Count] = (2000, 1000)
    """boxes after that"""
    regions: Count = 512
    """proposals of an image that are learned from in a step"""
    positives: Probability = 0.25
    """the largest share of them that shows an object"""
    pyramid: Count = 256
    """channels of the pyramid's maps"""
    hidden: Count = 1024
    """width of the two linear layers behind the pyramid"""
    mask_width: Count = 256
    """channels in which masks are made"""
    least_score: Probability = 0.05
    """detections below are dropped"""
    overlap: Probability = 0.5
    """of two detections of a class that overlap more, one is dropped"""
    detections: Count = 100
    """the most in an image"""

    def __post_init__(self) -> None:
        if self.head == "fpn" and len(self.anchors) != 5:
            raise ValueError(f"anchors: the pyramid has 5 maps and needs a size for each, but got {len(self.anchors)}")


class _C4Body(nn.Module):
    """The stem and all stages but the last: one map."""

    def __init__(self, network: Parts) -> None:
        super().__init__()
        self.stem, self.stages = network.stem, nn.Sequential(*network.stages[:-1])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Give the map of images [B, C, H, W]."""
        return {"0": self.stages(self.stem(images))}  # [B, F, H / stride, W / stride]


class _PyramidBody(nn.Module):
    """The stem and all stages under a pyramid: five maps of as many channels, the last a pooled one."""

    def __init__(self, network: Parts, channels: int, *, norm: bool) -> None:
        super().__init__()
        self.stem, self.stages = network.stem, nn.ModuleList(network.stages)
        self.pyramid = FeaturePyramidNetwork(
            network.widths, channels, LastLevelMaxPool(), norm_layer=nn.BatchNorm2d if norm else None
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Give the maps of images [B, C, H, W], the largest first."""
        maps: OrderedDict[str, Tensor] = OrderedDict()
        x = self.stem(images)
        for number, stage in enumerate(self.stages):
            x = maps[str(number)] = stage(x)
        pyramid: dict[str, Tensor] = self.pyramid(maps)
        return pyramid


class _RegionPool(nn.Module):
    """Cut regions out of one map: 14 x 14 values each, averaged over as many points as a value covers."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, maps: dict[str, Tensor], boxes: list[Tensor], _shapes: object) -> Tensor:
        """Give the regions [R, F, 14, 14] of all images' boxes."""
        regions: Tensor = roi_align(
            maps["0"], boxes, 14, spatial_scale=1.0 / self.stride, sampling_ratio=0, aligned=True
        )
        return regions


class _Predictor(nn.Module):
    """Classes, of which 0 is the background, and a box for each."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.classes, self.boxes = nn.Linear(width, classes + 1), nn.Linear(width, 4 * (classes + 1))
        for layer, deviation in ((self.classes, 0.01), (self.boxes, 0.001)):
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Give logits [R, C + 1] and box deltas [R, 4 (C + 1)] of regions [R, F] or [R, F, h, w]."""
        x = x.mean(dim=(2, 3)) if x.ndim == 4 else x  # [R, F]
        return self.classes(x), self.boxes(x)


class _Heads(RoIHeads):  # type: ignore[misc]
    """torchvision's heads, whose masks may be made of the same regions as the boxes: C4 has one res5 for both."""

    def has_mask(self) -> bool:
        """Whether outlines are learned."""
        return self.mask_predictor is not None

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Give the detections of each image, or in training the losses."""
        if self.training:
            assert targets is not None
            proposals, matched, labels, deltas = self.select_training_samples(proposals, targets)
        regions = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        logits, found_deltas = self.box_predictor(regions)
        if not self.training:
            boxes, scores, kinds = self.postprocess_detections(logits, found_deltas, proposals, image_shapes)
            found = [{"boxes": b, "scores": s, "labels": k} for b, s, k in zip(boxes, scores, kinds)]
            if self.has_mask():
                masks = self.mask_predictor(self._mask_regions(features, boxes, image_shapes))
                for one, mask in zip(found, maskrcnn_inference(masks, kinds)):
                    one["masks"] = mask  # [d, 1, M, M]
            return found, {}
        assert targets is not None
        classification, boxes_loss = fastrcnn_loss(logits, found_deltas, labels, deltas)
        losses = {"classes": classification, "boxes": boxes_loss}
        if self.has_mask():
            shown = [own > 0 for own in labels]  # each [r]
            boxes = [own[show] for own, show in zip(proposals, shown)]
            some = (
                regions[torch.cat(shown)]
                if self.mask_head is None
                else self._mask_regions(features, boxes, image_shapes)
            )
            losses["masks"] = maskrcnn_loss(
                self.mask_predictor(some),
                boxes,
                [target["masks"] for target in targets],
                [target["labels"] for target in targets],
                [own[show] for own, show in zip(matched, shown)],
            )
        return [], losses

    def _mask_regions(self, features: dict[str, Tensor], boxes: list[Tensor], shapes: list[tuple[int, int]]) -> Tensor:
        own = self.mask_head is not None
        pool, head = (self.mask_roi_pool, self.mask_head) if own else (self.box_roi_pool, self.box_head)
        return head(pool(features, boxes, shapes))  # type: ignore[no-any-return]


class Detector(nn.Module):
    """From images of any sizes to losses, where it trains, or to detections."""

    def __init__(
        self,
        body: nn.Module,
        proposer: RegionProposalNetwork,
        heads: _Heads,
        *,
        frozen: list[nn.Module],
        multiple: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.body, self.proposer, self.heads = body, proposer, heads
        self.multiple = multiple
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)  # [C, 1, 1]
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)  # [C, 1, 1]
        fixed = {id(module) for module in frozen}
        # By name, as modules are exchanged where batch norm is made to look at all devices.
        self._frozen = [name for name, module in self.named_modules() if id(module) in fixed]

    def train(self, mode: bool = True) -> Detector:
        """Switch between training and test; what is frozen stays as in the test."""
        super().train(mode)
        for name in self._frozen:
            self.get_submodule(name).eval()
        return self

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Give losses by name, or a dict of boxes [d, 4], scores [d], labels [d] from 1 (and masks) for each image.

        `images` are uint8 [C, h, w], resized; boxes are in their pixels.
        """
        batch = self._batch(images)
        maps = self.body(batch.tensors)
        proposals, losses = self.proposer(batch, maps, targets)
        found, more = self.heads(maps, proposals, batch.image_sizes, targets)
        names = {"loss_objectness": "objectness", "loss_rpn_box_reg": "proposals"}
        return {**{names[name]: loss for name, loss in losses.items()}, **more} if self.training else found

    def _batch(self, images: list[Tensor]) -> ImageList:
        """Normalise and put into the upper left corners of one tensor, zero elsewhere."""
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        height, width = (-(-max(sides) // self.multiple) * self.multiple for sides in zip(*sizes))
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        batch = torch.zeros(len(images), len(mean), height, width, device=mean.device)  # [B, C, H, W]
        for place, image in zip(batch, images):
            place[:, : image.shape[1], : image.shape[2]] = (image.to(mean.device).float() / 255.0 - mean) / std
        return ImageList(batch, sizes)


def build_detector(backbone: FrozenBackbone, how: RCNN, *, classes: int, seed: int) -> Detector:
    """Build a detector of C classes on a copy of a ResNet; the new layers' first weights are those of the seed.

    Raises `UserError` where the backbone is no ResNet.
    """
    network = parts(copy.deepcopy(backbone.module).cpu(), of=backbone.description)
    frozen: list[nn.Module] = []
    for module in [network.stem, *network.stages]:
        module.requires_grad_(True)
        if how.batch_norm == "frozen":
            frozen += [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in frozen:
        norm.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(WEIGHTS, seed))
        build = _build_c4 if how.head == "c4" else _build_pyramid
        body, heads, channels, sizes = build(network, how, classes, backbone.channels)
        anchors = AnchorGenerator(sizes, (how.ratios,) * len(sizes))  # type: ignore[no-untyped-call]
        proposer = RegionProposalNetwork(
            anchors,
            RPNHead(channels, anchors.num_anchors_per_location()[0]),  # type: ignore[no-untyped-call]
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=how.samples,
            positive_fraction=0.5,
            pre_nms_top_n={"training": how.candidates[0], "testing": how.candidates[1]},
            post_nms_top_n={"training": how.proposals[0], "testing": how.proposals[1]},
            nms_thresh=0.7,
        )
    multiple = max(_strides(body, backbone.channels))
    return Detector(body, proposer, heads, frozen=frozen, multiple=multiple, mean=backbone.mean, std=backbone.std)


def _build_c4(
    network: Parts, how: RCNN, classes: int, image_channels: int
) -> tuple[nn.Module, _Heads, int, tuple[tuple[float, ...], ...]]:
    body, width = _C4Body(network), network.widths[-1]
    stride = _strides(body, image_channels)[0]
    res5 = nn.Sequential(network.stages[-1], *([nn.BatchNorm2d(width)] if how.new_norm else []))
    masks = MaskRCNNPredictor(width, how.mask_width, classes + 1) if how.masks else None
    heads = _heads(how)(
        box_roi_pool=_RegionPool(stride),
        box_head=res5,
        box_predictor=_Predictor(width, classes),
        mask_predictor=masks,
    )
    return body, heads, network.widths[-2], (how.anchors,)


def _build_pyramid(
    network: Parts, how: RCNN, classes: int, image_channels: int
) -> tuple[nn.Module, _Heads, int, tuple[tuple[float, ...], ...]]:
    names, width = ["0", "1", "2", "3"], how.pyramid
    masks: dict[str, nn.Module] = {}
    if how.masks:
        masks = {
            "mask_roi_pool": MultiScaleRoIAlign(names, 14, 2),
            "mask_head": MaskRCNNHeads(width, [how.mask_width] * 4, 1),  # type: ignore[no-untyped-call]
            "mask_predictor": MaskRCNNPredictor(how.mask_width, how.mask_width, classes + 1),
        }
    heads = _heads(how)(
        box_roi_pool=MultiScaleRoIAlign(names, 7, 2),
        box_head=TwoMLPHead(width * 7 * 7, how.hidden),  # type: ignore[no-untyped-call]
        box_predictor=_Predictor(how.hidden, classes),
        **masks,
    )
    body = _PyramidBody(network, width, norm=how.new_norm)
    return body, heads, width, tuple((size,) for size in how.anchors)


def _heads(how: RCNN) -> partial[_Heads]:
    return partial(
        _Heads,
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=how.regions,
        positive_fraction=how.positives,
        bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
        score_thresh=how.least_score,
        nms_thresh=how.overlap,
        detections_per_img=how.detections,
    )


@torch.no_grad()
def _strides(body: nn.Module, channels: int) -> list[int]:
    """How many pixels a step in each of the maps is."""
    modes = [(module, module.training) for module in body.modules()]
    maps = body.eval()(torch.zeros(1, channels, _PROBE, _PROBE))
    for module, mode in modes:
        module.training = mode
    return [_PROBE // one.shape[-1] for one in maps.values()]
