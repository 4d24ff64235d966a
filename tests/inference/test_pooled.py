"""Pooled guides against the exact posterior of linear Gaussian tasks, and what must not change their answer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.objectives import Guides, Step, elbo
from bayesmeta.inference.pooled import PooledGuide, precision_factor
from bayesmeta.inference.shared import NormalShared

SIGMA = 0.5
ENCODERS = ["deepset", "attention"]


def linear(batch: Any) -> None:
    """Intercept and slope of each task; the shared mean is known to be within one of zero."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(mu, 1.0).to_event(1))
        with batch.observations():
            pyro.sample("y", dist.Normal(phi[..., 0] + phi[..., 1] * batch.x[..., 0], SIGMA), obs=batch.y)


def known_prior(batch: Any) -> None:
    """The same without anything shared."""
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with batch.observations():
            pyro.sample("y", dist.Normal(phi[..., 0] + phi[..., 1] * batch.x[..., 0], SIGMA), obs=batch.y)


def linear_tasks(sizes: list[int], seed: int = 0, weighted: bool = False) -> Tasks:
    rng = np.random.default_rng(seed)
    x = [rng.normal(size=(n, 1)) for n in sizes]
    y = [rng.normal() + rng.normal() * rows[:, 0] + SIGMA * rng.normal(size=len(rows)) for rows in x]
    return Tasks.from_arrays(x, y, weight=[np.ones(n) for n in sizes] if weighted else None)


class MeanOfRows(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 8)

    def forward(self, rows: Tensor, mask: Tensor) -> Tensor:
        kept = self.layer(rows).tanh() * mask.unsqueeze(-1)
        return kept.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def attached(encoder: Any, tasks: Tasks, model: Any = linear, *, shake: bool = True) -> tuple[PooledGuide, TaskDensity]:
    """A guide; `shake` fills the zero layers of its start with noise, so that it depends on the data."""
    density = TaskDensity(model, tasks)
    guide = PooledGuide(encoder=encoder)
    guide.attach(density, tasks)
    if shake:
        with torch.no_grad():
            for parameter in guide.head.parameters():
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return guide, density


def answer(guide: PooledGuide, density: TaskDensity, batch: Any, theta: Tensor) -> Tensor:
    with torch.no_grad():
        posterior = guide.condition(theta, guide.prepare(batch, density.tensors(batch)))
    return torch.cat([posterior.loc, posterior.factor.flatten(2)], -1)


def exact_kl(guide: PooledGuide, density: TaskDensity, tasks: Tasks, theta: Tensor) -> Tensor:
    """KL(q || p) of each θ and task, `(S, T)`; whitened φ is φ − μ here."""
    batch = tasks.batch(range(len(tasks)))
    with torch.no_grad():
        posterior = guide.condition(theta, guide.prepare(batch, density.tensors(batch)))
    mask = batch.mask.double()
    design = torch.stack([mask, mask * batch.x[..., 0]], -1)
    precision = torch.eye(2) + design.mT @ design / SIGMA**2
    mu = theta if theta.shape[1] else theta.new_zeros(len(theta), 2)
    residual = (mask * batch.y).unsqueeze(0) - torch.einsum("tnk,sk->stn", design, mu)
    loc = torch.einsum("tij,tnj,stn->sti", precision.inverse(), design, residual / SIGMA**2)
    covariance = torch.linalg.inv(posterior.factor @ posterior.factor.mT)
    away = posterior.loc - loc
    trace = (precision * covariance).sum((-1, -2)) + torch.einsum("sti,tij,stj->st", away, precision, away)
    return 0.5 * (trace - 2 - precision.logdet() - covariance.logdet())


def train(guide: PooledGuide, density: TaskDensity, tasks: Tasks, *, steps: int, lr: float = 2e-2) -> None:
    """Learns q(φ | D, θ) with θ drawn from its prior."""
    shared = NormalShared(*density.prior_scale())
    with torch.no_grad():
        shared.log_diagonal.zero_()
    guides = Guides(shared, guide)
    guide.follow(*shared.centre())
    batch = tasks.batch(range(len(tasks)))
    data = density.tensors(batch)
    adam = torch.optim.Adam(guide.parameters(), lr=lr, betas=(0.9, 0.99), fused=True)
    for step in range(steps):
        adam.param_groups[0]["lr"] = lr * min(1.0, 20 * (step + 1) / steps) * (1 - step / steps)
        adam.zero_grad()
        elbo(density, guides, Step(guide.prepare(batch, data), len(tasks)))[0].backward()
        adam.step()


@pytest.mark.parametrize("encoder", ENCODERS)
def test_learns_the_exact_posterior_given_theta(encoder: str) -> None:
    tasks = linear_tasks([i % 5 for i in range(60)])
    guide, density = attached(encoder, tasks, shake=False)
    theta = torch.randn(50, 2, dtype=torch.float64)
    before = exact_kl(guide, density, tasks, theta)
    train(guide, density, tasks, steps=250)
    after = exact_kl(guide, density, tasks, theta)
    assert before.mean() > 3
    assert after.mean() < 0.05 * before.mean()
    assert (after[:, tasks.sizes == 0]).abs().max() < 1e-12


@pytest.mark.parametrize("encoder", ENCODERS)
def test_works_without_shared_parameters(encoder: str) -> None:
    tasks = linear_tasks([i % 5 for i in range(60)])
    guide, density = attached(encoder, tasks, known_prior, shake=False)
    none = torch.zeros(1, 0, dtype=torch.float64)
    before = exact_kl(guide, density, tasks, none)
    train(guide, density, tasks, steps=150)
    assert exact_kl(guide, density, tasks, none).mean() < 0.05 * before.mean()


