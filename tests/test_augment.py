# SPDX-License-Identifier: Apache-2.0
"""The augmentations against torchvision's: same numbers, same pixels; and the numbers spread alike."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from torchvision.transforms import RandomResizedCrop

from kinfold.data.augment import Drawn, draw
from kinfold.data.crop import crop_resize
from kinfold.data.exact_crop import crop_levels
from kinfold.data.finish import _together, finish
from kinfold.data.fused import fused
from kinfold.data.photometric import one_by_one, photometric
from kinfold.views import PRESETS, Augmentation, preset

MEAN, STD = (0.48, 0.45, 0.41), (0.23, 0.24, 0.26)


def photo(height, width, channels=3, seed=0):
    """Smooth shapes with noise: uint8 [H, W, C]."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [
        np.sin(random.uniform(2, 12) * x + random.uniform(2, 12) * y + random.uniform(0, 6)) for _ in range(channels)
    ]
    image = 127 + 100 * np.stack(waves, 2) + random.normal(0, 12, (height, width, channels))
    return np.clip(image, 0, 255).astype(np.uint8)


def drawn_for(augmentation, batch, size, *, epoch=0, view=0, start=0):
    side = np.full(batch, size)
    return draw(
        augmentation,
        seed=0,
        epoch=epoch,
        image=np.arange(start, start + batch),
        view=view,
        height=side,
        width=side,
    )


def by_torchvision(image, drawn, i, augmentation):
    """One image [C, S, S] through torchvision's functions, as drawn for image i."""
    colour = image.shape[0] == 3

    def grey(x):
        return F.rgb_to_grayscale(x, num_output_channels=3) if drawn.grey[i] and colour else x

    if augmentation.grey_first:
        image = grey(image)
    if drawn.jitter[i]:
        adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
        for which in drawn.order[i]:
            if colour or which < 2:
                image = adjust[which](image, float(drawn.factors[i, which]))
    if not augmentation.grey_first:
        image = grey(image)
    if drawn.blur[i]:
        kernel = 2 * math.ceil(3 * augmentation.blur_sigma[1]) + 1
        image = F.gaussian_blur(image, [kernel, kernel], [float(drawn.sigma[i])] * 2)
    if drawn.solarize[i]:
        image = F.solarize(image, augmentation.solarize_threshold)
    if drawn.flip[i]:
        image = F.horizontal_flip(image)
    return F.normalize(image, MEAN[: image.shape[0]], STD[: image.shape[0]])


EVERYTHING = Augmentation(
    size=24,
    jitter=(0.4, 0.4, 0.4, 0.2),
    jitter_probability=0.9,
    grey=0.3,
    blur=0.6,
    solarize=0.3,
)


@pytest.mark.parametrize("grey_first", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_equals_torchvision_with_the_numbers_drawn_for_it(grey_first, channels):
    augmentation = Augmentation(
        size=24,
        jitter=(0.4, 0.4, 0.4, 0.2),
        jitter_probability=0.9,
        grey=0.3,
        blur=0.6,
        solarize=0.3,
        grey_first=grey_first,
    )
    images = torch.stack([torch.from_numpy(photo(24, 24, channels, i)).permute(2, 0, 1) for i in range(64)]) / 255.0
    before = images.clone()
    drawn = drawn_for(augmentation, 64, 24)
    for mask in (drawn.jitter, drawn.grey, drawn.blur, drawn.solarize, drawn.flip):
        assert 0 < mask.sum() < 64  # the batch holds both cases of everything
    assert len({tuple(order) for order in drawn.order}) > 15
    result = photometric(images, drawn, MEAN[:channels], STD[:channels])
    assert torch.equal(images, before)
    for i in range(64):
        expected = by_torchvision(images[i], drawn, i, augmentation)
        # Solarising jumps where a pixel is within rounding of the threshold.
        difference = (result[i] - expected).abs()
        assert (difference > 1e-4).float().mean() < 1e-3, f"image {i}: {difference.max()}"


def without_branch(images, drawn, mean, std):
    return fused(images, drawn, mean, std, compiled=False)


@pytest.mark.parametrize("way", [photometric, without_branch])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [5, 24])
def test_the_fast_ways_equal_the_plain_one(way, channels, size):
    names = ("moco-v1", "moco-v2", "sce-beta", "weak")
    augmentations = [preset(name, size=size) for name in names] + [EVERYTHING]
    drawn = Drawn.join([drawn_for(augmentation, 20, 30, start=100 * i) for i, augmentation in enumerate(augmentations)])
    images = torch.stack([torch.from_numpy(photo(size, size, channels, i)).permute(2, 0, 1) for i in range(100)])
    images[3] = 0
    images[4] = 128
    mean, std = (*MEAN, 0.5)[:channels], (*STD, 0.2)[:channels]
    before = images.clone()
    result, expected = way(images, drawn, mean, std), one_by_one(images, drawn, mean, std)
    assert torch.equal(images, before)
    assert result.dtype == torch.float32
    assert result.is_contiguous()
    # Solarising jumps where a pixel is within rounding of the threshold.
    assert ((result - expected).abs() > 5e-5).float().mean() < 1e-4
    floats = images / 255.0
    assert torch.equal(way(floats, drawn, mean, std), result)
    if way is photometric:  # the memory's order does not matter
        assert torch.equal(way(images.contiguous(memory_format=torch.channels_last), drawn, mean, std), result)


