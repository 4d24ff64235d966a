"""Evidence at draws of θ, and θ without a task, in the conjugate model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conjugate import ROWS, evidence, exact, fitted, make_tasks

from bayesmeta.checks.evidence import known_tasks, left_out, look_inside


@pytest.fixture(scope="module")
def fit() -> Any:
    return fitted(ROWS)


def test_the_evidence_is_exact_at_every_theta(fit: Any) -> None:
    inside = look_inside(fit, 200)
    found = inside.log_evidence(make_tasks(ROWS), per_theta=64)
    np.testing.assert_allclose(found, evidence(ROWS, inside.theta[:, 0].numpy()), atol=0.6)
    assert abs((found - evidence(ROWS, inside.theta[:, 0].numpy())).mean()) < 0.02


def test_theta_without_a_task_is_its_posterior_given_the_others(fit: Any) -> None:
    inside = look_inside(fit, 8000)
    log_weight, khat = left_out(evidence(ROWS, inside.theta[:, 0].numpy()))
    mu = inside.theta[:, 0].numpy()
    for i, name in enumerate(ROWS):
        mean, covariance = exact({k: v for k, v in ROWS.items() if k != name})
        weight = np.exp(log_weight[:, i])
        assert weight.sum() == pytest.approx(1.0)
        effective = 1 / (weight**2).sum()
        assert abs(weight @ mu - mean[-1]) < 4 * np.sqrt(covariance[-1, -1] / effective)
    assert (khat < 0.7).all()


def test_known_tasks_are_told_from_new_ones(fit: Any) -> None:
    _, known = known_tasks(fit, make_tasks({"b": ROWS["b"], "new": [1.0], "a": ROWS["a"]}))
    assert known.tolist() == [True, False, True]
    with pytest.raises(ValueError, match="expected a Fit"):
        look_inside(None, 10)  # type: ignore[arg-type]
