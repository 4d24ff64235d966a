"""Are ranks uniform? Simultaneous bands for the distribution function of discrete ranks, exact, in NumPy alone.

N ranks among 0 … L are uniform if a posterior is calibrated. The number of ranks below k is then binomial with
probability k / (L + 1) at every k = 1 … L, and one band of pointwise intervals holds all of them at once with the
probability that is asked for. Säilynoja, Bürkner and Vehtari find the pointwise level by a recursion over k; so does
this file. `calibration.py` calls it.

References:
    Säilynoja, Bürkner, Vehtari: Graphical Test for Discrete Uniformity and Its Applications in Goodness-of-Fit
    Evaluation and Multiple Sample Comparison, 2022, https://doi.org/10.1007/s11222-022-10090-6
"""

from __future__ import annotations

import functools
import math

import numpy as np

STEPS = 40
"""Bisections of the pointwise level."""


@functools.lru_cache(maxsize=64)
def band(count: int, draws: int, prob: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """The simultaneous band of probability `prob` for `count` uniform ranks.

    Args:
        count: Number of ranks N.
        draws: Largest rank L; ranks are 0 … L.
        prob: Probability that all of the counts lie inside; at least that, as counts are discrete.

    Returns:
        Smallest and largest number of ranks below k = 1 … L, `(L,)` each.

    Raises:
        ValueError: No ranks, or a probability outside (0, 1).
    """
    if count < 1 or draws < 1:
        raise ValueError(f"band: expected at least one rank and one draw, got {count} ranks of {draws} draws")
    if not 0 < prob < 1:
        raise ValueError(f"band: prob must lie in (0, 1), got {prob}")
    tails = _tails(count, draws)
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        wide_enough = _held(tails > middle, count, draws) >= prob
        low, high = (middle, high) if wide_enough else (low, middle)
    return _ends(tails > low)


def p_value(ranks: np.ndarray, draws: int) -> float:
    """The probability that uniform ranks stray further, anywhere, than these do.

    Below 1 − prob exactly if the counts leave the `band` of probability prob.

    Args:
        ranks: `(N,)`, whole numbers 0 … L.
        draws: L.
    """
    counts = below(ranks, draws)
    tails = _tails(len(ranks), draws)
    furthest = float(tails[np.arange(draws), counts].min())
    return float(np.clip(1 - _held(tails > furthest, len(ranks), draws), 0.0, 1.0))


def below(ranks: np.ndarray, draws: int) -> np.ndarray:
    """How many ranks are below k = 1 … L: `(L,)`.

    Raises:
        ValueError: A rank is not in 0 … L.
    """
    ranks = np.asarray(ranks)
    if len(ranks) == 0 or not np.isin(ranks, np.arange(draws + 1)).all():
        raise ValueError(f"ranks: expected whole numbers from 0 to {draws}, at least one, got {ranks!r:.200}")
    return np.bincount(ranks.astype(int), minlength=draws + 1).cumsum()[:-1]


@functools.lru_cache(maxsize=8)
def _tails(count: int, draws: int) -> np.ndarray:
    """Twice the smaller tail probability of every count, its own included: `(k, N + 1)`."""
    share = np.arange(1, draws + 1) / (draws + 1)
    mass = np.exp(_log_binomial(np.arange(count + 1), count, share[:, None]))
    lower, upper = mass.cumsum(1), mass[:, ::-1].cumsum(1)[:, ::-1]
    return np.minimum(1.0, 2 * np.minimum(lower, upper))


def _held(inside: np.ndarray, count: int, draws: int) -> float:
    """The probability that the counts below every k are where `inside (k, N + 1)` says."""
    state, reach = np.array([0]), np.array([1.0])
    for k in range(1, draws + 1):
        place = np.flatnonzero(inside[k - 1])
        if not len(place):
            return 0.0
        step = place[:, None] - state
        share = 1 / (draws + 2 - k)  # of the ranks that are at least k − 1, those that are k − 1
        move = np.exp(_log_binomial(np.maximum(step, 0), count - state, share))
        state, reach = place, np.where(step >= 0, move, 0.0) @ reach
    return float(reach.sum())


def _ends(inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return inside.argmax(1), inside.shape[1] - 1 - inside[:, ::-1].argmax(1)


def _log_binomial(successes: np.ndarray, trials: np.ndarray | int, share: np.ndarray | float) -> np.ndarray:
    """Log probability of a binomial; -inf where there are more successes than trials."""
    log_factorial = _log_factorials(int(np.max(trials)))
    left = trials - successes
    possible = left >= 0
    left, successes = np.where(possible, left, 0), np.where(possible, successes, 0)
    ways = log_factorial[np.asarray(trials)] - log_factorial[successes] - log_factorial[left]
    return np.where(possible, ways + successes * np.log(share) + left * np.log1p(-np.asarray(share)), -math.inf)


@functools.lru_cache(maxsize=8)
def _log_factorials(largest: int) -> np.ndarray:
    return np.concatenate([[0.0], np.log(np.arange(1, largest + 1)).cumsum()])
