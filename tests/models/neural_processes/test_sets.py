"""Reading of contexts: units, masks, missing labels, and the mean of a set that may be empty."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import bayesmeta as bm
from bayesmeta.models.neural_processes import cnp
from bayesmeta.models.neural_processes.outputs import Bernoulli, Categorical, Normal
from bayesmeta.models.neural_processes.sets import NeuralProcess, Pool, Reader, initial, mlp, sizes_of


def tasks(**options: object) -> bm.Tasks:
    rng = np.random.default_rng(0)
    x = [10 + 3 * rng.normal(size=(n, 2)) for n in (3, 1, 4)]
    return bm.Tasks.from_arrays(x, [1000 + 7 * rng.normal(size=len(row)) for row in x], **options)  # type: ignore[arg-type]


def test_rows_are_in_standard_units_and_predictions_in_the_users() -> None:
    data = tasks()
    reader = Reader(data)
    rows = reader(data.batch(slice(None)))
    assert rows.kept.sum(1).tolist() == [3, 1, 4]
    for part in (rows.x[rows.kept], rows.labels[rows.kept]):
        torch.testing.assert_close(part.mean(0), torch.zeros(part.shape[1]), atol=1e-4, rtol=0)
        torch.testing.assert_close(part.std(0, correction=0), torch.ones(part.shape[1]), atol=1e-4, rtol=0)
    labels = reader.distribution(torch.zeros(1, 1, 2))
    assert float(labels.mean) == pytest.approx(float(data.y.mean()))
    assert float(labels.stddev) == pytest.approx(float(data.y.std(correction=0)), rel=1e-5)


def test_constants_and_no_inputs() -> None:
    data = bm.Tasks.from_arrays(None, [[2.0, 2.0], [2.0]])
    rows = Reader(data)(data.batch(slice(None)))
    assert rows.x.tolist() == [[[1.0], [1.0]]] * 2 and (rows.labels == 0).all()


def test_missing_labels_count_nowhere() -> None:
    y = [[[1.0, np.nan], [3.0, 5.0]], [[np.nan, np.nan], [2.0, np.nan]]]
    data = bm.Tasks.from_arrays(None, y, missing="mask")
    reader = Reader(data)
    assert reader.y_loc.tolist() == [2.0, 5.0] and reader.width == 4
    rows = reader(data.batch(slice(None)))
    assert rows.kept.tolist() == [[True, True], [False, True]]
    assert rows.labels[..., 2:].tolist() == [[[1, 0], [1, 1]], [[0, 0], [1, 0]]]
    assert rows.labels[0, 0, 1] == 0 and (rows.labels[1, 0, :2] == 0).all()


def test_one_missing_label_is_a_row_less() -> None:
    data = bm.Tasks.from_arrays(None, [[1.0, np.nan], [2.0, 3.0]], missing="mask")
    reader = Reader(data)
    assert reader.width == 1
    assert reader(data.batch(slice(None))).kept.tolist() == [[True, False], [True, True]]


def test_classes_are_read_as_indicators() -> None:
    data = bm.Tasks.from_arrays(None, [[0, 2], [1, 1]])
    assert Reader(data, Categorical(3))(data.batch([0])).labels.tolist() == [[[1, 0, 0], [0, 0, 1]]]


def test_joined_rows() -> None:
    data = tasks()
    reader = Reader(data)
    rows = reader(data.batch([0]))
    both = rows.join(reader(data.batch([2])))
    assert both.features.shape == (1, 7, 3) and both.kept.shape == (1, 7)
    torch.testing.assert_close(both.x[:, :3], rows.x)


def test_the_mean_of_a_set_has_one_row_more() -> None:
    pool = Pool(2)
    encoded = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[9.0, 9.0], [9.0, 9.0]]])
    found = pool(encoded, torch.tensor([[True, True], [False, False]]))
    torch.testing.assert_close(found[0], (pool.null + torch.tensor([4.0, 6.0])) / 3)
    torch.testing.assert_close(found[1], pool.null)


def test_initial_weights_come_from_their_seed_and_leave_the_callers_state() -> None:
    state = torch.get_rng_state()
    first, again, other = (cnp.build(tasks(), seed=seed).module.state_dict() for seed in (0, 0, 1))  # type: ignore[attr-defined]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert not torch.equal(first["pool.null"], other["pool.null"])
    with initial(3):
        pass
    assert torch.equal(torch.get_rng_state(), state)


def test_context_sizes() -> None:
    assert sizes_of(tasks(), None) == (0, 3) and sizes_of(tasks(), (1, 2)) == (1, 2)
    assert len(mlp([2, 3, 4])) == 3


def test_a_base_needs_a_decoder() -> None:
    data = tasks()
    with pytest.raises(NotImplementedError):
        NeuralProcess(Reader(data))(data.batch([0]), data.batch([0]).x)


def test_errors() -> None:
    text = bm.Tasks.from_dataframe(_frame(), task="t", x=["kind"], y="y")
    with pytest.raises(ValueError, match=r"got text in \['kind'\]; give a 0/1 column"):
        Reader(text)
    with pytest.raises(ValueError, match="output: expected one of bm.models.neural_processes.outputs, got 'normal'"):
        Reader(tasks(), "normal")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected labels 0 … 1"):
        Reader(tasks(), Bernoulli())
    with pytest.raises(ValueError, match="got an output without any"):
        Reader(tasks().without_rows(), Normal())
    for bad in (0, 2.0, True):
        with pytest.raises(ValueError, match=rf"cnp: expected width as a whole number ≥ 1, got {bad}"):
            cnp.build(tasks(), width=bad)  # type: ignore[arg-type]


def _frame() -> object:
    import pandas

    return pandas.DataFrame({"t": [0, 0, 1], "kind": ["a", "b", "a"], "y": [0.0, 1.0, 2.0]})
