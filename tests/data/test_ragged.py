from __future__ import annotations

import numpy as np
import pytest
import torch

from bayesmeta.data.ragged import (
    choose_rows,
    context_counts,
    from_state,
    gather,
    offsets_of,
    subset,
    take_rows,
    task_of_row,
    to_state,
    whole,
    without_weights,
)
from bayesmeta.data.tasks import Tasks


@pytest.fixture
def tasks() -> Tasks:
    weight = [[1.0, 1.0, 1.0], [], [2.0, 2.0]]
    return Tasks.from_arrays(
        [[1.0, 2.0, 3.0], [], [4.0, 5.0]], [[10, 20, 30], [], [40, 50]], weight=weight, task_weight=[1, 2, 3]
    )


def test_offsets_and_rows() -> None:
    offsets = offsets_of(torch.tensor([2, 0, 1]))
    assert offsets.tolist() == [0, 2, 2, 3]
    assert task_of_row(offsets).tolist() == [0, 0, 2]


def test_subset_in_any_order(tasks: Tasks) -> None:
    part = subset(tasks._data, torch.tensor([2, 1, 0]))
    assert part.names == ("2", "1", "0") and part.offsets.tolist() == [0, 2, 2, 5]
    assert part.rows["x"].tolist() == [4.0, 5.0, 1.0, 2.0, 3.0]
    assert part.per_task["task_weight"].tolist() == [3.0, 2.0, 1.0]


def test_take_rows_keeps_every_task(tasks: Tasks) -> None:
    part = take_rows(tasks._data, torch.tensor([False, False, False, True, False]))
    assert part.offsets.tolist() == [0, 0, 0, 1] and part.rows["y"].tolist() == [40]


def test_gather_pads_with_rows_of_the_task(tasks: Tasks) -> None:
    batch = gather(tasks._data, torch.tensor([0, 1, 2]), 4)
    assert batch["x"].tolist() == [[1.0, 2.0, 3.0, 3.0], [1.0] * 4, [4.0, 5.0, 5.0, 5.0]]
    assert batch["mask"].int().tolist() == [[1, 1, 1, 0], [0] * 4, [1, 1, 0, 0]]
    assert torch.equal(batch["observed"], batch["mask"])
    assert batch["weight"].tolist() == [[1.0, 1.0, 1.0, 0.0], [0.0] * 4, [2.0, 2.0, 0.0, 0.0]]
    assert batch["task_weight"].shape == (3, 1)


def test_gather_from_an_empty_table_uses_the_example(tasks: Tasks) -> None:
    nothing = take_rows(tasks._data, torch.zeros(5, dtype=torch.bool))
    batch = gather(nothing, torch.tensor([0, 2]), 2)
    assert batch["x"].tolist() == [[1.0, 1.0]] * 2 and batch["y"].tolist() == [[10, 10]] * 2
    assert not batch["mask"].any() and not batch["observed"].any()


def test_weights_can_be_dropped(tasks: Tasks) -> None:
    bare = without_weights(tasks._data)
    assert "weight" not in bare.rows and not bare.per_task and bare.schema.weight is None


def test_chosen_rows_are_uniform_within_each_task() -> None:
    offsets, counts = offsets_of(torch.tensor([4, 0, 2])), torch.tensor([2, 0, 1])
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([choose_rows(offsets, counts, generator) for _ in range(2000)]).double()
    assert (draws[:, :4].sum(1) == 2).all() and (draws[:, 4:].sum(1) == 1).all()
    z = (draws.mean(0) - 0.5) / np.sqrt(0.25 / 2000)
    assert z.abs().max() < 4
    both = draws[:, 0] * draws[:, 1]
    assert abs(both.mean() - 1 / 6) < 4 * np.sqrt(1 / 6 * 5 / 6 / 2000)


def test_context_counts() -> None:
    sizes = torch.tensor([0, 1, 5])
    assert context_counts(sizes, 3).tolist() == [0, 1, 3]
    assert context_counts(sizes, np.int64(2)).tolist() == [0, 1, 2]
    assert context_counts(sizes, 0.5).tolist() == [0, 1, 3]
    for wrong in (-1, 1.5, True, "all"):
        with pytest.raises(ValueError, match="context: expected a number of rows .* or a fraction between 0.0 and 1.0"):
            context_counts(sizes, wrong)  # type: ignore[arg-type]


def test_whole() -> None:
    assert whole(np.int32(3)) == 3 and whole(True) is None and whole(1.0) is None


def test_state_round_trip(tasks: Tasks) -> None:
    tensors, plain = to_state(tasks._data)
    read = from_state(tensors, plain)
    assert read.names == tasks.names and read.schema == tasks.schema
    assert all(torch.equal(read.rows[key], value) for key, value in tasks._data.rows.items())
    del tensors["rows/y"]
    with pytest.raises(ValueError, match="stored tasks: 'rows/y' missing; the file is damaged"):
        from_state(tensors, plain)
