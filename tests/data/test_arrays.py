from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bayesmeta.data.arrays import check_names, flatten, new_rows, to_numpy
from bayesmeta.data.tasks import Tasks

Y = [[1.0, 2.0], [3.0]]


def test_lists_numpy_and_torch_read_the_same() -> None:
    prints = {
        Tasks.from_arrays([make([[1.0], [2.0]]), make([[3.0]])], [make(Y[0]), make(Y[1])]).fingerprints()
        for make in (list, np.array, torch.tensor)
    }
    assert len(prints) == 1


def test_shapes() -> None:
    assert Tasks.from_arrays(None, Y).x.shape == (3, 0)
    assert Tasks.from_arrays([[0, 1], [2]], Y).x.shape == (3,)
    images = Tasks.from_arrays(np.zeros((2, 5, 3, 8, 8), np.float32), np.zeros((2, 5), int))
    assert images.x.dtype == torch.float32 and images.batch([0, 1]).x.shape == (2, 5, 3, 8, 8)
    assert images.y.dtype == torch.int64 and images.schema.x == ("x",)
    vectors = Tasks.from_arrays(None, np.zeros((2, 5, 4)))
    assert vectors.schema.y == ("y0", "y1", "y2", "y3") and vectors.batch(0).y.shape == (1, 5, 4)


def test_tasks_without_rows() -> None:
    tasks = Tasks.from_arrays([[[1.0, 2.0]], []], [[1], []], columns={"c": [["u"], []]})
    assert tasks.sizes.tolist() == [1, 0] and tasks.x.shape == (1, 2) and tasks.y.dtype == torch.int64
    batch = tasks.batch([1])
    assert batch.x.shape == (1, 1, 2) and not batch.mask.any() and batch.x.tolist() == [[[1.0, 2.0]]]
    nothing = Tasks.from_arrays([[]], [[]])
    assert nothing.batch([0]).y.shape == (1, 1)


def test_text_in_columns_and_inputs() -> None:
    tasks = Tasks.from_arrays(
        [["q", "p"], ["q"]], Y, columns={"c": [["v", "u"], ["v"]]}, task_columns={"s": ["n", "m"]}
    )
    assert tasks.schema.levels == {"x": ("p", "q"), "c": ("u", "v"), "s": ("m", "n")}
    assert tasks.x.tolist() == [1.0, 0.0, 1.0] and tasks.task_columns["s"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": [[1.0, 2.0]]}, "x: expected one array a task, 2 in all, got a list of length 1"),
        ({"x": [[1.0], [2.0]]}, "x: expected 2 rows in task '0', got 1; give one entry a row"),
        ({"x": [[[1.0], [2.0]], [[1.0, 2.0]]]}, r"x: expected rows of one shape, got \(1,\) and, in task '1', \(2,\)"),
        (
            {"x": [[[1.0], [2.0, 3.0]], [[1.0]]]},
            "expected rows of one shape in each task, got rows of different shapes",
        ),
        ({"x": [[1.0, np.nan], [2.0]]}, r"'x': 1 row\(s\) are NaN or missing, the first in task '0', row 1"),
        ({"y": [1.0, 2.0]}, "y: expected an array with one entry a row, got a single value for task '0'"),
        ({"y": [["a", "b"], ["c"]]}, "output 'y': expected numbers, got text"),
        ({"y": [[1.0, np.inf], [2.0]]}, "'y': 1 row.* infinite, the first in task '0', row 1"),
        ({"y": [[1.0, np.nan], [2.0]]}, 'missing="mask"'),
        ({"y": []}, "y is empty: expected one array a task, got no tasks"),
        ({"names": ["a"]}, "names: expected one name a task, 2 in all, got a list of length 1"),
        ({"names": ["a", "a"]}, "duplicated names: 'a' stand for several tasks; make names unique"),
        ({"columns": {"n": [[1], [2]]}}, "n: expected 2 rows in task '0', got 1"),
        ({"columns": {"n": [[1, 2]]}}, "n: expected one array a task, 2 in all, got a list of length 1"),
        ({"columns": {"y": [[1, 2], [3]]}}, "duplicated names: 'y' stand for several columns"),
        ({"task_columns": {"u": [1.0]}}, r"task column 'u': expected one value a task, 2 in all, got the shape \(1,\)"),
        ({"task_columns": {"u": [1.0, np.nan]}}, "'u': 1 row.* NaN or missing, the first in task '1'"),
        ({"weight": [[1.0, -1.0], [1.0]]}, "weight 'weight': expected weights from 0 on, got -1 in task '0', row 1"),
        ({"task_weight": [1.0, -1.0]}, "weight 'task_weight': expected weights from 0 on, got -1 in task '1'"),
        ({"task_weight": 1.0}, "task_weight: expected one value a task, 2 in all"),
    ],
)
def test_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tasks.from_arrays(**({"x": None, "y": Y} | changes))


