"""Simulated tasks: each from its own θ, in any size, and nothing that cannot be simulated."""

from __future__ import annotations

import numpy as np
import pytest
import scenarios
import torch
from conjugate import ROWS, SIGMA, TAU, WIDE, density, make_tasks
from scipy.stats import kstest

from bayesmeta.checks.simulations import LOG_LIKELIHOOD, shells, simulate_each, unweighted, values_of
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity


def test_every_task_has_its_own_theta_and_phi() -> None:
    like = make_tasks({"a": [0.0], "b": [0.0] * 7})
    found = simulate_each(density(), shells(like, 2000, name="s"), density().draw_theta(2000))
    true = found.values(density())
    labels = np.split(found.tasks.y.numpy(), found.tasks.offsets.numpy()[1:-1])
    assert [len(y) for y in labels[:4]] == [1, 7, 1, 7]
    assert kstest(true["mu"] / WIDE, "norm").pvalue > 1e-3
    assert kstest((true["a"] - true["mu"]) / TAU, "norm").pvalue > 1e-3
    residuals = [(y - a) / SIGMA for y, a in zip(labels, true["a"], strict=True)]
    assert kstest(np.concatenate(residuals), "norm").pvalue > 1e-3
    means = np.array([r.mean() for r in residuals[1::2]]) * np.sqrt(7)
    assert kstest(means, "norm").pvalue > 1e-3  # rows of one task are independent
    expected = [-0.5 * (r**2 + np.log(2 * np.pi * SIGMA**2)).sum() for r in residuals]
    np.testing.assert_allclose(true[LOG_LIKELIHOOD], expected, rtol=1e-6)


def test_values_are_those_of_the_model_in_its_own_coordinates() -> None:
    tasks = scenarios.make_tasks("real", (3, 1, 4))
    model = TaskDensity(scenarios.non_centred, tasks)
    found = simulate_each(model, tasks, model.draw_theta(3))
    true = found.values(model)
    np.testing.assert_allclose(true["phi"], true["mu"] + true["tau"] * true["raw"])
    twice = values_of(model, tasks, found.theta.expand(2, -1, -1), found.noise.expand(2, -1, -1))
    np.testing.assert_array_equal(twice["phi"], np.stack([true["phi"]] * 2))


def test_what_cannot_be_simulated_is_refused() -> None:
    with pytest.raises(ValueError, match="shared site 'mu' has a flat"):
        TaskDensity(scenarios.flat, scenarios.make_tasks()).draw_theta(10)
    with pytest.raises(ValueError, match="without weights"):
        shells(scenarios.make_tasks(weighted=True), 3, name="s")
    gaps = Tasks.from_arrays(None, [[1.0], [2.0, np.nan]], names=["whole", "holed"], missing="mask")
    with pytest.raises(ValueError, match="task 'holed' has missing ones"):
        unweighted(gaps)
    assert len(shells(gaps, 3, name="s")) == 3


def test_a_model_without_shared_sites_has_an_empty_theta() -> None:
    tasks = scenarios.make_tasks()
    theta = TaskDensity(scenarios.known_prior, tasks).draw_theta(5)
    assert theta.shape == (5, 0)
    assert torch.equal(density().draw_theta(4), density().draw_theta(4)) is False
    assert len(ROWS) == 5