def test_views_are_finished_as_each_alone():
    sizes = (24, 10, 24)
    crops = [torch.randint(0, 256, (6, 3, size, size), dtype=torch.uint8) for size in sizes]
    drawn = [drawn_for(EVERYTHING, 6, 30, view=view) for view in range(3)]
    views = finish(crops, drawn, MEAN, STD)
    for view, images, numbers in zip(views, crops, drawn):
        assert torch.equal(view, photometric(images, numbers, MEAN, STD))
    # Elsewhere than on a CPU those of one size go together, and come back in their places.
    assert _together([images.to("meta") for images in crops]) == [[0, 2], [1]]
    joined = Drawn.join([drawn[0], drawn[2]])
    together = photometric(torch.cat([crops[0], crops[2]]), joined, MEAN, STD)
    assert torch.equal(together[6:], views[2])


@pytest.mark.parametrize("single", ["brightness", "contrast", "saturation", "hue", "grey", "blur", "flip"])
def test_each_operation_alone_equals_torchvision_to_rounding(single):
    strength = [0.0] * 4
    names = ("brightness", "contrast", "saturation", "hue")
    if single in names:
        strength[names.index(single)] = 0.45
    augmentation = Augmentation(
        size=20,
        jitter=tuple(strength),
        jitter_probability=1.0,
        grey=float(single == "grey"),
        blur=float(single == "blur"),
        flip=float(single == "flip"),
    )
    images = torch.rand(16, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    images[0] = 0.5  # no colour at all: the hue of grey is no number
    images[1, 0] = images[1, 1]  # two channels the same
    drawn = drawn_for(augmentation, 16, 20)
    result = photometric(images, drawn, MEAN, STD)
    expected = torch.stack([by_torchvision(images[i], drawn, i, augmentation) for i in range(16)])
    assert not torch.allclose(expected, F.normalize(images, MEAN, STD), atol=1e-2)
    torch.testing.assert_close(result, expected, atol=1e-4 if single == "hue" else 1e-5, rtol=0)


def test_solarizing_inverts_pixels_at_the_threshold_and_above():
    augmentation = Augmentation(size=2, flip=0.0, solarize=1.0)
    images = torch.tensor([0.0, 0.4999, 0.5, 0.9]).view(1, 1, 2, 2)
    result = photometric(images, drawn_for(augmentation, 1, 2), (0.0,), (1.0,))
    torch.testing.assert_close(result.flatten(), torch.tensor([0.0, 0.4999, 0.5, 0.1]))


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_blur_of_images_smaller_than_its_window_keeps_a_flat_image_flat(size):
    augmentation = Augmentation(size=size, flip=0.0, blur=1.0)
    flat = torch.full((4, 3, size, size), 0.3)
    result = photometric(flat, drawn_for(augmentation, 4, size), (0.0,) * 3, (1.0,) * 3)
    torch.testing.assert_close(result, flat)


def test_mirroring_as_often_as_it_takes_is_mirroring_a_long_strip():
    augmentation = Augmentation(size=3, flip=0.0, blur=1.0, blur_sigma=(2.0, 2.0))
    image = torch.rand(1, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    result = photometric(image, drawn_for(augmentation, 1, 3), (0.0,), (1.0,))
    index = np.abs((np.arange(-6, 9) + 2) % 4 - 2)  # 0 1 2 1 0 1 2 ...
    long = image[0, 0].numpy()[np.ix_(index, index)]
    taps = np.exp(-0.5 * (np.arange(-6, 7) / 2.0) ** 2)
    taps /= taps.sum()
    expected = [[(long[i : i + 13, j : j + 13] * np.outer(taps, taps)).sum() for j in range(3)] for i in range(3)]
    np.testing.assert_allclose(result[0, 0].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("size", [1, 7, 24, 32])
def test_an_image_comes_out_the_same_to_the_bit_in_any_company(size):
    augmentation = Augmentation(
        size=size, jitter=(0.4, 0.4, 0.4, 0.2), jitter_probability=0.8, grey=0.2, blur=0.5, solarize=0.2
    )
    pixels = torch.stack([torch.from_numpy(photo(31, 31, 3, i)).permute(2, 0, 1) for i in range(40)])
    side = np.full(40, 31)
    drawn = draw(augmentation, seed=0, epoch=0, image=np.arange(40), view=0, height=side, width=side)

    def views(some, numbers):
        return photometric(crop_levels(pixels, torch.from_numpy(some), numbers.box, size), numbers, MEAN, STD)

    together = views(np.arange(40), drawn)
    for start, stop in ((0, 1), (1, 2), (2, 5), (5, 18), (18, 40)):
        assert torch.equal(views(np.arange(start, stop), drawn.at(slice(start, stop))), together[start:stop])


def test_a_batch_in_pieces_equals_the_batch(monkeypatch):
    images = torch.rand(9, 3, 24, 24)
    drawn = drawn_for(EVERYTHING, 9, 24)
    whole = photometric(images, drawn, MEAN, STD)
    monkeypatch.setattr("kinfold.data.photometric._CACHE", 3 * 24 * 24 * 2)
    assert torch.equal(photometric(images, drawn, MEAN, STD), whole)


BOXES = [
    (0, 0, 60, 80),
    (3, 5, 40, 41),
    (10, 20, 50, 60),
    (0, 79, 60, 1),
    (59, 0, 1, 80),
    (7, 8, 32, 32),
    (5, 5, 1, 1),
    (1, 2, 13, 71),
]


@pytest.mark.parametrize("size", [1, 17, 32, 96])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_both_crops_equal_torchvision_within_a_level(size, channels):
    image = photo(60, 80, channels)
    chw = torch.from_numpy(image).permute(2, 0, 1)
    expected = torch.stack([F.resized_crop(chw, *box, [size, size], antialias=True) for box in BOXES]).int()
    single = torch.stack([crop_resize(image, box, size) for box in BOXES])
    assert single.dtype == torch.uint8
    assert (single.int() - expected).abs().max() <= 1
    other = torch.from_numpy(photo(60, 80, channels, 1)).permute(2, 0, 1)
    images = torch.stack([other, chw])
    batch = crop_levels(images, torch.ones(len(BOXES), dtype=torch.int64), np.array(BOXES), size)
    assert (batch.int() - expected).abs().max() <= 1


def test_a_crop_of_one_pixel_and_of_memory_that_is_read_only():
    image = np.full((1, 1, 3), 77, dtype=np.uint8)
    image.flags.writeable = False
    assert torch.equal(crop_resize(image, (0, 0, 1, 1), 8), torch.full((3, 8, 8), 77, dtype=torch.uint8))
    drawn = drawn_for(preset("moco-v2", size=8), 5, 1)
    assert drawn.box.tolist() == [[0, 0, 1, 1]] * 5


def test_a_whole_image_of_the_right_size_passes_unchanged():
    image = photo(32, 32)
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    assert torch.equal(crop_resize(image, (0, 0, 32, 32), 32), pixels)
    batch = crop_levels(pixels[None].contiguous(), torch.tensor([0]), np.array([[0, 0, 32, 32]]), 32)
    assert torch.equal(batch[0], pixels)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (32, 32), (40, 400), (900, 30)])
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.08, 1.0), (0.9, 1.0)])
def test_crops_spread_as_those_of_torchvision(height, width, scale):
    n = 2500
    augmentation = Augmentation(size=32, scale=scale)
    ours = draw(
        augmentation,
        seed=0,
        epoch=0,
        image=np.arange(n),
        view=0,
        height=np.full(n, height),
        width=np.full(n, width),
    ).box
    torch.manual_seed(0)
    canvas = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(canvas, list(scale), [3 / 4, 4 / 3]) for _ in range(n)])
    top, left, h, w = ours.T
    assert top.min() >= 0
    assert left.min() >= 0
    assert h.min() >= 1
    assert w.min() >= 1
    assert (top + h).max() <= height
    assert (left + w).max() <= width
    for quantity in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 0],
        lambda b: b[:, 1],
    ):
        a, b = quantity(ours).astype(float), quantity(theirs).astype(float)
        tolerance = 4.5 * math.sqrt((a.var() + b.var()) / n) + 1e-9
        assert abs(a.mean() - b.mean()) <= tolerance
        assert abs((a**2).mean() - (b**2).mean()) <= 4.5 * math.sqrt(((a**2).var() + (b**2).var()) / n) + 1e-9


