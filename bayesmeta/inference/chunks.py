"""Cutting work into pieces: tasks of like size together, draws of θ in chunks that fit the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks

CHUNK_ELEMENTS = 2**18
"""Rows × tasks × draws evaluated at once: more falls out of the cache, less pays overhead."""
CHUNK_TASKS = 512
COUPLED_ENTRIES = 2**13
"""Entries of covariances of the tasks of a chunk, at one θ: derivatives hold many matrices of each at once."""
GROWTH = 4
"""Ratio between the sizes that tasks are padded to; a smaller one pads less and records more graphs."""

GRAPH_ELEMENTS = 2**20
"""What recording one more graph costs, in rows × tasks × draws."""
PIECE_ELEMENTS = 20_000
"""What evaluating one more piece costs, in rows × tasks × draws."""


@dataclass(frozen=True)
class Chunk:
    """Some tasks of like size: their positions `(T,)`, and their batch, filled up to the size of the other chunks."""

    index: np.ndarray
    batch: Batch


def padded_rows(size: int) -> int:
    """The number of rows that a task of this size is padded to: a power of four."""
    rows = 1
    while rows < size:
        rows *= GROWTH
    return rows


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def task_chunks(
    tasks: Tasks, *, exact_size: bool, limit: int = CHUNK_TASKS, rounded: bool = False, draws: int | None = None
) -> Iterator[Chunk]:
    """Yields all tasks, tasks of like (or equal) size together.

    Args:
        tasks: The tasks.
        exact_size: They may not be padded.
        limit: The most tasks in a chunk, a power of two.
        rounded: Numbers of tasks and of rows are powers of two: other tasks next time need few other graphs.
        draws: At how many points each task is evaluated in all; where few, tasks of different sizes are padded
            together rather than that another graph is recorded.
    """
    sizes = np.asarray(tasks.sizes)
    rows = _padded(sizes, exact_size=exact_size, rounded=rounded, draws=draws)
    for target in np.unique(rows):
        members = np.flatnonzero(rows == target)
        most = min(limit, _power_of_two(1 + COUPLED_ENTRIES // int(target) ** 2) // 2 or 1) if exact_size else limit
        widest = max(1, int(sizes[members].max()))
        pieces = -(-len(members) // most)
        size = -(-len(members) // pieces)
        if rounded:
            widest, size = widest if exact_size else _power_of_two(widest), _power_of_two(size)
        for start in range(0, len(members), size):
            index = members[start : start + size]
            filled = np.concatenate([index, np.repeat(index[-1:], size - len(index))])
            yield Chunk(index, tasks.batch(filled, rows=widest))


def _padded(sizes: np.ndarray, *, exact_size: bool, rounded: bool, draws: int | None) -> np.ndarray:
    """The number of rows of the group that each task is in `(T,)`."""
    if exact_size:
        return np.maximum(sizes, 1)
    distinct, which = np.unique(sizes, return_inverse=True)
    rows = np.array([padded_rows(int(n)) for n in distinct])[which]
    if draws is None:
        return rows
    for target in np.unique(rows):
        widest = max(1, int(sizes[rows == target].max()))
        rows[rows == target] = _power_of_two(widest) if rounded else widest
    for together in like_sizes(rows, draws=draws, each=GRAPH_ELEMENTS):
        rows[together] = rows[together].max()
    return rows


def theta_chunks(theta: Tensor, batch: Batch, *, exact_size: bool = False) -> Iterator[tuple[slice, Tensor]]:
    """Yields draws of θ in chunks of one size (the last is filled up): `(where they belong, theta)`.

    Args:
        theta: The draws `(S, d_theta)`.
        batch: The tasks.
        exact_size: The rows of a task are coupled: what is evaluated has the size of covariances.
    """
    per_draw = max(1, batch.mask.numel() * (batch.mask.shape[1] if exact_size else 1))
    pieces = max(1, round(len(theta) * per_draw / CHUNK_ELEMENTS))
    size = -(-len(theta) // pieces)
    for start in range(0, len(theta), size):
        part = theta[start : start + size]
        keep = len(part)
        if keep < size:
            part = torch.cat([part, part[-1:].expand(size - keep, -1)])
        yield slice(start, start + keep), part


def different(theta: Tensor) -> tuple[Tensor, Tensor]:
    """Draws of θ without repetitions, filled up to a power of two, and where each draw is among them.

    Where gradients are recorded, all of them: which are equal cannot be differentiated. One point that is expanded
    counts once in any case.
    """
    if theta.shape[1] == 0 or theta.stride(0) == 0:
        return theta[:1], torch.zeros(len(theta), dtype=torch.long)
    if torch.is_grad_enabled():
        return theta, torch.arange(len(theta))
    some, place = theta.unique_consecutive(dim=0, return_inverse=True)
    missing = _power_of_two(len(some)) - len(some)
    return torch.cat([some, some[-1:].expand(missing, -1)]), place


def like_sizes(sizes: np.ndarray, *, draws: int, each: int = PIECE_ELEMENTS) -> list[np.ndarray]:
    """Cuts tasks `(T,)` into groups of like size so that padding and the groups, `each` one, cost least together."""
    sizes = np.asarray(sizes)
    order = np.argsort(sizes, kind="stable")
    distinct, first = np.unique(sizes[order], return_index=True)
    ends = np.append(first, len(order))
    widest = np.maximum(distinct, 1)
    cost = np.zeros(len(ends))
    start = np.zeros(len(ends), dtype=int)
    for end in range(1, len(ends)):
        choices = cost[:end] + each + draws * widest[end - 1] * (ends[end] - ends[:end])
        start[end] = int(choices.argmin())
        cost[end] = choices[start[end]]
    groups, end = [], len(distinct)
    while end:
        groups.append(np.sort(order[ends[start[end]] : ends[end]]))
        end = start[end]
    return groups[::-1]
