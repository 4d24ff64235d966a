"""The mode of the marginal density of θ, and the normal around it: where the marginal path starts."""

from __future__ import annotations

import contextlib
import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.evidence import Evidence
from bayesmeta.inference.shared import NormalShared

OPTIMISER_STEPS = 300
STARTS = 20
"""θ that are tried where the density at the prior's centre is not finite."""
SPREAD = 0.5
"""Their sd around the prior's centre, in prior units."""
AGAIN = 5
"""How often another start is tried where the search has ended in a place without curvature, or on a slope."""
ROUNDS = 20
"""How often the climb goes on after better modes of tasks were found."""
FLAT = 0.5
"""Where the search ends the gradient is at most this, in units of the curvature: the mode is so many sds away.
Weights of modules that are learned along are not done in so few steps; with them any finite end counts."""
STEP = 1e-3
"""Of differences of the gradient, in sds of θ."""
WIDEST = 1e4
"""No sd of θ is larger, in prior units: a flat direction has no curvature."""


def normal_at(theta: Tensor, covariance: Tensor) -> NormalShared:
    """q(θ) with a given mean and covariance."""
    factor = torch.linalg.cholesky(covariance)
    diagonal = factor.diagonal()
    shared = NormalShared(theta, torch.ones_like(theta))
    with torch.no_grad():
        shared.log_diagonal.copy_(diagonal.log())
        shared.lower.copy_((factor / diagonal.unsqueeze(-1)).tril(-1))
    return shared


@dataclass(frozen=True)
class _End:
    """Where a search has ended: log density, norm of the gradient in units of the curvature, and what was found."""

    value: float
    slope: float
    theta: Tensor
    values: dict[str, Tensor]
    half: Tensor
    modes: list[Tensor]

    @property
    def done(self) -> bool:
        """Whether the search may stop here."""
        return self.value > -math.inf and (bool(self.values) or self.slope <= FLAT)


