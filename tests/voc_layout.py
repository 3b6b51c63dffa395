# SPDX-License-Identifier: Apache-2.0
"""Development kits in the layout of VOC, written for a test: a few small images with whatever objects it wants."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

DATA = Path(os.environ.get("KINFOLD_DATA", Path(__file__).parents[2] / "shared" / "data"))
"""where the real sets are, on a machine that has them"""


def thing(name: str, corners: Sequence[float] = (2, 3, 9, 11), *, difficult: int = 0, extra: str = "") -> str:
    """One object of an annotation."""
    sides = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), corners))
    known = f"<name>{name}</name>\n<difficult>{difficult}</difficult>"
    return f"<object>\n{known}\n<bndbox>{sides}</bndbox>\n{extra}</object>\n"


def annotation(*things: str, width: int = 16, height: int = 12) -> str:
    """A whole XML file; the first object begins in line 3."""
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation>\n{size}\n{''.join(things)}</annotation>\n"


def write_devkit(
    root: Path, annotations: Mapping[str, str], splits: Mapping[str, Sequence[str]], *, kind: str = "Main"
) -> Path:
    """Write images of 16 x 12 pixels, their annotations, and the split lists."""
    for name in ("JPEGImages", "Annotations", f"ImageSets/{kind}"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for number, (id, xml) in enumerate(annotations.items()):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{id}.jpg")
        (root / "Annotations" / f"{id}.xml").write_text(xml)
    for split, ids in splits.items():
        (root / "ImageSets" / kind / f"{split}.txt").write_text("".join(f"{id}\n" for id in ids))
    return root


def unpacked(name: str, where: Path) -> Path | None:
    """The real set of a tar file, unpacked; None on a machine that does not have it."""
    tar = DATA / name
    if not tar.is_file():
        return None
    with tarfile.open(tar) as file:
        file.extractall(where, filter="data")
    return where
