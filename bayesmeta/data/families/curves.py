"""Exact inference of curves with one unknown that is not linear: sinusoids of unknown phase, lines, drifting sinusoids.

    y = (c α(u) + γ(u) + w)ᵀ ψ(x) + noise ε,   ψ(x) = (sin f x, cos f x, x, 1),

u has a density on an interval, c is uniform on an interval, and w is normal around 0. Given u everything else is
integrated out in closed form (`boxed.py`); u is integrated over nodes that crowd, task by task, where its posterior is.
`CurveFamily` is what such families share; `Curves` holds the constants of a kind of curve, `Nodes` what rows say about
a task.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesmeta.data.families.base import Family, Interval, uniform
from bayesmeta.data.families.boxed import Boxed, BoxedRows, Coefficient
from bayesmeta.data.families.grids import cells, refined
from bayesmeta.data.families.mixtures import Mixture
from bayesmeta.data.families.rows import Rows

FEWEST_NODES = 128
MOST_NODES = 20_000
ROUNDS = 3
"""How often nodes move to where the posterior is; each time cells there can shrink by a factor of twenty."""
CLOSE = 0.5
"""Curves of neighbouring nodes differ by no more than this, in sds of the noise."""

Loadings = Callable[[Tensor], tuple[Tensor, Tensor]]


def features(x: Tensor, frequency: float) -> Tensor:
    """ψ `(…, 4)` of inputs `(…, 1)`."""
    return torch.cat([(frequency * x).sin(), (frequency * x).cos(), x, torch.ones_like(x)], -1)


@dataclass(frozen=True)
class Nodes:
    """What rows say about the tasks, node by node.

    Attributes:
        log_weight: Log (evidence × prior × width of the node's cell) `(T, K)`.
        coefficient: c at each node.
    """

    log_weight: Tensor
    coefficient: Coefficient

    def log_evidence(self) -> Tensor:
        """Log density of all rows of each task, `(T,)`."""
        return self.log_weight.logsumexp(-1)

    def joined(self, other: Nodes, share: float) -> Nodes:
        """Nodes of tasks that are of this kind with probability `share`, else of the other."""
        weights = (self.log_weight + math.log(share), other.log_weight + math.log(1 - share))
        return Nodes(torch.cat(weights, 1), self.coefficient.joined(other.coefficient))


@dataclass(frozen=True)
class _Summary:
    """What is kept of rows.

    Attributes:
        products: ψᵀ (ψ, y) summed over rows, `(T, 4, 5)`.
        covariance: Posterior covariance of w `(T, 4, 4)`, the same for every u and c.
        gram: Products of (ψ, y) summed over rows, w integrated out, in units of the noise, `(T, 5, 5)`.
        log_scale: Terms of the evidence that depend on neither u nor c, `(T,)`.
    """

    products: Tensor
    covariance: Tensor
    gram: Tensor
    log_scale: Tensor


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Constants of a family of curves.

    Attributes:
        loadings: `u (…) -> α (…, 4), γ (…, 4)`.
        unknown: Interval of u.
        coefficient: Interval of c.
        noise: Standard deviation of labels around the curve.
        frequency: f.
        log_prior: Log density of u on its interval; None for uniform.
        spread: Standard deviations of w.
    """

    loadings: Loadings
    unknown: Interval
    coefficient: Interval
    noise: float
    frequency: float = 1.0
    log_prior: Callable[[Tensor], Tensor] | None = None
    spread: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)

    def log_evidence(self, rows: Rows) -> Tensor:
        """Log density of all rows of each task, `(T,)`."""
        return self.nodes(rows, self.count(rows.x)).log_evidence()

    def mixture(self, nodes: Nodes, rows: Rows, x: Tensor) -> Mixture:
        """The predictive of each new row alone.

        Args:
            nodes: What `nodes` returned for the rows, or these joined with those of another kind of curve whose
                noise and frequency are the same and whose `spread` is 0, as is this one's.
            rows: What is given.
            x: New inputs `(T, M, 1)`.
        """
        psi, given = features(x, self.frequency), self._summary(rows)
        # What the mean of w explains of each feature and of y.
        explained = psi @ given.covariance @ given.products / self.noise**2
        variance = self.noise**2 + ((psi @ given.covariance) * psi).sum(-1)
        unexplained, sd = psi - explained[..., :4], variance.sqrt()
        return Mixture(nodes.log_weight, BoxedRows(explained[..., 4], unexplained, sd, nodes.coefficient))

    def count(self, *x: Tensor) -> int:
        """How many nodes it takes so that curves of neighbouring nodes are close at inputs x.

        Raises:
            ValueError: If they are more than `MOST_NODES`.
        """
        edges = torch.linspace(*self.unknown, FEWEST_NODES + 1, dtype=torch.float64)
        slope, offset = self.loadings(edges)
        steps = torch.cat([(end * slope + offset).diff(dim=0) for end in self.coefficient])
        psi = torch.cat([features(inputs, self.frequency).flatten(0, 1) for inputs in x])
        change = float((psi @ steps.T).abs().max()) / (CLOSE * self.noise)
        if not change * FEWEST_NODES < MOST_NODES:
            farthest = max(float(inputs.abs().max()) for inputs in x)
            raise ValueError(
                f"the oracle would need more than {MOST_NODES} nodes to resolve curves at inputs up to {farthest:.3g} "
                f"with noise {self.noise:g}; use inputs nearer to 0 or a larger noise"
            )
        return math.ceil(FEWEST_NODES * max(1.0, change))

    def nodes(self, rows: Rows, count: int) -> Nodes:
        """Integrates c and w out at `count` values of u, placed for each task where its posterior is."""
        given = self._summary(rows)
        edges = torch.linspace(*self.unknown, count + 1, dtype=torch.float64).repeat(len(rows), 1)
        for _ in range(ROUNDS):
            middle, width = cells(edges)
            edges = refined(edges, self._at(middle, given)[0] + width.log())
        middle, width = cells(edges)
        log_density, coefficient = self._at(middle, given)
        return Nodes(log_density + width.log(), coefficient)

    def _summary(self, rows: Rows) -> _Summary:
        psi = features(rows.x, self.frequency)
        seen = torch.cat([psi, rows.y.unsqueeze(-1)], -1) * rows.mask.unsqueeze(-1)
        products, spread = seen.mT @ seen, torch.tensor(self.spread, dtype=torch.float64)
        within = products[:, :4, :4] * spread * spread.unsqueeze(-1) / self.noise**2
        lower = torch.linalg.cholesky(within + torch.eye(4, dtype=torch.float64))
        covariance = spread.unsqueeze(-1) * torch.cholesky_inverse(lower) * spread
        left = products - products[:, :, :4] @ covariance @ products[:, :4] / self.noise**2
        log_det = lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_scale = -rows.n * (0.5 * math.log(2 * math.pi) + math.log(self.noise)) - log_det
        return _Summary(products[:, :4], covariance, left / self.noise**2, log_scale)

    def _at(self, u: Tensor, given: _Summary) -> tuple[Tensor, Coefficient]:
        """Log evidence times the prior density at u `(T, K)`, and the coefficient there."""
        slope, offset = self.loadings(u)
        cross, with_y = given.gram[:, :4, :4], given.gram[:, :4, 4:]
        along = slope @ cross
        precision = (along * slope).sum(-1)
        shift = (slope @ with_y).squeeze(-1) - (along * offset).sum(-1)
        residual = given.gram[:, 4, 4, None] - 2 * (offset @ with_y).squeeze(-1) + ((offset @ cross) * offset).sum(-1)
        low, high = (torch.full((u.shape[-1],), end, dtype=torch.float64) for end in self.coefficient)
        coefficient = Coefficient(slope, offset, Boxed(precision, shift, low, high))
        log_density = given.log_scale.unsqueeze(-1) - 0.5 * residual + coefficient.boxed.log_integral()
        return log_density - (high - low).log() + self._log_prior(u), coefficient

    def _log_prior(self, u: Tensor) -> Tensor | float:
        low, high = self.unknown
        return -math.log(high - low) if self.log_prior is None else self.log_prior(u)


