"""All tasks of a fit as one compiled function of θ: what samplers and optimisers call thousands of times.

The tasks are cut into pieces of like size; their graphs and the prior of θ are recorded together, with the data as
inputs, so that one compilation serves all data of the same sizes. Many tasks are cut into blocks of one shape that are
called one after another: what is computed of a block stays in the cache.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.derivatives import Prepared
from bayesmeta.hierarchy.recording import Recorded
from bayesmeta.hierarchy.sufficient import condensed, widest
from bayesmeta.inference.chunks import like_sizes

PIECE_DRAWS = 16
"""How often the rows of a task are evaluated, relative to what one more piece costs: few pieces compile quickly."""
BLOCK_ELEMENTS = 2**20
"""Rows × tasks × points a task that are evaluated at once."""

PieceFunction = Callable[..., Any]
"""`(graph, theta, noise (T', d), leaves) -> (T',)`."""


@dataclass(frozen=True)
class Piece:
    """Some tasks: positions, the graph of their log joint `(theta, noise, *leaves) -> (T',)`, and its data."""

    index: np.ndarray
    graph: Callable[..., Any]
    leaves: tuple[Tensor, ...]


@dataclass(frozen=True)
class Block:
    """Pieces that are evaluated together."""

    pieces: tuple[Piece, ...]

    @property
    def count(self) -> int:
        """How many tasks there are."""
        return sum(len(piece.index) for piece in self.pieces)

    @property
    def leaves(self) -> list[Tensor]:
        """The data of all pieces."""
        return [leaf for piece in self.pieces for leaf in piece.leaves]

    @property
    def shape(self) -> tuple[Any, ...]:
        """Blocks of the same shape share what is compiled."""
        return tuple((id(p.graph), *((leaf.shape, leaf.dtype) for leaf in p.leaves)) for p in self.pieces)

    def by_piece(self, function: PieceFunction, theta: Tensor, noise: Tensor, leaves: Sequence[Tensor]) -> list[Any]:
        """`function` of each piece; noise `(T', d)` follows the pieces, `leaves` are their data and learned values."""
        values = leaves[sum(len(piece.leaves) for piece in self.pieces) :]
        found, start, row = [], 0, 0
        for piece in self.pieces:
            width = len(piece.leaves)
            some = noise[row : row + len(piece.index)]
            found.append(function(piece.graph, theta, some, (*leaves[start : start + width], *values)))
            start, row = start + width, row + len(piece.index)
        return found


class Collected:
    """All tasks of a fit, in blocks.

    Args:
        density: The model.
        tasks: The tasks.
        points: At how many points the density of each task is evaluated at once.
        function: The log joint density of a task; by default that of θ and whitened noise.

    Attributes:
        blocks: The tasks, few of them in one block.
        elements: Rows × points, what one evaluation costs.
        order: Position of each task when the pieces of all blocks follow each other `(T,)`.
        values: The learned values that the model starts with.
    """

    def __init__(
        self, density: TaskDensity, tasks: Tasks, *, points: int = 1, function: Recorded | None = None
    ) -> None:
        self.density, self.count = density, len(tasks)
        self._log_task = density.log_task if function is None else function
        self.values = dict(density.learned.values)
        self._theta = density.initial_theta()
        groups = self._groups(tasks, points)
        self.elements = points * rows(tasks)
        self.blocks = [Block(tuple(self._piece(tasks, index) for index in block)) for block in groups]
        self.order = torch.as_tensor(np.concatenate(list(itertools.chain(*groups)))).argsort()
        self._prior = self._joint(tasks[groups[0][0][:1]])

    def _groups(self, tasks: Tasks, points: int) -> list[list[np.ndarray]]:
        """Positions of tasks by block and piece: all tasks are one piece where further rows cost nothing."""
        sizes, exact = np.asarray(tasks.sizes), self.density.structure.exact_size
        groups = _groups(sizes, points, exact=exact)
        together = len(sizes) * int(sizes.max(initial=1)) * points <= BLOCK_ELEMENTS
        if exact or not together or len(groups[0]) == 1:
            return groups
        longest = max(groups[0], key=lambda index: int(sizes[index].max()))
        graph, varying = self._graph(tasks, longest)
        cheap = varying and widest(graph, varying, len(longest)) < sizes.max()
        return [[np.arange(len(sizes))]] if cheap else groups

    def _piece(self, tasks: Tasks, index: np.ndarray) -> Piece:
        graph, _ = self._graph(tasks, index)
        return Piece(index, graph, tuple(self.density.tensors(tasks.batch(index)).values()))

    def _graph(self, tasks: Tasks, index: np.ndarray) -> tuple[Any, list[int]]:
        """The graph of some tasks, and which inputs of it change; none where it could not be recorded."""
        data = self.density.tensors(tasks.batch(index))
        noise = self._theta.new_zeros(len(index), self.density.structure.task_size)
        graph = self._log_task.graph(self._theta, noise, data, self.values)
        if not isinstance(graph, torch.fx.GraphModule):
            return graph, []
        count = len(data) + 2
        varying = [0, 1, *range(count, count + len(self.values))]
        return condensed(graph, varying), varying

    def _joint(self, task: Tasks) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
        data = self.density.tensors(task.batch([0]))
        noise = self._theta.new_zeros(1, self.density.structure.task_size)
        return self.density.log_joint.graph(self._theta, noise, data, self.values), tuple(data.values())

    def log_prior(self, theta: Tensor, values: Sequence[Tensor]) -> Tensor:
        """Log prior of θ `(d_theta,)` with its Jacobian."""
        graph, leaves = self._prior
        noise = theta.new_zeros(1, self.density.structure.task_size)
        return graph(theta, noise, *leaves, *values)[1]  # type: ignore[no-any-return]

    def by_block(
        self, function: Callable[..., Any], examples: Callable[[Block], Sequence[Tensor]], *, compiled: bool = True
    ) -> list[Callable[..., Any]]:
        """Records a function for every block.

        Args:
            function: `(block, *arguments, *data, *values)` -> tensors.
            examples: The arguments of a block.
            compiled: Whether it is compiled.

        Returns:
            One function of `(*arguments, *values)` a block; a model that cannot be recorded runs as it is.
        """
        values = [value.detach() for value in self.values.values()]
        made: dict[Any, Prepared] = {}
        for block in self.blocks:
            if block.shape not in made:
                varying = [*examples(block), *values]
                bound = _reordered(functools.partial(function, block), len(varying) - len(values), len(values))
                recordable = self._recordable(block)
                made[block.shape] = Prepared(bound, varying, block.leaves, recordable=recordable, compiled=compiled)
        return [made[block.shape].of(block.leaves) for block in self.blocks]

    def _recordable(self, block: Block) -> bool:
        graphs = [self._prior[0], *(piece.graph for piece in block.pieces)]
        return all(isinstance(graph, torch.fx.GraphModule) for graph in graphs)


def rows(tasks: Tasks) -> int:
    """Rows of all tasks; an empty one counts as one."""
    return int(np.maximum(np.asarray(tasks.sizes), 1).sum())


def in_double(density: TaskDensity, tasks: Tasks) -> TaskDensity:
    """The same model in float64: sums over tasks, Newton steps and Markov chains need its digits."""
    if density.dtype == torch.float64:
        return density
    precise = TaskDensity(density.model, tasks)
    precise.learned.values.update({name: value.double() for name, value in density.learned.values.items()})
    return precise


def _reordered(function: Callable[..., Any], width: int, count: int) -> Callable[..., Any]:
    """`function(*arguments, *data, *values)` as a function of `(*arguments, *values, *data)`."""

    def ordered(*given: Tensor) -> Any:
        return function(*given[:width], *given[width + count :], *given[width : width + count])

    return ordered


def _groups(sizes: np.ndarray, points: int, *, exact: bool) -> list[list[np.ndarray]]:
    """Positions of tasks by block and piece."""
    rows = np.maximum(sizes, 1)
    few = int(rows.sum()) * points <= BLOCK_ELEMENTS
    groups = _alike(sizes, PIECE_DRAWS if few else 1, exact=exact)
    if few:
        return [groups]
    blocks, left = [], []
    for group in groups:
        most = max(1, BLOCK_ELEMENTS // (points * int(rows[group].max())))
        size = max(1, len(group) // -(-len(group) // most))
        whole = len(group) // size * size
        blocks += [[some] for some in group[:whole].reshape(-1, size)]
        left.append(group[whole:])
    rest = np.concatenate(left)
    if len(rest):
        blocks.append([rest[group] for group in _alike(sizes[rest], 1, exact=exact)])
    return blocks


def _alike(sizes: np.ndarray, draws: int, *, exact: bool) -> list[np.ndarray]:
    """Positions of tasks of equal size, or of like size."""
    return [np.flatnonzero(sizes == n) for n in np.unique(sizes)] if exact else like_sizes(sizes, draws=draws)
