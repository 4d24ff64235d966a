from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import constraints, transforms
from torch.fx.experimental.proxy_tensor import make_fx

from bayesmeta.hierarchy import whitening


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def task(fn: Any, tasks: int = 1) -> Any:
    return fn.expand([tasks, 1])


def univariate() -> dict[str, Any]:
    return {
        "Normal": dist.Normal(1.0, 2.0),
        "LogNormal": dist.LogNormal(0.3, 0.8),
        "sinh": dist.TransformedDistribution(
            dist.Normal(0.0, 1.0), [transforms.AffineTransform(1.0, 0.5), transforms.ExpTransform()]
        ),
        "HalfNormal": dist.HalfNormal(2.0),
        "HalfCauchy": dist.HalfCauchy(2.0),
        "Exponential": dist.Exponential(0.7),
        "Weibull": dist.Weibull(2.0, 1.5),
        "Pareto": dist.Pareto(1.5, 3.0),
        "Gumbel": dist.Gumbel(0.5, 2.0),
        "Laplace": dist.Laplace(0.5, 2.0),
        "Cauchy": dist.Cauchy(0.5, 2.0),
        "Logistic": dist.Logistic(0.5, 2.0),
        "Uniform": dist.Uniform(-1.0, 3.0),
        "Kumaraswamy": dist.Kumaraswamy(2.0, 3.0),
    }


def vectors() -> dict[str, Any]:
    root = torch.tensor([[1.0, 0.0], [0.6, 0.5]])
    return {
        "Independent": dist.Normal(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 3.0])).to_event(1),
        "matrix": dist.Normal(torch.zeros(2, 3), 2.0).to_event(2),
        "MultivariateNormal": dist.MultivariateNormal(torch.ones(2), scale_tril=root),
        "LowRank": dist.LowRankMultivariateNormal(torch.zeros(3), torch.ones(3, 1), torch.full((3,), 0.5)),
        "LogisticNormal": dist.LogisticNormal(torch.tensor([0.5, -1.0]), torch.tensor([1.0, 0.7])),
        "HalfNormals": dist.HalfNormal(torch.tensor([0.5, 2.0])).to_event(1),
    }


def approximate() -> dict[str, Any]:
    halves = dist.Categorical(torch.tensor([0.3, 0.7]))
    return {
        "Gamma": dist.Gamma(0.7, 2.0),
        "Chi2": dist.Chi2(3.0),
        "InverseGamma": dist.InverseGamma(3.0, 2.0),
        "Beta": dist.Beta(0.8, 2.0),
        "StudentT": dist.StudentT(3.0, 1.0, 2.0),
        "Dirichlet": dist.Dirichlet(torch.tensor([0.7, 1.0, 4.0])),
        "LKJCholesky": dist.LKJCholesky(3, 1.5),
        "Gammas": dist.Gamma(torch.tensor([0.7, 3.0]), 1.0).to_event(1),
        "MultivariateStudentT": dist.MultivariateStudentT(torch.tensor(4.0), torch.zeros(2), torch.eye(2)),
        "mixture": dist.MixtureSameFamily(halves, dist.Normal(torch.tensor([-2.0, 1.0]), 0.5)),
        "positive mixture": dist.MixtureSameFamily(halves, dist.LogNormal(torch.tensor([-2.0, 1.0]), 0.5)),
        "masked": dist.Normal(0.0, 1.0).mask(torch.tensor(True)),
    }


EVERY = univariate() | vectors() | approximate()
EXACT = [*univariate(), *vectors()]


def every(name: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.set_default_dtype(dtype)
    return (univariate() | vectors() | approximate())[name]


def noise_of(fn: Any, tasks: int, scale: float = 1.0) -> Tensor:
    shape = whitening.bijection(fn).inverse_shape(fn.shape())
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(tasks))


