# SPDX-License-Identifier: Apache-2.0
"""What is compiled of the augmentations: one graph without a break, equal to both plain forms for every operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from small_trainings import quick_compiler
from torch import Tensor

from kinfold.data import fused as room
from kinfold.data.augment import BRIGHTNESS, CONTRAST, HUE, SATURATION, Drawn
from kinfold.data.fused import fused
from kinfold.data.photometric import one_by_one, photometric

BATCH, SIDE = 24, 8
PLAIN = ((0.0,) * 3, (1.0,) * 3)


@pytest.fixture(scope="module")
def _compiled() -> Iterator[None]:
    """torch.compile up to where code would be made; a part that it cannot take into the graph is an error."""
    room._compiled.cache_clear()
    with quick_compiler(fullgraph=True) as asked:
        yield
    assert asked
    room._compiled.cache_clear()


def nothing(**changes: Any) -> Drawn:
    """The numbers of images to which nothing happens, but for `changes`, one a row or one for all."""
    values: dict[str, Any] = {
        "box": np.tile([0, 0, SIDE, SIDE], (BATCH, 1)),
        "factors": np.tile([1.0, 1.0, 1.0, 0.0], (BATCH, 1)),
        "order": np.tile([BRIGHTNESS, CONTRAST, SATURATION, HUE], (BATCH, 1)),
        "sigma": np.ones(BATCH),
        "reach": np.full(BATCH, 6),
        "threshold": np.full(BATCH, 0.5),
    }
    never = dict.fromkeys(("flip", "jitter", "grey", "grey_first", "blur", "solarize"), np.zeros(BATCH, bool))
    given = {name: np.broadcast_to(value, (BATCH, *np.shape(value)[1:])) for name, value in changes.items()}
    return Drawn(**{**values, **never, **given})


def factor(which: int, *numbers: float) -> Drawn:
    """The jitter with one factor, whose numbers come one after the other, first in some images and last in others."""
    factors = np.tile([1.0, 1.0, 1.0, 0.0], (BATCH, 1))
    factors[:, which] = np.resize(numbers, BATCH)
    order = np.stack([np.roll([BRIGHTNESS, CONTRAST, SATURATION, HUE], row // 5) for row in range(BATCH)])
    return nothing(jitter=np.ones(BATCH, bool), factors=factors, order=order)


ALWAYS, EVERY_OTHER = np.ones(BATCH, bool), np.arange(BATCH) % 2 == 0
OPERATIONS: dict[str, Drawn] = {
    "nothing": nothing(),
    "flip": nothing(flip=EVERY_OTHER),
    "brightness": factor(BRIGHTNESS, 0.0, 0.6, 1.4, 2.5),
    "contrast": factor(CONTRAST, 0.0, 0.6, 1.4, 2.5),
    "saturation": factor(SATURATION, 0.0, 0.6, 1.4, 2.5),
    "hue over both ends of the circle": factor(HUE, -0.5, -0.4, -0.1, 0.1, 0.4, 0.5),
    "grey after the jitter": nothing(grey=EVERY_OTHER),
    "grey before the jitter": replace(factor(BRIGHTNESS, 1.3), grey=EVERY_OTHER, grey_first=ALWAYS),
    "blur": nothing(blur=EVERY_OTHER, sigma=np.linspace(0.1, 2.0, BATCH)),
    "blur wider than the image": nothing(blur=ALWAYS, sigma=np.full(BATCH, 5.0), reach=np.full(BATCH, 15)),
    "solarise": nothing(solarize=EVERY_OTHER, threshold=np.linspace(0.0, 1.0, BATCH)),
}
PLAIN_FORMS: dict[str, Callable[..., Tensor]] = {
    "photometric": photometric,
    "one by one": one_by_one,
    "not compiled": partial(fused, compiled=False),
}


def crops() -> Tensor:
    """uint8 [B, 3, S, S]: random colours, and those at which a hue is at an end, in the middle, or none at all."""
    images = torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), dtype=torch.uint8)
    corners = torch.cartesian_prod(*[torch.tensor([0, 127, 255], dtype=torch.uint8)] * 3)  # [27, 3]
    images[:, :, :3] = 0
    images.flatten(2)[:, :, :27] = corners.T
    images[3], images[4] = 0, 255
    return images


@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize(
    "plain",
    [photometric, one_by_one, partial(fused, compiled=False)],
    ids=["photometric", "one by one", "not compiled"],
)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_operation_compiled_is_the_plain_one(operation: str, plain: Callable[..., Tensor]) -> None:
    images, drawn = crops(), OPERATIONS[operation]
    result, expected = fused(images, drawn, *PLAIN), plain(images, drawn, *PLAIN)
    assert result.dtype == torch.float32
    assert (operation == "nothing") == torch.equal(expected, images / 255.0)
    # A blurred pixel within rounding of a threshold would jump; here no operation comes before solarising.
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_all_operations_together_compiled_are_the_plain_ones(channels: int) -> None:
    source = np.random.default_rng(5)
    drawn = nothing(
        jitter=source.random(BATCH) < 0.8,
        factors=np.column_stack([source.uniform(0.6, 1.4, (BATCH, 3)), source.uniform(-0.5, 0.5, BATCH)]),
        order=source.permuted(np.tile(np.arange(4), (BATCH, 1)), axis=1),
        **{name: source.random(BATCH) < 0.4 for name in ("flip", "grey", "grey_first", "blur", "solarize")},
        sigma=source.uniform(0.1, 2.0, BATCH),
    )
    mean, std = (0.48, 0.45, 0.41)[:channels], (0.23, 0.24, 0.26)[:channels]
    images = crops()[:, :channels].contiguous()
    before = images.clone()
    result = fused(images, drawn, mean, std)
    assert torch.equal(images, before)
    for plain in (photometric, one_by_one):
        # Solarising jumps where a pixel is within rounding of the threshold.
        assert ((result - plain(images, drawn, mean, std)).abs() > 5e-5).float().mean() < 1e-3
