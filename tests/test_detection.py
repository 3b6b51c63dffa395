# SPDX-License-Identifier: Apache-2.0
"""Detection: images with objects are read, drawn and learned from as said, exactly so after a stop, and measured."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_processes import free_port
from test_resume import assert_equal_to_the_bit, processes
from torch import nn

from kinfold import distributed
from kinfold.checkpoint import load_latest
from kinfold.data.annotated.scenes import Prepared, Preparing, SceneLoader, Scenes, resized
from kinfold.data.work import Task
from kinfold.encoders import Backbone, build_backbone
from kinfold.errors import UserError
from kinfold.evaluate.backbones import FrozenBackbone, hash_of
from kinfold.evaluate.detection import Detectable, Detection, detection, open_detection, rate, renew_statistics
from kinfold.evaluate.detection.detectors import RCNN, build_detector
from kinfold.evaluate.protocol import Request
from kinfold.evaluate.resumable import Stopped
from kinfold.reading import parse, read_yaml
from kinfold.recipe import RECIPES

MODEL: dict[str, Any] = {
    "anchors": (16.0, 24.0),
    "ratios": (1.0,),
    "samples": 32,
    "candidates": (200, 100),
    "proposals": (40, 20),
    "regions": 16,
    "mask_width": 8,
}
SETTINGS: dict[str, Any] = {
    "iterations": 6,
    "batch_size": 4,
    "milestones": (5,),
    "warmup": 2,
    "train_short": (40, 48),
    "test_short": 48,
    "longest": 100,
    "precise_statistics": 2,
}


def backbone(seed: int = 0) -> FrozenBackbone:
    torch.manual_seed(seed)
    module = build_backbone(Backbone(name="resnet10_w4", stem="small-stride2"))
    return FrozenBackbone(module=module, size=48, mean=(0.5,) * 3, std=(0.3,) * 3, description="a small ResNet")


def scene(number: int) -> tuple[np.ndarray, list[tuple[str, tuple[int, int, int, int]]]]:
    """A grey image of 64 x 48 with one red square and, mostly, one blue one; corners as VOC counts them."""
    draw = np.random.default_rng(number)
    pixels = draw.integers(90, 130, (48, 64, 3)).astype(np.uint8)
    boxes = []
    for place, (name, channel) in enumerate((("red", 0), ("blue", 2))):
        if name == "blue" and number % 4 == 3:
            continue
        side = int(draw.integers(14, 22))
        x, y = 2 + 32 * place + int(draw.integers(0, 8)), int(draw.integers(2, 24))
        pixels[y : y + side, x : x + side] = np.eye(3)[channel] * 250
        boxes.append((name, (x + 1, y + 1, x + side, y + side)))
    return pixels, boxes


def xml(boxes: list[tuple[str, tuple[int, int, int, int]]], *, difficult: tuple[int, ...] = ()) -> str:
    objects = [
        f"<object><name>{name}</name><difficult>{int(i in difficult)}</difficult><bndbox><xmin>{x1}</xmin>"
        f"<ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for i, (name, (x1, y1, x2, y2)) in enumerate(boxes)
    ]
    size = "<size><width>64</width><height>48</height><depth>3</depth></size>"
    return "\n".join(["<annotation>", size, *objects, "</annotation>"])


def voc_set(folder: Path, *, train: int = 8, test: int = 3) -> Path:
    """Scenes in VOC's layout, of a set without a year."""
    root = folder / "Squares"
    for below in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / below).mkdir(parents=True)
    ids = [f"{number:04d}" for number in range(train + test)]
    for number, id in enumerate(ids):
        pixels, boxes = scene(number)
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{id}.png")
        (root / "Annotations" / f"{id}.xml").write_text(xml(boxes))
    for split, some in (("trainval", ids[:train]), ("test", ids[train:])):
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(some) + "\n")
    return root


def settings(model: dict[str, Any] | None = None, **changes: Any) -> Detection:
    return Detection(model=RCNN(**{**MODEL, **(model or {})}), **{**SETTINGS, **changes})


