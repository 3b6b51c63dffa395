# SPDX-License-Identifier: Apache-2.0
"""How fast a run goes, how much of its time it waits for images, and how often it stops to look."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from kinfold import distributed
from kinfold.data.loader import Batch


class Meter:
    """Counts images and the time spent waiting for them between two readings."""

    def __init__(self) -> None:
        self.images = 0
        self.waited = 0.0
        self.since = time.monotonic()

    def over(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Pass the batches on, and count how long each took to come."""
        while True:
            began = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - began
            if batch is None:
                return
            self.images += len(batch.index) * distributed.world()
            yield batch

    def read(self) -> tuple[float, float]:
        """Images per second, and the share of time spent waiting for data, since the last reading."""
        now = time.monotonic()
        seconds = max(now - self.since, 1e-9)
        speed, waiting = self.images / seconds, min(self.waited / seconds, 1.0)
        self.images, self.waited, self.since = 0, 0.0, now
        return speed, waiting


class Rounds:
    """The steps after which the processes look up from their work together: about one a second.

    Looking makes the host wait for its device, and the processes for each other, so it is not done at every step. All
    have to do it at the same one; so how many steps go by until the next, a hundred at most, is reckoned from the
    slowest process's pace, which is told to all. What a run computes does not depend on it.
    """

    def __init__(self, step: int) -> None:
        self.last, self.next = step, step + 1
        self.since = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether to look after `step`."""
        return step >= self.next

    def agree(self, step: int, signal: int, device: torch.device) -> int:
        """The signal that any process has got, 0 if none has; to be called after the same steps in all of them."""
        now = time.monotonic()
        pace = round(1e6 * (now - self.since) / max(step - self.last, 1))  # microseconds a step
        slowest = distributed.largest(pace, device)
        self.last, self.next, self.since = step, step + max(1, min(100, 10**6 // max(slowest, 1))), now
        return distributed.largest(signal, device)
