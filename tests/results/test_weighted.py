"""Moments and quantiles of weighted draws against NumPy's of equal and of repeated draws."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from bayesmeta.results.weighted import weighted_mean, weighted_quantile, weighted_sd

LEVELS = [0.0, 0.05, 0.3, 0.5, 0.95, 1.0]


@pytest.mark.parametrize("shape", [(40,), (40, 3), (40, 3, 2)])
def test_equal_weights_are_numpys_answers(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).normal(size=shape)
    log_weight = np.full(shape[:2], -12.0)
    np.testing.assert_allclose(weighted_mean(values, log_weight), values.mean(0))
    np.testing.assert_allclose(weighted_sd(values, log_weight), values.std(0))
    expected = np.quantile(values, LEVELS, axis=0, method="hazen")
    np.testing.assert_allclose(weighted_quantile(values, log_weight, LEVELS), expected)
    np.testing.assert_allclose(weighted_quantile(values, log_weight, 0.3), expected[2])


def test_whole_weights_are_repeated_draws() -> None:
    generator = np.random.default_rng(1)
    values, times = generator.normal(size=(30, 2)), generator.integers(1, 6, 30)
    repeated = np.repeat(values, times, 0)
    log_weight = np.log(times) - 900.0
    np.testing.assert_allclose(weighted_mean(values, log_weight), repeated.mean(0))
    np.testing.assert_allclose(weighted_sd(values, log_weight), repeated.std(0))


def test_each_task_has_its_own_weights() -> None:
    values = np.random.default_rng(2).normal(size=(50, 2, 3))
    log_weight = np.stack([np.zeros(50), np.random.default_rng(3).normal(size=50)], 1)
    for task in range(2):
        alone = values[:, task], log_weight[:, task]
        np.testing.assert_allclose(weighted_mean(values, log_weight)[task], weighted_mean(*alone))
        np.testing.assert_allclose(weighted_sd(values, log_weight)[task], weighted_sd(*alone))
        np.testing.assert_allclose(weighted_quantile(values, log_weight, 0.2)[task], weighted_quantile(*alone, 0.2))


def test_importance_weights_give_the_quantiles_of_the_target() -> None:
    """Draws of N(0, 2²) weighted to N(1, 1): the error of a quantile is √(q(1 − q)/n_eff) / density."""
    values = 2 * np.random.default_rng(4).normal(size=40_000)
    log_weight = norm(1, 1).logpdf(values) - norm(0, 2).logpdf(values)
    weight = np.exp(log_weight)
    effective = weight.sum() ** 2 / np.square(weight).sum()
    levels = np.array([0.05, 0.25, 0.5, 0.75, 0.95])
    truth = norm(1, 1).ppf(levels)
    error = np.sqrt(levels * (1 - levels) / effective) / norm(1, 1).pdf(truth)
    assert (np.abs(weighted_quantile(values, log_weight, levels) - truth) < 4 * error).all()


def test_draws_without_weight_do_not_count() -> None:
    values, log_weight = np.array([5.0, 1.0, 1e9]), np.array([-1.0, -1.0, -np.inf])
    assert weighted_mean(values, log_weight) == 3.0 and weighted_sd(values, log_weight) == 2.0


@pytest.mark.parametrize("q", [-0.1, 1.1, [0.5, np.nan]])
def test_levels_outside_zero_and_one_are_an_error(q: float) -> None:
    with pytest.raises(ValueError, match=r"quantile levels must lie in \[0, 1\], got"):
        weighted_quantile(np.zeros(3), np.zeros(3), q)


@pytest.mark.parametrize("spoilt", [np.nan, np.inf, -np.inf])
def test_a_draw_without_weight_need_not_be_a_number(spoilt: float) -> None:
    generator = np.random.default_rng(4)
    values, log_weight = generator.normal(size=(20, 2, 3)), generator.normal(size=(20, 2))
    more = np.concatenate([values, np.full((1, 2, 3), spoilt)])
    nothing = np.concatenate([log_weight, np.full((1, 2), -1e100)])
    for reduce in (weighted_mean, weighted_sd, lambda v, w: weighted_quantile(v, w, [0.1, 0.9])):
        np.testing.assert_allclose(reduce(more, nothing), reduce(values, log_weight))
    assert not np.isfinite(weighted_mean(more, np.zeros((21, 2)))).any()
