"""Bands against brute force, against simulation, and p-values that are uniform."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from bayesmeta.checks.bands import band, below, p_value


def held(counts: np.ndarray, ends: tuple[np.ndarray, np.ndarray]) -> bool:
    return bool(((counts >= ends[0]) & (counts <= ends[1])).all())


@pytest.mark.parametrize("prob", [0.5, 0.8, 0.95])
def test_the_band_is_the_narrowest_that_brute_force_finds(prob: float) -> None:
    count, draws = 5, 3
    every = [np.array(ranks) for ranks in itertools.product(range(draws + 1), repeat=count)]
    share = np.mean([held(below(ranks, draws), band(count, draws, prob)) for ranks in every])
    assert share >= prob
    p = np.array([p_value(ranks, draws) for ranks in every])
    for level in np.unique(p):
        assert math.isclose((p <= level).mean(), level, abs_tol=1e-12)
    assert math.isclose(share, 1 - p[p <= 1 - prob + 1e-12].max(initial=0.0), abs_tol=1e-12)


@pytest.mark.parametrize(("count", "draws"), [(30, 19), (300, 99)])
def test_uniform_ranks_stay_inside_with_the_probability_that_is_asked_for(count: int, draws: int) -> None:
    rng, trials = np.random.default_rng(1), 4000
    inside = [held(below(rng.integers(0, draws + 1, count), draws), band(count, draws, 0.9)) for _ in range(trials)]
    assert abs(np.mean(inside) - 0.9) < 4 * math.sqrt(0.09 / trials) + 0.01  # counts are discrete: a little above


def test_a_band_and_a_p_value_agree() -> None:
    rng = np.random.default_rng(2)
    for tilt in (1.0, 1.2, 1.5):
        ranks = np.floor(100 * rng.random((50, 200)) ** tilt).astype(int)
        for one in ranks:
            assert held(below(one, 99), band(200, 99, 0.95)) == (p_value(one, 99) > 0.05)


@pytest.mark.parametrize("spread", [0.7, 1.4])
def test_ranks_of_a_posterior_of_the_wrong_width_are_outside(spread: float) -> None:
    rng = np.random.default_rng(3)
    ranks = (spread * rng.normal(size=(99, 500)) < rng.normal(size=500)).sum(0)
    assert p_value(ranks, 99) < 1e-4


def test_what_is_no_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="whole numbers from 0 to 9"):
        p_value(np.array([0, 10]), 9)
    with pytest.raises(ValueError, match="at least one"):
        below(np.array([]), 9)
    with pytest.raises(ValueError, match="prob must lie"):
        band(10, 9, 1.0)
    with pytest.raises(ValueError, match="at least one rank"):
        band(0, 9, 0.9)
