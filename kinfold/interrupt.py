# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and Ctrl-C as a wish that is heard between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupt:
    """While open, remembers the first SIGTERM or SIGINT in `signal`; a second one acts at once, as ever.

    Outside of the main thread signals cannot be caught, and nothing is.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        for known, handler in self._before.items():
            signal.signal(known, handler)
