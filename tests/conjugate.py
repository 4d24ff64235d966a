"""A conjugate hierarchy whose every answer is a formula, and guides that need no training, for tests of inference.

mu ~ N(0, WIDE²), a_i ~ N(mu, TAU²), y_ij ~ N(a_i, SIGMA²). The unconstrained θ is mu, the noise of a task (a − mu)/TAU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.func import functional_call

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.fitting import Fit, fit
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.amortized import Amortized
from bayesmeta.inference.objectives import Guides
from bayesmeta.inference.protocols import Context, TaskGuide, TaskPosterior
from bayesmeta.inference.shared import NormalShared
from bayesmeta.inference.training import Optimizer

TAU, SIGMA, WIDE = 1.0, 0.8, 3.0
ROWS: dict[str, list[float]] = {
    "a": [1.2, 0.4, 2.1],
    "b": [-0.3, 0.8],
    "c": [2.5, 1.9, 3.0, 2.2, 2.0, 2.7],
    "d": [0.1],
    "e": [1.0, 1.4, 0.2],
}


def centre(batch: Batch) -> None:
    """Means of tasks around a shared mean."""
    mu = pyro.sample("mu", dist.Normal(0.0, WIDE))
    with batch.tasks():
        a = pyro.sample("a", dist.Normal(mu, TAU))
        with batch.observations():
            pyro.sample("y", dist.Normal(a, SIGMA), obs=batch.y)


def known_mean(batch: Batch) -> None:
    """The same with mu = 0 known: no shared site."""
    with batch.tasks():
        a = pyro.sample("a", dist.Normal(0.0, TAU))
        with batch.observations():
            pyro.sample("y", dist.Normal(a, SIGMA), obs=batch.y)


def make_tasks(rows: dict[str, Sequence[float]], **options: Any) -> Tasks:
    """Tasks without inputs."""
    return Tasks.from_arrays(None, [np.array(y, dtype=float) for y in rows.values()], names=list(rows), **options)


def exact(
    rows: dict[str, Sequence[float]], weights: Sequence[np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Exact posterior mean and covariance of (a of every task, mu); `weights` multiply rows' log likelihoods."""
    count = len(rows)
    precision, right = np.zeros((count + 1, count + 1)), np.zeros(count + 1)
    precision[-1, -1] = 1 / WIDE**2 + count / TAU**2
    for i, y in enumerate(rows.values()):
        weight = np.ones(len(y)) if weights is None else np.asarray(weights[i])
        precision[i, i] = 1 / TAU**2 + weight.sum() / SIGMA**2
        precision[i, -1] = precision[-1, i] = -1 / TAU**2
        right[i] = (weight * np.asarray(y)).sum() / SIGMA**2
    covariance = np.linalg.inv(precision)
    return covariance @ right, covariance


def conditional(rows: dict[str, Sequence[float]], mu: Any) -> tuple[np.ndarray, np.ndarray]:
    """Exact mean and sd of a given mu: `(*mu, T)` and `(T,)`."""
    sizes = np.array([len(y) for y in rows.values()])
    sums = np.array([sum(y) for y in rows.values()])
    precision = 1 / TAU**2 + sizes / SIGMA**2
    return (np.asarray(mu)[..., None] / TAU**2 + sums / SIGMA**2) / precision, precision**-0.5


def evidence(rows: dict[str, Sequence[float]], mu: Any) -> np.ndarray:
    """Exact log p(D_i | mu): `(*mu, T)`."""
    found = []
    for y in (np.asarray(y) for y in rows.values()):
        covariance = SIGMA**2 * np.eye(len(y)) + TAU**2
        off = y - np.asarray(mu)[..., None]
        quadratic = np.einsum("...i,ij,...j->...", off, np.linalg.inv(covariance), off)
        found.append(-0.5 * (quadratic + np.linalg.slogdet(2 * np.pi * covariance)[1]))
    return np.stack(found, -1)


