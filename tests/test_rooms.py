"""The rooms are proved early: one short model for each protocol that the zoo will need, against known answers.

A MAML step is a `TaskGuide`, a Gaussian process with φ integrated out a `Predictive`, a conditional neural process a
`ConditionalModel`. None needs more than the protocol.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.stats import multivariate_normal
from torch import Tensor, nn

import bayesmeta as bm
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.gaussian import GaussianTasks
from bayesmeta.inference.objectives import Guides, Step, elbo
from bayesmeta.inference.protocols import Context, Predictive, TaskGuide
from bayesmeta.inference.shared import PointShared

NOISE = 0.3


def waves(count: int, rows: int, seed: int) -> bm.Tasks:
    """Few-shot sinusoids around one common wave."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-3, 3, size=(count, rows, 1))
    phase = rng.normal(1.0, 0.2, size=(count, 1))
    return bm.Tasks.from_arrays(list(x), list(np.sin(x[..., 0] + phase) + 0.1 * rng.normal(size=(count, rows))))


def basis(batch: bm.Batch) -> None:
    """A linear model on sines and cosines; its prior is wide and centred at 0, the tasks are not."""
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
        with batch.observations():
            x = batch.x[..., 0]
            pyro.sample("y", dist.Normal(phi[..., 0] * x.sin() + phi[..., 1] * x.cos(), 0.1), obs=batch.y)


class Maml(TaskGuide):
    """One plain gradient step from a learned start: φ' = φ₀ + α ∇ log p(φ₀, D)."""

    def attach(self, density: TaskDensity, tasks: bm.Tasks) -> None:
        self.density = density
        self.start = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.rate = nn.Parameter(torch.full((2,), 1e-4, dtype=torch.float64))

    def condition(self, theta: Tensor, context: Context, steps: int = 1) -> GaussianTasks:
        loc = self.start.expand(len(theta), len(context.batch), 2)
        values = dict(self.density.learned.values)
        for _ in range(steps):
            with torch.enable_grad():
                point = loc if loc.requires_grad else loc.detach().requires_grad_()
                log_p = self.density.log_task.mapped(theta, point, context.data, values, in_dims=(0, 0, None, None))
                loc = loc + self.rate * torch.autograd.grad(log_p.sum(), point, create_graph=True)[0]
        return GaussianTasks(loc, 20 * torch.eye(2, dtype=torch.float64).expand(*loc.shape, 2))


def test_a_maml_step_is_a_task_guide() -> None:
    tasks, new = waves(60, 5, 0), waves(40, 5, 1)
    density, guide = TaskDensity(basis, tasks), Maml()
    guide.attach(density, tasks)
    guides = Guides(PointShared(*density.prior_scale()), guide)
    batch, fresh = tasks.batch(slice(None)), new.batch(slice(None))
    adam = torch.optim.Adam([{"params": [guide.start], "lr": 0.02}, {"params": [guide.rate], "lr": 2e-5}])
    for _ in range(200):
        adam.zero_grad()
        loss, _ = elbo(density, guides, Step(guide.prepare(batch, density.tensors(batch)), len(tasks), 1))
        loss.backward()
        adam.step()

    def error(steps: int, start: Tensor | None = None) -> float:
        context = guide.prepare(fresh, density.tensors(fresh))
        learned = guide.start.data.clone()
        guide.start.data = learned if start is None else start
        noise = guide.condition(torch.zeros(1, 0, dtype=torch.float64), context, steps).loc.detach()[0]
        guide.start.data = learned
        phi = 3.0 * noise
        fitted = phi[:, :1] * fresh.x[..., 0].sin() + phi[:, 1:] * fresh.x[..., 0].cos()
        return float((fitted - fresh.y).square().mean().sqrt())

    origin = torch.zeros(2, dtype=torch.float64)
    assert error(1) < error(0) < error(0, origin), "a step beats the learned start, which beats the untrained one"
    assert error(1) < error(1, origin), "and the learned start beats the untrained one after a step too"
    common = 3.0 * guide.start.detach().numpy()
    np.testing.assert_allclose(common, [np.cos(1.0), np.sin(1.0)], atol=0.1)


