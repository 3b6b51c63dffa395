# SPDX-License-Identifier: Apache-2.0
"""Compiled augmentations stay compiled, however many kinds of batches a run has."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from kinfold.data import fused as room
from kinfold.data.augment import draw
from kinfold.data.fused import fused
from kinfold.views import Augmentation

PLAIN = ((0.5,) * 3, (0.25,) * 3)


def test_each_size_of_a_view_and_of_a_batch_is_compiled_once_and_none_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    room._compiled.cache_clear()
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)  # as eight would, only sooner
    kinds = [(size, count) for size in (6, 9) for count in (4, 3)]
    for epoch in range(2):
        for size, count in kinds:
            side = np.full(count, size)
            augmentation = Augmentation(size=size, grey=0.5, flip=0.5)
            drawn = draw(augmentation, seed=0, epoch=epoch, image=np.arange(count), view=0, height=side, width=side)
            images = torch.randint(256, (count, 3, size, size), dtype=torch.uint8)  # [B, C, S, S]
            assert torch.equal(fused(images, drawn, *PLAIN), fused(images, drawn, *PLAIN, compiled=False))
        assert counter.frame_count == len(kinds)
    room._compiled.cache_clear()
