# SPDX-License-Identifier: Apache-2.0
"""What a process is given to compute with."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, torch
from kinfold.devices import choose_device
choose_device("cpu")
def step():
    made = [torch.zeros(3 << 20) for _ in range(4)]  # 12 MB each
for _ in range(10):
    step()  # until every block has found its place
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 20 * 4 * (12 << 20) // 4096


def pages_asked_for(**environment: str) -> int:
    """How many pages twenty steps ask the system for that make the same 48 MB anew each time."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", STEPS], check=True, capture_output=True, text=True, env={**others, **environment}
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries cannot be told")
def test_tensors_that_are_made_anew_at_each_step_take_the_memory_of_the_last() -> None:
    assert pages_asked_for() < PAGES / 100


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries cannot be told")
def test_what_the_environment_says_about_memory_is_left_alone() -> None:
    assert pages_asked_for(MALLOC_MMAP_THRESHOLD_="131072") > PAGES / 2
