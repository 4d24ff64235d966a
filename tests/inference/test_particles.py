"""Particles of θ: an exact density, gradients mixed by the kernel, one mode as a normal has it, several modes kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import ROWS, SIGMA, TAU, ExactGuide, close, drawn_rows, exact, fitted, known_mean, make_tasks
from scipy.stats import multivariate_t
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import bayesmeta as bm
from bayesmeta.inference.gaussian import HEAVY_DF
from bayesmeta.inference.particles import ParticleShared
from bayesmeta.inference.protocols import Context, TaskPosterior
from bayesmeta.inference.shared import WIDE

LOC = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
SCALE = torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)


def shaken(particles: int = 4) -> ParticleShared:
    shared = ParticleShared(LOC, SCALE, particles=particles)
    with torch.no_grad():
        shared.mean.add_(0.5 * torch.randn_like(shared.mean))
        shared.log_diagonal.add_(0.5 * torch.randn_like(shared.log_diagonal))
        shared.lower.add_(torch.randn_like(shared.lower))
    return shared


def parts(shared: ParticleShared) -> tuple[Tensor, Tensor]:
    """Where the particles are, and the covariance around each."""
    scaled = SCALE.unsqueeze(-1) * shared.factor().detach()
    return LOC + SCALE * shared.mean.detach(), scaled @ scaled.mT


def test_density_is_that_of_the_mixture_and_of_its_wide_t() -> None:
    shared = shaken()
    places, covariance = parts(shared)
    theta = places[[0, 1, 1, 3]] + SCALE * torch.randn(4, 3, dtype=torch.float64)
    mixture = MixtureSameFamily(Categorical(torch.ones(4, dtype=torch.float64)), MultivariateNormal(places, covariance))
    torch.testing.assert_close(shared.log_prob(theta), mixture.log_prob(theta))
    wide = [multivariate_t(p.numpy(), WIDE**2 * covariance.numpy(), df=HEAVY_DF).pdf(theta.numpy()) for p in places]
    torch.testing.assert_close(shared.log_prob(theta, wide=True), torch.as_tensor(np.log(np.mean(wide, 0))))


@pytest.mark.parametrize("wide", [False, True])
def test_draws_come_from_the_density(wide: bool) -> None:
    """E (p/q)(θ) = 1 over draws θ of q, for p the normal around any one particle."""
    shared, count = shaken(), 100_000
    places, covariance = parts(shared)
    with torch.no_grad():
        theta = shared.sample(count, wide=wide)
        log_q = shared.log_prob(theta, wide=wide)
    for place in places:
        ratio = (MultivariateNormal(place, covariance).log_prob(theta) - log_q).exp()
        assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / count**0.5 < 0.05


def test_few_draws_are_spread_over_the_particles() -> None:
    shared = shaken()
    with torch.no_grad():
        shared.log_diagonal.fill_(-30.0)
        shared.lower.zero_()
        for count in (3, 4, 10):
            drawn = shared.sample(count)
            owner = torch.cdist(drawn / SCALE, parts(shared)[0] / SCALE).argmin(1).bincount(minlength=4)
            assert owner.max() - owner.min() <= 1 and owner.sum() == count


def test_centre_and_a_new_origin() -> None:
    shared = shaken()
    places, covariance = parts(shared)
    loc, sd = shared.centre()
    torch.testing.assert_close(loc, places.mean(0))
    torch.testing.assert_close(sd, (covariance.diagonal() + places.var(0, correction=0)).sqrt())
    theta = LOC + SCALE * torch.randn(5, 3, dtype=torch.float64)
    before = shared.log_prob(theta)
    shared.recentre()
    torch.testing.assert_close(shared.log_prob(theta), before)
    torch.testing.assert_close(shared.centre()[0], loc)
    torch.testing.assert_close(shared.factor().square().sum(-1).sqrt(), torch.full_like(sd, 0.1))


def test_the_density_holds_its_parameters_fixed_and_passes_gradients_to_theta() -> None:
    shared = shaken()
    theta = shared.sample(3).detach().requires_grad_()
    shared.log_prob(theta).sum().backward()
    assert theta.grad is not None and theta.grad.abs().min() > 0
    assert all(p.grad is None for p in shared.parameters())


def test_a_particle_takes_the_gradients_of_those_near_it() -> None:
    """Three near each other, one far away that keeps its own; draws are where particles are."""
    place, given = np.array([0.0, 0.05, 0.15, 5.0]), np.array([1.0, 3.0, -2.0, 10.0])
    shared = ParticleShared(LOC[:1], SCALE[:1], particles=4)
    with torch.no_grad():
        shared.mean.copy_(torch.as_tensor(place)[:, None])
    mixed = shared._mixed()
    torch.testing.assert_close(mixed, shared.mean)
    mixed.backward(torch.as_tensor(given)[:, None])
    assert shared.mean.grad is not None
    kernel = np.exp(-(((place[:, None] - place) / 0.1) ** 2))  # in sds around particles, the width at its bound
    np.testing.assert_allclose(shared.mean.grad[:, 0], kernel @ given / kernel.sum(1))
    assert float(shared.mean.grad[3, 0]) == pytest.approx(10.0)


def test_one_mode_is_found_as_a_normal_finds_it_and_corrected() -> None:
    fit = fitted(ROWS, shared="svgd")
    mean, covariance = exact(ROWS)
    sd = covariance[-1, -1] ** 0.5
    loc, scale = (float(v) for v in fit._guides.shared.centre())
    assert abs(loc - mean[-1]) < 0.05 * sd and abs(scale / sd - 1) < 0.05
    assert fit.shared.status == "corrected"
    assert close(fit.shared.mean("mu"), fit.shared.sd("mu"), (mean[-1], sd), 4000 * fit.shared.ess)


def either_sign(batch: bm.Batch) -> None:
    """The square of mu is well known, its sign by the prior alone."""
    mu = pyro.sample("mu", dist.Normal(0.3, 2.0))
    with batch.tasks():
        a = pyro.sample("a", dist.Normal(mu.square(), TAU))
        with batch.observations():
            pyro.sample("y", dist.Normal(a, SIGMA), obs=batch.y)


def signs(rows: dict[str, list[float]]) -> tuple[float, float, float]:
    """Share of mu < 0, mean and sd of |mu|, exact by quadrature."""
    mu = np.linspace(-4, 4, 8001)
    log_p = -(((mu - 0.3) / 2) ** 2) / 2
    for y in rows.values():
        variance = TAU**2 + SIGMA**2 / len(y)
        log_p -= (np.mean(y) - mu**2) ** 2 / variance / 2
    weight = np.exp(log_p - log_p.max())
    weight /= weight.sum()
    mean = float(weight @ np.abs(mu))
    return float(weight[mu < 0].sum()), mean, float(weight @ (np.abs(mu) - mean) ** 2) ** 0.5


class ExactOfSquare(ExactGuide):
    """The exact posterior of the noise in `either_sign`."""

    def condition(self, theta: Tensor, context: Context) -> TaskPosterior:
        return super().condition(theta.square(), context)


@pytest.mark.parametrize("shared", ["svgd", "normal"])
def test_both_modes_of_theta_are_kept_and_get_their_weights(shared: str) -> None:
    rows = drawn_rows(6, seed=0, mu=4.0)
    options = bm.Amortized(shared=shared, guide=ExactOfSquare(), optimizer=bm.Optimizer(steps=300))
    fit = bm.fit(either_sign, make_tasks(rows), method=options, progress=False)
    share, mean, sd = signs(rows)
    theta, effective = fit.shared.draws("mu"), 4000 * fit.shared.ess
    assert fit.shared.status == "corrected"
    assert 0.3 < share < 0.5
    if shared == "normal":
        assert (theta < 0).mean() in (0.0, 1.0)
        return
    error = (share * (1 - share) / effective) ** 0.5
    assert abs((theta < 0).mean() - share) < 4 * error
    assert close(np.abs(theta).mean(), np.abs(theta).std(), (mean, sd), effective)
    places = fit._guides.shared.mean.detach()
    assert (places > 0).any() and (places < 0).any()


def test_it_is_stored_and_works_without_theta(tmp_path: Path) -> None:
    tasks = make_tasks(ROWS)
    options = bm.Amortized(shared="svgd", optimizer=bm.Optimizer(steps=30))
    fit = bm.fit(known_mean, tasks, method=options, progress=False)
    assert fit.shared.status == "sampled"
    model = bm.HierarchicalModel(
        bm.priors.Gaussian(1), lambda phi, x: phi[..., 0] + 0 * x.sum(-1), bm.likelihoods.Normal()
    )
    fit = bm.fit(model, tasks, method=options, progress=False)
    fit.save(tmp_path / "fit.bm")
    loaded = bm.load(tmp_path / "fit.bm", model)
    theta = torch.zeros(2, 3, dtype=torch.float64)
    assert torch.equal(loaded._guides.shared.log_prob(theta), fit._guides.shared.log_prob(theta))
    assert np.array_equal(loaded.posterior(tasks).draws("phi"), fit.posterior(tasks).draws("phi"))
