# SPDX-License-Identifier: Apache-2.0
"""Loads the authors' numbers from `golden/` beside this file, and says how close is close enough."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"

TIGHT = {"rtol": 1e-9, "atol": 1e-13}
"""float64: sums of a few hundred numbers in another order"""


def load(name: str) -> dict[str, Tensor]:
    """Read `golden/<name>.npz` as tensors by key; numbers are float64, indices int64."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: torch.from_numpy(np.array(file[key])) for key in file.files}


def part(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those entries whose key starts with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}


def assert_close(given: Tensor | float, expected: Tensor | float, what: str = "") -> None:
    """Fail unless both are the same to 1e-9 in float64."""
    # Python numbers become float64 in one go: through torch's default of float32 they would lose half their digits.
    ours, theirs = (torch.as_tensor(t, dtype=torch.float64).detach() for t in (given, expected))
    torch.testing.assert_close(ours, theirs, **TIGHT, msg=lambda m: f"{what}: {m}")
