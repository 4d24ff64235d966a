"""Re-encoding of data to the schema of a fit: order of columns, codes of levels, dtypes, placeholders of labels.

`Tasks.aligned` and `Tasks.at` call it; nothing here reads tables or makes batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayesmeta.data.ragged import Ragged
from bayesmeta.data.schema import COLUMN, TASK_COLUMN, Schema, default_names, dtype_of, listing, unseen_level
from bayesmeta.data.values import Where, locate


def align(data: Ragged, schema: Schema) -> Ragged:
    """Returns the same data encoded as `schema` says; its weights are kept.

    Raises:
        ValueError: If a column is missing, a shape differs or a level was not seen.
    """
    if data.schema is schema:
        return data
    own = data.schema
    kept = replace(schema, missing=own.missing or schema.missing, weight=own.weight, task_weight=own.task_weight)
    return replace(data, rows=aligned_rows(data, schema), per_task=aligned_per_task(data, schema), schema=kept)


def aligned_rows(data: Ragged, schema: Schema) -> dict[str, Tensor]:
    """Returns inputs, labels, columns and row weights encoded as `schema` says.

    Raises:
        ValueError: If a column is missing, a shape differs or a level was not seen.
    """
    own, where = data.schema, locate(data.names, data.offsets.numpy())
    rows = {"x": _cast(_inputs(data, schema, where), schema.dtypes["x"])}
    y, observed = _ordered(data, "y", schema), _ordered(data, "observed", schema)
    rows["y"] = _cast(torch.where(observed, y, schema.placeholder().to(y.dtype)), schema.dtypes["y"])
    rows["observed"] = observed
    for name in schema.columns:
        _check_present("columns", name, own.columns)
        rows[f"{COLUMN}{name}"] = _column(data.rows[f"{COLUMN}{name}"], f"{COLUMN}{name}", own, schema, where)
    return rows | {key: value for key, value in data.rows.items() if key == "weight"}


def aligned_per_task(data: Ragged, schema: Schema) -> dict[str, Tensor]:
    """Returns task columns and task weights encoded as `schema` says.

    Raises:
        ValueError: If a column is missing, a shape differs or a level was not seen.
    """
    per_task = {key: value for key, value in data.per_task.items() if key == "task_weight"}
    for name in schema.task_columns:
        _check_present("task_columns", name, data.schema.task_columns)
        key = f"{TASK_COLUMN}{name}"
        per_task[key] = _column(data.per_task[key], key, data.schema, schema, lambda task: f"task {data.names[task]!r}")
    return per_task


def align_names(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """Returns `names`, after a check that `others` are the same in any order.

    Raises:
        ValueError: If they are not.
    """
    absent, surplus = sorted(set(names) - set(others)), sorted(set(others) - set(names))
    if absent or surplus:
        raise ValueError(
            f"x: Tasks at which to predict must have the same names; missing: {listing(absent)}; "
            f"surplus: {listing(surplus)}. Select the tasks in both by the same names"
        )
    return list(names)


def _check_present(role: str, name: str, own: Sequence[str]) -> None:
    if name not in own:
        raise ValueError(
            f"{role}: the fit needs the column {name!r}, these data have {listing(own)} as {role}; "
            "read it as one of them"
        )


def _inputs(data: Ragged, schema: Schema, where: Where) -> Tensor:
    own = data.schema
    x = _ordered(data, "x", schema)
    if not any(name in own.levels or name in schema.levels for name in schema.x) or not len(x):
        return x
    names = schema.x if set(schema.x) <= set(own.x) else own.x
    parts = x.reshape(len(x), -1).unbind(1)
    pairs = zip(names, schema.x, parts, strict=True)
    return torch.stack(
        [_recoded(part, name, new, own, schema, where).double() for name, new, part in pairs], 1
    ).reshape(x.shape)


@dataclass(frozen=True)
class _Entries:
    """What one row's input or label consists of.

    Attributes:
        names: Names of the entries.
        shape: Shape of a row.
        unnamed: Whether the names are those that array data get: they say where an entry stands, not what it is.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    unnamed: bool

    @classmethod
    def of(cls, schema: Schema, kind: str) -> _Entries:
        """Reads the entries of "x" or "y"."""
        names, shape = getattr(schema, kind), getattr(schema, f"{kind}_shape")
        return cls(names, shape, schema.task == "task" and names == default_names(kind, shape))

    @property
    def separate(self) -> bool:
        """Whether each name stands for one number of a row."""
        return self.shape == (len(self.names),)

    def hold(self, wanted: _Entries) -> bool:
        """Says whether other entries can be chosen by name from these; a part of unnamed ones cannot."""
        if self.unnamed and self.shape != wanted.shape:
            return False
        return self.separate and wanted.separate and set(wanted.names) <= set(self.names)


