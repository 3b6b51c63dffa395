# SPDX-License-Identifier: Apache-2.0
"""The augmentations spread as the papers' own pipelines do, which are written down here once more, with PIL's images.

A two-sample statistic of Kolmogorov and Smirnov is compared with its value at a chance of one in ten thousand; seeds
are fixed.
"""

import math
import random
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision import transforms as T

from kinfold.data.augment import draw
from kinfold.data.crop import crop_resize
from kinfold.data.photometric import photometric
from kinfold.views import PRESETS, preset

SIZE, HEIGHT, WIDTH = 24, 42, 56
VIEWS = 560
DRAWS = 3000
RARE = math.sqrt(-math.log(1e-4 / 2) / 2)
"""Kolmogorov's distribution exceeds it once in ten thousand"""


class PilBlur:
    """The Gaussian blur of MoCo's loader."""

    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def sometimes(share, *what):
    return T.RandomApply(list(what), p=share)


PAPERS = {
    # MoCo, main_moco.py, without and with --aug-plus
    "moco-v1": [
        T.RandomResizedCrop(SIZE, scale=(0.2, 1.0)),
        T.RandomGrayscale(0.2),
        T.ColorJitter(0.4, 0.4, 0.4, 0.4),
        T.RandomHorizontalFlip(),
    ],
    "moco-v2": [
        T.RandomResizedCrop(SIZE, scale=(0.2, 1.0)),
        sometimes(0.8, T.ColorJitter(0.4, 0.4, 0.4, 0.1)),
        T.RandomGrayscale(0.2),
        sometimes(0.5, PilBlur()),
        T.RandomHorizontalFlip(),
    ],
    # MoCo's CIFAR-10 notebook: the flip comes before the colours
    "moco-notebook": [
        T.RandomResizedCrop(SIZE),
        T.RandomHorizontalFlip(),
        sometimes(0.8, T.ColorJitter(0.4, 0.4, 0.4, 0.1)),
        T.RandomGrayscale(0.2),
    ],
    # ReSSL's and SCE's answering side
    "weak": [T.RandomResizedCrop(SIZE, scale=(0.2, 1.0)), T.RandomHorizontalFlip()],
    # SCE's three on ImageNet
    "sce-alpha": [
        T.RandomResizedCrop(SIZE, scale=(0.2, 1.0)),
        sometimes(0.8, T.ColorJitter(0.4, 0.4, 0.2, 0.1)),
        T.RandomGrayscale(0.2),
        PilBlur(),
        T.RandomHorizontalFlip(),
    ],
    "sce-beta": [
        T.RandomResizedCrop(SIZE, scale=(0.2, 1.0)),
        sometimes(0.8, T.ColorJitter(0.4, 0.4, 0.2, 0.1)),
        T.RandomGrayscale(0.2),
        sometimes(0.1, PilBlur()),
        T.RandomSolarize(128, p=0.2),
        T.RandomHorizontalFlip(),
    ],
    "sce-gamma": [
        T.RandomResizedCrop(SIZE, scale=(0.2, 1.0)),
        sometimes(0.8, T.ColorJitter(0.4, 0.4, 0.2, 0.1)),
        T.RandomGrayscale(0.2),
        sometimes(0.5, PilBlur()),
        T.RandomSolarize(128, p=0.2),
        T.RandomHorizontalFlip(),
    ],
    # InvP on CIFAR and SVHN
    "invp-small": [
        T.RandomResizedCrop(SIZE, scale=(0.2, 1.0)),
        T.ColorJitter(0.4, 0.4, 0.4, 0.4),
        T.RandomGrayscale(0.2),
    ],
}


def step(transforms, kind):
    """The transform of a pipeline that is of this kind, and the share of images it acts on; None and 0 without."""
    for transform in transforms:
        applied = isinstance(transform, T.RandomApply)
        inner, share = (transform.transforms[0], transform.p) if applied else (transform, 1)
        if isinstance(inner, kind):
            return inner, share * getattr(inner, "p", 1)
    return None, 0.0


def apart(ours, theirs):
    """Kolmogorov's and Smirnov's distance between two samples, in units in which RARE is rare."""
    values = np.concatenate([ours, theirs])
    values.sort()
    below = [np.searchsorted(np.sort(sample), values, side="right") / len(sample) for sample in (ours, theirs)]
    return np.abs(below[0] - below[1]).max() / math.sqrt(1 / len(ours) + 1 / len(theirs))


@cache
def images():
    """A few of different colours, brighter to one side: uint8 [n, H, W, 3]."""
    random_ = np.random.default_rng(3)
    y, x = np.mgrid[:HEIGHT, :WIDTH] / WIDTH
    made = []
    for _ in range(8):
        tint, slope = random_.uniform(50, 200, 3), random_.uniform(20, 70)
        waves = [np.sin(random_.uniform(4, 30) * x + random_.uniform(4, 30) * y) for _ in range(3)]
        noise = random_.normal(0, 10, (HEIGHT, WIDTH, 3))
        made.append(tint + slope * (x - 0.5)[:, :, None] + 40 * np.stack(waves, 2) + noise)
    return np.clip(made, 0, 255).astype(np.uint8)


def drawn_for(name, count):
    return draw(
        preset(name, size=SIZE),
        seed=7,
        epoch=0,
        image=np.arange(count),
        view=0,
        height=np.full(count, HEIGHT),
        width=np.full(count, WIDTH),
    )


@cache
def torchvisions_boxes(scale):
    torch.manual_seed(11)
    canvas = torch.empty(3, HEIGHT, WIDTH)
    return np.array([T.RandomResizedCrop.get_params(canvas, list(scale), [3 / 4, 4 / 3]) for _ in range(DRAWS)])