class Mode:
    """The mode of θ and of the learned values, by L-BFGS on the marginal.

    Attributes:
        theta: The mode `(d_theta,)`, once it is found.
        values: The learned values there.
    """

    def __init__(self, density: TaskDensity, evidence: Evidence) -> None:
        self._evidence = evidence
        self._origin, self._scale = density.prior_scale()
        self.values = {name: value.clone() for name, value in evidence.values.items()}
        self.theta = self._origin.clone()
        self._last = self._scale.diag()

    def find(self, *, starts: int = 1) -> None:
        """Climbs to the mode; after a first climb in prior units again in units of the curvature.

        Where tasks have better modes there than those around which they were integrated, it climbs on with these.

        Args:
            starts: From how many θ to climb first, to go on from the best: the prior's centre and draws of the prior.

        Raises:
            ValueError: The log density is not finite at any start, or where the search ended.
        """
        ends: list[_End] = []
        for first in (0, *[1] * AGAIN):
            self._take(max((self._reached(k) for k in range(first, first + starts)), key=lambda end: end.value))
            ends.append(self._with_better_modes(self._settled(retried=bool(first))))
            best = max(ends, key=lambda end: end.value)
            if best.done:
                break
        if best.value == -math.inf:
            raise ValueError(
                "the marginal density of the shared parameters is not finite: some tasks have no mode that Newton's "
                "steps find; check the data and the priors, or use method='nuts' or method='amortized'"
            )
        self._take(best)
        if not best.done:
            warnings.warn(
                f"the search for the mode of the shared parameters ended on a slope, of {best.slope:.1f} in units of "
                f"the curvature (limit {FLAT}), from {len(ends) * starts} starts; the highest end is taken. If a scale "
                "runs to 0 there, give it a prior that keeps off 0; or try more starts=, or method='nuts'",
                stacklevel=2,
            )

    def _with_better_modes(self, end: _End) -> _End:
        """Where the climb ends once no task has a better mode than the one that it is integrated around."""
        moved = False
        for _ in range(ROUNDS):
            self._take(end)
            better = self._improves(end.theta)
            if not better and (end.done or not moved):
                break
            moved, end = better, self._climbed_on()
        return end

    def _climbed_on(self) -> _End:
        """A higher end, reached by a climb in prior units or in the last ones of curvature; without one, this place."""
        here = self._standing()
        for unit in (self._scale.diag(), here.half):
            self._take(here)
            with contextlib.suppress(RuntimeError):  # a matrix that is not positive definite
                self._climb(unit)
            end = self._settled(retried=True)
            if end.value > here.value:
                return end
        return here

    def _take(self, end: _End) -> None:
        self.theta, self.values, self._last = end.theta, end.values, end.half
        self._evidence.modes = end.modes

    def _settled(self, *, retried: bool) -> _End:
        """Climbs on in units of the curvature; an end without density where that fails, an error at the first start."""
        try:
            half = self._half()
            if bool(torch.isfinite(half).all()):
                self._climb(half)
                return self._standing()
        except RuntimeError:  # a matrix that is not positive definite
            if not retried:
                raise
        return self._end(-math.inf, math.nan)

    def _standing(self) -> _End:
        """The end of a search that stays where it is."""
        value, gradient, _ = self._at(self.theta)
        return self._end(float(value), float((self._last.mT @ gradient).norm()))

    def _end(self, value: float, slope: float) -> _End:
        value = value if math.isfinite(value) else -math.inf
        return _End(value, slope, self.theta, self.values, self._last, self._evidence.modes)

    def _at(self, theta: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        return self._evidence(theta, list(self.values.values()))

    def _reached(self, start: int) -> _End:
        """The end of a first climb; one that fails counts for nothing. Modes are looked for anew at draws of θ."""
        self.values = {name: value.clone() for name, value in self._evidence.values.items()}
        if start:
            self.theta = self._origin + self._scale * torch.randn_like(self._origin)
            self._improves(self.theta)
        else:
            self.theta = self._start()
        try:
            self._climb(self._scale.diag())
        except RuntimeError:  # a matrix that is not positive definite
            if not start:
                raise
            return self._end(-math.inf, math.nan)
        return self._standing()

    def _start(self) -> Tensor:
        """The prior's centre, or another θ near it where the density is finite."""
        for trial in range(STARTS):
            noise = torch.randn_like(self._origin) if trial else torch.zeros_like(self._origin)
            theta = self._origin + SPREAD * self._scale * noise
            if bool(torch.isfinite(self._at(theta)[0])):
                return theta
        return self._origin.clone()

    def _improves(self, theta: Tensor) -> bool:
        return self._evidence.improve(theta, list(self.values.values()))

    def _climb(self, unit: Tensor) -> None:
        """L-BFGS in coordinates `theta + unit @ white`."""
        origin, white = self.theta, torch.zeros_like(self.theta).requires_grad_()
        values = [value.detach().clone().requires_grad_() for value in self.values.values()]
        search = torch.optim.LBFGS([white, *values], max_iter=OPTIMISER_STEPS, line_search_fn="strong_wolfe")

        def closure() -> float:
            given = [value.detach() for value in values]
            total, gradient, others = self._evidence(origin + unit @ white.detach(), given)
            white.grad = -unit.mT @ gradient
            for value, other in zip(values, others, strict=True):
                value.grad = -other
            return -float(total) if math.isfinite(float(total)) else 1e100

        search.step(closure)
        self.theta = origin + unit @ white.detach()
        self.values = {name: value.detach() for name, value in zip(self.values, values, strict=True)}

    def _half(self) -> Tensor:
        """A root of the covariance of the normal at the mode: differences of the gradient, twice to find their step."""
        half = self._scale.diag()
        for _ in range(2):
            columns = []
            for unit in half.mT:
                up, down = (self._at(self.theta + sign * STEP * unit)[1] for sign in (1, -1))
                columns.append(-(half.mT @ (up - down)) / (2 * STEP))
            if not columns:
                return half
            precision = torch.stack(columns)
            if not bool(torch.isfinite(precision).all()):
                return torch.full_like(half, math.nan)
            roots, vectors = torch.linalg.eigh((precision + precision.mT) / 2)
            half = half @ (vectors / roots.abs().clamp(min=WIDEST**-2).sqrt())
        self._last = half
        return half

    def shared(self) -> NormalShared:
        """The normal with the mode and the curvature there, or the curvature found last where the density has holes."""
        half = self._half()
        half = half if bool(torch.isfinite(half).all()) else self._last
        return normal_at(self.theta, half @ half.mT)
