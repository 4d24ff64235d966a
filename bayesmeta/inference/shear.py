"""Coordinates in which the tasks of a joint density follow θ: what is sampled is how far they are from there.

Given θ, a task with many rows lies near its mode m(θ), a long way from where another θ would put it; in whitened
coordinates a sampler can then only take small steps in θ. With w = z − A (θ − θ̄), A the slope of m over the spread of
θ, it need not. The map is linear and its determinant 1, so the density is the same. Where modes follow θ along curves
that the slope misses by more than a task is wide, as those of very different tasks around one scale do, it makes
matters worse: `fits` tells.

References:
    Papaspiliopoulos, Roberts, Sköld: A General Framework for the Parametrization of Hierarchical Models, 2007,
    https://doi.org/10.1214/088342307000000014
"""

from __future__ import annotations

import numpy as np

from bayesmeta.inference.joint import Joint

TRIED = 32
"""Positions at which modes are compared with where the slope puts them."""
MOST_BENT = 0.5
"""Root mean square of the difference, in sds of a task given θ."""


class Sheared:
    """The log density of a joint in these coordinates, and its gradient.

    Args:
        joint: The joint density.
        positions: Positions `(chain, draw, d)` that show where θ is and how wide.
    """

    def __init__(self, joint: Joint, positions: np.ndarray) -> None:
        self._joint, self._size = joint, joint.shared_size
        self._theta = positions[..., : self._size].reshape(-1, self._size)
        self._centre = self._theta.mean(0)
        self._slope = np.stack([self._along(step) for step in np.diag(self._theta.std(0))], 1)

    def _along(self, step: np.ndarray) -> np.ndarray:
        """How fast the modes move between θ̄ − step and θ̄ + step, for a unit of θ; 0 where one is missing."""
        above, below = (self._modes(self._centre + sign * step) for sign in (1, -1))
        length = 2 * float(np.abs(step).sum())
        slope = (above - below) / length if length else np.zeros_like(above)
        return np.where(np.isfinite(slope), slope, 0.0)

    def _modes(self, theta: np.ndarray) -> np.ndarray:
        return self._joint.conditional_modes(theta)[0].reshape(-1)

    @property
    def fits(self) -> bool:
        """Whether tasks that have modes are, at the positions, where the slope puts them: up to half an sd given θ."""
        some = self._theta[np.linspace(0, len(self._theta) - 1, TRIED).astype(int)]
        left = np.stack([self._modes(theta) - self._slope @ (theta - self._centre) for theta in some])
        _, factor = self._joint.conditional_modes(self._centre)
        there = np.isfinite(left)
        mean = np.where(there, left, 0.0).sum(0) / np.maximum(there.sum(0), 1)
        left = np.where(there, left - mean, 0.0).reshape(TRIED, len(factor), -1)
        bent = np.einsum("sti,tij->stj", left, factor)
        return bool(np.sqrt((bent**2).mean((0, 2))).max(initial=0.0) <= MOST_BENT)

    def __call__(self, position: np.ndarray) -> tuple[float, np.ndarray]:
        """Log density and its gradient `(d,)`."""
        value, gradient = self._joint(self._moved(position, 1.0))
        gradient = gradient.copy()
        gradient[: self._size] += gradient[self._size :] @ self._slope
        return value, gradient

    def inverse(self, positions: np.ndarray) -> np.ndarray:
        """Positions `(…, d)` of the joint in these coordinates."""
        return self._moved(positions, -1.0)

    def view(self, positions: np.ndarray) -> np.ndarray:
        """Positions `(chain, draw, d)` as `Joint.view` gives them."""
        return self._joint.view(self._moved(positions, 1.0))

    def _moved(self, positions: np.ndarray, sign: float) -> np.ndarray:
        moved = positions.copy()
        moved[..., self._size :] += sign * (positions[..., : self._size] - self._centre) @ self._slope.T
        return moved
