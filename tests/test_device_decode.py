# SPDX-License-Identifier: Apache-2.0
"""What a device takes over from the workers: copies beside the step, and decoding."""

import io
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from jpegs import LARGE, Photos, photo, turned
from PIL import Image
from test_loader import even, make, mixed

from kinfold.data.cutting import Cutting
from kinfold.data.decode import look
from kinfold.data.device_decode import DeviceDecode, nvjpeg, upright
from kinfold.data.transfer import Transfer
from kinfold.data.work import Task
from kinfold.errors import UserError


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
