from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bayesmeta.data.selection import indices

POSITIONS = {"anoka": 0, "cass": 1, "dodge": 2, "rice": 3}


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("cass", [1]),
        (3, [3]),
        (-1, [3]),
        (np.int64(2), [2]),
        (slice(1, 3), [1, 2]),
        (slice(None, None, -1), [3, 2, 1, 0]),
        (["rice", "anoka"], [3, 0]),
        (("rice", "anoka"), [3, 0]),
        (np.array(["rice"], object), [3]),
        ([2, -4], [2, 0]),
        (torch.tensor([1, 1]), [1, 1]),
        ([True, False, False, True], [0, 3]),
        (torch.tensor([False, True, False, False]), [1]),
    ],
)
def test_selections(selection: Any, expected: list[int]) -> None:
    index = indices(selection, POSITIONS)
    assert index.tolist() == expected and index.dtype == torch.int64


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("ric", "unknown task 'ric'; known: 'anoka', 'cass', 'dodge', 'rice'. Did you mean 'rice'?"),
        (["rice", "x"], "unknown task 'x'"),
        (4, r"index 4 is out of range: there are 4 tasks, counted 0 … 3"),
        ([0, -5], "index -5 is out of range"),
        ([True, False], r"expected one bool a task, shape \(4,\), got the shape \(2,\)"),
        (1.5, "expected a name, a position, a slice, or a list of names, positions or bools, got 1.5"),
        (None, "expected a name, a position"),
        ([[0, 1]], "expected a name, a position"),
        ([], "selects no task; select at least one"),
        (slice(2, 2), "selects no task"),
        ([False] * 4, "selects no task"),
    ],
)
def test_errors(selection: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        indices(selection, POSITIONS)
