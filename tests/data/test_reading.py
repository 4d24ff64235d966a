from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch

from bayesmeta.data.reading import Roles, check_roles, named, write_table
from bayesmeta.data.tasks import Tasks

TABLE = {
    "county": ["b", "a", "b", "a", "b"],
    "floor": [0, 1, 1, 0, 0],
    "kind": ["wood", "brick", "brick", "wood", "stone"],
    "y": [1.0, 2.0, 3.0, 4.0, 5.0],
    "n": [7, 8, 9, 10, 11],
    "u": [0.5, 0.25, 0.5, 0.25, 0.5],
    "w": [1.0, 2.0, 0.0, 1.0, 1.0],
    "flag": [True, False, True, True, False],
}


def read(df: Any, **changes: Any) -> Tasks:
    return Tasks.from_dataframe(df, **({"task": "county", "y": "y"} | changes))


@pytest.mark.parametrize("make", [pd.DataFrame, pl.DataFrame, pl.LazyFrame, pa.table])
def test_every_kind_of_table_reads_the_same(make: Any) -> None:
    tasks = read(make(TABLE), x=["floor", "kind"], columns=["n", "flag"], task_columns="u", weight="w", task_weight="u")
    assert tasks.names == ("b", "a") and tasks.sizes.tolist() == [3, 2]
    assert tasks.y.tolist() == [1.0, 3.0, 5.0, 2.0, 4.0]
    assert tasks.schema.levels == {"kind": ("brick", "stone", "wood")}
    assert tasks.x.tolist() == [[0.0, 2.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 2.0]]
    assert tasks.columns["n"].dtype == tasks.columns["flag"].dtype == torch.int64
    assert tasks.columns["n"].tolist() == [7, 9, 11, 8, 10]
    assert tasks.task_columns["u"].tolist() == [0.5, 0.25]
    assert tasks.weight is not None and tasks.weight.tolist() == [1.0, 0.0, 1.0, 2.0, 1.0]
    assert tasks.task_weight is not None and tasks.task_weight.tolist() == [0.5, 0.25]
    assert tasks.x.dtype == tasks.y.dtype == torch.float64


@pytest.mark.parametrize("backend", ["pandas", "polars", "pyarrow"])
def test_round_trip(backend: str) -> None:
    roles = {"x": ["floor", "kind"], "columns": ["n"], "task_columns": ["u"], "weight": "w", "missing": "mask"}
    df = pd.DataFrame(TABLE).assign(y=[1.0, np.nan, 3.0, 4.0, 5.0])
    tasks = read(df, **roles)
    again = read(tasks.to_dataframe(backend), **roles)
    assert again.names == tasks.names and again.schema == tasks.schema
    assert again.fingerprints() == tasks.fingerprints()
    assert torch.equal(again.observed, tasks.observed)


def test_round_trip_of_several_outputs_and_images() -> None:
    rng = np.random.default_rng(0)
    tasks = Tasks.from_arrays(rng.normal(size=(2, 3, 4, 4)), rng.normal(size=(2, 3, 2)))
    table = tasks.to_dataframe()
    assert list(table.columns) == ["task", "x", "y0", "y1"]
    again = Tasks.from_dataframe(table, task="task", x="x", y=["y0", "y1"])
    assert torch.equal(again.x, tasks.x) and torch.equal(again.y, tasks.y)
    with pytest.raises(ValueError, match="backend: expected one of 'pandas', 'polars', 'pyarrow', got \"?'excel'"):
        write_table(tasks._data, "excel")


def test_one_output_or_a_list() -> None:
    df = pd.DataFrame(TABLE)
    assert read(df).batch([0, 1]).y.shape == (2, 3)
    assert read(df, y=["y", "n"]).batch([0, 1]).y.shape == (2, 3, 2)
    assert read(df, y=["y"]).schema.y_shape == (1,)
    assert read(df, y="n").y.dtype == torch.int64
    assert read(df).x.shape == read(df, x=None, columns=None, task_columns=None).x.shape == (5, 0)


