# SPDX-License-Identifier: Apache-2.0
"""Average precision: PCL's golden numbers, scikit-learn where the definitions meet, and both forms by hand."""

from __future__ import annotations

import itertools
from fractions import Fraction

import golden
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from kinfold.evaluate.average_precision import Curve, all_point, curve, eleven_point, step

# Few different scores, so that many are equal.
RANKINGS = st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=1, max_size=30).filter(
    lambda rows: any(positive for _, positive in rows)
)


def points(rows: list[tuple[int, bool]]) -> list[tuple[Fraction, Fraction]]:
    """Recall and precision as fractions, after each distinct score."""
    total = sum(positive for _, positive in rows)
    found = []
    for least in sorted({score for score, _ in rows}, reverse=True):
        taken = [positive for score, positive in rows if score >= least]
        found.append((Fraction(sum(taken), total), Fraction(sum(taken), len(taken))))
    return found


@pytest.mark.parametrize("number", range(3))
def test_the_all_point_form_is_pcls(number: int) -> None:
    numbers = golden.load("voc07_ap")
    found = curve(numbers[f"scores{number}"].numpy(), numbers[f"targets{number}"].numpy() == 1)
    golden.assert_close(all_point(found), numbers[f"ap{number}"][0], "PCL's average precision")


@given(RANKINGS)
def test_the_step_form_is_scikit_learns_also_where_scores_are_equal(rows: list[tuple[int, bool]]) -> None:
    scores, positive = zip(*rows)
    assert step(curve(scores, positive)) == pytest.approx(average_precision_score(positive, scores), rel=1e-12)


@given(RANKINGS)
def test_interpolated_forms_are_their_definitions_in_fractions(rows: list[tuple[int, bool]]) -> None:
    found = points(rows)

    def envelope(recall: Fraction) -> Fraction:
        return max((precision for at, precision in found if at >= recall), default=Fraction(0))

    steps = sorted({at for at, _ in found} | {Fraction(0)})
    area = sum((high - low) * envelope(high) for low, high in itertools.pairwise(steps))
    mean = sum(envelope(Fraction(i, 10)) for i in range(11)) / 11
    scores, positive = zip(*rows)
    assert all_point(curve(scores, positive)) == pytest.approx(float(area), rel=1e-12)
    assert eleven_point(curve(scores, positive)) == pytest.approx(float(mean), rel=1e-12)


@given(RANKINGS, st.randoms(use_true_random=False))
def test_the_order_of_the_images_means_nothing(rows: list[tuple[int, bool]], random: object) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    for form in (all_point, eleven_point, step):
        assert form(curve(*zip(*rows))) == form(curve(*zip(*shuffled)))


def test_four_images_by_hand() -> None:
    # Positives at ranks 1 and 3: precision 1 at recall 0.5, precision 2/3 at recall 1.
    found = curve([0.9, 0.8, 0.7, 0.6], [True, False, True, False])
    assert all_point(found) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert eleven_point(found) == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)  # recalls 0 to 0.5, and 0.6 to 1


def test_recalls_that_are_exactly_a_tenth_count() -> None:
    # Three of ten positives come first, then forty negatives: recall 0.3 is reached with precision 1.
    positive = [True] * 3 + [False] * 40 + [True] * 7
    found = curve(np.arange(50, 0, -1), positive)
    assert eleven_point(found) == pytest.approx((4 * 1.0 + 7 * 0.2) / 11)


def test_recalls_just_below_a_tenth_do_not_count() -> None:
    # One of eleven positives comes first, then nine negatives: recall 1/11 is not 0.1.
    found = curve(np.arange(20, 0, -1), [True] + [False] * 9 + [True] * 10)
    assert eleven_point(found) == pytest.approx((1 * 1.0 + 10 * 11 / 20) / 11)


def test_positives_that_are_never_found_count_against_it() -> None:
    # As in detection: two of four objects are found, both first.
    found = Curve(hits=np.array([1, 2]), taken=np.array([1, 2]), positives=4)
    assert all_point(found) == step(found) == 0.5
    assert eleven_point(found) == pytest.approx(6 / 11)


def test_scores_that_are_all_equal_give_the_share_of_positives() -> None:
    found = curve([1.0] * 8, [True, True] + [False] * 6)
    assert all_point(found) == step(found) == eleven_point(found) == 0.25


def test_a_perfect_ranking_gives_one_in_every_form() -> None:
    found = curve([4.0, 3.0, 2.0, 1.0], [True, True, False, False])
    assert all_point(found) == step(found) == eleven_point(found) == 1.0


def test_what_has_no_average_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="without a positive"):
        curve([0.3, 0.2], [False, False])
    with pytest.raises(ValueError, match="NaN"):
        curve([0.3, float("nan")], [True, False])
