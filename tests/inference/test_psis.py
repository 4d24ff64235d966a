"""Smoothed weights, k̂, gates and resampling against weights whose tail and shares are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bayesmeta.inference import psis


def test_constant_weights_have_khat_zero_by_definition() -> None:
    jitter = np.random.default_rng(0).normal(0, psis.CONSTANT_WEIGHTS / 2, (2, 500))
    for log_weights in (np.full((2, 500), -7.0), jitter):
        smoothed, khat = psis.smooth(log_weights)
        np.testing.assert_array_equal(khat, 0.0)
        np.testing.assert_allclose(smoothed, -math.log(500), atol=3e-3)
    assert psis.smooth(np.zeros(500))[1].shape == ()


def test_constant_and_noisy_rows_in_one_call() -> None:
    log_weights = np.random.default_rng(0).normal(0, 1.0, (3, 400))
    log_weights[1] = 2.0
    smoothed, khat = psis.smooth(log_weights)
    assert khat[1] == 0 and (khat[[0, 2]] != 0).all()
    alone, khat_alone = psis.smooth(log_weights[2])
    np.testing.assert_allclose(smoothed[2], alone)
    assert khat_alone == khat[2]


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_khat_estimates_the_shape_of_a_pareto_tail(shape: float) -> None:
    """log w = k E, E exponential, has a Pareto tail of shape k; an estimate from m values has the sd (1 + k)/√m."""
    count = 20_000
    log_weights = shape * np.random.default_rng(1).exponential(size=count)
    tail = 3 * math.sqrt(count)
    khat = psis.smooth(log_weights)[1]
    assert abs(khat - shape) < 4 * (1 + shape) / math.sqrt(tail)


def test_smoothing_keeps_the_bulk_bounds_the_tail_and_normalises() -> None:
    log_weights = 1.5 * np.random.default_rng(2).exponential(size=(2, 1000)) + 100
    smoothed, _ = psis.smooth(log_weights)
    np.testing.assert_allclose(np.exp(smoothed).sum(-1), 1.0)
    for raw, smooth in zip(log_weights, smoothed, strict=True):
        order = np.argsort(raw)
        assert (np.diff(smooth[order]) >= -1e-12).all()
        bulk = order[:800]
        np.testing.assert_allclose(np.diff(smooth[bulk]), np.diff(raw[bulk]), atol=1e-9)
        assert smooth.max() - smooth[bulk[0]] <= raw.max() - raw[bulk[0]] + 1e-9


def test_too_few_weights_are_never_trusted() -> None:
    few = np.random.default_rng(0).normal(size=(2, psis.MIN_TAIL - 1))
    few[1] = 0.0
    smoothed, khat = psis.smooth(few)
    assert khat.tolist() == [math.inf, 0.0]
    np.testing.assert_allclose(np.exp(smoothed).sum(-1), 1.0)


def test_relative_ess_of_known_weights() -> None:
    with np.errstate(divide="ignore"):
        log_weights = np.log([[1, 1, 1, 1], [1, 0, 0, 0], [2, 2, 0, 0], [3, 1, 0, 0]])
    expected = [1.0, 0.25, 0.5, 16 / (4 * 10)]
    np.testing.assert_allclose(psis.relative_ess(log_weights), expected)
    np.testing.assert_allclose(psis.relative_ess(log_weights - 800.0), expected)


def test_limits_of_khat() -> None:
    limits = {10: -math.inf, 11: 1 - 1 / math.log10(11), 100: 0.5, 1000: 2 / 3, 2200: 0.7, 10**6: 0.7}
    for count, limit in limits.items():
        assert psis.khat_limit(count) == pytest.approx(limit, abs=1e-3)


def test_both_gates_and_the_exception_for_constant_weights() -> None:
    khat = np.array([0.69, 0.71, 0.3, 0.3, 0.0, math.nan, -0.2])
    ess = np.array([0.21, 0.9, 0.19, 0.2, 0.01, 0.9, 0.9])
    assert psis.accepted(khat, ess, 10_000).tolist() == [True, False, False, True, True, False, True]
    assert psis.accepted(khat, ess, 100).tolist() == [False, False, False, True, True, False, True]
    assert psis.accepted(khat, ess, 10).tolist() == [False, False, False, False, True, False, False]


def test_systematic_resampling_is_unbiased_and_even() -> None:
    weights = np.array([0.013, 0.4, 0.087, 0.3, 0.2])
    count, repeats = 37, 4000
    generator = np.random.default_rng(0)
    drawn = [psis.resample(np.log(weights) - 500.0, count, generator) for _ in range(repeats)]
    counts = np.array([np.bincount(index, minlength=5) for index in drawn])
    assert (np.abs(counts - count * weights) < 1 + 1e-9).all()
    fraction = count * weights % 1
    error = np.sqrt(fraction * (1 - fraction) / repeats)
    assert (np.abs(counts.mean(0) - count * weights) < 4 * error).all()
    first = np.bincount([index[0] for index in drawn], minlength=5) / repeats
    assert (np.abs(first - weights) < 4 * np.sqrt(weights * (1 - weights) / repeats)).all()


def test_resampling_survives_rounding_of_the_last_weight() -> None:
    log_weights = np.log(np.full(3, 1 / 3))

    class Top(np.random.Generator):
        def random(self, *args: object, **options: object) -> float:  # type: ignore[override]
            return 1 - 1e-17

    index = psis.resample(log_weights, 6, Top(np.random.PCG64(0)))
    assert sorted(index) == [0, 0, 1, 1, 2, 2] or index.max() == 2


def test_draws_without_weight_spoil_no_others_and_none_at_all_is_a_failure() -> None:
    log_weights = np.random.default_rng(0).normal(size=(2, 400))
    log_weights[0, :3] = [np.nan, -np.inf, np.nan]
    log_weights[1] = np.nan
    smoothed, khat = psis.smooth(log_weights)
    ess = psis.relative_ess(log_weights)
    assert np.isfinite(smoothed).all() and abs(np.exp(smoothed[0]).sum() - 1) < 1e-9
    assert psis.accepted(khat, ess, 400).tolist() == [True, False]
