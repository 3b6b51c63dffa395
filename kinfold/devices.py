# SPDX-License-Identifier: Apache-2.0
"""Which device computes, how it is given numbers, and how many processes decode images for it."""

from __future__ import annotations

import ctypes
import os
import platform

import torch
from torch import Tensor

from kinfold.errors import UserError

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # as malloc.h of the GNU C library numbers them


def choose_device(name: str) -> torch.device:
    """The device called `name`, or the best one for `auto`. Raises `UserError` for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device: {name!r} is none. Use auto, cpu, cuda, cuda:1 or mps.") from None
    if device.type not in ("cpu", "cuda", "mps"):  # torch has names for many that nothing here is made for
        raise UserError(f"device: {name!r} is not supported. Use auto, cpu, cuda, cuda:1 or mps.")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"device: {name} was asked for, but torch sees no CUDA device here. Use device=cpu.")
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if device.index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
            raise UserError(
                f"device: {name} would put all processes on one device. Use device=cuda: each takes its own."
            )
        device = torch.device("cuda", device.index if device.index is not None else local)
        count = torch.cuda.device_count()
        if device.index >= count:
            raise UserError(f"device: there is no {device}, only {count} CUDA device(s), counted from cuda:0.")
        torch.cuda.set_device(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device: mps was asked for, but there is none here. Use device=cpu.")
    return device


def keep_freed_memory() -> bool:
    """Let this process keep memory that it has freed for its next tensors; True where that can be asked for.

    The C library of Linux gives large blocks back to the system and asks for them again, thousands of pages that the
    system clears each time a step makes the same tensors anew. What is kept is at most 2 GB at the end of the heap, and
    what lies between blocks that are in use. Where the environment says something of these bounds, they stay as they
    are.
    """
    said = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys()
    if platform.libc_ver()[0] != "glibc" or said or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    change = ctypes.CDLL(None).mallopt
    return bool(
        change(_TRIM_THRESHOLD, 2**31 - 1) and (change(_MMAP_THRESHOLD, 2**30) or change(_MMAP_THRESHOLD, 2**25))
    )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device; the host does not wait for what the device has yet to do, and may let go of it.

    On Apple's devices the host waits: there torch reads the memory later, and by then it may hold something else.
    """
    return tensor.to(device, non_blocking=device.type != "mps")


def choose_workers(asked: int | None) -> int:
    """Worker processes for this rank: as asked, or the cores that this rank can count on, at most 16."""
    if asked is not None:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 16)
