"""A padded batch of tasks: what a model function receives.

Everything a model can reach comes from `Batch.tensors`, so that a recorded graph is fed by `Batch.replace`.
Here live the plates, the masks and the weights. `Tasks.batch` makes batches; nothing here knows how data are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from bayesmeta.data.schema import COLUMN, TASK_COLUMN, Schema, unknown


class _ObservedScale(Messenger):  # type: ignore[misc]
    """Multiplies the log density of observed sites only: a weight counts data, never the prior."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scale = scale

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.scale


@dataclass(frozen=True)
class Batch:
    """T tasks, padded to N rows with real rows, so that every entry lies inside every support.

    Attributes:
        tensors: "x" `(T,N,*dx)`, "y" `(T,N,*dy)`, "mask" `(T,N)`, "observed" `(T,N,*dy)`, "n" `(T,)`, and where there
            are any "weight" `(T,N)`, "task_weight" `(T,1)`, "column:<name>" `(T,N,…)`, "task_column:<name>" `(T,1,…)`.
        names: One name a task.
        schema: Names, shapes and levels.

    Example:
        >>> import torch
        >>> from bayesmeta.data.tasks import Tasks
        >>> batch = Tasks.from_arrays(None, [[1.0, 2.0], [3.0]]).batch([0, 1])
        >>> batch.mask.tolist()
        [[True, True], [True, False]]
    """

    tensors: dict[str, Tensor] = field(repr=False)
    names: tuple[str, ...]
    schema: Schema

    @property
    def x(self) -> Tensor:
        """Inputs `(T, N, *dx)`; text inputs as codes."""
        return self.tensors["x"]

    @property
    def y(self) -> Tensor:
        """Labels `(T, N, *dy)`; a missing or padded label holds a value inside the support."""
        return self.tensors["y"]

    @property
    def mask(self) -> Tensor:
        """Bool `(T, N)`: False on padding."""
        return self.tensors["mask"]

    @property
    def observed(self) -> Tensor:
        """Bool `(T, N, *dy)`: False where a label is missing or padded."""
        return self.tensors["observed"]

    @property
    def n(self) -> Tensor:
        """Rows of each task, int64 `(T,)`."""
        return self.tensors["n"]

    def __len__(self) -> int:
        return int(self.mask.shape[0])

    def __getitem__(self, column: str) -> Tensor:
        """Returns a column `(T,N,…)`, a task column `(T,1,…)`, or an input by its name `(T,N)`.

        Raises:
            ValueError: If there is no such column.
        """
        for key in (f"{COLUMN}{column}", f"{TASK_COLUMN}{column}"):
            if key in self.tensors:
                return self.tensors[key]
        inputs = self.schema.x if self.schema.x_shape == (len(self.schema.x),) else ()
        if column in inputs:
            return self.x[..., inputs.index(column)]
        known = unknown("column", column, (*self.schema.columns, *self.schema.task_columns, *inputs))
        raise ValueError(f"batch[{column!r}]: {known} Name it in columns= or task_columns= of the Tasks.")

    def replace(self, tensors: dict[str, Tensor]) -> Batch:
        """Returns a batch with the same names and schema and other tensors."""
        return replace(self, tensors=tensors)

    def to(self, device: str | torch.device | None = None, *, dtype: torch.dtype | None = None) -> Batch:
        """Returns the batch on `device`, its floating tensors as `dtype` (default: both as they are)."""
        return self.replace(
            {
                key: value.to(device=device, dtype=dtype if value.is_floating_point() else None)
                for key, value in self.tensors.items()
            }
        )

    @contextmanager
    def tasks(self) -> Iterator[Any]:
        """The plate over tasks, "task" at dimension -2; task weights scale the observed sites inside it."""
        with pyro.plate("task", self.mask.shape[0], dim=-2) as plate, self._scaled("task_weight"):
            yield plate

    @contextmanager
    def observations(self, plate: Any = None) -> Iterator[Any]:
        """The plate over rows, "obs" at dimension -1; `plate` is one to be entered again, for several sites.

        Padding is masked, for one output missing labels too (several: see `output`), and row weights scale the observed
        sites.
        """
        mask = self.mask & self.observed if self.y.dim() == self.mask.dim() else self.mask
        rows = pyro.plate("obs", self.mask.shape[1], dim=-1) if plate is None else plate
        with rows, poutine.mask(mask=mask), self._scaled("weight"):
            yield rows

    @contextmanager
    def _scaled(self, key: str) -> Iterator[None]:
        if key not in self.tensors:
            yield
            return
        with _ObservedScale(self.tensors[key]):
            yield

    def output(self, k: int | str) -> tuple[Tensor, Tensor]:
        """Returns output `k`, by position or name, and where it is observed.

        Args:
            k: Position or name of the output.

        Returns:
            Labels `(T,N,…)` and a mask of that shape for `poutine.mask(mask=ok)`.

        Raises:
            ValueError: If there is no such output.
        """
        index = self.schema.output(k)
        if not self.schema.y_shape:
            return self.y, self.observed
        return self.y[:, :, index], self.observed[:, :, index]

    def only(self, k: int | str) -> Batch:
        """Returns the batch with output `k` as its one label.

        Raises:
            ValueError: If there is no such output.
        """
        y, observed = self.output(k)
        return replace(self, tensors={**self.tensors, "y": y, "observed": observed}, schema=self.schema.only(k))

    def where(self, column: str, value: Any) -> Batch:
        """Returns the batch with all rows masked but those where `column` equals `value`; see `rows_where`."""
        mask = self.mask & (self[column] == self.schema.code(column, value))
        return self.replace({**self.tensors, "mask": mask})

    def rows_where(self, column: str, value: Any) -> Any:
        """A context that masks all rows but those where `column` equals `value`: mixed kinds of rows.

        Args:
            column: A column, a task column or an input.
            value: A number, or a level of a text column.

        Raises:
            ValueError: If the column or the level is unknown.
        """
        return poutine.mask(mask=self[column] == self.schema.code(column, value))
