"""What stands between square brackets: names, positions, slices and masks to indices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data.schema import unknown


def indices(selection: Any, positions: Mapping[str, int]) -> Tensor:
    """Returns the indices int64 `(S,)` of the selected tasks.

    Args:
        selection: A name, a position (negative: from the end), a slice, or a list or array of names, of positions, or
            of bools (one a task).
        positions: The position of each name.

    Raises:
        ValueError: If a name is unknown, a position out of range, or nothing is selected.
    """
    count = len(positions)
    if isinstance(selection, slice):
        return _not_empty(torch.arange(count)[_forward(selection, count)], selection)
    if isinstance(selection, str):
        return torch.tensor([_position(selection, positions)])
    if isinstance(selection, Tensor):
        selection = selection.detach().cpu().numpy()
    array = np.atleast_1d(np.asarray(selection))
    if _names(array):
        array = np.array([_position(name, positions) for name in array.tolist()], np.int64)
    if array.dtype.kind == "b":
        array = _positions_of(array, count)
    return _in_range(_not_empty(torch.from_numpy(_integers(array, selection)), selection), count)


def _names(array: np.ndarray) -> bool:
    return array.dtype.kind in "UO" and all(isinstance(name, str) for name in array.tolist())


def _forward(selection: slice, count: int) -> Any:
    """Torch has no negative steps, so a slice becomes a list of positions."""
    return list(range(*selection.indices(count)))


def _position(name: str, positions: Mapping[str, int]) -> int:
    if name not in positions:
        raise ValueError(unknown("task", name, positions))
    return positions[name]


def _positions_of(mask: np.ndarray, count: int) -> np.ndarray:
    if mask.shape != (count,):
        raise ValueError(f"tasks[mask]: expected one bool a task, shape ({count},), got the shape {mask.shape}")
    return np.flatnonzero(mask)


def _integers(array: np.ndarray, selection: Any) -> np.ndarray:
    if array.size and (array.dtype.kind not in "iu" or array.ndim != 1):
        raise ValueError(
            f"tasks[…]: expected a name, a position, a slice, or a list of names, positions or bools, got {selection!r}"
        )
    return array.astype(np.int64)


def _not_empty(index: Tensor, selection: Any) -> Tensor:
    if not len(index):
        raise ValueError(f"tasks[{selection!r}] selects no task; select at least one")
    return index


def _in_range(index: Tensor, count: int) -> Tensor:
    low, high = int(index.min()), int(index.max())
    if low < -count or high >= count:
        wrong = low if low < -count else high
        raise ValueError(f"index {wrong} is out of range: there are {count} tasks, counted 0 … {count - 1}")
    return index if low >= 0 else torch.where(index < 0, index + count, index)
