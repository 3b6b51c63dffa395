# SPDX-License-Identifier: Apache-2.0
"""What the loader promises: the same batches for any number of workers and processes, from any step, and no hang."""

import hashlib
import io
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image

from kinfold.data.centre_crops import evaluation_batches
from kinfold.data.cutting import Cutting
from kinfold.data.finish import finish
from kinfold.data.loader import Loader
from kinfold.data.work import Task
from kinfold.errors import UserError
from kinfold.randomness import ORDER, REPLACE, integers, permutation
from kinfold.views import Augmentation, Views, preset

MEAN, STD = (0.48, 0.45, 0.41), (0.23, 0.24, 0.26)
VIEWS = Views(
    augment=(preset("moco-v2", size=12, solarize=0.2), Augmentation(size=9, scale=(0.5, 1.0))), pairs=((0, 1),)
)


@dataclass
class InMemory:
    """Images kept as PNG files in memory; those in `broken` are cut short, those in `gone` cannot be read."""

    sizes: list[tuple[int, int]]
    broken: frozenset[int] = frozenset()
    gone: frozenset[int] = frozenset()
    labels: None = None
    classes: None = None
    description: str = "a few images in memory"
    files: list[bytes] = field(default_factory=list)

    def __post_init__(self):
        for position, (height, width) in enumerate(self.sizes):
            pixels = np.random.default_rng(position).integers(0, 256, (height, width, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            cut = 60 if position in self.broken else None
            self.files.append(file.getvalue()[:cut])

    @property
    def fingerprint(self):
        return hashlib.sha256(b"".join(self.files)).hexdigest()

    def __len__(self):
        return len(self.sizes)

    def read(self, i):
        if i in self.gone:
            raise FileNotFoundError(2, "No such file or directory")
        return self.files[i]

    def name(self, i):
        return f"image-{i}.png"


def even(count, **broken):
    return InMemory([(16, 16)] * count, **broken)


def mixed(count, **broken):
    return InMemory([(10 + i % 7, 14 + i % 5) for i in range(count)], **broken)


def make(source, **settings):
    given = {"channels": 3, "mean": MEAN, "std": STD, "batch_size": 8, "seed": 3} | settings
    return Loader(source, given.pop("views", VIEWS), **given)


def same(left, right):
    return torch.equal(left.index, right.index) and all(
        torch.equal(a, b) for a, b in zip(left.views, right.views, strict=True)
    )


def made_again(source, position, views, *, epoch, **how):
    """One image's views, from its address alone."""
    cut = Cutting(source, views, 3, 3, **how)(Task(epoch, np.array([position])))
    return [view[0] for view in finish(cut.crops, cut.drawn, MEAN, STD)]


BOTH_WAYS = pytest.mark.parametrize("resident", [True, False])


@BOTH_WAYS
def test_an_epoch_shows_every_image_once_in_the_order_of_its_address(resident):
    loader = make(even(35), resident=resident)
    assert loader.steps_per_epoch == 4
    batches = list(loader.epoch(2))
    assert [len(batch.index) for batch in batches] == [8] * 4
    shown = torch.cat([batch.index for batch in batches])
    assert shown.tolist() == permutation(ORDER, 3, 2, n=35)[:32].tolist()
    assert shown.dtype == torch.int64
    for batch in batches:
        assert [tuple(view.shape) for view in batch.views] == [(8, 3, 12, 12), (8, 3, 9, 9)]
        assert all(view.dtype == torch.float32 and view.isfinite().all() for view in batch.views)
    assert not same(batches[0], next(make(even(35), resident=resident, seed=4).epoch(2)))


@BOTH_WAYS
def test_batches_are_bit_equal_for_any_number_of_workers(resident):
    source = even(24, broken=frozenset({5})) if resident else mixed(24, broken=frozenset({5}))
    alone = make(source, resident=resident)
    several = make(source, resident=resident, workers=2)
    for one, other in zip(alone.epoch(0), several.epoch(0), strict=True):
        assert same(one, other)
    assert alone.bad == several.bad
    assert list(alone.bad) == [5]


@BOTH_WAYS
@pytest.mark.parametrize("start", [1, 3, 4])
def test_an_epoch_taken_up_in_the_middle_goes_on_as_it_would_have(resident, start):
    whole = list(make(even(35), resident=resident).epoch(1))
    rest = list(make(even(35), resident=resident).epoch(1, start))
    assert len(rest) == 4 - start
    assert all(same(one, other) for one, other in zip(whole[start:], rest, strict=True))


@BOTH_WAYS
@pytest.mark.parametrize("world", [2, 4])
def test_the_processes_batches_interleave_to_that_of_one_process(resident, world):
    source = even(19, broken=frozenset({2}))
    one = list(make(source, resident=resident).epoch(0))
    ranks = [list(make(source, resident=resident, rank=rank, world=world).epoch(0)) for rank in range(world)]
    assert all(len(batches) == len(one) for batches in ranks)
    for step, batch in enumerate(one):
        for rank in range(world):
            part = ranks[rank][step]
            assert torch.equal(part.index, batch.index[rank::world])
            for view, whole in zip(part.views, batch.views, strict=True):
                assert torch.equal(view, whole[rank::world])


@BOTH_WAYS
def test_one_images_views_are_made_again_from_its_address(resident):
    source = even(16) if resident else mixed(16)
    for batch in make(source, resident=resident).epoch(5):
        for row, position in enumerate(batch.index.tolist()):
            again = made_again(source, position, VIEWS, epoch=5)
            assert all(torch.equal(view, batch.views[i][row]) for i, view in enumerate(again))


def test_a_resident_set_and_workers_make_the_same_views_to_the_bit():
    source = even(19, broken=frozenset({5}))
    alone, workers = make(source, resident=True), make(source, resident=False)
    for epoch in (0, 1):
        for one, other in zip(alone.epoch(epoch), workers.epoch(epoch), strict=True):
            assert same(one, other)


@BOTH_WAYS
def test_an_unreadable_image_is_replaced_as_its_address_says(resident):
    source = even(16, broken=frozenset({3, 7}), gone=frozenset({11}))
    loader = make(source, resident=resident)
    shown = torch.cat([batch.index for batch in loader.epoch(0)]).tolist()
    assert sorted(loader.bad) == [3, 7, 11]
    assert "No such file" in loader.bad[11]
    for place, position in enumerate(permutation(ORDER, 3, 0, n=16).tolist()):
        expected, trial = position, 0
        while expected in (3, 7, 11):
            expected, trial = integers(REPLACE, 3, 0, position, trial, below=16), trial + 1
        assert shown[place] == expected


def test_a_replaced_image_shows_the_views_of_its_own_address():
    source = even(16, broken=frozenset({3}))
    batch = next(make(source, resident=False, batch_size=16).epoch(0))
    order = permutation(ORDER, 3, 0, n=16).tolist()
    place, stand_in = order.index(3), int(batch.index[order.index(3)])
    assert torch.equal(batch.views[0][place], batch.views[0][order.index(stand_in)])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("resident", [True, False, None])
def test_a_set_without_one_readable_image_is_an_error_with_names_and_reasons(workers, resident):
    source = even(9, broken=frozenset(range(9)))
    with pytest.raises(
        UserError, match=r"No readable image.*image-\d\.png: .*a few images in memory|No readable"
    ) as raised:
        list(make(source, workers=workers, resident=resident).epoch(0))
    assert "image-" in str(raised.value)
    assert "Traceback" not in str(raised.value)


def test_what_goes_wrong_in_the_code_is_not_taken_for_a_bad_image():
    source = even(8)
    source.files = None
    with pytest.raises(TypeError):
        next(make(source, resident=False).epoch(0))


def test_the_data_decide_whether_they_stay_on_the_device(monkeypatch):
    assert make(even(10)).resident
    assert not make(mixed(10)).resident
    assert not make(even(10), resident=False).resident
    late = InMemory([(16, 16)] * 80 + [(16, 17)], broken=frozenset({1}))
    loader = make(late)
    assert not loader.resident
    assert loader.bad == {}
    assert len(list(loader.epoch(0))) == 10
    with pytest.raises(UserError, match=r"image-80\.png is not of the same size"):
        make(late, resident=True)
    monkeypatch.setattr("kinfold.data.resident.RESIDENT_BYTES", 10 * 3 * 16 * 16 - 1)
    assert not make(even(10)).resident
    assert make(even(9)).resident
    assert make(even(10), resident=True).resident


def test_decoding_a_resident_set_tells_how_far_it_is(monkeypatch):
    monkeypatch.setattr("kinfold.data.resident._DECODED_AT_ONCE", 4)
    told = []
    make(even(10), progress=told.append)
    assert told == [4, 4, 2]


def test_the_last_batch_comes_where_it_is_wanted():
    loader = make(even(21), drop_last=False)
    assert [len(batch.index) for batch in loader.epoch(0)] == [8, 8, 5]
    assert loader.steps_per_epoch == 3
    assert make(even(5), drop_last=False).steps_per_epoch == 1
    shards = [make(even(21), drop_last=False, rank=rank, world=2) for rank in (0, 1)]
    assert [[len(batch.index) for batch in shard.epoch(0)] for shard in shards] == [[4, 4, 2]] * 2
    assert [shard.steps_per_epoch for shard in shards] == [3, 3]
    assert make(even(17), drop_last=False, world=2).steps_per_epoch == 2


def test_what_cannot_work_is_refused_with_what_to_change():
    with pytest.raises(UserError, match="Lower batch_size to 7 or less"):
        make(even(7))
    with pytest.raises(UserError, match="multiple of 3"):
        make(even(9), world=3)
    with pytest.raises(UserError, match="multiple of 6"):
        make(even(9), world=2, accumulate=3)
    with pytest.raises(UserError, match="There are no images in a few images in memory"):
        make(even(0))
    with pytest.raises(ValueError, match="start_step"):
        next(make(even(9)).epoch(0, 2))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_callers_random_numbers_stay_untouched(workers):
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(0)
    np.random.seed(0)
    for resident in (True, False):
        list(make(even(9), workers=workers, resident=resident).epoch(0))
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])


