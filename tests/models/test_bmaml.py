"""BMAML: as many places as particles, and the log density of the target as the objective."""

from __future__ import annotations

import torch
from lines import lines

import bayesmeta as bm
from bayesmeta.models import bmaml


def test_it_is_the_target_scored_through_stein_particles() -> None:
    method = bmaml.method(particles=4, steps=3, context=(1, 4))
    assert (method.shared, method.objective, method.context) == ("map", "predictive", (1, 4))
    assert isinstance(method.guide, bm.guides.DiagonalSVGD)


def test_draws_lie_around_the_particles() -> None:
    tasks = lines(6, 0)
    method = bmaml.method(particles=3, steps=2, optimizer=bm.Optimizer(steps=2))
    fit = bm.fit(bmaml.build(tasks, hidden=(3,)), tasks, method=method, progress=False)
    guide = fit._guides.task
    with torch.no_grad():
        guide.spread.fill_(-8.0)
    draws = torch.as_tensor(fit.posterior(lines(1, 1), draws=400, refine="none").draws("phi")[:, 0])
    found = draws[:1]
    for draw in draws:
        if (draw - found).norm(dim=-1).min() > 0.05:
            found = torch.cat([found, draw[None]])
    assert len(found) == 3
