# SPDX-License-Identifier: Apache-2.0
"""JPEGs decoded on an NVIDIA device: workers read the files and draw the numbers, nvJPEG makes pixels, crops follow.

An option for machines with few cores a device. nvJPEG does not compute the same pixels as libjpeg: colour, which most
JPEGs hold at half the size, may be spread without smoothing, so pixels beside coloured edges can differ by many levels.
For the same decoded pixels the crops are the workers' within one level of 255.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from kinfold.data.augment import Drawn, put
from kinfold.data.cutting import Cut, Cutting
from kinfold.data.device_copies import hand_over
from kinfold.data.header import COLUMNS_BACKWARDS, ROWS_BACKWARDS
from kinfold.data.work import Task
from kinfold.errors import UserError

Decode = Callable[[list[Tensor]], list[Tensor]]
"""files, uint8 [bytes] each, to uint8 [3, H, W] each on the device; raises RuntimeError where one does not decode"""


def nvjpeg(device: torch.device) -> Decode:
    """The decoder of `device`. Raises `UserError` where there is none."""
    advice = "Set decode=cpu, so that workers decode."
    if device.type != "cuda":
        raise UserError(f"decode=device needs an NVIDIA device, but this run is on {device}. {advice}")
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError as error:
        raise UserError(f"decode=device: this torchvision has no decoder for JPEGs ({error}). {advice}") from error

    def decode(files: list[Tensor]) -> list[Tensor]:
        with warnings.catch_warnings():
            # Torchvision's decoders are to go some day: the import says so when they have.
            warnings.simplefilter("ignore")
            return list(decode_jpeg(files, mode=ImageReadMode.RGB, device=device))

    # Tried here: later a decoder that refuses everything would look like files that are damaged.
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    try:
        decode([torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)])
    except RuntimeError as error:
        raise UserError(
            f"decode=device: nvJPEG does not decode here ({str(error).splitlines()[0]}). {advice}"
        ) from error
    return decode


@final
class DeviceDecode:
    """Finish what `cutting`, which leaves JPEGs, made of a batch: decode them by `decode` and cut on `device`.

    A file that `decode` refuses goes the way of all others: it is decoded here on the CPU, or replaced. On CUDA all
    this runs on a stream of its own, beside the computing of the step before. `cuda` stands for `torch.cuda`.
    """

    def __init__(self, cutting: Cutting, device: torch.device, decode: Decode, cuda: Any = torch.cuda) -> None:
        self._plainly = replace(cutting, leave_jpegs=False)
        self._device, self._decode, self._cuda = device, decode, cuda
        self._beside = cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, cut: Cut, epoch: int) -> Cut:
        """Give the batch with all its crops, on the device, whose current stream waits until they are there."""
        if self._beside is None:
            return self._finished(cut, epoch)
        # nvJPEG writes at once, whatever is queued, into memory that torch has for the current stream. Were that the
        # steps' stream, this could be memory that a queued step has let go and is still to read. What is taken on a
        # stream of our own was only ever used there, or is held until others have read it; and once that stream has
        # nothing left to do, what is free of it is free in fact.
        self._beside.synchronize()
        with self._cuda.stream(self._beside):
            made = self._finished(cut, epoch)
        hand_over(made.crops, self._beside, self._cuda.current_stream(self._device))
        return made

    def _finished(self, cut: Cut, epoch: int) -> Cut:
        """The batch with all its crops on the device; those that workers made may still be in the host's memory."""
        crops = [crop.to(self._device, non_blocking=True) for crop in cut.crops]  # views of [B, C, S, S]
        index, bad = cut.index.clone(), dict(cut.bad)
        for (row, (_, orientation)), image in zip(cut.jpegs.items(), self._images(cut)):
            if image is not None:
                self._cut(upright(image, orientation), row, cut.drawn, crops)
                continue
            one = self._plainly(Task(epoch, cut.index[row : row + 1].numpy().copy()))
            for crop, own, numbers, drawn in zip(crops, one.crops, one.drawn, cut.drawn):
                crop[row] = own[0].to(self._device)
                put(numbers, drawn, row)
            index[row] = one.index[0]
            bad |= one.bad
        return Cut(crops, cut.drawn, index, bad)

    def _images(self, cut: Cut) -> list[Tensor | None]:
        """The decoded JPEGs, uint8 [3, H, W] each; None for one that does not decode."""
        if not cut.jpegs:
            return []
        files = list(torch.split(cut.files, [size for size, _ in cut.jpegs.values()]))
        try:
            return list(self._decode(files))
        except RuntimeError as error:  # no word of which one it was
            if out_of_memory(error):
                raise
            return [self._one(file) for file in files]

    def _one(self, file: Tensor) -> Tensor | None:
        try:
            return self._decode([file])[0]
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            return None

    def _cut(self, image: Tensor, row: int, drawn: list[Drawn], crops: list[Tensor]) -> None:
        for numbers, crop in zip(drawn, crops):
            top, left, height, width = numbers.box[row].tolist()
            part = image[None, :, top : top + height, left : left + width].to(torch.float32)  # [1, 3, h, w]
            made = resized(part, crop.shape[2:])  # [1, 3, S, S]
            crop[row] = made[0].add_(0.5).floor_().clamp_(0.0, 255.0)


def resized(image: Tensor, size: Sequence[int]) -> Tensor:
    """Resize an image [1, C, h, w] in floats as `kinfold.data.crop` does; on the CPU where the device refuses."""
    how: dict[str, Any] = {"size": size, "mode": "bilinear", "antialias": True}
    try:
        return functional.interpolate(image, **how)  # [1, C, S, S]
    except RuntimeError as error:
        # On CUDA the weights of a strong reduction, one pixel out of very many, do not fit the memory that they are
        # kept in (pytorch/vision, issue 7671).
        if out_of_memory(error):
            raise
        return functional.interpolate(image.cpu(), **how)  # [1, C, S, S]


def out_of_memory(error: RuntimeError) -> bool:
    """Whether it is the device's memory that did not suffice: nothing is wrong with an image, then.

    Torchvision hands torch's own error on as another, of which only the words are left.
    """
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def upright(image: Tensor, orientation: int) -> Tensor:
    """Turn a decoded image [C, H, W] as EXIF's number says, as `kinfold.data.decode` does."""
    if orientation >= 5:
        image = image.transpose(1, 2)
    backwards = [axis for axis, numbers in ((1, ROWS_BACKWARDS), (2, COLUMNS_BACKWARDS)) if orientation in numbers]
    return image.flip(backwards) if backwards else image