class Normals:
    """Independent normals `(S, T, 1)`; the heavy version is a t(5)."""

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        self._light, self._heavy = dist.Normal(loc, scale), dist.StudentT(5.0, loc, scale)

    def sample(self, *, heavy: bool = False) -> Tensor:
        return (self._heavy if heavy else self._light).rsample()

    def log_prob(self, noise: Tensor, *, heavy: bool = False) -> Tensor:
        return (self._heavy if heavy else self._light).log_prob(noise).sum(-1)


class ExactGuide(TaskGuide):
    """The exact posterior of the noise, moved by `shift` of its sds and made `width` times as wide."""

    def __init__(self, shift: float = 0.0, width: float = 1.0) -> None:
        super().__init__()
        self.shift, self.width = shift, width

    def condition(self, theta: Tensor, context: Context) -> Normals:
        batch = context.batch
        precision = 1 + batch.n * (TAU / SIGMA) ** 2
        sums = (batch.y * batch.mask).sum(-1) - batch.n * theta
        sd = precision.sqrt().reciprocal()
        loc = sums * TAU / SIGMA**2 / precision + self.shift * sd
        return Normals(loc.unsqueeze(-1), (self.width * sd).expand(loc.shape).unsqueeze(-1))


def exact_guides(rows: dict[str, Sequence[float]], *, shift: float = 0.0, width: float = 1.0, **task: float) -> Guides:
    """q(θ) = the exact posterior of mu, moved by `shift` sds and made `width` times as wide, and an `ExactGuide`."""
    mean, covariance = exact(rows)
    sd = covariance[-1, -1] ** 0.5
    shared = NormalShared(torch.tensor([mean[-1] + shift * sd]), torch.tensor([sd]))
    with torch.no_grad():
        shared.log_diagonal.fill_(np.log(width))
    return Guides(shared, ExactGuide(**task))


@functools.cache
def density() -> TaskDensity:
    """The model, read and recorded once for all tests of a file: it fits any rows without inputs."""
    return TaskDensity(centre, make_tasks(ROWS))


def drawn_rows(count: int, *, seed: int, sizes: Sequence[int] = (3, 8, 20), mu: float = 1.0) -> dict[str, list[float]]:
    """Rows of tasks named "<seed>-0", … from the model at one mu."""
    rng = np.random.default_rng(seed)
    means = mu + TAU * rng.normal(size=count)
    return {f"{seed}-{i}": rng.normal(a, SIGMA, sizes[i % len(sizes)]).tolist() for i, a in enumerate(means)}


def fitted(rows: dict[str, Sequence[float]], **options: Any) -> Fit:
    """A fit with the exact task guide, so that only q(θ) is trained."""
    method = Amortized(guide=ExactGuide(), optimizer=Optimizer(steps=200), **options)
    return fit(centre, make_tasks(rows), method=method, progress=False)


def setting(rows: dict[str, Sequence[float]], **options: float) -> tuple[TaskDensity, Guides, Tasks]:
    """Everything that inference takes; a wrong q(θ) by `shift` and `width`."""
    return density(), exact_guides(rows, **options), make_tasks(rows)


def close(mean: Any, sd: Any, answer: tuple[Any, Any], effective: float) -> bool:
    """Whether means and sds agree with exact ones within four standard errors of so many draws."""
    z_mean = np.abs(np.asarray(mean) - answer[0]) / answer[1] * np.sqrt(effective)
    z_sd = np.abs(np.asarray(sd) / answer[1] - 1) * np.sqrt(2 * effective)
    return bool((z_mean < 4).all() and (z_sd < 4).all())


def frozen(guide: nn.Module, theta: Tensor, context: Context) -> TaskPosterior:
    """q(φ | D, θ) with the guide's parameters and the encoded data held fixed; the gradient with respect to θ stays."""
    parameters = {name: p.detach() for name, p in guide.named_parameters()}
    return functional_call(guide, parameters, (theta, context.detached()))
