# SPDX-License-Identifier: Apache-2.0
"""A picture of kinship: images, and beside each the ones that lie nearest to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from kinfold.data.decode import decode
from kinfold.data.sources import Source

_GAP = 4


def nearest_sheet(
    source: Source,
    features: Tensor,
    positions: np.ndarray,  # type: ignore[type-arg]
    path: Path,
    *,
    asking: int = 12,
    nearest: int = 8,
    side: int = 64,
) -> Path:
    """Draw `asking` images of a source, spread over it, each followed by its `nearest` nearest others, as one PNG.

    `features` `[n, F]` belong to the images at `positions` `[n]`; nearness is cosine similarity.
    """
    unit = F.normalize(features, dim=1)  # [n, F]
    rows = torch.linspace(0, len(unit) - 1, min(asking, len(unit))).long()  # [asking]
    similarity = unit[rows] @ unit.T  # [asking, n]
    similarity[torch.arange(len(rows)), rows] = -float("inf")
    found = similarity.topk(min(nearest, len(unit) - 1), dim=1).indices  # [asking, nearest]
    width = (1 + found.shape[1]) * (side + _GAP) + 3 * _GAP
    sheet = Image.new("RGB", (width, len(rows) * (side + _GAP) + _GAP), "white")
    for line, (row, others) in enumerate(zip(rows.tolist(), found.tolist())):
        for column, place in enumerate([row, *others]):
            picture = Image.fromarray(decode(source.read(int(positions[place])), 3))
            picture = picture.resize((side, side), Image.Resampling.NEAREST if picture.width < side else None)
            left = _GAP + column * (side + _GAP) + (2 * _GAP if column else 0)
            sheet.paste(picture, (left, _GAP + line * (side + _GAP)))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path
