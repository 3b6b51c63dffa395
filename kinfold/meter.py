# SPDX-License-Identifier: Apache-2.0
"""How fast a run goes, and how much of its time it waits for images."""

from __future__ import annotations

import time
from collections.abc import Iterator

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