@pytest.mark.parametrize("encoder", [*ENCODERS, MeanOfRows(2)])
class TestInvariances:
    def test_starts_at_the_prior(self, encoder: Any) -> None:
        tasks = linear_tasks([3, 1, 4])
        guide, density = attached(encoder, tasks, shake=False)
        out = answer(guide, density, tasks.batch(range(3)), torch.randn(2, 2, dtype=torch.float64))
        assert torch.equal(out, torch.tensor([0.0, 0, 1, 0, 0, 1]).double().expand(2, 3, -1))

    def test_no_rows_is_exactly_the_prior(self, encoder: Any) -> None:
        tasks = linear_tasks([3, 0, 4])
        guide, density = attached(encoder, tasks)
        theta = torch.randn(2, 2, dtype=torch.float64)
        for index in ([1], [0, 1, 2]):
            out = answer(guide, density, tasks.batch(index), theta)
            assert torch.equal(out[:, index.index(1)], torch.tensor([0.0, 0, 1, 0, 0, 1]).double().expand(2, -1))
            assert torch.isfinite(out).all()
        assert (out[:, 0, :2].abs() > 1e-3).any(), "with rows it must have left the prior, or the test shows nothing"

    def test_gradients_are_finite_where_a_task_has_no_rows(self, encoder: Any) -> None:
        tasks = linear_tasks([3, 0, 4])
        guide, density = attached(encoder, tasks)
        batch = tasks.batch(range(3))
        posterior = guide(torch.randn(2, 2, dtype=torch.float64), guide.prepare(batch, density.tensors(batch)))
        posterior.sample().sum().backward()
        gradients = [p.grad for p in guide.parameters() if p.grad is not None]
        assert gradients and all(torch.isfinite(g).all() for g in gradients)

    def test_order_of_rows_does_not_matter(self, encoder: Any) -> None:
        tasks = linear_tasks([5, 3])
        x, y = ([a.numpy() for a in flat.split([5, 3])] for flat in (tasks.x, tasks.y))
        turned = Tasks.from_arrays([a[::-1].copy() for a in x], [a[::-1].copy() for a in y])
        guide, density = attached(encoder, tasks)
        theta = torch.randn(2, 2, dtype=torch.float64)
        first, second = (answer(guide, density, t.batch([0, 1]), theta) for t in (tasks, turned))
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)

    def test_padding_and_other_tasks_do_not_matter(self, encoder: Any) -> None:
        tasks = linear_tasks([2, 7, 4])
        guide, density = attached(encoder, tasks)
        theta = torch.randn(2, 2, dtype=torch.float64)
        together = answer(guide, density, tasks.batch([0, 1, 2], rows=16), theta)
        for i in range(3):
            torch.testing.assert_close(
                answer(guide, density, tasks.batch([i]), theta)[:, 0], together[:, i], rtol=1e-5, atol=1e-6
            )

    def test_data_and_theta_matter(self, encoder: Any) -> None:
        tasks = linear_tasks([4, 4])
        guide, density = attached(encoder, tasks)
        out = answer(guide, density, tasks.batch([0, 1]), torch.randn(2, 2, dtype=torch.float64))
        assert (out[0, 0] - out[0, 1]).abs().max() > 1e-3
        assert (out[0, 0] - out[1, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_weight_of_two_is_a_row_twice_and_of_zero_no_row(encoder: str) -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(3, 1)), rng.normal(size=3)
    tasks = Tasks.from_arrays([x, x, x[:1]], [y, y, y[:1]], weight=[np.array([2.0, 1, 0]), np.ones(3), np.zeros(1)])
    repeated = Tasks.from_arrays([x[[0, 0, 1]]], [y[[0, 0, 1]]], weight=[np.ones(3)])
    guide, density = attached(encoder, tasks)
    theta = torch.randn(2, 2, dtype=torch.float64)
    weighted = answer(guide, density, tasks.batch([0, 1, 2]), theta)
    torch.testing.assert_close(
        weighted[:, :1], answer(guide, density, repeated.batch([0]), theta), rtol=1e-5, atol=1e-6
    )
    assert torch.equal(weighted[:, 2], torch.tensor([0.0, 0, 1, 0, 0, 1]).double().expand(2, -1))


def test_a_module_sees_the_weights_and_is_not_changed() -> None:
    given = MeanOfRows(3)
    before = given.layer.weight.clone()
    guide, density = attached(given, linear_tasks([3, 4], weighted=True))
    train(guide, density, linear_tasks([3, 4], weighted=True), steps=2)
    assert torch.equal(given.layer.weight, before)
    assert any("encoder.module.layer" in name for name, _ in guide.named_parameters())


def test_wrong_encoders_are_named() -> None:
    with pytest.raises(ValueError, match=r"encoder must be one of \['attention', 'deepset'\] or a module, got 'lstm'"):
        PooledGuide(encoder="lstm")

    class NoPooling(nn.Module):
        def forward(self, rows: Tensor, mask: Tensor) -> Tensor:
            return rows

    with pytest.raises(ValueError, match=r"shape \(2, k\); got \(2, 4, 2\)\. Pool over the rows"):
        attached(NoPooling(), linear_tasks([3, 4]))


def test_precision_factor_fills_rows() -> None:
    values = torch.tensor([0.0, 2.0, math.log(3.0), 4.0, 5.0, 0.0])
    expected = torch.tensor([[1.0, 0, 0], [2, 3, 0], [4, 5, 1]])
    torch.testing.assert_close(precision_factor(values, 3), expected)
