# SPDX-License-Identifier: Apache-2.0
"""What the workers promise: they stay from epoch to epoch, lend no memory twice, and end when they should."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from test_loader import VIEWS, InMemory, make, mixed, same

from kinfold.data import work as work_room
from kinfold.data.cutting import Cutting
from kinfold.data.work import Task, pixel_memory, run
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
    """Whether a process is gone, within some seconds."""
    for _ in range(100):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_workers_stay_from_one_epoch_to_the_next_and_give_what_new_ones_would(tmp_path):
    source = counting(tmp_path / "kept")
    kept, alone = make(source, workers=2, resident=False, epochs=3), make(InMemory(source.sizes), resident=False)
    for epoch in range(3):
        assert all(same(a, b) for a, b in zip(kept.epoch(epoch), alone.epoch(epoch), strict=True))
    assert len(source.processes()) == 2
    assert all(ended(process) for process in source.processes())  # the last epoch leaves nobody behind


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
    """Ends its worker when the file `doom` is there."""

    doom: Path

    def read(self, i):
        if self.doom.exists() and torch.utils.data.get_worker_info() is not None:
            os._exit(1)
        return super().read(i)


def test_a_worker_that_dies_between_two_batches_is_an_error_where_the_next_is_asked_for(tmp_path):
    source = Mortal([(12, 12)] * 64)
    source.doom = tmp_path / "doom"
    before = signal.getsignal(signal.SIGCHLD)
    batches = make(source, workers=1, resident=False, epochs=5).epoch(0)
    next(batches)
    source.doom.touch()
    time.sleep(0.5)  # nothing is raised in here
    assert signal.getsignal(signal.SIGCHLD) is before
    with pytest.raises(UserError, match="Lower the number of workers"):
        list(batches)


SCRIPT = """
import os, sys
import numpy as np
from kinfold.data.loader import Loader
from kinfold.views import Augmentation, Views
class Read:
    labels = classes = None
    fingerprint = description = "arrays"
    def __len__(self):
        return 32
    def name(self, i):
        return str(i)
    def read(self, i):
        open(os.path.join(sys.argv[1], str(os.getpid())), "w").close()
        return np.zeros((16, 16, 3), np.uint8)
views = Views(augment=(Augmentation(size=8),), pairs=((0, None),))
shape = {"channels": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3}
loader = Loader(Read(), views, batch_size=8, seed=0, workers=2, resident=False, epochs=100, **shape)
list(loader.epoch(0))
batches = loader.epoch(1)
next(batches)
print("ready", flush=True)
"""


@pytest.mark.parametrize("then", ["raise OSError", "import time; time.sleep(60)"])
def test_no_worker_outlives_its_process_and_none_keeps_it(tmp_path, then):
    words = [sys.executable, "-c", SCRIPT + then, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        if "sleep" in then:
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=50) != 0
    assert all(ended(int(path.name)) for path in tmp_path.iterdir())


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
    """Writes down who reads, and then never returns from image 5 in a worker."""

    folder: Path

    def read(self, i):
        if torch.utils.data.get_worker_info() is not None:
            (self.folder / str(os.getpid())).touch()
            if i == 5:
                (self.folder / "stuck").touch()
                time.sleep(600)
        return super().read(i)


def stuck(folder):
    """A loader with two workers, one of which hangs, and the numbers of their processes."""
    source = Stuck([(12, 12)] * 64)
    source.folder = folder
    folder.mkdir()
    batches = make(source, workers=2, resident=False, epochs=5).epoch(0)
    for batch in batches:
        if 5 in batch.index or (folder / "stuck").exists():
            break
    wait_for(folder / "stuck")
    return batches, [int(path.name) for path in folder.iterdir() if path.name != "stuck"]


def wait_for(path):
    for _ in range(200):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path.name} never came")


def test_a_worker_that_reads_from_a_dead_disk_ends_by_itself_when_it_is_not_needed_any_more(tmp_path, monkeypatch):
    monkeypatch.setattr(work_room, "PATIENCE", 0.5)
    monkeypatch.setattr(BaseProcess, "kill", None)  # is not needed
    batches, processes = stuck(tmp_path / "kept")
    batches.close()
    assert len(processes) == 2
    assert all(ended(process) for process in processes)


def test_a_worker_that_does_nothing_at_all_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(work_room, "PATIENCE", 0.5)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)  # torch's own patience
    source = counting(tmp_path / "kept")
    batches = make(source, workers=2, resident=False, epochs=5).epoch(0)
    next(batches)
    processes = source.processes()
    for process in processes:
        os.kill(process, signal.SIGSTOP)  # hears no request and no SIGTERM, as one in the middle of C code
    batches.close()
    assert len(processes) == 2
    assert all(ended(process) for process in processes)


def test_a_process_that_is_killed_leaves_no_worker_not_even_one_that_hangs(tmp_path):
    hanging = SCRIPT.replace(
        "        return np", "        if i == 5:\n            import time; time.sleep(600)\n        return np"
    ).replace("list(loader.epoch(0))\nbatches = loader.epoch(1)\nnext(batches)", "batches = loader.epoch(0)")
    then = "import threading, time; threading.Thread(target=list, args=(batches,), daemon=True).start(); time.sleep(60)"
    words = [sys.executable, "-c", hanging + then, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        for _ in range(400):
            if len(list(tmp_path.iterdir())) == 2:
                break
            time.sleep(0.05)
        time.sleep(0.5)  # the one has come to its image
        process.kill()
    workers = [int(path.name) for path in tmp_path.iterdir()]
    assert len(workers) == 2
    assert all(ended(worker) for worker in workers)
