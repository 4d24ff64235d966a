"""Episodes: a context and a target of the same tasks, as objectives that score held-out rows receive them.

Here live the episode, its random drawing, and the protocol of what episodes are drawn from: tasks held in memory or
endless sources (`families/`). Which rows are context is decided in `ragged.py`, how they are padded in `tasks.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data.batch import Batch
from bayesmeta.data.ragged import choose_rows, context_counts
from bayesmeta.data.schema import Schema
from bayesmeta.data.tasks import Tasks


@dataclass(frozen=True)
class Episode:
    """Rows to learn from and rows to be scored on (support and query), of the same tasks in the same order.

    Attributes:
        context: Rows given to the learner.
        target: Rows on which it is scored.
    """

    context: Batch
    target: Batch


@runtime_checkable
class Source(Protocol):
    """What episodes are drawn from, without end: `fit` of a `ConditionalModel` takes one in place of tasks."""

    @property
    def schema(self) -> Schema:
        """Names, shapes and levels of the data."""

    def draw(self, count: int, *, context: tuple[int, int], generator: torch.Generator) -> Episode:
        """Draws an episode of `count` tasks, or of all if there are fewer.

        Args:
            count: Number of tasks.
            context: Smallest and largest context that the learner asks for; not heeded where the source has sizes of
                its own.
            generator: Source of randomness, on the CPU.
        """

    def hold_out(self, share: float, *, fewest: int, seed: int) -> tuple[Source, Source | None]:
        """Sets aside what training is to be stopped by.

        Args:
            share: How much of what is finite, tasks or classes, is set aside.
            fewest: With fewer tasks nothing is set aside.
            seed: Of the choice.

        Returns:
            (what to train on, what to stop by); a source whose draws never repeat may return itself twice.
        """


class TaskSource:
    """Tasks held in memory as a source: each episode is a random choice of tasks, split at random.

    Steps of training have one context size each, which halves the work where padding would be half of it; episodes of
    tasks that are held out have a size for each task.
    """

    def __init__(self, tasks: Tasks, *, one_size: bool = True) -> None:
        """Keeps the tasks that have rows.

        Args:
            tasks: Tasks.
            one_size: Whether all tasks of an episode have contexts of one size.

        Raises:
            ValueError: If none has.
        """
        filled = np.flatnonzero(tasks.sizes > 0)
        if not len(filled):
            raise ValueError("fit: no task has rows; expected tasks with labels to score")
        self.tasks, self._one_size = tasks[filled], one_size

    @property
    def schema(self) -> Schema:
        """Names, shapes and levels of the data."""
        return self.tasks.schema

    def draw(self, count: int, *, context: tuple[int, int], generator: torch.Generator) -> Episode:
        """Draws an episode of `count` distinct tasks, or of all if there are fewer; see `draw_episode`."""
        chosen = draw_tasks(self.tasks, count, generator)
        return draw_episode(self.tasks, chosen, context=context, generator=generator, one_size=self._one_size)

    def hold_out(self, share: float, *, fewest: int, seed: int) -> tuple[TaskSource, TaskSource | None]:
        """Sets aside a share of the tasks, if there are at least `fewest`."""
        if len(self.tasks) < fewest:
            return self, None
        known, held_out = self.tasks.split(new=share, seed=seed)
        return TaskSource(known), TaskSource(held_out, one_size=False)


def full_batch(x: Tensor, y: Tensor, schema: Schema) -> Batch:
    """Makes a batch of tasks that all have N labelled rows and no columns, without a detour over `Tasks`.

    Args:
        x: Inputs `(T, N, *dx)`.
        y: Labels `(T, N, *dy)`.
        schema: Of the tasks that are drawn from.
    """
    tasks, rows = y.shape[:2]
    mask = torch.ones(tasks, rows, dtype=torch.bool)
    tensors = {"x": x, "y": y, "observed": torch.ones_like(y, dtype=torch.bool)}
    tensors |= {"mask": mask, "n": torch.full((tasks,), rows)}
    return Batch(tensors, tuple(str(position) for position in range(tasks)), schema)


def split_rows(tasks: Tasks, context: int | float, generator: torch.Generator) -> tuple[Tasks, Tasks]:
    """Splits each task at random into context and target.

    Args:
        tasks: Tasks with rows.
        context: How many rows of each task are context, `min(k, n)`, or a fraction.
        generator: Source of randomness, on the CPU.

    Returns:
        (context, target) with the same tasks.

    Raises:
        ValueError: If `context` is neither a count nor a fraction.
    """
    counts = context_counts(torch.from_numpy(tasks.sizes), context)
    return tasks.split_rows(choose_rows(tasks.offsets, counts, generator))


def draw_tasks(tasks: Tasks, count: int, generator: torch.Generator) -> torch.Tensor:
    """Draws positions of `count` distinct tasks, all equally likely; all in random order if there are fewer."""
    return torch.randperm(len(tasks), generator=generator)[:count]


def draw_episode(
    tasks: Tasks,
    idx: Any,
    *,
    context: tuple[int, int],
    generator: torch.Generator,
    rows: int | None = None,
    one_size: bool = False,
) -> Episode:
    """Draws an episode of these tasks, with a context size for each task.

    The size is uniform on lo … hi, cut to n - 1, so that every task with rows keeps a target.

    Args:
        tasks: Tasks with rows.
        idx: Which of them, as in `tasks[…]`.
        context: Smallest and largest context size (lo, hi).
        generator: Source of randomness, on the CPU.
        rows: Rows to pad both batches to; by default each to its largest task.
        one_size: Draw one size for all of them: tasks of the same size then need no padding.

    Raises:
        ValueError: If not 0 ≤ lo ≤ hi.
    """
    low, high = context
    if not 0 <= low <= high:
        raise ValueError(f"context: expected sizes (lo, hi) with 0 <= lo <= hi, got {context}")
    chosen = tasks[idx]
    sizes = torch.from_numpy(chosen.sizes)
    wanted = torch.randint(low, high + 1, (1 if one_size else len(chosen),), generator=generator)
    counts = torch.minimum(wanted, (sizes - 1).clamp(min=0))
    given, held_out = chosen.split_rows(choose_rows(chosen.offsets, counts, generator))
    everything = slice(None)
    return Episode(given.batch(everything, rows=rows), held_out.batch(everything, rows=rows))
