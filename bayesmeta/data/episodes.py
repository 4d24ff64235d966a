"""Episodes: a context and a target of the same tasks, as objectives that score held-out rows receive them.

Here live the episode and its random drawing; which rows are context is decided in `ragged.py`, how they are
padded in `tasks.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bayesmeta.data.batch import Batch
from bayesmeta.data.ragged import choose_rows, context_counts
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
