"""A covariance without a Cholesky factor: density 0 in recorded graphs, in whatever way they are run."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import bayesmeta as bm
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.recording import Recorded


def log_density(shift: Tensor, y: Tensor) -> Tensor:
    """Normal with covariance I + shift · 11ᵀ, which has no factor for shift ≤ -1/3."""
    covariance = torch.eye(3, dtype=y.dtype) + shift * torch.ones(3, 3, dtype=y.dtype)
    fn: Any = dist.MultivariateNormal(torch.zeros(3, dtype=y.dtype), covariance, validate_args=False)
    return fn.log_prob(y)  # type: ignore[no-any-return]


SHIFTS = torch.tensor([0.5, -0.9, 0.1], dtype=torch.float64)
Y = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)


def test_one_point_without_a_factor_leaves_the_others_alone() -> None:
    recorded = Recorded(log_density)
    want = torch.stack([log_density(SHIFTS[0], Y), torch.tensor(-torch.inf), log_density(SHIFTS[2], Y)])
    torch.testing.assert_close(recorded.mapped(SHIFTS, Y, in_dims=(0, None)), want)
    torch.testing.assert_close(recorded(SHIFTS[1], Y), want[1])
    assert set(recorded.status.values()) == {"recorded"}
    with pytest.raises(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        log_density(SHIFTS[1], Y)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_the_others_are_those_of_autograd(compiled: bool) -> None:
    value, (gradient,) = Recorded(log_density).gradient(SHIFTS, Y, in_dims=(0, None), wrt=(0,), compiled=compiled)
    moving = SHIFTS[[0, 2]].clone().requires_grad_()
    torch.stack([log_density(shift, Y) for shift in moving]).sum().backward()
    torch.testing.assert_close(gradient[[0, 2]], moving.grad)
    assert value[1] == -torch.inf


def alike(rho: Tensor, z: Tensor) -> Tensor:
    """A covariance whose second pivot is exactly 0 for ρ = 1."""
    return (1 - rho) * torch.eye(3, dtype=z.dtype) + rho * torch.ones(3, 3, dtype=z.dtype)


def normal(rho: Tensor, z: Tensor) -> Tensor:
    fn: Any = dist.MultivariateNormal(torch.zeros(3, dtype=z.dtype), alike(rho, z), validate_args=False)
    return fn.log_prob(z)  # type: ignore[no-any-return]


def labels(rho: Tensor, z: Tensor) -> Tensor:
    """Labels that latent values from noise decide: sure, were these infinite."""
    latent = torch.linalg.cholesky(alike(rho, z)) @ z
    return torch.where(z > 0, latent.sigmoid(), 1 - latent.sigmoid()).log().sum()


def solved(rho: Tensor, z: Tensor) -> Tensor:
    """A regression on other rows, no density of theirs: its mean would be 0, were the factor infinite."""
    factor = torch.linalg.cholesky(alike(rho, z))
    return -torch.cholesky_solve(z.unsqueeze(-1), factor).square().sum()


RHO = torch.tensor([0.5, 1.0, 0.2], dtype=torch.float64)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_pivot_of_zero_has_no_slope(compiled: bool) -> None:
    """Weight 0 times a slope that is no number would be the end of a sum over points."""
    value, (gradient,) = Recorded(normal).gradient(RHO, Y, in_dims=(0, None), wrt=(0,), compiled=compiled)
    assert value[1] == -torch.inf and gradient[1] == 0 and gradient.isfinite().all()


@pytest.mark.parametrize("function", [labels, solved])
def test_what_is_computed_with_no_factor_is_no_number(function: Any) -> None:
    value = Recorded(function).mapped(RHO, Y, in_dims=(0, None))
    assert value[1].isnan()
    torch.testing.assert_close(value[[0, 2]], torch.stack([function(rho, Y) for rho in RHO[[0, 2]]]))


@pytest.mark.parametrize("function", [normal, labels])
def test_where_there_is_a_factor_no_digit_changes(function: Any) -> None:
    found, as_it_was = Recorded(function), Recorded(function, strict=True)
    for one, two in zip(
        found.gradient(RHO[[0, 2]], Y, in_dims=(0, None)),
        as_it_was.gradient(RHO[[0, 2]], Y, in_dims=(0, None)),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    for one, two in zip(found.curvature(RHO[0], Y), as_it_was.curvature(RHO[0], Y), strict=True):
        assert torch.equal(one, two)


def test_a_graph_may_be_recorded_where_there_is_no_factor() -> None:
    recorded = Recorded(normal)
    value = recorded.mapped(RHO[[1, 0, 2]], Y, in_dims=(0, None))
    assert set(recorded.status.values()) == {"recorded"} and value[0] == -torch.inf
    torch.testing.assert_close(value[1:], torch.stack([normal(rho, Y) for rho in RHO[[0, 2]]]))


def test_a_strict_graph_refuses() -> None:
    recorded = Recorded(labels, strict=True)
    recorded.mapped(RHO[[0, 2]], Y, in_dims=(0, None))
    assert set(recorded.status.values()) == {"recorded"}
    with pytest.raises(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        recorded.mapped(RHO[:2], Y, in_dims=(0, None))


def gaussian_processes() -> bm.Tasks:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(6, 8, 1, generator=generator, dtype=torch.float64) * 4 - 2
    y = torch.sin(2 * x[..., 0] + torch.arange(6).unsqueeze(-1))
    return bm.Tasks.from_arrays(list(x.numpy()), list(y.numpy()))


def smooth(batch: bm.Batch) -> None:
    """A Gaussian process whose length and scale have wide priors: far points have singular covariances."""
    import pyro

    centre = pyro.sample("centre", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(centre, 1.5).to_event(1))
        apart = (batch.x - batch.x.mT) / phi[..., :1].exp()
        covariance = phi[..., 1:].exp() ** 2 * torch.exp(-0.5 * apart**2) + 1e-6 * torch.eye(batch.x.shape[1])
        pyro.sample(
            "y",
            dist.MultivariateNormal(torch.zeros(batch.x.shape[1]), covariance.unsqueeze(1)),
            obs=batch.y.unsqueeze(1),
        )


def test_densities_are_0_where_predictions_refuse() -> None:
    density = TaskDensity(smooth, gaussian_processes())
    data = density.tensors(gaussian_processes().batch(slice(None)))
    far = torch.full((1, 6, 2), 200.0, dtype=torch.float64)
    args = (density.initial_theta().unsqueeze(0), far, data, dict(density.learned.values))
    by_draw = (0, 0, None, None)
    assert (density.log_task.mapped(*args, in_dims=by_draw) == -torch.inf).all()
    with pytest.raises(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        density.normals.mapped(*args, in_dims=by_draw)


def test_a_fit_survives_singular_covariances() -> None:
    tasks = gaussian_processes()
    with pytest.warns(UserWarning, match="is not finite at some θ near it, so that its error is not known"):
        fit = bm.fit(smooth, tasks, method=bm.Marginal(shared="map", chains=1, draws=50), progress=False)
    assert torch.isfinite(torch.as_tensor(fit.shared.mean("centre"))).all()
