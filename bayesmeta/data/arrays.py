"""From lists with one array a task to flat storage, and new rows for tasks that exist.

Nothing here knows tables, batches or models. `Tasks.from_arrays` and `Tasks.at` call it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data.ragged import Ragged, offsets_of
from bayesmeta.data.schema import COLUMN, TASK_COLUMN, Levels, Schema, default_names, listing, unknown
from bayesmeta.data.values import Where, covariate, inputs, labels, locate, weights, with_example


@dataclass(frozen=True)
class Extras:
    """What may stand beside x and y; see `Tasks.from_arrays`."""

    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    task_columns: Mapping[str, Any] = field(default_factory=dict)
    weight: Sequence[Any] | None = None
    task_weight: Any = None


def to_numpy(value: Any) -> np.ndarray:
    """Returns anything array-like as an array; text as objects."""
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy()
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(
            "expected rows of one shape in each task, got rows of different shapes; make them alike"
        ) from None
    return array.astype(object) if array.dtype.kind in "US" else array


def flatten(name: str, arrays: Sequence[Any], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Joins one array a task.

    Args:
        name: What the arrays are, for messages.
        arrays: One array `(n_i, …)` a task.
        names: Names of the tasks.

    Returns:
        The rows `(R, …)` and the sizes `(T,)`.

    Raises:
        ValueError: If the number of arrays is wrong, or their rows differ in shape or kind.
    """
    if len(arrays) != len(names):
        raise ValueError(f"{name}: expected one array a task, {len(names)} in all, got a list of length {len(arrays)}")
    parts = [to_numpy(value) for value in arrays]
    _check_no_scalar(name, parts, names)
    filled = [part for part in parts if len(part)] or parts[:1]
    _check_one_shape(name, filled[0].shape[1:], parts, names)
    return np.concatenate(filled), np.array([len(part) for part in parts])


def _check_no_scalar(name: str, parts: Sequence[np.ndarray], names: Sequence[str]) -> None:
    flat = next((t for t, part in enumerate(parts) if part.ndim == 0), None)
    if flat is not None:
        raise ValueError(
            f"{name}: expected an array with one entry a row, got a single value for task {names[flat]!r}; "
            "wrap it in a list"
        )


def _check_one_shape(name: str, shape: tuple[int, ...], parts: Sequence[np.ndarray], names: Sequence[str]) -> None:
    """Checks the rows of all tasks; an empty array has none, whatever its shape."""
    for task, part in zip(names, parts, strict=True):
        if len(part) and part.shape[1:] != shape:
            raise ValueError(
                f"{name}: expected rows of one shape, got {shape} and, in task {task!r}, {part.shape[1:]}; "
                "make them alike"
            )


def read_arrays(
    x: Sequence[Any] | None, y: Sequence[Any], names: Sequence[str] | None, extras: Extras, missing: str
) -> Ragged:
    """Reads lists with one array a task; see `Tasks.from_arrays`.

    Raises:
        ValueError: If lengths, shapes or names disagree, or values are not finite numbers.
    """
    labelled = check_names(names, len(y))
    flat_y, sizes = flatten("y", y, labelled)
    offsets = offsets_of(torch.from_numpy(sizes))
    where = locate(labelled, offsets.numpy())
    reader = _Reader(labelled, sizes, where)
    rows: dict[str, Tensor] = {}
    values = np.zeros((len(flat_y), 0)) if x is None else reader.flat("x", x)
    x_names = default_names("x", values.shape[1:])
    rows["x"], x_levels = inputs(x_names, values, None, where)
    rows["y"], rows["observed"] = labels("y", flat_y, missing, where)
    columns, column_levels = reader.columns(extras.columns, None)
    rows |= columns
    if extras.weight is not None:
        rows["weight"] = weights("weight", reader.flat("weight", extras.weight), where)
    per_task, task_levels = _per_task(extras, labelled)
    fields = {
        "task": "task",
        "x": x_names,
        "y": default_names("y", flat_y.shape[1:]),
        "columns": tuple(extras.columns),
        "task_columns": tuple(extras.task_columns),
        "levels": {**x_levels, **column_levels, **task_levels},
        "x_shape": values.shape[1:],
        "y_shape": flat_y.shape[1:],
        "missing": missing == "mask",
        "weight": None if extras.weight is None else "weight",
        "task_weight": None if extras.task_weight is None else "task_weight",
    }
    _check_distinct(fields)
    return Ragged(labelled, offsets, rows, per_task, with_example(fields, rows, per_task))


