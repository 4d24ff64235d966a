from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from bayesmeta.data.families import DriftingSinusoids


def test_labels_are_the_curve_and_noise() -> None:
    tasks, truth = DriftingSinusoids().simulate(300, rows=10)
    drift, amplitude, shift, level = (truth[name].repeat(10) for name in ("drift", "amplitude", "shift", "level"))
    x = tasks.x[:, 0].numpy()
    z = (tasks.y.numpy() - (drift * x + amplitude * np.sin(1.5 * (x - shift)) + level)) / 0.1
    assert abs((z**2).mean() - 1) < 4 * math.sqrt(2 / len(z))
    for name, mean, sd in (("drift", 0.5, 0.2), ("shift", 0.0, 0.1), ("level", 5.0, 0.1)):
        scaled = (truth[name] - mean) / sd
        assert abs(scaled.mean()) < 4 / math.sqrt(300) and abs((scaled**2).mean() - 1) < 4 * math.sqrt(2 / 300)
    assert 0.7 <= truth["amplitude"].min() and truth["amplitude"].max() <= 1.3


@pytest.mark.parametrize("rows", [1, 5, 20])
def test_the_evidence_against_brute_force(rows: int) -> None:
    family = DriftingSinusoids()
    tasks, _ = family.simulate(2, rows=rows, seed=1)
    b, a = np.linspace(-0.55, 0.55, 221), 0.7 + 0.6 * (np.arange(160) + 0.5) / 160
    prior = np.exp(-0.5 * (b / 0.1) ** 2)
    for task, got in zip(tasks, family.log_evidence(tasks.batch(slice(None))), strict=True):
        x = task.x[:, 0].numpy()
        covariance = 0.04 * np.outer(x, x) + 0.01 + 0.01 * np.eye(rows)
        means = 0.5 * x + 5 + a[:, None, None] * np.sin(1.5 * (x - b[:, None]))
        logs = multivariate_normal.logpdf(task.y.numpy() - means, cov=covariance).reshape(160, 221)
        expected = np.log((np.exp(logs - logs.max()) * prior / prior.sum()).sum() / 160) + logs.max()
        assert float(got) == pytest.approx(expected, abs=2e-3)


def test_the_error_of_the_oracle_that_is_known() -> None:
    """RMSE .1543 ± .0033 with 5 examples, over 200 tasks of other seeds."""
    family = DriftingSinusoids()
    context, target = (tasks.batch(slice(None)) for tasks in family.episodes(300))
    rmse = (family.oracle(context, target.x).mean - target.y).square().mean(1).sqrt()
    assert abs(float(rmse.mean()) - 0.1543) < 4 * math.hypot(0.0033, float(rmse.std()) / math.sqrt(300))


def test_constants_are_checked() -> None:
    with pytest.raises(ValueError, match="DriftingSinusoids: expected the sd of the shift as a positive number"):
        DriftingSinusoids(shift=(0.0, 0.0))
