# SPDX-License-Identifier: Apache-2.0
"""What addressed randomness promises: the same address, the same numbers; other addresses, unrelated ones."""

import numpy as np
import pytest
from scipy import stats

from kinfold import randomness
from kinfold.randomness import ORDER, REPLACE, VIEW, integers, permutation, seed_of, uniforms

MASK = 2**64 - 1


def splitmix64(state: int) -> int:
    """The finaliser of SplitMix64 in plain whole numbers."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def test_numbers_are_those_of_the_formula_in_whole_numbers():
    gamma = 0x9E3779B97F4A7C15
    start = 0
    for word in (VIEW, 3, -1, 2**63 + 5):
        start = splitmix64(splitmix64((start + gamma) & MASK) ^ (word & MASK))
    expected = [(splitmix64((start + (j + 1) * gamma) & MASK) >> 11) / 2**53 for j in range(5)]
    assert uniforms(VIEW, 3, -1, 2**63 + 5, draws=5).tolist() == expected


def test_the_stream_from_state_zero_is_the_published_splitmix64():
    # The first outputs of the reference implementation for seed 0.
    gamma = 0x9E3779B97F4A7C15
    assert [splitmix64((j * gamma) & MASK) for j in (1, 2, 3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


def test_pinned_numbers_stay_so_that_old_runs_resume():
    assert uniforms(2, 0, 0, 5, 1, draws=2).tolist() == [0.030028754051350304, 0.11872066289763039]
    assert integers(4, 0, 0, 7, 0, below=1000) == 41
    assert permutation(1, 0, 0, n=8).tolist() == [1, 4, 7, 6, 5, 3, 0, 2]
    assert seed_of(5, 0) == 7719318242271295539


def test_purpose_words_are_all_different():
    words = [
        value
        for name, value in vars(randomness).items()
        if name.isupper() and isinstance(value, int) and name[0] != "_"
    ]
    assert len(words) == 7
    assert len(set(words)) == 7


def test_a_batch_of_addresses_gives_what_each_address_gives_alone():
    image = np.array([5, 0, 2**40, -7])
    view = np.array([[0], [1]])
    together = uniforms(VIEW, 1, 2, image, view, draws=6)
    assert together.shape == (2, 4, 6)
    for i, row in enumerate(view[:, 0]):
        for j, column in enumerate(image):
            assert together[i, j].tolist() == uniforms(VIEW, 1, 2, int(column), int(row), draws=6).tolist()
    several = integers(REPLACE, 0, image, below=12345)
    assert several.tolist() == [integers(REPLACE, 0, int(i), below=12345) for i in image]
    assert several.dtype == np.int64


def test_the_kind_of_whole_number_does_not_matter():
    for kind in (np.int32, np.int64, np.uint8, np.uint64):
        assert (
            uniforms(VIEW, np.array([3, 200], dtype=kind), draws=2).tolist()
            == uniforms(VIEW, np.array([3, 200]), draws=2).tolist()
        )
    with pytest.raises(TypeError, match="whole numbers"):
        uniforms(VIEW, np.array([0.5]), draws=1)


def test_a_draw_does_not_depend_on_how_many_are_asked_for():
    assert uniforms(VIEW, 9, draws=40)[:7].tolist() == uniforms(VIEW, 9, draws=7).tolist()


def test_numbers_are_uniform():
    numbers = uniforms(VIEW, 0, 0, np.arange(20_000), 0, draws=5)
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    for j in range(5):
        counts = np.histogram(numbers[:, j], bins=100, range=(0, 1))[0]
        assert stats.chisquare(counts).pvalue > 1e-4
    whole = integers(REPLACE, np.arange(50_000), below=7)
    assert stats.chisquare(np.bincount(whole, minlength=7)).pvalue > 1e-4


@pytest.mark.parametrize("place", range(1, 5))
def test_neighbouring_addresses_are_unrelated_in_every_word(place):
    i = np.arange(20_000)
    address = [VIEW, 11, 12, 13, 14]
    here, there = list(address), list(address)
    here[place], there[place] = i, i + 1
    a, b = uniforms(*here, draws=3), uniforms(*there, draws=3)
    for x in range(3):
        for y in range(3):
            assert abs(np.corrcoef(a[:, x], b[:, y])[0, 1]) < 0.03  # 4 standard deviations
    cells = np.histogram2d(a[:, 0], b[:, 0], bins=10, range=((0, 1), (0, 1)))[0]
    assert stats.chisquare(cells.ravel()).pvalue > 1e-4


def test_words_that_change_places_make_another_address():
    numbers = {
        float(uniforms(*address, draws=1)[0])
        for address in ((1, 2, 3), (2, 1, 3), (1, 3, 2), (1, 2), (1, 2, 3, 0), (0, 1, 2, 3))
    }
    assert len(numbers) == 6


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_a_permutation_holds_every_number_once(n):
    order = permutation(ORDER, 0, 0, n=n)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))


def test_each_epoch_and_seed_has_its_own_order():
    orders = {tuple(permutation(ORDER, seed, epoch, n=50)) for seed in range(3) for epoch in range(20)}
    assert len(orders) == 60
    assert tuple(permutation(ORDER, 2, 7, n=50)) in orders


def test_every_place_of_a_permutation_is_equally_likely():
    first = np.array([permutation(ORDER, 0, epoch, n=6) for epoch in range(6000)])
    for place in range(6):
        assert stats.chisquare(np.bincount(first[:, place], minlength=6)).pvalue > 1e-4


def test_seeds_fit_a_generator():
    seeds = [seed_of(5, i) for i in range(1000)]
    assert len(set(seeds)) == 1000
    assert min(seeds) >= 0
    assert max(seeds) < 2**63


def test_whole_numbers_below_one_are_all_zero_and_below_zero_is_refused():
    assert integers(REPLACE, np.arange(10), below=1).tolist() == [0] * 10
    with pytest.raises(ValueError, match="below"):
        integers(REPLACE, 1, below=0)
