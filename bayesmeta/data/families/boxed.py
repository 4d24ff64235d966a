"""A coefficient c with a uniform prior on an interval, seen through Gaussian rows: its posterior in closed form.

The likelihood of c is exp(q c − P c² / 2), P a precision and q a shift, so that the posterior is a normal distribution
cut at the interval's ends. Here are its integral, moments and draws, and the density of a row that depends on c;
`curves.py` mixes them over what is not linear.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

FLATTEST = 1e-8
"""The smallest P in units of 1 / width²: below it a likelihood is flat to 1e-8, and its peak ill-defined."""
FARTHEST = 30.0
"""Standard deviations from the peak beyond which a draw lies at the nearest end of the interval."""
DEPTH = 40.0
"""Moments leave out where the log density is this far below its mode."""
POINTS = 48


@dataclass(frozen=True)
class Boxed:
    """c given rows: density ∝ exp(q c − P c² / 2) on low … high.

    Attributes:
        precision: P.
        shift: q.
        low: Lower end.
        high: Upper end; all broadcast.
    """

    precision: Tensor
    shift: Tensor
    low: Tensor
    high: Tensor

    def log_integral(self) -> Tensor:
        """Log ∫ exp(q c − P c² / 2) dc over the interval."""
        precision, peak, lower, upper = self._standard()
        return 0.5 * (precision * peak.square() - precision.log() + math.log(2 * math.pi)) + log_between(lower, upper)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of c, by quadrature: the closed form cancels where the interval is short."""
        mode = (self.shift / self.precision.clamp(min=torch.finfo(self.shift.dtype).tiny)).clamp(self.low, self.high)
        gradient = (self.shift - self.precision * mode).abs()
        reach = 2 * DEPTH / (gradient + (gradient.square() + 2 * DEPTH * self.precision).sqrt())
        start, end = torch.maximum(self.low, mode - reach), torch.minimum(self.high, mode + reach)
        share, weight = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(POINTS))
        c = start.unsqueeze(-1) + (end - start).unsqueeze(-1) * (0.5 + 0.5 * share)
        log_density = self.shift.unsqueeze(-1) * c - 0.5 * self.precision.unsqueeze(-1) * c.square()
        mass = (log_density + weight.log()).softmax(-1)
        mean = (mass * c).sum(-1)
        return mean, (mass * (c - mean.unsqueeze(-1)).square()).sum(-1)

    def draw(self) -> Tensor:
        """One draw of c for each entry."""
        precision, peak, lower, upper = self._standard()
        below = lower + upper > 0
        # Φ has its digits in the lower tail: what lies above the peak is mirrored.
        first, last = torch.where(below, -upper, lower), torch.where(below, -lower, upper)
        start, end = (0.5 * torch.erfc(-math.sqrt(0.5) * z) for z in (first, last))
        z = torch.special.ndtri(start + (end - start) * torch.rand_like(start))
        drawn = peak + torch.where(below, -z, z) / precision.sqrt()
        return torch.where(last < -FARTHEST, peak, drawn).clamp(self.low, self.high)

    def _standard(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """P, the peak q / P, and the ends of the interval in standard deviations from it."""
        precision = torch.maximum(self.precision, FLATTEST / (self.high - self.low).square())
        peak, root = self.shift / precision, precision.sqrt()
        return precision, peak, (self.low - peak) * root, (self.high - peak) * root


_LOG_ROOT = 0.5 * math.log(2 * math.pi)


def log_between(lower: Tensor, upper: Tensor) -> Tensor:
    """Log (Φ(upper) − Φ(lower)) with all digits in both tails."""
    mirrored = lower + upper > 0
    first, last = torch.where(mirrored, -upper, lower), torch.where(mirrored, -lower, upper)
    larger = torch.special.log_ndtr(last)
    return larger + torch.log(-torch.expm1(torch.special.log_ndtr(first) - larger))


@dataclass(frozen=True)
class Coefficient:
    """c at K nodes: rows have the mean ψᵀ γ + c ψᵀ α.

    Attributes:
        slope: α `(T, K, p)`.
        offset: γ `(T, K, p)`.
        boxed: c given rows: P and q `(T, K)`, ends `(K,)`.
    """

    slope: Tensor
    offset: Tensor
    boxed: Boxed

    def part(self, tasks: slice) -> Coefficient:
        """Returns some of the tasks."""
        boxed = replace(self.boxed, precision=self.boxed.precision[tasks], shift=self.boxed.shift[tasks])
        return Coefficient(self.slope[tasks], self.offset[tasks], boxed)

    def joined(self, other: Coefficient) -> Coefficient:
        """Returns these nodes and the other's."""
        ours, theirs = self.boxed, other.boxed
        boxed = Boxed(
            torch.cat([ours.precision, theirs.precision], -1),
            torch.cat([ours.shift, theirs.shift], -1),
            torch.cat([ours.low, theirs.low]),
            torch.cat([ours.high, theirs.high]),
        )
        return Coefficient(torch.cat([self.slope, other.slope], 1), torch.cat([self.offset, other.offset], 1), boxed)

    def picked(self, node: Tensor) -> tuple[Tensor, Tensor, Boxed]:
        """α and γ `(S, T, M, p)` and c `(S, T, M)` at nodes `(S, T, M)`."""
        task, boxed = torch.arange(len(self.slope)).unsqueeze(-1), self.boxed
        ends = boxed.low[node], boxed.high[node]
        return (
            self.slope[task, node],
            self.offset[task, node],
            Boxed(boxed.precision[task, node], boxed.shift[task, node], *ends),
        )


@dataclass(frozen=True)
class BoxedRows:
    """Components of a mixture: y = base + ψᵀ γ_k + c_k ψᵀ α_k + sd ε.

    Attributes:
        base: `(T, M)`.
        features: ψ `(T, M, p)`.
        sd: `(T, M)`.
        coefficient: α, γ and c at each node.
    """

    base: Tensor
    features: Tensor
    sd: Tensor
    coefficient: Coefficient

    @property
    def rows(self) -> int:
        """M."""
        return self.base.shape[1]

    def part(self, tasks: slice) -> BoxedRows:
        """Returns some of the tasks."""
        return BoxedRows(self.base[tasks], self.features[tasks], self.sd[tasks], self.coefficient.part(tasks))

    def log_prob(self, y: Tensor) -> Tensor:
        """Log densities: the ratio of the integrals over c with the row and without it."""
        centre, slope, sd, before = self._spread()
        residual, slope = (y - centre) / sd, slope / sd
        after = replace(before, precision=before.precision + slope.square(), shift=before.shift + slope * residual)
        return after.log_integral() - before.log_integral() - 0.5 * residual.square() - sd.log() - _LOG_ROOT

    def moments(self) -> tuple[Tensor, Tensor]:
        """Means and variances."""
        centre, slope, sd, before = self._spread()
        mean, variance = before.moments()
        return centre + slope * mean, slope.square() * variance + sd.square()

    def draw(self, node: Tensor) -> Tensor:
        """Draws labels `(S, T, M)`."""
        slope, offset, boxed = self.coefficient.picked(node)
        mean = self.base + (self.features * (offset + slope * boxed.draw().unsqueeze(-1))).sum(-1)
        return torch.normal(mean, self.sd.expand(node.shape))

    def _spread(self) -> tuple[Tensor, Tensor, Tensor, Boxed]:
        """Centre and slope `(T, M, K)`, sd `(T, M, 1)` and c `(T, 1, K)`."""
        boxed, across = self.coefficient.boxed, self.features @ self.coefficient.slope.mT
        boxed = replace(boxed, precision=boxed.precision.unsqueeze(1), shift=boxed.shift.unsqueeze(1))
        centre = self.base.unsqueeze(-1) + self.features @ self.coefficient.offset.mT
        return centre, across, self.sd.unsqueeze(-1), boxed
