"""The encoder for all data sets of a model: near the exact posterior at each task's own θ."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conjugate import ROWS, SIGMA, TAU, ExactGuide, Normals, density, make_tasks
from torch import Tensor, nn

from bayesmeta.checks.encoders import paired_elbo, train_encoder
from bayesmeta.checks.simulations import shells, simulate_each
from bayesmeta.inference.amortized import Amortized
from bayesmeta.inference.objectives import Guides, Step
from bayesmeta.inference.protocols import Context
from bayesmeta.inference.shared import PriorShared
from bayesmeta.inference.training import Optimizer


def test_it_learns_the_exact_posterior_at_the_theta_of_each_task() -> None:
    like = make_tasks({"a": [0.0] * 2, "b": [0.0] * 6})
    data = simulate_each(density(), shells(like, 600, name="s"), density().draw_theta(600))
    guides = train_encoder(density(), data, Amortized(optimizer=Optimizer(steps=400)))
    new = simulate_each(density(), shells(like, 40, name="n"), density().draw_theta(40))
    batch = new.tasks.batch(np.arange(40))
    with torch.no_grad():
        posterior = guides.task.condition(new.theta, guides.task.prepare(batch, density().tensors(batch)))
        draws = torch.stack([posterior.sample()[range(40), range(40), 0] for _ in range(400)])
    precision = 1 + batch.n * (TAU / SIGMA) ** 2
    mean = ((batch.y * batch.mask).sum(-1) - batch.n * new.theta[:, 0]) * TAU / SIGMA**2 / precision
    error = (draws.mean(0) - mean) * precision.sqrt()
    assert float(error.square().mean().sqrt()) < 0.25
    assert float((draws.std(0) * precision.sqrt() - 1).abs().max()) < 0.25


class Moved(ExactGuide):
    """The exact posterior moved by a number that can be trained."""

    def __init__(self, move: float) -> None:
        super().__init__()
        self.move = nn.Parameter(torch.tensor(move, dtype=torch.float64))

    def condition(self, theta: Tensor, context: Context) -> Normals:
        found = super().condition(theta, context)._light
        return Normals(found.loc + self.move, found.scale)


def test_the_bound_is_the_evidence_and_its_gradient_zero_at_the_exact_posterior() -> None:
    tasks = make_tasks(ROWS)
    theta = density().draw_theta(len(tasks))
    batch = tasks.batch(np.arange(len(tasks)))
    found = []
    for guide in (Moved(0.0), Moved(0.5)):
        step = Step(guide.prepare(batch, density().tensors(batch)), len(tasks))
        named = dict(zip(tasks.names, theta, strict=True))
        loss, _ = paired_elbo(named, density(), Guides(PriorShared(density()), guide), step)
        found.append((loss.item(), torch.autograd.grad(loss, guide.move)[0].item()))
    evidence = [_evidence(y, float(t)) for y, t in zip(ROWS.values(), theta, strict=True)]
    assert found[0] == (pytest.approx(-np.mean(evidence), abs=1e-5), pytest.approx(0.0, abs=1e-5))
    assert found[1][0] > found[0][0] + 0.1
    assert found[1][1] > 0.1


def _evidence(y: list[float], mu: float) -> float:
    covariance = SIGMA**2 * np.eye(len(y)) + TAU**2
    off = np.asarray(y) - mu
    return float(-0.5 * (off @ np.linalg.solve(covariance, off) + np.linalg.slogdet(2 * np.pi * covariance)[1]))
