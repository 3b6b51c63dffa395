# SPDX-License-Identifier: Apache-2.0
"""What a method is: frozen settings and one pure function from a comparison to a loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from kinfold.memory import Comparison


class Method(ABC):
    """A value: settings, and a loss that depends on nothing else. Abstract; each method is final.

    A method holds no tensors and no state: the `Learner` holds those.
    """

    memories: ClassVar[tuple[str, ...]] = ("queue", "batch")
    """names of the memories that the method can stand on"""

    @abstractmethod
    def loss(self, seen: Comparison, epoch: int) -> dict[str, Tensor]:
        """Give the terms of the loss, each a scalar averaged over the batch; their sum is what is minimised.

        `epoch` counts completed epochs: 0 in the first.
        """

    def target(self, seen: Comparison) -> Tensor | None:
        """The distribution `[B, K]` over the candidate keys that counts as the right answer; None if it has none.

        For looking at (its entropy tells how many images share the answer); `loss` is what trains.
        """
        return None
