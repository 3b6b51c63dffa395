# SPDX-License-Identifier: Apache-2.0
"""Work in processes: one task in, one result out. `kinfold.data.cutting` and others say what is done.

A task is a whole batch of positions, so a result does not depend on how many workers there are. With no
workers the same objects do the same in the process itself. A worker never raises for what is wrong with the
data: it returns what happened, and `run` raises it where a person sees it without a worker's traceback.

A worker writes pixels to memory that it shares with the main process and uses over again (`pixel_memory`), so they
are not copied on the way, and no page of memory is asked for twice.

Workers end with the main process, however that ends, and keep it from ending for some seconds a worker at most: see
`_watch`.
"""

from __future__ import annotations

import atexit
import math
import multiprocessing
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kinfold.data.decode import Undecodable, decode
from kinfold.data.sources import Source
from kinfold.errors import UserError
from kinfold.randomness import REPLACE, integers

STAND_INS = 100
"""how many other images are tried in place of one that does not decode"""
PATIENCE = 3.0
"""seconds that a worker has for what it is at when it is to end"""

_LOOK = 0.5  # seconds between two looks of a worker at whether it is to end

R = TypeVar("R", covariant=True)
S = TypeVar("S")
T = TypeVar("T")


class Task(NamedTuple):
    """Positions int64 [B] of the source, and the epoch they are wanted for."""

    epoch: int
    positions: NDArray[np.int64]


def in_order(count: int, at_once: int, *, start: int = 0) -> list[Task]:
    """Tasks for all images from `start` on, `at_once` in each and the rest in the last."""
    return [Task(0, np.arange(s, min(s + at_once, count))) for s in range(start, count, at_once)]


class Work(Protocol[R]):
    """Something that turns a task into a result; travels to worker processes by pickle."""

    def __call__(self, task: Task) -> R: ...


def read(source: Source, position: int, channels: int) -> NDArray[np.uint8]:
    """Read and decode one image: uint8 [H, W, C].

    Raises: `Undecodable`, also where the file cannot be read.
    """
    return read_with(decode, source, position, channels)


def read_with(open_: Callable[[bytes | NDArray[Any], int], T], source: Source, position: int, channels: int) -> T:
    """Read one image and give `open_` of its bytes or array and of the channels.

    Raises: `Undecodable`, also where the file cannot be read.
    """
    try:
        return open_(source.read(position), channels)
    except OSError as error:
        raise Undecodable(f"it cannot be read: {error.strerror or error}") from error


def stand_ins(position: int, *, seed: int, epoch: int, count: int) -> Iterator[int]:
    """Positions to try in place of an image that does not decode, as its address says."""
    for trial in range(STAND_INS):
        yield integers(REPLACE, seed, epoch, position, trial, below=count)


def no_readable_image(source: Source, bad: dict[int, str]) -> str:
    """Say that nothing decodes, with the first reasons."""
    first = "; ".join(f"{source.name(position)}: {reason}" for position, reason in list(bad.items())[:3])
    return (
        f"No readable image: {len(bad)} of the {len(source)} were tried and none decodes, in {source.description}. "
        f"The first: {first}. Check the files, or name another folder."
    )


@dataclass(frozen=True)
class _Failure:
    """What a worker found wrong with the data."""

    message: str


@dataclass(frozen=True)
class _Doing(Dataset[S | _Failure], Generic[S]):
    """Work in the shape that torch's loader sends to processes: a task takes the place of an index."""

    work: Work[S]

    def __getitem__(self, task: Task) -> S | _Failure:
        try:
            return self.work(task)
        except UserError as error:
            return _Failure(str(error))


_running: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()
_workers: weakref.WeakKeyDictionary[BaseProcess, int] = weakref.WeakKeyDictionary()  # and the process that started each
_not_ours: list[Any] = []  # torch's iterators in a process that was forked while they were open


def run(
    work: Work[S], tasks: Iterable[Task], *, workers: int, prefetch: int = 2, pin: bool = False
) -> Generator[S, None, None]:
    """Do the tasks in `workers` processes, `prefetch` ahead in each, and give the results in order.

    `tasks` may be without end: each is asked for when a worker is to have it. Closing the generator ends the workers.
    Where `work` takes its memory from `pixel_memory`, a result is good until the next one is asked for.

    Raises: `UserError` for what is wrong with the data, and where a worker dies.
    """
    if isinstance(tasks, Sized):
        workers = min(workers, len(tasks))
    results = _alone(work, tasks) if workers == 0 else _in_processes(work, tasks, workers, prefetch, pin)
    _running.add(results)
    return results


