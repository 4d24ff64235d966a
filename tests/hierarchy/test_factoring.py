"""A covariance without a Cholesky factor: density 0 in recorded graphs, in whatever way they are run."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import bayesmeta as bm
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


def test_a_fit_survives_singular_covariances() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(6, 8, 1, generator=generator, dtype=torch.float64) * 4 - 2
    y = torch.sin(2 * x[..., 0] + torch.arange(6).unsqueeze(-1))
    tasks = bm.Tasks.from_arrays(list(x.numpy()), list(y.numpy()))
    fit = bm.fit(smooth, tasks, method=bm.Marginal(shared="map", chains=1, draws=50), progress=False)
    assert torch.isfinite(torch.as_tensor(fit.shared.mean("centre"))).all()
