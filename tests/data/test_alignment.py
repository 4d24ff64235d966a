from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from bayesmeta.data.alignment import align_names
from bayesmeta.data.tasks import Tasks

FIT = pd.DataFrame(
    {
        "t": list("aabb"),
        "v": [0.5, 1.5, 2.5, 3.5],
        "kind": ["p", "q", "r", "p"],
        "n": [3, 4, 5, 6],
        "u": [1, 1, 2, 2],
        "site": ["m", "m", "o", "o"],
        "y": [2, 1, 2, 3],
    }
)
ROLES: dict[str, Any] = {
    "task": "t",
    "x": ["v", "kind"],
    "y": "y",
    "columns": ["n"],
    "task_columns": ["u", "site"],
}


def fit() -> Tasks:
    return Tasks.from_dataframe(FIT, **ROLES)


def test_levels_and_columns_take_the_order_of_the_fit() -> None:
    new = Tasks.from_dataframe(FIT[FIT.t == "b"], **(ROLES | {"x": ["kind", "v"], "task_columns": ["site", "u"]}))
    aligned = new.aligned(fit().schema)
    assert aligned.schema == fit().schema
    assert torch.equal(aligned.x, fit()["b"].x)
    assert aligned.task_columns["site"].tolist() == [1] and aligned.fingerprints() == fit()["b"].fingerprints()
    assert aligned.aligned(aligned.schema).x is aligned.x


def test_surplus_columns_are_dropped() -> None:
    new = Tasks.from_dataframe(FIT.assign(z=1.0), **(ROLES | {"x": ["z", "v", "kind"], "columns": ["z", "n"]}))
    aligned = new.aligned(fit().schema)
    assert torch.equal(aligned.x, fit().x) and list(aligned.columns) == ["n"]
    assert aligned.fingerprints() == fit().fingerprints()


def test_whole_numbers_take_the_dtype_of_the_fit() -> None:
    new = Tasks.from_dataframe(FIT.assign(n=FIT.n.astype(float), y=FIT.y.astype(float)), **ROLES)
    aligned = new.aligned(fit().schema)
    assert aligned.y.dtype == aligned.columns["n"].dtype == torch.int64
    halves = Tasks.from_dataframe(FIT.assign(n=FIT.n + 0.5), **ROLES).aligned(fit().schema)
    assert halves.columns["n"].tolist() == [3.5, 4.5, 5.5, 6.5]


def test_labels_that_are_all_missing_get_the_placeholder_of_the_fit() -> None:
    schema = Tasks.from_arrays(None, [[0.3, 0.2]]).schema
    new = Tasks.from_arrays(None, [[np.nan, np.nan]], missing="mask")
    aligned = new.aligned(schema)
    assert aligned.y.tolist() == [0.2, 0.2] and aligned.schema.missing and not aligned.observed.any()


def test_tasks_without_rows_take_the_shape_of_the_fit() -> None:
    schema = Tasks.from_arrays([[[1.0, 2.0]]], [[3.0]]).schema
    nothing = Tasks.from_arrays([[]], [[]]).aligned(schema)
    batch = nothing.batch([0])
    assert batch.x.tolist() == [[[1.0, 2.0]]] and batch.y.tolist() == [[3.0]] and not batch.mask.any()


def test_arrays_fit_named_columns() -> None:
    frame = Tasks.from_dataframe(FIT, task="t", x="v", y="y")
    for x in ([[0.5, 1.5]], [[[0.5], [1.5]]]):
        assert Tasks.from_arrays(x, [[2, 1]]).aligned(frame.schema).x.tolist() == [[0.5], [1.5]]


