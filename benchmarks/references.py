"""Reference moments of task posteriors: sums over grids, chosen once for each task and checked by finer, wider ones.

A reference states a model in NumPy: log p(D_i | θ, u) + log p(u | θ) over coordinates u of a task, and the moments of
the sites given u (a variance where part of the posterior is integrated in closed form). The grid of u zooms in on where
the density is; θ has a grid of its own and is integrated over. Nothing here calls the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

import bayesmeta as bm

Array = np.ndarray
Rows = dict[str, Array]
Moments = dict[str, tuple[Any, Any]]
Box = tuple[tuple[float, float], ...]
NEGLIGIBLE = 45.0
"""Log density below its maximum from which a node is left out: e^-45 of the mass."""
ROUNDS = 4


@dataclass(frozen=True)
class Grid:
    """A model with at most three coordinates a task.

    Attributes:
        log_density: `(theta, u, rows) -> (K, G)` with θ `(K, 1)` each, u `(1, G)` each, and rows `(n, 1, 1, …)`.
        moments: `(theta, u, rows) -> {site: (mean, variance)}`, each broadcast to `(K, G, *event)`.
        box: Lower and upper end of each coordinate.
        nodes: Nodes of each coordinate.
        stretched: The nodes are sinh of an equally spaced grid over the box, for heavy tails.
        theta: Box of each shared coordinate; none for a known prior.
        log_prior: `(theta) -> (K, 1)` log prior of θ in these coordinates.
        theta_nodes: Nodes of each shared coordinate.
    """

    log_density: Callable[[tuple[Array, ...], tuple[Array, ...], Rows], Array]
    moments: Callable[[tuple[Array, ...], tuple[Array, ...], Rows], Moments]
    box: Box
    nodes: int = 801
    stretched: bool = False
    theta: Box = ()
    log_prior: Callable[[tuple[Array, ...]], Array] | None = None
    theta_nodes: int = 41

    def finer(self, *, factor: float = 1.6, wider: float = 1.25) -> Grid:
        """The same model on a grid of more nodes over wider boxes."""

        def widened(box: Box) -> Box:
            return tuple((_middle(ends) - wider * _half(ends), _middle(ends) + wider * _half(ends)) for ends in box)

        nodes, theta_nodes = (int(factor * wider * n) | 1 for n in (self.nodes, self.theta_nodes))
        return replace(self, box=widened(self.box), theta=widened(self.theta), nodes=nodes, theta_nodes=theta_nodes)

    def __call__(self, tasks: bm.Tasks, given: bm.Tasks | None = None) -> Truth:
        """Moments of tasks; θ has learned from `given` (by default from the tasks themselves)."""
        theta = _nodes(self.theta, self.theta_nodes)
        theta = tuple(t[:, None] for t in theta)
        log_theta = np.zeros((1, 1)) if self.log_prior is None else self.log_prior(theta)
        found = [self._task(theta, rows) for rows in each(tasks)]
        evidence = [f[0] for f in found]
        if not self.theta:
            posterior = [log_theta] * len(found)
        elif given is None:
            posterior = [log_theta + sum(evidence)] * len(found)
        else:
            learned = log_theta + sum(self._task(theta, rows)[0] for rows in each(given))
            posterior = [learned + own for own in evidence]
        return _collect([_over_theta(p, f[1]) for p, f in zip(posterior, found, strict=True)])

    def _task(self, theta: tuple[Array, ...], rows: Rows) -> tuple[Array, Moments]:
        """Log evidence `(K, 1)`, and first and second moments `(K, *event)` of a task given each θ."""
        u, log_p = self._evaluated(self._zoomed(theta, rows), theta, rows)
        peak = log_p.max(-1, keepdims=True)
        weight = np.exp(log_p - peak)
        total = weight.sum(-1, keepdims=True)
        moments = {}
        for name, (mean, variance) in self.moments(theta, u, rows).items():
            first = _average(weight / total, np.asarray(mean))
            moments[name] = first, _average(weight / total, np.asarray(mean) ** 2 + variance)
        return peak + np.log(total), moments

    def _evaluated(self, box: Box, theta: tuple[Array, ...], rows: Rows) -> tuple[tuple[Array, ...], Array]:
        """The nodes u and the log density of the task in the coordinates of the grid."""
        grid = tuple(c[None] for c in _nodes(box, self.nodes))
        u = tuple(np.sinh(c) for c in grid) if self.stretched else grid
        stretch = sum(np.log(np.cosh(c)) for c in grid) if self.stretched else 0.0
        return u, _finite(self.log_density(theta, u, rows) + stretch)

    def _zoomed(self, theta: tuple[Array, ...], rows: Rows) -> Box:
        box = self.box
        for _ in range(0 if self.theta else ROUNDS):
            log_p = self._evaluated(box, theta, rows)[1][0]
            kept = log_p > log_p.max() - NEGLIGIBLE
            steps = [(hi - lo) / (self.nodes - 1) for lo, hi in box]
            box = tuple(
                (max(lo, c[kept].min() - h), min(hi, c[kept].max() + h))
                for c, h, (lo, hi) in zip(_nodes(box, self.nodes), steps, box, strict=True)
            )
        return box


@dataclass
class Truth:
    """Reference moments of T tasks: `{site: (T, *event)}`, and the Monte Carlo errors of the means in sds, if any."""

    mean: dict[str, Array]
    sd: dict[str, Array]
    error: dict[str, Array] = field(default_factory=dict)


def each(tasks: bm.Tasks) -> Iterator[Rows]:
    """The rows of each task as arrays `(n, 1, 1, …)` of float64: "x" `(n, 1, 1, dx)`, "y" and columns `(n, 1, 1)`."""
    for index, size in enumerate(tasks.sizes):
        batch = tasks.batch([index])
        rows = {"x": batch.x, "y": batch.y, **{k: batch[k] for k in tasks.schema.columns}}
        arrays = {k: np.asarray(v[0, :size], dtype=float) for k, v in rows.items()}
        yield {k: v.reshape(size, 1, 1, *v.shape[1:]) for k, v in arrays.items()}


def weighted(log_weight: Array, mean: Array, variance: Array) -> tuple[Array, Array, Array]:
    """Mean, sd and the error of the mean in sds, from M weighted draws of conditional moments `(M, *event)`."""
    weight = np.exp(log_weight - log_weight.max())
    weight = (weight / weight.sum()).reshape(-1, *[1] * (mean.ndim - 1))
    first = (weight * mean).sum(0)
    sd = np.sqrt((weight * (variance + (mean - first) ** 2)).sum(0))
    return first, sd, np.sqrt((weight**2 * (mean - first) ** 2).sum(0)) / sd


def differences(one: Truth, other: Truth) -> tuple[float, float]:
    """Largest difference of means in sds, and largest relative difference of sds."""
    shift = max(float(np.max(np.abs(one.mean[k] - other.mean[k]) / other.sd[k])) for k in one.mean)
    return shift, max(float(np.max(np.abs(one.sd[k] / other.sd[k] - 1))) for k in one.mean)


def _nodes(box: Box, nodes: int) -> tuple[Array, ...]:
    """Every node of a tensor grid, one flat array a coordinate; a single node where there is no coordinate."""
    axes = [np.linspace(lo, hi, nodes) for lo, hi in box]
    return tuple(g.reshape(-1) for g in np.meshgrid(*axes, indexing="ij"))


def _finite(log_p: Array) -> Array:
    if np.isnan(log_p).any() or not np.isfinite(log_p.max(-1)).all():
        raise ValueError("the log density of a reference is not a number on its grid")
    return log_p


def _average(weight: Array, values: Array) -> Array:
    """Averages values over the grid: `(K, G)` and `(1 or K, G, *event)` -> `(K, *event)`."""
    if values.shape[0] == 1:
        return np.tensordot(weight, values[0], 1)
    return np.einsum("kg,kg...->k...", weight, values)


def _over_theta(log_theta: Array, moments: Moments) -> Moments:
    weight = np.exp(log_theta - log_theta.max())[:, 0]
    weight = weight / weight.sum()
    return {name: tuple(np.tensordot(weight, m, 1) for m in pair) for name, pair in moments.items()}


def _collect(found: list[Moments]) -> Truth:
    mean = {name: np.stack([f[name][0] for f in found]) for name in found[0]}
    second = {name: np.stack([f[name][1] for f in found]) for name in found[0]}
    return Truth(mean, {name: np.sqrt(second[name] - mean[name] ** 2) for name in mean})


def _middle(ends: tuple[float, float]) -> float:
    return 0.5 * (ends[0] + ends[1])


def _half(ends: tuple[float, float]) -> float:
    return 0.5 * (ends[1] - ends[0])
