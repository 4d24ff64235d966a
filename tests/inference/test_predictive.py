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
from bayesmeta.inference.gaussian import DiagonalTasks
from bayesmeta.inference.guides import NaturalGuide
from bayesmeta.inference.objectives import Guides, Step
from bayesmeta.inference.predictive import Predictive, PredictiveBound, split_batch
from bayesmeta.inference.protocols import Context, TaskGuide
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


class KnownPrior(TaskGuide):
    """The exact posterior of `known_prior`, its spread given all rows of a task multiplied by e^`off` a row."""

    def __init__(self, off: float = 0.0) -> None:
        super().__init__()
        self.off = off

    def condition(self, theta: torch.Tensor, context: Context) -> DiagonalTasks:
        """N(Σ y / .25 Λ⁻¹, Λ⁻¹), Λ = 1 + n / .25."""
        batch = context.batch
        precision = (1 + batch.n.double() / 0.25).unsqueeze(-1)
        loc = torch.where(batch.mask, batch.y.double(), 0.0).sum(1, keepdim=True) / 0.25 / precision
        sd = precision.rsqrt() * torch.exp(self.off * batch.n.double()).unsqueeze(-1)
        return DiagonalTasks(loc.expand(len(theta), -1, -1), sd.expand(len(theta), -1, -1))


def evidence(batch: bm.Batch) -> torch.Tensor:
    """Log p(y) of each task under `known_prior`, `(T,)`."""
    found = []
    for y, mask in zip(batch.y.double(), batch.mask, strict=True):
        n = int(mask.sum())
        normal = dist.MultivariateNormal(torch.zeros(n).double(), 1.0 + 0.25 * torch.eye(n).double())
        found.append(normal.log_prob(y[mask]))
    return torch.stack(found)


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


def test_with_exact_posteriors_the_bound_is_the_log_density_of_the_target() -> None:
    """Draw by draw: log p(target | φ) + log p(φ | context) − log p(φ | all rows) does not depend on φ."""
    tasks = table((6, 3, 4))
    density, guide = TaskDensity(known_prior, tasks), KnownPrior()
    guides, batch = Guides(NormalShared(*density.prior_scale()), guide), tasks.batch(slice(None))
    step = Step(guide.prepare(batch, density.tensors(batch)), len(tasks), draws=3)
    torch.manual_seed(5)
    episode = split_batch(batch, (1, 2))
    torch.manual_seed(5)
    loss, info = PredictiveBound((1, 2))(density, guides, step)
    whole, given = (evidence(one) for one in (batch, episode.context))
    assert -float(loss.detach()) == pytest.approx(float((whole - given).mean()), abs=1e-9)
    assert info["log_p"].shape == (3, 3)


def test_a_guide_that_is_off_lowers_the_bound() -> None:
    tasks = table((6, 3, 4))
    density = TaskDensity(known_prior, tasks)
    batch, lost = tasks.batch(slice(None)), []
    for guide in (KnownPrior(), KnownPrior(0.3)):
        step = Step(guide.prepare(batch, density.tensors(batch)), len(tasks), draws=2000)
        torch.manual_seed(5)
        loss, _ = PredictiveBound((1, 2))(density, Guides(NormalShared(*density.prior_scale()), guide), step)
        lost.append(float(loss.detach()))
    assert lost[1] > lost[0] + 0.02


def test_errors() -> None:
    with pytest.raises(ValueError, match="context= belongs to objective='predictive' or 'predictive-elbo'"):
        bm.Amortized(context=(0, 5))
    with pytest.raises(ValueError, match=r"expected sizes \(lo, hi\) with 0 <= lo <= hi, got \(3, 1\)"):
        Predictive((3, 1))
    with pytest.raises(ValueError, match=r"expected sizes \(lo, hi\) with 0 <= lo <= hi, got \(3, 1\)"):
        PredictiveBound((3, 1))
    with pytest.raises(ValueError, match="predictive objectives need rows that are independent given φ"):
        bm.fit(coupled, table((3, 3, 4)), method=bm.Amortized(objective="predictive"), progress=False)
