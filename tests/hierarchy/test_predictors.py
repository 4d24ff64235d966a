"""Predictors of rows: found where the Hessian is Gauss–Newton's, and the same curvature as without them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import bayesmeta as bm
from bayesmeta.hierarchy import derivatives
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.derivatives import curvature
from bayesmeta.hierarchy.predictors import predictor_of
from bayesmeta.hierarchy.simplify import simplify

TASKS, ROWS, DIM = 3, 7, 2
Likelihood = Callable[[Tensor, bm.Batch], dist.TorchDistribution]
LIKELIHOODS: dict[str, Likelihood] = {
    "normal": lambda f, batch: dist.Normal(f, 0.5),
    "bernoulli": lambda f, batch: dist.Bernoulli(logits=f),
    "poisson": lambda f, batch: dist.Poisson((0.3 * f).exp()),
    "student": lambda f, batch: dist.StudentT(4.0, f, 0.7),
    "binomial": lambda f, batch: dist.Binomial(batch["trials"], logits=f),
}
FACTORS: dict[str, Callable[[Tensor], Tensor]] = {
    "quantile": lambda u: -torch.maximum(0.9 * u, -0.1 * u),
    "linear": lambda u: 0.3 * u,
}
PREDICTORS: dict[str, Callable[[Tensor, bm.Batch], Tensor]] = {
    "line": lambda phi, batch: phi[..., 0] + phi[..., 1] * batch.x,
    "product": lambda phi, batch: (phi * torch.stack([batch.x, 1 - batch.x], -1)).sum(-1),
    "matrix": lambda phi, batch: (torch.stack([batch.x, 1 - batch.x], -1) @ phi.squeeze(1).unsqueeze(-1)).squeeze(-1),
    "sums": lambda phi, batch: (phi[..., 0] + phi[..., 1] * batch.x).cumsum(-1),
    "groups": lambda phi, batch: phi.squeeze(1).gather(-1, batch["group"]),
}


def make_tasks() -> bm.Tasks:
    rng = np.random.default_rng(0)
    sizes = [ROWS, ROWS - 3, ROWS - 1]
    columns = {
        "group": [rng.integers(DIM, size=n) for n in sizes],
        "trials": [np.full(n, 3.0) for n in sizes],
    }
    y = [rng.integers(2, size=n).astype(float) for n in sizes]
    return bm.Tasks.from_arrays([rng.normal(size=n) for n in sizes], y, columns=columns)


def density_of(likelihood: Likelihood, predictor: Callable[[Tensor, bm.Batch], Tensor]) -> TaskDensity:
    def model(batch: bm.Batch) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(mu, tau).expand([DIM]).to_event(1))
            with batch.observations():
                pyro.sample("y", likelihood(predictor(phi, batch), batch), obs=batch.y)

    return TaskDensity(model, make_tasks())


def curvatures(density: TaskDensity) -> tuple[fx.GraphModule, list[Tensor]]:
    tasks = make_tasks()
    data = density.tensors(tasks.batch(range(TASKS)))
    generator = torch.Generator().manual_seed(0)
    theta = torch.tensor([0.3, -0.4], dtype=torch.float64)
    noise = torch.randn(TASKS, DIM, generator=generator, dtype=torch.float64)
    graph = density.log_task.graph(theta, noise, data, {})
    assert isinstance(graph, fx.GraphModule)
    return graph, [theta, noise, *data.values()]


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_curvature_and_its_gradient_for_theta_are_those_of_autograd(
    likelihood: str, predictor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, leaves = curvatures(density_of(LIKELIHOODS[likelihood], PREDICTORS[predictor]))
    assert predictor_of(graph, 1) is not None

    def with_gradient() -> list[Tensor]:
        theta = leaves[0].clone().requires_grad_()
        found = curvature(graph, 1, theta, *leaves[1:])
        total = sum(weight * part.sin().sum() for weight, part in zip((1.0, 2.0, 3.0), found, strict=True))
        return [part.detach() for part in found] + list(torch.autograd.grad(total, theta))

    found = with_gradient()
    monkeypatch.setattr(derivatives, "predictor_of", lambda *_: None)
    for one, other in zip(found, with_gradient(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("factor", FACTORS)
def test_terms_without_curvature_have_none(factor: str) -> None:
    def model(batch: bm.Batch) -> None:
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0).expand([DIM]).to_event(1))
            with batch.observations():
                pyro.factor("y", FACTORS[factor](batch.y - PREDICTORS["line"](phi, batch)))

    density, tasks = TaskDensity(model, make_tasks()), make_tasks()
    noise = torch.randn(4, TASKS, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data = density.tensors(tasks.batch(range(TASKS)))
    hessian = density.log_task.curvature(noise.new_zeros(4, 0), noise, data, {}, in_dims=(0, 0, None, None))[2]
    torch.testing.assert_close(hessian, -torch.eye(DIM, dtype=torch.float64).expand_as(hessian))


@pytest.mark.parametrize(
    ("likelihood", "predictor"),
    [
        (LIKELIHOODS["normal"], lambda phi, batch: phi[..., 0] * (phi[..., 1] * batch.x).exp()),
        (lambda f, batch: dist.Normal(f[0], f[1].exp()), lambda phi, batch: (phi[..., 0] * batch.x, phi[..., 1])),
        (lambda f, batch: dist.Normal(f, (0.1 * f.mean(-1, keepdim=True)).exp()), PREDICTORS["line"]),
        (lambda f, batch: dist.Normal(f.roll(1, -1), 1.0 + f.square()), PREDICTORS["line"]),
    ],
    ids=["not linear", "two numbers a row", "mean of rows", "neighbours"],
)
def test_what_is_no_sum_over_functions_of_one_linear_number_is_left_alone(
    likelihood: Likelihood, predictor: Callable[[Tensor, bm.Batch], Tensor]
) -> None:
    graph, leaves = curvatures(density_of(likelihood, predictor))
    assert predictor_of(graph, 1) is None
    assert torch.isfinite(curvature(graph, 1, *leaves)[2]).all()


def test_a_prior_that_multiplies_the_rows_is_left_alone() -> None:
    x = torch.linspace(-1, 1, 5, dtype=torch.float64).expand(2, 5).contiguous()
    z = torch.ones(2, 3, dtype=torch.float64)

    def joint(z: Tensor, x: Tensor, *, mixed: bool) -> Tensor:
        rows = torch.exp(z[:, :1] * x).sum(-1)
        return rows * z[:, 1] if mixed else rows + z[:, 1].square()

    for mixed in (False, True):
        graph = simplify(make_fx(functools.partial(joint, mixed=mixed))(z, x))
        assert (predictor_of(graph, 0) is None) == mixed


def test_as_many_tasks_as_rows_are_not_confused() -> None:
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = torch.ones(4, 2, dtype=torch.float64)
    graph = simplify(make_fx(lambda z, x: torch.exp(z[:, :1] * x).sum(0))(z, x))
    assert predictor_of(graph, 0) is None
