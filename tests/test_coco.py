# SPDX-License-Identifier: Apache-2.0
"""COCO's layout: images, classes, boxes and outlines as the file says, and everything wrong with it by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as reference

from kinfold.data.annotated.coco import Polygons, Runs, annotation_file, coco_scenes, is_coco, letters_to_counts
from kinfold.errors import UserError


def annotation(id: int, image: int, box: list[float], **more: Any) -> dict[str, Any]:
    return {"id": id, "image_id": image, "category_id": 7, "bbox": box, "area": box[2] * box[-1], "iscrowd": 0, **more}


def small_set(folder: Path, annotations: list[dict[str, Any]], **more: Any) -> Path:
    """Two images of 40 x 30 and a file about them."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / "train2017").mkdir(exist_ok=True)
    images = []
    for number in (1, 2):
        name = f"{number:012d}.jpg"
        Image.new("RGB", (40, 30), (50 * number, 0, 0)).save(folder / "train2017" / name)
        images.append({"id": number, "file_name": name, "width": 40, "height": 30})
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 90, "name": "brush"}, {"id": 7, "name": "train"}],
        **more,
    }
    file = folder / "annotations" / "instances_train2017.json"
    file.write_text(json.dumps(content))
    return file


def test_boxes_classes_and_crowds_are_as_the_file_says(tmp_path: Path) -> None:
    file = small_set(
        tmp_path,
        [
            annotation(1, 2, [3.5, 4, 10, 20], area=77.5),
            annotation(2, 2, [0, 0, 40, 30], category_id=90, iscrowd=1),
        ],
    )
    said: list[str] = []
    scenes = coco_scenes(file, masks=False, say=said.append)
    assert scenes.classes == ("train", "brush"), "in the order of their ids, which need not be gapless"
    assert len(scenes) == 2
    assert not len(scenes.objects[0].labels)
    assert not said
    found = scenes.objects[1]
    assert found.boxes.tolist() == [[3.5, 4, 13.5, 24], [0, 0, 40, 30]]
    assert found.labels.tolist() == [0, 1]
    assert found.crowd.tolist() == [False, True]
    assert found.areas.tolist() == [77.5, 1200.0]
    assert found.outlines is None
    assert scenes.source.read(1)[:2] == b"\xff\xd8"
    assert scenes.source.name(1).endswith("train2017/000000000002.jpg")


def test_a_split_is_found_by_its_name_or_by_its_beginning(tmp_path: Path) -> None:
    file = small_set(tmp_path, [annotation(1, 1, [0, 0, 9, 9])])
    (tmp_path / "annotations" / "captions_train2017.json").write_text("{}")
    assert is_coco(str(tmp_path))
    assert is_coco(str(file))
    assert not is_coco(str(tmp_path / "train2017"))
    assert annotation_file(str(tmp_path), "train2017") == annotation_file(str(tmp_path), "train") == file
    with pytest.raises(UserError, match=r"no file instances_val.json. Splits with boxes: train2017"):
        annotation_file(str(tmp_path), "val")


def test_a_file_with_its_images_beside_it_is_read_too(tmp_path: Path) -> None:
    file = small_set(tmp_path, [annotation(1, 1, [0, 0, 9, 9])])
    beside = tmp_path / "train2017" / "_annotations.coco.json"
    file.rename(beside)
    assert len(coco_scenes(annotation_file(str(beside), "any"), masks=False, say=print)) == 2


