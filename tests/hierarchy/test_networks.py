from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.networks import EMBEDDING, MLP, ONE_HOT_LEVELS, RowInputs, segment_sum

SIZES = [3, 0, 1, 6]


def arrays(**options: Any) -> Tasks:
    generator = np.random.default_rng(0)
    x = [5 + 2 * generator.standard_normal((n, 2)) for n in SIZES]
    y = [generator.standard_normal(n) - 4 for n in SIZES]
    return Tasks.from_arrays(x, y, **options)


def frame(levels: int, **options: Any) -> Tasks:
    table = pd.DataFrame(
        {
            "task": np.repeat(["a", "b", "c", "d"], 12),
            "x": np.arange(48.0),
            "y": np.linspace(-1, 1, 48),
            "kind": [f"level {i % levels:02d}" for i in range(48)],
            "size": np.repeat([1.0, 2.0, 3.0, 6.0], 12),
        }
    )
    return Tasks.from_dataframe(table, task="task", x=["x"], y="y", columns=["kind"], task_columns=["size"], **options)


def test_segment_sums_are_sums_within_tasks() -> None:
    rows = torch.randn(6, 2, 3)
    segment = torch.tensor([2, 0, 2, 2, 0, 3])
    summed = segment_sum(rows, segment, 5)
    expected = [rows[[i for i in range(6) if segment[i] == task]].sum(0) for task in range(5)]
    torch.testing.assert_close(summed, torch.stack(expected))


def test_a_perceptron_has_activations_between_its_layers_and_can_start_at_zero() -> None:
    net = MLP([3, 5, 2])
    assert [type(layer) for layer in net] == [nn.Linear, nn.SiLU, nn.Linear]
    rows = torch.randn(4, 3)
    assert net(rows).abs().min() > 0
    assert net(rows).shape == (4, 2)
    assert torch.equal(MLP([3, 5, 2], zero=True)(rows), torch.zeros(4, 2))


def test_inputs_are_standardised_with_the_training_tasks() -> None:
    tasks = arrays()
    rows = RowInputs(tasks)(tasks.batch(range(4)))
    assert rows.inputs.shape == (10, 3)
    torch.testing.assert_close(rows.inputs.mean(0), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(rows.inputs.std(0, correction=0), torch.ones(3))
    assert rows.segment.tolist() == [0] * 3 + [2] + [3] * 6
    assert rows.count.tolist() == SIZES
    assert rows.weight is None and rows.task_inputs.shape == (4, 0)
    apart = RowInputs(tasks)(tasks.batch([3]))
    torch.testing.assert_close(apart.inputs, rows.inputs[4:])


def test_padding_changes_nothing() -> None:
    tasks = arrays()
    inputs = RowInputs(tasks)
    plain, padded = inputs(tasks.batch(range(4))), inputs(tasks.batch(range(4), rows=20))
    assert torch.equal(plain.inputs, padded.inputs) and torch.equal(plain.segment, padded.segment)
    assert torch.equal(plain.count, padded.count)


def test_a_constant_input_is_zero_and_not_divided_by_zero() -> None:
    tasks = Tasks.from_arrays([np.full((2, 1), 7.0)] * 2, [np.arange(2.0)] * 2)
    assert torch.equal(RowInputs(tasks)(tasks.batch([0])).inputs[:, 0], torch.zeros(2))


def test_missing_labels_are_zero_with_an_indicator() -> None:
    y = [np.array([[1.0, np.nan], [np.nan, np.nan], [3.0, 4.0]]), np.array([[2.0, 5.0]])]
    tasks = Tasks.from_arrays([np.zeros((3, 1)), np.zeros((1, 1))], y, missing="mask")
    inputs = RowInputs(tasks)
    rows = inputs(tasks.batch([0, 1]))
    assert inputs.width == rows.inputs.shape[1] == 5
    assert rows.count.tolist() == [2, 1]
    assert rows.inputs[:, 3:].tolist() == [[1, 0], [1, 1], [1, 1]]
    assert rows.inputs[0, 2] == 0


def test_levels_are_one_hot_and_task_columns_come_by_task() -> None:
    tasks = frame(3)
    inputs = RowInputs(tasks)
    rows = inputs(tasks.batch(range(4)))
    assert inputs.width == rows.inputs.shape[1] == 2 + 3
    assert torch.equal(rows.inputs[:, 2:], nn.functional.one_hot(torch.arange(48) % 3, 3).float())
    assert inputs.task_width == 1
    torch.testing.assert_close(rows.task_inputs[:, 0], (torch.tensor([1.0, 2, 3, 6]) - 3) / 3.5**0.5)


def test_many_levels_get_a_learned_embedding() -> None:
    tasks = frame(ONE_HOT_LEVELS + 1)
    inputs = RowInputs(tasks)
    rows = inputs(tasks.batch(range(4)))
    assert inputs.width == rows.inputs.shape[1] == 2 + EMBEDDING
    rows.inputs.sum().backward()
    assert [p.grad is not None for p in inputs.parameters()] == [True]


def test_weights_of_rows_and_tasks_multiply() -> None:
    weights = [np.full(n, 2.0) for n in SIZES]
    tasks = arrays(weight=weights, task_weight=np.array([1.0, 1.0, 3.0, 0.5]))
    rows = RowInputs(tasks)(tasks.batch(range(4)))
    expected = [2.0] * 3 + [6.0] + [1.0] * 6
    assert rows.weight is not None and rows.weight.tolist() == expected
    torch.testing.assert_close(rows.total(torch.ones(10, 1))[:, 0], torch.tensor([6.0, 0, 6, 6]))


@pytest.mark.parametrize("embed", [nn.Flatten(), nn.Sequential(nn.Flatten(), nn.Linear(12, 5))])
def test_an_embedding_takes_the_place_of_x(embed: nn.Module) -> None:
    x = torch.randn(4, 3, 4)
    tasks = Tasks.from_arrays([x.numpy(), x[:2].numpy()], [np.arange(4.0), np.arange(2.0)])
    inputs = RowInputs(tasks, embed=embed)
    rows = inputs(tasks.batch([0, 1]))
    expected: Tensor = embed(x)
    assert inputs.width == expected.shape[1] + 1
    torch.testing.assert_close(rows.inputs[:4, :-1], expected)


def test_columns_that_are_places_in_a_vector_are_levels() -> None:
    columns = {"place": [[0, 2], [1]], "trials": [[3, 4], [5]]}
    tasks = Tasks.from_arrays(None, [[0.1, 0.2], [0.3]], columns=columns)
    rows = RowInputs(tasks, indices={"column:place": 3})(tasks.batch(range(2)))
    assert RowInputs(tasks).width == 3 and rows.inputs.shape == (3, 5)
    assert torch.equal(rows.inputs[:, 1:4], torch.eye(3)[[0, 2, 1]])
