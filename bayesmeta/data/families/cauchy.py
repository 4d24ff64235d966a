"""Two bumps in the plane and a smooth deviation from them in each task: the Cauchy environment of PACOH."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal

from bayesmeta.data.families.base import Family, check_positive, normal
from bayesmeta.data.families.kernels import differences, rbf
from bayesmeta.data.families.regression import condition, predict
from bayesmeta.data.families.rows import Rows

ELEMENTS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Cauchy(Family):
    """y = m(x) + g(x) + noise ε with the mean m of all tasks and g ~ GP(0, s² exp(−|x − x'|² / 2 l²)), x in the plane.

    m(x) = 6 / π(1 + |x + 1|²) + 3 / π(1 + |x − 2|²) + 1; inputs are normal, sd 2.5, cut to −7.5 … 5. There are no
    parameters; truth is "function" `(task, rows)`, m + g at the rows, and at rows that were cut off.

    Attributes:
        length: l.
        scale: s.
        noise: Standard deviation of labels.
        context_rows: Rows of an episode's context.
        target_rows: Rows of an episode's target.

    Raises:
        ValueError: If a number is not positive.

    References:
        Rothfuss et al.: PACOH: Bayes-Optimal Meta-Learning with PAC-Guarantees, 2021,
        https://arxiv.org/abs/2002.05551
    """

    length: float = math.sqrt(0.5)
    scale: float = 0.2
    noise: float = 0.05
    context_rows: int | tuple[int, int] = 20
    target_rows: int | tuple[int, int] = 200
    dim = 2

    def __post_init__(self) -> None:
        check_positive("Cauchy", length=self.length, scale=self.scale, noise=self.noise)

    def inputs(self, tasks: int, rows: int, generator: torch.Generator, *, target: bool = False) -> Tensor:
        """Draws inputs from the cut normal distribution."""
        low, high = torch.special.ndtr(torch.tensor([-3.0, 2.0], dtype=torch.float64))
        share = torch.rand((tasks, rows, 2), generator=generator, dtype=torch.float64)
        return 2.5 * torch.special.ndtri(low + (high - low) * share)

    def labels(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Draws tasks at inputs `(T, N, 2)`."""
        function = torch.empty(x.shape[:2], dtype=torch.float64)
        ridge = 1e-10 * self.scale**2 * torch.eye(x.shape[1], dtype=torch.float64)
        for tasks in torch.arange(len(x)).split(max(1, ELEMENTS // x.shape[1] ** 2)):
            lower = torch.linalg.cholesky(self._covariance(x[tasks], x[tasks]) + ridge)
            function[tasks] = mean(x[tasks]) + (lower @ normal((*x[tasks].shape[:2], 1), generator)).squeeze(-1)
        return function + self.noise * normal(x.shape[:2], generator), {"function": function}

    def predictive(self, rows: Rows, x: Tensor) -> Distribution:
        """Gaussian process regression around the known mean."""
        loc, sd = (torch.empty(x.shape[:2], dtype=torch.float64) for _ in range(2))
        widest, prior = rows.mask.shape[1], torch.tensor(self.scale**2, dtype=torch.float64)
        for tasks in rows.chunks(widest * (widest + x.shape[1]), ELEMENTS):
            some = rows[tasks]
            _, *conditioned = self._conditioned(some)
            cross = self._covariance(some.x, x[tasks]).unsqueeze(1)
            moments = predict(cross, prior, (conditioned[0], conditioned[1]), some, self.noise)
            loc[tasks], sd[tasks] = (moment.squeeze(-1) for moment in moments)
        return Normal(mean(x) + loc, sd)

    def evidence(self, rows: Rows) -> Tensor:
        """Log density of all rows of each task."""
        found = torch.empty(len(rows), dtype=torch.float64)
        for tasks in rows.chunks(rows.mask.shape[1] ** 2, ELEMENTS):
            found[tasks] = self._conditioned(rows[tasks])[0].squeeze(-1)
        return found

    def _conditioned(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        return condition(self._covariance(rows.x, rows.x).unsqueeze(1), rows.y - mean(rows.x), rows, self.noise)

    def _covariance(self, first: Tensor, second: Tensor) -> Tensor:
        length = torch.tensor(self.length, dtype=torch.float64)
        return self.scale**2 * rbf(differences(first, second), length, length)


def mean(x: Tensor) -> Tensor:
    """m(x), `(…)` of inputs `(…, 2)`."""
    first, second = ((x - centre).square().sum(-1) for centre in (-1.0, 2.0))
    return 6 / (math.pi * (1 + first)) + 3 / (math.pi * (1 + second)) + 1