@pytest.mark.parametrize(
    "table",
    [
        pd.DataFrame({"county": ["a", "b"], "y": pd.array([1, None], dtype="Int64")}),
        pd.DataFrame({"county": ["a", "b"], "y": [1.0, np.nan]}),
        pd.DataFrame({"county": ["a", "b"], "y": np.array([1, None], object)}),
        pl.DataFrame({"county": ["a", "b"], "y": [1, None]}),
        pl.DataFrame({"county": ["a", "b"], "y": [1.0, float("nan")]}),
        pa.table({"county": ["a", "b"], "y": [True, None]}),
    ],
)
def test_missing_labels_in_any_spelling(table: Any) -> None:
    tasks = read(table, missing="mask")
    assert tasks.observed.tolist() == [True, False] and tasks.y.tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"'y': 1 row\(s\) are NaN or missing, the first in task 'b', row 0"):
        read(table)


def test_a_task_without_labels_keeps_its_rows() -> None:
    df = pd.DataFrame(TABLE).assign(y=[np.nan, 2.0, np.nan, 4.0, np.nan])
    tasks = read(df, missing="mask")
    assert tasks.sizes.tolist() == [3, 2] and not tasks["b"].observed.any()


@pytest.mark.parametrize(
    "kind",
    [
        pd.Series(["low", "high", "low"], dtype=pd.CategoricalDtype(["low", "mid", "high"], ordered=True)),
        pl.Series(["low", "high", "low"], dtype=pl.Enum(["low", "mid", "high"])),
    ],
)
def test_ordered_levels_keep_their_order(kind: Any) -> None:
    make = pd.DataFrame if isinstance(kind, pd.Series) else pl.DataFrame
    tasks = read(make({"county": ["a", "a", "b"], "y": [1, 2, 3], "kind": kind}), columns=["kind"])
    assert tasks.schema.levels == {"kind": ("low", "mid", "high")} and tasks.columns["kind"].tolist() == [0, 2, 0]


def test_unordered_levels_are_sorted() -> None:
    for kind in (pd.Categorical(["q", "p"]), pd.array(["q", "p"], dtype="string"), np.array(["q", "p"], object)):
        tasks = read(pd.DataFrame({"county": ["a", "b"], "y": [1, 2], "kind": kind}), columns="kind")
        assert tasks.schema.levels == {"kind": ("p", "q")}


@pytest.mark.parametrize("absent", [pd.Categorical(["q", None]), pd.array(["q", None], dtype="string"), ["q", None]])
def test_missing_text_is_an_error(absent: Any) -> None:
    with pytest.raises(ValueError, match="column 'kind': missing text in task 'b', row 0"):
        read(pd.DataFrame({"county": ["a", "b"], "y": [1, 2], "kind": absent}), columns="kind")


def test_task_values_become_names() -> None:
    df = pd.DataFrame({"county": [3, 1, 3], "y": [1.0, 2.0, 3.0]})
    assert read(df).names == ("3", "1")
    with pytest.raises(ValueError, match="duplicated names: several values of 'county' read '1' as text; rename them"):
        read(pd.DataFrame({"county": np.array([1, "1"], object), "y": [1, 2]}))
    for nothing in ([None, "a"], [np.nan, 1.0]):
        with pytest.raises(ValueError, match="task column 'county': row 0 of the table has no task; drop or name"):
            read(pd.DataFrame({"county": nothing, "y": [1, 2]}))
    with pytest.raises(ValueError, match="task column 'county': expected text or numbers, got list"):
        read(pd.DataFrame({"county": [[1], [2]], "y": [1, 2]}))


