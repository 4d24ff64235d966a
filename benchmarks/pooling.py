"""No pooling and complete pooling for the table, two for each kind of suite.

Curves and linear tasks have known features: their baselines are those of `bayesmeta.checks`, fits of a linear model.
Functions without features get Gaussian processes: each task on its own under a broad prior of length and scale, or one
function of which all tasks are rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal

import bayesmeta as bm
from bayesmeta.checks.baselines import baselines
from bayesmeta.data.families.curves import features
from bayesmeta.data.families.kernels import KERNELS, differences
from bayesmeta.data.families.regression import condition, predict
from bayesmeta.data.families.rows import Rows
from benchmarks.predictors import Direct, Pooled
from benchmarks.scores import Predictor

Pair = tuple[Predictor, Predictor]
DRAWS = 399
"""Of posteriors of the linear baselines."""
TASKS = 200
"""Training tasks from which the baselines learn, at most: they have few parameters."""
ROWS = 400
"""Training rows that one function for all tasks is given, at most."""
LENGTHS = (0.02, 0.5)
"""Lengths that a task on its own may have, in ranges of x."""
SCALES = (0.05, 2.0)
"""Scales, in sds of the labels."""
NOISES = tuple(np.geomspace(0.01, 1.0, 9))
"""Sds of the noise that are tried, in sds of the labels."""


class CurveFeatures(nn.Module):
    """φᵀ ψ(x), ψ some of (sin f x, cos f x, x, 1); a module, so that x keeps its own units.

    Args:
        used: Which of them.
        frequency: f.
    """

    def __init__(self, used: tuple[int, ...], frequency: float) -> None:
        super().__init__()
        self.used, self.frequency = list(used), frequency

    def forward(self, phi: Tensor, x: Tensor) -> Tensor:
        """Means `(T, N)` from φ `(T, 1, d)` and x `(T, N, 1)`."""
        return (phi * features(x, self.frequency)[..., self.used]).sum(-1)


def curves(tasks: bm.Tasks, *, used: tuple[int, ...] = (0, 1, 2, 3), frequency: float = 1.0) -> Pair:
    """Baselines linear in the features of `CurveFeatures`."""
    model = bm.HierarchicalModel(bm.priors.Gaussian(len(used)), CurveFeatures(used, frequency), bm.likelihoods.Normal())
    return _linear(model, tasks)


def linear(tasks: bm.Tasks) -> Pair:
    """Baselines linear in x, with an intercept."""
    width = tasks.x.shape[1]

    def predictor(phi: Tensor, x: Tensor) -> Tensor:
        return (phi[..., :width] * x).sum(-1) + phi[..., width]

    return _linear(bm.HierarchicalModel(bm.priors.Gaussian(width + 1), predictor, bm.likelihoods.Normal()), tasks)


def _linear(model: bm.HierarchicalModel, tasks: bm.Tasks) -> Pair:
    alone, together = baselines(model, tasks[:TASKS], draws=DRAWS)
    return Pooled(alone), Pooled(together)


def gaussian_processes(tasks: bm.Tasks, *, kernel: str = "rbf") -> Pair:
    """Gaussian process regression of each task alone, and of all as one.

    Alone: length and scale integrated out under uniform priors, the noise that of all tasks. As one: some of the
    training rows and the rows of the task in question belong to the same function; its length, scale and noise are
    those with the largest evidence.
    """
    some, loc = tasks[:TASKS], float(tasks.y.double().mean())
    centred = some.with_labels(some.y.double() - loc)
    alone, together = _alone(centred, kernel), OneFunction.learn(centred, kernel)
    return (
        Direct(alone.oracle, alone.joint_log_prob, parameters=1, offset=loc),
        Direct(together.function, together.joint_log_prob, parameters=4, offset=loc),
    )


def _alone(tasks: bm.Tasks, kernel: str) -> bm.families.GaussianProcesses:
    spread, sd = _range(tasks), float(tasks.y.std())
    broad = bm.families.GaussianProcesses(
        kernel=kernel,
        dim=tasks.x.shape[1],
        length=(LENGTHS[0] * spread, LENGTHS[1] * spread),
        scale=(SCALES[0] * sd, SCALES[1] * sd),
    )
    batch = tasks.batch(slice(None))
    tried = [replace(broad, noise=float(noise) * sd) for noise in NOISES]
    return max(tried, key=lambda family: float(family.log_evidence(batch).sum()))


def _range(tasks: bm.Tasks) -> float:
    """The largest range of an input."""
    return float((tasks.x.max(0).values - tasks.x.min(0).values).max())


@dataclass(frozen=True)
class OneFunction:
    """One Gaussian process g of which all tasks are rows: y = g(x) + noise ε.

    Attributes:
        kernel: Of `KERNELS`, without a period.
        x: Training inputs `(1, P, dx)`.
        y: Training labels `(1, P)`.
        length: Of the kernel.
        scale: Standard deviation of g.
        noise: Standard deviation of labels.
    """

    kernel: str
    x: Tensor
    y: Tensor
    length: float
    scale: float
    noise: float

    @classmethod
    def learn(cls, tasks: bm.Tasks, kernel: str) -> OneFunction:
        """The function with the largest evidence on a grid."""
        kept = torch.randperm(len(tasks.y), generator=torch.Generator().manual_seed(0))[:ROWS]
        x, y = tasks.x.double()[kept].unsqueeze(0), tasks.y.double()[kept].unsqueeze(0)
        return max(cls._tried(kernel, x, y, _range(tasks)), key=lambda one: float(one._conditioned[0]))

    @classmethod
    def _tried(cls, kernel: str, x: Tensor, y: Tensor, spread: float) -> Iterator[OneFunction]:
        sd = float(y.std())
        for length in np.geomspace(*LENGTHS, 7):
            for scale in np.geomspace(*SCALES, 5):
                for noise in NOISES:
                    yield cls(kernel, x, y, float(length) * spread, float(scale) * sd, float(noise) * sd)

    def function(self, context: bm.Batch, x: Tensor) -> Distribution:
        """The predictive of each row alone: given the training rows, then the context."""
        rows = Rows.of(context)
        _, *conditioned = self._given(rows)
        cross, variance = self._posterior(rows.x, x).unsqueeze(1), self._variance(x).unsqueeze(1)
        loc, sd = predict(cross, variance, (conditioned[0], conditioned[1]), rows, self.noise)
        return Normal(self._mean(x) + loc.squeeze(-1), sd.squeeze(-1))

    def joint_log_prob(self, context: bm.Batch, target: bm.Batch) -> Tensor:
        """Log density of the target's rows together given training rows and context, `(T,)`."""
        given = Rows.of(context)
        both = given.joined(Rows.of(target))
        return (self._given(both)[0] - self._given(given)[0]).squeeze(-1)

    def _given(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        covariance = self._posterior(rows.x, rows.x).unsqueeze(1)
        return condition(covariance, rows.y - self._mean(rows.x), rows, self.noise)

    @cached_property
    def _conditioned(self) -> tuple[Tensor, Tensor, Tensor]:
        """Evidence of the training rows, the factor of their covariance `(1, P, P)`, whitened labels `(1, P, 1)`."""
        rows = Rows(self.x, self.y, torch.ones_like(self.y, dtype=torch.bool))
        evidence, lower, white = condition(self._prior(self.x, self.x).unsqueeze(1), self.y, rows, self.noise)
        return evidence, lower[:, 0], white[:, 0]

    def _prior(self, first: Tensor, second: Tensor) -> Tensor:
        length = torch.tensor(self.length, dtype=torch.float64)
        return self.scale**2 * KERNELS[self.kernel](differences(first, second), length, length)

    def _weights(self, x: Tensor) -> Tensor:
        """Whitened covariances with the training rows `(T, P, N)`."""
        return torch.linalg.solve_triangular(self._conditioned[1], self._prior(self.x, x), upper=False)

    def _mean(self, x: Tensor) -> Tensor:
        return (self._weights(x) * self._conditioned[2]).sum(1)

    def _posterior(self, first: Tensor, second: Tensor) -> Tensor:
        return self._prior(first, second) - self._weights(first).mT @ self._weights(second)

    def _variance(self, x: Tensor) -> Tensor:
        return self.scale**2 - self._weights(x).square().sum(1)