@pytest.mark.parametrize(
    ("table", "roles", "message"),
    [
        (FIT, {"x": ["v"]}, "x: the fit has 'v', 'kind', these data 'v'; read the same columns as x"),
        (FIT, {"y": "u", "task_columns": "site"}, "y: the fit has 'y', these data 'u'"),
        (FIT, {"columns": []}, "columns: the fit needs the column 'n', these data have none as columns; read it"),
        (
            FIT,
            {"task_columns": ["u"]},
            "task_columns: the fit needs the column 'site', these data have 'u' as task_columns",
        ),
        (FIT.assign(kind="s"), {}, "column 'kind', task 'a', row 0 of that task: the level 's' was not seen before"),
        (
            FIT.assign(site="k"),
            {},
            "column 'site', task 'a': the level 'k' was not seen before; known levels: 'm', 'o'",
        ),
        (FIT.assign(kind=1.0), {}, "column 'kind': these data hold numbers, the fit has text; convert the column"),
        (FIT.assign(u=["1", "1", "2", "2"]), {}, "column 'u': these data hold text, the fit has numbers"),
    ],
)
def test_errors(table: pd.DataFrame, roles: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tasks.from_dataframe(table, **(ROLES | roles)).aligned(fit().schema)


def test_errors_of_shape() -> None:
    schema = Tasks.from_arrays(np.zeros((1, 2, 4, 4)), [[1.0, 2.0]], columns={"k": np.zeros((1, 2, 3))}).schema
    columns = {"k": np.zeros((1, 2, 3))}
    with pytest.raises(ValueError, match=r"x: the fit has the shape \(4, 4\) a row, these data \(5, 5\)"):
        Tasks.from_arrays(np.zeros((1, 2, 5, 5)), [[1.0, 2.0]], columns=columns).aligned(schema)
    with pytest.raises(ValueError, match=r"column 'k': expected the shape \(3,\) a row or task, got \(2,\)"):
        Tasks.from_arrays(np.zeros((1, 2, 4, 4)), [[1.0, 2.0]], columns={"k": np.zeros((1, 2, 2))}).aligned(schema)


@pytest.mark.parametrize("surplus", [-1, 1])
@pytest.mark.parametrize("named", [True, False])
def test_unnamed_columns_are_never_cut(surplus: int, named: bool) -> None:
    table = pd.DataFrame({"home": ["a", "b"], "x0": [0.0, 1.0], "x1": [1.0, 2.0], "y": [0.0, 1.0]})
    schema = (
        Tasks.from_dataframe(table, task="home", x=["x0", "x1"], y="y").schema
        if named
        else Tasks.from_arrays(np.zeros((1, 3, 2)), np.zeros((1, 3))).schema
    )
    got = 2 + surplus
    message = (
        rf"x: the fit has the shape \(2,\) a row, these data \({got},\); make them alike: .*\('x0', 'x1'\), in the"
    )
    with pytest.raises(ValueError, match=message):
        Tasks.from_arrays(np.zeros((1, 3, got)), np.zeros((1, 3))).aligned(schema)


def test_unnamed_outputs_are_never_cut() -> None:
    schema = Tasks.from_arrays(None, np.zeros((1, 3, 2))).schema
    with pytest.raises(ValueError, match=r"y: the fit has the shape \(2,\) a row, these data \(3,\)"):
        Tasks.from_arrays(None, np.zeros((1, 3, 3))).aligned(schema)


def test_inputs_without_entries_fit_a_fit_without_inputs() -> None:
    empty = pd.DataFrame({"task": ["a", "a"], "e": [np.zeros(0)] * 2, "y": [1.0, 2.0]})
    schema = Tasks.from_arrays(None, [[1.0, 2.0]]).schema
    for tasks in (
        Tasks.from_arrays(np.zeros((1, 2, 0)), [[1.0, 2.0]]),
        Tasks.from_dataframe(empty, task="task", x="e", y="y"),
        Tasks.from_dataframe(empty, task="task", y="y"),
    ):
        aligned = tasks.aligned(schema)
        assert aligned.x.shape == (2, 0) and aligned.batch([0]).x.shape == (1, 2, 0)
        assert len(aligned.to_dataframe()) == 2


def test_names_must_match() -> None:
    assert align_names(("a", "b"), ("b", "a")) == ["a", "b"]
    with pytest.raises(
        ValueError, match="must have the same names; missing: 'b'; surplus: 'c'. Select the tasks in both"
    ):
        align_names(("a", "b"), ("a", "c"))