@pytest.mark.parametrize("name", list(EVERY))
def test_the_log_density_of_noise_is_the_priors_with_the_jacobian(name: str) -> None:
    fn = task(every(name), 5)
    z = noise_of(fn, 5)
    value, log_prior = whitening.whiten(fn, z)
    assert value.shape == fn.shape() and log_prior.shape == (5, 1)
    transform = whitening.bijection(fn)

    def unconstrained(noise: Tensor) -> Tensor:
        return transform.inv(whitening.whiten(fn, noise)[0]).reshape(5, -1)

    jacobian = torch.autograd.functional.jacobian(unconstrained, z).reshape(5, z[0].numel(), 5, z[0].numel())
    logdet = torch.stack([torch.linalg.slogdet(jacobian[i, :, i]).logabsdet for i in range(5)])
    u = transform.inv(value)
    extra = transform.log_abs_det_jacobian(u, value).reshape(5, -1).sum(-1)
    expected = fn.log_prob(value).reshape(5) + extra + logdet
    torch.testing.assert_close(log_prior.squeeze(-1), expected, rtol=1e-8, atol=1e-8)
    log_jacobian = whitening.log_jacobian(fn, z, value)
    torch.testing.assert_close(fn.log_prob(value) + log_jacobian, log_prior, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", EXACT)
def test_exact_kinds_have_standard_normal_noise(name: str) -> None:
    fn = task(every(name), 3)
    assert whitening.kind(fn) in ("normal", "icdf")
    z = noise_of(fn, 3)
    expected = dist.Normal(0.0, 1.0).log_prob(z).reshape(3, -1).sum(-1, keepdim=True)
    torch.testing.assert_close(whitening.whiten(fn, z)[1], expected)


@pytest.mark.parametrize("name", list(univariate()))
def test_noise_pushed_forward_is_the_prior(name: str) -> None:
    fn = task(every(name), 4000)
    value, _ = whitening.whiten(fn, noise_of(fn, 4000))
    uniform = fn.cdf(value).squeeze(-1)
    assert stats.kstest(uniform.numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("name", list(univariate()))
def test_quantiles_keep_their_digits(name: str) -> None:
    fn = task(every(name), 9)
    z = torch.linspace(-4.0, 4.0, 9).unsqueeze(-1)
    value, _ = whitening.whiten(fn, z)
    torch.testing.assert_close(fn.cdf(value), torch.special.ndtr(z), rtol=1e-6, atol=1e-13)


@pytest.mark.parametrize("name", list(EVERY))
def test_maps_are_not_unrolled_over_draws(name: str) -> None:
    with pyro.validation_enabled(False):
        fn = task(every(name), 2)
        z = noise_of(fn, 2).expand(300, *noise_of(fn, 2).shape)
        graph = make_fx(torch.func.vmap(lambda noise: whitening.whiten(fn, noise)))(z)
    assert len(graph.graph.nodes) < 200


def test_upper_tails_keep_their_digits() -> None:
    z = torch.tensor([[9.0], [12.0]])
    tail = torch.special.log_ndtr(-z)
    value = {name: whitening.whiten(task(every(name), 2), z)[0] for name in ("Exponential", "HalfNormal", "Laplace")}
    torch.testing.assert_close(value["Exponential"], -tail / 0.7)
    torch.testing.assert_close(torch.special.log_ndtr(-value["HalfNormal"] / 2.0), tail - torch.tensor(2.0).log())
    torch.testing.assert_close(value["Laplace"], 0.5 - 2.0 * (tail + torch.tensor(2.0).log()))


@pytest.mark.parametrize("name", ["Independent", "MultivariateNormal", "LowRank"])
def test_gaussian_vectors_have_their_moments(name: str) -> None:
    fn = task(every(name), 20000)
    value = whitening.whiten(fn, noise_of(fn, 20000))[0].squeeze(1)
    covariance = getattr(every(name), "covariance_matrix", torch.diag(torch.tensor([1.0, 9.0]))[: value.shape[-1]])
    error = (value.mean(0) - every(name).mean) / (covariance.diagonal() / 20000).sqrt()
    assert error.abs().max() < 4
    spread = (torch.outer(covariance.diagonal(), covariance.diagonal()) + covariance.square()) / 20000
    assert ((value.T.cov() - covariance) / spread.sqrt()).abs().max() < 4


@pytest.mark.parametrize("name", list(approximate()))
def test_unwhiten_inverts_the_approximate_kind(name: str) -> None:
    fn = task(every(name), 7)
    assert whitening.kind(fn) == "moments"
    z = noise_of(fn, 7)
    torch.testing.assert_close(whitening.unwhiten(fn, whitening.whiten(fn, z)[0]), z, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", list(EVERY))
def test_tails_are_finite_with_finite_gradients(name: str, dtype: torch.dtype) -> None:
    fn = task(every(name, dtype), 7)
    shape = whitening.bijection(fn).inverse_shape(fn.shape())
    edge = torch.tensor([-12.0, -8.0, -5.0, 0.0, 5.0, 8.0, 12.0])
    z = edge.reshape(7, *[1] * (len(shape) - 1)).expand(shape).clone().requires_grad_()
    value, log_prior = whitening.whiten(fn, z)
    assert torch.isfinite(value).all() and torch.isfinite(log_prior).all()
    (gradient,) = torch.autograd.grad(log_prior.sum() + value.atan().sum(), z)
    assert torch.isfinite(gradient).all() and value.dtype is dtype


@pytest.mark.parametrize("name", ["Gamma", "Chi2", "InverseGamma", "Beta", "Dirichlet", "LKJCholesky", "Gammas"])
def test_location_and_scale_are_the_priors_in_unconstrained_space(name: str) -> None:
    torch.manual_seed(5)
    fn = task(every(name))
    u = whitening.bijection(fn).inv(whitening.draw(every(name).expand([40000])))
    location, scale = whitening.unconstrained_moments(fn)
    location, scale = location.reshape(u.shape[1:]), scale.reshape(u.shape[1:])
    assert ((u.mean(0) - location) / (u.std(0) / 200)).abs().max() < 4
    fourth = ((u - u.mean(0)).pow(4).mean(0) / u.var(0).square() - 1).sqrt()
    assert ((u.var(0) / scale.square() - 1) / (fourth / 200)).abs().max() < 4


def test_matched_moments_are_smooth_in_the_parameters() -> None:
    loc = torch.tensor(0.5, requires_grad=True)
    z = torch.tensor([[0.7]])
    for fn in (dist.StudentT(3.0, loc, loc.exp()), dist.Gamma(loc.exp(), 1.0), dist.HalfNormal(loc.exp())):
        (gradient,) = torch.autograd.grad(whitening.whiten(task(fn), z)[0].sum(), loc)
        assert gradient.abs() > 0 and torch.isfinite(gradient)


def test_families_without_moments_fall_back_to_the_unit_scale() -> None:
    for fn in (dist.ImproperUniform(constraints.positive, (), (2,)), dist.StudentT(1.0).mask(torch.tensor(True))):
        location, scale = whitening.unconstrained_moments(fn)
        assert torch.isfinite(location).all() and (scale > 0).all() and torch.isfinite(scale).all()
    assert whitening.is_improper(dist.ImproperUniform(constraints.real, (2,), ()).to_event(1))
    assert not whitening.is_improper(dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    "fn",
    [
        dist.Gamma(torch.ones(4), 1.0),
        dist.Beta(torch.ones(4), 1.0),
        dist.Dirichlet(torch.ones(4, 3)),
        dist.Binomial(torch.full((4,), 5), torch.tensor(0.5)),
        dist.Poisson(torch.ones(4)),
        dist.Bernoulli(torch.full((4,), 0.5)),
        dist.Categorical(torch.ones(4, 3)),
        dist.Geometric(torch.full((4,), 0.5)),
        dist.Pareto(torch.full((4,), 2.0), 1.0),
        dist.LogNormal(torch.zeros(4, 2), 1.0).to_event(1),
    ],
    ids=lambda fn: type(fn).__name__,
)
def test_interior_lies_inside(fn: Any) -> None:
    inside = whitening.interior(whitening.support(fn), fn.shape())
    assert inside is not None and inside.shape == fn.shape() and whitening.support(fn).check(inside).all()
    assert torch.isfinite(fn.log_prob(inside.to(torch.get_default_dtype()))).all()


def test_interior_of_the_real_line_and_of_unknown_supports_is_none() -> None:
    assert whitening.interior(constraints.real_vector, torch.Size([2, 3])) is None
    assert whitening.interior(constraints.one_hot, torch.Size([2, 3])) is None
    assert whitening.interior(constraints.positive_definite, torch.Size([3, 3])) is None


@pytest.mark.parametrize(
    ("fn", "even"),
    [
        (dist.HalfNormal(2.0), True),
        (dist.HalfCauchy(1.0).expand([3]).to_event(1), True),
        (dist.ImproperUniform(constraints.positive, (), (2,)), True),
        (dist.ImproperUniform(constraints.real, (), ()), False),
        (dist.Exponential(1.0), False),
        (dist.Gamma(2.0, 1.0), False),
        (dist.LogNormal(0.0, 1.0), False),
        (dist.Normal(0.0, 1.0), False),
    ],
)
def test_priors_that_are_half_of_an_even_density(fn: Any, even: bool) -> None:
    assert whitening.is_even(fn) is even


def test_what_was_expanded_outside_stops_validating_and_stays_the_users() -> None:
    """Otherwise every model with such a site would run as Python, twenty times slower."""
    parts = dist.Normal(0.0, 1.0).expand([2, 3])
    for fn in (
        parts.to_event(1),
        dist.MixtureSameFamily(dist.Categorical(torch.ones(2, 3)), parts, validate_args=True),
        dist.TransformedDistribution(parts, [torch.distributions.ExpTransform()], validate_args=True),
    ):
        quiet = whitening.unvalidated(fn)
        wrong = torch.full(fn.event_shape, torch.nan)
        with pytest.raises(ValueError, match="Expected value"):
            fn.log_prob(wrong)
        with pyro.validation_enabled(False):
            assert bool(quiet.log_prob(wrong).isnan().all()) and type(quiet) is type(fn)
            torch.testing.assert_close(
                quiet.log_prob(torch.full_like(wrong, 0.5)), fn.log_prob(torch.full_like(wrong, 0.5))
            )
    made_inside = dist.Normal(0.0, 1.0)
    assert whitening.unvalidated(made_inside) is made_inside
