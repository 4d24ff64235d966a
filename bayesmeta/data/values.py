"""From raw columns to checked tensors: text to codes, missing labels to masks, NaN and infinity to errors.

One rule for every source of data: `reading.py` (tables) and `arrays.py` (lists of arrays) call this with flat NumPy
arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data.schema import Levels, Schema, listing, unseen_level

Where = Callable[[int], str]
MISSING = ("error", "mask")
_REPAIR = "drop or fill these rows"


def locate(names: Sequence[str], offsets: np.ndarray) -> Where:
    """Returns a function that says in words where flat row r stands."""

    def where(row: int) -> str:
        task = int(np.searchsorted(offsets, row, side="right")) - 1
        return f"task {names[task]!r}, row {row - int(offsets[task])} of that task"

    return where


def is_text(values: np.ndarray) -> bool:
    """Says whether an array holds text (NumPy strings, or objects of which one is a string)."""
    if values.dtype.kind == "O":
        return any(isinstance(value, str) for value in values.flat)
    return values.dtype.kind in "US"


def encode(
    name: str, values: np.ndarray, levels: Sequence[str] | None, where: Where
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Turns text `(R,)` into codes.

    Args:
        name: Name of the column.
        values: Text, `None` or NaN where missing.
        levels: Known levels; by default the sorted distinct values.
        where: Says where a row stands.

    Returns:
        Codes int64 `(R,)` and the levels.

    Raises:
        ValueError: If a value is missing, or not among the given levels.
    """
    cells = values.tolist()
    distinct = set(cells)
    _check_no_gaps(name, cells, distinct, where)
    known = tuple(sorted(map(str, distinct))) if levels is None else tuple(levels)
    codes = {level: code for code, level in enumerate(known)}
    lookup = {value: codes.get(str(value), -1) for value in distinct}
    for value, code in lookup.items():
        if code < 0:
            raise ValueError(unseen_level(name, str(value), known, f", {where(cells.index(value))}"))
    return np.fromiter((lookup[cell] for cell in cells), dtype=np.int64, count=len(cells)), known


def _check_no_gaps(name: str, cells: list[Any], distinct: set[Any], where: Where) -> None:
    if any(_absent(value) for value in distinct):
        row = next(row for row, cell in enumerate(cells) if _absent(cell))
        raise ValueError(f"column {name!r}: missing text in {where(row)}; drop these rows or name the missing level")


def _absent(cell: Any) -> bool:
    return cell is None or bool(cell != cell)


def numeric(name: str, values: np.ndarray) -> np.ndarray:
    """Returns numbers: bool and integers as int64, floats as float64, except that float32 images stay float32.

    Raises:
        ValueError: If the values are not numbers.
    """
    if values.dtype.kind in "biu":
        return values.astype(np.int64)
    if values.dtype.kind == "f":
        return values if values.dtype == np.float32 and values.ndim > 2 else values.astype(np.float64)
    if values.dtype.kind != "O":
        raise ValueError(f"column {name!r}: expected numbers, got values of type {values.dtype}; convert them")
    try:
        return values.astype(np.float64)
    except (TypeError, ValueError):
        first = next((value for value in values.flat if not isinstance(value, (int, float))), None)
        raise ValueError(f"column {name!r}: expected numbers, got {first!r}; convert them") from None


def floating(values: np.ndarray) -> np.ndarray:
    """Returns inputs as floats: integer images as float32, other integers as float64."""
    return values.astype(np.float32 if values.ndim > 2 else np.float64) if values.dtype.kind == "i" else values


def check_finite(
    name: str, values: np.ndarray, where: Where, *, if_nan: str = _REPAIR, if_infinite: str = _REPAIR
) -> None:
    """Checks that there is no NaN and no infinity.

    Args:
        name: Name of the column.
        values: Numbers `(R,…)`.
        where: Says where a row stands.
        if_nan: What to do about NaN, for the message.
        if_infinite: What to do about infinity.

    Raises:
        ValueError: If there is; it says how many rows, and where the first is.
    """
    if values.dtype.kind != "f" or np.isfinite(values).all():
        return
    flat = values.reshape(len(values), -1)
    cases = (("NaN or missing", np.isnan(flat), if_nan), ("infinite", np.isinf(flat), if_infinite))
    for kind, cells, cure in cases:
        bad = cells.any(1)
        if bad.any():
            place = where(int(bad.argmax()))
            raise ValueError(f"column {name!r}: {int(bad.sum())} row(s) are {kind}, the first in {place}; {cure}")


def covariate(name: str, values: np.ndarray, known: Levels | None, where: Where) -> tuple[Tensor, Levels]:
    """Returns a column, number or text, as a tensor, and its levels by name (empty for numbers).

    Args:
        name: Name of the column.
        values: Numbers `(R,…)` or text `(R,)`.
        known: Known levels of all text columns; None where they are to be found.
        where: Says where a row stands.

    Raises:
        ValueError: If values are missing, not finite, of unseen levels, or numbers where text was.
    """
    text, levels = is_text(values), (known or {}).get(name)
    if len(values) and levels is not None and not text:
        raise ValueError(
            f"column {name!r}: expected text, one of {listing(levels)}, got numbers ({values.dtype}); pass the text"
        )
    if text and (known is None or levels is not None):
        return _coded(name, values, levels, where)
    return _finite(name, numeric(name, values), where), {}


