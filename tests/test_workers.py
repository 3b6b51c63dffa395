# SPDX-License-Identifier: Apache-2.0
"""What the workers promise: they stay from epoch to epoch, decode less where they may, and end when they should."""

import io
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_loader import MEAN, STD, VIEWS, InMemory, even, make, mixed, same

from kinfold.data import cutting
from kinfold.data.crop import crop_reduced_into, crop_resize, crop_resize_into
from kinfold.data.cutting import MARGIN, Cutting
from kinfold.data.decode import Undecodable, look
from kinfold.data.device_decode import DeviceDecode, nvjpeg, upright
from kinfold.data.loader import views_of
from kinfold.data.transfer import Transfer
from kinfold.data.work import Task, pixel_memory, run
from kinfold.errors import UserError
from kinfold.recipe import load
from kinfold.views import Augmentation, Views


def photo(seed: int, height: int, width: int, **how: object) -> bytes:
    """A JPEG that is as rough at every scale as photos are: 1/f noise."""
    draws = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])  # [H, W / 2 + 1]
    frequency[0, 0] = 1.0
    noise = draws.standard_normal((2, 3, *frequency.shape))
    waves = np.fft.irfft2((noise[0] + 1j * noise[1]) / frequency, s=(height, width))  # [3, H, W]
    waves = waves[:1] + 0.4 * waves
    pixels = np.clip(128 + 55 * waves / waves.std((1, 2), keepdims=True), 0, 255).astype(np.uint8)  # [3, H, W]
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(file, "JPEG", quality=90, **how)
    return file.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


