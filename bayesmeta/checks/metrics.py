"""Scores of predictions, in NumPy alone: log score, RMSE, CRPS, coverage, calibration, and their errors over tasks.

Predictions of held-out rows are arrays `(task, M)`, draws `(draw, task, M)`; NaN marks rows that a task does not have.
A score is averaged over the rows of a task first and then over tasks, so that small tasks count as much as large ones
and standard errors are over tasks. `sharing.py`, `plots.py` and `benchmarks/` call this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

LEVELS = tuple(np.linspace(0.05, 0.95, 20))
"""Levels at which calibration is measured."""
CLEAR = 2.0
"""Standard errors from 0 beyond which a difference is called one."""
ODDS = 20.0
"""How much likelier all labels of a task are under the better of two candidates before a difference is called one."""


def per_task(values: np.ndarray) -> np.ndarray:
    """Means over the rows of each task.

    Args:
        values: `(task, M)`, NaN where there is no row.

    Returns:
        `(task,)`, NaN for tasks without rows.
    """
    values = np.asarray(values, dtype=float)
    there = ~np.isnan(values)
    count = there.sum(-1)
    total = np.where(there, values, 0.0).sum(-1)
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean over tasks and its standard error.

    Args:
        values: `(task,)`; NaN is left out.

    Returns:
        (mean, standard error); the error is NaN for fewer than two tasks, both are for none.
    """
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    if len(values) < 2:
        return (float(values[0]) if len(values) else math.nan), math.nan
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def score_difference(values: np.ndarray) -> tuple[float, float]:
    """Mean over a task's rows of the difference of two log scores, and its standard error.

    Rows whose labels are all the same hardly differ, and their spread says nothing of labels that did not come: a task
    without positives, however rare they are. So the error is no less than log(20)/2n, with which two errors are log 20
    nats in all. If the labels of a task come from one predictive, another gives them 20 times its density with
    probability 1/20 at most (Markov's inequality; exact if each row is predicted from rows before it).

    Args:
        values: Differences in nats `(row,)`; NaN is left out.

    Returns:
        (mean, standard error); the error is NaN for one row, both are for none.
    """
    mean, error = mean_and_error(values)
    return mean, error if math.isnan(error) else max(error, math.log(ODDS) / CLEAR / int((~np.isnan(values)).sum()))


def verdict(values: np.ndarray) -> str:
    """What sharing does for a task, from the differences of its rows' log scores to those of no pooling.

    Returns:
        "sharing helps" or "negative transfer" if the mean is more than two standard errors of `score_difference` from
        0, else "no clear difference".
    """
    mean, error = score_difference(values)
    if mean > CLEAR * error:
        return "sharing helps"
    return "negative transfer" if mean < -CLEAR * error else "no clear difference"


def clustered_mean(values: np.ndarray) -> tuple[float, float]:
    """Mean of all entries of `(task, M)` that are not NaN and its standard error, rows of a task hanging together.

    With one task rows count as independent.
    """
    there = ~np.isnan(values)
    tasks = there.any(1)
    if tasks.sum() < 2:
        return mean_and_error(values[there])
    mean = float(values[there].mean())
    sums = np.where(there, values - mean, 0.0).sum(1)[tasks]
    error = np.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)) / there.sum()
    return mean, float(error)


def ratio_and_error(numerator: np.ndarray, denominator: np.ndarray) -> tuple[float, float]:
    """Sum over tasks divided by sum over tasks, and its standard error with tasks as clusters.

    Args:
        numerator: `(task,)`, such as the rows of each task that are inside their interval.
        denominator: `(task,)`, such as the rows of each task.
    """
    numerator, denominator = np.asarray(numerator, dtype=float), np.asarray(denominator, dtype=float)
    total = float(denominator.sum())
    if total == 0:
        return math.nan, math.nan
    value = float(numerator.sum()) / total
    error = mean_and_error(numerator - value * denominator)[1] * len(denominator) / total
    return value, error


