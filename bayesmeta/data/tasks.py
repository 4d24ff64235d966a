"""Many small, related data sets: what a user hands to `fit` and to `posterior`.

`Tasks` is the interface: reading, selecting, splitting and padding tasks. How tables and lists are read is in
`reading.py` and `arrays.py`, how rows are stored in `ragged.py`, how data are re-encoded to a fit in `alignment.py`.
Everything to the right of this room calls it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data import ragged
from bayesmeta.data.alignment import align, align_names, aligned_rows
from bayesmeta.data.arrays import Extras, check_names, new_rows, read_arrays
from bayesmeta.data.batch import Batch
from bayesmeta.data.fingerprints import Origin, fingerprints
from bayesmeta.data.reading import Roles, read_table, write_table
from bayesmeta.data.schema import COLUMN, TASK_COLUMN, Schema
from bayesmeta.data.selection import indices
from bayesmeta.data.values import refreshed


class Tasks:
    """T tasks with R rows in all, each with inputs x and labels y.

    Make one with `from_dataframe` or `from_arrays`. Tasks are in order of first appearance, rows within a task as they
    came. Floating data are float64 (float32 images stay float32), labels and columns of whole numbers or bools int64,
    text is codes. Inputs are always floating, text among them too: an index belongs in `columns`.

    Example:
        >>> tasks = Tasks.from_arrays([[0.0, 1.0], [2.0]], [[1.0, 3.0], [5.0]], names=["a", "b"])
        >>> len(tasks), tasks["a"].sizes.tolist()
        (2, [2])
    """

    def __init__(self, data: ragged.Ragged, origin: Origin | None, index: Tensor) -> None:
        """Wraps storage, the collection that unnamed tasks come from, and their positions in it, int64 `(T,)`.

        Users call `from_dataframe` or `from_arrays`.
        """
        self._data, self._origin, self._index = data, origin, index

    @classmethod
    def from_dataframe(
        cls,
        df: Any,
        *,
        task: str,
        y: str | Sequence[str],
        x: str | Sequence[str] | None = None,
        columns: str | Sequence[str] | None = None,
        task_columns: str | Sequence[str] | None = None,
        weight: str | None = None,
        task_weight: str | None = None,
        missing: str = "error",
    ) -> Tasks:
        """Reads a dataframe with one row an observation.

        Args:
            df: A dataframe of pandas, polars, pyarrow or anything else that narwhals reads.
            task: Column that says which task a row belongs to; its values as text are the names.
            y: Column of the labels: dy is `()`; a list of k columns: dy is `(k,)`.
            x: Columns of the inputs, dx is `(k,)`, or None for no inputs; text becomes codes. A single column of arrays
                gives their shape.
            columns: Per-row data that the likelihood needs (trials, exposure, known standard errors, an index).
            task_columns: Per-task covariates; constant within a task.
            weight: Column that multiplies a row's log likelihood.
            task_weight: Column that multiplies a task's log likelihood.
            missing: "error", or "mask" to keep NaN labels as missing.

        Raises:
            ValueError: If the table is empty, a column is unknown, repeated or of the wrong kind, or values are not
                finite.
        """
        data = read_table(df, Roles(task, y, x, columns, task_columns, weight, task_weight), missing)
        return cls(data, None, torch.arange(len(data.names)))

    @classmethod
    def from_arrays(
        cls,
        x: Sequence[Any] | None,
        y: Sequence[Any],
        *,
        columns: Mapping[str, Sequence[Any]] | None = None,
        task_columns: Mapping[str, Any] | None = None,
        names: Sequence[str] | None = None,
        weight: Sequence[Any] | None = None,
        task_weight: Any = None,
        missing: str = "error",
    ) -> Tasks:
        """Reads lists with one array a task; an empty array is a task without rows.

        Args:
            x: One array `(n_i,*dx)` a task (numbers, vectors, images), or None for no inputs.
            y: One array `(n_i,*dy)` a task.
            columns: For each name one array `(n_i,…)` a task.
            task_columns: For each name `(T,…)`.
            names: One name a task; by default "0", "1", … which identify a task only together with its collection.
            weight: One array `(n_i,)` a task.
            task_weight: `(T,)`.
            missing: "error", or "mask" to keep NaN labels as missing.

        Raises:
            ValueError: If lengths, shapes or names disagree, or values are not finite numbers.
        """
        extras = Extras(columns or {}, task_columns or {}, weight, task_weight)
        data = read_arrays(x, y, names, extras, missing)
        return cls(data, Origin(data) if names is None else None, torch.arange(len(data.names)))

    @property
    def names(self) -> tuple[str, ...]:
        """One name a task."""
        return self._data.names

    @property
    def schema(self) -> Schema:
        """Names, shapes and levels of the data."""
        return self._data.schema

    @property
    def offsets(self) -> Tensor:
        """Where each task's rows begin, int64 `(T+1,)`."""
        return self._data.offsets

    @cached_property
    def sizes(self) -> np.ndarray:
        """Rows of each task, int64 `(T,)`."""
        return self._data.sizes.numpy()

    @property
    def x(self) -> Tensor:
        """Inputs of all rows `(R,*dx)`."""
        return self._data.rows["x"]

    @property
    def y(self) -> Tensor:
        """Labels of all rows `(R,*dy)`; a missing one holds an observed value."""
        return self._data.rows["y"]

    @property
    def observed(self) -> Tensor:
        """Bool `(R,*dy)`: False where a label is missing."""
        return self._data.rows["observed"]

    @property
    def columns(self) -> dict[str, Tensor]:
        """Per-row columns by name, `(R,…)`."""
        return {name: self._data.rows[f"{COLUMN}{name}"] for name in self.schema.columns}

    @property
    def task_columns(self) -> dict[str, Tensor]:
        """Per-task columns by name, `(T,…)`."""
        return {name: self._data.per_task[f"{TASK_COLUMN}{name}"] for name in self.schema.task_columns}

    @property
    def weight(self) -> Tensor | None:
        """Row weights `(R,)`, if there are any."""
        return self._data.rows.get("weight")

    @property
    def task_weight(self) -> Tensor | None:
        """Task weights `(T,)`, if there are any."""
        return self._data.per_task.get("task_weight")

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        rows, schema = int(self.offsets[-1]), self.schema
        return f"Tasks({len(self)} tasks, {rows} rows, x={list(schema.x)}, y={list(schema.y)})"

    def __iter__(self) -> Iterator[Tasks]:
        """Yields one-task Tasks."""
        return (self[position] for position in range(len(self)))

    def __getitem__(self, selection: Any) -> Tasks:
        """Selects tasks by name, position, slice, or a list or array of names, positions or bools.

        Raises:
            ValueError: If a name is unknown, a position out of range, a task selected twice, or none selected.
        """
        index = indices(selection, self._positions)
        counts = torch.bincount(index)
        if int(counts.max()) > 1:
            twice = self.names[int(counts.argmax())]
            raise ValueError(f"duplicated names: task {twice!r} is selected twice; select it once, or see `copies`")
        return Tasks(ragged.subset(self._data, index), self._origin, self._index[index])

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {name: position for position, name in enumerate(self.names)}

    def split(self, *, new: int | float, seed: int) -> tuple[Tasks, Tasks]:
        """Splits at random by task.

        Args:
            new: How many tasks are new, or a fraction between 0 and 1.
            seed: Seed of the choice.

        Returns:
            (known, new), each in the order of these tasks.

        Raises:
            ValueError: If one side would be empty.
        """
        count = len(self)
        wanted = max(1, round(new * count)) if isinstance(new, float) and 0.0 < new < 1.0 else ragged.whole(new)
        if wanted is None or not 0 < wanted < count:
            raise ValueError(
                f"new: expected a number of tasks from 1 to {count - 1} or a fraction between 0 and 1, got {new!r}"
            )
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        return self[order[wanted:].sort().values], self[order[:wanted].sort().values]

    def context_target(self, *, context: int | float, seed: int) -> tuple[Tasks, Tasks]:
        """Splits at random within each task.

        Args:
            context: How many rows of each task are context (at most all of them), or a fraction from 0.0 to 1.0.
            seed: Seed of the choice.

        Returns:
            (context, target): the same tasks, which may be without rows on one side.

        Raises:
            ValueError: If `context` is neither a count nor a fraction.
        """
        counts = ragged.context_counts(self._data.sizes, context)
        return self.split_rows(ragged.choose_rows(self.offsets, counts, torch.Generator().manual_seed(seed)))

    def split_rows(self, keep: Tensor) -> tuple[Tasks, Tasks]:
        """Splits the rows by a bool mask `(R,)`: those where it is True, and the others."""
        return self._with(ragged.take_rows(self._data, keep)), self._with(ragged.take_rows(self._data, ~keep))

    def without_rows(self) -> Tasks:
        """Returns the same tasks with their task columns, and no rows."""
        return self.split_rows(self.y.new_zeros(len(self.y), dtype=torch.bool))[0]

    def _with(self, data: ragged.Ragged) -> Tasks:
        return Tasks(data, self._origin, self._index)

    def batch(self, idx: Any, *, rows: int | None = None) -> Batch:
        """Returns tasks as one padded batch; a task may be repeated.

        Args:
            idx: What `tasks[…]` takes.
            rows: Rows to pad to; by default the size of the largest of these tasks, at least 1.

        Raises:
            ValueError: If an index is out of range or `rows` is smaller than a task.
        """
        index = indices(idx, self._positions)
        largest = int(self._data.sizes[index].max())
        if rows is not None and rows < max(largest, 1):
            raise ValueError(
                f"rows: expected at least {max(largest, 1)}, the size of the largest of these tasks, got {rows}"
            )
        tensors = ragged.gather(self._data, index, max(largest, 1) if rows is None else rows)
        names = self.names
        return Batch(tensors, tuple([names[i] for i in index.tolist()]), self.schema)

    def to_dataframe(self, backend: str = "pandas") -> Any:
        """Returns one row an observation, text as it was and missing labels as null; tasks without rows have none.

        Args:
            backend: "pandas", "polars", "pyarrow" or another that narwhals writes.

        Raises:
            ValueError: If the backend is unknown or not installed.
        """
        return write_table(self._data, backend)

    @cached_property
    def _fingerprints(self) -> tuple[str, ...]:
        return fingerprints(self._data)

    def fingerprints(self) -> tuple[str, ...]:
        """Returns for each task the fingerprint of all its data; its name is not included."""
        return self._fingerprints

    def identities(self) -> tuple[str, ...]:
        """Returns for each task its given name, or "<fingerprint of its collection>#<index there>".

        Slices, splits and a re-read of the same arrays keep it; task 0 of another collection never has it.
        """
        if self._origin is None:
            return self.names
        return tuple(f"{self._origin.key}#{position}" for position in self._index.tolist())

    def aligned(self, schema: Schema) -> Tasks:
        """Returns the same data encoded as `schema`, a fit's, says.

        Levels are recoded, columns put in its order, surplus columns dropped. Fingerprints stay unless one was dropped.

        Raises:
            ValueError: If a column is missing, a shape differs or a level was not seen.
        """
        return self._with(align(self._data, schema))

    def at(self, x: Any = None, columns: Mapping[str, Any] | None = None) -> Tasks:
        """Returns the same tasks and task columns at new rows.

        Args:
            x: `(M,*dx)` for all tasks, a list with one array a task, Tasks with these names (they bring columns and
                labels), or None to take M from the columns.
            columns: For each column `(M,…)` for all tasks, or a list with one array a task.

        Returns:
            Tasks without weights; unless `x` is Tasks, their labels are placeholders inside the support, marked as
            observed.

        Raises:
            ValueError: If columns are missing or unknown, or names, shapes, lengths or levels do not fit.
        """
        if isinstance(x, Tasks):
            if columns is not None:
                raise ValueError("columns: Tasks as x bring their own columns; pass arrays as x, or leave columns out")
            other = x[align_names(self.names, x.names)]._data
            offsets, rows = other.offsets, aligned_rows(other, self.schema)
        else:
            offsets, rows = new_rows(x, columns, self.schema, self.names)
        schema = replace(self.schema, missing=not bool(rows["observed"].all()))
        return self._with(ragged.without_weights(replace(self._data, offsets=offsets, rows=rows, schema=schema)))

    def only(self, k: int | str) -> Tasks:
        """Returns the same tasks with output `k`, a position or name, as the one label."""
        index = self.schema.output(k)
        if not self.schema.y_shape:
            return self
        rows = self._data.rows | {"y": self.y[:, index], "observed": self.observed[:, index]}
        return self._with(replace(self._data, rows=rows, schema=self.schema.only(k)))

    def copies(self, idx: Any, *, names: Sequence[str]) -> Tasks:
        """Returns tasks, repeated where `idx` repeats, under new names: shells for simulated data.

        Args:
            idx: What `tasks[…]` takes; positions may repeat.
            names: One name a copy.

        Raises:
            ValueError: If an index is out of range, or names are too few, too many or duplicated.
        """
        index = indices(idx, self._positions)
        data = replace(ragged.subset(self._data, index), names=check_names(names, len(index)))
        return Tasks(data, None, torch.arange(len(index)))

    def with_labels(self, y: Tensor, *, names: Sequence[str] | None = None) -> Tasks:
        """Returns tasks with other labels `(R,*dy)`, all observed: simulated data. Unnamed ones become new."""
        if y.shape != self.y.shape:
            raise ValueError(
                f"y: expected labels of shape {tuple(self.y.shape)}, got {tuple(y.shape)}; give one label a row"
            )
        rows = self._data.rows | {"y": y, "observed": torch.ones_like(self.observed)}
        labelled = self.names if names is None else check_names(names, len(self))
        data = replace(self._data, names=labelled, rows=rows, schema=refreshed(self.schema, rows, self._data.per_task))
        unnamed = self._origin is not None and names is None
        return Tasks(data, Origin(data) if unnamed else None, torch.arange(len(self)))

    def with_values(self, values: Mapping[str, Tensor]) -> Tasks:
        """Returns the same tasks with other tensors, by the names of `Batch.tensors`: the same in other units."""
        rows = {key: values.get(key, value) for key, value in self._data.rows.items()}
        per_task = {key: values.get(key, value) for key, value in self._data.per_task.items()}
        return self._with(replace(self._data, rows=rows, per_task=per_task))

    def merged(self, name: str) -> Tasks:
        """Returns one task with the rows of all; task columns become columns, and task weights weights of rows."""
        data = ragged.merged(self._data, name)
        data = replace(data, schema=refreshed(data.schema, data.rows, {}))
        return Tasks(data, None, torch.zeros(1, dtype=torch.long))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns tensors and JSON-able data from which `from_state` makes the same tasks."""
        tensors, plain = ragged.to_state(self._data)
        origin = None if self._origin is None else self._origin.key
        return tensors | {"index": self._index}, plain | {"origin": origin}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> Tasks:
        """Reads what `state` returned.

        Raises:
            ValueError: If a part is missing.
        """
        data = ragged.from_state(tensors, plain)
        if "index" not in tensors or "origin" not in plain:
            raise ValueError("stored tasks: 'index' or 'origin' missing; the file is damaged")
        return cls(data, None if plain["origin"] is None else Origin(None, plain["origin"]), tensors["index"])
