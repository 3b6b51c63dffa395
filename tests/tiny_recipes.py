# SPDX-License-Identifier: Apache-2.0
"""One small recipe a method: real settings at toy size, for tests that run the loop on the embedded digits."""

from __future__ import annotations

from typing import Any

from kinfold.methods import METHODS
from kinfold.reading import parse
from kinfold.recipe import Recipe

_METHOD: dict[str, dict[str, Any]] = {
    "moco": {"name": "moco", "temperature": 0.2},
    "ressl": {"name": "ressl"},
    "sce": {"name": "sce"},
    "co2": {"name": "co2", "temperature": 0.2, "consistency_weight": 1.0},
    "invp": {"name": "invp", "positives": 5, "start_epoch": 1},
}
assert _METHOD.keys() == METHODS.keys()


def tiny(method: str, **changes: Any) -> Recipe:
    """A recipe of `method` on 8x8 digits: 8 to 64 channels, 32 images a step; `changes` by top-level name."""
    strong = {
        "size": 8,
        "scale": [0.4, 1.0],
        "flip": 0.0,
        "jitter": [0.4, 0.4, 0.0, 0.0],
        "jitter_probability": 0.8,
        "blur": 0.3,
    }
    weak = {"size": 8, "scale": [0.6, 1.0], "flip": 0.0}
    values: dict[str, Any] = {
        "method": _METHOD[method],
        "memory": {"name": "queue", "size": 200},
        "views": {"augment": [strong, weak], "pairs": [[0, 1]]},
        "images": {"channels": 1, "mean": [0.3], "std": [0.35]},
        "backbone": {"name": "resnet10_w8", "stem": "small"},
        "head": {"hidden": [32], "out": 16},
        "key_momentum": {"start": 0.9, "end": 1.0},
        "optimizer": {"name": "sgd"},
        "learning_rate": {"name": "cosine", "base": 0.1, "warmup_epochs": 1},
        "batch_size": 32,
        "epochs": 2,
        "seed": 3,
    }
    if method == "invp":
        values["memory"] = {"name": "bank", "nearest": 64}
        values["views"] = {"augment": [strong], "pairs": [[0, None]]}
        values["drop_last"] = False
    return parse(Recipe, {**values, **changes}, source=f"tiny {method}")