def test_things_happen_as_often_as_the_augmentation_says():
    n = 20_000
    augmentation = Augmentation(
        size=8,
        flip=0.5,
        jitter=(0.4, 0.2, 0.1, 0.3),
        jitter_probability=0.8,
        grey=0.2,
        blur=0.1,
        solarize=0.05,
    )
    drawn = drawn_for(augmentation, n, 8)
    for mask, share in (
        (drawn.flip, 0.5),
        (drawn.jitter, 0.8),
        (drawn.grey, 0.2),
        (drawn.blur, 0.1),
        (drawn.solarize, 0.05),
    ):
        assert abs(mask.mean() - share) < 4.5 * math.sqrt(share * (1 - share) / n)
    for which, (low, high) in enumerate([(0.6, 1.4), (0.8, 1.2), (0.9, 1.1), (-0.3, 0.3)]):
        factor = drawn.factors[:, which]
        assert low <= factor.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < factor.max() < high
        assert abs(factor.mean() - (low + high) / 2) < 4.5 * (high - low) / math.sqrt(12 * n)
    assert abs(drawn.sigma.mean() - 1.05) < 0.02
    assert (np.sort(drawn.order, axis=1) == np.arange(4)).all()
    for place in range(4):
        assert np.abs(np.bincount(drawn.order[:, place]) / n - 0.25).max() < 0.015
    flags = np.stack([drawn.flip, drawn.jitter, drawn.grey, drawn.blur, drawn.solarize]).astype(float)
    assert np.abs(np.corrcoef(flags) - np.eye(5)).max() < 0.04


