"""Stein variational gradient descent: particles of a task's parameters that climb its log joint and keep apart.

Where a posterior has several modes particles end in each of them, without a network that had to learn where. `SVGD` is
the guide of task parameters; particles of θ, in `particles.py`, share the kernel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.chunks import different
from bayesmeta.inference.gaussian import GaussianTasks, cholesky, solve_factored
from bayesmeta.inference.gradient import BY_DRAW, rows_seen, slope
from bayesmeta.inference.laplace import NOWHERE, MixtureTasks, curvature_of, mirrored
from bayesmeta.inference.newton import made_positive
from bayesmeta.inference.options import check_lengths
from bayesmeta.inference.protocols import Context, TaskGuide, TaskPosterior

LONGEST = 2.0
"""No step moves a coordinate by more than so many prior standard deviations."""
NARROWEST = 0.1
"""Least squared width of the kernel, in units of the curvature: particles that coincide must not fly apart."""
FIRST_RATE, FIRST_SHRINKAGE = 0.5, 0.8
"""Step size and shrinkage before any training."""


def kernel_shares(points: Tensor, *, widest: float = math.inf) -> tuple[Tensor, Tensor]:
    """The RBF kernel exp(−|u_i − u_j|² / h) between particles, h by the median heuristic.

    Args:
        points: Particles `(P, …, d)`.
        widest: Bound on h.

    Returns:
        Each row of the kernel divided by its sum `(P, P, …)`, and h `(…)`; neither is differentiated.
    """
    with torch.no_grad():
        square = (points.unsqueeze(1) - points).square().sum(-1)
        first, second = torch.triu_indices(len(points), len(points), 1)
        width = (square[first, second].median(0).values / math.log(len(points) + 1)).clamp(NARROWEST, widest)
        return (-square / width).softmax(1), width


class SVGD(TaskGuide):
    """q(φ | D, θ): a mixture of Gaussians around particles that Stein variational gradient steps have moved.

    K steps move P particles z_i in whitened coordinates from learned starts (at first mirrored draws of the prior):
    `z_i ← z_i + r_k H̄_i⁻¹ (Σ_j k_ij ∇ log p(z_j, D | θ) + (2/h) M (z_i − Σ_j k_ij z_j))`, k_ij the kernel in the metric
    of M, the mean curvature of all particles, its rows scaled to sum to one (which changes how fast, not where to), and
    H̄_i the curvatures around particle i. With the gradient g and the curvature H at the end of the path of a particle,
    its part of the mixture is N(z + s H⁻¹g, (1 − (1 − s)²) H⁻¹): where particles are draws of a Gaussian posterior, any
    s leaves its mean and covariance as they are. Parts weigh as the log joint at their centre over the density there of
    all parts alike: modes get their shares, particles that got nowhere get none. Curvatures that are not positive are
    replaced by their size. The guide is the prior for a task without rows.

    Starts, step sizes and s are learned by differentiating through the steps, curvatures, kernel and shares held fixed.
    There is no network: an untrained guide works too. A draw costs P (K + 1) Hessians of the task's log joint: for few
    dimensions.

    Args:
        particles: P.
        steps: K.
        unrolled: Differentiate through the steps. False: only s is trained, and θ follows the slope of the model
            alone, in less than half the time.

    References:
        Liu, Wang: Stein Variational Gradient Descent, 2016, https://arxiv.org/abs/1608.04471
        Detommaso, Cui, Spantini, Marzouk, Scheichl: A Stein Variational Newton Method, 2018,
        https://arxiv.org/abs/1806.03085
        Yoon et al.: Bayesian Model-Agnostic Meta-Learning, 2018, https://arxiv.org/abs/1806.03836

    Raises:
        ValueError: If `particles` is not a whole number of at least 2, or `steps` not one of at least 1.
    """

    cost = 20.0

    def __init__(self, *, particles: int = 8, steps: int = 5, unrolled: bool = True) -> None:
        super().__init__()
        check_lengths("SVGD", steps=steps)
        check_lengths("SVGD", least=2, particles=particles)
        self._particles, self._steps, self._unrolled = particles, steps, unrolled

    def attach(self, density: TaskDensity, tasks: Tasks) -> None:
        """Builds the starts, the step sizes and the shrinkage for the model's dimensions."""
        self._density = density
        self.start = nn.Parameter(mirrored(self._particles, density.structure.task_size, dtype=density.dtype))
        self.log_rate = nn.Parameter(torch.full((self._steps,), FIRST_RATE, dtype=density.dtype).log())
        self.shrinkage = nn.Parameter(torch.tensor(FIRST_SHRINKAGE, dtype=density.dtype).logit())

    def condition(self, theta: Tensor, context: Context) -> TaskPosterior:
        """The mixtures of every task for every θ."""
        some, place = different(theta)
        parts, log_share = self._mixture(some, context)
        return MixtureTasks([GaussianTasks(p.loc[place], p.factor[place]) for p in parts], log_share[:, place])

    def _mixture(self, theta: Tensor, context: Context) -> tuple[list[GaussianTasks], Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._unrolled):
            points, gradient, factor = self._moved(theta, context)
        shrinkage = self.shrinkage.sigmoid()
        loc = points + (shrinkage * solve_factored(factor, gradient)).clamp(-LONGEST, LONGEST)
        factor = factor / (shrinkage * (2 - shrinkage)).sqrt()
        empty = (rows_seen(context.batch) == 0).unsqueeze(-1)
        loc = torch.where(empty, 0.0, loc)
        factor = torch.where(empty.unsqueeze(-1), torch.eye(loc.shape[-1], dtype=loc.dtype), factor)
        parts = [GaussianTasks(one, two) for one, two in zip(loc, factor, strict=True)]
        return parts, self._log_share(theta, parts, context)

    def _moved(self, theta: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Particles at the end of their paths, slopes `(P, S, T, d)` and Cholesky factors of the curvatures there."""
        shape = (len(self.start), len(theta), len(context.batch.names), self.start.shape[-1])
        points = self.start[:, None, None].expand(shape)
        repeated = theta.repeat(len(self.start), 1)
        curvature = curvature_of(self._density, context.data, repeated)

        def seen(at: Tensor) -> tuple[Tensor, Tensor]:
            flat = at.flatten(0, 1)
            _, gradient, hessian = curvature(flat.detach())
            if torch.is_grad_enabled():
                gradient = slope(self._density, repeated, flat, context)
            gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)  # one particle lost is not all
            precision = made_positive(-(hessian + hessian.mT) / 2)[0]
            return gradient.unflatten(0, shape[:2]), precision.unflatten(0, shape[:2])

        for rate in self.log_rate.exp():
            points = points + (rate * _direction(points, *seen(points))).clamp(-LONGEST, LONGEST)
        gradient, precision = seen(points)
        return points, gradient, cholesky(precision)

    @torch.no_grad()
    def _log_share(self, theta: Tensor, parts: list[GaussianTasks], context: Context) -> Tensor:
        """Log weights of the parts `(P, S, T)`."""
        found, values = [], dict(self._density.learned.values)
        alike = MixtureTasks(parts, parts[0].loc.new_zeros(len(parts), 1, 1))
        for part in parts:
            value = self._density.log_task.mapped(theta, part.loc, context.data, values, in_dims=BY_DRAW)
            found.append(torch.nan_to_num(value - alike.log_prob(part.loc), nan=NOWHERE, neginf=NOWHERE))
        return torch.stack(found).log_softmax(0)


def _direction(points: Tensor, gradient: Tensor, precision: Tensor) -> Tensor:
    """Where particles `(P, S, T, d)` go, from their slopes and curvatures `(P, S, T, d, d)`."""
    metric = precision.mean(0)
    near, width = kernel_shares((points.unsqueeze(-2) @ cholesky(metric)).squeeze(-2))
    mixed = torch.einsum("ij...,j...d->i...d", near, gradient)
    apart = points - torch.einsum("ij...,j...d->i...d", near, points)
    force = mixed + (2 / width)[..., None] * (metric @ apart.unsqueeze(-1)).squeeze(-1)
    return solve_factored(cholesky(torch.einsum("ij...,j...de->i...de", near, precision)), force)