class Photos(InMemory):
    """JPEGs in memory; those in `broken` end in the middle of their pixels, behind a whole header."""

    def __post_init__(self) -> None:
        for position, (height, width) in enumerate(self.sizes):
            file = photo(position, height, width, exif=turned(1 + position % 8))
            self.files.append(file[: len(file) // 2] if position in self.broken else file)


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


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_a_crop_written_into_a_batch_is_the_crop(channels):
    image = np.random.default_rng(0).integers(0, 256, (40, 50, channels), dtype=np.uint8)
    batch = torch.zeros(2, channels, 16, 16, dtype=torch.uint8).to(memory_format=torch.channels_last)
    for box in ((0, 0, 40, 50), (3, 7, 16, 16), (1, 2, 5, 31), (39, 49, 1, 1)):
        crop_resize_into(image, box, batch[1])
        top, left, height, width = box
        cut = torch.from_numpy(image[top : top + height, left : left + width].copy()).permute(2, 0, 1)[None]
        expected = torch.nn.functional.interpolate(cut, size=(16, 16), mode="bilinear", antialias=True)[0]
        assert torch.equal(batch[1], expected)
        assert torch.equal(crop_resize(image, box, 16), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_decoded_at_a_fraction_shows_the_same_place(orientation):
    raw = photo(0, 203, 331, exif=turned(orientation))
    full = look(raw).decode().pixels
    drawn = np.random.default_rng(orientation)
    for shrink in (2, 4, 8):
        reduced = look(raw).decode(shrink)
        assert reduced.pixels.shape[:2] == tuple(-(-side // shrink) for side in full.shape[:2])
        for _ in range(6):
            height, width = (int(drawn.integers(100, side + 1)) for side in full.shape[:2])
            top, left = int(drawn.integers(full.shape[0] - height + 1)), int(drawn.integers(full.shape[1] - width + 1))
            size = int(min(height, width) / shrink / MARGIN)
            out, place = torch.empty(3, size, size, dtype=torch.uint8), (top, left, height, width)
            crop_reduced_into(reduced, place, out)
            apart = (out.int() - crop_resize(full, place, size).int()).abs().float()
            assert apart.mean() < 2.5
            assert apart.max() <= 30
            # One pixel of the full image aside is another place: the distance grows.
            if left + width < full.shape[1] and size > 30 and shrink == 2:
                beside = (out.int() - crop_resize(full, (top, left + 1, height, width), size).int()).abs().float()
                assert beside.mean() > apart.mean()


LARGE = Views(augment=(Augmentation(size=24), Augmentation(size=16, scale=(0.6, 1.0))), pairs=((0, 1),))


def test_scaled_decoding_draws_the_same_numbers_and_nearly_the_same_pixels():
    work, task = Cutting(Photos([(211, 163)] * 8), LARGE, 3, 0), Task(0, np.arange(8))
    full, scaled = work(task), replace(work, scaled=True)(task)
    for a, b, c, d in zip(full.crops, scaled.crops, full.drawn, scaled.drawn):
        assert np.array_equal(c.box, d.box)
        assert not torch.equal(a, b)
        assert (a.float() - b.float()).abs().mean() < 2


def test_scaled_decoding_leaves_small_photos_and_other_formats_as_they_are():
    for source in (Photos([(40, 50)] * 4), InMemory([(300, 200)] * 4)):
        work, task = Cutting(source, LARGE, 3, 0), Task(0, np.arange(4))
        assert all(torch.equal(a, b) for a, b in zip(work(task).crops, replace(work, scaled=True)(task).crops))


def test_scaled_views_are_the_same_for_any_workers_and_are_made_again():
    source = Photos([(180 + 9 * i, 200) for i in range(16)], broken=frozenset({3}))
    settings = {"views": LARGE, "scaled_decode": True}
    alone, several = make(source, **settings), make(source, workers=2, **settings)
    for one, other in zip(alone.epoch(0), several.epoch(0), strict=True):
        assert same(one, other)
        for row, position in enumerate(one.index.tolist()):
            again = views_of(
                source, position, LARGE, seed=3, epoch=0, channels=3, mean=MEAN, std=STD, scaled_decode=True
            )
            assert all(torch.equal(view, one.views[i][row]) for i, view in enumerate(again))
    assert list(alone.bad) == [3]


def test_a_set_of_large_photos_of_one_size_goes_by_workers_where_they_are_decoded_smaller():
    large, small = Photos([(180, 180)] * 8), Photos([(50, 50)] * 8)
    assert make(large, views=LARGE).resident
    assert not make(large, views=LARGE, scaled_decode=True).resident
    assert make(small, views=LARGE, scaled_decode=True).resident
    with pytest.raises(UserError, match="scaled_decode=false, or leave resident out"):
        make(large, views=LARGE, scaled_decode=True, resident=True)


def test_the_papers_recipes_decode_in_full_and_that_for_own_photos_does_not():
    run_settings = {"data": "-", "out": "-"}
    assert not load("sce/imagenet-200", run=run_settings)[0].images.scaled_decode
    assert load("own-images", run=run_settings)[0].images.scaled_decode


def test_a_photo_that_is_damaged_behind_its_header_is_replaced_with_numbers_of_its_own():
    source = Photos([(60 + 10 * i, 90) for i in range(6)], broken=frozenset({2}))
    with pytest.raises(Undecodable, match="damaged"):
        look(source.read(2)).decode()
    cut = Cutting(source, LARGE, 3, 0)(Task(0, np.arange(6)))
    stand_in = int(cut.index[2])
    assert list(cut.bad) == [2]
    assert stand_in != 2
    for crops, numbers in zip(cut.crops, cut.drawn):
        assert torch.equal(crops[2], crops[stand_in])
        assert numbers.box[2].tolist() == numbers.box[stand_in].tolist()


class OnCuda:
    """What `Transfer` asks of torch.cuda, noted in order."""

    def __init__(self):
        self.said = []

    def Stream(self, device):
        return "beside"

    @contextmanager
    def stream(self, stream):
        self.said.append(f"on {stream}")
        yield
        self.said.append(f"off {stream}")

    def current_stream(self, device):
        return self

    def wait_stream(self, stream):
        self.said.append(f"wait for {stream}")


class OnDevice:
    """A tensor that notes where it was copied, and for which stream its memory is held."""

    def __init__(self, cuda):
        self.cuda = cuda

    def to(self, device, *, non_blocking):
        assert non_blocking
        self.cuda.said.append("copy")
        return self

    def record_stream(self, stream):
        assert stream is self.cuda
        self.cuda.said.append("hold")


def test_copies_run_beside_the_step_and_are_waited_for_and_held():
    cuda = OnCuda()
    transfer = Transfer(torch.device("cuda", 0), cuda)
    tensors = [OnDevice(cuda), OnDevice(cuda)]
    assert transfer(tensors) == tensors
    assert cuda.said == ["on beside", "copy", "copy", "off beside", "wait for beside", "hold", "hold"]


def test_without_cuda_tensors_come_as_they_are():
    tensors = [torch.arange(3), torch.ones(2, 2)]
    assert all(torch.equal(a, b) for a, b in zip(Transfer(torch.device("cpu"))(tensors), tensors, strict=True))


def decode_here(files):
    """Stands in for nvJPEG: the CPU's decoder, which turns no image and refuses what is damaged."""
    made = []
    for file in files:
        with Image.open(io.BytesIO(file.numpy().tobytes())) as image:
            if len(file) == 1234:
                raise RuntimeError("nvjpegDecode failed: 6")
            made.append(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))
    return made


@pytest.mark.parametrize("refused", [False, True])
def test_crops_of_files_decoded_elsewhere_are_those_of_the_workers_within_a_level(refused):
    source = Photos([(60 + 9 * i, 90 - i) for i in range(9)], broken=frozenset({4}))
    source.files[7] = even(8).files[7]  # a PNG among them
    if refused:  # one file that the device does not decode and the CPU does
        source.files[2] = source.files[2] + b"\0" * (-len(source.files[2]) % 64)
    sizes = {len(source.files[2])} if refused else set()

    def decode(files):
        if any(len(file) in sizes for file in files):
            raise RuntimeError("nvjpegDecode failed: 6")
        return decode_here(files)

    work, task = Cutting(source, LARGE, 3, 5), Task(2, np.arange(9))
    plain, left = work(task), replace(work, leave_jpegs=True)(task)
    assert len(left.jpegs) == 7  # not the PNG, nor the one that ends early
    finished = DeviceDecode(replace(work, leave_jpegs=True), torch.device("cpu"), decode)(left, 2)
    assert torch.equal(finished.index, plain.index)
    assert finished.bad == plain.bad
    for a, b, c, d in zip(finished.crops, plain.crops, finished.drawn, plain.drawn):
        assert (a.int() - b.int()).abs().max() <= 1
        assert np.array_equal(c.box, d.box)


@pytest.mark.parametrize("source", [Photos, InMemory])
def test_a_worker_does_not_hold_a_whole_batch_decoded(source, monkeypatch):
    work, task = Cutting(source([(400, 500)] * 12), LARGE, 3, 5), Task(0, np.arange(12))
    all_held = work(task)
    monkeypatch.setattr(cutting, "_HELD_BYTES", 2**20)
    tracemalloc.start()
    try:
        together = work(task)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * 400 * 500 * 3  # of 12
    for a, b in zip(together.crops, all_held.crops):
        assert torch.equal(a, b)


def test_files_left_to_a_device_leave_a_worker_together():
    source = Photos([(60, 80)] * 9)
    left = Cutting(source, LARGE, 3, 5, leave_jpegs=True)(Task(0, np.arange(9)))
    assert left.files.numpy().tobytes() == b"".join(source.files)
    assert [size for size, _ in left.jpegs.values()] == [len(file) for file in source.files]


def test_a_decoder_that_refuses_everything_is_told_before_the_first_step(monkeypatch):
    def refuse(files, **how):
        raise RuntimeError("not compiled with nvJPEG support\nsomewhere")

    monkeypatch.setattr("torchvision.io.decode_jpeg", refuse)
    with pytest.raises(UserError, match=r"does not decode here \(not compiled with nvJPEG support\)\. Set decode=cpu"):
        nvjpeg(torch.device("cuda"))


def test_a_tensor_is_turned_as_an_array_is():
    for orientation in range(1, 9):
        raw = photo(1, 24, 40, exif=turned(orientation))
        stored = torch.from_numpy(np.array(Image.open(io.BytesIO(raw)))).permute(2, 0, 1)
        assert np.array_equal(upright(stored, orientation).permute(1, 2, 0).numpy(), look(raw).decode().pixels)


def test_decoding_on_a_device_needs_one_and_decodes_in_full():
    with pytest.raises(UserError, match=r"needs an NVIDIA device, but this run is on cpu\. Set decode=cpu"):
        nvjpeg(torch.device("cpu"))
    with pytest.raises(UserError, match="decode=device needs"):
        make(mixed(8), decode="device")
    with pytest.raises(UserError, match=r"images\.scaled_decode=false"):
        make(mixed(8), decode="device", scaled_decode=True)