@dataclass(frozen=True, kw_only=True)
class CurveFamily(Family):
    """Tasks that are curves of one input, of one kind or of one of two that are equally likely.

    Attributes:
        interval: Interval of inputs, uniform.
        context_rows: Rows of an episode's context.
        target_rows: Rows of an episode's target.
    """

    interval: Interval = (-5.0, 5.0)
    context_rows: int | tuple[int, int] = 5
    target_rows: int | tuple[int, int] = 200
    dim = 1

    @property
    @abc.abstractmethod
    def kinds(self) -> tuple[Curves, ...]:
        """The kinds of curve, one or two."""

    def inputs(self, tasks: int, rows: int, generator: torch.Generator, *, target: bool = False) -> Tensor:
        """Draws inputs, uniform."""
        return uniform((tasks, rows, 1), self.interval, generator)

    def predictive(self, rows: Rows, x: Tensor) -> Distribution:
        """A mixture over the unknown of cut normal coefficients and noise; kinds weighed by their evidence."""
        first, *others = [curves.nodes(rows, curves.count(rows.x, x)) for curves in self.kinds]
        for other in others:
            first = first.joined(other, 0.5)
        return self.kinds[0].mixture(first, rows, x)

    def evidence(self, rows: Rows) -> Tensor:
        """Log density of all rows of each task, over its kinds."""
        return self.log_evidences(rows).logsumexp(0) - math.log(len(self.kinds))

    def log_evidences(self, rows: Rows) -> Tensor:
        """Log density of all rows of each task given its kind, `(kinds, T)`."""
        return torch.stack([curves.log_evidence(rows) for curves in self.kinds])