def test_images_of_one_pixel_make_views():
    for resident in (True, False):
        batch = next(make(InMemory([(1, 1)] * 8), resident=resident).epoch(0))
        assert batch.views[0].shape == (8, 3, 12, 12)
        assert batch.views[0].isfinite().all()


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channel_counts_work(channels, monkeypatch):
    source = even(8)
    source.files = [np.random.default_rng(i).integers(0, 256, (16, 16, channels), dtype=np.uint8) for i in range(8)]
    for resident in (True, False):
        batch = next(
            make(source, channels=channels, mean=(0.5,) * channels, std=(0.2,) * channels, resident=resident).epoch(0)
        )
        assert batch.views[0].shape == (8, channels, 12, 12)


def test_waiting_counts_the_time_for_images_and_starts_again(monkeypatch):
    loader = make(mixed(16))
    list(loader.epoch(0))
    assert loader.waiting > 0
    loader.reset_waiting()
    assert loader.waiting == 0


class Lethal(InMemory):
    """A source that ends the process that reads image 5 in a worker."""

    def read(self, i):
        if i == 5 and torch.utils.data.get_worker_info() is not None:
            os._exit(1)
        return super().read(i)


def test_a_worker_that_dies_is_an_error_and_no_hang():
    with pytest.raises(UserError, match="Lower the number of workers"):
        list(make(Lethal([(16, 16)] * 16), workers=1, resident=False).epoch(0))


