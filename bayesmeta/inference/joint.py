"""The log joint of θ and of all tasks' parameters as one compiled function of one vector, for samplers."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.collected import Block, Collected
from bayesmeta.inference.evidence import piece_modes
from bayesmeta.inference.sampling import climbed

JITTER = 0.1
"""Standard deviation of the chains' starts around the prior's centre, in prior units."""


class Joint:
    """The compiled log joint of θ and the noise of all tasks: position `(d_theta + T d,)`, in prior units of θ.

    Args:
        density: The model, in float64.
        tasks: The tasks.
        centred: Tasks have their parameters, in unconstrained space, in place of their noise.

    Attributes:
        shared_size: Coordinates of θ, the first of a position.
        size: Coordinates of a position.
    """

    def __init__(self, density: TaskDensity, tasks: Tasks, *, centred: bool = False) -> None:
        function = density.log_task_unconstrained if centred else density.log_task
        self._collected = collected = Collected(density, tasks, function=function)
        self.shared_size, self._dim = density.structure.shared_size, density.structure.task_size
        self.size = self.shared_size + collected.count * self._dim
        self._origin, self._scale = density.prior_scale()
        self._functions = collected.by_block(self._value_and_gradient, self._example)

    def _example(self, block: Block) -> tuple[Tensor]:
        return (torch.zeros(self.shared_size + block.count * self._dim, dtype=torch.float64),)

    def _value_and_gradient(self, block: Block, position: Tensor, *leaves: Tensor) -> tuple[Tensor, Tensor]:
        """Of θ and the noise of a block."""
        with torch.enable_grad():
            at = position.detach().requires_grad_()
            theta = self._origin + self._scale * at[: self.shared_size]
            noise = at[self.shared_size :].reshape(-1, self._dim)
            parts = block.by_piece(lambda graph, *args: graph(*args[:2], *args[2]).sum(), theta, noise, leaves)
            prior = self._collected.log_prior(theta, leaves[len(leaves) - len(self._collected.values) :])
            total = prior / len(self._collected.blocks) + torch.stack(parts).sum()
            (gradient,) = torch.autograd.grad(total, at)
        return total.detach(), gradient

    def start(self) -> np.ndarray:
        """A position near one that is some steps uphill from near the prior's centre."""
        near, uphill = (JITTER * torch.randn(self.size, dtype=torch.float64) for _ in range(2))
        return climbed(self, near) + uphill.numpy()

    def view(self, positions: np.ndarray) -> np.ndarray:
        """Positions `(chain, draw, d)` as θ and the noise of the tasks in their own order."""
        at = torch.as_tensor(positions)
        noise = at[..., self.shared_size :].unflatten(-1, (self._collected.count, self._dim))[
            ..., self._collected.order, :
        ]
        return torch.cat([self._origin + self._scale * at[..., : self.shared_size], noise.flatten(-2)], -1).numpy()

    def place(self, drawn: np.ndarray) -> np.ndarray:
        """The inverse of `view`."""
        at = torch.as_tensor(drawn)
        theta = (at[..., : self.shared_size] - self._origin) / self._scale
        noise = at[..., self.shared_size :].unflatten(-1, (self._collected.count, self._dim))
        return torch.cat([theta, noise[..., self._collected.order.argsort(), :].flatten(-2)], -1).numpy()

    def __call__(self, position: np.ndarray) -> tuple[float, np.ndarray]:
        """Log density and its gradient."""
        at = torch.as_tensor(position)
        if len(self._functions) == 1:
            value, gradient = self._functions[0](at)
            return float(value), gradient.numpy()
        return self._in_blocks(at)

    def conditional_modes(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Modes of the tasks' noise given θ at a position `(d_theta,)`, and factors of their precisions.

        Returns:
            `(T, d)`, NaN where there is no mode, and `(T, d, d)`.
        """
        theta = self._origin + self._scale * torch.as_tensor(position)
        values = list(self._collected.values.values())
        found = []
        for block in self._collected.blocks:
            start = theta.new_zeros(block.count, self._dim)
            found += block.by_piece(piece_modes, theta, start, [*block.leaves, *values])
        loc = torch.cat([torch.where(modes.converged.unsqueeze(-1), modes.loc, math.nan)[0] for modes in found])
        return loc.numpy(), torch.cat([modes.factor[0] for modes in found]).numpy()

    def _in_blocks(self, at: Tensor) -> tuple[float, np.ndarray]:
        widths = [block.count * self._dim for block in self._collected.blocks]
        theta, total, head, tail = at[: self.shared_size], 0.0, torch.zeros(self.shared_size, dtype=at.dtype), []
        for function, noise in zip(self._functions, at[self.shared_size :].split(widths), strict=True):
            value, gradient = function(torch.cat([theta, noise]))
            total, head = total + float(value), head + gradient[: self.shared_size]
            tail.append(gradient[self.shared_size :])
        return total, torch.cat([head, *tail]).numpy()
