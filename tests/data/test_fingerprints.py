from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from bayesmeta.data.fingerprints import Origin, collection_fingerprint, fingerprints
from bayesmeta.data.tasks import Tasks

X = [[1.0, 2.0], [3.0]]
Y = [[0.5, 1.5], [2.5]]


def prints(**changes: object) -> tuple[str, ...]:
    return fingerprints(Tasks.from_arrays(**({"x": X, "y": Y} | changes))._data)  # type: ignore[arg-type]


def test_every_datum_counts() -> None:
    base = prints()
    assert len(set(base)) == 2 and all(len(value) == 32 for value in base)
    for change in (
        {"y": [[0.5, 1.5], [2.6]]},
        {"x": [[1.0, 2.0], [3.1]]},
        {"columns": {"k": [[1, 1], [1]]}},
        {"task_columns": {"k": [1, 1]}},
        {"weight": [[1, 1], [1]]},
        {"task_weight": [1, 1]},
        {"y": [[0.5, 1.5], [np.nan]], "missing": "mask"},
    ):
        assert prints(**change)[1] != base[1], change
    assert prints(y=[[0.5, 1.5], [2.6]])[0] == base[0]


def test_what_does_not_count() -> None:
    base = prints(y=[[1, 0], [3]])
    assert prints(y=[[1.0, -0.0], [3.0]]) == base
    assert prints(y=[[1, 0], [3]], names=["a", "b"]) == base
    assert prints(y=[[1.0, 0.0], [3.0]], missing="mask") == base


def test_the_order_of_rows_counts() -> None:
    assert prints(x=[[2.0, 1.0], [3.0]], y=[[1.5, 0.5], [2.5]])[0] != prints()[0]


def test_missing_labels_count_as_missing_whatever_stands_there() -> None:
    first = prints(y=[[np.nan, 7.0], [9.0]], missing="mask")
    assert prints(y=[[np.nan, 7.0], [1.0]], missing="mask")[0] == first[0]
    assert prints(y=[[7.0, 7.0], [9.0]], missing="mask")[0] != first[0]


def test_text_counts_by_its_level_not_its_code() -> None:
    df = pd.DataFrame({"t": list("aab"), "x": ["p", "q", "r"], "c": ["u", "w", "v"], "y": [1.0, 2.0, 3.0]})
    whole = Tasks.from_dataframe(df, task="t", x=["x"], y="y", columns="c")
    part = Tasks.from_dataframe(df[df.t == "b"], task="t", x=["x"], y="y", columns="c")
    assert part.columns["c"].tolist() != whole["b"].columns["c"].tolist()
    assert part.fingerprints() == whole["b"].fingerprints()
    other = Tasks.from_dataframe(df.assign(c=["u", "w", "z"]), task="t", x=["x"], y="y", columns="c")
    assert other.fingerprints()[1] != whole.fingerprints()[1]


def test_a_collection_is_known_by_its_tasks_in_order() -> None:
    assert collection_fingerprint(["a", "b"]) != collection_fingerprint(["b", "a"])


def test_origin_is_lazy_and_remembers() -> None:
    tasks = Tasks.from_arrays(X, Y)
    origin = Origin(tasks._data)
    assert origin.key == collection_fingerprint(tasks.fingerprints())
    assert origin._data is None and origin.key == Origin(None, origin.key).key


@pytest.mark.parametrize("sizes", [(0, 2), (2, 0), (0, 0)])
def test_tasks_without_rows(sizes: tuple[int, int]) -> None:
    data = [torch.zeros(size, 3) for size in sizes]
    assert len(prints(x=data, y=[torch.zeros(size) for size in sizes])) == 2
