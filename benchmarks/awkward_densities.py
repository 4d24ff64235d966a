"""The models of `awkward_models.py` a second time, in NumPy, independently of Pyro and of the engine.

Coordinates are the plain unconstrained ones (log of positive parameters, logit of probabilities); where θ is unknown
they are whitened ones (φ = μ + τ z) unless the prior is heavy-tailed, and θ is (μ, log τ). Constants are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.special import expit, gammaln, log_expit, log_ndtr

import bayesmeta as bm
from benchmarks.awkward_known import FEW, WIDE
from benchmarks.references import Array, Box, Grid, Moments, Rows, Truth, each, weighted

Coordinates = tuple[Array, ...]
Log = Callable[[Coordinates, Coordinates, Rows], Array]


def normal(value: Array, loc: Array | float, scale: Array | float) -> Array:
    """Log density without its constant."""
    return -0.5 * ((value - loc) / scale) ** 2 - np.log(scale)


def student(value: Array, df: float, loc: Array | float, scale: Array | float) -> Array:
    """Log density without its constant."""
    return -0.5 * (df + 1) * np.log1p(((value - loc) / scale) ** 2 / df) - np.log(scale)


def _heavy_tails(theta: Coordinates, u: Coordinates, rows: Rows) -> Array:
    return student(u[0], 3, 0, 1) + student(rows["y"], 3, u[0], 1).sum(0)


def _funnel(theta: Coordinates, u: Coordinates, rows: Rows) -> Array:
    """The value w integrated out: the mean of n rows is N(0, e^2v + 0.25 / n)."""
    y = rows["y"]
    return normal(u[0], 0, 1.5) + normal(y.mean(0), 0, np.sqrt(np.exp(2 * u[0]) + 0.25 / len(y)))


def _funnel_moments(theta: Coordinates, u: Coordinates, rows: Rows) -> Moments:
    y = rows["y"]
    precision = np.exp(-2 * u[0]) + 4.0 * len(y)
    return {"v": (u[0], 0.0), "w": (4.0 * y.sum(0) / precision, 1 / precision)}


def _levels(theta: Coordinates, u: Coordinates) -> Array:
    return theta[0] + np.exp(theta[1]) * u[0]


def _level_moments(theta: Coordinates, u: Coordinates, rows: Rows) -> Moments:
    return {"phi": (_levels(theta, u), 0.0)}


def _rare_positives(theta: Coordinates, u: Coordinates, rows: Rows) -> Array:
    positive, phi = rows["y"].sum(), _levels(theta, u)
    return normal(u[0], 0, 1) + positive * log_expit(phi) + (len(rows["y"]) - positive) * log_expit(-phi)


def _zero_counts(theta: Coordinates, u: Coordinates, rows: Rows) -> Array:
    phi = _levels(theta, u)
    return normal(u[0], 0, 1) + rows["y"].sum() * phi - rows["exposure"].sum() * np.exp(phi)


def _easy_poisson(theta: Coordinates, u: Coordinates, rows: Rows) -> Array:
    phi = _levels(theta, u)
    return normal(u[0], 0, 1) + rows["y"].sum() * phi - len(rows["y"]) * np.exp(phi)


def _easy_normal(theta: Coordinates, u: Coordinates, rows: Rows) -> Array:
    y = rows["y"]
    return normal(u[0], 0, 1) - 0.5 * len(y) * (y.mean() - _levels(theta, u)) ** 2


def _population(mu: tuple[float, float] | None, log_tau: tuple[float, float]) -> Callable[[Coordinates], Array]:
    """Log prior of (μ, log τ): both normal with these means and sds."""

    def log_prior(theta: Coordinates) -> Array:
        known = normal(theta[-1], *log_tau)
        return known if mu is None else known + normal(theta[0], *mu)

    return log_prior


def _edge_probability(theta: Coordinates, u: Coordinates, rows: Rows) -> Array:
    wins = rows["y"].sum()
    return (0.5 + wins) * log_expit(u[0]) + (0.5 + rows["trials"].sum() - wins) * log_expit(-u[0])


def _small_noise(theta: Coordinates, u: Coordinates, rows: Rows) -> Array:
    """The mean m integrated out; the prior of s with the Jacobian of log s."""
    y, s = rows["y"], np.exp(u[0])
    n, spread = len(y), ((y - y.mean()) ** 2).sum()
    within = (1 - n) * u[0] - 0.5 * spread / s**2
    return u[0] - 0.5 * s**2 + within + normal(y.mean(), 0, np.sqrt(1 + s**2 / n))


def _small_noise_moments(theta: Coordinates, u: Coordinates, rows: Rows) -> Moments:
    s, n = np.exp(u[0]), len(rows["y"])
    return {"s": (s, 0.0), "m": (rows["y"].sum(0) / (n + s**2), s**2 / (n + s**2))}


def _phase_parts(u: Coordinates, rows: Rows) -> tuple[Array, Array]:
    """Posterior precision of the amplitude a given the shift, and its shift vector."""
    wave = np.sin(rows["x"][..., 0] + u[0])
    return 1.5**-2 + (wave**2).sum(0) / 0.09, (wave * rows["y"]).sum(0) / 0.09


def _phase(theta: Coordinates, u: Coordinates, rows: Rows) -> Array:
    precision, eta = _phase_parts(u, rows)
    return np.where(np.abs(u[0]) <= math.pi, 0.5 * eta**2 / precision - 0.5 * np.log(precision), -np.inf)


def _phase_moments(theta: Coordinates, u: Coordinates, rows: Rows) -> Moments:
    precision, eta = _phase_parts(u, rows)
    return {"shift": (u[0], 0.0), "a": (eta / precision, 1 / precision)}


def _square(theta: Coordinates, u: Coordinates, rows: Rows) -> Array:
    return normal(u[0], 0, 1) + normal(rows["y"], u[0] ** 2, 0.3).sum(0)


def _square_shared(theta: Coordinates, u: Coordinates, rows: Rows) -> Array:
    return normal(u[0], 0, 1) + normal(rows["y"], np.exp(2 * theta[0]) * u[0] ** 2, 0.5).sum(0)


def _product(theta: Coordinates, u: Coordinates, rows: Rows) -> Array:
    y = rows["y"]
    return normal(u[0], 0, 1) + normal(u[1], 0, 1) - 12.5 * len(y) * (y.mean() - u[0] * u[1]) ** 2


def _pair(name: str) -> Callable[[Coordinates, Coordinates, Rows], Moments]:
    return lambda theta, u, rows: {name: (np.stack(u, -1), 0.0)}


def _one_example(theta: Coordinates, u: Coordinates, rows: Rows) -> Array:
    return normal(u[0], 0, 3) + rows["y"].sum() * u[0] - len(rows["y"]) * np.exp(u[0])


def _projections(rows: Rows) -> tuple[Array, Array]:
    """X `(2, 20)` and the Cholesky factor of X Xᵀ: f = X φ is this factor times a standard normal u a priori."""
    x = rows["x"].reshape(-1, WIDE)
    return x, np.linalg.cholesky(x @ x.T)


def _twenty(theta: Coordinates, u: Coordinates, rows: Rows) -> Array:
    _, factor = _projections(rows)
    f = np.tensordot(factor, np.stack(u), 1)
    return normal(u[0], 0, 1) + normal(u[1], 0, 1) + student(rows["y"], 2, f, 0.1).sum(0)


def _twenty_moments(theta: Coordinates, u: Coordinates, rows: Rows) -> Moments:
    """φ given f is normal with mean Xᵀ(X Xᵀ)⁻¹ f, and covariance I less the projection onto the rows of X."""
    x, factor = _projections(rows)
    back = np.linalg.solve(factor, x)
    return {"phi": (np.stack(u, -1) @ back, 1 - (back**2).sum(0))}


def sparse(tasks: bm.Tasks, given: bm.Tasks | None = None, *, draws: int = 200_000) -> Truth:
    """Laplace priors are scale mixtures, v ~ Exponential(mean 2): draws of v, the rest in closed form."""
    found = []
    for index, rows in enumerate(each(tasks)):
        v = np.random.default_rng([index, 11]).exponential(2.0, (draws, WIDE))
        x, y = rows["x"].reshape(-1, WIDE), rows["y"].reshape(-1)
        gain = v[:, None] * x
        inverse = np.linalg.inv(gain @ x.T + 0.25 * np.eye(len(y)))
        log_weight = 0.5 * np.linalg.slogdet(inverse)[1] - 0.5 * np.einsum("i,kij,j->k", y, inverse, y)
        half = np.einsum("kij,kjd->kid", inverse, gain)
        found.append(weighted(log_weight, np.einsum("kid,i->kd", half, y), v - (gain * half).sum(1)))
    mean, sd, error = (np.stack(values) for values in zip(*found, strict=True))
    return Truth({"phi": mean}, {"phi": sd}, {"phi": error})


def _labels(theta: Coordinates, u: Coordinates, rows: Rows) -> Array:
    parts = [normal(rows["y"], m, 0.5) for m in u]
    return normal(u[0], 0, 2) + normal(u[1], 0, 2) + np.logaddexp(*parts).sum(0)


def mirror(tasks: bm.Tasks, given: bm.Tasks | None = None) -> Truth:
    """Each row measures one parameter: φ₁ (its square) by a sum over a grid, the others in closed form."""
    mean, sd = np.zeros((2, len(tasks), FEW))
    grid = np.linspace(-8, 8, 16001)
    for index, rows in enumerate(each(tasks)):
        x, y = rows["x"].reshape(-1, FEW), rows["y"].reshape(-1)
        precision = 1 + 100 * x.sum(0)
        mean[index], sd[index] = 100 * (x * y[:, None]).sum(0) / precision, precision**-0.5
        log_p = normal(grid, 0, 1) + normal(y[x[:, 0] > 0][:, None], grid**2, 0.1).sum(0)
        moments = weighted(log_p, grid[:, None], np.zeros((1, 1)))
        mean[index, 0], sd[index, 0] = moments[0][0], moments[1][0]
    return Truth({"phi": mean}, {"phi": sd})


def _laplace_prior(theta: Coordinates, u: Coordinates, rows: Rows) -> Array:
    mean = u[0] + u[1] * rows["x"][..., 0]
    return -np.abs(u[0]) - np.abs(u[1]) + normal(rows["y"], mean, 0.5).sum(0)


def _mixture_prior(theta: Coordinates, u: Coordinates, rows: Rows) -> Array:
    return np.logaddexp(normal(u[0], -4, 0.5), normal(u[0], 4, 0.5)) + normal(rows["y"], u[0], 6).sum(0)


def _outliers(theta: Coordinates, u: Coordinates, rows: Rows) -> Array:
    good, wild = math.log(0.6) + normal(rows["y"], u[0], 0.3), math.log(0.4) + normal(rows["y"], 0, 5)
    return normal(u[0], 0, 3) + np.logaddexp(good, wild).sum(0)


def _rectified(theta: Coordinates, u: Coordinates, rows: Rows) -> Array:
    mean = 2 * u[0] * np.maximum(rows["x"][..., 0] - u[1], 0)
    return normal(u[0], 0, 1) + normal(u[1], 0, 1) + normal(rows["y"], mean, 0.3).sum(0)


def _change_point(theta: Coordinates, u: Coordinates, rows: Rows) -> Array:
    mean = np.where(rows["x"][..., 0] > expit(u[0]), 1.0, -1.0)
    return log_expit(u[0]) + log_expit(-u[0]) + normal(rows["y"], mean, 1).sum(0)


def _overdispersed(theta: Coordinates, u: Coordinates, rows: Rows) -> Array:
    y, r = rows["y"], np.exp(u[1])
    log_p = gammaln(r + y) - gammaln(r) + y * log_expit(u[0] - u[1]) + r * log_expit(u[1] - u[0])
    return normal(u[0], 1, 1.5) + normal(u[1], 0, 1.5) + log_p.sum(0)


def _censored(theta: Coordinates, u: Coordinates, rows: Rows) -> Array:
    z = (rows["y"] - u[0]) / np.exp(u[1])
    log_p = np.where(rows["censored"] > 0, log_ndtr(-z), -0.5 * z**2 - u[1])
    return normal(u[0], 0, 2) + normal(u[1], 0, 0.7) + log_p.sum(0)


def _outlier_tasks(theta: Coordinates, u: Coordinates, rows: Rows) -> Array:
    return student(u[0], 3, 0, np.exp(theta[0])) + student(rows["y"], 2, u[0], 0.5).sum(0)


def _easy_logistic(theta: Coordinates, u: Coordinates, rows: Rows) -> Array:
    logits = (2 * rows["y"] - 1) * (u[0] + u[1] * rows["x"][..., 0])
    return normal(u[0], 0, 1) + normal(u[1], 0, 1) + log_expit(logits).sum(0)


def _single(name: str, value: Callable[[Array], Array] = lambda u: u) -> Callable[..., Moments]:
    return lambda theta, u, rows: {name: (value(u[0]), 0.0)}


def _both(first: str, second: str) -> Callable[..., Moments]:
    return lambda theta, u, rows: {first: (u[0], 0.0), second: (u[1], 0.0)}


def _with_log(first: str, second: str) -> Callable[..., Moments]:
    return lambda theta, u, rows: {first: (u[0], 0.0), second: (np.exp(u[1]), 0.0)}


def _leveled(log_density: Log, theta: Box, prior: Callable[[Coordinates], Array], *, nodes: int = 301) -> Grid:
    return Grid(log_density, _level_moments, ((-7, 7),), nodes, theta=theta, log_prior=prior, theta_nodes=51)


PHI = _single("phi")
SQUARED = (-8.0, 8.0)
REFERENCES: dict[str, Callable[..., Truth]] = {
    "heavy_tails": Grid(_heavy_tails, PHI, ((-12, 12),), 8001, stretched=True),
    "funnel": Grid(_funnel, _funnel_moments, ((-14, 14),), 2001),
    "rare_positives": _leveled(_rare_positives, ((-7, 0), (-2, 2.5)), _population((-3, 1), (0, 0.5))),
    "zero_counts": _leveled(_zero_counts, ((-5, 2), (-1.5, 2.5)), _population((0, 2), (0, 0.5)), nodes=701),
    "edge_probability": Grid(_edge_probability, _single("p", expit), ((-90, 90),), 8001),
    "small_noise": Grid(_small_noise, _small_noise_moments, ((-40, 2.5),), 8001),
    "phase": Grid(_phase, _phase_moments, ((-math.pi, math.pi),), 8001),
    "square": Grid(_square, PHI, (SQUARED,), 8001),
    "square_shared": Grid(
        _square_shared,
        lambda theta, u, rows: {"phi": (np.exp(theta[0]) * u[0], 0.0)},
        (SQUARED,),
        2401,
        theta=((-2, 2.5),),
        log_prior=_population(None, (0, 0.5)),
        theta_nodes=91,
    ),
    "product": Grid(_product, _pair("ab"), (SQUARED, SQUARED)),
    "mirror": mirror,
    "labels": Grid(_labels, _pair("m"), ((-16, 16), (-16, 16)), 301),
    "one_example": Grid(_one_example, PHI, ((-24, 24),), 8001),
    "twenty": Grid(_twenty, _twenty_moments, ((-7, 7), (-7, 7)), 401),
    "sparse": sparse,
    "laplace_prior": Grid(_laplace_prior, _pair("phi"), ((-25, 25), (-25, 25)), 601),
    "mixture_prior": Grid(_mixture_prior, PHI, ((-10, 10),), 8001),
    "outliers": Grid(_outliers, PHI, ((-24, 24),), 8001),
    "rectified": Grid(_rectified, _pair("phi"), (SQUARED, SQUARED), 601),
    "change_point": Grid(_change_point, _single("c", expit), ((-35, 35),), 40001),
    "overdispersed": Grid(_overdispersed, _both("phi", "log_r"), ((-11, 12), (-9, 11)), 201),
    "censored": Grid(_censored, _with_log("phi", "s"), ((-12, 14), (-5, 6)), 301),
    "outlier_tasks": Grid(
        _outlier_tasks,
        PHI,
        ((-8, 8),),
        3201,
        stretched=True,
        theta=((-3, 3),),
        log_prior=_population(None, (0, 0.7)),
        theta_nodes=61,
    ),
    "easy_normal": _leveled(_easy_normal, ((-2.5, 4.5), (-2.2, 2)), _population((0, 5), (0, 0.5))),
    "easy_logistic": Grid(_easy_logistic, _pair("phi"), ((-7, 7), (-7, 7)), 201),
    "easy_poisson": _leveled(_easy_poisson, ((-0.5, 3.5), (-2.8, 1.4)), _population((0, 2), (-0.5, 0.5)), nodes=401),
}
