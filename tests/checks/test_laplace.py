"""Newton's modes and evidence against closed forms and a slow optimiser."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from bayesmeta.checks.laplace import laplace, log_likelihood
from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity

SIZES = (0, 1, 3, 20)


def tasks(*, binary: bool = False) -> Tasks:
    generator = np.random.default_rng(0)
    x = [generator.standard_normal((n, 1)) for n in SIZES]
    y = [0.5 + 2 * a[:, 0] + 0.3 * generator.standard_normal(len(a)) for a in x]
    return Tasks.from_arrays(x, [(v > 0).astype(int) if binary else v for v in y], names=list("abcd"))


def linear(batch: Batch) -> None:
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(torch.tensor([1.0, -1.0]), torch.tensor([10.0, 3.0])).to_event(1))
        with batch.observations():
            pyro.sample("y", dist.Normal(phi[..., 0] + phi[..., 1] * batch.x[..., 0], sigma), obs=batch.y)


def logistic(batch: Batch) -> None:
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        with batch.observations():
            logits = phi[..., 0] + phi[..., 1] * batch.x[..., 0]
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=batch.y.to(logits.dtype))


def test_linear_gaussian_evidence_is_exact_at_every_theta() -> None:
    data = tasks()
    density = TaskDensity(linear, data)
    theta = torch.tensor([[-1.0], [0.0], [0.7]], dtype=torch.float64)
    found = laplace(density, data, theta)
    prior = torch.tensor([10.0, 3.0], dtype=torch.float64)
    for s, log_sigma in enumerate(theta[:, 0]):
        for i, (start, stop) in enumerate(zip(data.offsets.tolist(), data.offsets.tolist()[1:], strict=False)):
            design = torch.cat([torch.ones(stop - start, 1).double(), data.x[start:stop]], 1) * prior
            covariance = design @ design.mT + (2 * log_sigma).exp() * torch.eye(stop - start).double()
            mean = design @ (torch.tensor([1.0, -1.0]).double() / prior)
            exact = dist.MultivariateNormal(mean, covariance).log_prob(data.y[start:stop]) if stop > start else 0.0
            assert float(found.log_evidence[s, i]) == pytest.approx(float(exact), abs=1e-5)


def test_logistic_modes_have_no_gradient() -> None:
    data = tasks(binary=True)
    density = TaskDensity(logistic, data)
    found = laplace(density, data, torch.zeros(1, 0, dtype=torch.float64)).posterior
    batch = data.batch(np.arange(4))
    noise = found.loc.clone().requires_grad_()
    value = density.log_task.mapped(
        torch.zeros(1, 0, dtype=torch.float64), noise, density.tensors(batch), {}, in_dims=(0, 0, None, None)
    )
    (gradient,) = torch.autograd.grad(value.sum(), noise)
    assert float(gradient.abs().max()) < 1e-4
    assert found.loc[0, 0].abs().max() == 0
    torch.testing.assert_close(found.factor[0, 0], torch.eye(2).double(), atol=1e-6, rtol=0)


def test_log_likelihood_of_draws() -> None:
    data = tasks()
    density = TaskDensity(linear, data)
    theta, noise = torch.zeros(150, 1, dtype=torch.float64), torch.zeros(150, 4, 2, dtype=torch.float64)
    found = log_likelihood(density, data, theta, noise)
    assert found.shape == (150, 4)
    row = data.y[0] - (1.0 - data.x[0, 0])
    assert float(found[149, 1]) == pytest.approx(float(-0.5 * row**2 - 0.5 * math.log(2 * math.pi)))
    assert float(found[0, 0]) == 0.0
