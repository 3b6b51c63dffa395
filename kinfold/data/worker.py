# SPDX-License-Identifier: Apache-2.0
"""A worker's own side of `kinfold.data.work`: how it begins, when it ends, and what memory it writes to.

It ends with the main process, however that ends: see `_watch`. It writes pixels to memory that it shares with the main
process and uses over again (`pixel_memory`), so they are not copied on the way, and no page of memory is asked for
twice.
"""

from __future__ import annotations

import atexit
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

import torch
from torch import Tensor

LOOK = 0.5
"""seconds between two looks of a worker at whether it is to end"""


@dataclass(frozen=True)
class Beginning:
    """What a worker does first."""

    kept: int
    """results that may be on their way at a time"""
    ending: Tensor
    """uint8 [1], shared: 1 when the main process wants no more"""
    patience: float
    """seconds from then on"""

    def __call__(self, _worker: int) -> None:
        """One thread; and Ctrl-C, which a terminal sends to all processes, is the main one's to answer."""
        global _memory
        _memory = _PixelMemory(self.kept)
        torch.set_num_threads(1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # torchrun, systemd and some batch systems signal the whole group.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        told, tell = multiprocessing.Pipe(duplex=False)
        watch = threading.Thread(target=_watch, args=(self.ending, self.patience, told), name="watch", daemon=True)
        watch.start()
        # A worker that was spawned ends as every Python does, which a thread must not be caught in: last in, first out.
        atexit.register(watch.join)
        atexit.register(tell.close)


def _watch(ending: Tensor, patience: float, told: Connection) -> None:
    """End this worker at once when the main process is gone, and `patience` seconds after it said that it is to end.

    Torch's workers look for that between two tasks, which one that reads from a dead network disk never comes to.
    """
    said, main, parent = ending.numpy(), os.getppid(), multiprocessing.parent_process()
    sentinels = [] if parent is None else [parent.sentinel]
    while patience > 0.0:
        ready = wait([told, *sentinels], timeout=LOOK)
        if told in ready:  # this worker ends by itself
            return
        # The parent's sentinel is held open by workers that were forked later, and a process that was not forked by
        # the main one itself has another parent: one of the two tells.
        if ready or os.getppid() != main:
            break
        if said[0]:
            patience -= LOOK
    os._exit(1)


class _PixelMemory:
    """Shared memory that a worker writes its results to in turn."""

    def __init__(self, kept: int) -> None:
        self._sets: list[list[Tensor]] = [[] for _ in range(kept)]  # bytes
        self._turn = 0

    def take(self, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Lend the oldest result's memory for the next one."""
        held = self._sets[self._turn]
        self._turn = (self._turn + 1) % len(self._sets)
        sizes = [math.prod(shape) for shape in shapes]
        if len(held) != len(sizes) or any(len(one) < size for one, size in zip(held, sizes)):
            held[:] = [torch.empty(size, dtype=torch.uint8).share_memory_() for size in sizes]  # type: ignore[no-untyped-call]
        return [one[:size] for one, size in zip(held, sizes)]


_memory: _PixelMemory | None = None


def pixel_memory(shapes: Sequence[tuple[int, int, int, int]]) -> list[Tensor]:
    """Memory for a task's results, one uint8 [B, C, H, W] per shape with the channels last; what is in it is undefined.

    In a worker it is shared with the main process and lent again after `prefetch` further tasks; elsewhere it is new.
    """
    flat = [(b, h, w, c) for b, c, h, w in shapes]
    if _memory is None:
        made = [torch.empty(shape, dtype=torch.uint8) for shape in flat]  # each [B, H, W, C]
    else:
        made = [taken.view(shape) for taken, shape in zip(_memory.take(flat), flat)]  # each [B, H, W, C]
    return [one.permute(0, 3, 1, 2) for one in made]  # each [B, C, H, W]
