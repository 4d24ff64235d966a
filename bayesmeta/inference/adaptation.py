"""A guide that adapts a diagonal Gaussian to each task in a few steps, from the prior, on the task's own bound.

It is amortized Bayesian meta-learning (ABML): the network is the model itself, what is learned besides the prior are
the step sizes. It needs no features of rows and works for any x; correlations within a task it cannot follow.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.chunks import different
from bayesmeta.inference.gaussian import DiagonalTasks
from bayesmeta.inference.gradient import LONGEST_STEP, limited, slope
from bayesmeta.inference.options import check_lengths
from bayesmeta.inference.protocols import Context, TaskGuide

LEAST_RATIO = 0.1
"""No step makes a variance more than ten times as large, however flat or convex the log joint is there."""


class Variational(TaskGuide):
    """q(φ | D, θ) = N(m, diag σ²) in whitened coordinates after a few steps that raise the task's own bound.

    The bound is L(m, log σ) = E_ε log p(m + σ ε, D | θ) + Σ log σ, ε fixed points with the first three moments of
    standard normals. Steps start at the prior, m = 0 and σ = 1, and follow the natural gradient with learned sizes a_k
    and b_k: `log σ ← log σ − (b_k / 2) log(1 − ∂L/∂log σ)`, then `m ← m + a_k σ² ∂L/∂m`. They are differentiated
    through. One step of full size is exact for a Gaussian task of independent coordinates; without rows nothing moves.

    Deviations from the paper: natural instead of plain gradients, so that few and many rows take the same step sizes,
    and fixed points instead of fresh noise, so that the same data have the same posterior.

    Args:
        steps: Number of steps.
        draws: Points at which a step sees the log joint; at least twice the dimensions make it exact for Gaussian
            tasks. An odd number is rounded up.

    References:
        Ravi, Beatson: Amortized Bayesian Meta-Learning, 2019, https://openreview.net/forum?id=rkgpy3C5tX
        Khan, Nielsen: Fast yet Simple Natural-Gradient Descent for Variational Inference, 2018,
        https://arxiv.org/abs/1807.04489

    Raises:
        ValueError: If `steps` or `draws` is not a whole number of at least 1.
    """

    points: Tensor
    cost = 3.0

    def __init__(self, *, steps: int = 5, draws: int = 8) -> None:
        super().__init__()
        check_lengths("Variational", steps=steps, draws=draws)
        self._steps, self._draws = steps, draws

    def attach(self, density: TaskDensity, tasks: Tasks) -> None:
        """Builds the points and the step sizes for the model's dimensions."""
        dim = density.structure.task_size
        self._density = density
        self.register_buffer("points", _points((self._draws + 1) // 2, dim, density.dtype))
        # Coordinates that hang together move together: more than 2 / dim of a step each may overshoot.
        first = torch.tensor([min(0.5, 1 / max(1, dim)), 0.5], dtype=density.dtype)
        self.log_rate = nn.Parameter(first.log().unsqueeze(-1).repeat(self._steps, 1, dim))

    def condition(self, theta: Tensor, context: Context) -> DiagonalTasks:
        """q(φ | D, θ) of every task for every θ."""
        theta, place = different(theta)
        loc = theta.new_zeros(len(theta), len(context.batch.names), self.points.shape[-1])
        log_sd = torch.zeros_like(loc)
        for moving, widening in self.log_rate.exp():
            by_loc, by_log_sd = self._bound_gradient(theta, loc, log_sd, context)
            log_sd = log_sd - widening / 2 * (1 - by_log_sd).clamp(min=LEAST_RATIO).log()
            loc = loc + limited(moving * (2 * log_sd).exp() * by_loc, LONGEST_STEP)
        return DiagonalTasks(loc[place], log_sd.exp()[place])

    def _bound_gradient(self, theta: Tensor, loc: Tensor, log_sd: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """∂L/∂m and ∂L/∂log σ, `(S, T, d)` each."""
        count = len(self.points)
        offset = log_sd.exp() * self.points[:, None, None]
        slopes = slope(self._density, theta.repeat(count, 1), (loc + offset).flatten(0, 1), context)
        slopes = slopes.unflatten(0, (count, len(theta)))
        return slopes.mean(0), 1 + (slopes * offset).mean(0)


def _points(pairs: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Points `(2 pairs, d)` in mirrored pairs, with unit variances, uncorrelated where there are enough of them."""
    drawn = torch.randn(pairs, dim, dtype=dtype)
    if pairs >= dim:
        drawn = torch.linalg.qr(drawn).Q
    drawn = drawn / drawn.square().mean(0).sqrt()
    return torch.cat([drawn, -drawn])
