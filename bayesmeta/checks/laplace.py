"""Task posteriors given θ without a network: Newton steps to the mode, the curvature there, the evidence from both.

Exact where tasks are linear Gaussian. The baselines of `sharing.py` use it so that nothing has to be trained for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.candidates import BY_DRAW
from bayesmeta.inference.gaussian import GaussianTasks
from bayesmeta.inference.laplace import curvature_of, find_modes

DRAWS = 100
"""Draws of θ that are evaluated at once."""
ELEMENTS = 2**18
BUCKETS = 16 * 8 ** np.arange(8)
"""Sizes that tasks are padded to at most."""


@dataclass
class Laplace:
    """Gaussians at the modes of S × T task posteriors, in whitened coordinates.

    Attributes:
        posterior: The Gaussians.
        log_evidence: Laplace's log p(D_i | θ_s) `(S, T)`.
    """

    posterior: GaussianTasks
    log_evidence: Tensor


def laplace(density: TaskDensity, tasks: Tasks, theta: Tensor, *, strict: bool = True) -> Laplace:
    """Finds the mode and curvature of log p(φ_i, D_i | θ_s) for every θ `(S, d_theta)` and task.

    Without `strict` a θ at which no mode is found has no evidence.

    Raises:
        ValueError: Newton's steps do not converge for some task, and `strict`.
    """
    dim = density.structure.task_size
    shape = (len(theta), len(tasks))
    loc, factor = theta.new_empty(*shape, dim), theta.new_empty(*shape, dim, dim)
    evidence = theta.new_empty(shape)
    for piece in pieces(density, tasks, theta):
        start = theta.new_zeros(len(piece.theta), len(piece.names), dim)
        modes = find_modes(curvature_of(density, piece.data, piece.theta), start)
        if strict and not bool(modes.converged.all()):
            worst = piece.names[int((~modes.converged).sum(0).argmax())]
            raise ValueError(
                f"the mode of task {worst!r} was not found by Newton's steps; is its posterior unimodal and its log "
                "density smooth?"
            )
        found = torch.where(modes.converged, modes.log_evidence, -torch.inf)
        for result, value in ((loc, modes.loc), (factor, modes.factor), (evidence, found)):
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