@pytest.mark.parametrize("name", PAPERS)
def test_the_numbers_spread_as_those_of_the_papers_pipelines(name):
    drawn = drawn_for(name, DRAWS)
    crop, _ = step(PAPERS[name], T.RandomResizedCrop)
    ours, theirs = drawn.box.astype(float), torchvisions_boxes(tuple(crop.scale)).astype(float)
    for quantity in (
        lambda box: box[:, 2] * box[:, 3],  # area
        lambda box: box[:, 3] / box[:, 2],  # ratio
        lambda box: box[:, 0] + box[:, 2] / 2,  # the middle
        lambda box: box[:, 1] + box[:, 3] / 2,
    ):
        assert apart(quantity(ours), quantity(theirs)) < RARE
    jitter, jittered = step(PAPERS[name], T.ColorJitter)
    for happens, share in (
        (drawn.flip, step(PAPERS[name], T.RandomHorizontalFlip)[1]),
        (drawn.jitter, jittered),
        (drawn.grey, step(PAPERS[name], T.RandomGrayscale)[1]),
        (drawn.blur, step(PAPERS[name], PilBlur)[1]),
        (drawn.solarize, step(PAPERS[name], T.RandomSolarize)[1]),
    ):
        assert abs(happens.mean() - share) <= 4.5 * math.sqrt(share * (1 - share) / DRAWS)
    if jitter is not None:
        torch.manual_seed(13)
        ranges = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        theirs = [T.ColorJitter.get_params(*ranges) for _ in range(DRAWS)]
        for which in range(4):
            assert apart(drawn.factors[:, which], np.array([float(one[1 + which]) for one in theirs])) < RARE
        seen = np.unique(drawn.order, axis=0, return_counts=True)[1]
        assert len(seen) == math.factorial(4)
        expected = DRAWS / 24
        # Pearson's sum over 24 orders has the mean 23 and the variance 46.
        assert ((seen - expected) ** 2 / expected).sum() < 23 + 4.5 * math.sqrt(46)
    assert apart(drawn.sigma, np.random.default_rng(17).uniform(0.1, 2.0, DRAWS)) < RARE


@cache
def our_views(name):
    drawn = drawn_for(name, VIEWS)
    size = preset(name, size=SIZE).size
    crops = [crop_resize(images()[i % 8], tuple(box), size) for i, box in enumerate(drawn.box.tolist())]
    return photometric(torch.stack(crops), drawn, (0.0,) * 3, (1.0,) * 3).numpy()  # [VIEWS, 3, SIZE, SIZE]


@cache
def pil_views(name):
    torch.manual_seed(5)
    random.seed(5)
    pipeline = T.Compose(PAPERS[name])
    pictures = [Image.fromarray(image) for image in images()]
    return np.stack([np.asarray(pipeline(pictures[i % 8])).transpose(2, 0, 1) for i in range(VIEWS)]) / 255.0


LOOKS = {
    "red": lambda x: x[:, 0].mean((1, 2)),
    "green": lambda x: x[:, 1].mean((1, 2)),
    "blue": lambda x: x[:, 2].mean((1, 2)),
    "dark": lambda x: np.percentile(x, 10, axis=(1, 2, 3)),
    "bright": lambda x: np.percentile(x, 90, axis=(1, 2, 3)),
    "deviation": lambda x: x.std((1, 2, 3)),
    "colour": lambda x: (x.max(1) - x.min(1)).mean((1, 2)),
    "detail": lambda x: np.abs(np.diff(x, axis=3)).mean((1, 2, 3)),
    "red over blue": lambda x: (x[:, 0] - x[:, 2]).mean((1, 2)),
    "contrast": lambda x: x.mean(1).std((1, 2)) / (x.mean((1, 2, 3)) + 0.1),
    "side": lambda x: x[..., : SIZE // 2].mean((1, 2, 3)) - x[..., SIZE // 2 :].mean((1, 2, 3)),
}


@pytest.mark.parametrize("name", PAPERS)
def test_views_look_as_those_of_the_papers_pipelines(name):
    ours, theirs = our_views(name), pil_views(name)
    for what, look in LOOKS.items():
        a, b = look(ours), look(theirs)
        assert apart(a, b) < RARE, what
        # PIL rounds to levels after every operation, mostly down, and its box blurs keep a little more or less detail.
        standard_error = math.sqrt((a.var() + b.var()) / VIEWS)
        assert abs(a.mean() - b.mean()) <= 4.0 * standard_error + 1 / 255, what


def test_every_preset_from_a_paper_is_compared():
    assert set(PAPERS) == set(PRESETS) - {"strokes"}


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 1.5, 2.0])
def test_the_blur_is_within_a_few_levels_of_pils_which_is_made_of_boxes(sigma):
    image = images()[0][:SIZE, :SIZE]
    theirs = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius=sigma))).astype(float)
    augmentation = preset("weak", size=SIZE, flip=0.0, blur=1.0, blur_sigma=(sigma, sigma))
    one = np.ones(1, np.int64)
    drawn = draw(augmentation, seed=0, epoch=0, image=one, view=0, height=SIZE * one, width=SIZE * one)
    crop = torch.from_numpy(image).permute(2, 0, 1)[None]
    ours = photometric(crop, drawn, (0.0,) * 3, (1.0,) * 3)[0].permute(1, 2, 0).numpy() * 255.0
    inside = np.abs(ours - theirs)[6:-6, 6:-6]  # PIL repeats the last pixel at an edge, where ours mirrors
    assert inside.mean() < 1.0
    assert inside.max() < 6.0