def test_a_column_of_arrays() -> None:
    vectors = [np.array([1.0, 2.0]), np.array([3.0, 4.0])]
    for table in (
        pd.DataFrame({"county": ["a", "b"], "y": [1, 2], "v": vectors}),
        pl.DataFrame({"county": ["a", "b"], "y": [1, 2], "v": [v.tolist() for v in vectors]}),
        pl.DataFrame({"county": ["a", "b"], "y": [1, 2], "v": np.stack(vectors)}),
    ):
        assert read(table, x="v").x.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    df = pd.DataFrame({"county": ["a", "b"], "y": [1, 2], "v": vectors, "z": [1, 2], "bad": [[1.0], [1.0, 2.0]]})
    with pytest.raises(ValueError, match="'v' holds arrays, so it must be the only input, got 'z', 'v'"):
        read(df, x=["z", "v"])
    with pytest.raises(ValueError, match=r"'bad': expected arrays of one shape, got \(1,\) in row 0 and \(2,\) in"):
        read(df, x="bad")


def test_an_inconstant_task_column_names_the_task() -> None:
    df = pd.DataFrame(TABLE).assign(u=[0.5, 0.25, 0.5, 0.75, 0.5])
    with pytest.raises(
        ValueError,
        match=r"'u' must be constant within a task, but it changes in task 'a', row 1 .*\(from 0.25 to 0.75\)",
    ):
        read(df, task_columns="u")
    with pytest.raises(ValueError, match="'u' must be constant within a task"):
        read(df, task_weight="u")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": ["flor"]}, "x: unknown column 'flor'; known: 'county', .*Did you mean 'floor'?"),
        ({"task": "zip"}, "task: unknown column 'zip'"),
        ({"weight": "wt"}, "weight: unknown column 'wt'"),
        ({"x": ["floor", "floor"]}, "duplicated names: column 'floor' is given as x and as x; name it once"),
        ({"x": ["y"]}, "column 'y' is given as x and as y"),
        ({"x": ["county"]}, "column 'county' is given as task and as x"),
        ({"columns": "u", "task_columns": "u"}, "column 'u' is given as columns and as task_columns"),
        ({"y": []}, "y: expected the name of at least one output, got none"),
        ({"y": "kind"}, "output 'kind': expected numbers, got text; code classes as integers"),
        ({"weight": "kind"}, "weight 'kind': expected one number a row or task, got text"),
        ({"missing": "drop"}, 'missing: expected "error" or "mask"'),
    ],
)
def test_errors_of_roles(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(pd.DataFrame(TABLE), **changes)


def test_one_column_may_be_input_and_column() -> None:
    tasks = read(pd.DataFrame(TABLE), x="kind", columns=["kind"], task_columns="u", task_weight="u")
    assert tasks.columns["kind"].tolist() == tasks.x[:, 0].tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"floor": [0.0, np.nan, 1.0, 0.0, 0.0]},
            r"'floor': 1 row\(s\) are NaN or missing, the first in task 'a', row 0",
        ),
        ({"y": [np.inf, 1.0, 1.0, 1.0, 1.0]}, "'y': 1 row.* infinite, the first in task 'b', row 0"),
        ({"w": [1, 1, 1, -2, 1]}, "weight 'w': expected weights from 0 on, got -2 in task 'a', row 1"),
        (
            {"floor": [datetime.datetime(2020, 1, 1)] * 5},
            "'floor': expected numbers or text, got Datetime.* turn times",
        ),
    ],
)
def test_errors_of_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(pd.DataFrame(TABLE | changes), x="floor", weight="w")


def test_errors_of_tables() -> None:
    with pytest.raises(ValueError, match="the table is empty: expected at least one row"):
        read(pd.DataFrame(TABLE).iloc[:0])
    with pytest.raises(ValueError, match="expected a dataframe .* got dict; for arrays use Tasks.from_arrays"):
        read(TABLE)
    twice = pd.DataFrame([["a", 1.0, 2.0]], columns=["county", "y", "y"])
    with pytest.raises(ValueError, match="(?s)duplicated names in the table.*'y' 2 times; rename these columns"):
        read(twice)
    with pytest.raises(ValueError, match="duplicated names: the table has several columns called 'y'"):
        check_roles(Roles("county", "y"), ["county", "y", "y"])


def test_a_name_or_several() -> None:
    assert named("floor") == ("floor",) and named(["a", "b"]) == ("a", "b")
