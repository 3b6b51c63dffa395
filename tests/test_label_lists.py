# SPDX-License-Identifier: Apache-2.0
"""Which images keep their labels: shares rounded up in every class, and files that name images."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kinfold.data.label_lists import draw_per_class, read_list
from kinfold.data.sources import Subset, open_source
from kinfold.errors import UserError


class Named:
    """Images that have names and nothing else."""

    labels = None
    classes = None
    fingerprint = "named"

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.description = f"{len(names)} names"

    def __len__(self) -> int:
        return len(self.names)

    def read(self, i: int) -> bytes:
        return b""

    def name(self, i: int) -> str:
        return self.names[i]


IMAGENET = Named([f"/data/train/n0{c}/n0{c}_{i}.JPEG" for c in (1, 2) for i in range(20)])


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "list.txt"
    path.write_text(text, encoding="utf-8")
    return path


# Counts where the product in floats lies a little above a whole number, and would be rounded up once too often.
@pytest.mark.parametrize(
    ("share", "members", "count"),
    [(0.01, 700, 7), (0.01, 1300, 13), (0.01, 1301, 14), (0.1, 30, 3), (0.1, 1300, 130), (0.01, 3, 1), (1.0, 9, 9)],
)
def test_the_share_of_a_class_is_rounded_up(share: float, members: int, count: int) -> None:
    labels = np.repeat([3, 8], [members, 50])
    kept = draw_per_class(labels, share=share, seed=0)
    assert (labels[kept] == 3).sum() == count
    assert (labels[kept] == 8).sum() == math.ceil(round(50 * share, 9))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(1, 100), st.integers(0, 3))
def test_every_class_keeps_an_image_and_a_smaller_share_is_part_of_a_larger(
    labels: list[int], percent: int, draw: int
) -> None:
    given_labels = np.array(labels)
    kept = draw_per_class(given_labels, share=percent / 100, seed=5, draw=draw)
    assert set(given_labels[kept]) == set(labels)
    assert len(np.unique(kept)) == len(kept)
    assert set(draw_per_class(given_labels, share=percent / 200, seed=5, draw=draw)) <= set(kept)


def test_draws_and_seeds_are_other_images_and_each_always_the_same() -> None:
    labels = np.arange(1000) % 10
    first = draw_per_class(labels, share=0.1, seed=0)
    assert np.array_equal(first, draw_per_class(labels, share=0.1, seed=0, draw=0))
    for other in (draw_per_class(labels, share=0.1, seed=0, draw=1), draw_per_class(labels, share=0.1, seed=1)):
        assert len(set(first) & set(other)) < 30  # 10 are expected by chance
    # Classes are drawn apart: not the same places in each.
    assert len({tuple(first[labels[first] == c] // 10) for c in range(10)}) == 10


def test_published_names_are_found_by_their_ending(tmp_path: Path) -> None:
    path = written(tmp_path, "n02_19.JPEG\nn01_0.JPEG\n\n  n01_13.JPEG\n")
    assert read_list(path, IMAGENET, say=pytest.fail).tolist() == [0, 13, 39]


def test_class_folders_paths_and_members_of_tars_are_found(tmp_path: Path) -> None:
    source = Named(["/d/cat/1.png", "/d/dog/1.png", "/d/train.tar:dog/2.png", "/d/train.tar:3.png", "/d/cat/11.png"])
    path = written(tmp_path, "./dog/1.png\n/d/cat/1.png\ndog/2.png\n3.png\n")
    assert read_list(path, source, say=pytest.fail).tolist() == [0, 1, 2, 3]


def test_lists_of_windows_editors_are_read(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbfn01_3.JPEG\r\nn02_0.JPEG\r\n")
    assert read_list(path, IMAGENET, say=pytest.fail).tolist() == [3, 20]


def test_a_border_within_a_name_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line 1 \(1\.JPEG\)"):
        read_list(written(tmp_path, "1.JPEG\n"), IMAGENET, say=pytest.fail)


def test_unknown_names_are_told_with_file_line_and_count(tmp_path: Path) -> None:
    path = written(tmp_path, "n01_0.JPEG\n" + "".join(f"n09_{i}.JPEG\n" for i in range(7)))
    with pytest.raises(UserError) as error:
        read_list(path, IMAGENET, say=pytest.fail)
    text = str(error.value)
    assert f"{path} names 7 of 8 images that are not there: line 2 (n09_0.JPEG), line 3 (n09_1.JPEG)" in text
    assert "and 2 more" in text
    assert "/data/train/n01/n01_0.JPEG" in text  # what names look like here


def test_a_name_of_several_images_is_refused(tmp_path: Path) -> None:
    source = Named(["/d/cat/1.png", "/d/dog/1.png", "/d/dog/2.png"])
    with pytest.raises(UserError, match=r"line 2 \(1\.png: /d/cat/1\.png and /d/dog/1\.png\).*class/file"):
        read_list(written(tmp_path, "2.png\n1.png\n"), source, say=pytest.fail)


def test_a_repeated_name_counts_once_and_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    path = written(tmp_path, "n01_0.JPEG\nn01_1.JPEG\nn01_0.JPEG\n")
    assert read_list(path, IMAGENET, say=said.append).tolist() == [0, 1]
    assert len(said) == 1
    assert "line 3 (n01_0.JPEG, as line 1)" in said[0]
    said.clear()
    path = written(tmp_path, "n01_0.JPEG\nn01/n01_0.JPEG\n")
    assert read_list(path, IMAGENET, say=said.append).tolist() == [0]
    assert "in two ways" in said[0]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"caf\xe9.png\n"])
def test_a_list_without_names_is_refused_by_its_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"list\.txt"):
        read_list(path, IMAGENET, say=pytest.fail)
    with pytest.raises(UserError, match=r"none\.txt cannot be read as a list of names: No such file"):
        read_list(tmp_path / "none.txt", IMAGENET, say=pytest.fail)


@given(st.sets(st.integers(0, 39), min_size=1))
def test_a_list_of_any_images_gives_these_images(tmp_path_factory: pytest.TempPathFactory, chosen: set[int]) -> None:
    path = tmp_path_factory.mktemp("lists") / "list.txt"
    path.write_text("\n".join(IMAGENET.name(i).rpartition("/")[2] for i in sorted(chosen, reverse=True)))
    assert read_list(path, IMAGENET, say=pytest.fail).tolist() == sorted(chosen)


def test_files_in_class_folders_are_found_in_a_part_of_them_too(tmp_path: Path) -> None:
    for word in ("ant", "bee"):
        (tmp_path / "photos" / word).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (4, 4)).save(tmp_path / "photos" / word / f"{word}_{i}.png")
    source = open_source(str(tmp_path / "photos"))
    path = written(tmp_path, "bee_1.png\nant/ant_2.png\n")
    found = read_list(path, source, say=pytest.fail)
    assert [Path(source.name(int(i))).name for i in found] == ["ant_2.png", "bee_1.png"]
    part = Subset(source, found[::-1].copy())
    assert read_list(path, part, say=pytest.fail).tolist() == [0, 1]
