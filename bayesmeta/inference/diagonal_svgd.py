"""Stein variational particles for hundreds of dimensions: slopes alone, a diagonal metric, no Hessians.

`svgd.py` knows the curvature of each particle and is for few dimensions; the weights of a network need this one. The
kernel is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.chunks import different
from bayesmeta.inference.gaussian import DiagonalTasks
from bayesmeta.inference.gradient import curvature_diagonal, rows_seen, slope
from bayesmeta.inference.laplace import MixtureTasks, mirrored
from bayesmeta.inference.options import check_lengths
from bayesmeta.inference.protocols import Context, TaskGuide
from bayesmeta.inference.svgd import FIRST_RATE, LONGEST, kernel_shares


class DiagonalSVGD(TaskGuide):
    """q(φ | D, θ): an equal mixture of Gaussians around particles that Stein variational gradient steps have moved.

    P particles z_i start at √(1 − s²) times learned points (at first mirrored draws of the prior), in whitened
    coordinates. With n rows the metric is `M = I + n diag(w)`, w learned, and K steps
    `z_i ← z_i + r_k M⁻¹ (Σ_j k_ij ∇ log p(z_j, D | θ) + (2/h) M (z_i − Σ_j k_ij z_j))` move them, k_ij the kernel in
    that metric, its rows scaled to sum to one. The parts are N(z_i, s² M⁻¹): before the first step the mixture has the
    spread of the prior. Starts, steps, w and s are learned by differentiating through the steps, the kernel held fixed.
    All is linear in the dimensions. The guide is the prior for a task without rows.

    In hundreds of dimensions no mixture of few parts passes for the posterior: what is learned are predictions, and
    posteriors are taken unchecked, `refine="none"`.

    Args:
        particles: P.
        steps: K.

    References:
        Liu, Wang: Stein Variational Gradient Descent, 2016, https://arxiv.org/abs/1608.04471
        Yoon et al.: Bayesian Model-Agnostic Meta-Learning, 2018, https://arxiv.org/abs/1806.03836

    Raises:
        ValueError: If `particles` is not a whole number of at least 2, or `steps` not one of at least 1.
    """

    cost = 10.0

    def __init__(self, *, particles: int = 5, steps: int = 5) -> None:
        super().__init__()
        check_lengths("DiagonalSVGD", steps=steps)
        check_lengths("DiagonalSVGD", least=2, particles=particles)
        self._particles, self._steps = particles, steps

    def attach(self, density: TaskDensity, tasks: Tasks) -> None:
        """Builds the starts, the step sizes, the metric and the spread for the model's dimensions."""
        dim, dtype = density.structure.task_size, density.dtype
        self._density = density
        self.start = nn.Parameter(mirrored(self._particles, dim, dtype=dtype))
        self.log_rate = nn.Parameter(torch.full((self._steps,), FIRST_RATE, dtype=dtype).log())
        self.log_curvature = nn.Parameter(curvature_diagonal(density, tasks).log())
        self.spread = nn.Parameter(torch.zeros((), dtype=dtype))

    def condition(self, theta: Tensor, context: Context) -> MixtureTasks:
        """The mixtures of every task for every θ."""
        theta, place = different(theta)
        count = rows_seen(context.batch).to(self.start.dtype).unsqueeze(-1)
        metric, spread = 1 + count * self.log_curvature.exp(), self.spread.sigmoid()
        points = (1 - spread.square()).sqrt() * self.start
        points = points[:, None, None].expand(-1, len(theta), len(count), -1)
        for rate in self.log_rate.exp():
            force = self._force(theta, points, metric, context)
            points = points + (rate * force / metric).clamp(-LONGEST, LONGEST)
        loc = torch.where(count > 0, points, 0.0)
        sd = torch.where(count > 0, spread * metric.rsqrt(), 1.0).expand(len(theta), -1, -1)
        parts = [DiagonalTasks(one[place], sd[place]) for one in loc]
        return MixtureTasks(parts, loc.new_zeros(loc.shape[0], len(place), len(count)).log_softmax(0))

    def _force(self, theta: Tensor, points: Tensor, metric: Tensor, context: Context) -> Tensor:
        """Where particles `(P, S, T, d)` are drawn and driven."""
        near, width = kernel_shares(points * metric.sqrt())
        gradient = slope(self._density, theta.repeat(len(points), 1), points.flatten(0, 1), context)
        gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)  # one particle lost is not all
        mixed = torch.einsum("ij...,j...d->i...d", near, gradient.unflatten(0, points.shape[:2]))
        apart = points - torch.einsum("ij...,j...d->i...d", near, points)
        return mixed + (2 / width)[..., None] * metric * apart
