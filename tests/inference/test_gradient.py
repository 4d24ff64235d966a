"""The gradient-step guide: exact where its curvature can be, the prior without rows, and able to learn its start."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import ROWS, SIGMA, TAU, make_tasks
from conjugate import density as centre_density
from scenarios import make_tasks as make_lines

import bayesmeta as bm
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.gaussian import DiagonalTasks
from bayesmeta.inference.gradient import LONGEST_STEP, limited, rows_seen, slope
from bayesmeta.inference.protocols import Context

SD = 0.5


def mean_model(batch: bm.Batch) -> None:
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        with batch.observations():
            pyro.sample("y", dist.Normal(phi, SD), obs=batch.y)


def two_means(batch: bm.Batch) -> None:
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with batch.observations():
            pyro.sample("y", dist.Normal((phi * batch.x).sum(-1), SD), obs=batch.y)


def tasks_of(sizes: list[int]) -> bm.Tasks:
    rng = np.random.default_rng(0)
    return bm.Tasks.from_arrays(None, [rng.normal() + SD * rng.normal(size=n) for n in sizes])


def attached(tasks: bm.Tasks, steps: int) -> tuple[bm.guides.Gradient, TaskDensity, Context]:
    density = TaskDensity(mean_model, tasks)
    guide = bm.guides.Gradient(steps=steps)
    guide.attach(density, tasks)
    batch = tasks.batch(slice(None))
    return guide, density, guide.prepare(batch, density.tensors(batch))


def test_one_step_with_the_right_curvature_is_exact() -> None:
    """The log joint of a normal mean is quadratic with curvature 1 + n/σ²: one Newton step ends at its mode."""
    tasks = tasks_of([1, 3, 8])
    guide, density, context = attached(tasks, 1)
    with torch.no_grad():
        guide.curvature.constant.fill_(1 / SD)
        guide.log_rate.zero_()
    n = torch.as_tensor(tasks.sizes, dtype=torch.float64)
    total = torch.stack([task.y.sum() for task in tasks])
    posterior = guide.condition(torch.zeros(2, 0, dtype=torch.float64), context)
    exact = total / SD**2 / (1 + n / SD**2)
    bent = LONGEST_STEP * torch.tanh(exact / LONGEST_STEP)
    torch.testing.assert_close(posterior.loc[0, :, 0], bent, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(posterior.factor[0, :, 0, 0], (1 + n / SD**2).sqrt(), rtol=1e-6, atol=1e-9)


def test_with_a_diagonal_curvature_one_step_is_exact_where_coordinates_are_independent() -> None:
    """Two numbers a task, each with rows of its own kind: the Hessian is diagonal, and so is the posterior."""
    tasks = bm.Tasks.from_arrays([np.eye(2)[[0, 1] * n] for n in (1, 3)] + [np.zeros((0, 2))], [
        np.tile([2.0, -1.0], n) for n in (1, 3, 0)
    ])  # fmt: skip
    density = TaskDensity(two_means, tasks)
    guide = bm.guides.Gradient(steps=1, curvature="diagonal")
    guide.attach(density, tasks)
    torch.testing.assert_close(guide.log_curvature.exp().detach(), torch.full((2,), 0.5 / SD**2).double() * 2 / 3)
    with torch.no_grad():
        guide.log_curvature.fill_(np.log(0.5 / SD**2))
        guide.log_rate.zero_()
    batch = tasks.batch(slice(None))
    found = guide.condition(torch.zeros(2, 0, dtype=torch.float64), guide.prepare(batch, density.tensors(batch)))
    assert isinstance(found, DiagonalTasks)
    n = torch.tensor([1.0, 3.0, 0.0], dtype=torch.float64)[:, None]
    precision = (1 + n / SD**2).expand(3, 2)
    exact = n * torch.tensor([2.0, -1.0]) / SD**2 / precision
    torch.testing.assert_close(found.loc[1], LONGEST_STEP * torch.tanh(exact / LONGEST_STEP))
    torch.testing.assert_close(found.sd[1], precision.rsqrt())


def test_more_steps_come_closer_to_the_mode() -> None:
    tasks = tasks_of([2, 5])
    errors = []
    for steps in (1, 3, 9):
        guide, density, context = attached(tasks, steps)
        with torch.no_grad():
            guide.curvature.constant.fill_(1 / SD)
            found = guide.condition(torch.zeros(1, 0, dtype=torch.float64), context).loc[0, :, 0]
        exact = torch.stack([task.y.sum() / (SD**2 + len(task.y)) for task in tasks])
        errors.append(float((found - exact).abs().max()))
    assert errors[0] > 2 * errors[1] > 8 * errors[2]


def test_a_task_without_rows_keeps_its_prior() -> None:
    tasks = tasks_of([3, 0])
    guide, _, context = attached(tasks, 2)
    with torch.no_grad():
        guide.start.fill_(0.7)
    posterior = guide.condition(torch.zeros(1, 0, dtype=torch.float64), context)
    assert float(posterior.loc[0, 1, 0].detach()) == 0.0 and float(posterior.factor[0, 1, 0, 0].detach()) == 1.0
    assert float(posterior.loc[0, 0, 0].detach()) != 0.0


def test_fitted_it_finds_the_posterior() -> None:
    tasks = tasks_of([5] * 40)
    options = bm.Amortized(guide=bm.guides.Gradient(steps=1), optimizer=bm.Optimizer(steps=800, lr=0.05))
    fit = bm.fit(mean_model, tasks, method=options, progress=False)
    posterior = fit.posterior(tasks, refine="none", draws=4000)
    exact_sd = (1 + 5 / SD**2) ** -0.5
    exact = np.array([float(task.y.sum()) for task in tasks]) / SD**2 * exact_sd**2
    assert np.abs((posterior.mean("phi") - exact) / exact_sd).max() < 0.1
    assert np.abs(posterior.sd("phi") / exact_sd - 1).max() < 0.1


def test_slopes_are_the_same_with_and_without_gradients_and_lead_back_to_theta() -> None:
    tasks = make_tasks(ROWS)
    batch = tasks.batch(slice(None))
    context = Context(batch, centre_density().tensors(batch))
    theta = torch.tensor([[0.2], [1.5]], dtype=torch.float64, requires_grad=True)
    noise = torch.randn(2, len(tasks), 1, dtype=torch.float64)
    found = slope(centre_density(), theta, noise, context)
    mean = theta + TAU * noise[..., 0]
    sums, count = (batch.y * batch.mask).sum(1), batch.n
    torch.testing.assert_close(found[..., 0], TAU * (sums - count * mean) / SIGMA**2 - noise[..., 0])
    found.sum().backward()
    torch.testing.assert_close(theta.grad, torch.full_like(theta, -TAU / SIGMA**2 * float(count.sum())))
    with torch.no_grad():
        torch.testing.assert_close(slope(centre_density(), theta, noise, context), found.detach())


def test_moves_are_bent_at_their_limit() -> None:
    moves = torch.tensor([-1e3, -0.01, 0.0, 0.01, 1e3])
    assert (limited(moves, 2.0).abs() <= 2.0).all()
    torch.testing.assert_close(limited(moves[1:4], 2.0), moves[1:4], rtol=1e-4, atol=0)


def test_rows_without_a_label_are_not_seen() -> None:
    one = make_lines("missing", sizes=(3, 1, 0, 4))
    assert rows_seen(one.batch(slice(None))).tolist() == [2, 1, 0, 3]
    two = make_lines("outputs", sizes=(3, 1, 0, 4))
    assert rows_seen(two.batch(slice(None))).tolist() == [3, 1, 0, 4], "one of two outputs is enough"


@pytest.mark.parametrize("steps", [0, 1.5, True])
def test_steps_must_be_a_positive_whole_number(steps: object) -> None:
    with pytest.raises(ValueError, match="Gradient: steps must be a whole number of at least 1"):
        bm.guides.Gradient(steps=steps)  # type: ignore[arg-type]


def test_curvature_must_be_full_or_diagonal() -> None:
    with pytest.raises(ValueError, match='Gradient: curvature must be "full" or "diagonal", got \'low\''):
        bm.guides.Gradient(curvature="low")  # type: ignore[arg-type]
