# SPDX-License-Identifier: Apache-2.0
"""The FCN: its geometry and loss are torch's, it learns on a copy, stops and goes on to the bit, in processes too."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mask_layouts import SMALL, opened, save_image, save_mask, scene, shapes, small_resnet, write_list
from PIL import Image
from test_processes import free_port
from test_resume import assert_equal_to_the_bit, processes
from torch import Tensor, nn
from torch.nn import functional as F

from kinfold import distributed, evaluate
from kinfold.checkpoint import load_latest
from kinfold.data.annotated.mask_crops import Crops
from kinfold.data.annotated.masks import Masks
from kinfold.data.annotated.voc import CLASSES
from kinfold.encoders import Backbone, build_backbone
from kinfold.errors import UserError
from kinfold.evaluate import FrozenBackbone
from kinfold.evaluate.backbones import hash_of
from kinfold.evaluate.protocol import Protocol, Request
from kinfold.evaluate.resumable import Stopped
from kinfold.evaluate.segmentation import FCN, Segmentation, build_fcn, pixels, segmentation
from kinfold.evaluate.segmentation.confusion import Confusion
from kinfold.evaluate.segmentation.masked import Held, Masked, checked, open_masked
from kinfold.evaluate.segmentation.picture import draw_segmentations
from kinfold.evaluate.segmentation.pixels import normalised, pixel_loss, tent, upsample
from kinfold.reading import parse, read_text, read_yaml
from kinfold.recipe import RECIPES

SHORT = Segmentation(steps=8, batch_size=8, crops=SMALL, learning_rate=0.02, width=16, dilation=1)


def recipe(name: str) -> Segmentation:
    values = read_yaml(read_text(RECIPES / "evaluate" / "segmentation" / f"{name}.yaml"), source=name)
    made: Segmentation = parse(Segmentation, values, source=name)
    return made


def test_logits_are_interpolated_as_torch_does_with_aligned_corners() -> None:
    maps = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    own = upsample(maps, (4 * 8 + 1, 6 * 8 + 1), stride=8, first=0.0)
    assert torch.allclose(own, F.interpolate(maps, (33, 49), mode="bilinear", align_corners=True))


def test_logits_of_patches_are_interpolated_as_torch_does_between_their_middles() -> None:
    maps = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    own = upsample(maps, (40, 56), stride=8, first=3.5)
    assert torch.allclose(own, F.interpolate(maps, (40, 56), mode="bilinear", align_corners=False))


def test_beyond_the_last_place_its_value_goes_on() -> None:
    weights = tent(2, 7, stride=4, first=0.0)
    assert weights.tolist() == [[1, 0], [0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [0, 1], [0, 1], [0, 1]]


def test_the_loss_and_its_gradient_are_torchs_cross_entropy_without_void() -> None:
    logits = torch.randn(2, 5, 6, 7, dtype=torch.float64, requires_grad=True)
    truth = torch.randint(0, 5, (2, 6, 7))
    truth[torch.rand(truth.shape) < 0.4] = 255
    (own,) = torch.autograd.grad(pixel_loss(logits, truth), logits)
    expected = F.cross_entropy(logits, truth, ignore_index=255)
    assert torch.allclose(pixel_loss(logits, truth), expected)
    assert torch.allclose(own, torch.autograd.grad(expected, logits)[0])
    nothing = pixel_loss(logits, torch.full_like(truth, 255))
    assert float(nothing.detach()) == 0.0
    assert not torch.autograd.grad(nothing, logits)[0].any()


@pytest.mark.parametrize(
    ("name", "stem", "stride"),
    [
        ("resnet10_w8", "standard", 16),
        ("resnet10_w8", "small-stride2", 8),
        ("resnet10_w8", "small", 4),
        ("resnet26d", "standard", 16),
        ("resnet26", "standard", 16),
    ],
)
def test_the_last_stage_keeps_its_size_and_sees_with_dilation_two(name: str, stem: Any, stride: int) -> None:
    module = build_backbone(Backbone(name=name, stem=stem))
    backbone = FrozenBackbone(module=module, size=32)
    network = build_fcn(backbone, 4, SHORT).eval()
    assert network.stride == stride
    convolutions = [m for m in network.body[-1].modules() if isinstance(m, nn.Conv2d)]
    assert all(m.stride == (1, 1) for m in convolutions)
    assert all(m.dilation == m.padding == (2, 2) for m in convolutions if m.kernel_size == (3, 3))
    before = [m for stage in network.body[1:-1] for m in stage.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.dilation == (1, 1) for m in before)
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 45, 67)).shape == (1, 4, 45, 67)
    trained = {k.removeprefix("body.4."): v for k, v in network.state_dict().items() if k.startswith("body.4.")}
    assert_equal_to_the_bit(trained, module.get_submodule("layer4").state_dict())


def test_a_place_looks_at_the_pixel_it_is_said_to_be_at() -> None:
    backbone = FrozenBackbone(module=build_backbone(Backbone(name="resnet10_w8", stem="small-stride2")), size=32)
    network = build_fcn(backbone, 4, SHORT).eval()
    for parameter in network.body.parameters():
        parameter.data = torch.ones_like(parameter) if parameter.dim() == 4 else parameter.data
    images = torch.ones(1, 3, 257, 257, requires_grad=True)
    network.body(images)[0, :, 14, 16].sum().backward()
    weight = images.grad[0].sum(0).double()  # type: ignore[index]
    middle = [float((weight.sum(axis) * torch.arange(257)).sum() / weight.sum()) for axis in (1, 0)]
    assert middle == pytest.approx([14 * network.stride, 16 * network.stride], abs=1e-3)


def test_a_vision_transformer_is_refused_by_name(tmp_path: Path) -> None:
    backbone = FrozenBackbone(module=nn.Flatten(), size=32, description="my transformer")
    with pytest.raises(UserError, match="my transformer is no ResNet"):
        segmentation(backbone, opened(shapes(tmp_path, train=3, test=1)), SHORT)


def test_shapes_are_found_and_the_backbone_stays_as_it_was(tmp_path: Path) -> None:
    backbone = small_resnet()
    backbone.module.train()
    before = hash_of(backbone.module)
    said: list[str] = []
    data = opened(shapes(tmp_path), say=said.append, progress=tmp_path / "out" / "answer.progress")
    found = segmentation(backbone, data, dataclasses.replace(SHORT, steps=60, learning_rate=0.1))
    assert found["background_only"] < 30.0
    assert found["mIoU"] > 60.0
    assert found["iou/red"] > 45.0
    assert found["classes"] == 3
    assert hash_of(backbone.module) == before
    assert all(module.training for module in backbone.module.modules())
    picture = Image.open(tmp_path / "out" / "answer.png")
    assert picture.width > 3 * 128
    assert "answer.png" in said[-1]


def test_the_figure_is_that_of_the_whole_images_one_by_one(tmp_path: Path) -> None:
    backbone, data = small_resnet(), opened(shapes(tmp_path, train=8, test=3))
    network = build_fcn(backbone, 3, SHORT)
    _, held = pixels_checked(data)
    own = pixels.ask(network, held, data, backbone)
    by_hand = Confusion(3)
    with torch.no_grad():
        for number in range(3):
            image, truth = data.test.read(number)
            x = (torch.from_numpy(image).permute(2, 0, 1)[None] / 255 - 0.3) / 0.3
            by_hand.add(torch.from_numpy(truth), network.eval()(x)[0].argmax(0))
    assert own["mIoU"] == pytest.approx(100 * by_hand.mean_iou, abs=1e-9)
    assert network.training is False


def pixels_checked(data: Masked) -> tuple[Masks, Held]:
    return checked(data, channels=3)


def test_training_pairs_that_cannot_be_used_are_named_and_left_out(tmp_path: Path) -> None:
    root = shapes(tmp_path, train=6, test=2)
    whole = opened(root)
    save_mask(np.zeros((5, 5), np.uint8), root / "SegmentationClass" / "001.png")
    (root / "JPEGImages" / "004.jpg").write_bytes(b"<html>not found</html>")
    said: list[str] = []
    train, _ = pixels_checked(opened(root, say=said.append))
    assert [pair.image.stem for pair in train.pairs] == ["000", "002", "003", "005"]
    assert "2 of 6 images cannot be used" in said[0]
    assert "001.png: the mask has 5 x 5 pixels" in said[0]
    assert "004.jpg: it is an HTML page" in said[0]
    assert len(pixels_checked(whole)[0]) == 4  # and so whenever it is looked at


def test_a_test_pair_that_cannot_be_used_is_an_error_before_the_training(tmp_path: Path) -> None:
    root = shapes(tmp_path, train=4, test=3)
    save_mask(np.full((40, 48), 77, np.uint8), root / "SegmentationClass" / "005.png")
    with pytest.raises(UserError, match=r"1 of 3 images cannot be used: .*005.png: the value 77 .* mend them"):
        segmentation(small_resnet(), opened(root), SHORT)


def test_classes_without_a_pixel_are_named(tmp_path: Path) -> None:
    root = shapes(tmp_path, train=4, test=2)
    (root / "classes.txt").write_text("red\ngreen\nblue\n")
    for number in (4, 5):
        path = root / "SegmentationClass" / f"{number:03}.png"
        mask = np.array(Image.open(path))
        save_mask(np.where(mask == 2, 0, mask).astype(np.uint8), path)
    said: list[str] = []
    pixels_checked(opened(root, say=said.append))
    assert "2 of 4 classes have no pixel in the test images: green, blue" in said[0]
    assert "1 of 4 classes have no pixel to learn from: blue" in said[1]


def test_test_images_without_a_labelled_pixel_are_refused(tmp_path: Path) -> None:
    root = shapes(tmp_path, train=4, test=1)
    save_mask(np.full((40, 48), 255, np.uint8), root / "SegmentationClass" / "004.png")
    with pytest.raises(UserError, match="No pixel has a class in 1 images"):
        pixels_checked(opened(root))


def test_objects_that_are_written_as_void_are_refused_as_nothing_could_be_told_apart(tmp_path: Path) -> None:
    for number in range(5):
        image, mask = scene(number)
        save_image(image, tmp_path / "images" / f"{number}.png")
        save_mask(np.where(mask == 1, 255, 0).astype(np.uint8), tmp_path / "masks" / f"{number}.png", colours=False)
    data = open_masked(Request(str(tmp_path), None, None, None, None), SHORT, {"say": lambda text: None})
    with pytest.raises(UserError, match=r"All pixels are '0' .* 255 is void"):
        pixels_checked(data)


def test_a_batch_of_one_place_is_refused_with_what_to_change(tmp_path: Path) -> None:
    tiny = dataclasses.replace(SHORT, batch_size=1, crops=Crops(size=4))
    with pytest.raises(UserError, match=r"1 crops of 4 pixels .* Raise batch_size or crops\.size"):
        segmentation(small_resnet(), opened(shapes(tmp_path, train=2, test=1)), tiny)


def test_images_that_are_asked_and_learned_from_are_said(tmp_path: Path) -> None:
    root = shapes(tmp_path, train=4, test=2)
    write_list(root, "val", ["000", "004"])
    said: list[str] = []
    opened(root, say=said.append)
    assert said == ["1 of the 2 images that are asked are learned from too."]


def test_the_rate_falls_where_the_appendix_says() -> None:
    how = recipe("moco-voc12")
    rates = {step: how.rate(step) for step in (0, 20_999, 21_000, 26_999, 27_000, 29_999)}
    assert list(rates.values()) == pytest.approx([0.003, 0.003, 0.0003, 0.0003, 0.00003, 0.00003])
    city = recipe("moco-cityscapes")
    assert (city.rate(62_999), city.rate(63_000)) == pytest.approx((0.01, 0.001))
    assert (how.crops.size, city.crops.size, how.crops.scale) == (513, 769, (0.5, 2.0))
    assert how.at_size(65, None) == dataclasses.replace(how, crops=Crops(size=65))


def test_every_recipe_says_all_settings() -> None:
    for path in sorted((RECIPES / "evaluate" / "segmentation").glob("*.yaml")):
        values = read_yaml(read_text(path), source=path.stem)
        assert values.keys() == {field.name for field in dataclasses.fields(Segmentation)}, path.stem
        assert recipe(path.stem).steps > 1


def test_a_scale_from_large_to_small_is_refused() -> None:
    with pytest.raises(ValueError, match="from the smaller to the larger"):
        Crops(scale=(2.0, 0.5))


def test_weights_that_are_no_longer_numbers_are_an_error(tmp_path: Path) -> None:
    wild = dataclasses.replace(SHORT, learning_rate=1e12, steps=4)
    with pytest.raises(UserError, match=r"diverged: the loss is not finite at step 2 of 4\. Lower .* now 1e\+12"):
        segmentation(small_resnet(), opened(shapes(tmp_path, train=8, test=1)), wild)


def test_the_command_writes_the_picture_beside_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = Protocol(settings=Segmentation, measure=segmentation, open=open_masked, unit="percent")
    monkeypatch.setitem(evaluate.PROTOCOLS, "segmentation", line)
    words = ["steps=2", "batch_size=4", "crops.size=33", "width=8", "dilation=1"]
    result = evaluate.evaluate(
        "segmentation",
        small_resnet(),
        str(shapes(tmp_path, train=8, test=2)),
        recipe="voc-two-cores",
        overrides=words,
        out=tmp_path / "results",
        workers=0,
        say=lambda text: None,
    )
    written = json.loads(Path(result["file"]).read_text())
    assert written["values"]["mIoU"] == pytest.approx(result["values"]["mIoU"])
    assert written["data"]["test"]["images"] == 2
    assert sorted(path.suffix for path in (tmp_path / "results").iterdir()) == [".json", ".png"]


def test_the_picture_has_image_truth_and_prediction_side_by_side(tmp_path: Path) -> None:
    image, truth = torch.full((3, 128, 128), 200, dtype=torch.uint8), torch.zeros(128, 128, dtype=torch.uint8)
    truth[:64], truth[64:80] = 15, 255
    classes = ("background", *CLASSES)
    path = draw_segmentations([(image, truth, torch.full((128, 128), 20))], classes, tmp_path / "new" / "a.png")
    pixels = np.array(Image.open(path))
    top, pitch = 18, 128 + 6
    columns = [pixels[top : top + 128, 6 + n * pitch : 6 + n * pitch + 128] for n in range(3)]
    assert (columns[0] == 200).all()
    assert columns[1][[0, 70, 100], 5].tolist() == [[192, 128, 128], [255, 255, 255], [0, 0, 0]]
    assert (columns[2] == (0, 64, 128)).all()


def stopping_at(count: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss that sends SIGTERM to its own process at its `count`-th call."""
    calls = iter(range(1, 1_000_000))

    def stop(logits: Tensor, truth: Tensor) -> Tensor:
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGTERM)
        return pixel_loss(logits, truth)

    return stop


