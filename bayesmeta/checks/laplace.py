"""Task posteriors given θ without a network: Newton steps to the mode, the curvature there, the evidence from both.

Exact where tasks are linear Gaussian. The baselines of `sharing.py` use it so that nothing has to be trained for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.candidates import BY_DRAW
from bayesmeta.inference.gaussian import GaussianTasks

MAX_STEPS = 50
STEP = 1e-4
"""Of the central differences of the gradient, in prior sds."""
TOLERANCE = 1e-6
"""Newton stops when no step is longer than this, in posterior sds."""

DRAWS = 100
"""Draws of θ that are evaluated at once."""
ELEMENTS = 2**18
BUCKETS = 16 * 8 ** np.arange(8)
"""Sizes that tasks are padded to at most."""

LogDensity = Callable[[Tensor], Tensor]


@dataclass
class Laplace:
    """Gaussians at the modes of S × T task posteriors, in whitened coordinates.

    Attributes:
        posterior: The Gaussians.
        log_evidence: Laplace's log p(D_i | θ_s) `(S, T)`.
    """

    posterior: GaussianTasks
    log_evidence: Tensor


def laplace(density: TaskDensity, tasks: Tasks, theta: Tensor) -> Laplace:
    """Finds the mode and curvature of log p(φ_i, D_i | θ_s) for every θ `(S, d_theta)` and task.

    Raises:
        ValueError: Newton's steps do not converge for some task.
    """
    dim = density.structure.task_size
    shape = (len(theta), len(tasks))
    loc, factor = theta.new_empty(*shape, dim), theta.new_empty(*shape, dim, dim)
    evidence = theta.new_empty(shape)
    values = dict(density.learned.values)
    for piece in pieces(density, tasks, theta):

        def log_joint(noise: Tensor, piece: Piece = piece) -> Tensor:
            repeated = piece.theta.repeat(len(noise) // len(piece.theta), 1)
            return density.log_task.mapped(repeated, noise, piece.data, values, in_dims=BY_DRAW)

        found = _newton(log_joint, theta.new_zeros(len(piece.theta), len(piece.names), dim), piece.names)
        for result, value in zip((loc, factor, evidence), found, strict=True):
            result[piece.draws, piece.tasks] = value[: piece.keep]
    return Laplace(GaussianTasks(loc, factor), evidence)


def log_likelihood(density: TaskDensity, tasks: Tasks, theta: Tensor, noise: Tensor) -> Tensor:
    """Log p(D_i | φ_i, θ_s): θ `(S, d_theta)` and noise `(S, T, d)` -> `(S, T)`."""
    found = theta.new_empty(len(theta), len(tasks))
    values = dict(density.learned.values)
    for piece in pieces(density, tasks, theta):
        some = noise[piece.draws][:, piece.tasks]
        some = torch.cat([some, some[-1:].expand(len(piece.theta) - piece.keep, -1, -1)])
        _, rows = density.log_parts.mapped(piece.theta, some, piece.data, values, in_dims=BY_DRAW)
        found[piece.draws, piece.tasks] = rows[: piece.keep]
    return found


@dataclass(frozen=True)
class Piece:
    """Some tasks and some draws of θ that are evaluated at once; the draws are filled up to a fixed number."""

    tasks: Tensor
    draws: slice
    names: tuple[str, ...]
    data: dict[str, Tensor]
    theta: Tensor

    @property
    def keep(self) -> int:
        """How many draws are real."""
        return self.draws.stop - self.draws.start


def pieces(density: TaskDensity, tasks: Tasks, theta: Tensor) -> Iterator[Piece]:
    """Cuts the work into pieces of few different shapes, since every new shape is recorded."""
    sizes = np.asarray(tasks.sizes)
    group = sizes if density.structure.exact_size else np.searchsorted(BUCKETS, sizes)
    for one in np.unique(group):
        index = np.flatnonzero(group == one)
        batch = tasks.batch(index)
        data, count = density.tensors(batch), max(1, min(DRAWS, ELEMENTS // batch.mask.numel()))
        for start in range(0, len(theta), count):
            part = theta[start : start + count]
            draws = slice(start, start + len(part))
            part = torch.cat([part, part[-1:].expand(count - len(part), -1)])
            yield Piece(torch.as_tensor(index), draws, batch.names, data, part)


def _newton(log_joint: LogDensity, noise: Tensor, names: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Mode, Cholesky factor of the precision there, and log evidence; steps are damped task by task."""
    dim = noise.shape[-1]
    damping = torch.zeros(noise.shape[:-1], dtype=noise.dtype)
    value, gradient, precision = _derivatives(log_joint, noise)
    eye = torch.eye(dim, dtype=noise.dtype)
    for _ in range(MAX_STEPS):
        curvature = _positive(precision)
        damped = curvature * (1 + damping[..., None, None] * eye)
        step = torch.linalg.solve(damped, gradient.unsqueeze(-1)).squeeze(-1)
        length = (step * (curvature @ step.unsqueeze(-1)).squeeze(-1)).sum(-1).clamp(min=0).sqrt()
        if float(length.max()) < TOLERANCE and bool(torch.isfinite(length).all()):
            factor = torch.linalg.cholesky(curvature)
            log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            return noise, factor, value + 0.5 * dim * math.log(2 * math.pi) - log_det
        trial = _derivatives(log_joint, noise + step)
        better = torch.isfinite(trial[0]) & (trial[0] >= value - 1e-9 * (1 + value.abs()))
        damping = torch.where(better, damping / 10, (10 * damping).clamp(min=0.1))
        noise = torch.where(better[..., None], noise + step, noise)
        value = torch.where(better, trial[0], value)
        gradient = torch.where(better[..., None], trial[1], gradient)
        precision = torch.where(better[..., None, None], trial[2], precision)
    worst = names[int(length.amax(0).argmax())]
    raise ValueError(
        f"the mode of task {worst!r} was not found in {MAX_STEPS} Newton steps; is its posterior unimodal and its log "
        "density smooth?"
    )


def _derivatives(log_joint: LogDensity, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value `(S, T)`, gradient `(S, T, d)` and negative Hessian `(S, T, d, d)`, by differences of the gradient."""
    dim = noise.shape[-1]
    moves = STEP * torch.eye(dim, dtype=noise.dtype)
    points = torch.cat([noise, *(noise + sign * move for move in moves for sign in (1, -1))]).requires_grad_()
    with torch.enable_grad():
        values = log_joint(points)
        (gradients,) = torch.autograd.grad(values.sum(), points)
    centre, *around = gradients.split(len(noise))
    columns = [(up - down) / (2 * STEP) for up, down in zip(around[::2], around[1::2], strict=True)]
    hessian = torch.stack(columns, -1)
    return values[: len(noise)].detach(), centre, -(hessian + hessian.mT) / 2


def _positive(precision: Tensor) -> Tensor:
    """The precision where it is positive definite; elsewhere its eigenvalues' absolute values, at least 1e-3."""
    if bool((torch.linalg.cholesky_ex(precision).info == 0).all()):
        return precision
    eigenvalues, vectors = torch.linalg.eigh(precision)
    return (vectors * eigenvalues.abs().clamp(min=1e-3).unsqueeze(-2)) @ vectors.mT
