"""Answers to meta-analyses by another way: joint normals conditioned by matrices, SciPy's adaptive quadrature.

A flat prior is handled as in restricted likelihood, by contrasts that do not see the coefficients. tau is integrated
over itself, not its logarithm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro.distributions as dist
from scipy import stats
from scipy.integrate import quad_vec
from scipy.linalg import null_space

Q = (0.025, 0.3, 0.5, 0.975)


@dataclass
class Case:
    """Data, priors for both sides, and points at which SciPy's quadrature splits [0, inf)."""

    effects: Any
    errors: Any
    tau_prior: Any
    density: Callable[[float], float]
    points: list[float]
    mu_prior: tuple[float, float] | None = None
    slope_prior: tuple[float, float] | None = None
    covariates: Any = None
    upper: float = np.inf
    options: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.effects, self.errors = np.asarray(self.effects, float), np.asarray(self.errors, float)
        self.options = {"tau_prior": self.tau_prior, "mu_prior": self.mu_prior, "covariates": self.covariates}
        self.options["slope_prior"] = self.slope_prior


class Reference:
    """Unnormalised integrals over tau of anything that is known given tau."""

    def __init__(self, case: Case) -> None:
        self.case = case
        k = len(case.effects)
        extra = [] if case.covariates is None else [np.asarray(case.covariates, float).reshape(k, -1)]
        self.x = np.hstack([np.ones((k, 1)), *extra])
        priors = [case.mu_prior] + [case.slope_prior] * (self.x.shape[1] - 1)
        self.flat = np.array([prior is None for prior in priors])
        self.mean = np.array([0.0 if prior is None else prior[0] for prior in priors])
        self.cover = np.diag([0.0 if prior is None else prior[1] ** 2 for prior in priors])
        self.shift = 0.0
        self.shift = self.log_likelihood(case.points[len(case.points) // 2])
        self.negligible = 0.0
        self.total = self.integral(lambda tau: np.ones(1))[0]
        self.negligible = 1e-20 * self.total
        self.log_evidence = float(np.log(self.total) + self.shift)

    def given(self, tau: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Mean and covariance of beta, and mean and variances of phi."""
        y, s2, x = self.case.effects, self.case.errors**2, self.x
        v = np.diag(s2 + tau**2) + x @ self.cover @ x.T
        inverse = np.linalg.inv(v)
        flat = x[:, self.flat]
        gram = np.linalg.inv(flat.T @ inverse @ flat) if self.flat.any() else np.zeros((0, 0))
        b = gram @ flat.T @ inverse @ (y - x @ self.mean)
        residual = inverse @ (y - x @ self.mean - flat @ b)
        project = inverse - inverse @ flat @ gram @ flat.T @ inverse
        beta = self.mean + self.cover @ x.T @ residual
        beta[self.flat] += b
        cover = self.cover - self.cover @ x.T @ project @ x @ self.cover
        cross = -gram @ flat.T @ inverse @ x @ self.cover
        cover[np.ix_(self.flat, self.flat)] = gram
        cover[self.flat] += cross
        cover[:, self.flat] += cross.T
        # phi = y - noise, and the noise is N(0, s²) with covariance s² with y.
        phi = y - s2 * residual
        return beta, cover, phi, s2 - s2**2 * np.diag(project)

    def log_likelihood(self, tau: float) -> float:
        """With flat coefficients: of contrasts, times the volume that the flat direction has."""
        y, x = self.case.effects - self.x @ self.mean, self.x
        v = np.diag(self.case.errors**2 + tau**2) + x @ self.cover @ x.T
        if not self.flat.any():
            return float(stats.multivariate_normal(np.zeros(len(y)), v).logpdf(y)) - self.shift
        flat = x[:, self.flat]
        basis = null_space(flat.T)
        log_volume = -0.5 * np.linalg.slogdet(flat.T @ flat)[1]
        if not basis.shape[1]:
            return float(log_volume) - self.shift
        contrast = stats.multivariate_normal(np.zeros(basis.shape[1]), basis.T @ v @ basis)
        return float(contrast.logpdf(basis.T @ y) + log_volume) - self.shift

    def integral(self, function: Callable[[float], np.ndarray]) -> np.ndarray:
        ends = [0.0, *self.case.points, self.case.upper]

        def weighted(tau: float) -> np.ndarray:
            return self.case.density(tau) * np.exp(self.log_likelihood(tau)) * function(tau)

        parts = [
            quad_vec(weighted, a, b, epsabs=self.negligible, epsrel=1e-10, norm="max", limit=400)[0]
            for a, b in zip(ends[:-1], ends[1:], strict=True)
        ]
        return np.sum(parts, axis=0)

    def expect(self, function: Callable[[float], np.ndarray]) -> np.ndarray:
        return self.integral(function) / self.total

    def moments(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Means and sds of tau, beta, phi, and of a new study (at covariates 0)."""

        def stacked(tau: float) -> np.ndarray:
            beta, cover, phi, variance = self.given(tau)
            centred = np.concatenate([[tau], beta, phi, beta[:1]]) - self.centre
            spread = np.concatenate([[0.0], np.diag(cover), variance, [cover[0, 0] + tau**2]])
            return np.concatenate([centred, spread + centred**2])

        p, k = self.x.shape[1], len(self.case.effects)
        start = self.case.points[len(self.case.points) // 2]
        beta, _, phi, _ = self.given(start)
        self.centre = np.concatenate([[start], beta, phi, beta[:1]])
        first, second = np.split(self.expect(stacked), 2)
        mean, sd = first + self.centre, np.sqrt(second - first**2)
        parts = {"tau": 0, "beta": slice(1, 1 + p), "phi": slice(1 + p, 1 + p + k), "new": -1}
        return {name: (mean[at], sd[at]) for name, at in parts.items()}

    def probabilities(self, points: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """P(parameter < x) for mu, new and phi `(q, *event)`."""
        shapes = {name: np.shape(x) for name, x in points.items()}

        def stacked(tau: float) -> np.ndarray:
            beta, cover, phi, variance = self.given(tau)
            given = {"mu": (beta[0], cover[0, 0]), "new": (beta[0], cover[0, 0] + tau**2), "phi": (phi, variance)}
            found = [stats.norm.cdf(x, given[name][0], np.sqrt(given[name][1])).ravel() for name, x in points.items()]
            return np.concatenate(found)

        flat = np.split(self.expect(stacked), np.cumsum([np.prod(shape) for shape in shapes.values()])[:-1].astype(int))
        return {name: values.reshape(shapes[name]) for name, values in zip(shapes, flat, strict=True)}

    def below(self, tau: float) -> float:
        """P(tau < x)."""
        ends = [0.0, *(point for point in self.case.points if point < tau), tau]
        weighted = lambda t: np.array([self.case.density(t) * np.exp(self.log_likelihood(t))])  # noqa: E731
        parts = [
            quad_vec(weighted, a, b, epsabs=self.negligible, epsrel=1e-10)[0][0]
            for a, b in zip(ends[:-1], ends[1:], strict=True)
        ]
        return float(np.sum(parts) / self.total)


def half_normal(scale: float) -> dict[str, Any]:
    """Both sides of a half-normal prior; beyond 38.5 scales its density is 0 in float64."""
    scale = float(np.float32(scale))
    return {"tau_prior": dist.HalfNormal(scale), "density": stats.halfnorm(0, scale).pdf, "upper": 38.5 * scale}


SCHOOLS = ([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
SHORT = ([0.9, -0.2, 0.4, 1.7, 0.3], [0.3, 0.25, 0.6, 0.4, 0.15])
UNEQUAL = ([0.02, 0.31, -1.4, 0.018, 2.2, 0.6], [0.003, 0.4, 3.0, 0.01, 1.1, 0.08])
WIDE = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0]
COARSE = [0.1, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0]


def cases() -> dict[str, Case]:
    """Meta-analyses of every kind."""
    years = [-3.0, -1.0, 0.0, 1.5, 2.5]
    two = np.stack([years, [0.0, 1.0, 0.0, 1.0, 1.0]], 1)
    many = np.random.default_rng(1)
    return {
        "eight schools": Case(*SCHOOLS, dist.HalfCauchy(5.0), stats.halfcauchy(0, 5).pdf, COARSE, (0.0, 5.0)),
        "flat mean": Case(*SCHOOLS, **half_normal(8.0), points=COARSE[:5]),
        "uniform tau": Case(*SHORT, dist.Uniform(0.0, 10.0), stats.uniform(0, 10).pdf, WIDE[:6], upper=10.0),
        "lognormal tau": Case(*SHORT, dist.LogNormal(-1.5, 0.75), stats.lognorm(0.75, 0, np.exp(-1.5)).pdf, WIDE),
        "inverse gamma tau": Case(*SHORT, dist.InverseGamma(3.0, 2.0), stats.invgamma(3, 0, 2).pdf, WIDE, (0.0, 2.0)),
        "gamma tau, singular at 0": Case(
            *SHORT,
            dist.Gamma(0.5, 1.0),
            stats.gamma(0.5).pdf,
            [1e-14, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-3, *WIDE],
            (0.5, 1.0),
        ),
        "regression, flat": Case(*SHORT, **half_normal(0.5), points=WIDE[:6], covariates=years),
        "regression, slopes normal": Case(
            *SHORT, **half_normal(0.5), points=WIDE[:6], slope_prior=(0.1, 0.3), covariates=two
        ),
        "more coefficients than studies": Case(
            [0.4, 1.1],
            [0.2, 0.3],
            **half_normal(0.5),
            points=WIDE[:6],
            mu_prior=(0.0, 1.0),
            slope_prior=(0.0, 0.5),
            covariates=two[:2],
        ),
        "units of 1000": Case(
            np.array(SHORT[0]) * 1e3 + 5e4,
            np.array(SHORT[1]) * 1e3,
            dist.HalfCauchy(500.0),
            stats.halfcauchy(0, 500).pdf,
            [1e3 * point for point in WIDE],
        ),
        "units of 0.001": Case(
            np.array(SHORT[0]) * 1e-3,
            np.array(SHORT[1]) * 1e-3,
            **half_normal(0.5e-3),
            points=[1e-3 * point for point in WIDE[:6]],
            mu_prior=(0.0, 5e-3),
        ),
        "very unequal errors": Case(
            *UNEQUAL, dist.HalfCauchy(0.5), stats.halfcauchy(0, 0.5).pdf, [1e-3, 3e-3, *WIDE, 1e3]
        ),
        "one study": Case([0.8], [0.4], **half_normal(0.5), points=WIDE[:6], mu_prior=(0.0, 2.0)),
        "one study, flat": Case([0.8], [0.4], **half_normal(0.5), points=WIDE[:6]),
        "two studies": Case([0.8, -0.3], [0.2, 0.3], **half_normal(1.0), points=WIDE[:6]),
        "conflict of prior and data": Case(
            [-3.0, 5.0, 9.0], [0.1, 0.2, 0.1], **half_normal(0.25), points=[0.5, 0.8, 1.0, 1.2, 1.4, 1.6, 2.0, 3.0]
        ),
        "40 studies": Case(many.normal(0.2, 0.3, 40), many.uniform(0.05, 0.6, 40), **half_normal(1.0), points=WIDE[:6]),
    }
