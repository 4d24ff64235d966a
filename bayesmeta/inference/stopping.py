"""Stopping by tasks that training does not see: what is learned is left in its best state on them.

`conditional.py` offers states by their score of held-out episodes, `amortized.py` by the objective of held-out tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.recording import seeded
from bayesmeta.inference.objectives import Guides, Objective, Step
from bayesmeta.inference.particles import ParticleShared
from bayesmeta.inference.shared import PointShared

HELD_OUT = 0.1
"""Share of the tasks that is held out."""
FEWEST_TO_HOLD_OUT = 20
"""Training stops on held-out tasks where there are at least so many tasks."""
CHECK_EVERY = 100
"""Steps from one score to the next."""
DRAWS = 32
"""Draws of θ and φ by which held-out tasks are scored."""
EVERY_TASK = 10**9
"""So many tasks that the prior of θ has no part in the bound of one."""


class BestState:
    """Remembers what is learned where a score is the best so far.

    Args:
        tensors: What is learned, tensors to be changed in place; called when they are read or put back.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]]) -> None:
        self._tensors = tensors
        self._kept: list[Tensor] = []
        self.score = -math.inf
        self.at = 0

    def offer(self, score: float, at: int) -> None:
        """Keeps the present state if `score`, found after `at` steps, is the best."""
        if score > self.score:
            self.score, self.at = score, at
            self._kept = [tensor.detach().clone() for tensor in self._tensors()]

    def restore(self) -> None:
        """Puts the best state back, if there was a score."""
        with torch.no_grad():
            for tensor, kept in zip(self._tensors() if self._kept else (), self._kept, strict=True):
                tensor.copy_(kept)


class HeldOut:
    """Scores tasks that training does not see, with the same random numbers every time.

    Args:
        density: The model.
        guides: What is learned.
        tasks: The tasks.
        objective: What is minimised on the others.
    """

    def __init__(self, density: TaskDensity, guides: Guides, tasks: Tasks, objective: Objective) -> None:
        sizes = np.asarray(tasks.sizes)
        same = [np.flatnonzero(sizes == n) for n in np.unique(sizes)]
        batches = [tasks.batch(index) for index in (same if density.structure.exact_size else [slice(None)])]
        self._batches = [(batch, density.tensors(batch)) for batch in batches]
        self._density, self._guides, self._objective = density, guides, objective
        self._best, self._steps = BestState(self._learned), 0

    def step(self) -> None:
        """Called before every step of training."""
        if self._steps % CHECK_EVERY == 0:
            self.check()
        self._steps += 1

    def check(self) -> float:
        """The score, in nats a task; the state is kept if it is the best."""
        score = self._score()
        self._best.offer(score, self._steps)
        return score

    def restore(self) -> None:
        """Leaves the guides in their best state."""
        self._best.restore()

    def _learned(self) -> Iterator[Tensor]:
        for module in (self._guides.shared, self._guides.task):
            yield from module.state_dict().values()
        yield from self._guides.values.values()

    def _score(self) -> float:
        total, count = 0.0, sum(len(batch) for batch, _ in self._batches)
        with seeded(0, "held out"):
            for batch, data in self._batches:
                step = Step(self._guides.task.prepare(batch, data), EVERY_TASK, DRAWS)
                loss, _ = self._objective(self._density, self._guides, step)
                total -= len(batch) * float(loss.detach())
        return total / count


def hold_out(
    density: TaskDensity, guides: Guides, tasks: Tasks, objective: Objective, *, limit: int
) -> tuple[Tasks, HeldOut | None]:
    """Sets tasks aside where more numbers are fitted as points than there are labels, and 20 tasks at least.

    Fewer numbers, such as the coefficients of a regression, do not overfit and have use for every task.

    Args:
        density: The model.
        guides: What is learned.
        tasks: All tasks.
        objective: What is minimised.
        limit: The most tasks to set aside.

    Returns:
        The tasks to train on, and what scores the others; None where there are none.
    """
    points = sum(value.numel() for value in guides.values.values())
    points += density.structure.shared_size * isinstance(guides.shared, PointShared | ParticleShared)
    if len(tasks) < FEWEST_TO_HOLD_OUT or points <= int(tasks.observed.sum()):
        return tasks, None
    seen, others = tasks.split(new=min(limit, round(HELD_OUT * len(tasks))), seed=0)
    return seen, HeldOut(density, guides, others, objective)
