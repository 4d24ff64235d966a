"""Data sets simulated for checks: each task with its own θ, or all of them with one.

`bm.simulate` draws one θ for all tasks; here every task has its own, from the prior or as given. `calibration.py` and
`misfits.py` call it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.chunks import task_chunks
from bayesmeta.results.simulation import simulated_labels

BY_TASK = (0, 0, 0, None)
"""θ, noise and data are mapped over tasks, each with its own θ; learned values are not."""


LOG_LIKELIHOOD = "log likelihood"
"""A quantity of parameters and data: it tells a posterior that has not looked at the data from one that has."""


@dataclass(frozen=True)
class Simulated:
    """Simulated tasks and their true parameters in flat coordinates.

    Attributes:
        tasks: Tasks with simulated labels.
        theta: True θ of each task `(T, d_theta)`.
        noise: True whitened task parameters `(T, d)`.
    """

    tasks: Tasks
    theta: Tensor
    noise: Tensor

    def values(self, density: TaskDensity) -> dict[str, np.ndarray]:
        """True values of shared and task sites, of deterministic values and of the log likelihood: `(T, *event)`."""
        found = values_of(density, self.tasks, self.theta.unsqueeze(0), self.noise.unsqueeze(0))
        return {name: value[0] for name, value in found.items()}


def values_of(density: TaskDensity, tasks: Tasks, theta: Tensor, noise: Tensor) -> dict[str, np.ndarray]:
    """Constrained values of draws that have their own θ in every task, and the log likelihood of the task.

    Args:
        density: The model.
        tasks: T tasks.
        theta: `(S, T, d_theta)`.
        noise: `(S, T, d)`.

    Returns:
        `(S, T, *event)` for every shared and task site and deterministic value; `LOG_LIKELIHOOD` is `(S, T)`.
    """
    shape = theta.shape[:2]
    shared = density.shared_values(theta.flatten(0, 1))
    found = {name: value.detach().reshape(*shape, *value.shape[1:]).numpy() for name, value in shared.items()}
    learned = dict(density.learned.values)
    with torch.no_grad():
        for chunk in task_chunks(tasks, exact_size=density.structure.exact_size):
            data = {k: v.unsqueeze(1) for k, v in density.tensors(chunk.batch).items()}
            index, keep = _filled(chunk.index, len(chunk.batch)), len(chunk.index)
            for draw in range(shape[0]):
                args = (theta[draw, index], noise[draw, index].unsqueeze(1), data, learned)
                values = density.constrain.mapped(*args, in_dims=BY_TASK)
                values |= {LOG_LIKELIHOOD: density.log_parts.mapped(*args, in_dims=BY_TASK)[1]}
                for name, value in values.items():
                    whole = found.setdefault(name, np.empty((*shape, *value.shape[2:])))
                    whole[draw, chunk.index] = value[:keep, 0].numpy()
    return found


def simulate_each(density: TaskDensity, like: Tasks, theta: Tensor) -> Simulated:
    """Simulates φ and labels of each task from its own θ.

    Args:
        density: The model.
        like: Tasks that lend their x, columns and sizes; their labels are replaced.
        theta: θ of each task `(T, d_theta)`.
    """
    noise = theta.new_zeros(len(like), density.structure.task_size)
    offsets, labels = like.offsets[:-1], like.y.clone()
    values = dict(density.learned.values)
    with torch.no_grad():
        for chunk in task_chunks(like, exact_size=density.structure.exact_size):
            batch, keep = chunk.batch, len(chunk.index)
            data = {k: v.unsqueeze(1) for k, v in density.tensors(batch).items()}
            index = _filled(chunk.index, len(batch))
            part, empty = theta[index], noise[index].unsqueeze(1)
            drawn = density.prior_noise.mapped(part, empty, data, values, in_dims=BY_TASK)
            noise[chunk.index] = drawn[:keep, 0]
            outcomes = density.outcomes.mapped(part, drawn, data, values, in_dims=BY_TASK)
            found = simulated_labels(density, batch, {site: value[:, 0] for site, value in outcomes.items()})
            places = offsets[chunk.index].unsqueeze(1) + torch.arange(batch.mask.shape[1])
            real = batch.mask[:keep]
            labels[places[real]] = found[:keep][real].to(labels.dtype)
    return Simulated(like.with_labels(labels), theta, noise)


def shells(like: Tasks, count: int, *, name: str) -> Tasks:
    """`count` tasks with the x, columns and sizes of `like`, in turn.

    Raises:
        ValueError: The tasks carry weights.
    """
    return unweighted(like, missing=True).copies(np.arange(count) % len(like), names=numbered(name, count))


def unweighted(tasks: Tasks, *, missing: bool = False) -> Tasks:
    """The tasks, if a simulated data set can be like them.

    Args:
        tasks: Tasks whose sizes and inputs, and labels if they are compared with simulated ones, are used.
        missing: Whether labels may be missing.

    Raises:
        ValueError: They carry weights, or labels are missing.
    """
    if tasks.weight is not None or tasks.task_weight is not None:
        raise ValueError(
            "expected tasks without weights, which are no part of how data arise, so that none can be simulated; pass "
            "tasks made without weight= and task_weight="
        )
    if not missing and not bool(tasks.observed.all()):
        absent = (~tasks.observed).reshape(len(tasks.observed), -1).any(1).nonzero()
        row = int(absent[0])
        task = tasks.names[int((tasks.offsets <= row).sum()) - 1]
        raise ValueError(
            f"expected complete labels, as simulated tasks have; task {task!r} has missing ones: drop its rows"
        )
    return tasks


def numbered(name: str, count: int) -> Sequence[str]:
    """Names of simulated tasks."""
    return [f"{name} {i + 1}" for i in range(count)]


def _filled(index: np.ndarray, size: int) -> np.ndarray:
    """Positions of a chunk's tasks, the last repeated up to the chunk's size."""
    return np.pad(index, (0, size - len(index)), "edge")