def state_of(folder: Path) -> dict[str, Any]:
    found = load_latest(folder)
    assert found is not None
    assert found.step == SHORT.steps
    return found.state


@pytest.mark.parametrize("step", [2, 3], ids=["in an epoch", "between two epochs"])
def test_a_stopped_training_goes_on_to_the_bit(step: int, tmp_path: Path) -> None:
    root = shapes(tmp_path / "data", train=26, test=2)  # three batches and a rest
    whole = segmentation(small_resnet(), opened(root, progress=tmp_path / "whole"), SHORT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixels, "pixel_loss", stopping_at(step))
        with pytest.raises(Stopped, match=re.escape(f"Stopped at step {step} of 8. The same command goes on")):
            segmentation(small_resnet(), opened(root, progress=tmp_path / "broken"), SHORT)
    again = segmentation(small_resnet(), opened(root, progress=tmp_path / "broken", workers=2), SHORT)
    assert again == whole
    assert_equal_to_the_bit(state_of(tmp_path / "whole"), state_of(tmp_path / "broken"))


def train_as(rank: int, world: int, port: int, root: str, out: str) -> None:
    torch.set_num_threads(1)
    if world > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
        distributed.start("cpu")
    # The statistics of batch norm are of each process's own images on a CPU: without it two are as one.
    backbone = small_resnet()
    for parent in list(backbone.module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, nn.Identity())
    made: list[FCN] = []

    def build(*arguments: Any) -> FCN:
        made.append(build_fcn(*arguments))
        made[0].head = nn.Sequential(*[layer for layer in made[0].head if not isinstance(layer, nn.BatchNorm2d)])
        return made[0].double()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kinfold.evaluate.segmentation.build_fcn", build)
        patch.setattr(pixels, "normalised", lambda images, of: normalised(images, of).double())
        found = segmentation(backbone, opened(Path(root)), dataclasses.replace(SHORT, steps=3, learning_rate=1e-3))
    torch.save({"values": found, "weights": made[0].state_dict()}, f"{out}/{world}-{rank}.pt")
    distributed.stop()


def test_two_processes_train_and_measure_as_one(tmp_path: Path) -> None:
    root = shapes(tmp_path / "data", train=19, test=3)
    port = free_port()
    both = [processes.Process(target=train_as, args=(rank, 2, port, str(root), str(tmp_path))) for rank in range(2)]
    for process in both:
        process.start()
    train_as(0, 1, port, str(root), str(tmp_path))
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert_equal_to_the_bit(first["weights"], second["weights"])
    assert first["values"] == second["values"]
    for name, value in one["weights"].items():
        assert torch.allclose(value, first["weights"][name], rtol=1e-9, atol=1e-12), name
    assert first["values"] == pytest.approx(one["values"], abs=1e-6)