def test_what_cannot_be_used_is_named_counted_and_left_out(tmp_path: Path) -> None:
    file = small_set(
        tmp_path,
        [
            annotation(11, 1, [5, 5, 0, 9]),
            annotation(12, 1, [50, 5, 9, 9]),
            annotation(13, 1, [35, 5, 9, 9]),
            annotation(14, 1, [1, 1, 2, 2], category_id=5),
            annotation(15, 9, [1, 1, 2, 2]),
            annotation(16, 1, [1, 1, 2, 2]),
        ],
    )
    (tmp_path / "train2017" / "000000000002.jpg").unlink()
    said: list[str] = []
    scenes = coco_scenes(file, masks=False, say=said.append)
    assert [one.boxes.tolist() for one in scenes.objects] == [[[35, 5, 40, 14], [1, 1, 3, 3]]]
    where = f"{file}, annotation"
    assert sorted(said) == [
        f"1 annotations are of no class in the file and are left out: {where} 14",
        f"1 annotations are of no image in the file and are left out: {where} 15",
        f"1 boxes have no area and are left out: {where} 11",
        f"1 boxes lie outside of their image and are left out: {where} 12",
        f"1 boxes reach beyond their image and are cut off at its edge: {where} 13",
        f"1 images are missing and are left out: {tmp_path}/train2017/000000000002.jpg of {file}",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations": [annotation(3, 1, [1, 2, 3])]}, r"annotation 3: bbox is \[1, 2, 3\]; expected"),
        ({"annotations": [annotation(3, 1, [1, 2, 3, float("nan")])]}, "annotation 3: .* not all numbers"),
        ({"categories": []}, "needs categories"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}, "needs categories"),
        ({"images": {}}, "has no list images"),
        ({"images": [{"id": 1}]}, "an image needs an id and a file_name"),
        ({"images": [{"id": 1, "file_name": "gone.jpg"}]}, "None of the first images"),
        ({"images": [{"id": 1, "file_name": 3}]}, "an image needs an id and a file_name"),
        ({"images": [{"id": 4, "file_name": name} for name in ("a.jpg", "b.jpg")]}, "two images have the id 4"),
        ({"images": [{"id": 1, "file_name": "a.jpg", "width": "40"}]}, r"a\.jpg has no size"),
        ({"annotations": [[1, 2]]}, "an annotation needs an image_id and a category_id"),
        ({"annotations": [annotation(3, 1, [0, 0, 9, 9], category_id=[7])]}, "an annotation needs an image_id"),
        ({"annotations": [annotation(3, 1, [0, 0, 9, 9]) | {"area": "large"}]}, "annotation 3: area is a number"),
        ({"annotations": [annotation(3, 1, [0, 0, 9, 9]) | {"iscrowd": "0"}]}, "annotation 3: iscrowd is 0 or 1"),
    ],
)
def test_a_file_that_is_no_such_file_is_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    annotations = change.pop("annotations", [annotation(1, 1, [0, 0, 9, 9])])
    file = small_set(tmp_path, annotations, **change)
    with pytest.raises(UserError, match=message) as caught:
        coco_scenes(file, masks=False, say=print)
    assert str(file) in str(caught.value)


def test_a_file_that_is_cut_off_is_refused_by_name(tmp_path: Path) -> None:
    file = small_set(tmp_path, [])
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match="is no JSON"):
        coco_scenes(file, masks=False, say=print)


def test_a_polygon_is_filled_where_the_centres_of_pixels_lie_in_it() -> None:
    square = Polygons((np.array([[1.4, 0], [4.6, 0], [4.6, 2.4], [1.4, 2.4]], np.float32),))
    mask = square.fill((4, 6), (4, 6))
    assert mask.astype(int).tolist() == [[0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0], [0] * 6, [0] * 6]
    # At twice the size the rim lies elsewhere among the centres: 2.8 to 9.2 of 12, and 0 to 4.8 of 8.
    larger = square.fill((8, 12), (4, 6))
    assert np.flatnonzero(larger.any(0)).tolist() == [3, 4, 5, 6, 7, 8]
    assert larger.any(1).tolist() == [True] * 5 + [False] * 3
    everything = Polygons((np.array([[0, 0], [6, 0], [6, 4], [0, 4]], np.float32),))
    assert everything.fill((4, 6), (4, 6)).all()
    assert everything.fill((31, 7), (4, 6)).all()


