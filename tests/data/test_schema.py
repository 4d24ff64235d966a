from __future__ import annotations

import json

import pytest
import torch

from bayesmeta.data.schema import Schema, default_names, dtype_of, listing, unknown
from bayesmeta.data.tasks import Tasks


@pytest.fixture
def schema() -> Schema:
    columns = {"kind": [["u", "v"], ["u"]]}
    return Tasks.from_arrays(
        [[[1.0], [2.0]], [[3.0]]], [[5, 4], [7]], columns=columns, task_columns={"z": [1, 2]}
    ).schema


def test_json_round_trip_keeps_everything(schema: Schema) -> None:
    read = Schema.from_json(json.loads(json.dumps(schema.to_json())))
    assert read == schema
    assert read.dtypes == schema.dtypes and read.example == schema.example
    assert read.levels == {"kind": ("u", "v")} and read.x_shape == (1,)


def test_damaged_json_is_an_error(schema: Schema) -> None:
    plain = schema.to_json()
    del plain["levels"]
    with pytest.raises(ValueError, match="expected the keys .* the file is damaged"):
        Schema.from_json(plain)
    with pytest.raises(ValueError, match="name of a dtype, got 'nn'"):
        dtype_of("nn")


def test_example_is_a_real_row_and_placeholder_the_smallest_label(schema: Schema) -> None:
    assert schema.placeholder().item() == 4 and schema.placeholder().dtype == torch.int64
    rows = schema.example_rows()
    assert set(rows) == {"x", "y", "observed", "column:kind"}
    assert rows["x"].tolist() == [[1.0]]


def test_code_of_a_level(schema: Schema) -> None:
    assert schema.code("kind", "v") == 1
    assert schema.code("z", 2.0) == 2.0
    with pytest.raises(ValueError, match="level 'w' was not seen before; known levels: 'u', 'v'. Drop these rows"):
        schema.code("kind", "w")
    with pytest.raises(ValueError, match="'z' holds numbers, got the text 'u'"):
        schema.code("z", "u")


def test_names_of_arrays() -> None:
    assert default_names("x", ()) == ("x",)
    assert default_names("x", (2,)) == ("x0", "x1")
    assert default_names("x", (0,)) == ()
    assert default_names("x", (3, 3)) == ("x",)


def test_messages_list_and_suggest() -> None:
    assert unknown("column", "flor", ["floor", "uranium"]) == (
        "unknown column 'flor'; known: 'floor', 'uranium'. Did you mean 'floor'?"
    )
    assert "Did you mean" not in unknown("column", "zzz", ["floor"])
    assert listing([]) == "none"
    assert listing(map(str, range(20))).endswith("'11', … (20 in all)")
