# SPDX-License-Identifier: Apache-2.0
"""Detectors: built on a copy of any ResNet, with maps, heads, losses and batch norm as their description says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import box_iou

from kinfold.encoders import Backbone, build_backbone
from kinfold.errors import UserError
from kinfold.evaluate.backbones import FrozenBackbone, hash_of
from kinfold.evaluate.detection.detected import full_size
from kinfold.evaluate.detection.detectors import RCNN, Detector, build_detector

SMALL: dict[str, Any] = {
    "candidates": (200, 100),
    "proposals": (60, 30),
    "samples": 24,
    "regions": 16,
    "anchors": (8.0, 16.0, 24.0, 32.0, 48.0),
    "pyramid": 16,
    "hidden": 32,
    "mask_width": 8,
}
KINDS = [(head, masks) for head in ("c4", "fpn") for masks in (False, True)]


def backbone(name: str = "resnet10_w4", stem: str = "small-stride2", **more: Any) -> FrozenBackbone:
    module = build_backbone(Backbone(name=name, stem=stem), more.get("channels", 3))  # type: ignore[arg-type]
    return FrozenBackbone(module=module, size=64, description=name, **more)


def detector(head: str, masks: bool = False, seed: int = 0, **more: Any) -> Detector:
    return build_detector(backbone(), RCNN(head=head, masks=masks, **{**SMALL, **more}), classes=2, seed=seed)  # type: ignore[arg-type]


def scene() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two images with a bright square each, of another colour for another class, and their masks."""
    images, targets = [], []
    for label, (x1, y1, x2, y2) in ((1, (8, 10, 30, 34)), (2, (36, 20, 60, 44))):
        image = torch.full((3, 60, 72), 40, dtype=torch.uint8)
        image[label - 1, y1:y2, x1:x2] = 250
        mask = torch.zeros(1, 60, 72, dtype=torch.bool)
        mask[0, y1:y2, x1:x2] = True
        images.append(image)
        targets.append(
            {"boxes": torch.tensor([[x1, y1, x2, y2]]).float(), "labels": torch.tensor([label]), "masks": mask}
        )
    return images, targets


def iou(first: Tensor, second: Tensor) -> float:
    return float(box_iou(first[None], second[None])[0, 0])