def test_a_polygon_may_reach_beyond_its_image_on_every_side() -> None:
    wide = np.array([[-5, -5], [30, -5], [30, 30], [-5, 30]], np.float32)
    assert Polygons((wide,)).fill((9, 7), (9, 7)).all()
    for shift, share in (((-20, 0), (slice(None), slice(0, 5))), ((0, 24), (slice(8, 9), slice(None)))):
        expected = np.zeros((9, 7), bool)
        expected[share] = True
        moved = wide + np.array(shift, np.float32) + np.array([-5, 0] if shift[0] else [0, -11], np.float32)
        assert (Polygons((moved,)).fill((9, 7), (9, 7)) == expected).all()
    assert not Polygons((wide + 50,)).fill((9, 7), (9, 7)).any()


def test_polygons_are_filled_as_by_pycocotools_but_for_the_rim() -> None:
    draw = np.random.default_rng(0)
    for _ in range(40):
        corners = int(draw.integers(3, 9))
        angle = np.sort(draw.random(corners)) * 2 * np.pi
        radius = draw.uniform(15, 45, corners)
        points = np.stack([60 + radius * np.cos(angle), 50 + radius * np.sin(angle)], axis=1)
        ours = Polygons((points.astype(np.float32),)).fill((100, 120), (100, 120))
        theirs = reference.decode(reference.frPyObjects([points.reshape(-1).tolist()], 100, 120))[:, :, 0].astype(bool)
        if theirs.sum() > 400:
            assert (ours & theirs).sum() / (ours | theirs).sum() > 0.97


def test_runs_are_read_as_by_pycocotools_in_numbers_and_in_letters() -> None:
    draw = np.random.default_rng(1)
    for _ in range(20):
        mask = np.zeros((37, 23), np.uint8)
        for _ in range(3):
            top, left = draw.integers(0, 20, 2)
            mask[top : top + draw.integers(1, 15), left : left + draw.integers(1, 15)] ^= 1
        letters = reference.encode(np.asfortranarray(mask))["counts"].decode()
        counts = np.array(letters_to_counts(letters))
        assert counts.sum() == mask.size
        assert (Runs(counts, (37, 23)).fill((37, 23), (37, 23)) == mask.astype(bool)).all()
    with pytest.raises(ValueError, match="end within a number"):
        letters_to_counts("P")


def test_outlines_are_read_where_they_are_wanted(tmp_path: Path) -> None:
    polygon = [[0, 0, 8, 0, 8, 8, 0, 8], [20, 20, 24, 20, 24, 24, 20, 24], [1, 1]]
    runs = {"size": [30, 40], "counts": [0, 30 * 40]}
    file = small_set(
        tmp_path,
        [
            annotation(1, 1, [0, 0, 24, 24], segmentation=polygon),
            annotation(2, 1, [0, 0, 40, 30], segmentation=runs, iscrowd=1),
            annotation(3, 1, [0, 0, 9, 9], segmentation=[]),
        ],
    )
    said: list[str] = []
    found = coco_scenes(file, masks=True, say=said.append).objects[0]
    assert found.outlines is not None
    assert [int(outline.fill((30, 40), (30, 40)).sum()) for outline in found.outlines] == [64 + 16, 1200]
    assert len(said) == 1
    assert "have no outline and are left out" in said[0]
    assert said[0].endswith("annotation 3")
    other = {"size": [15, 20], "counts": [0, 15 * 20]}  # would cover all of the image if it were stretched
    small_set(tmp_path, [annotation(4, 1, [0, 0, 9, 9], segmentation=other)])
    said.clear()
    assert not len(coco_scenes(file, masks=True, say=said.append).objects[0].labels)
    assert said == [f"1 outlines are of another size than their image and are left out: {file}, annotation 4"]
    small_set(tmp_path, [annotation(4, 1, [0, 0, 9, 9], segmentation={"size": [30, 40], "counts": [5]})])
    with pytest.raises(UserError, match="annotation 4: its segmentation is neither polygons nor runs"):
        coco_scenes(file, masks=True, say=print)
