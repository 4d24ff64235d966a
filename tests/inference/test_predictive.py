"""The objective "predictive": the split by masks, its value against a closed form, and what a fit with it learns."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import bayesmeta as bm
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.guides import NaturalGuide
from bayesmeta.inference.objectives import Guides, Step
from bayesmeta.inference.predictive import Predictive, split_batch
from bayesmeta.inference.shared import NormalShared

SIZES = (6, 3, 1, 0)


def known_prior(batch: bm.Batch) -> None:
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        with batch.observations():
            pyro.sample("y", dist.Normal(phi, 0.5), obs=batch.y)


def learned_prior(batch: bm.Batch) -> None:
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfNormal(3.0))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(mu, tau))
        with batch.observations():
            pyro.sample("y", dist.Normal(phi, 0.5), obs=batch.y)


def table(sizes: tuple[int, ...], mean: float = 0.0, seed: int = 0) -> bm.Tasks:
    rng = np.random.default_rng(seed)
    return bm.Tasks.from_arrays(None, [rng.normal(mean, 1.0) + 0.5 * rng.normal(size=n) for n in sizes])


def test_every_row_is_in_context_or_target_and_every_task_keeps_a_target() -> None:
    batch = table(SIZES).batch(slice(None))
    sizes = set()
    for _ in range(50):
        episode = split_batch(batch, (1, 4))
        assert torch.equal(episode.context.mask ^ episode.target.mask, batch.mask)
        assert not (episode.context.mask & episode.target.mask).any()
        assert torch.equal(episode.context.observed, episode.context.mask)
        assert torch.equal(episode.context.n, episode.context.mask.sum(1))
        sizes.add(tuple(episode.context.n.tolist()))
    assert {size[0] for size in sizes} == {1, 2, 3, 4}
    assert {size[1] for size in sizes} == {1, 2} and {size[2:] for size in sizes} == {(0, 0)}


def test_the_loss_of_an_empty_context_is_the_log_evidence() -> None:
    """Without context q is the prior: the mean over draws estimates p(y), known in closed form."""
    tasks = table((2, 3, 2))
    density, guide = TaskDensity(known_prior, tasks), NaturalGuide()
    guide.attach(density, tasks)
    guides = Guides(NormalShared(*density.prior_scale()), guide)
    batch = tasks.batch(slice(None))
    step = Step(guide.prepare(batch, density.tensors(batch)), len(tasks), draws=40_000)
    loss, info = Predictive((0, 0))(density, guides, step)
    weights = info["log_p"].detach().exp()
    evidence = [
        float(dist.MultivariateNormal(torch.zeros(n).double(), 1.0 + 0.25 * torch.eye(n).double()).log_prob(task.y))
        for task, n in zip(tasks, tasks.sizes.tolist(), strict=True)
    ]
    error = float((weights.std(0) / weights.mean(0)).max()) / math.sqrt(40_000)
    assert abs(float(loss.detach()) + np.mean(evidence)) < 4 * error


def test_a_fit_predicts_new_tasks_as_well_as_the_exact_predictive() -> None:
    tasks, new = table((6,) * 150, mean=2.0), table((6,) * 100, mean=2.0, seed=1)
    options = bm.Amortized(objective="predictive", context=(0, 5), optimizer=bm.Optimizer(steps=500))
    fit = bm.fit(learned_prior, tasks, method=options, progress=False)
    assert abs(fit.shared.mean("mu") - 2.0) < 0.5 and 0.6 < fit.shared.mean("tau") < 1.5
    context, target = new.context_target(context=2, seed=0)
    score = fit.posterior(context, refine="none", draws=2000).predict(target).log_prob(joint=True)
    exact = []
    for old, held_out in zip(context, target, strict=True):
        precision = 1 + 2 / 0.25
        loc = (2.0 + float(old.y.sum()) / 0.25) / precision
        covariance = 1 / precision + 0.25 * torch.eye(4).double()
        exact.append(float(dist.MultivariateNormal(torch.full((4,), loc).double(), covariance).log_prob(held_out.y)))
    assert np.mean(exact) - 0.1 < score.mean() < np.mean(exact) + 0.1


def coupled(batch: bm.Batch) -> None:
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        rows = batch.y.shape[1]
        loc = phi.unsqueeze(-1).expand(-1, -1, rows)
        pyro.sample("y", dist.MultivariateNormal(loc, torch.eye(rows)), obs=batch.y.unsqueeze(-2))


def test_errors() -> None:
    with pytest.raises(ValueError, match="context= belongs to objective='predictive' or 'predictive-elbo'"):
        bm.Amortized(context=(0, 5))
    with pytest.raises(ValueError, match=r"expected sizes \(lo, hi\) with 0 <= lo <= hi, got \(3, 1\)"):
        Predictive((3, 1))
    with pytest.raises(ValueError, match="predictive objectives need rows that are independent given φ"):
        bm.fit(coupled, table((3, 3, 4)), method=bm.Amortized(objective="predictive"), progress=False)
