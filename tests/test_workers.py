# SPDX-License-Identifier: Apache-2.0
"""What the workers promise: they stay from epoch to epoch, lend no memory twice, and end when they should."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
import traceback
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from test_loader import VIEWS, InMemory, make, mixed, same

from kinfold.data import work as work_room
from kinfold.data.cutting import Cutting
from kinfold.data.work import Task, run
from kinfold.data.worker import pixel_memory
from kinfold.errors import UserError


class Counting(InMemory):
    """Says in files, one a process, which images it read and who read them."""

    folder: Path

    def read(self, i):
        with open(self.folder / str(os.getpid()), "a") as file:
            file.write(f"{i}\n")
        return super().read(i)

    def processes(self):
        return {int(path.name) for path in self.folder.iterdir()}

    def reads(self):
        return sum(len(path.read_text().split()) for path in self.folder.iterdir())


def counting(folder, count=24):
    source = Counting([(10 + i % 7, 14) for i in range(count)])
    source.folder = folder
    folder.mkdir()
    return source


def ended(process: int) -> bool:
    """Whether a process is gone, or only there until its parent hears of its end, within some seconds."""
    for _ in range(100):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        with suppress(OSError):  # a file that only Linux has
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        time.sleep(0.05)
    return False


def wait_for(path: Path, seconds: float = 60.0) -> None:
    for _ in range(int(seconds / 0.05)):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path.name} never came")


def test_workers_stay_from_one_epoch_to_the_next_and_give_what_new_ones_would(tmp_path):
    source = counting(tmp_path / "kept")
    kept, alone = make(source, workers=2, resident=False, epochs=3), make(InMemory(source.sizes), resident=False)
    for epoch in range(3):
        assert all(same(a, b) for a, b in zip(kept.epoch(epoch), alone.epoch(epoch), strict=True))
    assert len(source.processes()) == 2
    assert all(ended(process) for process in source.processes())  # the last epoch leaves nobody behind


@contextmanager
def new_workers():
    """The worker processes that are started in here, in their order, once it is left."""
    before, workers = multiprocessing.active_children(), []
    yield workers
    workers += sorted(set(multiprocessing.active_children()) - set(before), key=lambda worker: worker._identity)


def test_the_next_epoch_is_begun_before_it_is_asked_for(tmp_path):
    source = counting(tmp_path / "kept")
    loader = make(source, workers=1, resident=False, epochs=2)
    list(loader.epoch(0))
    for _ in range(100):
        if source.reads() == 24 + 16:  # two batches of eight ahead
            break
        time.sleep(0.05)
    assert source.reads() == 24 + 16
    loader.close()
    assert all(ended(process) for process in source.processes())
    assert same(next(loader.epoch(1)), next(make(InMemory(source.sizes), resident=False).epoch(1)))


@pytest.mark.parametrize("workers", [0, 1])
def test_epochs_in_any_order_twice_or_in_part_are_what_they_always_are(workers):
    source = mixed(24)
    loader, alone = make(source, workers=workers, resident=False, epochs=9), make(source, resident=False)
    expected = {epoch: list(alone.epoch(epoch)) for epoch in (0, 1, 4)}
    for epoch, start in ((0, 0), (0, 0), (1, 1), (4, 2), (1, 0)):
        for got, whole in zip(loader.epoch(epoch, start), expected[epoch][start:], strict=True):
            assert same(got, whole)
    left = loader.epoch(0)
    assert same(next(left), expected[0][0])
    assert same(next(loader.epoch(1)), expected[1][0])  # beside the one that is still open
    assert same(next(left), expected[0][1])
    left.close()
    assert same(next(loader.epoch(0, 1)), expected[0][1])


class Mortal(InMemory):
    """Ends the first worker when the file `doom` is there."""

    doom: Path

    def read(self, i):
        here = torch.utils.data.get_worker_info()
        if here is not None and here.id == 0 and self.doom.exists():
            os._exit(3)
        return super().read(i)


def test_a_worker_that_dies_between_two_batches_is_an_error_where_the_next_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(work_room, "PATIENCE", 60.0)
    source = Mortal([(12, 12)] * 64)
    source.doom = tmp_path / "doom"
    before = signal.getsignal(signal.SIGCHLD)
    batches = make(source, workers=2, resident=False, epochs=5).epoch(0)
    with new_workers() as workers:
        next(batches)
    source.doom.touch()
    time.sleep(0.5)  # nothing is raised in here
    assert signal.getsignal(signal.SIGCHLD) is before
    with pytest.raises(UserError, match="Lower the number of workers"):
        list(batches)
    assert [worker.exitcode for worker in workers] == [3, 0]  # the other one was told to end, and did


SCRIPT = """
import multiprocessing, os, signal, sys, threading, time
from pathlib import Path
import numpy as np
from kinfold.data.loader import Loader
from kinfold.randomness import ORDER, permutation
from kinfold.views import Augmentation, Views