def opened(root: Path, how: Detection, *, said: list[str] | None = None, **request: Any) -> Detectable:
    conditions = {"device": "cpu", "workers": 0, "say": (said if said is not None else []).append}
    return open_detection(Request(str(root), **request), how, conditions)


def preparing(scenes: Scenes, **changes: Any) -> Preparing:
    fields = {"short": (40, 48), "longest": 100, "flip": 0.5, "channels": 3, "seed": 0, "masks": False}
    return Preparing(scenes, **{**fields, **changes})


def test_corners_of_voc_count_from_one_and_include_the_last_pixel(tmp_path: Path) -> None:
    root = voc_set(tmp_path)
    (root / "Annotations" / "0000.xml").write_text(xml([("red", (1, 1, 64, 48)), ("blue", (3, 5, 3, 9))]))
    said: list[str] = []
    found = opened(root, settings(), said=said).train.objects[0]
    assert found.boxes.tolist() == [[0, 0, 64, 48]]
    assert found.areas.tolist() == [64 * 48]
    where = f"{root}/Annotations/0000.xml, line 4"
    assert f"1 boxes have no area and are left out: {where}" in said


def test_boxes_beyond_the_image_and_of_no_class_are_named_with_their_line(tmp_path: Path) -> None:
    root = voc_set(tmp_path)
    (root / "classes.txt").write_text("red\nblue\n")
    boxes = [("red", (60, 40, 70, 60)), ("green", (1, 1, 9, 9)), ("red", (70, 1, 80, 9)), ("blue", (5, 5, 20, 20))]
    (root / "Annotations" / "0001.xml").write_text(xml(boxes))
    said: list[str] = []
    found = opened(root, settings(), said=said).train.objects[1]
    assert found.boxes.tolist() == [[59, 39, 64, 48], [4, 4, 20, 20]]
    assert found.labels.tolist() == [0, 1]
    file = f"{root}/Annotations/0001.xml"
    assert said == [
        f"1 boxes are of no known class and are left out: {file}, line 4 green",
        f"1 boxes lie outside of their image and are left out: {file}, line 5",
        f"1 boxes reach beyond their image and are cut off at its edge: {file}, line 3",
    ]


def test_images_without_objects_to_learn_from_are_left_out_and_counted(tmp_path: Path) -> None:
    root = voc_set(tmp_path)
    (root / "Annotations" / "0002.xml").write_text(xml([]))
    (root / "Annotations" / "0003.xml").write_text(xml([("red", (5, 5, 20, 20))], difficult=(0,)))
    train, said = opened(root, settings()).train, []
    assert len(train.learnable(difficult=True, say=said.append)) == 7
    left = train.learnable(difficult=False, say=said.append)
    assert [Path(left.source.name(i)).stem for i in range(len(left))] == [
        "0000",
        "0001",
        *(f"000{i}" for i in range(4, 8)),
    ]
    assert [line.split(" of ")[0] for line in said] == ["1", "2"]
    none = dataclasses.replace(train, objects=[one.some(one.crowd) for one in train.objects])
    with pytest.raises(UserError, match="No training image shows an object"):
        none.learnable(difficult=True, say=print)


@pytest.mark.parametrize(
    ("size", "short", "longest", "expected"),
    [((375, 500), 800, 1333, (800, 1067)), ((500, 375), 480, 1333, (640, 480)), ((300, 900), 800, 1333, (444, 1333))],
)
def test_the_short_side_is_as_asked_unless_the_long_one_would_be_too_long(
    size: tuple[int, int], short: int, longest: int, expected: tuple[int, int]
) -> None:
    assert resized(size, short, longest) == expected


