# SPDX-License-Identifier: Apache-2.0
"""The layout of VOC: what lists and annotations say is read as it stands, and what is wrong is named with its line."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from voc_layout import annotation, thing, unpacked, write_devkit

from kinfold.data.annotated import voc
from kinfold.data.decode import Undecodable
from kinfold.data.sources import Source
from kinfold.errors import UserError


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """Four images: a cat, a dog and a difficult cat, a difficult cat alone, a person with a head."""
    sides = "<xmin>90</xmin><ymin>91</ymin><xmax>92</xmax><ymax>93</ymax>"
    head = f"<part>\n<name>head</name>\n<bndbox>{sides}</bndbox>\n</part>\n"
    return write_devkit(
        tmp_path / "VOCdevkit" / "VOC2007",
        {
            "000001": annotation(thing("cat", (1, 2, 16, 12))),
            "000002": annotation(thing("dog", (1.5, 2, 3, 4)), thing("cat", difficult=1)),
            "000003": annotation(thing("cat", difficult=1)),
            "000004": annotation(thing("person", (5, 6, 7, 8), extra=head)),
        },
        {"trainval": ["000002", "000001", "000003"], "test": ["000004"]},
    )


def test_boxes_are_read_exactly_as_the_file_says_with_the_line_of_their_object(kit: Path) -> None:
    found = voc.find_devkits(str(kit))[0].annotation("000002")
    assert (found.width, found.height) == (16, 12)
    assert found.boxes == [
        voc.Box("dog", (1.5, 2.0, 3.0, 4.0), difficult=False, line=3),
        voc.Box("cat", (2.0, 3.0, 9.0, 11.0), difficult=True, line=8),
    ]


def test_the_parts_of_a_person_are_neither_its_box_nor_its_name(kit: Path) -> None:
    (box,) = voc.find_devkits(str(kit))[0].annotation("000004").boxes
    assert (box.name, box.corners) == ("person", (5.0, 6.0, 7.0, 8.0))


@pytest.mark.parametrize(
    ("corners", "area"), [((3, 4, 3, 4), False), ((3, 4, 9, 4), False), ((9, 4, 3, 8), False), ((3, 4, 4, 5), True)]
)
def test_a_box_of_no_area_says_so(corners: tuple[float, float, float, float], area: bool) -> None:
    assert voc.Box("cat", corners, difficult=False, line=1).has_area is area


@pytest.mark.parametrize(
    ("xml", "line", "reason"),
    [
        ("<annotation>\n<object>\n</annotation>\n", 3, "malformed"),
        ("", 1, "malformed"),
        (annotation("<object><bndbox/></object>"), 3, "no name"),
        (annotation(thing("cat", (1, 2, 3))), 3, "no ymax"),
        (annotation(thing("cat"), thing("cat", ("left", 2, 3, 4))), 8, "'left'"),  # type: ignore[arg-type]
        (annotation(thing("cat", difficult=2)), 3, "difficult is 0 or 1"),
        ('<!DOCTYPE a [\n<!ENTITY many "much">\n]>\n<annotation>&many;</annotation>', 2, "entity"),
    ],
)
def test_a_fault_of_an_annotation_is_named_with_file_and_line(kit: Path, xml: str, line: int, reason: str) -> None:
    (kit / "Annotations" / "000001.xml").write_text(xml)
    with pytest.raises(UserError, match=rf"000001\.xml, line {line}: .*{reason}"):
        voc.find_devkits(str(kit))[0].annotation("000001")


@pytest.mark.parametrize("encoding", ["gbk", "nothing-known"])
def test_an_encoding_that_cannot_be_read_is_named_with_the_file(kit: Path, encoding: str) -> None:
    xml = f'<?xml version="1.0" encoding="{encoding}"?>\n{annotation(thing("cat"))}'
    (kit / "Annotations" / "000001.xml").write_text(xml)
    with pytest.raises(UserError, match=r"000001\.xml, line 1: its encoding .* Save it as UTF-8"):
        voc.find_devkits(str(kit))[0].annotation("000001")


def test_ids_come_in_the_order_of_the_list(kit: Path) -> None:
    assert voc.find_devkits(str(kit))[0].ids("trainval") == ["000002", "000001", "000003"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("000001\n\n000009\n", r"test\.txt, line 3: there is no image '000009'"),
        ("000001\n000002\n000001\n", r"test\.txt, line 3: 000001 stands in line 1 already"),
        ("\n", r"test\.txt names no image"),
    ],
)
def test_a_fault_of_a_split_list_is_named_with_file_and_line(kit: Path, text: str, message: str) -> None:
    (kit / "ImageSets" / "Main" / "test.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        voc.find_devkits(str(kit))[0].ids("test")


def test_missing_files_beside_an_image_are_named(kit: Path) -> None:
    devkit = voc.find_devkits(str(kit))[0]
    (kit / "Annotations" / "000001.xml").unlink()
    with pytest.raises(UserError, match=r"000001 .* has no annotation: .*000001\.xml"):
        devkit.annotation("000001")
    with pytest.raises(UserError, match=r"000001 .* has no mask: .*000001\.png"):
        devkit.mask("000001")
    with pytest.raises(UserError, match="no image '7'"):
        devkit.image("7")


def test_without_lists_a_class_of_which_all_is_difficult_is_neither_there_nor_absent(kit: Path) -> None:
    present = voc.presence(voc.find_devkits(str(kit))[0], "trainval", voc.CLASSES)
    cat, dog = voc.CLASSES.index("cat"), voc.CLASSES.index("dog")
    assert present.shape == (3, 20)
    assert present[:, cat].tolist() == [0, 1, 0]
    assert present[:, dog].tolist() == [1, -1, -1]
    assert (np.delete(present, [cat, dog], axis=1) == -1).all()


def test_an_object_that_is_not_difficult_counts_whatever_stands_beside_it(kit: Path) -> None:
    for things in ([thing("cat"), thing("cat", difficult=1)], [thing("cat", difficult=1), thing("cat")]):
        (kit / "Annotations" / "000003.xml").write_text(annotation(*things))
        present = voc.presence(voc.find_devkits(str(kit))[0], "trainval", voc.CLASSES)
        assert present[2, voc.CLASSES.index("cat")] == 1


def write_lists(kit: Path, lines: str = "000001 -1\n000002  1\n000003  0\n") -> None:
    for name in voc.CLASSES:
        (kit / "ImageSets" / "Main" / f"{name}_trainval.txt").write_text(lines)


def test_lists_of_classes_are_believed_before_annotations_and_put_into_the_order_of_the_split(kit: Path) -> None:
    write_lists(kit)
    present = voc.presence(voc.find_devkits(str(kit))[0], "trainval", voc.CLASSES)
    assert (present == np.array([[1], [-1], [0]])).all()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("000001 -1\n000002 2\n000003 0\n", r"line 2: expected an image's id and 1, 0 or -1, got '000002 2'"),
        ("000001 -1\n000002 1\n000004 0\n", r"line 3: '000004' is no image of the split's own list"),
        ("000001 -1\n000002 1\n", r"does not say whether 000003 shows its class"),
    ],
)
def test_a_fault_of_a_list_of_a_class_is_named_with_file_and_line(kit: Path, lines: str, message: str) -> None:
    write_lists(kit)
    (kit / "ImageSets" / "Main" / "cow_trainval.txt").write_text(lines)
    with pytest.raises(UserError, match=rf"cow_trainval\.txt.*{message}"):
        voc.presence(voc.find_devkits(str(kit))[0], "trainval", voc.CLASSES)


def test_lists_of_some_classes_only_are_refused(kit: Path) -> None:
    write_lists(kit)
    (kit / "ImageSets" / "Main" / "sofa_trainval.txt").unlink()
    with pytest.raises(UserError, match=r"19 of the 20 classes .* sofa_trainval\.txt"):
        voc.presence(voc.find_devkits(str(kit))[0], "trainval", voc.CLASSES)


def test_an_object_outside_the_classes_is_named_with_file_and_line(kit: Path) -> None:
    (kit / "Annotations" / "000003.xml").write_text(annotation(thing("cat"), thing("unicorn")))
    with pytest.raises(UserError, match=r"000003\.xml, line 8: 'unicorn' is none of the 20 classes"):
        voc.presence(voc.find_devkits(str(kit))[0], "trainval", voc.CLASSES)


def test_lists_of_classes_are_no_splits_even_of_the_class_train(kit: Path) -> None:
    write_lists(kit)  # among them train_trainval.txt
    assert voc.find_devkits(str(kit))[0].splits() == ["test", "trainval"]


def test_an_unknown_split_names_those_that_exist(kit: Path) -> None:
    with pytest.raises(UserError, match=r"no split 'val'.*2007: test, trainval"):
        voc.choose(str(kit.parent), "val")
    with pytest.raises(UserError, match=r"no split 'val'.*test, trainval"):
        voc.choose(str(kit.parent), "2007_val")


@pytest.fixture
def years(kit: Path) -> Path:
    """The 2007 images, and two of 2012 beside them."""
    both = {"2008_000008": annotation(thing("horse")), "000001": annotation(thing("cow"))}
    write_devkit(kit.parent / "VOC2012", both, {"trainval": ["2008_000008", "000001"]})
    return kit.parent


def test_splits_of_several_years_join_in_the_order_they_are_named(years: Path) -> None:
    chosen = voc.choose(str(years), "2012_trainval+2007_trainval")
    assert [(devkit.year, id) for devkit, id in chosen] == [
        ("2012", "2008_000008"),
        ("2012", "000001"),
        ("2007", "000002"),
        ("2007", "000001"),
        ("2007", "000003"),
    ]
    source = voc.VOCImages(chosen)
    assert source.read(1) == (years / "VOC2012" / "JPEGImages" / "000001.jpg").read_bytes()
    assert source.read(3) == (years / "VOC2007" / "JPEGImages" / "000001.jpg").read_bytes()


def test_the_folder_above_and_a_single_year_are_found_too(years: Path) -> None:
    assert [devkit.year for devkit in voc.find_devkits(str(years.parent))] == ["2007", "2012"]
    assert [devkit.year for devkit in voc.find_devkits(str(years / "VOC2012"))] == ["2012"]


def test_a_split_that_several_years_have_must_be_named_with_the_year(years: Path) -> None:
    with pytest.raises(UserError, match=r"2007_trainval, 2012_trainval or 2007_trainval\+2012_trainval"):
        voc.choose(str(years), "trainval")
    assert len(voc.choose(str(years), "test")) == 1  # only one year has it


def test_splits_that_meet_do_not_join(kit: Path) -> None:
    (kit / "ImageSets" / "Main" / "train.txt").write_text("000001\n")
    with pytest.raises(UserError, match=r"holds the image 000001 .* twice"):
        voc.choose(str(kit), "trainval+train")


def test_other_sets_have_the_classes_of_their_annotations_or_of_their_own_list(tmp_path: Path) -> None:
    root = write_devkit(
        tmp_path / "Blood",
        {"a": annotation(thing("white"), thing("red")), "b": annotation(thing("red"))},
        {"train": ["a"], "test": ["b"]},
    )
    (devkit,) = voc.find_devkits(str(root))
    assert (devkit.year, voc.classes_of([devkit])) == ("Blood", ("red", "white"))
    assert voc.presence(devkit, "test", ("red", "white")).tolist() == [[1, -1]]
    (root / "classes.txt").write_text("white\nred\nblue\n")
    assert voc.classes_of([devkit]) == ("white", "red", "blue")


@pytest.mark.parametrize(("text", "message"), [("\n", "names no class"), ("a\n\na\n", "line 3: 'a' stands in line 1")])
def test_a_fault_of_the_list_of_classes_is_named_with_file_and_line(kit: Path, text: str, message: str) -> None:
    (kit / "classes.txt").write_text(text)
    with pytest.raises(UserError, match=rf"classes\.txt.* {message}"):
        voc.classes_of(voc.find_devkits(str(kit)))


def test_sets_of_different_classes_do_not_join(kit: Path, tmp_path: Path) -> None:
    other = write_devkit(tmp_path / "Blood", {"a": annotation(thing("red"))}, {"train": ["a"]})
    with pytest.raises(UserError, match="do not have the same classes"):
        voc.classes_of([voc.find_devkits(str(kit))[0], voc.find_devkits(str(other))[0]])


def test_some_of_the_twenty_classes_in_a_folder_of_any_name_are_the_twenty(tmp_path: Path) -> None:
    root = write_devkit(tmp_path / "mine", {"a": annotation(thing("dog"))}, {"train": ["a"]})
    assert voc.classes_of(voc.find_devkits(str(root))) == voc.CLASSES


def test_a_tar_file_is_to_be_unpacked(tmp_path: Path) -> None:
    tar = tmp_path / "VOCtrainval_06-Nov-2007.tar"
    tar.write_bytes(b"")
    with pytest.raises(UserError, match=r"Unpack it \(tar xf"):
        voc.find_devkits(str(tar))


def test_a_folder_in_another_layout_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match=r"JPEGImages, Annotations and ImageSets.* it holds photos"):
        voc.find_devkits(str(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        voc.find_devkits(str(tmp_path / "nowhere"))


def test_images_travel_to_other_processes_and_a_lost_file_is_undecodable(kit: Path) -> None:
    source = voc.VOCImages(voc.choose(str(kit), "trainval"))
    assert isinstance(source, Source)
    again = pickle.loads(pickle.dumps(source))
    assert [again.read(i) for i in range(3)] == [source.read(i) for i in range(3)]
    assert again.name(0).endswith("000002.jpg")
    (kit / "JPEGImages" / "000002.jpg").unlink()
    with pytest.raises(Undecodable):
        source.read(0)


def test_other_files_of_the_same_ids_are_other_data(kit: Path) -> None:
    before = voc.VOCImages(voc.choose(str(kit), "trainval")).fingerprint
    assert voc.VOCImages(voc.choose(str(kit), "trainval")).fingerprint == before
    (kit / "JPEGImages" / "000001.jpg").write_bytes(b"another encoding")
    assert voc.VOCImages(voc.choose(str(kit), "trainval")).fingerprint != before


def test_lists_of_classes_and_annotations_agree(kit: Path, tmp_path: Path) -> None:
    # On the real images where they are, else on those written here, with lists made from what was written.
    real = unpacked("voc2012-mini200/VOC2012-mini200.tar", tmp_path / "real")
    if real is None:
        shown = {"000001": {"cat": 1}, "000002": {"dog": 1, "cat": 0}, "000003": {"cat": 0}}
        for name in voc.CLASSES:
            lines = [f"{id} {known.get(name, -1)}\n" for id, known in shown.items()]
            (kit / "ImageSets" / "Main" / f"{name}_trainval.txt").write_text("".join(lines))
    (devkit,) = voc.find_devkits(str(kit if real is None else real))
    by_lists = voc.presence(devkit, "trainval", voc.CLASSES)
    for path in (devkit.root / "ImageSets" / "Main").glob("*_trainval.txt"):
        path.unlink()
    assert (by_lists == voc.presence(devkit, "trainval", voc.CLASSES)).all()
    assert (by_lists == 1).any()


def test_every_box_and_split_of_the_blood_cells_is_read(tmp_path: Path) -> None:
    real = unpacked("bccd-voc/BCCD.tar", tmp_path / "real")
    slip = thing("RBC", (504, 337, 504, 337))
    root = real / "BCCD" if real else write_devkit(
        tmp_path / "BCCD", {"BloodImage_00338": annotation(thing("WBC"), slip)}, {"train": ["BloodImage_00338"]}
    )  # fmt: skip
    (devkit,) = voc.find_devkits(str(root))
    boxes = {id: devkit.annotation(id).boxes for id in devkit.images}
    empty = {(id, box.line) for id, found in boxes.items() for box in found if not box.has_area}
    if real:
        assert sum(map(len, boxes.values())) == 4888
        assert [len(devkit.ids(split)) for split in ("train", "val", "test", "trainval")] == [205, 87, 72, 292]
        assert empty == {("BloodImage_00338", 158), ("BloodImage_00343", 50)}
    else:
        assert empty == {("BloodImage_00338", 8)}
