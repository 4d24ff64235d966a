"""Particles with a diagonal metric: the prior without rows, steps as the docstring says them, spread, and learning."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conjugate import ROWS, SIGMA, TAU, centre, density, make_tasks
from scenarios import known_prior
from scenarios import make_tasks as make_lines
from torch import Tensor

import bayesmeta as bm
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.gradient import slope
from bayesmeta.inference.laplace import MixtureTasks
from bayesmeta.inference.protocols import Context
from bayesmeta.inference.svgd import kernel_shares

RAGGED = ROWS | {"empty": []}


def attached(model: TaskDensity, tasks: bm.Tasks, **options: int) -> tuple[bm.guides.DiagonalSVGD, Context]:
    guide = bm.guides.DiagonalSVGD(**options)
    guide.attach(model, tasks)
    batch = tasks.batch(slice(None))
    return guide, guide.prepare(batch, model.tensors(batch))


def parts(posterior: MixtureTasks) -> tuple[Tensor, Tensor]:
    """Centres and sds of the parts, `(P, S, T, d)` each."""
    return tuple(torch.stack([getattr(p, name) for p in posterior.parts]).detach() for name in ("loc", "sd"))  # type: ignore[return-value]


def test_a_task_without_rows_keeps_its_prior() -> None:
    guide, context = attached(density(), make_tasks(RAGGED), particles=4)
    loc, sd = parts(guide.condition(torch.tensor([[0.3], [1.0]], dtype=torch.float64), context))
    assert (loc[:, :, -1] == 0).all() and (sd[:, :, -1] == 1).all()
    assert (loc[:, :, :-1] != 0).all() and (sd[:, :, :-1] < 1).all()


def test_a_step_is_that_of_stein_in_the_learned_metric() -> None:
    tasks = make_lines(sizes=(3, 8))
    model = TaskDensity(known_prior, tasks)
    guide, context = attached(model, tasks, particles=3, steps=1)
    w = torch.tensor([0.7, 2.0], dtype=torch.float64)
    with torch.no_grad():
        guide.log_curvature.copy_(w.log())
        guide.log_rate.fill_(np.log(0.05))
        guide.spread.fill_(-1.0)
        loc, sd = parts(guide.condition(torch.zeros(1, 0, dtype=torch.float64), context))
    s = 1 / (1 + np.e)
    z = (1 - s**2) ** 0.5 * guide.start.detach()
    for i, n in enumerate((3, 8)):
        metric = 1 + n * w
        share, h = kernel_shares(z * metric.sqrt())
        both = z[:, None].expand(3, 2, 2)
        g = slope(model, torch.zeros(3, 0, dtype=torch.float64), both, context)[:, i].detach()
        force = share @ g + 2 / h * metric * (z - share @ z)
        torch.testing.assert_close(loc[:, 0, i], z + (0.05 * force / metric).clamp(-2, 2))
        torch.testing.assert_close(sd[0, 0, i], s / metric.sqrt())


def test_particles_spread_over_a_gaussian_posterior() -> None:
    """With the right curvature and many steps their mean is exact, and their spread near that of the posterior."""
    tasks, theta = make_tasks(ROWS), torch.tensor([[0.5]], dtype=torch.float64)
    guide, context = attached(density(), tasks, particles=8, steps=60)
    with torch.no_grad():
        guide.log_curvature.fill_(2 * np.log(TAU / SIGMA))
        loc, _ = parts(guide.condition(theta, context))
    n = np.array([len(y) for y in ROWS.values()])
    sums = np.array([sum(y) for y in ROWS.values()])
    precision = 1 + n * (TAU / SIGMA) ** 2
    answer = (sums - n * 0.5) * TAU / SIGMA**2 / precision
    np.testing.assert_allclose(loc.mean(0)[0, :, 0], answer, atol=1e-3)
    spread = loc.std(0)[0, :, 0].numpy() * precision**0.5
    assert ((spread > 0.6) & (spread < 1.3)).all(), "without the kernel's push it is 0"


def test_equal_theta_have_equal_posteriors_with_and_without_gradients() -> None:
    guide, context = attached(density(), make_tasks(ROWS))
    theta = torch.tensor([[0.3], [0.3], [1.0]], dtype=torch.float64)
    recorded = parts(guide.condition(theta, context))
    with torch.no_grad():
        plain = parts(guide.condition(theta, context))
    for one, two in zip(recorded, plain, strict=True):
        torch.testing.assert_close(one.expand_as(two), two)
        assert torch.equal(two[:, 0], two[:, 1])


def test_gradients_reach_everything_that_is_learned() -> None:
    guide, context = attached(density(), make_tasks(ROWS))
    theta = torch.tensor([[0.3]], dtype=torch.float64, requires_grad=True)
    posterior = guide.condition(theta, context)
    noise = posterior.sample()
    (noise.square().sum() + posterior.log_prob(noise.detach()).sum()).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in guide.parameters())
    assert theta.grad is not None and bool(theta.grad.any())


def test_fitted_and_weighed_it_finds_the_posterior() -> None:
    options = bm.Amortized(guide=bm.guides.DiagonalSVGD(), optimizer=bm.Optimizer(steps=200))
    fit = bm.fit(centre, make_tasks(ROWS), method=options, progress=False)
    post = fit.posterior(make_tasks(ROWS), draws=2000, shared={"mu": 0.5}, refine="auto")
    n = np.array([len(y) for y in ROWS.values()])
    sums = np.array([sum(y) for y in ROWS.values()])
    precision = 1 / TAU**2 + n / SIGMA**2
    off = (post.mean("a") - (0.5 / TAU**2 + sums / SIGMA**2) / precision) * precision**0.5
    assert np.abs(off).max() < 4 / np.sqrt(2000 * post.ess.min())
    assert (post.flag == "").all()


def test_errors() -> None:
    with pytest.raises(ValueError, match="DiagonalSVGD: particles must be a whole number of at least 2, got 1"):
        bm.guides.DiagonalSVGD(particles=1)
    with pytest.raises(ValueError, match="DiagonalSVGD: steps must be a whole number of at least 1, got 0"):
        bm.guides.DiagonalSVGD(steps=0)