def test_strong_brightness_is_never_negative():
    drawn = drawn_for(Augmentation(size=8, jitter=(1.8, 0.0, 0.0, 0.0), jitter_probability=1.0), 2000, 8)
    assert drawn.factors[:, 0].min() >= 0.0
    assert drawn.factors[:, 0].max() > 2.5


def test_a_view_is_drawn_from_its_address_and_nothing_else():
    augmentation = preset("moco-v2", size=16)
    batch = drawn_for(augmentation, 12, 40)
    alone = drawn_for(augmentation, 1, 40, start=7)
    for name, value in vars(alone).items():
        assert np.array_equal(value, getattr(batch, name)[7:8]), name
    for other in (drawn_for(augmentation, 12, 40, epoch=1), drawn_for(augmentation, 12, 40, view=1)):
        assert not (other.box == batch.box).all(axis=1).any()


def test_changing_one_setting_leaves_the_other_numbers_as_they_were():
    before = drawn_for(preset("moco-v2", size=16), 50, 40)
    after = drawn_for(preset("moco-v2", size=16, blur=0.0, jitter=(0.1, 0.4, 0.4, 0.1)), 50, 40)
    for name in ("box", "flip", "jitter", "order", "grey", "sigma"):
        assert np.array_equal(getattr(before, name), getattr(after, name)), name
    assert np.array_equal(before.factors[:, 1:], after.factors[:, 1:])


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs_and_stays_finite(name):
    augmentation = preset(name, size=12)
    drawn = drawn_for(augmentation, 8, 12)
    result = photometric(torch.rand(8, 3, 12, 12), drawn, MEAN, STD)
    assert result.shape == (8, 3, 12, 12)
    assert result.isfinite().all()


def test_drawn_numbers_are_arrays_over_the_batch():
    drawn = drawn_for(EVERYTHING, 6, 24)
    assert isinstance(drawn, Drawn)
    assert drawn.at(slice(2, 5)).box.tolist() == drawn.box[2:5].tolist()
    assert drawn.at(np.array([4, 0])).flip.tolist() == drawn.flip[[4, 0]].tolist()
