"""The multivariate Laplace prior against quadrature, scipy's quantiles and closed forms, near its kink and far out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from bayesmeta.models.sharing import Block, Blocks, Laplace
from bayesmeta.models.sharing.laplace import BEYOND, Radial, _radii


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


BAR = 1e-7
"""What the module says of its map of radii."""


def laplace(mu: Tensor, tau: float = 1.0) -> Any:
    """Over one block."""
    prior = Laplace().over(Blocks((Block("all", (len(mu),)),)))
    return prior.distribution({"mu": mu, "tau": torch.tensor([tau])}, None)  # type: ignore[arg-type]


def test_one_dimension_integrates_to_one() -> None:
    fn = laplace(torch.tensor([0.4]), 0.7)
    density = lambda v: math.exp(fn.log_prob(torch.tensor([v])).item())  # noqa: E731
    halves = [integrate.quad(density, *ends, epsabs=1e-10)[0] for ends in ((-25.0, 0.4), (0.4, 25.0))]
    np.testing.assert_allclose(halves, 0.5, atol=1e-9)


def test_two_dimensions_integrate_to_one() -> None:
    """On a polar grid, Gauss-Laguerre in the distance; the two numbers have scales of their own."""
    prior = Laplace().over(Blocks((Block("a", (), 1.5), Block("b", (), -1.0))))
    fn: Any = prior.distribution({"tau": torch.tensor([0.7, 2.0])}, None)  # type: ignore[arg-type]
    nodes, weights = np.polynomial.laguerre.laggauss(12)
    angles = np.linspace(0, 2 * np.pi, 8, endpoint=False)
    at = nodes[:, None, None] * np.stack([np.cos(angles), np.sin(angles)], -1)
    value = fn.log_prob(torch.as_tensor(at * [0.7, 2.0] + [1.5, -1.0])).exp().numpy()
    total = (weights * nodes * np.exp(nodes)) @ value.mean(1) * 2 * np.pi * 0.7 * 2.0
    assert total == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("d", [1, 3, 20])
def test_density_is_the_norm(d: int) -> None:
    """Far from the centre, at the kink, and beyond what noise ever reaches."""
    mu, tau, v = torch.randn(d), 0.7, torch.randn(4, 1, d)
    v[0], v[1] = v[0] * 1e4, 0.0
    constant = math.log(2) + d / 2 * math.log(math.pi) + math.lgamma(d) - math.lgamma(d / 2) + d * math.log(tau)
    fn = laplace(mu, tau)
    assert (fn.batch_shape, fn.event_shape) == ((), (d,))
    torch.testing.assert_close(fn.log_prob(mu + tau * v), -v.norm(dim=-1) - constant)


def test_one_dimension_is_torch_s() -> None:
    fn, v = laplace(torch.tensor([0.4]), 0.7), torch.linspace(-50, 50, 41)
    torch.testing.assert_close(fn.log_prob(v.unsqueeze(-1)), torch.distributions.Laplace(0.4, 0.7).log_prob(v))


def test_single_precision() -> None:
    v = torch.linspace(-30, 30, 12).reshape(4, 3)
    want = laplace(torch.zeros(3)).log_prob(v)
    torch.set_default_dtype(torch.float32)
    found = laplace(torch.zeros(3)).log_prob(v.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), want, atol=0, rtol=1e-5)


@pytest.mark.parametrize("d", [1, 2, 7])
def test_draws_lie_at_gamma_distances_in_all_directions(d: int) -> None:
    mu, draws = torch.randn(d), 5000
    v = (laplace(mu, 0.7).sample((draws,)) - mu).numpy() / 0.7
    length = np.linalg.norm(v, axis=-1)
    assert stats.kstest(length, stats.gamma(d).cdf).pvalue > 0.01
    assert np.abs((v / length[:, None]).mean(0)).max() < 4 / math.sqrt(d * draws)
    error = math.sqrt(((d + 2) * (d + 3) * 3 / (d + 2) * (d + 1) - (d + 1) ** 2) / draws)
    assert np.abs((v**2).mean(0) - (d + 1)).max() < 4 * error


@pytest.mark.parametrize("d", [1, 2, 5, 40, 300])
def test_radii_are_mapped_by_quantiles(d: int) -> None:
    """Each of the two tails by its own probabilities, which do not round."""
    r = np.linspace(max(0.01, math.sqrt(d) - 6), math.sqrt(d) + 8, 50)
    chi, gamma = stats.chi(d), stats.gamma(d)
    want = np.where(r**2 < d, gamma.ppf(chi.cdf(r)), gamma.isf(chi.sf(r)))
    direction = torch.nn.functional.normalize(torch.randn(d), dim=0)
    found = Radial(d)(torch.as_tensor(r)[:, None] * direction)
    torch.testing.assert_close(found, torch.as_tensor(want)[:, None] * direction, rtol=BAR, atol=0)


@pytest.mark.parametrize("d", [1, 2, 5])
def test_jacobian_is_autograd_s(d: int) -> None:
    """To the error of a derivative of the polynomial, at most degree² times that of its value."""
    radial = Radial(d)
    for z in torch.randn(5, d) * 1.5:
        jacobian: Any = torch.autograd.functional.jacobian(radial, z)
        want = torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(radial.log_abs_det_jacobian(z, radial(z)), want, rtol=0, atol=d * 14**2 * BAR)


@pytest.mark.parametrize("d", [1, 2, 40])
def test_inverse(d: int) -> None:
    radial, direction = Radial(d), torch.nn.functional.normalize(torch.randn(d), dim=0)
    z = torch.tensor([1e-3, 0.5, 1.0, 3.0, 1.0 * math.sqrt(d), math.sqrt(d) + 8])[:, None] * direction
    torch.testing.assert_close(radial.inv(radial(z)), z, rtol=1e-12, atol=0)
    zero = torch.zeros(2, d)
    assert torch.equal(radial.inv(zero), zero) and torch.equal(radial(zero), zero)


@pytest.mark.parametrize("d", [1, 2, 40])
@pytest.mark.parametrize("length", [1e3, 1e6, 1e12])
def test_far_beyond_the_end_the_map_is_a_line(d: int, length: float) -> None:
    """Through the last quantile, with the slope of the quantiles there, χ's density over Gamma's."""
    end = math.sqrt(d) + BEYOND
    last = stats.gamma(d).isf(stats.chi(d).sf(end))
    slope = math.exp(stats.chi(d).logpdf(end) - stats.gamma(d).logpdf(last))
    direction = torch.nn.functional.normalize(torch.randn(d), dim=0)
    z = Radial(d).inv(length * direction)
    torch.testing.assert_close(z, (end + (length - last) / slope) * direction, rtol=14**2 * BAR, atol=0)
    torch.testing.assert_close(Radial(d)(z), length * direction, rtol=1e-12, atol=0)


@pytest.mark.parametrize("d", [1, 2, 40])
def test_smooth_at_the_kink(d: int) -> None:
    """The slope at z = 0, from both distributions' powers there: (Γ(d + 1)/(2^(d/2) Γ(d/2 + 1)))^(1/d)."""
    slope = math.exp((math.lgamma(d + 1) - d / 2 * math.log(2) - math.lgamma(d / 2 + 1)) / d)
    jacobian: Any = torch.autograd.functional.jacobian(Radial(d), torch.zeros(d))
    torch.testing.assert_close(jacobian, slope * torch.eye(d), rtol=2 * BAR, atol=0)


