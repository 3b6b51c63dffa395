# SPDX-License-Identifier: Apache-2.0
"""The label-free measures against closed forms and NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kinfold import health


def gaussian(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def with_spectrum(n: int, values: np.ndarray) -> Tensor:
    """Centred features [n, d] whose covariance has exactly these eigenvalues."""
    raw = np.random.default_rng(0).normal(size=(n, len(values)))
    u, _, v = np.linalg.svd(raw - raw.mean(0), full_matrices=False)
    return torch.from_numpy((u * np.sqrt(values * n)) @ v)


@pytest.mark.parametrize(("n", "d"), [(200, 16), (16, 200), (5000, 8)])
def test_rankme_is_the_published_formula(n: int, d: int) -> None:
    x = gaussian(n, d) * torch.linspace(0.01, 3, d)
    values = np.linalg.svd(x.double().numpy(), compute_uv=False)
    shares = values / values.sum() + 1e-7
    assert health.rankme(x) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-6)


def test_rankme_of_orthogonal_features_is_their_number() -> None:
    assert health.rankme(torch.eye(12, 40) * 7) == pytest.approx(12, rel=1e-4)
    assert health.rankme(gaussian(20_000, 16)) == pytest.approx(16, rel=1e-3)


def test_rankme_of_one_direction_is_one_and_of_nothing_zero() -> None:
    assert health.rankme(gaussian(300, 1) @ gaussian(1, 64)) == pytest.approx(1, abs=1e-3)
    assert health.rankme(torch.zeros(10, 4)) == 0


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.5])
def test_alpha_is_that_of_a_constructed_spectrum(alpha: float) -> None:
    x = with_spectrum(400, np.arange(1, 101) ** -alpha)
    assert health.alpha_req(x) == pytest.approx(alpha, abs=1e-6)
    assert health.alpha_req(x + 5) == pytest.approx(alpha, abs=1e-6)


def test_alpha_is_the_weighted_line_that_numpy_fits() -> None:
    x = gaussian(90, 70)
    values = np.linalg.eigvalsh(np.cov(x.double().numpy().T))[::-1]
    i = np.arange(5, 51)
    slope = np.polyfit(np.log(i), np.log(values[4:50]), 1, w=1 / np.sqrt(i))[0]  # polyfit squares its weights
    assert health.alpha_req(x) == pytest.approx(-slope, rel=1e-5)
    assert health.alpha_req(x, first=1, last=2) == pytest.approx(math.log2(values[0] / values[1]), rel=1e-4)


def test_alpha_of_a_collapse_is_infinite() -> None:
    assert health.alpha_req(gaussian(300, 1) @ gaussian(1, 64)) == math.inf
    assert health.alpha_req(torch.full((300, 64), 0.3)) == math.inf


def test_what_is_not_finite_is_nan_and_does_not_stop_a_run() -> None:
    x = gaussian(20, 8)
    x[3, 3] = math.nan
    for value in (health.rankme(x), health.alpha_req(x), health.uniformity(x), health.spread(x)):
        assert math.isnan(value)


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_alignment_is_the_published_formula_of_unit_vectors(alpha: float) -> None:
    q, k = gaussian(50, 8, 1), gaussian(50, 8, 2)
    unit_q, unit_k = F.normalize(q), F.normalize(k)
    expected = np.mean([float((a - b).norm()) ** alpha for a, b in zip(unit_q, unit_k)])
    assert health.alignment(q, 3 * k, alpha) == pytest.approx(expected, rel=1e-5)
    assert health.alignment(q, 5 * q) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("block", [7, 1024])
def test_uniformity_is_the_mean_over_pairs_whatever_the_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_BLOCK", block)
    x = gaussian(40, 6)
    expected = math.log(float(torch.pdist(F.normalize(x)).pow(2).mul(-2).exp().mean()))
    assert health.uniformity(x) == pytest.approx(expected, rel=1e-5)


def test_uniformity_and_spread_know_a_sphere_from_a_point() -> None:
    even, point = gaussian(3000, 128), torch.ones(3000, 128) + 1e-4 * gaussian(3000, 128)
    # On a sphere of d dimensions |x - y|² has mean 2 and variance 4/d, so the log is near -2t + t²·4/d/2.
    assert health.uniformity(even) == pytest.approx(-4 + 8 / 128, abs=0.02)
    assert health.uniformity(point) == pytest.approx(0, abs=1e-4)
    assert health.spread(even) == pytest.approx(1, abs=0.01)
    assert health.spread(point) == pytest.approx(0, abs=1e-3)


def test_spread_of_two_opposite_points_is_numpys() -> None:
    x = torch.tensor([[3.0, 4.0], [-3.0, -4.0]])
    assert health.spread(x) == pytest.approx((0.6 + 0.8) / 2 * math.sqrt(2))


def test_entropy_of_equal_shares_is_the_log_of_their_number() -> None:
    target = torch.zeros(4, 10)
    target[:, :5] = 0.2
    assert health.target_entropy(target) == pytest.approx((math.log(5), 5.0), rel=1e-6)
    assert health.target_entropy(torch.eye(4, 10)) == (0.0, 1.0)


def test_the_age_of_keys_is_counted_from_their_step_and_empty_places_are_left_out() -> None:
    assert health.queue_age(torch.tensor([10, 8, -1, 3]), 11) == pytest.approx((4.0, 8.0))
    assert all(math.isnan(value) for value in health.queue_age(torch.full((4,), -1), 11))


def test_a_healthy_run_is_read_in_silence() -> None:
    x = with_spectrum(3000, np.arange(1, 129) ** -1.0)
    measures = {
        "spread": health.spread(x),
        "rankme": health.rankme(x),
        "dimensions": 128.0,
        "alpha_req": health.alpha_req(x),
        "alignment": 0.4,
        "uniformity": health.uniformity(x),
        "perplexity": 30.0,
        "keys": 4096.0,
        "queue_age_max": 256.0,
        "momentum": 0.99,
        "loss": 5.0,
    }
    assert health.read(measures, {**measures, "loss": 5.2}) == []


def test_a_collapse_is_read_as_one() -> None:
    x = torch.ones(500, 64) + 1e-3 * gaussian(500, 1) * gaussian(1, 64)
    measures = {
        "spread": health.spread(x),
        "rankme": health.rankme(x),
        "dimensions": 64.0,
        "alignment": health.alignment(x, x.roll(1, 0)),
        "uniformity": health.uniformity(x),
    }
    told = health.read(measures)
    assert told[0].startswith("spread 0.00: all images are mapped to nearly one point")
    assert any(line.startswith("rankme 1.0 of 64") for line in told)
    assert any("That is collapse, not learning" in line for line in told)


@pytest.mark.parametrize(
    ("measures", "previous", "words"),
    [
        ({"spread": 0.3}, None, "share most of their direction"),
        ({"spread": 0.5}, {"spread": 0.9}, "spread fell from 0.9 to 0.5"),
        ({"rankme": 50.0}, {"rankme": 90.0}, "dimensions are being lost"),
        ({"alpha_req": math.inf}, None, "a few directions carry nearly everything"),
        ({"alpha_req": 0.1}, None, "near to noise"),
        ({"alignment": 1.9}, None, "hardly nearer than two images"),
        ({"loss": 6.0}, {"loss": 5.0}, "While a queue fills"),
        ({"perplexity": 4000.0, "keys": 4096.0}, None, "Lower the temperature of the target"),
        ({"queue_age_max": 500.0, "momentum": 0.9}, None, "(it does in about 10 steps)"),
        ({"loss": math.nan, "spread": 0.01}, None, "no longer finite"),
    ],
)
def test_each_sign_is_said_in_words(measures: dict[str, float], previous: dict[str, float] | None, words: str) -> None:
    (line,) = health.read(measures, previous)
    assert words in line
