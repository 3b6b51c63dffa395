# SPDX-License-Identifier: Apache-2.0
"""Kinfold learns image representations without labels, and knows which images are kin.

The public names, and nothing else. They are imported when they are first used, because torch takes seconds to load.
The loop and the protocols are `kinfold.pretrain.pretrain` and `kinfold.evaluate.evaluate`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "CO2": "kinfold.methods",
    "InvP": "kinfold.methods",
    "MoCo": "kinfold.methods",
    "ReSSL": "kinfold.methods",
    "SCE": "kinfold.methods",
    "Learner": "kinfold.learner",
    "Encoder": "kinfold.encoders",
    "Queue": "kinfold.memory",
    "Bank": "kinfold.memory",
    "Recipe": "kinfold.recipe",
    "Run": "kinfold.recipe",
    "Views": "kinfold.views",
    "Augmentation": "kinfold.views",
    "UserError": "kinfold.errors",
    "load": "kinfold.recipe",
    "embed": "kinfold.embeddings",
    "rebuild_backbone": "kinfold.export",
}

__all__ = ["__version__", *_WHERE]

if TYPE_CHECKING:
    from kinfold.embeddings import embed as embed
    from kinfold.encoders import Encoder as Encoder
    from kinfold.errors import UserError as UserError
    from kinfold.export import rebuild_backbone as rebuild_backbone
    from kinfold.learner import Learner as Learner
    from kinfold.memory import Bank as Bank
    from kinfold.memory import Queue as Queue
    from kinfold.methods import CO2 as CO2
    from kinfold.methods import SCE as SCE
    from kinfold.methods import InvP as InvP
    from kinfold.methods import MoCo as MoCo
    from kinfold.methods import ReSSL as ReSSL
    from kinfold.recipe import Recipe as Recipe
    from kinfold.recipe import Run as Run
    from kinfold.recipe import load as load
    from kinfold.views import Augmentation as Augmentation
    from kinfold.views import Views as Views


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"kinfold has no {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return __all__