def test_gradients_are_finite_in_the_middle_of_the_polynomial() -> None:
    """Where it is a power of 0, and at the end, where the line begins."""
    end = _radii(2)[1]
    for radius in (end / 2, end, 1.5 * end):
        at = torch.tensor([radius, 0.0])
        jacobian: Any = torch.autograd.functional.jacobian(Radial(2), at)
        step = torch.tensor([1e-6, 0.0])
        want = (Radial(2)(at + step) - Radial(2)(at - step)) / 2e-6
        torch.testing.assert_close(jacobian[:, 0], want, rtol=1e-5, atol=1e-8)


def test_gradients_of_the_density() -> None:
    """−(φ − μ)/(τ² r) in φ, the opposite in μ, and (r − d)/τ in τ, r = ‖φ − μ‖/τ."""
    phi, mu = torch.randn(3).requires_grad_(), torch.randn(3).requires_grad_()
    tau = torch.tensor([0.7]).requires_grad_()
    prior = Laplace().over(Blocks((Block("all", (3,)),)))
    fn: Any = prior.distribution({"mu": mu, "tau": tau}, None)  # type: ignore[arg-type]
    found = torch.autograd.grad(fn.log_prob(phi), [phi, mu, tau])
    with torch.no_grad():
        r = (phi - mu).norm() / tau
        want = (phi - mu) / (tau**2 * r)
        for one, other in zip(found, (-want, want, (r - 3) / tau), strict=True):
            torch.testing.assert_close(one, other)