def check_names(names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """Returns the names as text, "0", "1", … where none are given.

    Raises:
        ValueError: If there are no tasks, or the names are too few, too many or duplicated.
    """
    if count == 0:
        raise ValueError("y is empty: expected one array a task, got no tasks")
    labelled = tuple(map(str, range(count) if names is None else names))
    if len(labelled) != count:
        raise ValueError(f"names: expected one name a task, {count} in all, got a list of length {len(labelled)}")
    if len(set(labelled)) < count:
        twice = [name for index, name in enumerate(labelled) if name in labelled[:index]]
        raise ValueError(
            f"duplicated names: {listing(dict.fromkeys(twice))} stand for several tasks; make names unique"
        )
    return labelled


@dataclass(frozen=True)
class _Reader:
    """Joins arrays whose rows must agree with the sizes of the tasks."""

    names: Sequence[str]
    sizes: np.ndarray
    where: Where

    def flat(self, name: str, arrays: Sequence[Any]) -> np.ndarray:
        values, sizes = flatten(name, arrays, self.names)
        wrong = np.flatnonzero(sizes != self.sizes)
        if len(wrong):
            t = int(wrong[0])
            raise ValueError(
                f"{name}: expected {self.sizes[t]} rows in task {self.names[t]!r}, got {sizes[t]}; give one entry a row"
            )
        return values

    def columns(self, given: Mapping[str, Sequence[Any]], known: Levels | None) -> tuple[dict[str, Tensor], Levels]:
        rows: dict[str, Tensor] = {}
        levels: dict[str, tuple[str, ...]] = {}
        for name, arrays in given.items():
            flat = self.flat(name, arrays)
            rows[f"{COLUMN}{name}"], found = covariate(name, flat, known, self.where)
            levels |= found
        return rows, levels


def _per_task(extras: Extras, names: tuple[str, ...]) -> tuple[dict[str, Tensor], Levels]:
    per_task: dict[str, Tensor] = {}
    levels: dict[str, tuple[str, ...]] = {}

    def where(task: int) -> str:
        return f"task {names[task]!r}"

    for name, given in extras.task_columns.items():
        values = _one_a_task(f"task column {name!r}", given, len(names))
        per_task[f"{TASK_COLUMN}{name}"], found = covariate(name, values, None, where)
        levels |= found
    if extras.task_weight is not None:
        values = _one_a_task("task_weight", extras.task_weight, len(names))
        per_task["task_weight"] = weights("task_weight", values, where)
    return per_task, levels


def _one_a_task(name: str, given: Any, count: int) -> np.ndarray:
    values = to_numpy(given)
    if values.ndim == 0 or len(values) != count:
        raise ValueError(
            f"{name}: expected one value a task, {count} in all, got the shape {values.shape}; make them alike"
        )
    return values


def _check_distinct(fields: Mapping[str, Any]) -> None:
    groups = [name for key in ("x", "y", "columns", "task_columns") for name in fields[key]]
    twice = {name for name in groups if groups.count(name) > 1}
    if twice:
        raise ValueError(
            f"duplicated names: {listing(sorted(twice))} stand for several columns; rename them "
            "(x and y have names too)"
        )


def new_rows(
    x: Any, columns: Mapping[str, Any] | None, schema: Schema, names: tuple[str, ...]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns rows at which to predict.

    Args:
        x: `(M,*dx)` for all tasks, a list with one array a task, or None to take M from the columns.
        columns: For each column `(M,…)` for all tasks, or a list with one array a task.
        schema: The schema of the tasks.
        names: Names of the tasks.

    Returns:
        The offsets `(T+1,)` and "x", "y" (a placeholder inside the support), "observed" and the columns.

    Raises:
        ValueError: If columns are missing or unknown, or shapes, lengths or levels do not fit.
    """
    given = dict(columns or {})
    _check_columns(given, schema)
    if x is None:
        _check_columns_suffice(given, schema)
    repeated = {name: _for_all(name, value, len(names)) for name, value in given.items()}
    known = repeated[next(iter(repeated))] if x is None else _for_all("x", x, len(names))
    sizes = _rows_a_task(known, len(names))
    offsets = offsets_of(torch.from_numpy(sizes))
    reader = _Reader(names, sizes, locate(names, offsets.numpy()))
    rows, _ = reader.columns({name: _listed(value, len(names)) for name, value in repeated.items()}, schema.levels)
    count = int(offsets[-1])
    values = np.zeros((count, 0)) if x is None else _inputs_shaped(reader.flat("x", _listed(known, len(names))), schema)
    rows["x"], _ = inputs(schema.x or ("x",), values, schema.levels, reader.where)
    label = schema.placeholder()
    rows["y"] = label.expand(count, *label.shape).clone()
    rows["observed"] = torch.ones(rows["y"].shape, dtype=torch.bool)
    return offsets, rows


def _check_columns(given: Mapping[str, Any], schema: Schema) -> None:
    for name in given:
        if name not in schema.columns:
            raise ValueError(unknown("column", name, schema.columns))
    absent = [name for name in schema.columns if name not in given]
    if absent:
        raise ValueError(
            f"columns: the new rows need {listing(absent)} too, as the data had; pass columns={{{absent[0]!r}: …}}"
        )


def _check_columns_suffice(given: Mapping[str, Any], schema: Schema) -> None:
    """Checks that new rows need no inputs, and that the columns say how many rows there are."""
    if schema.x_shape != (0,):
        raise ValueError(
            f"x: expected the inputs {listing(schema.x)} of the new rows, got None; "
            f"pass x of shape (M, *{schema.x_shape})"
        )
    if not given:
        raise ValueError(
            "x: expected x or columns, got neither; to say how many rows M are new, pass x of shape (M, 0)"
        )


def _for_all(name: str, value: Any, count: int) -> np.ndarray | list[Any]:
    """Returns an array for all tasks, or the list with one array a task."""
    if not isinstance(value, (list, tuple)):
        array = to_numpy(value)
        if array.ndim == 0:
            raise ValueError(f"{name}: expected an array with one entry a row, got a single value; wrap it in an array")
        return array
    if len(value) != count or any(to_numpy(part).ndim == 0 for part in value):
        raise ValueError(
            f"{name}: a list must hold one array a task, {count} in all, got {len(value)} entries; "
            "for the same rows in all tasks pass an array"
        )
    return list(value)


def _rows_a_task(value: np.ndarray | list[Any], count: int) -> np.ndarray:
    if isinstance(value, list):
        return np.array([len(to_numpy(part)) for part in value])
    return np.full(count, len(value))


def _listed(value: np.ndarray | list[Any], count: int) -> list[Any]:
    return value if isinstance(value, list) else [value] * count


def _inputs_shaped(values: np.ndarray, schema: Schema) -> np.ndarray:
    """Returns inputs with the shape of the schema; `(M,)` will do where there is one input."""
    if not len(values):
        return np.zeros((0, *schema.x_shape))
    if values.ndim == 1 and schema.x_shape == (1,):
        values = values[:, None]
    if values.shape[1:] != schema.x_shape:
        raise ValueError(
            f"x: expected rows of shape {schema.x_shape} ({listing(schema.x)}), got {values.shape[1:]}; reshape x"
        )
    return values
