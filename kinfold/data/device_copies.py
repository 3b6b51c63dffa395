# SPDX-License-Identifier: Apache-2.0
"""Copies from the workers' memory to the device, beside the computing of the step before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor


@final
class DeviceCopies:
    """Bring tensors to a device: on CUDA on a stream of their own, elsewhere plainly and at once.

    The step before is queued on the device when the next batch is asked for; a copy on that step's stream would wait
    for its end, one on another stream runs beside it. `cuda` stands for `torch.cuda`.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device, self._cuda = device, cuda
        self._beside = cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Give the tensors on the device, in their order in memory; the current stream waits until they are there.

        Pinned memory that they come from may be let go at once: torch lends it again only when the copy is done.
        """
        if self._beside is None:
            return [tensor.to(self._device) for tensor in tensors]
        with self._cuda.stream(self._beside):
            copies = [tensor.to(self._device, non_blocking=True) for tensor in tensors]
        hand_over(copies, self._beside, self._cuda.current_stream(self._device))
        return copies


def hand_over(made: Sequence[Tensor], beside: Any, current: Any) -> None:
    """Let the stream `current` wait for what is made on the stream `beside`, and then use it."""
    current.wait_stream(beside)
    for one in made:
        # Its memory belongs to the other stream, which must not have it back before this one has read it.
        one.record_stream(current)