def test_boxes_stay_on_their_objects_through_resizing_and_flipping(tmp_path: Path) -> None:
    scenes = opened(voc_set(tmp_path), settings()).train
    seen = set()
    for epoch in range(6):
        batch = preparing(scenes)(Task(epoch, np.arange(8)))
        for position, (image, target) in enumerate(zip(batch.images, batch.targets)):
            seen.add((image.shape[1], bool(target["boxes"][0, 0] > 30)))
            assert target["labels"].tolist() == (scenes.objects[position].labels + 1).tolist()
            for (x1, y1, x2, y2), label in zip(target["boxes"].tolist(), target["labels"].tolist()):
                channel = {"red": 0, "blue": 2}[scenes.classes[label - 1]]
                mask = (image[channel] > 190) & (image[1] < 60)
                rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
                corners = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
                assert np.abs(np.array(corners) - [x1, y1, x2, y2]).max() < 1.6
    assert seen == {(40, False), (40, True), (48, False), (48, True)}, "both sizes, flipped and not"


def test_batches_are_functions_of_seed_and_step_whatever_the_workers(tmp_path: Path) -> None:
    scenes = opened(voc_set(tmp_path), settings()).train

    def batches(start: int, stop: int, **how: Any) -> list[Prepared]:
        return list(SceneLoader(preparing(scenes, seed=how.pop("seed", 0)), batch_size=4, **how).steps(start, stop))

    def content(batch: Prepared) -> list[Any]:
        return [batch.images, [target["boxes"] for target in batch.targets]]

    whole = batches(0, 5)
    assert len(whole) == 5
    for again in (batches(3, 5), batches(3, 5, workers=2)):
        for one, other in zip(whole[3:], again):
            assert_equal_to_the_bit(content(one), content(other))
    halves = [batches(1, 2, rank=rank, world=2)[0] for rank in range(2)]
    assert_equal_to_the_bit(
        whole[1].images, [image for pair in zip(*(half.images for half in halves)) for image in pair]
    )
    other = batches(0, 5, seed=1)
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(whole[0].images, other[0].images))


def test_an_image_that_does_not_decode_has_a_stand_in_with_that_ones_boxes(tmp_path: Path) -> None:
    root = voc_set(tmp_path)
    (root / "JPEGImages" / "0005.png").write_bytes(b"nothing")
    (root / "JPEGImages" / "0009.png").write_bytes(b"nothing")
    said: list[str] = []
    how = settings(iterations=2, milestones=(), precise_statistics=0, drawn=0)
    data = opened(root, how, said=said)
    batch = preparing(data.train)(Task(0, np.array([5])))
    assert list(batch.bad) == [5]
    assert len(batch.images) == len(batch.targets) == 1
    detection(backbone(), data, how)
    assert any(line.startswith("Training: 1 of 8 images do not decode") for line in said)
    assert any(line.startswith("1 of 3 images do not decode and are left out") and "0009.png" in line for line in said)


def test_images_that_are_not_as_large_as_their_annotations_say_are_named(tmp_path: Path) -> None:
    root = voc_set(tmp_path)
    for id in ("0005", "0009"):  # turned as a camera's note would turn them, which the annotation knows nothing of
        path = root / "JPEGImages" / f"{id}.png"
        with Image.open(path) as image:
            turned = image.transpose(Image.Transpose.ROTATE_90)
        turned.save(path)
    said: list[str] = []
    how = settings(iterations=2, milestones=(), precise_statistics=0, drawn=0)
    detection(backbone(), opened(root, how, said=said), how)
    found = [line for line in said if "not as large" in line]
    assert [line[:40] for line in found] == [
        "Training: 1 of 8 images are not as large",
        "1 of 3 images are not as large as their ",
    ]
    assert all(f"{id}.png is 48 x 64, said to be 64 x 48" in line for id, line in zip(("0005", "0009"), found))


