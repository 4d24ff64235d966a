"""From a table of any kind that narwhals reads to flat storage, and back.

Nothing here knows arrays, batches or models. `Tasks.from_dataframe` and `Tasks.to_dataframe` call it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import narwhals as nw
import numpy as np
import torch
from torch import Tensor

from bayesmeta.data.ragged import Ragged, task_of_row
from bayesmeta.data.schema import COLUMN, TASK_COLUMN, Levels, listing, unknown
from bayesmeta.data.values import Where, covariate, floating, labels, locate, weights, with_example

Covariates = dict[str, tuple[Tensor, Levels]]
_BACKENDS = ("pandas", "polars", "pyarrow")
_TOGETHER = ({"x", "columns", "weight"}, {"task_columns", "task_weight"})
"""Roles that one column may play at the same time."""
_TEXT = (nw.String, nw.Categorical, nw.Enum)


@dataclass(frozen=True)
class Roles:
    """Which column of a table plays which role; see `Tasks.from_dataframe`."""

    task: str
    y: str | Sequence[str]
    x: str | Sequence[str] | None = None
    columns: str | Sequence[str] | None = None
    task_columns: str | Sequence[str] | None = None
    weight: str | None = None
    task_weight: str | None = None

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return named(self.y)

    def covariates(self) -> tuple[str, ...]:
        """Returns the names of all columns that may hold text, without repeats."""
        return tuple(dict.fromkeys((*named(self.x), *named(self.columns), *named(self.task_columns))))

    def all(self) -> list[tuple[str, str]]:
        """Returns pairs (role, column)."""
        lists = {"x": self.x, "y": self.y, "columns": self.columns, "task_columns": self.task_columns}
        pairs = [("task", self.task)] + [(role, name) for role, names in lists.items() for name in named(names)]
        single = {"weight": self.weight, "task_weight": self.task_weight}
        return pairs + [(role, name) for role, name in single.items() if name is not None]


def named(names: str | Sequence[str] | None) -> tuple[str, ...]:
    """Returns one name, several or none as a tuple."""
    if names is None:
        return ()
    return (names,) if isinstance(names, str) else tuple(names)


def check_roles(roles: Roles, known: Sequence[str]) -> None:
    """Checks that every column exists, and that none is used twice in ways that contradict each other.

    Raises:
        ValueError: If not.
    """
    _check_header(known)
    if not roles.outputs:
        raise ValueError("y: expected the name of at least one output, got none")
    uses: dict[str, list[str]] = {}
    for role, name in roles.all():
        if name not in known:
            raise ValueError(f"{role}: {unknown('column', name, map(str, known))}")
        uses.setdefault(name, []).append(role)
    for name, given in uses.items():
        if not _compatible(given):
            raise ValueError(f"duplicated names: column {name!r} is given as {' and as '.join(given)}; name it once")


def _check_header(known: Sequence[str]) -> None:
    repeated = sorted({str(name) for name, count in Counter(known).items() if count > 1})
    if repeated:
        raise ValueError(f"duplicated names: the table has several columns called {listing(repeated)}; rename them")


def _compatible(given: Sequence[str]) -> bool:
    """Says whether one column may play all these roles."""
    distinct = set(given)
    return len(given) == 1 or (len(distinct) == len(given) and any(distinct <= roles for roles in _TOGETHER))


def read_table(df: Any, roles: Roles, missing: str) -> Ragged:
    """Reads a table.

    Args:
        df: Any dataframe that narwhals reads; lazy frames are collected.
        roles: Which column plays which role.
        missing: "error", or "mask" to keep missing labels.

    Raises:
        ValueError: If the table is empty, or a column is unknown, of the wrong kind or not finite.
    """
    table, known = _frame(df)
    check_roles(roles, known)
    if len(table) == 0:
        raise ValueError("the table is empty: expected at least one row; check the filter or the file it comes from")
    names, offsets, order = _group(table[roles.task])
    cells = {name: _cells(table[name], order) for name in {name for _, name in roles.all()} - {roles.task}}
    where = locate(names, offsets.numpy())
    columns = {name: covariate(name, cells[name], _ordered(table[name]), where) for name in roles.covariates()}
    rows = _rows(cells, columns, roles, missing, where)
    per_task = _per_task(cells, columns, roles, offsets, where)
    fields = {
        "task": roles.task,
        "x": named(roles.x),
        "y": roles.outputs,
        "columns": named(roles.columns),
        "task_columns": named(roles.task_columns),
        "levels": {name: levels for _, found in columns.values() for name, levels in found.items()},
        "x_shape": tuple(rows["x"].shape[1:]),
        "y_shape": tuple(rows["y"].shape[1:]),
        "missing": missing == "mask",
        "weight": roles.weight,
        "task_weight": roles.task_weight,
    }
    return Ragged(names, offsets, rows, per_task, with_example(fields, rows, per_task))


def _frame(df: Any) -> tuple[nw.DataFrame[Any], list[str]]:
    try:
        table = nw.from_native(df)
        table = table.collect() if isinstance(table, nw.LazyFrame) else table
        return table, table.columns
    except TypeError:
        kind = type(df).__name__
        raise ValueError(
            f"df: expected a dataframe (pandas, polars, pyarrow, …), got {kind}; for arrays use Tasks.from_arrays"
        ) from None
    except nw.exceptions.DuplicateError as error:
        raise ValueError(f"duplicated names in the table, {error}; rename these columns") from None


def _group(series: nw.Series[Any]) -> tuple[tuple[str, ...], Tensor, np.ndarray | None]:
    """Returns names in order of first appearance, offsets, and the stable order of rows (None: as they are)."""
    if _has_nulls(series):
        row = series.is_null().to_list().index(True)
        raise ValueError(f"task column {series.name!r}: row {row} of the table has no task; drop or name such rows")
    values = series.to_list()
    codes: dict[Any, int] = {}
    try:
        task = np.fromiter((codes.setdefault(value, len(codes)) for value in values), np.int64, count=len(values))
    except TypeError:
        kind = type(values[0]).__name__
        raise ValueError(f"task column {series.name!r}: expected text or numbers, got {kind}; name another") from None
    names = tuple(map(str, codes))
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(
            f"duplicated names: several values of {series.name!r} read {listing(twice)} as text; rename them"
        )
    offsets = torch.from_numpy(np.concatenate([[0], np.bincount(task).cumsum()]))
    grouped = bool((np.diff(task) >= 0).all())
    return names, offsets, None if grouped else np.argsort(task, kind="stable")


def _cells(series: nw.Series[Any], order: np.ndarray | None) -> np.ndarray:
    """Returns a column as numbers with NaN where missing, as an object array of text, or as stacked arrays."""
    values = _plain(series)
    return values if order is None else values[order]


def _plain(series: nw.Series[Any]) -> np.ndarray:
    dtype = series.dtype
    if dtype.is_numeric() or dtype == nw.Boolean:
        return (series.cast(nw.Float64) if _has_nulls(series) or dtype.is_decimal() else series).to_numpy()
    if dtype in _TEXT:
        return _text(series)
    if dtype.is_temporal():
        raise ValueError(f"column {series.name!r}: expected numbers or text, got {dtype}; turn times into numbers")
    return _objects(series)


def _text(series: nw.Series[Any]) -> np.ndarray:
    pairs = zip(series.to_list(), series.is_null().to_list(), strict=True)
    return np.array([None if gone else str(value) for value, gone in pairs], object)


def _objects(series: nw.Series[Any]) -> np.ndarray:
    """Returns stacked arrays, or single objects with NaN where missing."""
    cells = series.to_list()
    present = [value for value in cells if value is not None]
    if present and isinstance(present[0], (list, tuple, np.ndarray)):
        return _stacked(series.name, cells)
    return np.array([np.nan if value is None else value for value in cells], object)


def _has_nulls(series: nw.Series[Any]) -> bool:
    return bool(series.is_null().any())


def _stacked(name: str, cells: list[Any]) -> np.ndarray:
    shapes = [np.shape(value) for value in cells]
    odd = next((row for row, shape in enumerate(shapes) if shape != shapes[0]), None)
    if odd is not None:
        raise ValueError(
            f"column {name!r}: expected arrays of one shape, got {shapes[0]} in row 0 and {shapes[odd]} in row {odd} "
            "of the table; make them alike"
        )
    return np.stack([np.asarray(value) for value in cells])


def _ordered(series: nw.Series[Any]) -> dict[str, tuple[str, ...]] | None:
    """Returns the levels of an ordered categorical in its order, None for other columns."""
    dtype = series.dtype
    return {series.name: tuple(map(str, dtype.categories))} if isinstance(dtype, nw.Enum) else None


def _rows(
    cells: dict[str, np.ndarray], columns: Covariates, roles: Roles, missing: str, where: Where
) -> dict[str, Tensor]:
    outputs = [labels(name, cells[name], missing, where) for name in roles.outputs]
    rows = {"x": _side_by_side(named(roles.x), columns, len(outputs[0][0]))}
    single = isinstance(roles.y, str)
    for key, tensors in zip(("y", "observed"), zip(*outputs, strict=True), strict=True):
        rows[key] = tensors[0] if single else torch.stack(_same_dtype(tensors), 1)
    rows |= {f"{COLUMN}{name}": columns[name][0] for name in named(roles.columns)}
    if roles.weight is not None:
        rows["weight"] = weights(roles.weight, cells[roles.weight], where)
    return rows


def _side_by_side(names: tuple[str, ...], columns: Covariates, count: int) -> Tensor:
    """Stacks inputs with one number a row; a single input of arrays keeps their shape."""
    parts = [columns[name][0] for name in names]
    wide = [name for name, part in zip(names, parts, strict=True) if part.dim() > 1]
    if wide and len(names) > 1:
        raise ValueError(
            f"x: {wide[0]!r} holds arrays, so it must be the only input, got {listing(names)}; "
            "move the others to columns"
        )
    if wide:
        return torch.from_numpy(floating(parts[0].numpy()))
    return torch.stack(parts, 1).double() if parts else torch.zeros(count, 0, dtype=torch.float64)


def _same_dtype(tensors: Sequence[Tensor]) -> list[Tensor]:
    fractional = any(value.is_floating_point() for value in tensors)
    return [value.double() if fractional else value for value in tensors]


def _per_task(
    cells: dict[str, np.ndarray], columns: Covariates, roles: Roles, offsets: Tensor, where: Where
) -> dict[str, Tensor]:
    """Takes the first row of each task after a check that the column is constant there."""
    values = {f"{TASK_COLUMN}{name}": (name, columns[name][0]) for name in named(roles.task_columns)}
    if roles.task_weight is not None:
        values["task_weight"] = (roles.task_weight, weights(roles.task_weight, cells[roles.task_weight], where))
    return {key: _constant(name, value, offsets, where)[offsets[:-1]] for key, (name, value) in values.items()}


def _constant(name: str, values: Tensor, offsets: Tensor, where: Where) -> Tensor:
    expected = values[offsets[:-1]][task_of_row(offsets)]
    differs = (values != expected).reshape(len(values), -1).any(1)
    if differs.any():
        row = int(differs.int().argmax())
        raise ValueError(
            f"task column {name!r} must be constant within a task, but it changes in {where(row)} "
            f"(from {expected[row].tolist()} to {values[row].tolist()}); aggregate it, or pass it in columns"
        )
    return values


def write_table(data: Ragged, backend: str) -> Any:
    """Returns one row an observation; see `Tasks.to_dataframe`.

    Raises:
        ValueError: If the backend is unknown or not installed.
    """
    schema, task = data.schema, task_of_row(data.offsets)
    table: dict[str, Any] = {schema.task: [data.names[t] for t in task.tolist()]}
    table |= _inputs_and_labels(data)
    table |= {name: _values(data.rows[f"{COLUMN}{name}"], schema.levels.get(name)) for name in schema.columns}
    table |= {
        name: _values(data.per_task[f"{TASK_COLUMN}{name}"][task], schema.levels.get(name))
        for name in schema.task_columns
    }
    if schema.weight is not None:
        table[schema.weight] = data.rows["weight"].numpy()
    if schema.task_weight is not None:
        table[schema.task_weight] = data.per_task["task_weight"][task].numpy()
    if backend not in _BACKENDS:
        raise ValueError(f"backend: expected one of {listing(_BACKENDS)}, got {backend!r}")
    try:
        return nw.from_dict(table, backend=cast(Any, backend)).to_native()
    except ImportError as error:
        raise ValueError(f"backend: {backend!r} is not installed; install it or name another of {_BACKENDS}") from error


def _inputs_and_labels(data: Ragged) -> dict[str, Any]:
    schema, rows = data.schema, data.rows
    y = torch.where(rows["observed"], rows["y"].double(), torch.nan) if not rows["observed"].all() else rows["y"]
    table: dict[str, Any] = {}
    for names, shape, values in ((schema.x, schema.x_shape, rows["x"]), (schema.y, schema.y_shape, y)):
        split = values.unbind(1) if shape == (len(names),) and names else [values] * len(names)
        table |= {name: _values(part, schema.levels.get(name)) for name, part in zip(names, split, strict=True)}
    return table


def _values(values: Tensor, levels: tuple[str, ...] | None) -> Any:
    if levels is not None:
        return [levels[code] for code in values.long().tolist()]
    return values.numpy() if values.dim() == 1 else values.tolist()
