"""Centred coordinates of a joint density: the task parameters themselves in place of their whitened noise.

Where rows say much more about a task than its prior does, the task stays where it is while θ moves: φ and θ are then
nearly independent and whitened noise is not. Where rows say little it is the other way round. `informed` tells, at what
a first few draws have found; models whose parameters are no linear function of their noise stay whitened.

References:
    Papaspiliopoulos, Roberts, Sköld: A General Framework for the Parametrization of Hierarchical Models, 2007,
    https://doi.org/10.1214/088342307000000014
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.candidates import BY_DRAW
from bayesmeta.inference.joint import Joint

LEFT = 0.25
"""Share of the prior's variance that is left of the noise once rows are known, on average over tasks: with less of each
coordinate tasks count as informed."""
TRIED = 5
"""θ at which that is so, and parameters are linear functions of the noise."""
LINEAR = 1e-9
CHUNK_NUMBERS = 2**22


def informed(density: TaskDensity, tasks: Tasks, joint: Joint, positions: np.ndarray) -> bool:
    """Whether centred coordinates can be had, and the rows of tasks say enough about them.

    Args:
        density: The model.
        tasks: The tasks.
        joint: Its whitened joint density.
        positions: Positions `(chain, draw, d)` that show where θ is.
    """
    flat = positions.reshape(-1, positions.shape[-1])
    some = flat[np.linspace(0, len(flat) - 1, TRIED).astype(int)]
    enough = all(_left(joint, position[: joint.shared_size]) <= LEFT for position in some)
    return enough and _Affine(density, tasks).holds(torch.as_tensor(joint.view(some)))


def _left(joint: Joint, theta: np.ndarray) -> float:
    """The share of the variance that is left at a θ of the worst coordinate; infinite where a task has no mode."""
    loc, factor = joint.conditional_modes(theta)
    return float(np.square(np.linalg.inv(factor)).sum(1).mean(0).max()) if np.isfinite(loc).all() else math.inf


class Centred:
    """The log density of a joint in these coordinates, and its gradient.

    Args:
        density: The model.
        tasks: The tasks.
        joint: Its whitened joint density.
    """

    def __init__(self, density: TaskDensity, tasks: Tasks, joint: Joint) -> None:
        self._whitened, self._joint = joint, Joint(density, tasks, centred=True)
        self._affine = _Affine(density, tasks)

    def __call__(self, position: np.ndarray) -> tuple[float, np.ndarray]:
        """Log density and its gradient `(d,)`."""
        return self._joint(position)

    def inverse(self, positions: np.ndarray) -> np.ndarray:
        """Positions `(…, d)` of the whitened joint in these coordinates."""
        return self._joint.place(self._moved(self._whitened.view(positions), self._affine.values))

    def view(self, positions: np.ndarray) -> np.ndarray:
        """Positions `(chain, draw, d)` as `Joint.view` gives them, with the noise."""
        return self._moved(self._joint.view(positions), self._affine.noise)

    def _moved(self, drawn: np.ndarray, function: Callable[[Tensor, Tensor], Tensor]) -> np.ndarray:
        """θ and what tasks have `(…, d)` with that mapped, some draws at a time."""
        flat = torch.as_tensor(drawn).reshape(-1, drawn.shape[-1])
        size = self._joint.shared_size
        count = max(1, CHUNK_NUMBERS // (self._affine.numbers or 1))
        parts = [torch.cat([part[:, :size], function(part[:, :size], part[:, size:])], 1) for part in flat.split(count)]
        return torch.cat(parts).reshape(drawn.shape).numpy()


class _Affine:
    """Task parameters as a + L z of their noise z, a and L functions of θ."""

    def __init__(self, density: TaskDensity, tasks: Tasks) -> None:
        self._density, self._dim = density, density.structure.task_size
        self._data = density.tensors(tasks.without_rows().batch(np.arange(len(tasks))))
        self.numbers = len(tasks) * self._dim**2

    def holds(self, drawn: Tensor) -> bool:
        """Whether that is so at draws of θ and the noise `(S, d)`."""
        if self._density.values_read_rows or any(site.kind != "normal" for site in self._density.structure.task):
            return False
        theta, noise = drawn.tensor_split([self._density.structure.shared_size], 1)
        right = self._at(theta, noise.reshape(len(drawn), -1, self._dim)).flatten(1)
        return torch.allclose(self.values(theta, noise), right, rtol=LINEAR, atol=LINEAR)

    def values(self, theta: Tensor, noise: Tensor) -> Tensor:
        """Of noise `(S, T d)` at draws of θ."""
        origin, slope = self._maps(theta)
        return (origin + (slope @ noise.reshape(*origin.shape, 1)).squeeze(-1)).flatten(1)

    def noise(self, theta: Tensor, values: Tensor) -> Tensor:
        """Of values `(S, T d)` at draws of θ."""
        origin, slope = self._maps(theta)
        return torch.linalg.solve(slope, values.reshape(origin.shape) - origin).flatten(1)

    def _maps(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """A `(S, T, d)` and L `(S, T, d, d)`."""
        zero = theta.new_zeros(len(theta), len(self._data["n"]), self._dim)
        origin = self._at(theta, zero)
        return origin, torch.stack(
            [self._at(theta, zero + axis) - origin for axis in torch.eye(self._dim).to(zero)], -1
        )

    def _at(self, theta: Tensor, noise: Tensor) -> Tensor:
        """The parameters of tasks `(S, T, d)` at their noise."""
        values = dict(self._density.learned.values)
        with torch.no_grad():
            found = self._density.constrain.mapped(theta, noise, self._data, values, in_dims=BY_DRAW)
        return torch.cat([found[site.name].reshape(*noise.shape[:2], -1) for site in self._density.structure.task], -1)
