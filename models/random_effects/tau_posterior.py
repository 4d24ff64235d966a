"""The posterior of one scale, tau, by adaptive quadrature: what a meta-analysis needs to average over heterogeneity.

Everything happens in log tau, where the density of any proper prior times a Gaussian likelihood is smooth. Panels of 16
Gauss-Legendre nodes are halved until the integrals of the density, of tau and of tau² agree with those over the halves.
Nothing here knows of studies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bayesmeta.models.random_effects.tau_prior import Function, TauPrior

NODES, WEIGHTS = np.polynomial.legendre.leggauss(16)
_TO_SERIES = np.linalg.inv(np.polynomial.legendre.legvander(NODES, 15))
Values = float | Sequence[float] | np.ndarray
TOLERANCE = 1e-11
MOST = 2000
DIVERGES = 1e-10
"""An integral of which the last panel before e^300 holds more than this share is called infinite."""


@dataclass(frozen=True)
class Panels:
    """Ends of panels `(P,)` in log tau, and the log of a density at their nodes `(P, 16)`."""

    left: np.ndarray
    right: np.ndarray
    log_f: np.ndarray

    @property
    def nodes(self) -> np.ndarray:
        """Log tau `(P, 16)`."""
        return _nodes(self.left, self.right)

    def parts(self, peak: float, centre: float, orders: Sequence[int]) -> np.ndarray:
        """Integrals of density × (tau / e^centre)^j over each panel, in units of e^peak: `(P, j)`."""
        density = np.exp(self.log_f - peak) * WEIGHTS * 0.5 * (self.right - self.left)[:, None]
        return np.stack([(density * np.exp(j * (self.nodes - centre))).sum(1) for j in orders], 1)


def integrate(log_f: Function, edges: np.ndarray, *, orders: Sequence[int] = (0,), centre: float = 0.0) -> Panels:
    """Halves panels until the integrals of density × tau^j agree with those over the halves; returns the halves.

    Args:
        log_f: Log of a density in log tau, vectorised over `(n,)`.
        edges: Ends of the first panels, ascending.
        orders: The powers j.
        centre: Log of the unit of tau.

    Raises:
        ValueError: If more than 2,000 panels at once would have to be halved: the density is not smooth.
    """

    def evaluated(left: np.ndarray, right: np.ndarray) -> Panels:
        return Panels(left, right, log_f(_nodes(left, right).ravel()).reshape(-1, len(NODES)))

    parent = evaluated(edges[:-1], edges[1:])
    kept, total, peak = [], np.zeros(len(orders)), float(parent.log_f.max())
    while len(parent.left) <= MOST:
        middle = 0.5 * (parent.left + parent.right)
        left, right = np.stack([parent.left, middle], 1).ravel(), np.stack([middle, parent.right], 1).ravel()
        child = evaluated(left, right)
        higher = max(peak, float(child.log_f.max()))
        total, peak = total * math.exp(peak - higher) if math.isfinite(peak) else total, higher
        if not math.isfinite(peak):
            break
        fine = child.parts(peak, centre, orders).reshape(len(middle), 2, -1).sum(1)
        error = np.abs(parent.parts(peak, centre, orders) - fine)
        # A log density of size 1e6 is only known to 1e-10.
        allowed = max(TOLERANCE, 16 * np.finfo(float).eps * abs(peak)) * (total + fine.sum(0))
        bad = (error > allowed).any(1)
        total = total + fine[~bad].sum(0)
        twice = np.repeat(bad, 2)
        kept.append((left[~twice], right[~twice], child.log_f[~twice]))
        parent = Panels(left[twice], right[twice], child.log_f[twice])
        if not bad.any():
            left, right, found = (np.concatenate(parts) for parts in zip(*kept, strict=True))
            order = np.argsort(left, kind="stable")
            return Panels(left[order], right[order], found[order])
    if not math.isfinite(peak):
        raise ValueError("tau_prior: expected a density, but it is 0 wherever it was looked at; is it a point mass?")
    raise ValueError(
        f"tau_prior: the integral over tau does not converge near tau = {math.exp(parent.left[0]):.6g}: expected a "
        "density that is smooth inside its support; give a distribution whose support ends there"
    )


class TauPosterior:
    """Posterior of tau, given its prior and a log likelihood: moments, quantiles, density, and weighted nodes.

    Args:
        log_likelihood: Of tau, vectorised over `(n,)`.
        prior: Proper prior.
        scales: Scales of the data, the smallest and the largest; between them the likelihood varies most.

    Attributes:
        tau: Nodes `(G,)`.
        weight: Their weights `(G,)`, which sum to 1: `E h(tau)` is `weight @ h(tau)`.
        tail: Which nodes lie in the last panel of an unbounded support `(G,)`.
        log_evidence: Log of the integral of prior × likelihood.

    Raises:
        ValueError: If the prior does not integrate to 1.
    """

    def __init__(self, log_likelihood: Function, prior: TauPrior, *, scales: tuple[float, float]) -> None:
        self._likelihood, self._prior = log_likelihood, prior
        edges, centre = prior.edges(scales), 0.5 * math.log(scales[0] * scales[1])
        _check_mass(prior, edges)
        panels = integrate(self._log_joint, edges, orders=(0, 1, 2), centre=centre)
        peak = float(panels.log_f.max())
        values = np.exp(panels.log_f - peak) * 0.5 * (panels.right - panels.left)[:, None]
        total = float((values @ WEIGHTS).sum())
        self.log_evidence = peak + math.log(total)
        self._panels, values = panels, values / total
        # Antiderivatives of the Legendre series of each panel, 0 at its left end.
        self._series = np.polynomial.legendre.legint(_TO_SERIES @ values.T, lbnd=-1)
        self._below = np.concatenate([[0.0], np.cumsum(values @ WEIGHTS)])
        self.tau, self.weight = np.exp(panels.nodes).ravel(), (values * WEIGHTS).ravel()
        last = np.isinf(prior.high) & (panels.right == panels.right.max())
        self.tail = np.repeat(last, len(NODES))

    def _log_joint(self, log_tau: np.ndarray) -> np.ndarray:
        """Log of prior × likelihood × d tau / d log tau."""
        return _log_prior(self._prior, log_tau) + self._likelihood(np.exp(log_tau))

    @property
    def mean(self) -> float:
        """Posterior mean; inf where the tail of the prior leaves none."""
        return self.moments(self.tau)[0]

    @property
    def sd(self) -> float:
        """Posterior standard deviation; inf where the tail of the prior leaves none."""
        return self.moments(self.tau)[1]

    def moments(self, values: np.ndarray) -> tuple[float, float]:
        """Mean and sd of a function of tau, given at the nodes `(G,)`."""
        if diverges(self.weight * np.abs(values), self.tail):
            return math.inf, math.inf
        mean = float(self.weight @ values)
        squares = self.weight * (values - mean) ** 2
        return mean, math.inf if diverges(squares, self.tail) else math.sqrt(squares.sum())

    def pdf(self, x: Values) -> np.ndarray:
        """Density at scales x of any shape."""
        x = np.asarray(x, dtype=float)
        out = np.zeros(x.shape)
        some = x >= 0
        out[some] = np.exp(self._prior.log_density(x[some]) + self._likelihood(x[some]) - self.log_evidence)
        return out[()]

    def cdf(self, x: Values) -> np.ndarray:
        """Probability of a smaller scale than x, of any shape."""
        panels = self._panels
        with np.errstate(divide="ignore"):
            place = np.clip(np.log(np.maximum(np.asarray(x, dtype=float), 0.0)), panels.left[0], panels.right[-1])
        k = np.clip(np.searchsorted(panels.left, place, side="right") - 1, 0, len(panels.left) - 1)
        unit = 2 * (place - panels.left[k]) / (panels.right[k] - panels.left[k]) - 1
        return np.clip(self._below[k] + self._antiderivative(unit, k), 0.0, 1.0)

    def quantile(self, q: Values) -> np.ndarray:
        """Scales below which the probability is q, strictly between 0 and 1; of any shape."""
        q = probabilities(q)
        k = np.clip(np.searchsorted(self._below, q) - 1, 0, len(self._panels.left) - 1)
        low, high = np.full(q.shape, -1.0), np.full(q.shape, 1.0)
        for _ in range(54):
            middle = 0.5 * (low + high)
            under = self._below[k] + self._antiderivative(middle, k) < q
            low, high = np.where(under, middle, low), np.where(under, high, middle)
        left, right = self._panels.left[k], self._panels.right[k]
        return np.exp(left + 0.5 * (1 + high) * (right - left))[()]

    def _antiderivative(self, unit: np.ndarray, panel: np.ndarray) -> np.ndarray:
        return np.polynomial.legendre.legval(unit, self._series[:, panel], tensor=False)


class Heterogeneity:
    """Posterior of a share of variance, I² = tau² / (tau² + typical²), from that of tau."""

    def __init__(self, tau: TauPosterior, typical: float) -> None:
        self._tau, self.typical = tau, typical
        self.mean, self.sd = tau.moments(self._share(tau.tau))

    def pdf(self, x: Values) -> np.ndarray:
        """Density at shares x of any shape; 0 outside (0, 1)."""
        x = np.asarray(x, dtype=float)
        inside = np.where((x > 0) & (x < 1), x, 0.5)
        density = self._tau.pdf(self._scale(inside)) * self.typical / (2 * np.sqrt(inside) * (1 - inside) ** 1.5)
        return np.where(inside == x, density, 0.0)[()]

    def cdf(self, x: Values) -> np.ndarray:
        """Probability of a smaller share than x, of any shape."""
        x = np.asarray(x, dtype=float)
        return np.where(x < 1, self._tau.cdf(self._scale(np.clip(x, 0.0, 1 - 1e-16))), 1.0)[()]

    def quantile(self, q: Values) -> np.ndarray:
        """Shares below which the probability is q, strictly between 0 and 1; of any shape."""
        return self._share(self._tau.quantile(q))

    def _share(self, tau: np.ndarray) -> np.ndarray:
        return tau**2 / (tau**2 + self.typical**2)

    def _scale(self, share: np.ndarray) -> np.ndarray:
        return self.typical * np.sqrt(share / (1 - share))


def probabilities(q: Values) -> np.ndarray:
    """Checked probabilities.

    Raises:
        ValueError: If one is not strictly between 0 and 1.
    """
    q = np.asarray(q, dtype=float)
    if not ((q > 0) & (q < 1)).all():
        raise ValueError(f"q: expected probabilities strictly between 0 and 1, got {q.tolist()}")
    return q


def diverges(parts: np.ndarray, tail: np.ndarray) -> np.ndarray:
    """Whether sums over the nodes, along the first axis, still grow at the last panel."""
    return parts[tail].sum(0) > DIVERGES * parts.sum(0)


def _log_prior(prior: TauPrior, log_tau: np.ndarray) -> np.ndarray:
    tau = np.exp(log_tau)
    # The logarithm of an end of the support may round to a point outside it.
    inside = np.clip(tau, max(prior.low, np.finfo(float).tiny), prior.high)
    return prior.log_density(inside) + log_tau


def _check_mass(prior: TauPrior, edges: np.ndarray) -> None:
    panels = integrate(lambda log_tau: _log_prior(prior, log_tau), edges)
    mass = float(panels.parts(0.0, 0.0, (0,)).sum())
    if abs(mass - 1) > 1e-6:
        raise ValueError(
            "tau_prior: expected a proper prior, whose density integrates to 1 over [0, inf) (numerically: from e^-300 "
            f"to e^300), got {mass:.6g}. Under an improper one the marginal likelihood and the Bayes factor are "
            "undefined, and with few studies the posterior too; a proper one with mass beyond these scales, such as "
            "Gamma(.01, .01), says tau = 0 with that probability. Use dist.HalfNormal(scale), dist.HalfCauchy(scale), "
            "dist.Uniform(0., upper) or a normalised log density"
        )


def _nodes(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return left[:, None] + 0.5 * (1 + NODES) * (right - left)[:, None]
