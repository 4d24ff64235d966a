"""Scores of predictions against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bayesmeta.checks import metrics

NAN = math.nan


def test_rows_are_averaged_within_tasks_first() -> None:
    found = metrics.per_task(np.array([[1.0, 3.0, NAN], [5.0, NAN, NAN], [NAN, NAN, NAN]]))
    np.testing.assert_array_equal(found, [2.0, 5.0, NAN])
    mean, error = metrics.mean_and_error(found)
    assert mean == 3.5
    assert error == pytest.approx(1.5)


def test_one_task_has_no_standard_error_and_none_no_mean() -> None:
    assert metrics.mean_and_error(np.array([2.0, NAN]))[0] == 2.0
    assert math.isnan(metrics.mean_and_error(np.array([2.0, NAN]))[1])
    assert all(math.isnan(v) for v in metrics.mean_and_error(np.array([NAN])))


def test_alike_differences_of_log_scores_are_not_certain() -> None:
    """Two errors are log 20 nats in all, or what rows tell where that is more; one row tells nothing."""
    mean, error = metrics.score_difference(np.array([-0.05] * 30 + [NAN]))
    assert mean == pytest.approx(-0.05) and 2 * 30 * error == pytest.approx(math.log(20))
    spread = np.random.default_rng(0).normal(size=400)
    assert metrics.score_difference(spread) == metrics.mean_and_error(spread)
    assert math.isnan(metrics.score_difference(np.array([-50.0]))[1])
    assert metrics.verdict(np.full(30, -0.09)) == "no clear difference"
    assert metrics.verdict(np.full(30, -0.11)) == "negative transfer"
    assert metrics.verdict(np.full(30, 0.11)) == "sharing helps"
    assert metrics.verdict(np.array([-50.0])) == metrics.verdict(np.array([NAN])) == "no clear difference"


def test_rmse_and_its_error_by_the_delta_method() -> None:
    squared = np.random.default_rng(0).gamma(3.0, size=400)
    value, error = metrics.root(squared)
    assert value == pytest.approx(math.sqrt(squared.mean()))
    resampled = np.random.default_rng(1).choice(squared, (4000, 400)).mean(1)
    assert error == pytest.approx(np.sqrt(resampled).std(), rel=0.08)
    assert metrics.rmse(np.array([[1.0, 2.0], [3.0, NAN]]), np.array([[1.0, 4.0], [5.0, NAN]]))[0] == math.sqrt(3.0)
    assert metrics.rmse(np.array([[1.0]]), np.array([[1.0]]))[0] == 0.0


def test_ratio_with_tasks_as_clusters() -> None:
    generator = np.random.default_rng(0)
    rows = generator.integers(1, 30, 300)
    inside = generator.binomial(rows, generator.beta(9, 1, 300))
    value, error = metrics.ratio_and_error(inside, rows)
    assert value == inside.sum() / rows.sum()
    picks = generator.integers(0, 300, (4000, 300))
    assert error == pytest.approx((inside[picks].sum(1) / rows[picks].sum(1)).std(), rel=0.1)
    assert math.isnan(metrics.ratio_and_error(np.zeros(0), np.zeros(0))[0])


def test_coverage_counts_rows_within_the_interval() -> None:
    y = np.array([[0.0, 1.0, 2.0], [5.0, NAN, NAN]])
    np.testing.assert_allclose(metrics.coverage(np.full((2, 3), 0.5), np.full((2, 3), 2.0), y), [2 / 3, 0.0])


def test_crps_of_a_normal_is_the_closed_form() -> None:
    draws = np.random.default_rng(0).standard_normal((20_000, 1, 3))
    y = np.array([[-1.0, 0.0, 2.0]])
    density = np.exp(-(y**2) / 2) / math.sqrt(2 * math.pi)
    cumulative = np.vectorize(lambda v: 0.5 * (1 + math.erf(v / math.sqrt(2))))(y)
    exact = y * (2 * cumulative - 1) + 2 * density - 1 / math.sqrt(math.pi)
    spread = np.abs(draws - y).std(0) + draws.std(0)
    assert (np.abs(metrics.crps(draws, y) - exact) < 4 * spread / math.sqrt(len(draws))).all()


def test_crps_is_unbiased_with_few_draws() -> None:
    draws = np.random.default_rng(1).standard_normal((2, 200_000, 1))
    found = metrics.crps(draws, np.zeros((200_000, 1)))
    exact = 2 / math.sqrt(2 * math.pi) - 1 / math.sqrt(math.pi)
    assert abs(found.mean() - exact) < 4 * found.std() / math.sqrt(found.size)


def test_crps_needs_two_draws() -> None:
    with pytest.raises(ValueError, match="at least two draws, got 1"):
        metrics.crps(np.zeros((1, 1, 1)), np.zeros((1, 1)))


def test_calibration_of_the_truth_and_of_overconfidence() -> None:
    generator = np.random.default_rng(0)
    y, draws = generator.standard_normal((50, 40)), generator.standard_normal((400, 50, 40))
    y[0, 3:] = NAN
    right, narrow = metrics.pit(draws, y), metrics.pit(draws / 3, y)
    assert np.isnan(right[0, 3:]).all()
    assert metrics.calibration_error(right) < 4 * 0.5 / math.sqrt(y.size)
    assert metrics.calibration_error(narrow) > 0.1
    curve = metrics.calibration_curve(narrow, [0.1, 0.9])
    assert curve[0] > 0.2
    assert curve[1] < 0.8


def test_ties_count_half() -> None:
    assert metrics.pit(np.array([0.0, 1.0, 1.0, 2.0]).reshape(-1, 1, 1), np.array([[1.0]])) == 0.5


def test_rows_of_a_task_hang_together() -> None:
    """Means over rows whose tasks differ scatter by their errors; with one row a task those are the usual ones."""
    rng = np.random.default_rng(0)
    found = [metrics.clustered_mean(rng.normal(size=(20, 1)) + 0.1 * rng.normal(size=(20, 15))) for _ in range(400)]
    means, errors = np.array(found).T
    assert np.sqrt((errors**2).mean()) == pytest.approx(means.std(), rel=0.12)
    single = rng.normal(size=(30, 1))
    assert metrics.clustered_mean(single) == pytest.approx(metrics.mean_and_error(single[:, 0]))
    ragged = np.array([[1.0, 2.0], [4.0, np.nan]])
    mean, error = metrics.clustered_mean(ragged)
    assert mean == pytest.approx(7 / 3) and error == pytest.approx(np.sqrt(2 * 2 * (5 / 3) ** 2) / 3)


def test_expected_calibration_error() -> None:
    """By hand in two bins, the last one with confidence 1; near its chance value where confidence is right."""
    confidence, correct = np.array([0.1, 0.3, 0.9, 1.0]), np.array([True, False, True, False])
    assert metrics.expected_calibration_error(confidence, correct, bins=2) == pytest.approx((0.6 + 0.9) / 4)
    rng = np.random.default_rng(0)
    sure = rng.uniform(size=(200, 50))
    right = rng.uniform(size=sure.shape) < sure
    chance = 15 * math.sqrt(2 / math.pi * 1 / 6 * sure.size / 15) / sure.size
    assert metrics.expected_calibration_error(sure, right) < 2 * chance
    assert metrics.expected_calibration_error(sure, right[::-1]) > 0.2