class Read:
    labels = classes = None
    fingerprint = description = "arrays"
    hangs = None
    folder = Path(sys.argv[1])
    def __len__(self):
        return 32
    def name(self, i):
        return str(i)
    def read(self, i):
        (self.folder / str(os.getpid())).touch()
        if i == self.hangs:
            (self.folder / "hangs").touch()
            time.sleep(600)
        return np.zeros((16, 16, 3), np.uint8)

def hang_in_a_thread():
    # In the first batch, so that the thread only waits in the end: one that is in torch when Python ends aborts it.
    source.hangs = int(permutation(ORDER, 0, 0, n=32)[0])
    threading.Thread(target=list, args=(loader.epoch(0),), daemon=True).start()
    for _ in range(1000):
        if len(list(source.folder.iterdir())) == 3:  # the other one reads too
            break
        time.sleep(0.05)
    time.sleep(1.0)  # until the thread has taken what the other one made, too
    print("ready", flush=True)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background it is ignored
    multiprocessing.set_start_method(sys.argv[2])
    views = Views(augment=(Augmentation(size=8),), pairs=((0, None),))
    shape = {"channels": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    source = Read()
    loader = Loader(source, views, batch_size=8, seed=0, workers=2, resident=False, epochs=100, **shape)
"""


@contextmanager
def process_that(does: str, folder: Path, start: str = "fork"):
    """A process that goes on with these lines and has come to where it prints "ready"; its workers say who they are."""
    script, workers = folder / "script.py", folder / "workers"
    script.write_text(SCRIPT + textwrap.indent(textwrap.dedent(does), "    "))
    workers.mkdir()
    words = [sys.executable, str(script), str(workers), start]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(words, **pipes, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield process, workers
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def all_ended(workers: Path) -> bool:
    """Whether two processes have said that they were workers, and are gone."""
    processes = [int(path.name) for path in workers.iterdir() if path.name.isdecimal()]
    return len(processes) == 2 and all(ended(process) for process in processes)


@pytest.mark.parametrize(
    ("then", "start"), [("raise OSError", "fork"), ("time.sleep(60)", "fork"), ("time.sleep(60)", "spawn")]
)
def test_no_worker_outlives_its_process_and_none_keeps_it(tmp_path, then, start):
    does = """
    list(loader.epoch(0))
    batches = loader.epoch(1)
    next(batches), next(batches)
    print("ready", flush=True)
    """
    with process_that(does + then, tmp_path, start) as (process, workers):
        if "sleep" in then:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(timeout=50) != 0
        assert all_ended(workers)


def test_a_process_that_is_forked_while_a_loader_is_open_ends_without_its_workers(tmp_path):
    does = """
    batches = loader.epoch(0)
    next(batches), next(batches)
    print("ready", flush=True)
    forked = os.fork()
    if forked == 0:
        sys.exit()
    os.waitpid(forked, 0)
    assert len(list(batches)) == 2
    assert len(list(loader.epoch(1))) == 4
    """
    with process_that(does, tmp_path) as (process, workers):
        assert process.wait(timeout=50) == 0
        assert all_ended(workers)


def test_a_process_ends_though_a_thread_of_it_waits_for_a_worker_that_hangs(tmp_path):
    with process_that("hang_in_a_thread()", tmp_path) as (process, workers):
        assert process.wait(timeout=50) == 0
        assert all_ended(workers)


@pytest.mark.parametrize("start", ["fork", "forkserver"])
def test_a_process_that_is_killed_leaves_no_worker_not_even_one_that_hangs(tmp_path, start):
    with process_that("hang_in_a_thread(); time.sleep(600)", tmp_path, start) as (process, workers):
        process.kill()
        process.wait()
        assert all_ended(workers)


def test_memory_that_is_used_over_again_is_never_lent_while_it_is_read():
    work = Cutting(mixed(24), VIEWS, 3, 0)
    tasks = [Task(epoch, np.arange(24)[epoch % 3 :]) for epoch in range(12)]
    expected = [work(task) for task in tasks]
    for cut, alone in zip(run(work, tasks, workers=2, prefetch=2), expected, strict=True):
        time.sleep(0.02)  # workers run ahead as far as they may
        assert all(torch.equal(a, b) for a, b in zip(cut.crops, alone.crops))
        assert torch.equal(cut.index, alone.index)


def test_outside_of_a_worker_pixel_memory_is_new_each_time():
    (first,), (second,) = pixel_memory([(2, 3, 4, 4)]), pixel_memory([(2, 3, 4, 4)])
    assert first.data_ptr() != second.data_ptr()
    assert first.is_contiguous(memory_format=torch.channels_last)


class Stuck(InMemory):
    """Writes down who reads, and in a worker comes back from one image only when the file `go` is there."""

    folder: Path
    image: int

    def read(self, i):
        if torch.utils.data.get_worker_info() is not None:
            (self.folder / str(os.getpid())).touch()
            if i == self.image:
                (self.folder / "stuck").touch()
                wait_for(self.folder / "go", 600)
        return super().read(i)


def stuck(folder, batch):
    """A source that hangs in a batch of the first epoch, and the batches with two workers of a loader of it."""
    source = Stuck([(12, 12)] * 64)
    source.folder = folder
    source.image = int(list(make(InMemory(source.sizes), resident=False).epoch(0))[batch].index[0])
    return source, make(source, workers=2, resident=False, epochs=5).epoch(0)


def test_a_worker_that_reads_from_a_dead_disk_ends_by_itself_when_it_is_not_needed_any_more(tmp_path, monkeypatch):
    monkeypatch.setattr(work_room, "PATIENCE", 0.5)
    killed = []
    monkeypatch.setattr(BaseProcess, "kill", lambda process: killed.append(process))
    _, batches = stuck(tmp_path, 2)  # handed out with the first, and not waited for
    next(batches), next(batches)
    wait_for(tmp_path / "stuck")
    batches.close()
    processes = [int(path.name) for path in tmp_path.iterdir() if path.name != "stuck"]
    assert len(processes) == 2
    assert all(ended(process) for process in processes)
    assert killed == []


def test_ctrl_c_while_the_next_batch_is_waited_for_ends_workers_that_could_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(work_room, "PATIENCE", 60.0)
    source, batches = stuck(tmp_path, 1)

    def interrupt(_signal, frame):
        if any(f.f_code.co_filename == torch.utils.data.dataloader.__file__ for f, _ in traceback.walk_stack(frame)):
            signal.setitimer(signal.ITIMER_REAL, 0)
            (source.folder / "go").touch()
            raise KeyboardInterrupt

    with new_workers() as workers:
        next(batches)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        with pytest.raises(KeyboardInterrupt):
            next(batches)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_a_worker_that_does_nothing_at_all_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(work_room, "PATIENCE", 0.5)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)  # torch's own patience
    source = counting(tmp_path / "kept")
    batches = make(source, workers=2, resident=False, epochs=5).epoch(0)
    next(batches), next(batches)  # one of each
    processes = source.processes()
    for process in processes:
        os.kill(process, signal.SIGSTOP)  # hears no request and no SIGTERM, as one in the middle of C code
    batches.close()
    assert len(processes) == 2
    assert all(ended(process) for process in processes)
