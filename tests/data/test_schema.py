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


@pytest.fixture
def several() -> Schema:
    y = [[[5, 1, 9], [4, 2, 8]], [[7, 3, 6]]]
    return Tasks.from_arrays([[[1.0], [2.0]], [[3.0]]], y, columns={"kind": [["u", "v"], ["u"]]}).schema


def test_output_by_position_and_name(several: Schema, schema: Schema) -> None:
    assert [several.output(k) for k in (0, 2, -1, -3, "y0", "y2")] == [0, 2, -1, -3, 0, 2]
    assert schema.output(0) == schema.output("y") == 0 and schema.output(-1) == -1
    for wrong in (3, -4, "y3", "0"):
        with pytest.raises(ValueError, match=rf"unknown output {wrong!r}; known: 'y0', 'y1', 'y2'\..*counted 0 … 2"):
            several.output(wrong)
    with pytest.raises(ValueError, match="unknown output 1; known: 'y'. Outputs are counted 0 … 0"):
        schema.output(1)


def test_only_one_output(several: Schema, schema: Schema) -> None:
    """As if the other outputs had never been there, but for the row that is the example."""
    for k, name in ((1, "y1"), ("y1", "y1"), (-1, "y2")):
        one, index = several.only(k), int(name[1])
        plain = Tasks.from_arrays([[[1.0]]], [[0]], columns={"kind": [["u"]]}).schema
        assert (one.y, one.y_shape, one.x, one.columns) == ((name,), (), plain.x, plain.columns)
        assert (
            one.placeholder().item() == several.placeholder()[index].item() and one.placeholder().dtype == torch.int64
        )
        assert {key: row.shape for key, row in one.example_rows().items()} == {
            key: row.shape for key, row in plain.example_rows().items()
        }
        assert Schema.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert several.y == ("y0", "y1", "y2") and schema.only(0) is schema
    with pytest.raises(ValueError, match="unknown output 'y9'"):
        several.only("y9")
    with pytest.raises(ValueError, match="unknown output 1; known: 'y'"):
        schema.only(1)


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
