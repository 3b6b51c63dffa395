# SPDX-License-Identifier: Apache-2.0
"""Which of a protocol's numbers stand in a table of results, and in which order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

MAIN: dict[str, tuple[str, ...]] = {
    "knn": ("top1/k=200,T=0.1", "top1/*", "best"),
    "linear": ("last", "best"),
    "semi-supervised": ("top1", "top5", "best/top1", "best/top5"),
    "voc-svm": ("mAP/k=*", "mAP/full", "chosen"),
    "voc-logistic": ("mAP/last", "mAP/best"),
    "transfer": ("*", "mean"),
    "fine-tune": ("top1", "mean_per_class", "best/top1", "best/mean_per_class"),
    "detection": ("AP", "AP50", "AP75", "mask/AP", "mask/AP50", "mask/AP75"),
    "segmentation": ("mIoU",),
    "patches": ("mIoU",),
}
"""protocol to its main values, in the order of the columns; patterns as of file names"""


def main_values(protocol: str, names: Sequence[str]) -> list[str]:
    """Choose the values of a protocol that stand in the table; of an unknown protocol, those without a slash."""
    if protocol == "knn":
        single = [name for name in names if name.startswith("top1/")]
        chosen = "top1/k=200,T=0.1" if "top1/k=200,T=0.1" in single else single[0] if single else None
        many = ["best"] if "best" in names and len(single) != 1 else []
        return [name for name in (chosen, *many) if name is not None]
    patterns = MAIN.get(protocol, ("*",))
    found = [name for pattern in patterns for name in _natural(names, pattern)]
    # A name that two patterns catch stands where the last of them says, so that a mean comes last.
    found = list(reversed(dict.fromkeys(reversed(found))))
    return found or list(names)


def _natural(names: Iterable[str], pattern: str) -> list[str]:
    """Names that a pattern catches, numbers in their order; a star stands for no part of its own, `k=16,C=0.5`."""
    alike = [n for n in names if all(n.count(sign) == pattern.count(sign) for sign in "/,")]
    caught = [n for n in alike if fnmatchcase(n, pattern)]
    if "=*" not in pattern:
        return caught
    return sorted(caught, key=lambda name: [int(d) if d.isdecimal() else d for d in re.split(r"(\d+)", name)])