def test_the_mode_ties_tasks_to_the_centre_unless_their_data_pull_hard() -> None:
    """Normal data of sd s: μ + (1 − s²/(τ r))₊ (y − μ), r = ‖y − μ‖; nothing near is better, and it is concave."""
    tau, s, mu = 0.5, 0.4, torch.tensor([1.0, -2.0])
    prior = Laplace().over(Blocks((Block("all", (2,)),)))
    fn: Any = prior.distribution({"mu": mu, "tau": torch.tensor([tau])}, None)  # type: ignore[arg-type]
    off = torch.nn.functional.normalize(torch.randn(4, 2), dim=1) * torch.tensor([[0.05], [0.3], [0.33], [2.0]])

    def log_joint(phi: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = fn.log_prob(phi) - (mu + off - phi).square().sum(-1) / (2 * s**2)
        return found

    mode = mu + (1 - s**2 / (tau * off.norm(dim=1, keepdim=True))).clamp(min=0) * off
    assert (mode == mu).all(1).tolist() == [True, True, False, False]
    directions = torch.nn.functional.normalize(torch.randn(64, 1, 2), dim=-1)
    for step in (1e-5, 1e-3, 0.1):
        assert (log_joint(mode + step * directions) < log_joint(mode)).all()


def test_variance() -> None:
    """τ² E‖v‖²/d, E‖v‖² = d (d + 1) for a Gamma(d) distance."""
    prior = Laplace().over(Blocks((Block("a", (2,)), Block("b", (), 0.0))))
    second = stats.gamma(3).moment(2) / 3
    assert prior.variance({"tau": torch.tensor([0.5, 2.0])}).tolist() == pytest.approx(
        [0.25 * second, 0.25 * second, 4 * second]
    )


def test_shared_sites_and_equality() -> None:
    prior = Laplace(sd_scale=0.5).over(Blocks((Block("weight", (2, 3)), Block("gate", (2,), 1.0))))
    assert {name: tuple(fn.event_shape) for name, fn in prior.shared.items()} == {"mu": (6,), "tau": (2,)}
    assert Radial(2) == Radial(2) and Radial(2) != Radial(3)
    with pytest.raises(ValueError, match="Laplace: expected sd_scale as a finite number > 0, got 0"):
        Laplace(sd_scale=0)


def test_the_inverse_has_the_inverse_slope() -> None:
    v = torch.tensor([1.0, -2.0, 0.3], dtype=torch.float64)
    radial = Radial(3)
    there = torch.autograd.functional.jacobian(radial._inverse, v)
    back = torch.autograd.functional.jacobian(radial._call, radial._inverse(v))
    torch.testing.assert_close(there @ back, torch.eye(3, dtype=torch.float64), atol=1e-6, rtol=0)
