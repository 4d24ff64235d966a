"""The normal-normal random-effects model given tau, in closed form, and averages of normals over tau.

y_i ~ N(phi_i, s_i²), phi_i ~ N(x_iᵀ beta, tau²). A normal prior of a coefficient is one more observation, with a
variance that does not depend on tau; a flat prior is none. So everything is one weighted least-squares problem,
vectorised over the nodes of tau that `tau_posterior.py` chooses.

References:
    Röver, Bayesian random-effects meta-analysis using the bayesmeta R package, 2020,
    https://doi.org/10.18637/jss.v093.i06 (sections 2.3 to 2.6)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from bayesmeta.models.random_effects.tau_posterior import Values, diverges, probabilities

CHUNK = 2**16
RANK = 1e-10


def chunked(tau: np.ndarray, rows: int) -> list[np.ndarray]:
    """Scales in pieces for which arrays with a number of rows stay in a processor's cache."""
    return np.array_split(tau, math.ceil((len(tau) * rows + 1) / CHUNK))


class RandomEffects:
    """Everything that is Gaussian given tau.

    Args:
        effects: Observed y `(k,)`.
        errors: Their standard errors s `(k,)`.
        design: Rows x_i `(k, p)`, the first column of ones.
        prior: Means and sds of the coefficients `(p, 2)`; an infinite sd is a flat prior.

    Raises:
        ValueError: If data and priors do not determine the coefficients.
    """

    def __init__(self, effects: np.ndarray, errors: np.ndarray, design: np.ndarray, prior: np.ndarray) -> None:
        self.effects, self.errors, self.design = effects, errors, design
        proper = np.isfinite(prior[:, 1])
        rows = np.concatenate([design, np.eye(design.shape[1])[proper]])
        self._fixed = prior[proper, 1] ** 2
        sd = np.concatenate([np.full(len(effects), float(np.median(errors))), prior[proper, 1]])
        values = np.concatenate([effects, prior[proper, 0]])
        # In these coordinates a typical precision is the identity, and residuals are small.
        self._factor = self._triangle(rows / sd[:, None])
        self._rows = np.linalg.solve(self._factor.T, rows.T).T
        self._shift = np.linalg.lstsq(rows / sd[:, None], values / sd, rcond=None)[0]
        self._values = values - rows @ self._shift
        self._pairs = (self._rows[:, :, None] * self._rows[:, None, :]).reshape(len(rows), -1)

    @staticmethod
    def _triangle(rows: np.ndarray) -> np.ndarray:
        size = np.linalg.norm(rows, axis=0)
        singular = np.linalg.svd(rows / np.where(size > 0, size, 1.0), compute_uv=False)
        if len(rows) < rows.shape[1] or singular[-1] <= RANK * singular[0]:
            raise ValueError(
                f"covariates: expected data that determine the {rows.shape[1]} coefficients (intercept and slopes), "
                "got fewer studies than coefficients or columns that depend on each other or on the intercept; leave "
                "columns out or give slope_prior=(mean, sd)"
            )
        return np.asarray(np.linalg.qr(rows, mode="r"))

    def _solve(self, tau: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Variances of all rows `(n, k + q)`, and precision `(n, p, p)` and mean `(n, p)` of the coefficients."""
        size = self._rows.shape[1]
        variance = np.empty((len(tau), len(self._values)))
        variance[:, : len(self.effects)] = self.errors**2 + tau[:, None] ** 2
        variance[:, len(self.effects) :] = self._fixed
        weight = 1 / variance
        precision = (weight @ self._pairs).reshape(-1, size, size)
        mean = np.linalg.solve(precision, (weight @ (self._rows * self._values[:, None]))[..., None])[..., 0]
        return variance, precision, mean

    def log_likelihood(self, tau: np.ndarray) -> np.ndarray:
        """Log density of the effects with the coefficients integrated out, at tau `(n,)`; a flat prior counts as 1."""
        return np.concatenate([self._log_likelihood(part) for part in chunked(tau, len(self._values))])

    def _log_likelihood(self, tau: np.ndarray) -> np.ndarray:
        variance, precision, mean = self._solve(tau)
        squares = (self._values - mean @ self._rows.T) ** 2 / variance
        flat = len(self._values) - self._rows.shape[1]
        volume = np.linalg.slogdet(precision)[1] + 2 * np.log(np.abs(np.diag(self._factor))).sum()
        return -0.5 * (np.log(variance).sum(1) + squares.sum(1) + volume + flat * math.log(2 * math.pi))

    def coefficients(self, tau: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean `(n, p)` and a root R `(n, p, p)` of the covariance R Rᵀ of beta given tau `(n,)`."""
        _, precision, mean = self._solve(tau)
        root = np.linalg.inv(np.linalg.cholesky(precision)).swapaxes(1, 2)
        return self._shift + np.linalg.solve(self._factor, mean.T).T, np.linalg.solve(self._factor, root)

    def linear(self, tau: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of x beta for rows x `(m, p)`, given tau `(n,)`: `(n, m)`."""
        mean, root = self.coefficients(tau)
        return mean @ rows.T, ((rows @ root) ** 2).sum(-1)

    def pooled(self, tau: np.ndarray) -> np.ndarray:
        """Share of the mean of all in a study's posterior mean given tau `(n,)`, s² / (s² + tau²): `(n, k)`."""
        return self.errors**2 / (self.errors**2 + tau[:, None] ** 2)

    def own(self, tau: np.ndarray) -> np.ndarray:
        """Share of the study's own estimate, tau² / (s² + tau²): `(n, k)`."""
        return tau[:, None] ** 2 / (self.errors**2 + tau[:, None] ** 2)

    def studies(self, tau: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of the study effects phi given tau `(n,)`: `(n, k)`."""
        own, pooled = self.own(tau), self.pooled(tau)
        mean, variance = self.linear(tau, self.design)
        return own * self.effects + pooled * mean, own * self.errors**2 + pooled**2 * variance

    def shares(self, tau: np.ndarray) -> np.ndarray:
        """What each study adds to the mean of the intercept given tau, a share of 1 for its effect: `(n, k)`."""
        variance, _, _ = self._solve(tau)
        _, root = self.coefficients(tau)
        first = (root[:, :1] @ root.swapaxes(1, 2))[:, 0]
        return (first @ self.design.T) / variance[:, : len(self.effects)]

    def draw(self, tau: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Joint draws of beta `(n, p)` and phi `(n, k)` at drawn scales `(n,)`."""
        mean, root = self.coefficients(tau)
        beta = mean + (root @ generator.normal(size=(*mean.shape, 1)))[..., 0]
        own = self.own(tau)
        noise = np.sqrt(own) * self.errors * generator.normal(size=own.shape)
        return beta, own * self.effects + self.pooled(tau) * (beta @ self.design.T) + noise


class NormalMixture:
    """An average of normal distributions over the nodes of tau, of a scalar or of each entry of a vector.

    Args:
        weight: Of the nodes `(G,)`, summing to 1.
        tail: Nodes at which an integral over a heavy tail of tau shows that it is infinite `(G,)`.
        loc: Means given tau `(G, *event)`.
        variance: Variances given tau, of the same shape.
    """

    def __init__(self, weight: np.ndarray, tail: np.ndarray, loc: np.ndarray, variance: np.ndarray) -> None:
        self.event = loc.shape[1:]
        loc, scale = loc.reshape(len(loc), -1), np.sqrt(variance).reshape(len(loc), -1)
        spread = weight @ scale
        undefined = diverges(weight[:, None] * scale, tail)
        middle = weight @ loc
        squares = weight[:, None] * (scale**2 + (loc - middle) ** 2)
        self._mean = np.where(undefined, np.nan, middle)
        self._sd = np.where(undefined | diverges(squares, tail), np.inf, np.sqrt(squares.sum(0)))
        some = weight > 1e-18
        self._weight, self._loc, self._scale = weight[some], loc[some], scale[some]
        self._start = middle, spread

    @property
    def mean(self) -> np.ndarray:
        """Posterior mean `(*event)`; NaN where a heavy tail of tau leaves none."""
        return self._mean.reshape(self.event)[()]

    @property
    def sd(self) -> np.ndarray:
        """Posterior standard deviation `(*event)`; inf where a heavy tail of tau leaves none."""
        return self._sd.reshape(self.event)[()]

    def pdf(self, x: Values) -> np.ndarray:
        """Density of each entry at every x: `(*x.shape, *event)`."""
        return self._everywhere(self._density, x)

    def cdf(self, x: Values) -> np.ndarray:
        """Probability that each entry is below every x: `(*x.shape, *event)`."""
        return self._everywhere(self._probability, x)

    def quantile(self, q: Values) -> np.ndarray:
        """Values below which each entry lies with probability q: `(*q.shape, *event)`."""
        return self._everywhere(self._invert, probabilities(q))

    def _everywhere(self, function: Callable[[float], np.ndarray], at: Values) -> np.ndarray:
        at = np.asarray(at, dtype=float)
        found = [function(float(one)) for one in at.ravel()]
        return np.reshape(found, (*at.shape, *self.event))[()]

    def _density(self, x: float | np.ndarray) -> np.ndarray:
        z = (x - self._loc) / self._scale
        return self._weight @ (np.exp(-0.5 * z**2) / self._scale) / math.sqrt(2 * math.pi)

    def _probability(self, x: float | np.ndarray) -> np.ndarray:
        return self._weight @ _normal(torch.special.ndtr, (x - self._loc) / self._scale)

    def _invert(self, q: float) -> np.ndarray:
        """Newton steps on the probit of the probability, which is nearly linear, inside a shrinking bracket."""
        target = float(_normal(torch.special.ndtri, np.array([q]))[0])
        ends = self._loc + target * self._scale
        low, high = ends.min(0), ends.max(0)
        x = np.clip(self._start[0] + target * self._start[1], low, high)
        for _ in range(200):
            p = np.clip(self._probability(x), 1e-300, 1 - 1e-16)
            low, high = np.where(p < q, x, low), np.where(p < q, high, x)
            z = _normal(torch.special.ndtri, p)
            slope = np.maximum(self._density(x), 1e-300) * math.sqrt(2 * math.pi) * np.exp(0.5 * z**2)
            step = x - (z - target) / slope
            new = np.where((step >= low) & (step <= high), step, 0.5 * (low + high))
            if (np.abs(new - x) <= 1e-12 * (np.abs(x) + self._start[1])).all():
                return new
            x = new
        return x


def _normal(function: Callable[[torch.Tensor], torch.Tensor], z: np.ndarray) -> np.ndarray:
    return function(torch.from_numpy(z)).numpy()
