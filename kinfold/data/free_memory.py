# SPDX-License-Identifier: Apache-2.0
"""How much memory is free: what decides whether a set may stay on a device."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch


def free_memory(device: torch.device, processes: int = 1) -> float:
    """Bytes that are free on the device, and for each of `processes` on the machine, through which all images go."""
    machine = _machine_memory() / processes
    if device.type == "cuda":
        return min(machine, torch.cuda.mem_get_info(device)[0])
    return machine


def _machine_memory() -> float:
    """Bytes that the system would give, within what a container may have; infinite where nobody says."""
    free = float("inf")
    with suppress(OSError, ValueError, AttributeError):
        free = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024.0 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    with suppress(OSError, ValueError):  # "max" is no number
        group = Path("/sys/fs/cgroup")
        limit, taken = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, float(max(limit - taken, 0)))
    return free