def _coded(name: str, values: np.ndarray, levels: Sequence[str] | None, where: Where) -> tuple[Tensor, Levels]:
    if values.ndim != 1:
        raise ValueError(f"column {name!r}: text must have one value a row, got the shape {values.shape}; split it")
    codes, found = encode(name, values, levels, where)
    return torch.from_numpy(codes), {name: found}


def _finite(name: str, numbers: np.ndarray, where: Where) -> Tensor:
    check_finite(name, numbers, where)
    return torch.from_numpy(np.ascontiguousarray(numbers))


def inputs(names: Sequence[str], values: np.ndarray, known: Levels | None, where: Where) -> tuple[Tensor, Levels]:
    """Returns inputs `(R,*dx)` as floats, text as codes, and the levels of the text.

    Args:
        names: One name for each of the last entries, or a single name.
        values: Numbers `(R,*dx)`, or objects `(R,)` or `(R,k)` of which some columns are text.
        known: Known levels of all text columns; None where they are to be found.
        where: Says where a row stands.

    Raises:
        ValueError: If values are missing, not finite, of unseen levels, or numbers where text was.
    """
    texts = values.dtype.kind in "OUS" or any(name in (known or {}) for name in names)
    if texts and values.ndim <= 2 and len(values):
        return _mixed_inputs(names, values, known, where)
    label = names[0] if len(names) == 1 else "x"
    return _finite(label, floating(numeric(label, values)), where), {}


def _mixed_inputs(
    names: Sequence[str], values: np.ndarray, known: Levels | None, where: Where
) -> tuple[Tensor, Levels]:
    """Returns inputs of which some are text, column by column."""
    levels: dict[str, tuple[str, ...]] = {}
    parts: list[Tensor] = []
    for name, column in zip(names, values.reshape(len(values), -1).T, strict=True):
        part, found = covariate(name, column, known, where)
        levels |= found
        parts.append(part.double())
    return torch.stack(parts, -1).reshape(values.shape), levels


def labels(name: str, values: np.ndarray, missing: str, where: Where) -> tuple[Tensor, Tensor]:
    """Returns labels `(R,*dy)` and where they are observed; a missing one holds an observed value.

    Args:
        name: Name of the output, for messages.
        values: Numbers, NaN where missing.
        missing: "error", or "mask" to keep missing labels.
        where: Says where a row stands.

    Raises:
        ValueError: If labels are text or infinite, or missing with `missing="error"`.
    """
    if missing not in MISSING:
        raise ValueError(f'missing: expected "error" or "mask", got {missing!r}')
    if is_text(values):
        raise ValueError(f"output {name!r}: expected numbers, got text; code classes as integers 0, 1, 2, …")
    numbers = numeric(name, values)
    absent = np.isnan(numbers) if numbers.dtype.kind == "f" and missing == "mask" else np.zeros(numbers.shape, bool)
    cure = 'drop these rows, or pass missing="mask" if labels are missing'
    check_finite(
        name, np.where(absent, 0.0, numbers), where, if_nan=cure, if_infinite="drop these rows or correct the labels"
    )
    y, observed = torch.from_numpy(np.ascontiguousarray(numbers)), torch.from_numpy(~absent)
    return torch.where(observed, y, example_label(y, observed)), observed


def example_label(y: Tensor, observed: Tensor) -> Tensor:
    """Returns a label `(*dy)` inside the support: the complete row with the smallest sum, else each output's smallest.

    Small, because a count must not exceed another row's trials. Without any label it is 1.
    """
    if not len(y):
        return torch.ones(y.shape[1:], dtype=y.dtype)
    complete = observed.reshape(len(y), -1).all(1)
    if complete.any():
        rows = y[complete]
        return rows[rows.reshape(len(rows), -1).double().sum(1).argmin()]
    largest = torch.iinfo(y.dtype).max if not y.is_floating_point() else torch.finfo(y.dtype).max
    smallest = torch.where(observed, y, largest).amin(0)
    return torch.where(observed.any(0), smallest, 1).to(y.dtype)


def weights(name: str, values: np.ndarray, where: Where) -> Tensor:
    """Returns weights, float64 `(R,)` or `(T,)`.

    Raises:
        ValueError: If a weight is negative, not finite or not a number.
    """
    if is_text(values) or values.ndim != 1:
        got = "text" if is_text(values) else f"the shape {values.shape}"
        raise ValueError(f"weight {name!r}: expected one number a row or task, got {got}; name a numeric column")
    numbers = numeric(name, values).astype(np.float64)
    check_finite(name, numbers, where)
    if (numbers < 0).any():
        first = int((numbers < 0).argmax())
        raise ValueError(
            f"weight {name!r}: expected weights from 0 on, got {numbers[first]:g} in {where(first)}; "
            "correct it, or drop the row"
        )
    return torch.from_numpy(numbers)


def with_example(fields: dict[str, Any], rows: dict[str, Tensor], per_task: dict[str, Tensor]) -> Schema:
    """Returns the schema made of these fields, the dtypes of the data and one example."""
    return refreshed(Schema(**fields), rows, per_task)


def refreshed(schema: Schema, rows: dict[str, Tensor], per_task: dict[str, Tensor]) -> Schema:
    """Returns the schema with the dtypes and the example of these data."""
    tensors = rows | per_task
    example = {key: value[0] if len(value) else value.new_zeros(value.shape[1:]) for key, value in tensors.items()}
    example["y"] = example_label(rows["y"], rows["observed"])
    example["observed"] = torch.ones_like(example["observed"])
    return replace(
        schema,
        dtypes={key: str(value.dtype).removeprefix("torch.") for key, value in tensors.items()},
        example={key: value.tolist() for key, value in example.items()},
    )
