# SPDX-License-Identifier: Apache-2.0
"""The regression is scikit-learn's, fit after fit; metrics are counted by hand; a stop changes nothing."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from kinfold.errors import UserError
from kinfold.evaluate.transfer.logistic import Probe, eleven_point, per_class, published_decays

Pair = tuple[np.ndarray, np.ndarray]


def clouds(count: int, *, seed: int, classes: int = 4, width: int = 6) -> Pair:
    """Points around a centre for each class, which overlap."""
    centres = np.random.RandomState(9).randn(classes, width)
    random = np.random.RandomState(seed)
    y = random.randint(0, classes, count)
    return (centres[y] + 1.2 * random.randn(count, width)).astype(np.float32), y.astype(np.int64)


def several(count: int, *, seed: int) -> Pair:
    """Points with three labels each that depend on them."""
    x, _ = clouds(count, seed=seed)
    noise = np.random.RandomState(seed + 1).randn(count, 3)
    return x, x[:, :3] + noise > 0.3


@pytest.fixture(autouse=True)
def _unconverged() -> None:
    warnings.simplefilter("ignore", ConvergenceWarning)


def test_the_decays_are_the_published_ones() -> None:
    decays = published_decays(45)
    assert len(decays) == 45
    np.testing.assert_allclose(decays, 10.0 ** np.linspace(-6, 5, 45), rtol=1e-6)
    # From the commands beside the authors' code (ssl-transfer, run_linear.sh): float32's rounding and all.
    assert 1 / decays[8] == 10000.000252621256
    assert {5623.413277133687, 999.999952502551} <= {1 / decay for decay in decays}


@pytest.mark.parametrize("metric", ["accuracy", "per-class"])
def test_scores_are_those_of_a_plain_loop_over_scikit_learn(metric: str) -> None:
    learned, asked = clouds(120, seed=0), clouds(90, seed=1)
    decays = published_decays(9)
    model = LogisticRegression(solver="lbfgs", max_iter=7, warm_start=True)
    expected = []
    for decay in decays:
        model.set_params(C=1 / decay).fit(*learned)
        if metric == "accuracy":
            expected.append(100 * model.score(*asked))
        else:
            expected.append(100 * balanced_accuracy_score(asked[1], model.predict(asked[0])))
    probe = Probe(metric, max_iter=7)  # type: ignore[arg-type]
    found = [probe.score(decay, learned, asked)[None] for decay in decays]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert len(set(found)) > 2


def test_several_labels_go_through_one_model_class_after_class() -> None:
    learned, asked = several(80, seed=2), several(60, seed=4)
    model = LogisticRegression(solver="lbfgs", max_iter=3, warm_start=True)
    probe = Probe("mAP", max_iter=3)
    for decay in (1e-3, 1.0):
        expected = []
        for column in range(3):
            model.set_params(C=1 / decay).fit(learned[0], learned[1][:, column])
            scores = model.decision_function(asked[0])
            expected.append(100 * eleven_point(asked[1][:, column], scores))
        found = probe.score(decay, learned, asked)
        assert [found[column] for column in range(3)] == expected
        assert found[None] == pytest.approx(np.mean(expected))


def test_a_class_that_cannot_be_fitted_is_left_out_when_it_is_not_named() -> None:
    learned, asked = several(80, seed=2), several(60, seed=4)
    learned[1][:, 1] = False
    probe = Probe("mAP")
    assert set(probe.score(1.0, learned, asked, [0, 2])) == {None, 0, 2}
    with pytest.raises(UserError, match="decay 1 cannot be fitted"):
        probe.score(1.0, learned, asked)


def test_eleven_points_begin_at_one() -> None:
    # By falling score: miss, hit, miss, hit. Precision at the hits: 1/2 at recall 1/2, 2/4 at recall 1.
    positive, scores = np.array([False, True, False, True]), np.array([0.9, 0.8, 0.7, 0.6])
    assert eleven_point(positive, scores) == pytest.approx((1 + 10 * 0.5) / 11)
    # hit, miss, hit: 1 up to recall 1/2 (0 to 0.5: six points), then 2/3.
    assert eleven_point(np.array([True, False, True]), np.array([3.0, 2.0, 1.0])) == pytest.approx((6 + 5 * 2 / 3) / 11)


def test_the_mean_over_classes_leaves_out_those_without_an_image() -> None:
    truth, predicted = np.array([0, 0, 0, 1]), np.array([0, 0, 2, 1])
    assert per_class(truth, predicted) == pytest.approx((2 / 3 + 1) / 2)


def test_a_stop_between_two_fits_changes_nothing() -> None:
    learned, asked = clouds(120, seed=0), clouds(90, seed=1)
    decays = published_decays(6)
    whole, first, second = Probe("accuracy", max_iter=4), Probe("accuracy", max_iter=4), Probe("accuracy", max_iter=4)
    for decay in decays:
        whole.score(decay, learned, asked)
    for decay in decays[:3]:
        first.score(decay, learned, asked)
    second.restore(first.state())
    for decay in decays[3:]:
        second.score(decay, learned, asked)
    for name, value in whole.state().items():
        assert torch.equal(value, second.state()[name]), name
    assert Probe("accuracy").state() == {}


def test_a_new_class_starts_the_weights_anew() -> None:
    (x, y), asked = clouds(120, seed=0), clouds(90, seed=1)
    few = y < 3
    probe, fresh = Probe("accuracy"), Probe("accuracy")
    probe.score(1.0, (x[few], y[few]), asked)
    assert probe.score(1.0, (x, y), asked) == fresh.score(1.0, (x, y), asked)
