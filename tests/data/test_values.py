from __future__ import annotations

from decimal import Decimal

import numpy as np
import pytest
import torch

from bayesmeta.data.values import (
    check_finite,
    covariate,
    encode,
    example_label,
    inputs,
    is_text,
    labels,
    locate,
    numeric,
    weights,
)

WHERE = locate(("a", "empty", "b"), np.array([0, 2, 2, 4]))


def texts(*values: object) -> np.ndarray:
    return np.array(values, dtype=object)


def test_locate_skips_tasks_without_rows() -> None:
    assert WHERE(1) == "task 'a', row 1 of that task"
    assert WHERE(2) == "task 'b', row 0 of that task"


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        (np.zeros(2, bool), np.int64),
        (np.zeros(2, np.int32), np.int64),
        (np.zeros(2, np.uint8), np.int64),
        (np.zeros(2, np.float32), np.float64),
        (np.zeros((2, 3, 3), np.float32), np.float32),
        (np.zeros((2, 3, 3), np.float64), np.float64),
        (texts(Decimal("1.5"), 2), np.float64),
    ],
)
def test_dtypes(given: np.ndarray, dtype: type) -> None:
    assert numeric("v", given).dtype == dtype


def test_numbers_only() -> None:
    with pytest.raises(ValueError, match="column 'v': expected numbers, got 'low'; convert them"):
        numeric("v", texts(1.0, "low"))
    with pytest.raises(ValueError, match="values of type datetime64"):
        numeric("v", np.array(["2020-01-01"], "datetime64[D]"))
    with pytest.raises(ValueError, match="values of type complex128"):
        numeric("v", np.array([1j]))


def test_codes_follow_the_sorted_levels() -> None:
    codes, levels = encode("c", texts("q", "p", "q"), None, WHERE)
    assert levels == ("p", "q") and codes.tolist() == [1, 0, 1]
    assert encode("c", texts("q"), ("z", "q"), WHERE)[0].tolist() == [1]


def test_unseen_level_and_missing_text() -> None:
    with pytest.raises(ValueError, match="'c', task 'b', row 0 of that task: the level 'r' was not seen before"):
        encode("c", texts("p", "p", "r"), ("p", "q"), WHERE)
    with pytest.raises(ValueError, match="column 'c': missing text in task 'a', row 1"):
        encode("c", texts("p", None), None, WHERE)


def test_text_is_recognised() -> None:
    assert is_text(texts(1, "a")) and is_text(np.array(["a"])) and not is_text(texts(1, None))


def test_nan_and_infinity_are_located() -> None:
    with pytest.raises(
        ValueError, match=r"'v': 2 row\(s\) are NaN or missing, the first in task 'a', row 1 .*; drop or"
    ):
        check_finite("v", np.array([0.0, np.nan, np.nan, 1.0]), WHERE)
    with pytest.raises(ValueError, match=r"'v': 1 row\(s\) are infinite, the first in task 'b', row 1"):
        check_finite("v", np.array([0.0, 0.0, 0.0, -np.inf]), WHERE)


def test_covariate_checks_kind_against_known_levels() -> None:
    with pytest.raises(ValueError, match="'c': expected text, one of 'p', got numbers"):
        covariate("c", np.zeros(2), {"c": ("p",)}, WHERE)
    with pytest.raises(ValueError, match="'d': expected numbers, got 'p'"):
        covariate("d", texts("p"), {"c": ("p",)}, WHERE)
    with pytest.raises(ValueError, match="text must have one value a row"):
        covariate("c", np.full((2, 2), "a", dtype=object), None, WHERE)


def test_mixed_inputs() -> None:
    values = np.array([["p", 1], ["q", 2.5]], dtype=object)
    x, levels = inputs(("c", "v"), values, None, WHERE)
    assert levels == {"c": ("p", "q")}
    assert x.tolist() == [[0.0, 1.0], [1.0, 2.5]]


def test_inputs_are_floating() -> None:
    assert inputs(("v",), np.array([[1], [2]]), None, WHERE)[0].dtype == torch.float64
    assert inputs(("x",), np.zeros((2, 4, 4), np.uint8), None, WHERE)[0].dtype == torch.float32


def test_missing_labels_hold_an_observed_value() -> None:
    y, observed = labels("y", np.array([np.nan, 3.0, 2.0]), "mask", WHERE)
    assert y.tolist() == [2.0, 3.0, 2.0] and observed.tolist() == [False, True, True]
    y, observed = labels("y", np.array([[1.0, np.nan], [np.nan, 5.0]]), "mask", WHERE)
    assert y.tolist() == [[1.0, 5.0], [1.0, 5.0]]


def test_label_errors() -> None:
    with pytest.raises(ValueError, match='NaN or missing.*missing="mask" if labels are missing'):
        labels("y", np.array([np.nan]), "error", WHERE)
    for missing in ("error", "mask"):
        with pytest.raises(ValueError, match=r"1 row\(s\) are infinite, .*; drop these rows or correct the labels$"):
            labels("y", np.array([np.inf]), missing, WHERE)
    with pytest.raises(ValueError, match="output 'y': expected numbers, got text; code classes as integers"):
        labels("y", texts("cat"), "error", WHERE)
    with pytest.raises(ValueError, match='missing: expected "error" or "mask", got "?\'drop\''):
        labels("y", np.zeros(1), "drop", WHERE)


def test_example_label_prefers_a_complete_row() -> None:
    y = torch.tensor([[0.5, 0.1], [0.2, 0.8], [0.0, 0.0]])
    observed = torch.tensor([[True, True], [True, True], [False, True]])
    assert torch.equal(example_label(y, observed), y[0])
    assert example_label(torch.zeros(0, 2), torch.ones(0, 2, dtype=torch.bool)).tolist() == [1.0, 1.0]
    assert example_label(torch.tensor([4, 2]), torch.tensor([False, False])).item() == 1


def test_weights() -> None:
    assert weights("w", np.array([0, 2]), WHERE).tolist() == [0.0, 2.0]
    with pytest.raises(ValueError, match="weight 'w': expected weights from 0 on, got -1 in task 'a', row 1"):
        weights("w", np.array([1.0, -1.0]), WHERE)
    with pytest.raises(ValueError, match="expected one number a row or task, got text"):
        weights("w", texts("a"), WHERE)
    with pytest.raises(ValueError, match="NaN"):
        weights("w", np.array([np.nan]), WHERE)
