# SPDX-License-Identifier: Apache-2.0
"""Work in processes: one task in, one result out. `kinfold.data.cutting` and others say what is done.

A task is a whole batch of positions, so a result does not depend on how many workers there are. With no
workers the same objects do the same in the process itself. A worker never raises for what is wrong with the
data: it returns what happened, and `run` raises it where a person sees it without a worker's traceback.

Workers end with the main process, however that ends, and keep it from ending for some seconds a worker at most. Their
own side of it is `kinfold.data.worker`.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from kinfold.data.decode import Undecodable, decode
from kinfold.data.sources import Source
from kinfold.data.worker import LOOK, Beginning
from kinfold.errors import UserError
from kinfold.randomness import REPLACE, integers

STAND_INS = 100
"""how many other images are tried in place of one that does not decode"""
PATIENCE = 3.0
"""seconds that a worker has for what it is at when it is to end"""

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
    Where `work` takes its memory from `kinfold.data.worker.pixel_memory`, a result is good until the next one is asked
    for.

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
        worker_init_fn=Beginning(prefetch + 1, ending, PATIENCE),
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
                # tell workers or to stop pinning: then they end by themselves.
                with suppress(RuntimeError):
                    results._shutdown_workers()
                _see_off(results._workers, PATIENCE + 4 * LOOK)


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
