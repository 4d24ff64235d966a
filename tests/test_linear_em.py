"""EM of the linear hierarchy: it climbs to a maximum of the evidence, and its posteriors are exact."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from benchmarks.grouped_linear import STRENGTHS, Task, ridge
from benchmarks.linear_em import LinearHierarchy

RNG = np.random.default_rng(0)
X = [np.column_stack([np.ones(n), RNG.normal(size=n)]) for n in (3, 8, 1, 12) * 5]
W = [np.array([1.0, -0.5]) + RNG.normal(size=2) * (0.7, 0.3) for _ in X]
Y = [x @ w + 0.4 * RNG.normal(size=len(x)) for x, w in zip(X, W, strict=True)]


def test_it_ends_where_a_direct_search_of_the_evidence_ends() -> None:
    def loss(at: np.ndarray) -> float:
        prior = LinearHierarchy(at[:2], np.diag(np.exp(at[2:4])), float(np.exp(at[4])), 0.0)
        return -sum(prior.log_evidence(x, y) for x, y in zip(X, Y, strict=True))

    found = LinearHierarchy.learn(X, Y)
    best = minimize(loss, np.zeros(5), method="BFGS")
    assert found.log_likelihood == pytest.approx(-best.fun, abs=1e-3)
    np.testing.assert_allclose(found.mean, best.x[:2], atol=0.01)
    assert found.noise == pytest.approx(np.exp(best.x[4]), rel=0.02)
    assert LinearHierarchy.learn(X, Y, full=True).log_likelihood >= found.log_likelihood - 1e-3


def test_no_step_lowers_the_evidence() -> None:
    at = LinearHierarchy._started(X, Y)
    values = []
    for _ in range(30):
        at = at._improved(X, Y, False)
        values.append(at.log_likelihood)
    assert (np.diff(values) > -1e-9).all()


def test_posteriors_are_those_of_the_joint_normal() -> None:
    prior = LinearHierarchy(np.array([1.0, 2.0]), np.array([[1.0, 0.3], [0.3, 0.5]]), 0.25, 0.0)
    x, y = X[0], Y[0]
    joint = x @ prior.covariance @ x.T + 0.25 * np.eye(3)
    gain = prior.covariance @ x.T @ np.linalg.inv(joint)
    mean, covariance = prior.posterior(x, y)
    np.testing.assert_allclose(mean, prior.mean + gain @ (y - x @ prior.mean))
    np.testing.assert_allclose(covariance, prior.covariance - gain @ x @ prior.covariance, atol=1e-12)
    empty, _ = prior.predict(np.zeros((0, 2)), np.zeros(0), x)
    np.testing.assert_allclose(empty, x @ prior.mean)


def test_tasks_without_rows_at_all_and_uneven_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="task 1: expected as many labels as rows"):
        LinearHierarchy.learn([np.ones((2, 1)), np.ones((3, 1))], [np.ones(2), np.ones(2)])
    with pytest.raises(ValueError, match="expected tasks with rows"):
        LinearHierarchy.learn([np.ones((0, 1))], [np.ones(0)])


def test_ridge_leaves_one_row_out_as_if_it_were_fitted_anew() -> None:
    rows = RNG.normal(size=(12, 3))
    task = Task(np.column_stack([rows, np.ones(12)]), rows @ [1.0, 0.0, -1.0] + 0.5 * RNG.normal(size=12))
    slope, variance = ridge(task)
    squared = []
    strength = min(STRENGTHS, key=lambda s: np.abs(_ridge(task, s) - slope).max())
    for row in range(12):
        others = np.arange(12) != row
        squared.append((task.y[row] - task.x[row] @ _ridge(task.rows(others), strength)) ** 2)
    assert variance == pytest.approx(np.mean(squared), rel=0.05)


def _ridge(task: Task, strength: float) -> np.ndarray:
    penalty = strength * np.eye(task.x.shape[1])
    penalty[-1, -1] = 0.0
    found: np.ndarray = np.linalg.solve(task.x.T @ task.x + penalty, task.x.T @ task.y)
    return found
