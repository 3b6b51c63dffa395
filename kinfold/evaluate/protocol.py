# SPDX-License-Identifier: Apache-2.0
"""What a protocol is to the command: its settings, its function, and how the words `--data ...` become its images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from kinfold.evaluate.backbones import FrozenBackbone


class Request(NamedTuple):
    """Which images a person asked for; each kind of data has its own usual splits where none are named."""

    data: str
    train_split: str | None = None
    test_data: str | None = None
    """another set to be asked, instead of a split of `data`"""
    test_split: str | None = None
    limit: int | None = None
    """at most so many images of each split"""
    workers: int | None = None
    """processes that were asked for; the kind of data may need none where nothing was asked"""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way of measuring a backbone."""

    settings: type[Any]
    measure: Callable[[FrozenBackbone, Any, Any], dict[str, float]]
    """backbone, data and settings to named numbers; the backbone is afterwards as it was, to the bit"""
    open: Callable[[Request, Any, dict[str, Any]], Any]
    """request, settings and the fields of `Conditions` to the data that `measure` takes, which has `about()`"""
    unit: str = "percent"
    """what the numbers are, in a few words for people"""