def _alone(work: Work[S], tasks: Iterable[Task]) -> Generator[S, None, None]:
    doing = _Doing(work)
    for task in tasks:
        yield _good(doing[task])


def _in_processes(
    work: Work[S], tasks: Iterable[Task], workers: int, prefetch: int, pin: bool
) -> Generator[S, None, None]:
    main = os.getpid()
    ending = torch.zeros(1, dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]  # [1]
    loader = DataLoader(
        _Doing(work),
        batch_size=None,
        sampler=tasks,
        num_workers=workers,
        prefetch_factor=prefetch,
        pin_memory=pin,
        collate_fn=_as_it_is,
        # A worker's result is asked for after at most `prefetch` later ones were begun, and read before one more is.
        worker_init_fn=_Beginning(prefetch + 1, ending, PATIENCE),
        # Torch's loader draws a seed for its workers: from here, so that the caller's generator stays untouched.
        generator=torch.Generator(),
    )
    results: Any = None  # torch's iterator
    try:
        with _hearing_of_deaths():
            results = iter(loader)
        _workers.update(dict.fromkeys(results._workers, main))
        # Whatever is asked for last happens first at the end of the process: before multiprocessing waits for workers,
        # which hear no signal, and before torch waits for each of them.
        atexit.unregister(_end_all)
        atexit.register(_end_all)
        while True:
            with _hearing_of_deaths():
                result = next(results, None)
            if result is None:
                return
            yield _good(result)
    except (RuntimeError, OSError, EOFError) as error:
        if not _tells_of_death(error):
            raise
        raise UserError(
            f"A loader worker ended before its work was done, most often for lack of memory "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}). "
            f"Lower the number of workers (now {workers}) or the batch size."
        ) from error
    finally:
        if os.getpid() != main:
            # Torch ends the workers when nothing holds its iterator any more, and these are another process's.
            _not_ours.append(results)
        else:
            ending.fill_(1)
            if results is not None:
                # By name, for an exception out of torch holds its iterator. An ending process may start no thread to
                # tell workers or to stop pinning: then `_watch` ends them.
                with suppress(RuntimeError):
                    results._shutdown_workers()
                _see_off(results._workers, PATIENCE + 4 * _LOOK)


def _see_off(workers: Sequence[BaseProcess], patience: float) -> None:
    """Kill the workers that are still there after `patience` seconds.

    Torch asks, waits, sends SIGTERM, which they do not hear, and goes: one that is left would be waited for without
    end when the process ends.
    """
    deadline = time.monotonic() + patience
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
    left = [worker for worker in workers if worker.is_alive()]
    for worker in left:
        worker.kill()
    for worker in left:
        worker.join(PATIENCE)


def _tells_of_death(error: Exception) -> bool:
    """Whether a worker has ended, and not its work failed: torch names the worker process of what it raises for that.

    A result whose worker is gone cannot be fetched: its memory is handed over by a connection to the worker.
    """
    text = str(error)
    if "in DataLoader worker process" in text:
        return False
    return isinstance(error, ConnectionError | EOFError | FileNotFoundError) or "DataLoader worker" in text


def _end_all() -> None:
    """Close all, and kill whom that leaves: nobody asks for their results any more."""
    try:
        for results in list(_running):
            with suppress(ValueError):  # another thread waits for the next of these
                results.close()
    finally:
        _see_off([worker for worker, main in list(_workers.items()) if main == os.getpid()], 0.0)


_deaths: Any = None  # torch's handler of SIGCHLD, once it has one


@contextmanager
def _hearing_of_deaths() -> Iterator[None]:
    """Let torch raise for a worker that dies in here, and only in here.

    Its handler raises wherever the main process happens to be, also in the middle of a step. Outside, a death is found
    when the next result is asked for.
    """
    global _deaths
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    if _deaths is not None:
        signal.signal(signal.SIGCHLD, _deaths)
    try:
        yield
    finally:
        now = signal.getsignal(signal.SIGCHLD)
        if now is not before:
            _deaths = now
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)


def _good(result: S | _Failure) -> S:
    if isinstance(result, _Failure):
        raise UserError(result.message)
    return result


def _as_it_is(result: S) -> S:
    return result


@dataclass(frozen=True)
class _Beginning:
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
        ready = wait([told, *sentinels], timeout=_LOOK)
        if told in ready:  # this worker ends by itself
            return
        # The parent's sentinel is held open by workers that were forked later, and a process that was not forked by
        # the main one itself has another parent: one of the two tells.
        if ready or os.getppid() != main:
            break
        if said[0]:
            patience -= _LOOK
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
