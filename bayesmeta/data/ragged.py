"""Flat storage of ragged tasks and the index arithmetic on it: no names of files, no messages about columns.

Rows of all tasks lie one after the other; task t owns the rows `offsets[t] … offsets[t+1]`. `Tasks` is the
interface to this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from bayesmeta.data.schema import COLUMN, TASK_COLUMN, Schema, listing


@dataclass(frozen=True)
class Ragged:
    """The data of T tasks with R rows.

    Attributes:
        names: One name a task.
        offsets: int64 `(T+1,)`, where each task begins.
        rows: "x" `(R,*dx)`, "y" and "observed" `(R,*dy)`, "column:<name>" `(R,…)`, and perhaps "weight" `(R,)`.
        per_task: "task_column:<name>" `(T,…)`, and perhaps "task_weight" `(T,)`.
        schema: Names, shapes and levels.
    """

    names: tuple[str, ...]
    offsets: Tensor
    rows: dict[str, Tensor]
    per_task: dict[str, Tensor]
    schema: Schema

    @property
    def sizes(self) -> Tensor:
        """Rows of each task, int64 `(T,)`."""
        return self.offsets.diff()


def offsets_of(sizes: Tensor) -> Tensor:
    """Returns the offsets `(T+1,)` of tasks with these sizes `(T,)`."""
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])


def task_of_row(offsets: Tensor) -> Tensor:
    """Returns the task of each row, `(R,)`."""
    return torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())


def subset(data: Ragged, index: Tensor) -> Ragged:
    """Returns the tasks at `index` `(S,)`, in that order."""
    sizes, chosen = data.sizes[index], index.tolist()
    offsets = offsets_of(sizes)
    shift = torch.repeat_interleave(data.offsets[index] - offsets[:-1], sizes)
    source = torch.arange(len(shift)) + shift
    return Ragged(
        names=tuple(data.names[i] for i in chosen),
        offsets=offsets,
        rows={key: value[source] for key, value in data.rows.items()},
        per_task={key: value[index] for key, value in data.per_task.items()},
        schema=data.schema,
    )


def take_rows(data: Ragged, keep: Tensor) -> Ragged:
    """Returns the same tasks with only the rows where `keep` `(R,)` is True; a task may end up without rows."""
    before = torch.cat([data.offsets.new_zeros(1), keep.long().cumsum(0)])
    rows = {key: value[keep] for key, value in data.rows.items()}
    return replace(data, offsets=before[data.offsets], rows=rows)


def without_weights(data: Ragged) -> Ragged:
    """Returns the same data without row weights and task weights."""
    schema = replace(data.schema, weight=None, task_weight=None)
    rows = {key: value for key, value in data.rows.items() if key != "weight"}
    per_task = {key: value for key, value in data.per_task.items() if key != "task_weight"}
    return replace(data, rows=rows, per_task=per_task, schema=schema)


def merged(data: Ragged, name: str) -> Ragged:
    """Returns one task with the rows of all; task columns become columns, task weights weigh rows."""
    task = task_of_row(data.offsets)
    spread = {key: value[task] for key, value in data.per_task.items()}
    weight = spread.pop("task_weight", None)
    rows = data.rows | {key.replace(TASK_COLUMN, COLUMN, 1): value for key, value in spread.items()}
    if weight is not None:
        rows["weight"] = weight * data.rows.get("weight", 1.0)
    old = data.schema
    columns, named = (*old.columns, *old.task_columns), old.weight or old.task_weight
    schema = replace(old, columns=columns, task_columns=(), weight=named, task_weight=None)
    return Ragged((name,), data.offsets[[0, -1]], rows, {}, schema)


def gather(data: Ragged, index: Tensor, rows: int) -> dict[str, Tensor]:
    """Returns the tensors of a `Batch` of the tasks at `index` `(S,)`, padded to `rows`.

    Padding repeats the last row of its task; a task without rows repeats the first row of the table, or the
    schema's example.
    """
    n = data.sizes[index]
    position = torch.arange(rows)
    mask = position < n[:, None]
    source = torch.where(n[:, None] > 0, data.offsets[index][:, None] + position.minimum(n[:, None] - 1), 0)
    table = data.rows if len(data.rows["y"]) else data.schema.example_rows()
    batch = {key: table[key][source] for key in data.rows}
    batch |= {key: value[index].unsqueeze(1) for key, value in data.per_task.items()}
    batch["observed"] = batch["observed"] & mask.reshape(mask.shape + (1,) * (batch["observed"].dim() - 2))
    if "weight" in batch:
        batch["weight"] = batch["weight"] * mask
    return batch | {"mask": mask, "n": n}


def choose_rows(offsets: Tensor, counts: Tensor, generator: torch.Generator) -> Tensor:
    """Chooses `counts` `(T,)` random rows of each task without replacement; returns a mask `(R,)`."""
    task = task_of_row(offsets)
    shuffled = torch.randperm(len(task), generator=generator)
    order = shuffled[torch.sort(task[shuffled], stable=True).indices]
    rank = torch.arange(len(task)) - offsets[task]
    chosen = torch.zeros(len(task), dtype=torch.bool)
    chosen[order] = rank < counts[task]
    return chosen


def context_counts(sizes: Tensor, context: int | float) -> Tensor:
    """Returns how many rows of each task are context: `min(k, n)`, or a fraction of n rounded to the nearest.

    Raises:
        ValueError: If `context` is neither a count from 0 nor a fraction between 0 and 1.
    """
    rows = whole(context)
    if rows is not None and rows >= 0:
        return sizes.clamp(max=rows)
    if isinstance(context, float) and 0.0 <= context <= 1.0:
        return (sizes * context + 0.5).floor().long()
    raise ValueError(
        f"context: expected a number of rows (0, 1, 2, …) or a fraction between 0.0 and 1.0, got {context!r}"
    )


def whole(value: object) -> int | None:
    """Returns a whole number of Python or NumPy as int; None for anything else, bools included."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def to_state(data: Ragged) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the storage as tensors and JSON-able data."""
    tensors = {f"rows/{key}": value for key, value in data.rows.items()}
    tensors |= {f"tasks/{key}": value for key, value in data.per_task.items()}
    return tensors | {"offsets": data.offsets}, {"names": list(data.names), "schema": data.schema.to_json()}


def from_state(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> Ragged:
    """Reads what `to_state` returned.

    Raises:
        ValueError: If a part is missing.
    """
    absent = sorted({"offsets", "rows/x", "rows/y", "rows/observed"} - set(tensors))
    absent += sorted({"names", "schema"} - set(plain))
    if absent:
        raise ValueError(f"stored tasks: {listing(absent)} missing; the file is damaged")
    rows, per_task = (
        {key.removeprefix(head): tensors[key] for key in tensors if key.startswith(head)}
        for head in ("rows/", "tasks/")
    )
    return Ragged(tuple(plain["names"]), tensors["offsets"], rows, per_task, Schema.from_json(plain["schema"]))
