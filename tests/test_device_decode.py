# SPDX-License-Identifier: Apache-2.0
"""What a device takes over from the workers: copies beside the step, and decoding."""

import io
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest
import torch
from jpegs import LARGE, Photos, photo, turned
from PIL import Image
from test_loader import even, make, mixed
from torch.nn import functional

from kinfold.data.centre_crops import CentreCropping
from kinfold.data.cutting import Cutting
from kinfold.data.decode import look
from kinfold.data.device_copies import DeviceCopies
from kinfold.data.device_decode import DeviceDecode, nvjpeg, upright
from kinfold.data.work import Task
from kinfold.errors import UserError


class Beside(str):
    """A stream, by its name, that notes when the host waits for its end."""

    def synchronize(self):
        self.said.append("drained")


class OnCuda:
    """What is asked of torch.cuda, noted in order."""

    def __init__(self):
        self.said = []

    def Stream(self, device):
        made = Beside("beside")
        made.said = self.said
        return made

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
    copies = DeviceCopies(torch.device("cuda", 0), cuda)
    tensors = [OnDevice(cuda), OnDevice(cuda)]
    assert copies(tensors) == tensors
    assert cuda.said == ["on beside", "copy", "copy", "off beside", "wait for beside", "hold", "hold"]


def test_without_cuda_tensors_come_as_they_are():
    tensors = [torch.arange(3), torch.ones(2, 2)]
    copies = DeviceCopies(torch.device("cpu"))(tensors)
    assert all(torch.equal(a, b) for a, b in zip(copies, tensors, strict=True))


def alike(left, right):
    """Whether two results of workers are the same in every field, to the order in memory."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right) and left.stride() == right.stride()
    if isinstance(left, np.ndarray):
        return np.array_equal(left, right)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(alike, left, right))
    if is_dataclass(left):
        return all(alike(getattr(left, field.name), getattr(right, field.name)) for field in fields(left))
    return left == right


@pytest.fixture
def pinned(monkeypatch):
    """Copies that were made to pinned memory, by their addresses; there is none without CUDA."""
    made = {}

    def pin(tensor):
        copy = tensor.clone()
        made[copy.data_ptr()] = copy
        return copy

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    return made


def test_a_batch_in_pinned_memory_is_the_batch(pinned):
    source = Photos([(60, 80)] * 6, broken=frozenset({4}))
    cut = Cutting(source, LARGE, 3, 5, leave_jpegs=True)(Task(0, np.arange(6)))
    assert len(cut.jpegs) == 5
    assert list(cut.bad) == [4]
    moved = cut.pin_memory()
    assert alike(moved, cut)
    assert not alike(replace(moved, jpegs={}), cut)
    assert all(tensor.data_ptr() in pinned for tensor in (*moved.crops, moved.index))


def test_a_block_of_evaluation_in_pinned_memory_is_the_block(pinned):
    block = CentreCropping(mixed(6, broken=frozenset({2})), 3, 8, 8)(Task(0, np.arange(6)))
    assert list(block.bad) == [2]
    moved = block.pin_memory()
    assert alike(moved, block)
    assert moved.pixels.data_ptr() in pinned


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


class CropsOnDevice(OnDevice):
    """A view's crops, which also note when a row is written."""

    def __init__(self, cuda, shape):
        super().__init__(cuda)
        self.shape = shape

    def __setitem__(self, row, crop):
        self.cuda.said.append(f"crop {row}")


def test_files_are_decoded_into_memory_that_no_queued_step_can_be_reading():
    cuda = OnCuda()

    def decode(files):
        cuda.said.append("decode")
        return decode_here(files)

    work = Cutting(Photos([(60, 80)] * 2), LARGE, 3, 5, leave_jpegs=True)
    left = work(Task(0, np.arange(2)))
    crops = [CropsOnDevice(cuda, crop.shape) for crop in left.crops]
    made = DeviceDecode(work, torch.device("cuda", 0), decode, cuda)(replace(left, crops=crops), 0)
    assert made.crops == crops
    before, on, *beside, off, wait, hold, also = cuda.said
    assert (before, on, off, wait, hold, also) == (
        "drained", "on beside", "off beside", "wait for beside", "hold", "hold",
    )  # fmt: skip
    assert beside == ["copy", "copy", "decode", "crop 0", "crop 0", "crop 1", "crop 1"]


def test_a_reduction_that_the_device_refuses_is_made_by_the_cpu(monkeypatch):
    real, asked = functional.interpolate, []

    def refuse(image, **how):
        asked.append(image)
        if len(asked) % 2:
            raise RuntimeError("Too much shared memory required: 141440 vs 49152")
        return real(image, **how)

    work, task = Cutting(Photos([(60, 80)] * 3), LARGE, 3, 5), Task(0, np.arange(3))
    plain, left = work(task), replace(work, leave_jpegs=True)(task)
    monkeypatch.setattr(functional, "interpolate", refuse)
    finished = DeviceDecode(work, torch.device("cpu"), decode_here)(left, 0)
    assert len(asked) == 2 * 3 * len(plain.crops)
    assert finished.bad == {}
    for a, b in zip(finished.crops, plain.crops, strict=True):
        assert (a.int() - b.int()).abs().max() <= 1


FULL = "CUDA out of memory. Tried to allocate 20.00 GiB"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(FULL), RuntimeError(f"Error while decoding: {FULL}")])
def test_a_device_that_is_full_is_no_file_that_does_not_decode(error, monkeypatch):
    def full(*_, **__):
        raise error

    def no_batch(files):
        if len(files) > 1:
            raise RuntimeError("nvjpegDecode failed: 6")
        full()

    work = Cutting(Photos([(60, 80)] * 2), LARGE, 3, 5)
    left = replace(work, leave_jpegs=True)(Task(0, np.arange(2)))
    for decode in (full, no_batch):
        with pytest.raises(RuntimeError, match="out of memory"):
            DeviceDecode(work, torch.device("cpu"), decode)(left, 0)
    monkeypatch.setattr(functional, "interpolate", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        DeviceDecode(work, torch.device("cpu"), decode_here)(left, 0)


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


@pytest.mark.parametrize("free", [1e12, 0.0], ids=["with room", "without"])
def test_files_are_decoded_on_the_device_at_each_step_also_where_the_set_would_fit_there(free, monkeypatch):
    asked = []

    def decode(files):
        asked.append(len(files))
        return decode_here(files)

    monkeypatch.setattr("kinfold.data.resident.free_memory", lambda device, processes: free)
    monkeypatch.setattr("kinfold.data.loader.nvjpeg", lambda device: decode)
    source = Photos([(60, 60)] * 16)
    assert make(source, views=LARGE).resident == (free > 0)
    loader = make(source, views=LARGE, decode="device")
    assert not loader.resident
    assert loader.remarks == []
    plain = make(source, views=LARGE, resident=False)
    for one, other in zip(loader.epoch(0), plain.epoch(0), strict=True):
        assert torch.equal(one.index, other.index)
    assert asked == [8, 8]


def test_a_set_is_not_both_decoded_once_and_at_each_step(monkeypatch):
    monkeypatch.setattr("kinfold.data.loader.nvjpeg", lambda device: decode_here)
    with pytest.raises(UserError, match=r"resident=true decodes a set once, .* decode=device at each step\. Leave one"):
        make(Photos([(60, 60)] * 8), views=LARGE, decode="device", resident=True)
