"""Stopping by tasks that training does not see: what is learned is left in its best state on them.

`conditional.py` offers states by their score of held-out episodes, `amortized.py` by the objective of held-out tasks.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.recording import seeded
from bayesmeta.inference.objectives import Guides, Objective, Step
from bayesmeta.inference.particles import ParticleShared
from bayesmeta.inference.shared import PointShared

logger = logging.getLogger("bayesmeta")

FEWEST_TO_HOLD_OUT = 20
"""Training stops on held-out tasks where there are at least so many tasks."""
MOST_HELD_OUT = 64
"""Tasks that a hierarchical fit holds out at most; further ones would cost time and tell little."""
CHECK_EVERY = 100
"""Steps from one score to the next."""
REPEATS = 4
"""Evaluations of the objective in a score, each with random numbers of its own."""
EVERY_TASK = 10**9
"""So many tasks that the prior of θ has no part in the bound of one."""


class BestState:
    """Remembers what is learned where a score is the best so far.

    Args:
        modules: Modules that are trained.
        values: Tensors that are trained, to be changed in place.
    """

    def __init__(self, modules: Sequence[nn.Module], values: Sequence[Tensor] = ()) -> None:
        self._modules, self._values = modules, values
        self._kept: tuple[list[dict[str, Any]], list[Tensor]] | None = None
        self.score, self.at = -math.inf, 0

    def offer(self, score: float, at: int) -> None:
        """Keeps the present state if `score`, found after `at` steps, is the best."""
        if score > self.score:
            self.score, self.at = score, at
            states = [copy.deepcopy(module.state_dict()) for module in self._modules]
            self._kept = states, [value.detach().clone() for value in self._values]

    def restore(self) -> None:
        """Puts the best state back, if a score was a number."""
        if self._kept is None:
            return
        for module, state in zip(self._modules, self._kept[0], strict=True):
            module.load_state_dict(state)
        with torch.no_grad():
            for value, kept in zip(self._values, self._kept[1], strict=True):
                value.copy_(kept)

    def warn_untrained(self, steps: int) -> None:
        """Says so where no later state was better than the first, which is kept."""
        if self._kept is not None and self.at == 0 and steps >= CHECK_EVERY:
            warnings.warn(
                f"{steps} steps of training have not raised the score of held-out tasks, {self.score:.3g} nats: what "
                "is trained stays as it was before. Give it more tasks, a lower lr or another objective, or train on "
                "all tasks, bm.Amortized(held_out=0)",
                stacklevel=3,
            )


class HeldOut:
    """Scores tasks that training does not see, with the same random numbers every time.

    Args:
        density: The model.
        guides: What is learned.
        batches: The tasks, in pieces; with none, nothing is done.
        objective: What is minimised on the others.
        draws: Of θ, as in training.
    """

    def __init__(
        self, density: TaskDensity, guides: Guides, batches: Sequence[Batch], objective: Objective, *, draws: int
    ) -> None:
        self._density, self._guides, self._objective, self._draws = density, guides, objective, draws
        self._batches = [(batch, density.tensors(batch)) for batch in batches]
        self.begin()

    def begin(self) -> None:
        """Called before every stage: the best state is that of the stage, which begins at the best one before."""
        values = list(self._guides.values.values())
        self._best, self._steps = BestState([self._guides.shared, self._guides.task], values), 0

    def step(self) -> None:
        """Called before every step of training."""
        if self._batches and self._steps % CHECK_EVERY == 0:
            self._best.offer(self._score(), self._steps)
        self._steps += 1

    def finish(self, *, first: bool) -> float:
        """Called after a stage: leaves the guides in their best state, and returns its score in nats a task or NaN."""
        if not self._batches:
            return math.nan
        self._best.offer(self._score(), self._steps)
        self._best.restore()
        if first:
            self._best.warn_untrained(self._steps)
        return self._best.score

    def _score(self) -> float:
        total, count = 0.0, sum(len(batch) for batch, _ in self._batches)
        with seeded(0, "held out"):
            for batch, data in self._batches:
                step = Step(self._guides.task.prepare(batch, data), EVERY_TASK, self._draws)
                for _ in range(REPEATS):
                    loss, _ = self._objective(self._density, self._guides, step)
                    total -= len(batch) * float(loss.detach()) / REPEATS
        return total / count


def _batches(density: TaskDensity, tasks: Tasks, limit: int) -> Iterator[Batch]:
    """The tasks in pieces; of one size each where they may not be padded."""
    sizes = np.asarray(tasks.sizes)
    kinds = sizes if density.structure.exact_size else np.zeros_like(sizes)
    for kind in np.unique(kinds):
        index = np.flatnonzero(kinds == kind)
        yield from (tasks.batch(index[start : start + limit]) for start in range(0, len(index), limit))


def hold_out(
    density: TaskDensity,
    guides: Guides,
    tasks: Tasks,
    objective: Objective,
    *,
    share: float,
    draws: int,
    limit: int,
) -> tuple[Tasks, HeldOut]:
    """Sets tasks aside where more numbers are fitted as points than there are labels, and 20 tasks have labels.

    Fewer numbers, such as the coefficients of a regression, do not overfit and have use for every task. Where weights
    belong to single tasks, nothing of a task that is held out could be predicted: none is.

    Args:
        density: The model.
        guides: What is learned.
        tasks: All tasks.
        objective: What is minimised.
        share: Of the tasks with labels, how many to set aside; at most 64.
        draws: Of θ a step.
        limit: Tasks that are evaluated at once.

    Returns:
        The tasks to train on, and what scores the others.
    """
    labels = _labels(tasks)
    points = sum(value.numel() for value in guides.values.values())
    points += density.structure.shared_size * isinstance(guides.shared, PointShared | ParticleShared)
    labelled = np.flatnonzero(labels)
    none = HeldOut(density, guides, [], objective, draws=draws)
    if share == 0 or len(labelled) < FEWEST_TO_HOLD_OUT or points <= int(labels.sum()):
        return tasks, none
    count = min(MOST_HELD_OUT, max(1, round(share * len(labelled))))
    chosen = labelled[torch.randperm(len(labelled), generator=torch.Generator().manual_seed(0))[:count].numpy()]
    seen, others = tasks[np.delete(np.arange(len(tasks)), chosen)], tasks[np.sort(chosen)]
    parts = [list(_batches(density, some, limit)) for some in (seen, others)]
    if guides.values and _own_weights(density, guides, objective, draws, *parts) >= count:
        logger.info("no tasks are held out: weights of single tasks are trained")
        return tasks, none
    return seen, HeldOut(density, guides, parts[1], objective, draws=draws)


def _own_weights(
    density: TaskDensity, guides: Guides, objective: Objective, draws: int, *parts: Sequence[Batch]
) -> int:
    """How many rows of trained weights only the tasks of the last part move: those of an embedding of tasks."""
    values = list(guides.values.values())
    guides.task.follow(*guides.shared.centre())
    moved = []
    with seeded(0, "own weights"):
        for batches in parts:
            total = [torch.zeros(value.shape[0] if value.dim() else 1, dtype=torch.bool) for value in values]
            for batch in batches:
                step = Step(guides.task.prepare(batch, density.tensors(batch)), EVERY_TASK, draws)
                loss, _ = objective(density, guides, step)
                slopes = torch.autograd.grad(loss, values, materialize_grads=True)
                for rows, slope in zip(total, slopes, strict=True):
                    rows |= (slope.reshape(len(rows), -1) != 0).any(1)
            moved.append(total)
    return sum(int((last & ~first).sum()) for first, last in zip(*moved, strict=True))


def _labels(tasks: Tasks) -> np.ndarray:
    """How many labels each task has that count: `(T,)`."""
    counts = tasks.observed.reshape(len(tasks.observed), -1).sum(1)
    ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])[tasks.offsets]
    labels = ends.diff()
    return (labels if tasks.task_weight is None else labels * (tasks.task_weight > 0)).numpy()
