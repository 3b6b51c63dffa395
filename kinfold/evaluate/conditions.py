# SPDX-License-Identifier: Apache-2.0
"""How a protocol computes: on what, how much at once, where it speaks, and where it keeps things."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


def tell(text: str) -> None:
    """Say something to the person, beside the results."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class Conditions:
    """What every protocol is given beside its images; none of it changes a result but for the last bits."""

    device: str = "cpu"
    workers: int = 0
    """processes that decode images; none if 0"""
    batch_size: int = 256
    """images a forward pass where features are made"""
    say: Callable[[str], None] = tell
    """where remarks go that a reader of the numbers should know"""
    cache: Path | None = None
    """folder where features are kept for the next protocol; they are not if not given"""
    progress: Path | None = None
    """folder where a long protocol keeps what it needs to go on after a stop; nothing is kept if not given"""
