"""What all families of tasks share: sizes, seeds, names, and the questions that can be asked of them.

A family says how inputs and labels are drawn and, where it is known, what is to be believed of new rows; `Family` makes
`Tasks` of the former and checks the arguments of the latter.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesmeta.data.batch import Batch
from bayesmeta.data.families.rows import Rows
from bayesmeta.data.ragged import whole
from bayesmeta.data.tasks import Tasks

Interval = tuple[float, float]
Sizes = int | tuple[int, int] | Sequence[int]
"""Rows a task: one number, (smallest, largest), or a list with one number a task."""


class Family(abc.ABC):
    """A distribution of tasks whose truth is known.

    Implementations draw inputs (`inputs`) and labels (`labels`); those that know their Bayes-optimal predictive
    override `predictive` and `evidence`. Both hold in float64 whatever the dtype of the data.
    """

    dim: int
    """Inputs of a row."""
    context_rows: int | tuple[int, int]
    """Rows of an episode's context: one number, or (smallest, largest)."""
    target_rows: int | tuple[int, int]
    """Rows of an episode's target, likewise."""

    @abc.abstractmethod
    def inputs(self, tasks: int, rows: int, generator: torch.Generator, *, target: bool = False) -> Tensor:
        """Draws inputs `(tasks, rows, dim)`, float64, as contexts have them or as targets do."""

    @abc.abstractmethod
    def labels(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Draws tasks at inputs `(T, N, dim)`.

        Returns:
            Labels `(T, N)` and the true parameters, each `(T, …)`.
        """

    def predictive(self, rows: Rows, x: Tensor) -> Distribution:
        """p(y | x, rows) of each new row alone, batch shape `(T, M)`; x is `(T, M, dim)`, float64."""
        self._unknown()

    def evidence(self, rows: Rows) -> Tensor:
        """Log p(y | x) of all rows of each task together, `(T,)`."""
        self._unknown()

    def sizes(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws the sizes of n contexts and of their targets, int64 `(n,)` each."""
        return draw_sizes(self.context_rows, n, generator), draw_sizes(self.target_rows, n, generator)

    def simulate(self, n: int, *, rows: Sizes | None = None, seed: int = 0) -> tuple[Tasks, dict[str, np.ndarray]]:
        """Draws tasks and their truth.

        Args:
            n: Number of tasks.
            rows: Rows a task: one number, a range (smallest, largest) from which each task draws, or a list with one
                number a task; None for as many as an episode has, context and target together.
            seed: Seed; tasks of different seeds have different names, and episodes other tasks than `simulate`.

        Returns:
            Tasks, their inputs drawn as contexts have them, and the true parameters by name, `(task, …)` each.

        Raises:
            ValueError: If `n`, `rows` or `seed` is out of range.
        """
        generator = _generator(n, seed, purpose=0)
        given, new = self.sizes(n, generator)
        counts = given + new if rows is None else draw_sizes(rows, n, generator)
        x = self.inputs(n, max(1, int(counts.max())), generator)
        y, truth = self.labels(x, generator)
        tasks = self._tasks(x, y, counts, self._names("task", n, seed))
        return tasks, {name: value.numpy() for name, value in truth.items()}

    def episodes(self, n: int, *, seed: int = 0) -> tuple[Tasks, Tasks]:
        """Draws contexts and targets of the same tasks, each with sizes of its own drawn as the recipe says.

        Args:
            n: Number of tasks.
            seed: Seed.

        Returns:
            (context, target).

        Raises:
            ValueError: If `n` or `seed` is out of range.
        """
        generator = _generator(n, seed, purpose=1)
        given, new = self.sizes(n, generator)
        first = int(given.max())
        x = torch.cat(
            [
                self.inputs(n, first, generator),
                self.inputs(n, max(1, int(new.max())), generator, target=True),
            ],
            dim=1,
        )
        y, _ = self.labels(x, generator)
        names = self._names("episode", n, seed)
        context = self._tasks(x[:, :first], y[:, :first], given, names)
        return context, self._tasks(x[:, first:], y[:, first:], new, names)

    def oracle(self, context: Batch, x: Tensor) -> Distribution:
        """The Bayes-optimal predictive: what is to be believed of new rows by whoever knows the family.

        It is a learner without parameters: `bm.ConditionalModel(family.oracle)` is fitted and scored as any other.

        Args:
            context: Rows that are given, padded and masked; a task may have none.
            x: New inputs `(T, M, dim)`.

        Returns:
            A float64 distribution of batch shape `(T, M)`, of each row alone.

        Raises:
            ValueError: If shapes do not fit, or the predictive of this family is not known.
        """
        if x.dim() != 3 or x.shape[0] != len(context) or x.shape[2] != self.dim:
            raise ValueError(
                f"{self._label}.oracle: expected x of shape ({len(context)}, M, {self.dim}), tasks, rows and inputs, "
                f"got {tuple(x.shape)}; reshape x"
            )
        return self.predictive(self._rows(context), x.double())

    def log_evidence(self, batch: Batch) -> Tensor:
        """Log density of all labels of each task together, `(T,)`: the truth integrated out.

        Args:
            batch: Tasks; one without rows has log density 0.

        Raises:
            ValueError: If shapes do not fit, or the density of this family is not known.
        """
        return self.evidence(self._rows(batch))

    def joint_log_prob(self, context: Batch, target: Batch) -> Tensor:
        """Log density of the target's labels together given the context, `(T,)`.

        Args:
            context: Rows that are given; a task may have none.
            target: Rows that are scored, of the same tasks in the same order.

        Raises:
            ValueError: If the tasks or shapes do not fit, or the density of this family is not known.
        """
        if context.names != target.names:
            raise ValueError(
                f"{self._label}.joint_log_prob: expected a context and a target of the same tasks, got {len(context)} "
                f"and {len(target)} whose names differ; take both with the same index"
            )
        given = self._rows(context)
        return self.evidence(given.joined(self._rows(target))) - self.evidence(given)

    @property
    def _label(self) -> str:
        return type(self).__name__

    def _rows(self, batch: Batch) -> Rows:
        if batch.x.shape[2:] != (self.dim,) or batch.y.dim() != 2:
            raise ValueError(
                f"{self._label}: expected rows with {self.dim} input(s) and one label, got inputs of shape "
                f"{tuple(batch.x.shape[2:])} and labels of shape {tuple(batch.y.shape[2:])}; reshape them"
            )
        return Rows.of(batch)

    def _names(self, kind: str, n: int, seed: int) -> list[str]:
        return [f"{self._label} {kind} {seed}.{number}" for number in range(1, n + 1)]

    @staticmethod
    def _tasks(x: Tensor, y: Tensor, counts: Tensor, names: list[str]) -> Tasks:
        cut = list(enumerate(counts.tolist()))
        return Tasks.from_arrays(
            [x[task, :count].numpy() for task, count in cut],
            [y[task, :count].numpy() for task, count in cut],
            names=names,
        )

    def _unknown(self) -> NoReturn:
        raise ValueError(
            f"{self._label}: the Bayes-optimal predictive of this family is not known; score learners on held-out rows "
            "against each other, or use a family that has one, such as GaussianProcesses or Sinusoids"
        )


def draw_sizes(rows: Sizes, n: int, generator: torch.Generator) -> Tensor:
    """Draws sizes of n tasks, int64 `(n,)`: see `Sizes`.

    Raises:
        ValueError: If they are not whole numbers from 0, a range is empty, or a list has not n entries.
    """
    if isinstance(rows, tuple) and len(rows) == 2 and _in_order(rows):
        return torch.randint(rows[0], rows[1] + 1, (n,), generator=generator)
    counts = _counts(rows, n)
    if len(counts) != n or any(count is None or count < 0 for count in counts):
        raise ValueError(
            f"rows: expected a number of rows, a range (smallest, largest), or a list of {n} numbers, one a task, got "
            f"{rows!r}"
        )
    return torch.tensor(counts, dtype=torch.int64)


def _counts(rows: Sizes, n: int) -> list[int | None]:
    """One number for all, or a list; a tuple is a range and none of these."""
    if isinstance(rows, tuple):
        return []
    listed = [rows] * n if isinstance(rows, int) or np.ndim(rows) == 0 else rows
    return [whole(count) for count in listed]


def _in_order(rows: tuple[int, int]) -> bool:
    low, high = whole(rows[0]), whole(rows[1])
    return low is not None and high is not None and 0 <= low <= high


def _generator(n: int, seed: int, *, purpose: int) -> torch.Generator:
    """A source of randomness that differs by seed and by purpose, so that episodes are never the simulated tasks."""
    for name, value, least in (("n", n, 1), ("seed", seed, 0)):
        number = whole(value)
        if number is None or number < least:
            raise ValueError(f"{name}: expected a whole number from {least}, got {value!r}")
    state = np.random.SeedSequence([seed, purpose]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def uniform(shape: tuple[int, ...], interval: Interval, generator: torch.Generator) -> Tensor:
    """Draws from a uniform distribution, float64."""
    low, high = interval
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draws from the standard normal distribution, float64."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def check_intervals(family: str, **intervals: Interval) -> None:
    """Checks that intervals are (low, high) with low < high, both finite.

    Raises:
        ValueError: Otherwise.
    """
    for name, interval in intervals.items():
        if len(interval) != 2 or not -np.inf < interval[0] < interval[1] < np.inf:
            raise ValueError(f"{family}: expected {name} as (low, high) with low < high, got {interval!r}")


def check_positive(family: str, **values: float) -> None:
    """Checks that numbers are positive and finite.

    Raises:
        ValueError: Otherwise.
    """
    for name, value in values.items():
        if not 0 < value < np.inf:
            raise ValueError(f"{family}: expected {name} as a positive number, got {value!r}")


def check_dim(family: str, dim: int) -> None:
    """Checks that a number of inputs is a whole number from 1.

    Raises:
        ValueError: Otherwise.
    """
    if whole(dim) is None or dim < 1:
        raise ValueError(f"{family}: expected dim, the inputs of a row, as a whole number from 1, got {dim!r}")
