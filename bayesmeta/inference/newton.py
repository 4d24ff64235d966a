"""Damped Newton steps to the modes of many log joints at once; what has not converged is marked.

`laplace.py` looks for the modes of task posteriors by them, `evidence.py` falls back on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_STEPS = 100
PATIENCE = 30
"""After so many steps it is enough that one of several starts has come to an end."""
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-2}
"""A mode is reached when the next Newton step is shorter than this, in posterior sds."""
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6}
"""A relative loss of the log joint that a step may make."""
SINGULAR = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Eigenvalues of a mended Hessian are at least this share of the largest."""
LONGEST = 10.0
"""No step is longer than so many prior sds in one coordinate."""
MAX_DAMPING = 1e10

Curvature = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""Noise `(S, T, d)` -> value `(S, T)`, gradient `(S, T, d)` and Hessian `(S, T, d, d)` of the log joint."""


@dataclass
class Modes:
    """Modes of S × T log joints in whitened coordinates.

    Attributes:
        loc: Where they are `(S, T, d)`.
        factor: Lower Cholesky factors of the negative Hessians there `(S, T, d, d)`.
        value: Log joints there `(S, T)`.
        converged: Whether Newton's steps have come to an end `(S, T)`.
    """

    loc: Tensor
    factor: Tensor
    value: Tensor
    converged: Tensor

    @property
    def log_evidence(self) -> Tensor:
        """Laplace's approximation of log p(D_i | θ_s), `(S, T)`."""
        log_det = self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return self.value + 0.5 * self.loc.shape[-1] * math.log(2 * math.pi) - log_det


@dataclass
class _Point:
    """Where the search of each task stands."""

    loc: Tensor
    value: Tensor
    gradient: Tensor
    precision: Tensor

    @classmethod
    def at(cls, curvature: Curvature, loc: Tensor) -> _Point:
        value, gradient, hessian = curvature(loc)
        return cls(loc, value, gradient, -(hessian + hessian.mT) / 2)

    def moved(self, other: _Point, better: Tensor) -> _Point:
        """The other point where it is better `(S, T)`."""
        one, two = better.unsqueeze(-1), better[..., None, None]
        return _Point(
            torch.where(one, other.loc, self.loc),
            torch.where(better, other.value, self.value),
            torch.where(one, other.gradient, self.gradient),
            torch.where(two, other.precision, self.precision),
        )


def find_modes(curvature: Curvature, start: Tensor, *, steps: int = MAX_STEPS, several: bool = False) -> Modes:
    """Climbs from `start` `(S, T, d)` to a mode of each log joint; steps are damped task by task.

    A step is taken only where it does not lower the log joint; a Hessian that is not negative definite is replaced by
    one with the sizes of its eigenvalues. Curvature at the end is positive definite in any case. `several`: the S are
    starts of one search; those that take long are given up where another one has arrived.
    """
    point = _Point.at(curvature, start)
    damping = torch.zeros(start.shape[:-1], dtype=start.dtype)
    tolerance, rounding = TOLERANCE[start.dtype], ROUNDING[start.dtype]
    for step in range(steps):
        positive, definite = made_positive(point.precision)
        move = _step(positive, damping, point.gradient)
        length = (move * (positive @ move.unsqueeze(-1)).squeeze(-1)).sum(-1).clamp(min=0).sqrt()
        converged = (length < tolerance) & definite & (damping < 1) & torch.isfinite(point.value)
        given_up = converged.any(0) if several and step >= PATIENCE else damping > MAX_DAMPING
        if bool((converged | given_up).all()) or step == steps - 1:
            break
        trial = _Point.at(curvature, point.loc + move)
        better = torch.isfinite(trial.value) & (trial.value >= point.value - rounding * (1 + point.value.abs()))
        better &= torch.isfinite(trial.gradient).all(-1)
        damping = torch.where(better, damping / 10, (10 * damping).clamp(min=0.1))
        damping = torch.where(damping < 1e-6, 0.0, damping)
        point = point.moved(trial, better)
    return Modes(point.loc, torch.linalg.cholesky(positive), point.value, converged)


def _step(positive: Tensor, damping: Tensor, gradient: Tensor) -> Tensor:
    eye = torch.eye(gradient.shape[-1], dtype=gradient.dtype)
    damped = positive * (1 + damping[..., None, None] * eye)
    gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
    move = torch.cholesky_solve(gradient.unsqueeze(-1), torch.linalg.cholesky(damped)).squeeze(-1)
    longest = move.abs().amax(-1, keepdim=True).clamp(min=LONGEST)
    return move * (LONGEST / longest)


def made_positive(precision: Tensor) -> tuple[Tensor, Tensor]:
    """Positive definite precisions, and where they were so from the start `(S, T)`."""
    usable = torch.isfinite(precision).flatten(-2).all(-1)
    definite = (torch.linalg.cholesky_ex(precision).info == 0) & usable
    if bool(definite.all()):
        return precision, definite
    eye = torch.eye(precision.shape[-1], dtype=precision.dtype)
    safe = torch.where(usable[..., None, None], precision, eye)
    values, vectors = torch.linalg.eigh(safe)
    size = values.abs()
    least = (size.amax(-1, keepdim=True) * SINGULAR[precision.dtype]).clamp(min=1e-2)
    mended = (vectors * torch.maximum(size, least).unsqueeze(-2)) @ vectors.mT
    return torch.where(definite[..., None, None], precision, mended), definite