def test_learning_rates_are_those_of_detectron2_for_mocos_file() -> None:
    moco = parse(
        Detection, read_yaml((RECIPES / "evaluate/detection/moco-voc-c4.yaml").read_text(), source=""), source=""
    )
    steps = (0, 50, 100, 17_999, 18_000, 21_999, 22_000, 23_999)
    expected = (0.02 / 1000, 0.02 * (0.5 / 1000 + 0.5), 0.02, 0.02, 0.002, 0.002, 0.0002, 0.0002)
    assert [rate(moco, step) for step in steps] == pytest.approx(expected)
    cosine = dataclasses.replace(moco, schedule="cosine", milestones=())
    assert rate(cosine, 12_000) == pytest.approx(0.01)
    assert rate(cosine, 23_999) < 1e-8


def test_every_recipe_says_everything_and_is_accepted() -> None:
    folder = RECIPES / "evaluate" / "detection"
    names = {field.name for field in dataclasses.fields(Detection)}
    inner = {field.name for field in dataclasses.fields(RCNN)}
    found = sorted(folder.glob("*.yaml"))
    assert {"default", "moco-voc-c4", "invp-voc-c4", "moco-coco-c4-2x", "voc-fpn"} <= {path.stem for path in found}
    for path in found:
        values = read_yaml(path.read_text(), source=path.name)
        assert isinstance(values, dict), path.name
        assert (set(values), set(values["model"])) == (names, inner), path.name
        parse(Detection, values, source=path.name)
    moco = parse(Detection, read_yaml((folder / "moco-voc-c4.yaml").read_text(), source=""), source="")
    assert moco == Detection(), "the defaults are MoCo's"


def test_decay_after_the_end_is_refused() -> None:
    with pytest.raises(ValueError, match="must lie before the end, but iterations is 1000"):
        Detection(iterations=1000)


def test_another_size_keeps_the_proportions() -> None:
    smaller = Detection().at_size(400, None)
    assert (smaller.test_short, smaller.longest) == (400, 666)
    assert smaller.train_short[0] == 240
    assert smaller.train_short[-1] == 400