def squared_error(mean: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Mean squared error of each task `(task,)` from predictive means and outcomes `(task, M)`."""
    return per_task(np.square(np.asarray(mean) - np.asarray(y)))


def rmse(mean: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Root of the mean squared error and its standard error over tasks (delta method).

    Example:
        >>> value, error = rmse(np.array([[1.0, 2.0], [4.0, np.nan]]), np.array([[1.0, 4.0], [4.0, np.nan]]))
        >>> value
        1.0
    """
    return root(squared_error(mean, y))


def root(squared: np.ndarray) -> tuple[float, float]:
    """Root of the mean of `(task,)` and its standard error over tasks (delta method)."""
    mean, error = mean_and_error(squared)
    value = math.sqrt(mean) if mean > 0 else mean
    return value, error / (2 * value) if value > 0 else math.nan


def coverage(lower: np.ndarray, upper: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Share of the rows of each task that lie in their interval: `(task,)` from `(task, M)` each."""
    y = np.asarray(y, dtype=float)
    inside = (y >= lower) & (y <= upper)
    return per_task(np.where(np.isnan(y), np.nan, inside))


def crps(draws: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Continuous ranked probability score of each row, smaller is better, in the units of y.

    The estimator E|X − y| − ½ E|X − X'| from draws, unbiased in the number of draws.

    Args:
        draws: `(draw, task, M)`, at least two draws.
        y: `(task, M)`.

    Returns:
        `(task, M)`, NaN where there is no row.

    References:
        Gneiting, Raftery: Strictly Proper Scoring Rules, Prediction, and Estimation, 2007,
        https://doi.org/10.1198/016214506000001437
    """
    draws = np.sort(np.asarray(draws, dtype=float), axis=0)
    count = len(draws)
    if count < 2:
        raise ValueError(f"crps: expected at least two draws, got {count}")
    rank = np.arange(count).reshape(-1, *[1] * (draws.ndim - 1))
    spread = 2 * ((2 * rank - count + 1) * draws).sum(0) / (count * (count - 1))
    return np.abs(draws - y).mean(0) - 0.5 * spread


def pit(draws: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Probability integral transform of each row: the share of draws below y, ties counted half.

    Args:
        draws: `(draw, task, M)`.
        y: `(task, M)`.

    Returns:
        `(task, M)` in [0, 1], uniform if the predictions are calibrated (and continuous); NaN where there is no row.
    """
    y = np.asarray(y, dtype=float)
    share = ((draws < y).mean(0) + (draws <= y).mean(0)) / 2
    return np.where(np.isnan(y), np.nan, share)


def calibration_curve(values: np.ndarray, levels: Sequence[float] = LEVELS) -> np.ndarray:
    """Share of rows whose PIT is at most each level, rows averaged within tasks and then over tasks.

    Args:
        values: PIT values `(task, M)`.
        levels: Probabilities.

    Returns:
        `(level,)`; the levels themselves if the predictions are calibrated.
    """
    values = np.asarray(values, dtype=float)
    below = [per_task(np.where(np.isnan(values), np.nan, values <= level)) for level in levels]
    return np.array([mean_and_error(shares)[0] for shares in below])


def calibration_error(values: np.ndarray, levels: Sequence[float] = LEVELS) -> float:
    """Root mean squared distance of the calibration curve from the diagonal; PIT values `(task, M)`."""
    return float(np.sqrt(np.square(calibration_curve(values, levels) - np.asarray(levels)).mean()))


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, *, bins: int = 15) -> float:
    """Mean distance between how sure a classifier is and how often it is right, over bins of confidence by their share.

    Args:
        confidence: Probability of the predicted class, any shape.
        correct: Whether that class is the true one, of the same shape.
        bins: Equally wide bins of confidence.

    References:
        Guo, Pleiss, Sun, Weinberger: On Calibration of Modern Neural Networks, 2017, https://arxiv.org/abs/1706.04599
    """
    confidence, correct = np.ravel(confidence).astype(float), np.ravel(correct).astype(float)
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(place, weights=confidence - correct, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))
