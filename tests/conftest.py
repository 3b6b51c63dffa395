# SPDX-License-Identifier: Apache-2.0
"""What all tests share: one thread, the same seed before each test, and the table of methods at toy size."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import hypothesis
import pytest
import torch
from torch import Tensor, nn

from kinfold.encoders import BatchNorm, Encoder
from kinfold.learner import Learner
from kinfold.memory import Bank, BankMemory, BatchMemory, QueueMemory, build_memory
from kinfold.methods import CO2, METHODS, SCE, InvP, Method, MoCo, ReSSL
from kinfold.views import Augmentation, Views

torch.set_num_threads(1)

# The same examples each time, and no clock: a busy machine must not decide whether a test passes.
hypothesis.settings.register_profile("kinfold", deadline=None, max_examples=30, derandomize=True)
hypothesis.settings.load_profile("kinfold")

IMAGES = 40
"""size of the toy set: more than a batch, so that a bank has images that the batch has not"""
DIMENSION = 6
SIDE = 3


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests neither find nor leave anything in the person's own cache."""
    os.environ["KINFOLD_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@dataclass(frozen=True, kw_only=True)
class Case:
    """One method with a memory and pairs of views that it can be trained with, small enough for a test."""

    name: str
    method: Method
    memory: QueueMemory | BatchMemory | BankMemory = field(default_factory=lambda: QueueMemory(size=13))
    pairs: tuple[tuple[int, int | None], ...] = ((0, 1),)
    epoch: int = 0
    """an epoch in which every term of the loss acts"""

    @property
    def views(self) -> Views:
        """As many views as the pairs name."""
        count = 1 + max(v for pair in self.pairs for v in pair if v is not None)
        return Views(augment=tuple(Augmentation(size=SIDE) for _ in range(count)), pairs=self.pairs)

    def encoder(self, *, batch_norm: bool = False) -> Encoder:
        """Toy backbone and head: `[B, 1, 3, 3]` to `[B, 6]`; smooth, so that no unit is ever dead."""
        layers: list[nn.Module] = [nn.Conv2d(1, 10, SIDE)]
        if batch_norm:
            layers.append(nn.BatchNorm2d(10))
        return Encoder(nn.Sequential(*layers, nn.Flatten(), nn.Tanh()), nn.Linear(10, DIMENSION))

    def learner(self, *, seed: int = 0, batch_norm: BatchNorm | None = None) -> Learner:
        """A learner in float64 whose weights and memory start from `seed`; `batch_norm` puts such a layer in."""
        torch.manual_seed(seed)
        learner = Learner(
            method=self.method,
            views=self.views,
            encoder=self.encoder(batch_norm=batch_norm is not None),
            memory=build_memory(self.memory, images=IMAGES, dimension=DIMENSION),
            batch_norm=batch_norm,
        )
        if isinstance(learner.memory, Bank):  # a graph as it is after the first passes
            graph = learner.memory.neighbours
            graph.copy_(torch.randint(IMAGES, graph.shape))
        return learner.double()

    def batch(self, seed: int = 0, *, size: int = 8) -> tuple[list[Tensor], Tensor]:
        """Random views `[B, 1, 3, 3]`, one tensor a view, and distinct positions `[B]` in the set."""
        source = torch.Generator().manual_seed(1000 + seed)
        views = [torch.randn(size, 1, SIDE, SIDE, generator=source, dtype=torch.float64) for _ in self.views.augment]
        return views, torch.randperm(IMAGES, generator=source)[:size]


SYMMETRIC = ((0, 1), (1, 0))
CASES = [
    Case(name="moco", method=MoCo(temperature=0.2)),
    Case(name="moco-symmetric", method=MoCo(temperature=0.1), pairs=SYMMETRIC),
    Case(name="moco-batch", method=MoCo(temperature=0.2), memory=BatchMemory(), pairs=SYMMETRIC),
    Case(name="ressl", method=ReSSL(), pairs=((1, 0),)),
    Case(name="ressl-batch-and-queue", method=ReSSL(), memory=QueueMemory(size=13, batch_keys=True)),
    Case(name="sce", method=SCE(), pairs=((1, 0),)),
    Case(name="sce-mask", method=SCE(own_key="mask", instance_weight=0.3)),
    Case(
        name="sce-symmetric-batch-and-queue",
        method=SCE(own_key="mask"),
        memory=QueueMemory(size=13, batch_keys=True),
        pairs=SYMMETRIC,
    ),
    Case(name="sce-multi-crop", method=SCE(), pairs=((1, 0), (2, 0), (0, 1), (2, 1))),
    Case(name="co2", method=CO2()),
    Case(name="co2-batch", method=CO2(temperature=0.1), memory=BatchMemory()),
    Case(
        name="invp",
        method=InvP(positives=10),
        memory=BankMemory(nearest=12),
        pairs=((0, None),),
        epoch=30,
    ),
    Case(
        name="invp-paper",
        method=InvP(positives=5, sets="paper"),
        memory=BankMemory(nearest=12, repeats=False),
        pairs=((0, None),),
        epoch=30,
    ),
]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    """Each method of the package, in each form it is used in."""
    found: Case = request.param
    return found


@pytest.fixture
def untested_methods() -> set[str]:
    """Methods of the package that stand in no case: there should be none."""
    return set(METHODS) - {case.method.name for case in CASES}  # type: ignore[attr-defined]