def test_an_epoch_that_is_left_early_can_be_begun_again():
    loader = make(mixed(24), workers=1)
    first = next(loader.epoch(0))
    assert same(first, next(loader.epoch(0)))


def test_work_in_parts_equals_work_at_once(monkeypatch):
    work, task = Cutting(mixed(20), VIEWS, 3, 0), Task(1, np.arange(20))
    whole = work(task)
    monkeypatch.setattr("kinfold.data.cutting._HELD", 3)
    parts = work(task)
    assert all(torch.equal(a, b) for a, b in zip(whole.crops, parts.crops))
    assert all(np.array_equal(a.order, b.order) for a, b in zip(whole.drawn, parts.drawn))


def plain(pixels):
    return pixels.float().mul(torch.tensor(STD)[:, None, None]).add(torch.tensor(MEAN)[:, None, None]).mul(255)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_gives_every_readable_image_once_and_in_order(workers):
    source = mixed(23, broken=frozenset({0, 9}))
    bad = {}
    batches = list(
        evaluation_batches(source, size=8, channels=3, mean=MEAN, std=STD, batch_size=5, workers=workers, bad=bad)
    )
    positions = np.concatenate([where for _, where in batches])
    assert positions.tolist() == [i for i in range(23) if i not in (0, 9)]
    assert sorted(bad) == [0, 9]
    assert all(images.shape == (len(where), 3, 8, 8) for images, where in batches)


@pytest.mark.parametrize("resize", [None, 8, 11, 40])
def test_evaluation_resizes_and_cuts_as_torchvision_does(resize):
    source = InMemory([(20, 33), (33, 20), (50, 51), (8, 9), (31, 21)])
    batches = evaluation_batches(source, size=8, resize=resize, channels=3, mean=MEAN, std=STD, batch_size=2)
    images = torch.cat([images for images, _ in batches])
    for position, image in enumerate(images):
        original = torch.from_numpy(np.array(Image.open(io.BytesIO(source.files[position])))).permute(2, 0, 1)
        expected = F.center_crop(F.resize(original, [resize or 8], antialias=True), [8, 8])
        assert (plain(image) - expected).abs().max() <= 1.01


def test_evaluation_leaves_images_of_the_right_size_as_they_are():
    source = even(3)
    ((images, _),) = evaluation_batches(source, size=16, resize=20, channels=3, mean=MEAN, std=STD, batch_size=8)
    for position, image in enumerate(images):
        original = torch.from_numpy(np.array(Image.open(io.BytesIO(source.files[position])))).permute(2, 0, 1)
        assert (plain(image) - original).abs().max() < 1e-3


def test_evaluation_without_a_readable_image_or_with_too_small_a_resize_is_an_error():
    with pytest.raises(UserError, match="No readable image: 4 of the 4"):
        list(
            evaluation_batches(
                even(4, broken=frozenset(range(4))), size=8, channels=3, mean=MEAN, std=STD, batch_size=3
            )
        )
    with pytest.raises(UserError, match="resize is 6"):
        list(evaluation_batches(even(4), size=8, resize=6, channels=3, mean=MEAN, std=STD, batch_size=3))


def test_real_photos_from_a_parquet_table_make_batches():
    from kinfold.data.sources import open_source

    data = Path(os.environ.get("KINFOLD_DATA", Path(__file__).parents[2] / "shared" / "data")) / "cifar10"
    source = open_source(str(data), limit=64) if data.exists() else open_source("digits", limit=64)
    alone, workers = make(source, resident=False), make(source, resident=False, workers=1)
    for one, other in zip(alone.epoch(0), workers.epoch(0), strict=True):
        assert same(one, other)
    assert alone.bad == {}
    assert make(source).resident
