# SPDX-License-Identifier: Apache-2.0
"""Crops of a whole batch on the device: the workers' to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kinfold.data.crop import crop_resize
from kinfold.data.exact_crop import _ONE_PRODUCT, _in_full, _taps, crop_levels, matrices

CPU = torch.device("cpu")


def boxes_in(height: int, width: int, count: int, seed: int) -> np.ndarray:
    """Boxes of all sizes [count, 4], the whole image and single pixels among them."""
    numbers = np.random.default_rng(seed)
    h, w = numbers.integers(1, height + 1, count), numbers.integers(1, width + 1, count)
    h[:2], w[:2] = (height, 1), (width, 1)
    top, left = numbers.integers(0, height - h + 1), numbers.integers(0, width - w + 1)
    return np.stack([top, left, h, w], axis=1)


def one_by_one(images: Tensor, index: Tensor, boxes: np.ndarray, size: int) -> Tensor:
    """The reference: what a worker does."""
    crops = [
        crop_resize(np.ascontiguousarray(images[i].permute(1, 2, 0).numpy()), tuple(box), size)
        for i, box in zip(index.tolist(), boxes.tolist())
    ]
    return torch.stack(crops)


@pytest.mark.parametrize("in_full", [True, False])
@pytest.mark.parametrize(
    ("height", "width", "channels", "sizes"),
    [
        (32, 32, 3, (32, 24, 7, 1)),
        (70, 41, 1, (64, 20, 33)),
        (130, 97, 4, (10, 96)),
        (900, 40, 5, (5,)),
        (1, 1, 3, (9,)),
    ],
)
def test_crops_of_a_batch_are_the_workers_to_the_bit(
    height: int,
    width: int,
    channels: int,
    sizes: tuple[int, ...],
    in_full: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numbers = np.random.default_rng(height)
    noise = numbers.integers(0, 256, (20, channels, height, width), dtype=np.uint8)
    noise[10:] = np.where(noise[10:] > 127, 255, 0)  # the greatest sums
    images, index = torch.from_numpy(noise), torch.from_numpy(numbers.integers(0, 20, 50))
    monkeypatch.setattr("kinfold.data.exact_crop._in_full", lambda device: in_full)
    for size in sizes:
        boxes = boxes_in(height, width, 50, size)
        made = crop_levels(images, index, boxes, size)
        assert made.dtype == torch.uint8
        assert torch.equal(made, one_by_one(images, index, boxes, size))


def test_the_pieces_of_a_batch_and_an_autocast_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (9, 3, 20, 30), dtype=np.uint8))
    boxes, index = boxes_in(20, 30, 9, 0), torch.arange(9)
    whole = crop_levels(images, index, boxes, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(crop_levels(images, index, boxes, 16), whole)
    monkeypatch.setattr("kinfold.data.exact_crop._PLACES", 4 * 3 * 20 * 30)
    assert torch.equal(crop_levels(images, index, boxes, 16), whole)
    assert crop_levels(images, index[:0], boxes[:0], 16).shape == (0, 3, 16, 16)


def test_products_of_a_device_that_may_drop_bits_are_not_trusted() -> None:
    try:
        for stated, expected in (("tf32", False), ("ieee", True)):
            torch.backends.cuda.matmul.fp32_precision = stated
            assert _in_full(torch.device("cuda")) is expected
            assert _in_full(CPU)
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"


def test_one_product_is_only_trusted_where_float32_holds_every_sum() -> None:
    for size in (1, 7, 32, 96, 224):
        taps = _taps(int(_ONE_PRODUCT * size), size, CPU)
        greatest = 255 * taps.weight.sum(2).amax(1).double() + taps.one.double() / 2
        assert greatest[1:].max() < 2**24


def test_what_weights_are_divided_by_is_a_power_of_two_to_the_bit() -> None:
    for length, size in ((32, 32), (1000, 3), (90, 224)):
        mantissa, _ = np.frexp(_taps(length, size, CPU).one.numpy())
        assert (mantissa == 0.5).all()


def test_the_rows_of_a_matrix_weigh_one_and_nothing_outside_of_the_box() -> None:
    start, extent = torch.tensor([0, 5, 19]), torch.tensor([20, 9, 1])
    for single in (True, False):
        whole = torch.stack(matrices(start, extent, length=20, size=12, single=single)).sum(0)
        assert (whole.sum(2) - 1).abs().max() < 1e-3
        assert whole[1, :, :5].abs().max() == whole[1, :, 14:].abs().max() == whole[2, :, :19].abs().max() == 0
