"""A guide that takes gradient steps: from a learned start, with learned step sizes, on the task's own log joint.

It is model-agnostic meta-learning (MAML) read as inference: the steps find the centre of q(φ | D, θ), a learned
curvature conditions them and gives the spread. It has no encoder, so that it needs no features of rows and works for
any x. Other guides that climb log joints (`adaptation.py`, `svgd.py`) take their slopes from here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.chunks import different, task_chunks
from bayesmeta.inference.gaussian import DiagonalTasks, GaussianTasks, cholesky, solve_factored
from bayesmeta.inference.loadings import Loadings, ThetaStandardiser
from bayesmeta.inference.options import check_lengths
from bayesmeta.inference.protocols import Context, TaskGuide

LONGEST_STEP = 30.0
"""No step moves a coordinate by more than so many prior standard deviations, so that none runs away."""

PROBED = 64
"""The first guess of the curvature looks at so many tasks."""
SMALLEST = 1e-2
"""Least curvature of a row in the first guess, in units of the prior's."""
BY_DRAW = (0, 0, None, None)


class Gradient(TaskGuide):
    """q(φ | D, θ) around the end of a few gradient steps in whitened coordinates.

    With n rows, `P = I + n W(θ) W(θ)ᵀ`: `m ← m + r_k P⁻¹ ∇ log p(φ, D | θ)` from a learned start, then N(m, P⁻¹). The
    start is multiplied by n/(n+1), so that a task without rows keeps its prior.

    Args:
        steps: Number of gradient steps.
        curvature: "full", or "diagonal" for `P = I + n diag(w)`, the same at all θ: linear in the dimensions, for
            hundreds of them.

    References:
        Finn, Abbeel, Levine: Model-Agnostic Meta-Learning, 2017, https://arxiv.org/abs/1703.03400
        Park, Oliva: Meta-Curvature, 2019, https://arxiv.org/abs/1902.03356

    Raises:
        ValueError: If `steps` is not a whole number of at least 1, or `curvature` neither of the two.
    """

    def __init__(self, *, steps: int = 5, curvature: Literal["full", "diagonal"] = "full") -> None:
        super().__init__()
        check_lengths("Gradient", steps=steps)
        if curvature not in ("full", "diagonal"):
            raise ValueError(f'Gradient: curvature must be "full" or "diagonal", got {curvature!r}')
        self.steps, self._diagonal = steps, curvature == "diagonal"

    def attach(self, density: TaskDensity, tasks: Tasks) -> None:
        """Builds the start, the step sizes and the curvature for the model's dimensions."""
        dim, theta_dim = density.structure.task_size, density.structure.shared_size
        self._density = density
        if self._diagonal:
            self.log_curvature = nn.Parameter(curvature_diagonal(density, tasks).log())
        else:
            self.theta = ThetaStandardiser(theta_dim)
            self.curvature = Loadings(theta_dim, dim, dim, hidden=32, initial_sd=0.3)
            with torch.no_grad():
                self.curvature.constant.copy_(_square_root(_curvature_of_a_row(density, tasks)))
        self.start = nn.Parameter(torch.zeros(dim, dtype=density.dtype))
        self.log_rate = nn.Parameter(torch.full((self.steps, dim), 0.5, dtype=density.dtype).log())

    def follow(self, loc: Tensor, scale: Tensor) -> None:
        """Standardises θ with q(θ)'s location and scale from now on."""
        if not self._diagonal:
            self.theta.follow(loc, scale)

    def condition(self, theta: Tensor, context: Context) -> GaussianTasks | DiagonalTasks:
        """q(φ | D, θ) of every task for every θ."""
        theta, place = different(theta)
        count = rows_seen(context.batch).to(self.start.dtype)
        if self._diagonal:
            precision = (1 + count.unsqueeze(-1) * self.log_curvature.exp()).expand(len(theta), -1, -1)
            loc = self._stepped(theta, context, count, lambda gradient: gradient / precision)
            return DiagonalTasks(loc[place], precision[place].rsqrt())
        factor = self._factor(theta, count)
        loc = self._stepped(theta, context, count, lambda gradient: solve_factored(factor, gradient))
        return GaussianTasks(loc[place], factor[place])

    def _factor(self, theta: Tensor, count: Tensor) -> Tensor:
        """Cholesky factors of P `(S, T, d, d)`."""
        weights = self.curvature(self.theta(theta)).to(self.start.dtype).unsqueeze(1)
        precision = torch.eye(len(self.start), dtype=self.start.dtype) + count[:, None, None] * (weights @ weights.mT)
        return cholesky(precision)

    def _stepped(
        self, theta: Tensor, context: Context, count: Tensor, conditioned: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Where the steps end, `(S, T, d)`."""
        loc = (self.start * (count / (count + 1)).unsqueeze(-1)).expand(len(theta), -1, -1)
        for rate in self.log_rate.exp():
            gradient = slope(self._density, theta, loc, context)
            loc = loc + limited(rate * conditioned(gradient), LONGEST_STEP)
        return loc


def slope(density: TaskDensity, theta: Tensor, noise: Tensor, context: Context) -> Tensor:
    """∇_z log p(z_i, D_i | θ_s) at whitened parameters z `(S, T, d)`; differentiable where gradients are recorded."""
    values = dict(density.learned.values)
    if not torch.is_grad_enabled():
        return density.log_task.gradient(theta, noise, context.data, values, wrt=(1,), in_dims=BY_DRAW)[1][0]
    point = noise if noise.requires_grad else noise.detach().requires_grad_()
    total = density.log_task.mapped(theta, point, context.data, values, in_dims=BY_DRAW).sum()
    return torch.autograd.grad(total, point, create_graph=True)[0]


def limited(move: Tensor, longest: float) -> Tensor:
    """A move that is bent so that no coordinate changes by more than `longest`."""
    return longest * torch.tanh(move / longest)


def rows_seen(batch: Batch) -> Tensor:
    """How many rows of each task have a label, `(T,)`."""
    labelled = batch.observed.flatten(2).any(-1) if batch.y.dim() > 2 else batch.observed
    return (labelled & batch.mask).sum(-1)


def _curvature_of_a_row(density: TaskDensity, tasks: Tasks) -> Tensor:
    """What a row adds to the curvature of a log joint, on average over some tasks at the prior's centre: `(d, d)`."""
    theta, values = density.prior_scale()[0].unsqueeze(0), dict(density.learned.values)
    dim, found = density.structure.task_size, []
    for chunk in task_chunks(tasks[:PROBED], exact_size=density.structure.exact_size):
        noise = torch.zeros(1, len(chunk.batch.names), dim, dtype=density.dtype, requires_grad=True)
        with torch.enable_grad():
            data = density.tensors(chunk.batch)
            total = density.log_task.mapped(theta, noise, data, values, in_dims=(0, 0, None, None)).sum()
            (slope,) = torch.autograd.grad(total, noise, create_graph=True)
            rows = [torch.autograd.grad(slope[..., k].sum(), noise, retain_graph=True)[0][0] for k in range(dim)]
        hessian = torch.stack(rows, -1)
        found.append((-hessian - torch.eye(dim, dtype=density.dtype)) / chunk.batch.n[:, None, None].clamp(min=1))
    return torch.cat(found).mean(0)


def curvature_diagonal(density: TaskDensity, tasks: Tasks) -> Tensor:
    """The first guess of what a row adds to the curvature in each coordinate, positive, `(d,)`."""
    found = _curvature_of_a_row(density, tasks).diagonal()
    return torch.nan_to_num(found, nan=1.0, posinf=1.0, neginf=1.0).clamp(min=SMALLEST)


def _square_root(matrix: Tensor) -> Tensor:
    """W with W Wᵀ near a symmetric matrix, of which small and negative eigenvalues are lifted."""
    if not bool(torch.isfinite(matrix).all()):
        return torch.eye(len(matrix), dtype=matrix.dtype)
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return vectors * values.clamp(min=SMALLEST).sqrt()
