# SPDX-License-Identifier: Apache-2.0
"""L2-regularised logistic regression with a sweep over the weight decay, as ssl-transfer fits it.

scikit-learn's L-BFGS with C = 1 / decay. One model goes through all decays, and each fit starts from the weights of the
one before (`warm_start`); with several labels an image, one class after the other goes through the same model. As most
fits end by their number of iterations and not by convergence, this order is a part of the protocol.

Source: linusericsson/ssl-transfer, `linear.py` (verified).
Differs: two classes have one row of weights here; the authors' scikit-learn 0.22 gave each its own (recalled), so that
the same model has half their decay here. Their values lie a factor of 1.78 apart.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from kinfold.errors import UserError

Metric = Literal["accuracy", "per-class", "mAP"]
"""share of the images; mean over classes of the share of each one's images; mean over classes of 11-point AP"""

Features = NDArray[np.float32]
"""[n, F]"""
Truth = NDArray[Any]
"""int64 [n], a class an image; or bool [n, C] for mAP"""


def published_decays(count: int) -> tuple[float, ...]:
    """Give `count` decays from 1e-6 to 1e5, evenly in the logarithm, rounded to float32 as the authors' are."""
    return tuple(float(decay) for decay in torch.logspace(-6, 5, count).tolist())


class Probe:
    """Logistic regression whose every fit starts from the last one's weights."""

    def __init__(self, metric: Metric, *, max_iter: int = 100) -> None:
        self.metric = metric
        self.max_iter = max_iter
        self._model = self._fresh()

    def score(
        self,
        decay: float,
        learned: tuple[Features, Truth],
        asked: tuple[Features, Truth],
        columns: Sequence[int] | None = None,
    ) -> dict[int | None, float]:
        """Fit to `learned` and give the metric on `asked` in percent: {None: percent}, for mAP AP by class as well.

        For mAP, `columns` are the classes to fit, each of which needs positives in both and negatives in `learned`.
        """
        (x, y), (queries, truth) = learned, asked
        if self.metric != "mAP":
            self._fit(decay, x, y)
            predicted = self._model.predict(queries)  # [q]
            return {
                None: 100.0 * (per_class(truth, predicted) if self.metric == "per-class" else _share(truth, predicted))
            }
        found: dict[int | None, float] = {}
        for column in range(y.shape[1]) if columns is None else columns:
            self._fit(decay, x, y[:, column])
            found[column] = 100.0 * eleven_point(truth[:, column], self._model.decision_function(queries))
        found[None] = float(np.mean(list(found.values())))
        return found

    def _fit(self, decay: float, x: Features, y: Truth) -> None:
        from sklearn.exceptions import ConvergenceWarning

        known = getattr(self._model, "classes_", None)
        if known is not None and not np.array_equal(known, np.unique(y)):
            # Weights of other classes are no start: the validation images have brought a class that was not there.
            self._model = self._fresh()
        self._model.set_params(C=1.0 / decay)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            try:
                self._model.fit(x, y)
            except ValueError as error:
                raise UserError(f"The logistic regression with decay {decay:g} cannot be fitted: {error}") from error

    def state(self) -> dict[str, Any]:
        """Give all that a later fit depends on."""
        if not hasattr(self._model, "coef_"):
            return {}
        return {
            "classes": torch.from_numpy(np.asarray(self._model.classes_).astype(np.int64)),
            "weight": torch.from_numpy(np.array(self._model.coef_)),
            "bias": torch.from_numpy(np.array(self._model.intercept_)),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take a state back."""
        self._model = self._fresh()
        if "weight" in state:
            self._model.classes_ = state["classes"].numpy()
            self._model.coef_, self._model.intercept_ = state["weight"].numpy(), state["bias"].numpy()

    def _fresh(self) -> Any:
        from sklearn.linear_model import LogisticRegression

        return LogisticRegression(solver="lbfgs", max_iter=self.max_iter, warm_start=True)


def per_class(truth: Truth, predicted: Truth) -> float:
    """Give the mean over classes of the share of each one's images that is right; truth and predicted are [q].

    Differs: over the classes that `truth` has. The authors' mean is NaN where a class that it lacks is predicted.
    """
    right = truth == predicted  # [q]
    return float(np.mean([right[truth == label].mean() for label in np.unique(truth)]))


def eleven_point(positive: Truth, scores: NDArray[Any]) -> float:
    """Give average precision at the recalls 0, 0.1, ..., 1; positive bool [q], scores [q].

    As ssl-transfer computes it, which is not quite VOC's: scikit-learn's curve begins at recall 0 with precision 1, so
    the first of the eleven numbers is always 1; and recalls are compared as floats.
    """
    from sklearn.metrics import precision_recall_curve

    precision, recall, _ = precision_recall_curve(positive, scores)
    return float(np.mean([precision[recall >= least].max() for least in np.linspace(0, 1, 11)]))


def _share(truth: Truth, predicted: Truth) -> float:
    return float((truth == predicted).mean())