def _ordered(data: Ragged, key: str, schema: Schema) -> Tensor:
    """Returns inputs or labels with the entries of the schema's, in its order."""
    values, kind = data.rows[key], "x" if key == "x" else "y"
    own, wanted = _Entries.of(data.schema, kind), _Entries.of(schema, kind)
    if not len(values):
        return values.new_zeros((0, *wanted.shape))
    if own.names != wanted.names and len(own.names) > 1 and own.hold(wanted):
        return values[:, [own.names.index(name) for name in wanted.names]]
    _check_entries(kind, own, wanted)
    return values.reshape(len(values), *wanted.shape)


def _check_entries(kind: str, own: _Entries, wanted: _Entries) -> None:
    unnamed = own.unnamed or wanted.unnamed
    if own.names != wanted.names and not unnamed:
        raise ValueError(
            f"{kind}: the fit has {listing(wanted.names)}, these data {listing(own.names)}; "
            f"read the same columns as {kind}"
        )
    if own.shape != wanted.shape and {own.shape, wanted.shape} != {(), (1,)}:
        cure = "make them alike"
        if unnamed and len(own.shape) == len(wanted.shape) == 1:
            cure += f": the columns that the fit has ({listing(wanted.names)}), in the same order"
        raise ValueError(f"{kind}: the fit has the shape {wanted.shape} a row, these data {own.shape}; {cure}")


def _column(values: Tensor, key: str, own: Schema, schema: Schema, where: Where) -> Tensor:
    name = key.split(":", 1)[1]
    shape = torch.tensor(schema.example[key]).shape
    if len(values) and values.shape[1:] != shape:
        raise ValueError(
            f"column {name!r}: expected the shape {tuple(shape)} a row or task, got {tuple(values.shape[1:])}"
        )
    recoded = _recoded(values.reshape(len(values), *shape), name, name, own, schema, where)
    return _cast(recoded, schema.dtypes[key])


def _recoded(codes: Tensor, name: str, new: str, own: Schema, schema: Schema, where: Where) -> Tensor:
    """Turns codes of the data's own levels into codes of the schema's levels."""
    old, levels = own.levels.get(name), schema.levels.get(new)
    if old == levels or not len(codes):
        return codes
    if old is None or levels is None:
        raise ValueError(_other_kind(new, is_text=levels is None))
    known = {level: code for code, level in enumerate(levels)}
    lookup = torch.tensor([known.get(level, -1) for level in old])
    recoded = lookup[codes.long()]
    if (recoded < 0).any():
        row = int((recoded < 0).int().argmax())
        raise ValueError(unseen_level(new, old[int(codes[row])], levels, f", {where(row)}"))
    return recoded


def _other_kind(name: str, *, is_text: bool) -> str:
    kinds = ("text", "numbers") if is_text else ("numbers", "text")
    return f"column {name!r}: these data hold {kinds[0]}, the fit has {kinds[1]}; convert the column"


def _cast(values: Tensor, dtype: str) -> Tensor:
    """Casts if nothing is lost: counts that were read as floats become integers again."""
    cast = values.to(dtype_of(dtype))
    return cast if torch.equal(cast.to(values.dtype), values) else values
