# SPDX-License-Identifier: Apache-2.0
"""Average precision, in the three forms that papers call by this one name.

Images are taken in order of falling score. After each of them, precision is the share of positives among those taken,
and recall the share of all positives that are taken. The forms differ in what they do between two recalls:

- `all_point`: the area under the precision's envelope (the largest precision at this recall or a larger one); VOC from
  2010 on, PCL `eval_svm_voc.py` (golden numbers);
- `eleven_point`: the mean of that envelope at the recalls 0, 0.1, ..., 1; VOC 2007, ssl-transfer;
- `step`: the area under the precision itself; scikit-learn's `average_precision_score`, InvP `voc_linear.py`.

Differs: images of equal score are taken together in all of them, as in scikit-learn, so a result does not depend on the
order of the images; a sort in the authors' code decides which comes first. Values are shares, not percent.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Curve(NamedTuple):
    """Precision and recall as counts, one row for each of m growing sets of what has been taken."""

    hits: NDArray[np.int64]
    """[m]: positives among them"""
    taken: NDArray[np.int64]
    """[m]: how many they are"""
    positives: int
    """positives that there are at all, found or not"""


def curve(scores: ArrayLike, positive: ArrayLike) -> Curve:
    """Count along falling scores [n], where `positive` [n] is true; one row for each distinct score.

    Raises `ValueError` where there is no positive, for then recall means nothing, and where a score is NaN.
    """
    scores, positive = np.asarray(scores, np.float64), np.asarray(positive, bool)  # [n], [n]
    if not positive.any():
        raise ValueError("average precision is not defined without a positive")
    if np.isnan(scores).any():
        raise ValueError("a score that is NaN has no place in the order")
    order = np.argsort(-scores, kind="stable")  # [n]
    ranked = scores[order]
    ends = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)  # [m]
    hits = np.cumsum(positive[order], dtype=np.int64)[ends]
    return Curve(hits, ends.astype(np.int64) + 1, int(positive.sum()))


def all_point(found: Curve) -> float:
    """The area under the envelope of the precision."""
    return float(_gains(found) @ _envelope(found))


def step(found: Curve) -> float:
    """The area under the precision as it is: each gain in recall times the precision after it."""
    return float(_gains(found) @ (found.hits / found.taken))


def eleven_point(found: Curve) -> float:
    """The mean of the envelope at the recalls 0, 0.1, ..., 1; zero beyond the largest recall."""
    envelope = np.append(_envelope(found), 0.0)  # [m + 1]
    # Recalls are compared as whole numbers: as floats 0.3 and 3 / 10 of the positives need not be equal.
    places = np.searchsorted(10 * found.hits, found.positives * np.arange(11))  # [11]
    return float(envelope[places].mean())


def _gains(found: Curve) -> NDArray[np.float64]:
    """What each row adds to the recall: [m]."""
    gains: NDArray[np.float64] = np.diff(found.hits, prepend=0) / found.positives
    return gains


def _envelope(found: Curve) -> NDArray[np.float64]:
    """The largest precision in this row or a later one: [m]."""
    precision: NDArray[np.float64] = found.hits / found.taken
    return np.maximum.accumulate(precision[::-1])[::-1]
