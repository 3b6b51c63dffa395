# SPDX-License-Identifier: Apache-2.0
"""What a process is given to compute with."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys

import pytest

from kinfold import devices
from kinfold.devices import keep_freed_memory

STEPS = """
import resource, torch
from kinfold.devices import keep_freed_memory
keep_freed_memory()
def step():
    made = [torch.zeros(3 << 20) for _ in range(4)]  # 12 MB each
for _ in range(10):
    step()  # until every block has found its place
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries cannot be told")
def test_tensors_that_are_made_anew_at_each_step_take_the_memory_of_the_last() -> None:
    others = {n: v for n, v in os.environ.items() if not n.startswith("MALLOC_") and n != "GLIBC_TUNABLES"}
    done = subprocess.run([sys.executable, "-c", STEPS], check=True, capture_output=True, text=True, env=others)
    assert int(done.stdout) < 20 * 4 * (12 << 20) / resource.getpagesize() / 100


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_MMAP_THRESHOLD_", "131072"),
        ("MALLOC_TRIM_THRESHOLD_", "131072"),
        ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=131072"),
    ],
)
def test_what_the_environment_says_about_memory_is_left_alone(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(devices.ctypes, "CDLL", None)  # is not asked
    assert not keep_freed_memory()