@pytest.mark.parametrize("head", ["c4", "fpn"])
def test_a_detector_learns_to_find_what_it_is_shown_and_its_outline(head: str) -> None:
    anchors = (24.0,) * (1 if head == "c4" else 5)
    model = detector(head, masks=True, anchors=anchors).train()
    images, targets = scene()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(120):
        if step == 80:  # so that where it ends does not hang on the last steps
            optimizer.param_groups[0]["lr"] = 0.005
        loss = torch.stack(list(model(images, targets).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # Statistics of the batch, as they are made anew before a test.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(images, targets)
        found = model.eval()(images)
    for one, target in zip(found, targets):
        best = int(one["scores"].argmax())
        assert one["labels"][best] == target["labels"][0]
        assert iou(one["boxes"][best], target["boxes"][0]) > 0.5
        mask, true = full_size(one, (60, 72), (60, 72))["masks"][best], target["masks"][0]
        assert (mask & true).sum() / (mask | true).sum() > 0.4


@pytest.mark.parametrize(("head", "masks"), KINDS)
def test_training_gives_losses_by_name_and_a_test_detections(head: str, masks: bool) -> None:
    images, targets = scene()
    model = detector(head, masks, least_score=0.0)
    losses = model.train()(images, targets)
    assert set(losses) == {"classes", "boxes", "objectness", "proposals"} | ({"masks"} if masks else set())
    with torch.no_grad():
        for one in model.eval()(images):
            count = len(one["scores"])
            assert 0 < count <= 100
            assert one["boxes"].shape == (count, 4)
            assert set(one["labels"].tolist()) <= {1, 2}
            assert (one["scores"].diff() <= 0).all(), "by falling score"
            assert ("masks" in one) == masks


def test_an_image_without_objects_can_be_in_a_batch() -> None:
    images, targets = scene()
    targets[0] = {
        "boxes": torch.empty(0, 4),
        "labels": torch.empty(0, dtype=torch.int64),
        "masks": targets[0]["masks"][:0],
    }
    for head, masks in KINDS:
        losses = detector(head, masks).train()(images, targets)
        assert torch.isfinite(torch.stack(list(losses.values()))).all()


@pytest.mark.parametrize("head", ["c4", "fpn"])
def test_the_backbone_is_copied_and_never_changed(head: str) -> None:
    given = backbone()
    before, modes = hash_of(given.module), [m.training for m in given.module.modules()]
    model = build_detector(given, RCNN(head=head, **SMALL), classes=2, seed=0).train()  # type: ignore[arg-type]
    images, targets = scene()
    torch.stack(list(model(images, targets).values())).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert hash_of(given.module) == before
    assert [m.training for m in given.module.modules()] == modes
    assert all(parameter.grad is None for parameter in given.module.parameters())
    assert not {id(p) for p in model.parameters()} & {id(p) for p in given.module.parameters()}


@pytest.mark.parametrize(
    ("stem", "stride"), [("standard", 16), ("small-stride2", 8), ("small", 4)], ids=["standard", "stride 2", "stride 1"]
)
def test_strides_are_those_of_the_stem(stem: str, stride: int) -> None:
    given = backbone(stem=stem)
    c4 = build_detector(given, RCNN(**SMALL), classes=2, seed=0)
    assert c4.multiple == c4.heads.box_roi_pool.stride == stride
    assert c4.body(torch.zeros(1, 3, 128, 64))["0"].shape == (1, 16, 128 // stride, 64 // stride)
    fpn = build_detector(given, RCNN(head="fpn", **SMALL), classes=2, seed=0)
    maps = fpn.body(torch.zeros(1, 3, 128, 64))
    assert [128 // one.shape[2] for one in maps.values()] == [stride // 4 * 2**level for level in range(5)]
    assert fpn.multiple == 4 * stride


def test_regions_of_c4_go_through_res5_and_one_more_batch_norm() -> None:
    model = detector("c4")
    res5, norm = model.heads.box_head
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.num_features == 32
    regions = model.heads.box_roi_pool({"0": torch.zeros(1, 16, 8, 8)}, [torch.tensor([[0.0, 0, 30, 30]])], None)
    assert regions.shape == (1, 16, 14, 14)
    assert res5(regions).shape == (1, 32, 7, 7)
    assert len(detector("c4", new_norm=False).heads.box_head) == 1
    norms = [
        sum(isinstance(m, nn.BatchNorm2d) for m in detector("fpn", new_norm=new).modules()) for new in (True, False)
    ]
    assert norms[0] == norms[1] + 8, "two in each of the pyramid's four levels"


def test_a_region_is_the_mean_of_the_map_under_it() -> None:
    # A map that grows by one a pixel of the image to the right: a value is the x of its middle, whatever the stride.
    pool = detector("c4").heads.box_roi_pool
    x = (torch.arange(8.0) + 0.5) * 8
    regions = pool({"0": x.expand(1, 1, 8, 8)}, [torch.tensor([[8.0, 8.0, 50.0, 50.0]])], None)
    torch.testing.assert_close(regions[0, 0, 0], 8 + 42 * (torch.arange(14) + 0.5) / 14)


def test_losses_are_those_of_torchvision_where_both_have_them() -> None:
    model = detector("fpn", masks=True).train()
    images, targets = scene()
    batch = model._batch(images)
    maps = model.body(batch.tensors)
    proposals, _ = model.proposer(batch, maps, targets)
    results = []
    for forward in (type(model.heads).forward, RoIHeads.forward):
        torch.manual_seed(5)
        results.append(forward(model.heads, maps, list(proposals), batch.image_sizes, targets)[1])
    ours, theirs = results
    for name, other in (("classes", "loss_classifier"), ("boxes", "loss_box_reg"), ("masks", "loss_mask")):
        assert torch.equal(ours[name], theirs[other])


def test_images_are_normalised_and_laid_into_the_corner_of_a_batch() -> None:
    given = backbone(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))
    model = build_detector(given, RCNN(**SMALL), classes=2, seed=0)
    images = [torch.full((3, 20, 30), 255, dtype=torch.uint8), torch.zeros(3, 33, 9, dtype=torch.uint8)]
    batch = model._batch(images)
    assert batch.tensors.shape == (2, 3, 40, 32)
    assert batch.image_sizes == [(20, 30), (33, 9)]
    torch.testing.assert_close(batch.tensors[0, :, 3, 3], torch.tensor([0.9 / 0.5, 0.8 / 0.25, 0.7]))
    torch.testing.assert_close(batch.tensors[1, :, 32, 8], torch.tensor([-0.1 / 0.5, -0.2 / 0.25, -0.3]))
    assert not batch.tensors[0, :, 20:].any()
    assert not batch.tensors[1, :, :, 9:].any()


@pytest.mark.parametrize("head", ["c4", "fpn"])
def test_frozen_batch_norm_stays_and_the_new_layers_is_trained(head: str) -> None:
    model = detector(head, batch_norm="frozen").train()
    before = copy.deepcopy(model.state_dict())
    images, targets = scene()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    torch.stack(list(model(images, targets).values())).sum().backward()
    optimizer.step()
    old = {name for name, m in backbone().module.named_modules() if isinstance(m, nn.BatchNorm2d)}
    kept, moved = set(), set()
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            same = all(torch.equal(value, before[f"{name}.{key}"]) for key, value in module.state_dict().items())
            (kept if same else moved).add(name)
    assert len(kept) == len(old)
    assert len(moved) == (1 if head == "c4" else 8)


def test_first_weights_are_a_function_of_the_seed_and_the_callers_generator_stays() -> None:
    torch.manual_seed(3)
    given = backbone()
    state = torch.random.get_rng_state()
    first, again, other = (
        build_detector(given, RCNN(**SMALL), classes=2, seed=seed).state_dict() for seed in (1, 1, 2)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    changed = {name.split(".")[0] for name in first if not torch.equal(first[name], other[name])}
    assert changed == {"proposer", "heads"}
    assert torch.equal(first["body.stem.0.weight"], given.module.state_dict()["conv1.weight"])


def test_networks_of_torchvision_and_grey_images_work() -> None:
    from torchvision.models import resnet18

    model = build_detector(FrozenBackbone(module=resnet18(), size=224), RCNN(**SMALL), classes=2, seed=0)
    assert model.multiple == 16
    grey = backbone(channels=1, mean=(0.5,), std=(0.2,))
    images, targets = scene()
    losses = build_detector(grey, RCNN(**SMALL), classes=2, seed=0).train()([image[:1] for image in images], targets)
    assert torch.isfinite(torch.stack(list(losses.values()))).all()


def test_a_network_that_is_no_resnet_is_refused() -> None:
    import timm

    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1)
    with pytest.raises(UserError, match="my ViT is no ResNet"):
        build_detector(FrozenBackbone(module=vit, size=224, description="my ViT"), RCNN(), classes=2, seed=0)


def test_a_pyramid_needs_a_size_of_anchors_for_each_map() -> None:
    with pytest.raises(ValueError, match="5 maps and needs a size for each, but got 3"):
        RCNN(head="fpn", anchors=(8.0, 16.0, 32.0))


def test_detections_are_brought_to_the_whole_image() -> None:
    found = {
        "boxes": torch.tensor([[10.0, 5.0, 20.0, 15.0]]),
        "scores": torch.ones(1),
        "labels": torch.ones(1, dtype=torch.int64),
        "masks": torch.ones(1, 1, 28, 28),
    }
    whole = full_size(found, (30, 40), (60, 120))
    assert whole["boxes"].tolist() == [[30.0, 10.0, 60.0, 30.0]]
    assert whole["masks"].shape == (1, 60, 120)
    assert whole["masks"].dtype == torch.bool
    rows, columns = whole["masks"][0].any(1).nonzero(), whole["masks"][0].any(0).nonzero()
    assert abs(int(columns.min()) - 30) <= 1
    assert abs(int(columns.max()) - 60) <= 1
    assert abs(int(rows.min()) - 10) <= 1
    assert abs(int(rows.max()) - 30) <= 1
