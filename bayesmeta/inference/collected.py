"""All tasks of a fit as one compiled function of θ: what samplers and optimisers call thousands of times.

The tasks are cut into pieces of like size; their graphs and the prior of θ are recorded together, with the data as
inputs, so that one compilation serves all data of the same sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.derivatives import record_split
from bayesmeta.inference.chunks import like_sizes

PIECE_DRAWS = 16
"""How often the rows of a task are evaluated, relative to what one more piece costs: few pieces compile quickly."""

PieceFunction = Callable[..., Any]
"""`(graph, theta, noise (T', d), leaves) -> (T',)`."""


@dataclass(frozen=True)
class Piece:
    """Some tasks: positions, the graph of their log joint `(theta, noise, *leaves) -> (T',)`, and its data."""

    index: np.ndarray
    graph: Callable[..., Any]
    leaves: tuple[Tensor, ...]


class Collected:
    """All tasks of a fit, in pieces.

    Args:
        density: The model.
        tasks: The tasks.

    Attributes:
        pieces: The tasks in groups of like size.
        order: Position of each task when the pieces follow each other `(T,)`.
    """

    def __init__(self, density: TaskDensity, tasks: Tasks) -> None:
        self.density, self.count = density, len(tasks)
        self.values = dict(density.learned.values)
        sizes = np.asarray(tasks.sizes)
        exact = density.structure.exact_size
        equal = [np.flatnonzero(sizes == n) for n in np.unique(sizes)]
        groups = equal if exact else like_sizes(sizes, draws=PIECE_DRAWS)
        theta = density.initial_theta()
        self.pieces = [self._piece(tasks, index, theta) for index in groups]
        self.order = torch.as_tensor(np.concatenate(groups)).argsort()
        first = groups[0]
        self._prior = self._joint(tasks, first[:1], theta)

    def _piece(self, tasks: Tasks, index: np.ndarray, theta: Tensor) -> Piece:
        data = self.density.tensors(tasks.batch(index))
        noise = theta.new_zeros(len(index), self.density.structure.task_size)
        graph = self.density.log_task.graph(theta, noise, data, self.values)
        return Piece(index, graph, tuple(data.values()))

    def _joint(self, tasks: Tasks, index: np.ndarray, theta: Tensor) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
        data = self.density.tensors(tasks.batch(index))
        noise = theta.new_zeros(len(index), self.density.structure.task_size)
        return self.density.log_joint.graph(theta, noise, data, self.values), tuple(data.values())

    @property
    def data(self) -> list[Tensor]:
        """The data of all pieces."""
        return [leaf for piece in self.pieces for leaf in piece.leaves]

    def log_prior(self, theta: Tensor, values: Sequence[Tensor]) -> Tensor:
        """Log prior of θ `(d_theta,)` with its Jacobian."""
        graph, leaves = self._prior
        noise = theta.new_zeros(1, self.density.structure.task_size)
        return graph(theta, noise, *leaves, *values)[1]  # type: ignore[no-any-return]

    def by_piece(self, function: PieceFunction, theta: Tensor, noise: Tensor, leaves: Sequence[Tensor]) -> list[Any]:
        """`function` of each piece; noise `(T, d)` is in the order of the pieces."""
        values = leaves[len(leaves) - len(self.values) :]
        found, start, row = [], 0, 0
        for piece in self.pieces:
            width = len(piece.leaves)
            some = noise[row : row + len(piece.index)]
            found.append(function(piece.graph, theta, some, (*leaves[start : start + width], *values)))
            start, row = start + width, row + len(piece.index)
        return found

    def compiled(self, function: Callable[..., Any], *arguments: Tensor) -> Callable[..., Any]:
        """Compiles `function(*arguments, *data, *values)`; the result takes the arguments and the learned values."""
        data, values = self.data, [value.detach() for value in self.values.values()]
        width, count = len(arguments), len(values)

        def ordered(*given: Tensor) -> Any:
            return function(*given[:width], *given[width + count :], *given[width : width + count])

        return record_split(ordered, [*arguments, *values], data)
