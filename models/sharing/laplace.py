"""The multivariate Laplace prior, p(φ_i | θ) ∝ exp(−‖(φ_i − centre)/τ‖): the unsquared norm as a penalty.

The mode of φ_i given θ lies at the centre exactly unless the task's data pull harder than 1/τ (draws and means lie near
it), and few tasks may lie far away. It is written as a map of standard normal noise along its radius, smooth where the
density has its kink, so that every method treats it as any other prior.

Deviation: the penalty is the distance to one centre, not Σ ‖φ_i − φ_j‖ over pairs. It ties tasks to the centre, not to
each other in several groups (for those `Clusters`), so that given θ tasks are independent and a new one has a prior.

References:
    Eltoft, Kim, Lee: On the multivariate Laplace distribution, 2006, https://doi.org/10.1109/LSP.2006.870353
    (a Gaussian scale mixture; theirs mixes by an exponential, the norm as a penalty by a Gamma((d + 1)/2))
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import AffineTransform, Distribution, Transform, constraints

import bayesmeta as bm
from bayesmeta.models.sharing.blocks import Sharing

DEGREE = 14
"""Of the polynomial that stands for the log of the map of radii: right to 1e-7."""
BEYOND = 9.0
"""The map holds up to this much above √d, where the noise has less than 1e-17 of its probability, then it is a line."""


@dataclass(frozen=True)
class Laplace(Sharing):
    """φ_i = centre + τ v_i, v_i of density ∝ exp(−‖v‖), τ one a block.

    Shared sites: `mu` and `tau`. A number of φ has prior sd τ √(d + 1).
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d:
            _radii(self.d)  # found before a model is recorded

    @property
    def shared(self) -> dict[str, Distribution]:
        """`mu` and `tau`."""
        return {**self.centres(), **self.scales(len(self.blocks.all))}

    def distribution(self, shared: Mapping[str, Tensor], batch: bm.Batch) -> Distribution:
        """The Laplace distribution as a map of normal noise."""
        noise = dist.Normal(torch.zeros(self.d), 1.0).to_event(1)
        scale = shared["tau"][self.blocks.index]
        moved = AffineTransform(self.blocks.centre(shared), scale, event_dim=1)
        return dist.TransformedDistribution(noise, [Radial(self.d), moved])

    def variance(self, shared: Mapping[str, Tensor]) -> Tensor:
        """τ² (d + 1)."""
        return shared["tau"][self.blocks.index].square() * (self.d + 1)


class Radial(Transform):
    """z ↦ v = z g(‖z‖)/‖z‖ with g such that z ~ N(0, I) gives v of density ∝ exp(−‖v‖)."""

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, d: int) -> None:
        """The map in d dimensions."""
        super().__init__()
        self.d = d

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Radial) and other.d == self.d

    __hash__ = object.__hash__

    def _call(self, z: Tensor) -> Tensor:
        return z * _stretch(_norm(z), *_radii(self.d))

    def _inverse(self, v: Tensor) -> Tensor:
        length = _norm(v)
        radius = self._radius(length.detach())
        return v * (radius + (length - length.detach()) * self._slope(length.detach(), radius)) / length

    def _slope(self, length: Tensor, radius: Tensor) -> Tensor:
        """The slope of the radius as the length grows: both densities are known, and beyond the end it is a line."""
        _, end, slope = _radii(self.d)
        inside, far = radius.clamp(max=end), torch.where(radius > end, 1.0, length)
        log_gamma = (self.d - 1) * (far / inside).log() - far - math.lgamma(self.d)
        log_chi = (1 - self.d / 2) * math.log(2) - inside**2 / 2 - math.lgamma(self.d / 2)
        return torch.where(radius > end, 1 / slope, (log_gamma - log_chi).exp())

    def _radius(self, length: Tensor) -> Tensor:
        """The radius of noise whose image has a given length, by bisection."""
        low, high = torch.zeros_like(length), length + math.sqrt(self.d) + BEYOND
        for _ in range(60):
            middle = 0.5 * (low + high)
            above = middle * _stretch(middle, *_radii(self.d)) > length
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return 0.5 * (low + high)

    def log_abs_det_jacobian(self, z: Tensor, v: Tensor) -> Tensor:
        """From the two densities, which are known."""
        constant = 0.5 * self.d * math.log(2 * math.pi) - _log_volume(self.d)
        return _norm(v)[..., 0] - 0.5 * z.square().sum(-1) - constant


def _norm(z: Tensor) -> Tensor:
    """Length `(…, 1)`, with a gradient at 0."""
    return (z.square().sum(-1, keepdim=True) + torch.finfo(z.dtype).tiny).sqrt()


def _log_volume(d: int) -> float:
    """Log ∫ exp(−‖v‖) dv."""
    return math.log(2) + 0.5 * d * math.log(math.pi) + math.lgamma(d) - math.lgamma(d / 2)


def _stretch(radius: Tensor, coefficients: tuple[float, ...], end: float, slope: float) -> Tensor:
    """g(r)/r: exp of a polynomial of 2r/end − 1, and a line for g beyond its end."""
    inside = radius.clamp(max=end)
    powers = (2 * inside / end - 1) ** torch.arange(len(coefficients), dtype=radius.dtype)  # a short graph
    ratio = torch.exp((powers * torch.tensor(coefficients, dtype=radius.dtype)).sum(-1, keepdim=True))
    return (inside * ratio + slope * (radius - inside)) / radius


@functools.cache
def _radii(d: int) -> tuple[tuple[float, ...], float, float]:
    """Coefficients of log g(r)/r in powers of 2r/end − 1, end, and g's slope there; ‖z‖ is χ_d, ‖v‖ Gamma(d)."""
    end = math.sqrt(d) + BEYOND
    series: Any = np.polynomial.Chebyshev.interpolate(lambda r: _log_ratio(d, r), DEGREE, [0.0, end])
    length = end * math.exp(series(end))
    slope = length * (1 / end + series.deriv()(end))
    powers = np.polynomial.chebyshev.cheb2poly(series.coef)
    return tuple(powers.tolist()), end, float(slope)


def _log_ratio(d: int, radius: np.ndarray) -> np.ndarray:
    """Log g(r)/r, g(r) the Gamma(d) quantile at the χ_d probability of r, by bisection."""
    half, r = d / 2, torch.as_tensor(radius, dtype=torch.float64).clamp(min=1e-9)
    below = r**2 < d
    lower, upper = _log_lower(half, r**2 / 2), torch.special.gammaincc(torch.full_like(r, half), r**2 / 2)
    low, high = torch.full_like(r, -100.0), torch.full_like(r, 2 * math.log(math.sqrt(d) + BEYOND))
    for _ in range(100):
        log_g = 0.5 * (low + high)
        far = torch.special.gammaincc(torch.full_like(r, float(d)), log_g.exp()) < upper
        above = torch.where(below, _log_lower(d, log_g.exp()) > lower, far)
        low, high = torch.where(above, low, log_g), torch.where(above, log_g, high)
    ratio: np.ndarray = (0.5 * (low + high) - r.log()).numpy()
    return ratio


def _log_lower(a: float, x: Tensor) -> Tensor:
    """Log of the regularised lower incomplete gamma function, by its series: it never underflows."""
    term, total = torch.ones_like(x), torch.ones_like(x)
    for k in range(1, int(3 * float(x.max())) + 60):
        term = term * x / (a + k)
        total = total + term
    return a * x.log() - x - math.lgamma(a + 1) + total.log()
