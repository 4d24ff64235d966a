"""What a fit keeps of its tasks: recognition with and without the data, and shells that stand in for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scenarios import make_tasks

from bayesmeta.data.tasks import Tasks
from bayesmeta.results.training_tasks import TrainingTasks, probe


def named(rows: dict[str, list[float]]) -> Tasks:
    return Tasks.from_arrays(None, [np.array(y, dtype=float) for y in rows.values()], names=list(rows))


ROWS = {"a": [1.0, 2.0], "b": [3.0], "c": []}


def reread(training: TrainingTasks, *, data: bool) -> TrainingTasks:
    return TrainingTasks.from_state(*training.state(data=data))


@pytest.mark.parametrize("data", [True, False])
def test_known_changed_and_new_tasks_are_told_apart(data: bool) -> None:
    training = reread(TrainingTasks(named(ROWS)), data=data)
    tasks = named({"new": [1.0], "b": [3.0], "a": [1.0, 2.0], "c": [], "d": []})
    found = training.sort(tasks, updated="error")
    assert (found.known.tolist(), found.changed.tolist(), found.new.tolist()) == ([1, 2, 3], [], [0, 4])


def test_changed_tasks_give_back_what_they_replace() -> None:
    training = TrainingTasks(named(ROWS))
    tasks = named({"b": [4.0], "a": [1.0]})
    found = training.sort(tasks, updated="replace")
    before = training.before(tasks[found.changed])
    assert found.changed.tolist() == [0, 1] and before.names == ("b", "a") and before.y.tolist() == [3.0, 1.0, 2.0]


def test_without_data_nothing_is_replaced_and_nothing_shown() -> None:
    training = reread(TrainingTasks(named(ROWS)), data=False)
    with pytest.raises(ValueError, match=r"evidence of the old data of task\(s\) \['b'\] must be taken out"):
        training.sort(named({"b": [4.0]}), updated="replace")
    with pytest.raises(ValueError, match="saved with data=False and has no training data; pass the tasks yourself"):
        _ = training.data
    with pytest.raises(ValueError, match="saved with data=False"):
        training.state(data=True)


@pytest.mark.parametrize("kind", ["real", "count", "missing", "outputs"])
def test_shells_have_the_sizes_of_the_data_and_none_of_their_values_but_one_row(kind: str) -> None:
    tasks = make_tasks(kind, weighted=True)
    shells = reread(TrainingTasks(tasks), data=False).table
    assert shells.names == tasks.names and shells.sizes.tolist() == tasks.sizes.tolist()
    assert shells.identities() == tasks.identities() and shells.schema == tasks.schema
    assert len(torch.unique(shells.x, dim=0)) == 1
    batch, other = shells.batch([0, 1]), tasks.batch([0, 1])
    assert {k: (v.shape, v.dtype) for k, v in batch.tensors.items()} == {
        k: (v.shape, v.dtype) for k, v in other.tensors.items()
    }


def test_the_file_without_data_holds_no_data() -> None:
    tensors, _ = TrainingTasks(named(ROWS)).state(data=False)
    assert set(tensors) == {"offsets", "index"}


def test_the_probe_is_one_row() -> None:
    tasks = make_tasks("count")
    one = probe(tasks.schema)
    assert one.sizes.tolist() == [1] and one.schema == tasks.schema


def test_the_digest_covers_names_data_and_order() -> None:
    first = TrainingTasks(named(ROWS))
    assert first.digest() == reread(first, data=False).digest() == TrainingTasks(named(ROWS)).digest()
    others = ({"a": [1.0, 2.0], "b": [3.5], "c": []}, {"b": [3.0], "a": [1.0, 2.0], "c": []}, {**ROWS, "d": []})
    assert len({TrainingTasks(named(rows)).digest() for rows in others} | {first.digest()}) == 4


def test_a_damaged_state_is_refused() -> None:
    tensors, plain = TrainingTasks(named(ROWS)).state(data=False)
    with pytest.raises(ValueError, match=r"stored tasks: \['offsets'\] missing; the file is damaged"):
        TrainingTasks.from_state({k: v for k, v in tensors.items() if k != "offsets"}, plain)