def test_helpers() -> None:
    assert to_numpy(torch.ones(2, requires_grad=True)).tolist() == [1.0, 1.0]
    values, sizes = flatten("x", [[1], [], [2, 3]], "abc")
    assert values.tolist() == [1, 2, 3] and sizes.tolist() == [1, 0, 2]
    assert check_names(None, 2) == ("0", "1") and check_names([1, 2], 2) == ("1", "2")


@pytest.fixture
def tasks() -> Tasks:
    return Tasks.from_arrays(
        [[[1.0], [2.0]], [[3.0]]], [[9, 4], [7]], columns={"n": [[10, 10], [20]], "c": [["u", "v"], ["u"]]}
    )


def test_new_rows_for_all_or_each(tasks: Tasks) -> None:
    columns: dict[str, Any] = {"n": np.array([1, 2]), "c": np.array(["v", "u"])}
    offsets, rows = new_rows(np.array([5.0, 6.0]), columns, tasks.schema, tasks.names)
    assert offsets.tolist() == [0, 2, 4] and rows["x"].flatten().tolist() == [5.0, 6.0, 5.0, 6.0]
    assert rows["column:c"].tolist() == [1, 0, 1, 0] and rows["y"].tolist() == [4] * 4 and rows["observed"].all()
    ragged: dict[str, Any] = {"n": [[1], [2, 3]], "c": [["v"], ["u", "u"]]}
    offsets, rows = new_rows([[[5.0]], [[6.0], [7.0]]], ragged, tasks.schema, tasks.names)
    assert offsets.tolist() == [0, 1, 3] and rows["column:n"].tolist() == [1, 2, 3]


def test_columns_say_how_many_rows_there_are() -> None:
    tasks = Tasks.from_arrays(None, Y, columns={"n": [[1, 2], [3]]})
    offsets, rows = new_rows(None, {"n": np.arange(4)}, tasks.schema, tasks.names)
    assert offsets.tolist() == [0, 4, 8] and rows["x"].shape == (8, 0)


@pytest.mark.parametrize(
    ("x", "columns", "message"),
    [
        (np.zeros(2), {}, "columns: the new rows need 'n', 'c' too, as the data had; pass columns={'n': …}"),
        (np.zeros(2), {"m": np.zeros(2)}, "unknown column 'm'; known: 'n', 'c'"),
        (
            None,
            {"n": np.zeros(2), "c": np.array(["u"])},
            r"x: expected the inputs 'x0' of the new rows, got None; pass x of",
        ),
        (np.zeros((2, 3)), {"n": [1, 2], "c": ["u"]}, "n: a list must hold one array a task, 2 in all, got 2 entries"),
        (
            np.zeros((2, 3)),
            {"n": np.ones(2), "c": np.array(["u", "u"])},
            r"x: expected rows of shape \(1,\) \('x0'\), got \(3,\)",
        ),
        (np.zeros(2), {"n": np.ones(3), "c": np.array(["u", "u"])}, "n: expected 2 rows in task '0', got 3"),
        (np.zeros(2), {"n": np.ones(2), "c": np.array(["u", "w"])}, "the level 'w' was not seen before"),
        (np.zeros(2), {"n": np.ones(2), "c": np.zeros(2)}, "column 'c': expected text, one of 'u', 'v', got numbers"),
        (np.array([0.0, np.nan]), {"n": np.ones(2), "c": np.array(["u", "u"])}, "'x0': 2 row.* NaN"),
        (
            1.0,
            {"n": np.ones(2), "c": np.array(["u", "u"])},
            "x: expected an array with one entry a row, got a single value",
        ),
    ],
)
def test_errors_of_new_rows(tasks: Tasks, x: Any, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        new_rows(x, columns, tasks.schema, tasks.names)


def test_neither_inputs_nor_columns() -> None:
    tasks = Tasks.from_arrays(None, Y)
    with pytest.raises(ValueError, match=r"x: expected x or columns, got neither; .* pass x of shape \(M, 0\)"):
        new_rows(None, None, tasks.schema, tasks.names)
    assert new_rows(np.zeros((3, 0)), None, tasks.schema, tasks.names)[0].tolist() == [0, 3, 6]
