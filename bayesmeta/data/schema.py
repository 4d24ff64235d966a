"""What the columns of a collection of tasks are called, how they are shaped and how text is coded.

A `Schema` holds no data except one real row, the example, which pads tasks that have no rows. `Tasks` and `Batch`
carry it, a fit stores it as JSON, and new data are re-encoded to it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

COLUMN = "column:"
TASK_COLUMN = "task_column:"
Levels = Mapping[str, tuple[str, ...]]
_TUPLES = ("x", "y", "columns", "task_columns", "x_shape", "y_shape")


@dataclass(frozen=True)
class Schema:
    """Names, shapes and levels of the data of all tasks.

    Attributes:
        task: Name of the task column ("task" for arrays).
        x: Names of the inputs; empty for `x=None`.
        y: Names of the outputs.
        columns: Names of the per-row columns.
        task_columns: Names of the per-task columns.
        levels: For each text column, inputs included, its levels; a code is a position here.
        x_shape: Shape of one row's input, `dx`; `(0,)` for `x=None`.
        y_shape: Shape of one row's label, `dy`; `()` for one output.
        missing: Whether labels may be missing.
        weight: Name of the column with row weights, if any.
        task_weight: Name of the column with task weights, if any.
        dtypes: For each tensor of the data ("x", "column:trials", …), the name of its dtype.
        example: For each tensor of the data, one real entry as nested lists: a value inside every support.
    """

    task: str
    x: tuple[str, ...]
    y: tuple[str, ...]
    columns: tuple[str, ...] = ()
    task_columns: tuple[str, ...] = ()
    levels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    x_shape: tuple[int, ...] = ()
    y_shape: tuple[int, ...] = ()
    missing: bool = False
    weight: str | None = None
    task_weight: str | None = None
    dtypes: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    example: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Returns plain dicts, lists, strings and numbers that `from_json` reads back."""
        plain = {key.name: getattr(self, key.name) for key in dataclasses.fields(self)}
        plain["levels"] = {name: list(levels) for name, levels in self.levels.items()}
        return plain | {key: list(plain[key]) for key in _TUPLES}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Schema:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: If a key is missing or unknown.
        """
        expected = {key.name for key in dataclasses.fields(cls)}
        if set(plain) != expected:
            raise ValueError(f"schema: expected the keys {sorted(expected)}, got {sorted(plain)}; the file is damaged")
        levels = {name: tuple(values) for name, values in plain["levels"].items()}
        return cls(**(dict(plain) | {key: tuple(plain[key]) for key in _TUPLES} | {"levels": levels}))

    def example_rows(self) -> dict[str, Tensor]:
        """Returns the example as tensors with one row, for tables that have none."""
        rows = {key: row for key, row in self.example.items() if not key.startswith(TASK_COLUMN)}
        return {key: torch.tensor([row], dtype=dtype_of(self.dtypes[key])) for key, row in rows.items()}

    def placeholder(self) -> Tensor:
        """Returns a label `(*dy)` inside the support."""
        return self.example_rows()["y"][0]

    def output(self, k: int | str) -> int:
        """Returns the position of output `k`, given by position or name.

        Raises:
            ValueError: If there is no such output.
        """
        count = self.y_shape[0] if self.y_shape else 1
        names = self.y if len(self.y) == count else ()
        index = names.index(k) if isinstance(k, str) and k in names else k
        if isinstance(index, str) or not -count <= index < count:
            raise ValueError(f"{unknown('output', k, names)} Outputs are counted 0 … {count - 1}")
        return index

    def only(self, k: int | str) -> Schema:
        """Returns the schema with output `k` as the one label.

        Raises:
            ValueError: If there is no such output.
        """
        index = self.output(k)
        if not self.y_shape:
            return self
        example = {key: row[index] if key in ("y", "observed") else row for key, row in self.example.items()}
        name = self.y[index] if len(self.y) == self.y_shape[0] else f"y{index % self.y_shape[0]}"
        return dataclasses.replace(self, y=(name,), y_shape=self.y_shape[1:], example=example)

    def code(self, column: str, value: Any) -> Any:
        """Returns the code of a level of a text column, and any other value as it is.

        Raises:
            ValueError: If `column` is text and `value` is none of its levels, or `value` is text and `column` is not.
        """
        if column in self.levels:
            if str(value) not in self.levels[column]:
                raise ValueError(unseen_level(column, str(value), self.levels[column]))
            return self.levels[column].index(str(value))
        if isinstance(value, str):
            raise ValueError(f"column {column!r} holds numbers, got the text {value!r}; compare it with a number")
        return value


def dtype_of(name: str) -> torch.dtype:
    """Returns the torch dtype called `name`, for example "float64".

    Raises:
        ValueError: If torch has no such dtype.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"schema: expected the name of a dtype, got {name!r}; the file is damaged")
    return dtype


def default_names(prefix: str, shape: tuple[int, ...]) -> tuple[str, ...]:
    """Returns the names of array data: "x" for numbers and images, "x0", "x1", … for vectors, none for no input."""
    return tuple(f"{prefix}{index}" for index in range(shape[0])) if len(shape) == 1 else (prefix,)


def listing(names: Iterable[str], limit: int = 12) -> str:
    """Returns names for a message, shortened."""
    known = [repr(name) for name in names]
    return ", ".join(known[:limit]) + (f", … ({len(known)} in all)" if len(known) > limit else "") or "none"


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """Returns the message for an unknown name: what there is, and what may have been meant."""
    names = list(known)
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(repr(value) for value in near)}?" if near else ""
    return f"unknown {kind} {name!r}; known: {listing(names)}.{hint}"


def unseen_level(column: str, value: str, levels: tuple[str, ...], where: str = "") -> str:
    """Returns the message for a level that the fit has not seen."""
    return (
        f"column {column!r}{where}: the level {value!r} was not seen before; known levels: {listing(levels)}. "
        "Drop these rows, map them to a known level, or fit again with data that have it"
    )
