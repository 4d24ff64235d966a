"""The joint density of θ and all tasks: the model's, its gradient, its starts and conditional modes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conjugate import TAU, centre, conditional, drawn_rows, make_tasks

from bayesmeta.hierarchy import derivatives
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference import collected
from bayesmeta.inference.joint import JITTER, Joint


@pytest.mark.parametrize("most", [2**20, 60])
def test_the_joint_is_the_models_and_its_gradient(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derivatives, "compile_graph", lambda graph, leaves: graph)
    monkeypatch.setattr(collected, "BLOCK_ELEMENTS", most)
    tasks = make_tasks(drawn_rows(12, seed=0, sizes=(1, 7, 12)))
    density = TaskDensity(centre, tasks)
    joint = Joint(density, tasks)
    position = np.random.default_rng(0).normal(size=13)
    value, gradient = joint(position)
    unit = joint.view(position[None, None])[0, 0]
    theta, noise = torch.as_tensor(unit[:1]), torch.as_tensor(unit[1:]).reshape(12, 1)
    data = density.tensors(tasks.batch(slice(None)))
    truth = density.log_task(theta, noise, data, {}).sum() + density.log_prior(theta)
    assert value == pytest.approx(float(truth), rel=1e-12)
    for k in (0, 1, 7, 12):
        step = 1e-5 * np.eye(13)[k]
        assert gradient[k] == pytest.approx((joint(position + step)[0] - joint(position - step)[0]) / 2e-5, rel=1e-6)


def test_chains_start_uphill_of_the_priors_centre_each_somewhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derivatives, "compile_graph", lambda graph, leaves: graph)
    tasks = make_tasks(drawn_rows(12, seed=0, sizes=(1, 7, 12)))
    joint = Joint(TaskDensity(centre, tasks), tasks)
    torch.manual_seed(0)
    starts = [joint.start() for _ in range(2)]
    for start in starts:
        assert joint(start)[0] > joint(np.zeros(13))[0] + 50
    assert np.abs(starts[0] - starts[1]).max() > JITTER


@pytest.mark.parametrize("most", [2**20, 60])
def test_modes_given_theta_are_the_tasks_own_in_the_order_of_positions(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(derivatives, "compile_graph", lambda graph, leaves: graph)
    monkeypatch.setattr(collected, "BLOCK_ELEMENTS", most)
    rows = drawn_rows(12, seed=0, sizes=(1, 7, 12))
    tasks = make_tasks(rows)
    joint = Joint(TaskDensity(centre, tasks), tasks)
    loc, factor = joint.conditional_modes(np.array([0.3]))
    found = np.concatenate([np.array([0.3]), loc[:, 0]])
    mu, *noise = joint.view(found[None, None])[0, 0]
    mean, sd = conditional(rows, mu)
    np.testing.assert_allclose(mu + TAU * np.array(noise), mean, rtol=1e-7)
    np.testing.assert_allclose(TAU / factor[joint._collected.order.numpy(), 0, 0], sd, rtol=1e-7)
