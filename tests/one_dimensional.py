"""Hierarchies with one θ and one φ a task whose answers come from quadrature, and a guide that misses them.

mu ~ N(0, WIDE²), z_i ~ N(0, 1), φ_i = mu + TAU z_i. Counts: y_ij ~ Poisson(e^φ). Squares:
y_ij ~ N((φ_i + LEAN)², NOISE²), which has two modes that weigh differently.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.special import logsumexp
from scipy.stats import norm, poisson
from torch import Tensor

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.gaussian import GaussianTasks
from bayesmeta.inference.objectives import Guides
from bayesmeta.inference.protocols import Context, TaskGuide
from bayesmeta.inference.shared import NormalShared

WIDE, LEAN, NOISE = 1.5, 0.15, 0.6
TAU = {"counts": 0.5, "squares": 1.0}
COUNTS: dict[str, list[float]] = {"a": [0, 1, 0], "b": [4], "c": [0, 0, 0, 0], "d": [7, 5, 9], "e": [2, 1]}
SQUARES: dict[str, list[float]] = {"p": [2.1, 2.9, 2.4], "q": [1.6, 1.3], "r": [3.2, 4.1]}
LOG_LIKELIHOODS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "counts": lambda y, phi: poisson.logpmf(y, np.exp(phi)),
    "squares": lambda y, phi: norm.logpdf(y, (phi + LEAN) ** 2, NOISE),
}
MU, Z = np.linspace(-7, 7, 561), np.linspace(-7, 7, 1121)


def counts(batch: Batch) -> None:
    """Counts with a log rate for each task."""
    mu = pyro.sample("mu", dist.Normal(0.0, WIDE))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(mu, TAU["counts"]))
        with batch.observations():
            pyro.sample("y", dist.Poisson(phi.exp()), obs=batch.y)


def squares(batch: Batch) -> None:
    """Noisy squares: the sign of φ is only known through its prior."""
    mu = pyro.sample("mu", dist.Normal(0.0, WIDE))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(mu, TAU["squares"]))
        with batch.observations():
            pyro.sample("y", dist.Normal((phi + LEAN).square(), NOISE), obs=batch.y)


MODELS = {"counts": counts, "squares": squares}


def make_tasks(rows: dict[str, list[float]]) -> Tasks:
    """Tasks without inputs."""
    return Tasks.from_arrays(None, [np.array(y, dtype=float) for y in rows.values()], names=list(rows))


@functools.cache
def density(kind: str) -> TaskDensity:
    """The model, read and recorded once."""
    return TaskDensity(MODELS[kind], make_tasks(COUNTS))


def phi_grid(kind: str, mu: np.ndarray = MU) -> np.ndarray:
    """φ on the grid `(mu, z)`."""
    return mu[:, None] + TAU[kind] * Z


def log_joint(kind: str, rows: Sequence[float], mu: np.ndarray = MU) -> np.ndarray:
    """Log p(z, D | mu) on the grid `(mu, z)`."""
    phi = phi_grid(kind, mu)
    rows_there = [LOG_LIKELIHOODS[kind](np.float64(y), phi) for y in rows]
    return norm.logpdf(Z) + np.sum(rows_there, 0)


def log_evidence(kind: str, rows: Sequence[float], mu: np.ndarray = MU) -> np.ndarray:
    """Log p(D | mu) `(mu,)`."""
    return logsumexp(log_joint(kind, rows, mu), axis=1) + np.log(Z[1] - Z[0])


def log_theta(kind: str, rows: dict[str, list[float]]) -> np.ndarray:
    """The log posterior of mu on the grid, normalised to sum to one."""
    found = norm.logpdf(MU, 0, WIDE) + sum(log_evidence(kind, y) for y in rows.values())
    return found - logsumexp(found)


def answer(kind: str, rows: dict[str, list[float]], task: Sequence[float]) -> tuple[float, float]:
    """Mean and sd of φ of a task of which θ, given by `rows`, has learned."""
    joint = log_joint(kind, task)
    weight = np.exp(log_theta(kind, rows)[:, None] + joint - logsumexp(joint, axis=1, keepdims=True))
    phi = phi_grid(kind)
    mean = float((weight * phi).sum() / weight.sum())
    return mean, float(np.sqrt((weight * (phi - mean) ** 2).sum() / weight.sum()))


def plugged_in(kind: str, rows: dict[str, list[float]], task: Sequence[float]) -> tuple[float, float]:
    """The same with mu at its posterior mean."""
    mu = np.array([np.exp(log_theta(kind, rows)) @ MU])
    weight = np.exp(log_joint(kind, task, mu)[0])
    weight /= weight.sum()
    phi = phi_grid(kind, mu)[0]
    return float(weight @ phi), float(np.sqrt(weight @ (phi - weight @ phi) ** 2))


def theta_draws(kind: str, rows: dict[str, list[float]], count: int) -> Tensor:
    """Equally weighted draws of the posterior of mu `(count, 1)`, as even as draws can be, in random order."""
    cumulative = np.cumsum(np.exp(log_theta(kind, rows)))
    points = np.interp((np.arange(count) + 0.5) / count, cumulative, MU + (MU[1] - MU[0]) / 2)
    return torch.as_tensor(np.random.default_rng(0).permutation(points)).unsqueeze(1)


class Missing(TaskGuide):
    """Sees no data: narrow, wherever it is told to stand."""

    def __init__(self, place: float = -2.0, width: float = 0.1) -> None:
        super().__init__()
        self.place, self.width = place, width

    def condition(self, theta: Tensor, context: Context) -> GaussianTasks:
        loc = theta.new_full((len(theta), len(context.batch.names), 1), self.place)
        return GaussianTasks(loc, torch.full_like(loc, 1 / self.width).unsqueeze(-1))


def guides(task: TaskGuide | None = None) -> Guides:
    """Guides that miss; q(θ) is not used."""
    return Guides(NormalShared(torch.zeros(1), torch.ones(1)), task or Missing())


def conditional(kind: str, y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of φ at every mu of the grid."""
    weight = np.exp(log_joint(kind, y))
    weight /= weight.sum(1, keepdims=True)
    phi = phi_grid(kind)
    mean = (weight * phi).sum(1)
    return mean, (weight * (phi - mean[:, None]) ** 2).sum(1)


def phi_draws(kind: str, drawn: Any, place: int) -> np.ndarray:
    """The chosen draws of φ of one task of a part."""
    index = torch.as_tensor(drawn.index[:, place].copy())
    return (drawn.theta[index, 0] + TAU[kind] * drawn.noise[index, place, 0]).numpy()


def moments(kind: str, drawn: Any, place: int) -> tuple[float, float]:
    """Mean and sd of φ over the chosen draws of one task of a part."""
    phi = phi_draws(kind, drawn, place)
    return float(phi.mean()), float(phi.std())


def agrees(found: tuple[float, float], exact: tuple[float, float], effective: float) -> bool:
    """Whether a mean and an sd are within four standard errors of so many draws (the sd's for kurtosis up to 5)."""
    z_mean = abs(found[0] - exact[0]) / exact[1] * np.sqrt(effective)
    z_sd = abs(found[1] / exact[1] - 1) * np.sqrt(effective)
    return bool(z_mean < 4 and z_sd < 4)
