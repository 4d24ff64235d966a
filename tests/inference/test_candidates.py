"""Weighted draws against the exact evidence and posterior of conjugate tasks, whatever proposes them."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import ROWS, SIGMA, TAU, ExactGuide, conditional, evidence, exact_guides, make_tasks, setting
from scipy.stats import kstest, norm

from bayesmeta.data.batch import Batch
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.candidates import SHARES, candidates, guide_draws, log_evidence, prior_noise
from bayesmeta.inference.psis import relative_ess

MU = 0.7
UNEQUAL = ROWS | {"long": list(np.linspace(-1, 2, 19)), "short": [3.0], "longer": list(np.linspace(0, 1, 40))}


def at(mu: float, draws: int) -> torch.Tensor:
    return torch.full((draws, 1), mu, dtype=torch.float64)


def test_an_exact_guide_has_nearly_constant_weights() -> None:
    """The mixture is at least .7 of the posterior, so that no weight exceeds the evidence by more than 1/.7."""
    density, guides, tasks = setting(ROWS)
    drawn = candidates(density, guides, tasks, at(MU, 3000))
    excess = drawn.log_weight.numpy() - evidence(ROWS, MU)
    assert excess.max() <= math.log(1 / SHARES["guide"]) + 1e-9
    assert (relative_ess(drawn.log_weight.numpy().T) > 0.9).all()


@pytest.mark.parametrize(("shift", "width"), [(0.0, 1.0), (1.5, 0.6), (-2.0, 2.0)])
def test_weights_average_to_the_evidence_and_weigh_the_posterior(shift: float, width: float) -> None:
    density, guides, tasks = setting(ROWS)
    guides.task = ExactGuide(shift, width)
    draws = 20_000
    drawn = candidates(density, guides, tasks, at(MU, draws))
    relative = np.exp(drawn.log_weight.numpy() - evidence(ROWS, MU))
    error = relative.std(0) / math.sqrt(draws)
    assert (np.abs(relative.mean(0) - 1) < 4 * error).all()
    mean, sd = conditional(ROWS, MU)
    off = (MU + TAU * drawn.noise[..., 0].numpy() - mean) / sd
    for power, truth in ((1, 0.0), (2, 1.0)):
        terms = relative * (off**power - truth)
        assert (np.abs(terms.mean(0)) < 4 * terms.std(0) / math.sqrt(draws)).all()


def test_a_density_that_is_no_number_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The evidence of a θ is that of its other candidates: here the integral up to φ = mu + τ."""
    density, guides, tasks = setting(ROWS)
    whole = density.log_parts

    def half(theta: torch.Tensor, noise: torch.Tensor, *others: Any, **options: Any) -> Any:
        prior, likelihood = whole.mapped(theta, noise, *others, **options)
        return prior, torch.where(noise[..., 0] > 1, torch.nan, likelihood)

    monkeypatch.setattr(density, "log_parts", SimpleNamespace(mapped=half))
    per_theta, repeats = 500, 20
    found = log_evidence(density, guides, tasks, at(MU, repeats), per_theta=per_theta).numpy()
    mean, sd = conditional(ROWS, MU)
    truth = evidence(ROWS, MU) + norm.logcdf((MU + TAU - mean) / sd)
    assert (np.abs(found.mean(0) - truth) < 4 * found.std(0) / math.sqrt(repeats) + 1 / per_theta).all()


def test_every_part_of_the_mixture_is_drawn() -> None:
    """A guide far off and narrow: what lies near the prior was drawn from it, 10 %; t(5) draws reach beyond 6 sds."""
    density, guides, tasks = setting({"a": [0.0], "b": [0.0]})
    guides.task = ExactGuide(shift=500.0)
    drawn = candidates(density, guides, tasks, at(0.0, 5000)).noise[..., 0].numpy()
    sd = 1 / math.sqrt(1 + (TAU / SIGMA) ** 2)
    share = (np.abs(drawn) < 6).mean()
    assert abs(share - SHARES["prior"]) < 4 * math.sqrt(0.09 / drawn.size)
    beyond = (np.abs(drawn / sd - 500)[np.abs(drawn) > 6] > 6).mean()
    truth = SHARES["heavy"] / (SHARES["heavy"] + SHARES["guide"]) * 2 * 9.23e-4
    assert 0 < beyond < 5 * truth


def test_tasks_of_unequal_sizes_keep_their_places() -> None:
    density, guides, tasks = setting(UNEQUAL)
    theta = torch.linspace(-1.0, 2.0, 7, dtype=torch.float64).unsqueeze(-1)
    found = log_evidence(density, guides, tasks, theta, per_theta=300).numpy()
    truth = evidence(UNEQUAL, theta[:, 0].numpy())
    assert found.shape == (7, len(UNEQUAL))
    assert np.abs(found - truth).max() < 4 * 0.45 / math.sqrt(300)


def test_draws_of_the_guide_and_of_the_prior() -> None:
    density, guides, tasks = setting(ROWS)
    draws = 4000
    mean, sd = conditional(ROWS, MU)
    guide = (MU + TAU * guide_draws(density, guides, tasks, at(MU, draws))[..., 0].numpy() - mean) / sd
    prior = prior_noise(density, guides, tasks, at(MU, draws))[..., 0].numpy()
    for column in (*guide.T, *prior.T):
        assert kstest(column, "norm").pvalue > 1e-5


def test_a_prior_that_is_whitened_only_roughly_is_drawn_exactly() -> None:
    """Dirichlet task parameters have no exact noise: the prior's draws are mapped to it, their values are Dirichlet."""

    def simplex(batch: Batch) -> None:
        strength = pyro.sample("strength", dist.LogNormal(0.0, 0.5))
        with batch.tasks():
            share = pyro.sample("share", dist.Dirichlet(strength * torch.tensor([1.0, 2.0, 3.0])))
            with batch.observations():
                pyro.sample("y", dist.Normal(share[..., 0], 1.0), obs=batch.y)

    tasks = make_tasks({"a": [0.2], "b": [0.1, 0.9]})
    density, draws = TaskDensity(simplex, tasks), 3000
    assert density.structure.task[0].kind == "moments"
    theta = torch.full((draws, 1), 0.4, dtype=torch.float64)
    noise = prior_noise(density, exact_guides(ROWS), tasks, theta)
    batch = tasks.batch([0, 1])
    values = density.constrain.mapped(theta, noise, density.tensors(batch), {}, in_dims=(0, 0, None, None))["share"]
    strength = math.exp(0.4)
    for task in range(2):
        for part, weight in enumerate((1.0, 2.0, 3.0)):
            shape = (strength * weight, strength * (6.0 - weight))
            assert kstest(values[:, task, part].numpy(), "beta", args=shape).pvalue > 1e-5