def gaussian_process(theta: Any, phi: Any, context: bm.Batch, x: Tensor) -> torch.distributions.Distribution:
    """An exact GP with φ, the function, integrated out; its size is that of the episode. θ is the length scale."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-0.5 * ((a[..., :, None, 0] - b[..., None, :, 0]) / theta) ** 2)

    kept = context.mask.to(x.dtype)
    pairs = kept[..., :, None] * kept[..., None, :]
    noise = NOISE**2 * torch.eye(kept.shape[-1], dtype=x.dtype)
    gain = torch.linalg.solve(kernel(context.x, context.x) * pairs + noise, kernel(context.x, x) * kept[..., None]).mT
    cover = kernel(x, x) - gain @ (kernel(context.x, x) * kept[..., None])
    loc = (gain @ (context.y * kept)[..., None])[..., 0]
    return torch.distributions.MultivariateNormal(loc, cover + NOISE**2 * torch.eye(x.shape[1], dtype=x.dtype))


def functions(count: int, rows: int, seed: int) -> bm.Tasks:
    """Draws of a Gaussian process with length scale 1."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-2, 2, size=(count, rows, 1))
    covariance = np.exp(-0.5 * (x - x.swapaxes(1, 2)) ** 2) + NOISE**2 * np.eye(rows)
    y = (np.linalg.cholesky(covariance) @ rng.normal(size=(count, rows, 1)))[..., 0]
    return bm.Tasks.from_arrays(list(x), list(y), names=[f"{seed}.{i}" for i in range(count)])


def test_an_exact_gaussian_process_is_a_predictive() -> None:
    predictive: Predictive = gaussian_process
    context, target = functions(4, 9, 0).context_target(context=4, seed=0)
    context = bm.Tasks.from_arrays(
        [t.x[:n].numpy() for t, n in zip(context, (4, 3, 0, 1), strict=True)],
        [t.y[:n].numpy() for t, n in zip(context, (4, 3, 0, 1), strict=True)],
    )
    batch, new = context.batch(slice(None)), target.batch(slice(None))
    scores = predictive(torch.tensor(1.0), None, batch, new.x).log_prob(new.y)
    for task, held_out, score in zip(context, target, scores, strict=True):
        x = np.concatenate([task.x, held_out.x])[:, 0]
        y = np.concatenate([task.y, held_out.y])
        whole = np.exp(-0.5 * (x[:, None] - x) ** 2) + NOISE**2 * np.eye(len(x))
        n = len(task.y)
        before = multivariate_normal(np.zeros(n), whole[:n, :n]).logpdf(y[:n]) if n else 0.0
        assert abs(float(score) - (multivariate_normal(np.zeros(len(x)), whole).logpdf(y) - before)) < 1e-6


class Cnp(nn.Module):
    """A conditional neural process: rows are encoded, averaged, and decoded at each new x."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.rows = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.head = nn.Sequential(nn.Linear(width + 2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.out = nn.Linear(width, 2)

    def forward(self, context: bm.Batch, x: Tensor) -> torch.distributions.Distribution:
        encoded = self.rows(torch.cat([context.x, context.y[..., None]], -1)) * context.mask[..., None]
        count = context.mask.sum(-1, keepdim=True)
        summary = torch.cat([encoded.sum(1) / count.clamp(min=1), count / 10], -1)
        hidden = self.head(torch.cat([summary[:, None].expand(-1, x.shape[1], -1), x], -1))
        loc, spread = self.out(hidden).unbind(-1)
        return torch.distributions.Normal(loc, 0.1 + nn.functional.softplus(spread))


def test_a_conditional_neural_process_beats_the_trivial_one_and_never_the_oracle() -> None:
    torch.manual_seed(0)
    tasks, new = functions(400, 14, 1), functions(200, 14, 2)
    options = bm.Amortized(optimizer=bm.Optimizer(steps=1200, batch_tasks=64, lr=5e-3))
    fit = bm.fit(bm.ConditionalModel(Cnp(), context=(0, 10)), tasks, method=options, progress=False)
    trivial = torch.distributions.Normal(tasks.y.mean(), tasks.y.std())
    gains, gaps = [], []
    for size in (1, 4, 8):
        context, target = new.context_target(context=size, seed=0)
        learned = fit.predict(context, target, draws=1).log_prob().mean(1)
        batch, held_out = context.batch(slice(None)), target.batch(slice(None))
        exact = gaussian_process(torch.tensor(1.0), None, batch, held_out.x)
        oracle = torch.distributions.Normal(exact.mean, exact.stddev).log_prob(held_out.y).mean(1).numpy()
        gains.append(learned - trivial.log_prob(held_out.y).mean(1).numpy())
        gaps.append(oracle - learned)
    for gain, gap in zip(gains, gaps, strict=True):
        assert gain.mean() > 4 * gain.std() / np.sqrt(len(gain))
        assert gap.mean() > 0
    assert gains[0].mean() < gains[1].mean() < gains[2].mean()
