# SPDX-License-Identifier: Apache-2.0
"""Photos decoded at a fraction of their size: the same place, each image on its own, and never where it matters."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from jpegs import LARGE, Photos, as_png, photo, turned
from test_loader import InMemory, made_again, make, same

from kinfold.data import cutting
from kinfold.data.crop import crop_reduced_into, crop_resize, crop_resize_into
from kinfold.data.cutting import MARGIN, Cutting
from kinfold.data.decode import Undecodable, look
from kinfold.data.work import Task
from kinfold.errors import UserError
from kinfold.recipe import load


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_a_crop_written_into_a_batch_is_the_crop(channels):
    image = np.random.default_rng(0).integers(0, 256, (40, 50, channels), dtype=np.uint8)
    batch = torch.zeros(2, channels, 16, 16, dtype=torch.uint8).to(memory_format=torch.channels_last)
    for box in ((0, 0, 40, 50), (3, 7, 16, 16), (1, 2, 5, 31), (39, 49, 1, 1)):
        crop_resize_into(image, box, batch[1])
        top, left, height, width = box
        cut = torch.from_numpy(image[top : top + height, left : left + width].copy()).permute(2, 0, 1)[None]
        expected = torch.nn.functional.interpolate(cut, size=(16, 16), mode="bilinear", antialias=True)[0]
        assert torch.equal(batch[1], expected)
        assert torch.equal(crop_resize(image, box, 16), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_decoded_at_a_fraction_shows_the_same_place(orientation):
    raw = photo(0, 203, 331, exif=turned(orientation))
    full = look(raw).decode().pixels
    drawn = np.random.default_rng(orientation)
    for shrink in (2, 4, 8):
        reduced = look(raw).decode(shrink)
        assert reduced.pixels.shape[:2] == tuple(-(-side // shrink) for side in full.shape[:2])
        for _ in range(6):
            height, width = (int(drawn.integers(100, side + 1)) for side in full.shape[:2])
            top, left = int(drawn.integers(full.shape[0] - height + 1)), int(drawn.integers(full.shape[1] - width + 1))
            size = int(min(height, width) / shrink / MARGIN)
            out, place = torch.empty(3, size, size, dtype=torch.uint8), (top, left, height, width)
            crop_reduced_into(reduced, place, out)
            apart = (out.int() - crop_resize(full, place, size).int()).abs().float()
            assert apart.mean() < 2.5
            assert apart.max() <= 30
            # One pixel of the full image aside is another place: the distance grows.
            if left + width < full.shape[1] and size > 30 and shrink == 2:
                beside = (out.int() - crop_resize(full, (top, left + 1, height, width), size).int()).abs().float()
                assert beside.mean() > apart.mean()


def test_scaled_decoding_draws_the_same_numbers_and_nearly_the_same_pixels():
    work, task = Cutting(Photos([(211, 163)] * 8), LARGE, 3, 0), Task(0, np.arange(8))
    full, scaled = work(task), replace(work, scaled=True)(task)
    for a, b, c, d in zip(full.crops, scaled.crops, full.drawn, scaled.drawn):
        assert np.array_equal(c.box, d.box)
        assert not torch.equal(a, b)
        assert (a.float() - b.float()).abs().mean() < 2


def test_scaled_decoding_leaves_small_photos_and_other_formats_as_they_are():
    for source in (Photos([(40, 50)] * 4), InMemory([(300, 200)] * 4)):
        work, task = Cutting(source, LARGE, 3, 0), Task(0, np.arange(4))
        assert all(torch.equal(a, b) for a, b in zip(work(task).crops, replace(work, scaled=True)(task).crops))


def test_scaled_views_are_the_same_for_any_workers_and_are_made_again():
    source = Photos([(180 + 9 * i, 200) for i in range(16)], broken=frozenset({3}))
    settings = {"views": LARGE, "scaled_decode": True}
    alone, several = make(source, **settings), make(source, workers=2, **settings)
    for one, other in zip(alone.epoch(0), several.epoch(0), strict=True):
        assert same(one, other)
        for row, position in enumerate(one.index.tolist()):
            again = made_again(source, position, LARGE, epoch=0, scaled=True)
            assert all(torch.equal(view, one.views[i][row]) for i, view in enumerate(again))
    assert list(alone.bad) == [3]


def test_a_set_of_large_photos_of_one_size_goes_by_workers_where_they_are_decoded_smaller():
    large, small = Photos([(180, 180)] * 8), Photos([(50, 50)] * 8)
    assert make(large, views=LARGE).resident
    assert not make(large, views=LARGE, scaled_decode=True).resident
    assert make(small, views=LARGE, scaled_decode=True).resident
    with pytest.raises(UserError, match="scaled_decode=false, or leave resident out"):
        make(large, views=LARGE, scaled_decode=True, resident=True)


MIXED = ([0, 1], [30, 31], [31], list(range(12)))  # which of 32 files are JPEGs


@pytest.mark.parametrize("jpegs", MIXED)
@pytest.mark.parametrize("side", [180, 60])
def test_of_mixed_files_each_jpeg_is_decoded_smaller_and_nothing_else_whichever_come_first(jpegs, side):
    source = Photos([(side, side)] * 32)
    source.files = [file if i in jpegs else as_png(file) for i, file in enumerate(source.files)]
    scaled = make(source, views=LARGE, scaled_decode=True)
    assert scaled.resident == (side == 60)  # too small for any view to be cut from a fraction
    full = make(source, views=LARGE, resident=False)
    smaller = set()
    for one, other in zip(scaled.epoch(0), full.epoch(0), strict=True):
        for row, position in enumerate(one.index.tolist()):
            if not all(torch.equal(a[row], b[row]) for a, b in zip(one.views, other.views)):
                smaller.add(position)
    assert smaller <= set(jpegs)
    assert bool(smaller) == (side == 180)


def test_a_set_without_jpegs_is_held_whole_however_large_its_images_are(tmp_path, monkeypatch):
    monkeypatch.setattr("kinfold.data.resident.KEPT_FROM", 1)
    monkeypatch.setenv("KINFOLD_CACHE", str(tmp_path))
    photographs = Photos([(180, 180)] * 16)
    pngs = Photos([(180, 180)] * 16)
    pngs.files = [as_png(file) for file in pngs.files]
    loader = make(pngs, views=LARGE, scaled_decode=True)
    assert loader.resident
    for one, other in zip(loader.epoch(0), make(pngs, views=LARGE, resident=False).epoch(0), strict=True):
        assert same(one, other)
    # What one run has kept whole is nothing that a run with scaled decoding takes.
    assert make(photographs, views=LARGE).resident
    assert not make(photographs, views=LARGE, scaled_decode=True).resident


def test_a_jpeg_behind_other_files_is_named_where_the_set_is_to_be_held_whole():
    source = Photos([(180, 180)] * 16)
    source.files = [as_png(file) for file in source.files[:15]] + source.files[15:]
    with pytest.raises(UserError, match=r"decodes image-15\.png, a large JPEG, .*scaled_decode=false, or leave res"):
        make(source, views=LARGE, scaled_decode=True, resident=True)
    assert make(source, views=LARGE, resident=True).resident


def test_the_papers_recipes_decode_in_full_and_that_for_own_photos_does_not():
    run_settings = {"data": "-", "out": "-"}
    assert not load("sce/imagenet-200", run=run_settings)[0].images.scaled_decode
    assert load("own-images", run=run_settings)[0].images.scaled_decode


def test_a_photo_that_is_damaged_behind_its_header_is_replaced_with_numbers_of_its_own():
    source = Photos([(60 + 10 * i, 90) for i in range(6)], broken=frozenset({2}))
    with pytest.raises(Undecodable, match="damaged"):
        look(source.read(2)).decode()
    cut = Cutting(source, LARGE, 3, 0)(Task(0, np.arange(6)))
    stand_in = int(cut.index[2])
    assert list(cut.bad) == [2]
    assert stand_in != 2
    for crops, numbers in zip(cut.crops, cut.drawn):
        assert torch.equal(crops[2], crops[stand_in])
        assert numbers.box[2].tolist() == numbers.box[stand_in].tolist()


@pytest.mark.parametrize("source", [Photos, InMemory])
def test_a_worker_does_not_hold_a_whole_batch_decoded(source, monkeypatch):
    work, task = Cutting(source([(400, 500)] * 12), LARGE, 3, 5), Task(0, np.arange(12))
    all_held = work(task)
    monkeypatch.setattr(cutting, "_HELD_BYTES", 2**20)
    tracemalloc.start()
    try:
        together = work(task)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * 400 * 500 * 3  # of 12
    for a, b in zip(together.crops, all_held.crops):
        assert torch.equal(a, b)
