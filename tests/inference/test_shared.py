from __future__ import annotations

import pytest
import torch
from conjugate import ROWS, ExactGuide, density, make_tasks
from conjugate import WIDE as WIDE_MU
from scipy.stats import multivariate_t
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from bayesmeta.inference.correction import correct_shared
from bayesmeta.inference.gaussian import HEAVY_DF
from bayesmeta.inference.objectives import Guides
from bayesmeta.inference.shared import WIDE, LowRankShared, NormalShared, PointShared, PriorShared

LOC = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
SCALE = torch.tensor([1.0, 5.0, 0.2, 3.0], dtype=torch.float64)


def shaken(kind: type[NormalShared], **options: int) -> NormalShared:
    shared = kind(LOC, SCALE, **options)
    with torch.no_grad():
        for parameter in shared.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return shared


def moments(shared: NormalShared) -> tuple[Tensor, Tensor]:
    scaled = SCALE.unsqueeze(-1) * shared.factor().detach()
    return LOC + SCALE * shared.mean.detach(), scaled @ scaled.mT


@pytest.mark.parametrize("kind", [NormalShared, LowRankShared])
def test_density_is_that_of_the_normal_and_of_its_wide_t(kind: type[NormalShared]) -> None:
    shared = shaken(kind)
    mean, covariance = moments(shared)
    theta = mean + SCALE * torch.randn(6, 4, dtype=torch.float64)
    torch.testing.assert_close(shared.log_prob(theta), MultivariateNormal(mean, covariance).log_prob(theta))
    wide = multivariate_t(mean.numpy(), WIDE**2 * covariance.numpy(), df=HEAVY_DF).logpdf(theta.numpy())
    torch.testing.assert_close(shared.log_prob(theta, wide=True), torch.as_tensor(wide))


def test_low_rank_covariance_is_diagonal_plus_rank() -> None:
    shared = shaken(LowRankShared, rank=2)
    diagonal = shared.log_diagonal.detach().exp()
    factors = diagonal.unsqueeze(-1) * shared.lower.detach()
    unit = diagonal.square().diag() + factors @ factors.mT
    torch.testing.assert_close(moments(shared)[1], SCALE.unsqueeze(-1) * unit * SCALE)
    assert shared.lower.shape == (4, 2)


@pytest.mark.parametrize("kind", [NormalShared, LowRankShared])
@pytest.mark.parametrize("wide", [False, True])
def test_draws_have_the_moments_of_the_density(kind: type[NormalShared], wide: bool) -> None:
    shared = shaken(kind)
    mean, covariance = moments(shared)
    with torch.no_grad():
        draws = shared.sample(100_000, wide=wide)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (draws - mean).mT, upper=False)
    if wide:
        white = white / WIDE
    inside = white.square().sum(0) < 4.0
    quadratic = torch.distributions.FisherSnedecor(4.0, HEAVY_DF) if wide else torch.distributions.Chi2(4.0)
    share = float((quadratic.sample((400_000,)) * (4.0 if wide else 1.0) < 4.0).double().mean())
    assert abs(float(inside.double().mean()) - share) < 0.01
    assert white.mean(1).abs().max() < 0.03


@pytest.mark.parametrize("kind", [NormalShared, LowRankShared])
def test_a_new_centre_leaves_the_distribution_as_it_is(kind: type[NormalShared]) -> None:
    shared = shaken(kind)
    theta = LOC + SCALE * torch.randn(5, 4, dtype=torch.float64)
    before, centre = shared.log_prob(theta).detach(), shared.centre()
    shared.recentre()
    torch.testing.assert_close(shared.log_prob(theta).detach(), before)
    for now, then in zip(shared.centre(), centre, strict=True):
        torch.testing.assert_close(now, then)
    assert shared.mean.abs().max() == 0


@pytest.mark.parametrize("kind", [NormalShared, LowRankShared])
def test_the_density_holds_its_parameters_fixed_and_passes_gradients_to_theta(kind: type[NormalShared]) -> None:
    shared = shaken(kind)
    theta = shared.sample(3).detach().requires_grad_()
    shared.log_prob(theta).sum().backward()
    assert theta.grad is not None and theta.grad.abs().min() > 0
    assert all(p.grad is None for p in shared.parameters())
    shared.sample(3).sum().backward()
    assert shared.mean.grad is not None


def test_centre_is_the_mean_and_the_marginal_sd() -> None:
    shared = shaken(NormalShared)
    mean, covariance = moments(shared)
    loc, sd = shared.centre()
    torch.testing.assert_close(loc, mean)
    torch.testing.assert_close(sd, covariance.diagonal().sqrt())
    assert not loc.requires_grad and not sd.requires_grad


def test_a_point_has_one_value_and_no_density() -> None:
    point = PointShared(LOC, SCALE)
    with torch.no_grad():
        point.mean.add_(1.0)
    assert torch.equal(point.sample(3), (LOC + SCALE).expand(3, -1))
    assert torch.equal(point.log_prob(point.sample(3)), torch.zeros(3, dtype=torch.float64))
    loc, scale = point.centre()
    assert torch.equal(loc, LOC + SCALE) and torch.equal(scale, SCALE)
    point.recentre()
    assert torch.equal(point.sample(1)[0], LOC + SCALE)


def test_the_prior_in_place_of_a_posterior() -> None:
    shared = PriorShared(density())
    theta = shared.sample(4000)
    assert list(shared.parameters()) == []
    assert abs(float(theta.mean())) < 4 * WIDE_MU / 4000**0.5
    assert abs(float(theta.std()) / WIDE_MU - 1) < 4 / 8000**0.5
    loc, scale = shared.centre()
    assert abs(float(loc[0])) < 0.3
    assert abs(float(scale[0]) / WIDE_MU - 1) < 0.1
    torch.testing.assert_close(shared.log_prob(theta[:5]), Normal(0.0, WIDE_MU).log_prob(theta[:5, 0]))
    with torch.no_grad():
        drawn = correct_shared(density(), Guides(shared, ExactGuide()), make_tasks(ROWS), draws=100)
    assert (drawn.status, drawn.theta.shape) == ("sampled", (100, 1))
