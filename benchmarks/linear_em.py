"""The linear Gaussian hierarchy by EM, with exact posteriors of the tasks: what learned priors are held against.

y_ij ~ N(x_ijᵀ w_i, σ²), w_i ~ N(m, S), S diagonal or full; m, S and σ² by maximum likelihood.

References:
    Laird, Ware: Random-Effects Models for Longitudinal Data, 1982, https://doi.org/10.2307/2529876
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

STEPS = 2000
SETTLED = 1e-8
"""EM stops when a step has raised the log likelihood by less than this, relative to its size."""
SMALLEST = 1e-10
"""Of the eigenvalues of S, relative to the largest one: S stays positive definite."""


@dataclass(frozen=True)
class LinearHierarchy:
    """A learned prior of task coefficients.

    Attributes:
        mean: m `(d,)`.
        covariance: S `(d, d)`.
        noise: σ².
        log_likelihood: Of the data it was learned from, with the coefficients integrated out.
    """

    mean: np.ndarray
    covariance: np.ndarray
    noise: float
    log_likelihood: float

    @classmethod
    def learn(cls, x: Sequence[np.ndarray], y: Sequence[np.ndarray], *, full: bool = False) -> Self:
        """Learns m, S and σ² from tasks with inputs `(n_i, d)` and labels `(n_i,)`.

        Raises:
            ValueError: A task's inputs and labels have different numbers of rows, or there are no rows.
        """
        _check(x, y)
        found = cls._started(x, y)
        for _ in range(STEPS):
            before, found = found, found._improved(x, y, full)
            if found.log_likelihood - before.log_likelihood < SETTLED * abs(found.log_likelihood):
                break
        return found

    @classmethod
    def _started(cls, x: Sequence[np.ndarray], y: Sequence[np.ndarray]) -> Self:
        rows, labels = np.concatenate(x), np.concatenate(y)
        pooled = np.linalg.lstsq(rows, labels, rcond=None)[0]
        noise = max(float(np.var(labels - rows @ pooled)), 1e-12)
        scale = noise / np.maximum((rows**2).mean(0), 1e-12)
        return cls(pooled, np.diag(scale), noise, -math.inf)

    def _improved(self, x: Sequence[np.ndarray], y: Sequence[np.ndarray], full: bool) -> Self:
        """One step of EM; its log likelihood is that of the parameters before it."""
        found = [self.posterior(*task) for task in zip(x, y, strict=True)]
        means = np.stack([mean for mean, _ in found])
        centre = means.mean(0)
        spread = np.mean([v + np.outer(m - centre, m - centre) for m, v in found], 0)
        covariance = _positive(spread if full else np.diag(np.diag(spread)))
        left = sum(
            float(((b - a @ m) ** 2).sum() + np.einsum("ni,ij,nj", a, v, a))
            for a, b, (m, v) in zip(x, y, found, strict=True)
        )
        evidence = sum(self.log_evidence(*task) for task in zip(x, y, strict=True))
        return type(self)(centre, covariance, left / sum(map(len, y)), evidence)

    def posterior(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean `(d,)` and covariance `(d, d)` of one task's coefficients; those of the prior without rows."""
        precision = np.linalg.inv(self.covariance)
        covariance = np.linalg.inv(precision + x.T @ x / self.noise)
        return covariance @ (precision @ self.mean + x.T @ y / self.noise), covariance

    def log_evidence(self, x: np.ndarray, y: np.ndarray) -> float:
        """Log density of one task's labels with its coefficients integrated out: Bayes' rule at their mean."""
        mean, covariance = self.posterior(x, y)
        off, moved = y - x @ mean, mean - self.mean
        log_likelihood = -0.5 * (float(off @ off) / self.noise + len(y) * math.log(2 * math.pi * self.noise))
        log_volume = np.linalg.slogdet(covariance)[1] - np.linalg.slogdet(self.covariance)[1]
        return log_likelihood + 0.5 * float(log_volume - moved @ np.linalg.solve(self.covariance, moved))

    def predict(self, x: np.ndarray, y: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of labels at inputs `(m, d)` of a task with rows `(n, d)` and labels `(n,)`."""
        mean, covariance = self.posterior(x, y)
        return new @ mean, np.einsum("ni,ij,nj->n", new, covariance, new) + self.noise


def _positive(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    found: np.ndarray = (vectors * np.maximum(values, SMALLEST * values.max())) @ vectors.T
    return found


def _check(x: Sequence[np.ndarray], y: Sequence[np.ndarray]) -> None:
    sizes = [(len(a), len(b)) for a, b in zip(x, y, strict=True)]
    wrong = [i for i, (rows, labels) in enumerate(sizes) if rows != labels]
    if wrong:
        raise ValueError(f"task {wrong[0]}: expected as many labels as rows, got {sizes[wrong[0]]}")
    if not sum(rows for rows, _ in sizes):
        raise ValueError("expected tasks with rows, got none")