def test_the_statistics_of_batch_norm_are_means_over_the_batches(tmp_path: Path) -> None:
    scenes = opened(voc_set(tmp_path), settings()).train
    how = settings(precise_statistics=3)
    model = build_detector(backbone(), how.model, classes=2, seed=0)
    loader = SceneLoader(preparing(scenes), batch_size=4)
    before = [p.clone() for p in model.parameters()]
    renew_statistics(model, loader, how)
    stem, first = model.body.stem[0], model.body.stem[1]
    means, variances = [], []
    for batch in loader.steps(6, 9):
        x = stem(model._batch(batch.images).tensors)
        means.append(x.mean(dim=(0, 2, 3)))
        variances.append(x.var(dim=(0, 2, 3)))
    torch.testing.assert_close(first.running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(first.running_var, torch.stack(variances).mean(0))
    assert first.momentum == 0.1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    kept = build_detector(backbone(), dataclasses.replace(how.model, batch_norm="frozen"), classes=2, seed=0)
    renew_statistics(kept, loader, how)
    assert torch.equal(kept.body.stem[1].running_mean, torch.zeros(4))


def test_training_finds_objects_that_were_not_found_before_and_leaves_the_backbone(tmp_path: Path) -> None:
    root = voc_set(tmp_path, train=24, test=6)
    given = backbone()
    before = hash_of(given.module)
    state = torch.random.get_rng_state()
    how = settings(iterations=70, milestones=(60,), learning_rate=0.05, warmup=5, precise_statistics=6, drawn=2)
    data = dataclasses.replace(opened(root, how), progress=tmp_path / "out" / "detection-test.progress")
    values = detection(given, data, how)
    assert values["AP50"] > 30
    assert values["AP50/red"] > 0
    assert values["AP"] < values["AP50"]
    untrained = detection(given, opened(root, how), settings(iterations=1, milestones=(), precise_statistics=6))
    assert untrained["AP50"] < values["AP50"] / 3
    assert values["AP50"] == values["AP50/area"]
    assert values["coco/AP50"] == pytest.approx(values["AP50"], abs=6)
    assert hash_of(given.module) == before
    assert torch.equal(torch.random.get_rng_state(), state)
    with Image.open(tmp_path / "out" / "detection-test.png") as picture:
        assert picture.size == (2 * 320 + 4, 2 * 244)


class Stopping:
    """Batches as ever, and a signal before one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
        steps = SceneLoader.steps

        def stopping(loader: SceneLoader, start: int, stop: int) -> Iterator[Prepared]:
            for number, batch in enumerate(steps(loader, start, stop), start):
                if number == step and start == 0:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        monkeypatch.setattr(SceneLoader, "steps", stopping)


def test_a_stopped_training_goes_on_to_the_same_weights_and_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, how = voc_set(tmp_path), settings(model={"least_score": 0.0})
    data = opened(root, how)
    whole = detection(backbone(), dataclasses.replace(data, progress=tmp_path / "whole"), how)
    Stopping(monkeypatch, 3)
    again = dataclasses.replace(data, progress=tmp_path / "again")
    with pytest.raises(Stopped, match=r"Stopped at step 4 of 6\. The same command goes on from there\."):
        detection(backbone(), again, how)
    monkeypatch.undo()
    said: list[str] = []
    torch.manual_seed(99)  # whatever the caller drew in between
    assert detection(backbone(), dataclasses.replace(again, say=said.append), how) == whole
    assert said[0] == "detector: going on at step 4 of 6"
    first, second = load_latest(tmp_path / "whole"), load_latest(tmp_path / "again")
    assert first is not None
    assert second is not None
    assert first.step == second.step == 6
    assert_equal_to_the_bit(first.state, second.state)
    assert set(first.state["model"]) == set(build_detector(backbone(), how.model, classes=2, seed=0).state_dict())


def test_a_loss_that_is_not_finite_is_said_with_what_to_change(tmp_path: Path) -> None:
    how = settings(learning_rate=1e20, warmup=0)
    with pytest.raises(UserError, match=r"loss is not finite at step \d \(.*\). Lower learning_rate, now 1e\+20"):
        detection(backbone(), opened(voc_set(tmp_path), how), how)


def test_difficult_objects_are_not_counted_and_a_class_that_is_nowhere_is_named(tmp_path: Path) -> None:
    root = voc_set(tmp_path)
    for number in (8, 9, 10):
        _, boxes = scene(number)
        (root / "Annotations" / f"{number:04d}.xml").write_text(xml(boxes, difficult=(1,)))
    said: list[str] = []
    how = settings(iterations=1, milestones=(), precise_statistics=0, drawn=0)
    values = detection(backbone(), opened(root, how, said=said), how)
    assert "AP50/blue" not in values
    assert "AP50/red" in values
    assert "1 of 2 classes are in no test image and are left out of the mean, which is over 1: blue" in said
    for number in (8, 9, 10):
        (root / "Annotations" / f"{number:04d}.xml").write_text(xml([]))
    with pytest.raises(UserError, match="No test image shows an object that has to be found"):
        detection(backbone(), opened(root, how), how)


def coco_set(folder: Path) -> Path:
    """The same scenes in COCO's layout, with outlines, a crowd in the first test image."""
    for split, numbers in (("train2017", range(8)), ("val2017", range(8, 11))):
        (folder / split).mkdir(parents=True)
        (folder / "annotations").mkdir(exist_ok=True)
        images, annotations = [], []
        for number in numbers:
            pixels, boxes = scene(number)
            Image.fromarray(pixels).save(folder / split / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "width": 64, "height": 48})
            for name, (x1, y1, x2, y2) in boxes:
                x, y, w, h = x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": {"red": 3, "blue": 8}[name],
                        "bbox": [x, y, w, h],
                        "area": w * h,
                        "iscrowd": int(number == 8 and name == "blue"),
                        "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                    }
                )
        categories = [{"id": 3, "name": "red"}, {"id": 8, "name": "blue"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


def test_outlines_are_learned_and_measured_in_cocos_layout(tmp_path: Path) -> None:
    how = settings(model={"masks": True, "least_score": 0.0}, iterations=4, milestones=())
    data = opened(coco_set(tmp_path), how)
    batch = preparing(data.train, masks=True)(Task(0, np.arange(8)))
    for target in batch.targets:
        for mask, box in zip(target["masks"], target["boxes"]):
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            corners = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert np.abs(np.array(corners, float) - box.numpy()).max() <= 0.51, "flipped and resized with the box"
    values = detection(backbone(), data, how)
    assert {"AP", "AP50", "AP75", "APs", "mask/AP", "mask/AP50", "AP50/red", "AP50/blue"} <= set(values)
    assert all(0 <= value <= 100 for value in values.values())
    assert "APl" not in values
    assert [one["layout"] for name, one in data.about().items() if name != "classes"] == ["coco", "coco"]


def test_outlines_are_not_asked_of_vocs_layout(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.masks: .* is in VOC's layout"):
        opened(voc_set(tmp_path), settings(model={"masks": True}))


def test_usual_splits_are_all_years_trainval_and_the_test_set(tmp_path: Path) -> None:
    for year, splits in (("2007", ("trainval", "test")), ("2012", ("trainval",))):
        made = voc_set(tmp_path / year, train=4, test=2)
        root = tmp_path / "VOCdevkit" / f"VOC{year}"
        root.parent.mkdir(exist_ok=True)
        made.rename(root)
        (root / "classes.txt").write_text("red\nblue\n")
        if "test" not in splits:
            (root / "ImageSets" / "Main" / "test.txt").unlink()
    data = opened(tmp_path / "VOCdevkit", settings())
    assert len(data.train) == 8
    assert len(data.test) == 2
    assert data.test.layout == "voc-2007"
    assert data.train.layout == "voc"
    single = opened(tmp_path / "VOCdevkit" / "VOC2007", settings(), limit=3)
    assert len(single.train) == 3
    assert len(single.test) == 2
    said: list[str] = []
    opened(tmp_path / "VOCdevkit", settings(), said=said, train_split="2007_test", test_split="2007_test")
    assert said == ["2 of the 2 test images are training images too, so the result is not one of a test."]


def share(rank: int, port: int, root: str, out: str) -> None:
    """Train and measure as one of two processes, and leave the numbers and the weights in a file."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    distributed.start("cpu")
    how = settings(model={"least_score": 0.0}, iterations=3, milestones=())
    weights: list[dict[str, Any]] = []
    load = nn.Module.eval

    def look(module: nn.Module) -> nn.Module:  # what is measured: the detector as it is put into evaluation mode
        if type(module).__name__ == "Detector":
            weights.append({name: value.clone() for name, value in module.state_dict().items()})
        return load(module)

    nn.Module.eval = look  # type: ignore[method-assign]
    values = detection(backbone(), opened(Path(root), how), how)
    torch.save({"values": values, "weights": weights[-1]}, f"{out}/{rank}.pt")
    distributed.stop()


def test_two_processes_end_with_one_detector_and_share_the_test(tmp_path: Path) -> None:
    root, port = voc_set(tmp_path), free_port()
    pair = [processes.Process(target=share, args=(rank, port, str(root), str(tmp_path))) for rank in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(120)
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["values"] == second["values"]
    floats = {name: value for name, value in first["weights"].items() if value.is_floating_point()}
    assert len(floats) > 40
    assert_equal_to_the_bit(floats, {name: second["weights"][name] for name in floats})
    # One process asked about the test with these weights says the same.
    how = settings(model={"least_score": 0.0})
    model = build_detector(backbone(), how.model, classes=2, seed=0)
    model.load_state_dict(first["weights"])
    from kinfold.evaluate.detection.detected import measure_detections

    data = opened(root, how)
    alone = measure_detections(model, data.test, data, short=48, longest=100, channels=3, drawn=0)
    assert alone == pytest.approx(first["values"], abs=1e-9)
