from __future__ import annotations

import json
import pickle
import time

import numpy as np
import pandas as pd
import pytest
import torch

from bayesmeta.data.tasks import Tasks


@pytest.fixture
def tasks() -> Tasks:
    return Tasks.from_arrays(
        [[[1.0], [2.0], [3.0]], [[4.0]], [[5.0], [6.0]]],
        [[3, 2, 4], [7], [5, 6]],
        columns={"n": [[9, 9, 9], [8], [7, 7]]},
        task_columns={"u": [0.1, 0.2, 0.3]},
        names=["a", "b", "c"],
    )


def unnamed(shift: float = 0.0) -> Tasks:
    return Tasks.from_arrays(None, [[1.0 + shift, 2.0], [3.0], [4.0], [5.0]])


def test_selecting(tasks: Tasks) -> None:
    assert len(tasks) == 3 and repr(tasks) == "Tasks(3 tasks, 6 rows, x=['x0'], y=['y'])"
    assert tasks["b"].names == tasks[1].names == tasks[-2].names == ("b",)
    assert tasks["b"].y.tolist() == [7] and tasks["b"].task_columns["u"].tolist() == [0.2]
    assert tasks[1:].names == ("b", "c") and tasks[["c", "a"]].y.tolist() == [5, 6, 3, 2, 4]
    assert tasks[tasks.sizes > 1].names == ("a", "c")
    assert [task.names[0] for task in tasks] == ["a", "b", "c"]
    assert tasks[1:].schema is tasks.schema


def test_errors_of_selection(tasks: Tasks) -> None:
    with pytest.raises(ValueError, match="unknown task 'd'; known: 'a', 'b', 'c'"):
        tasks["d"]
    with pytest.raises(ValueError, match="index 3 is out of range: there are 3 tasks"):
        tasks[3]
    with pytest.raises(ValueError, match="duplicated names: task 'b' is selected twice"):
        tasks[[0, 1, 1]]


def test_one_task_is_no_error() -> None:
    assert len(Tasks.from_arrays(None, [[1.0]])) == 1


def test_batch(tasks: Tasks) -> None:
    batch = tasks.batch([2, 0, 2])
    assert batch.names == ("c", "a", "c") and batch.n.tolist() == [2, 3, 2]
    assert batch.x[..., 0].tolist() == [[5.0, 6.0, 6.0], [1.0, 2.0, 3.0], [5.0, 6.0, 6.0]]
    assert tasks.batch("b", rows=4).y.tolist() == [[7] * 4] and tasks.batch(slice(None)).n.tolist() == [3, 1, 2]
    with pytest.raises(ValueError, match="rows: expected at least 3, the size of the largest of these tasks, got 2"):
        tasks.batch([0], rows=2)
    with pytest.raises(ValueError, match="index 9 is out of range"):
        tasks.batch([9])


def test_split_by_task() -> None:
    tasks = Tasks.from_arrays(None, [[float(i)] for i in range(50)])
    known, new = tasks.split(new=0.2, seed=3)
    assert len(new) == 10 and sorted(known.names + new.names, key=int) == list(tasks.names)
    assert list(new.names) == sorted(new.names, key=int)
    assert tasks.split(new=10, seed=3)[1].names == new.names != tasks.split(new=10, seed=4)[1].names
    assert len(tasks.split(new=np.int64(7), seed=0)[1]) == 7 and len(tasks.split(new=0.001, seed=0)[1]) == 1
    for wrong in (0, 50, 1.0, -0.1, True):
        with pytest.raises(ValueError, match="new: expected a number of tasks from 1 to 49 or a fraction"):
            tasks.split(new=wrong, seed=0)


def test_every_task_is_equally_likely_to_be_new() -> None:
    tasks = unnamed()
    hits = np.zeros(4)
    for seed in range(1000):
        hits[[int(name) for name in tasks.split(new=1, seed=seed)[1].names]] += 1
    assert np.abs((hits - 250) / np.sqrt(1000 * 0.25 * 0.75)).max() < 4


def test_context_and_target(tasks: Tasks) -> None:
    context, target = tasks.context_target(context=1, seed=0)
    assert context.names == target.names == tasks.names
    assert context.sizes.tolist() == [1, 1, 1] and target.sizes.tolist() == [2, 0, 1]
    assert sorted(context.y.tolist() + target.y.tolist()) == sorted(tasks.y.tolist())
    assert torch.equal(context.task_columns["u"], tasks.task_columns["u"])
    again = tasks.context_target(context=1, seed=0)[0]
    assert torch.equal(again.y, context.y)
    none, everything = tasks.context_target(context=0, seed=0)
    assert tasks.without_rows().fingerprints() == none.fingerprints()
    assert none.sizes.tolist() == [0, 0, 0] and torch.equal(everything.y, tasks.y)
    assert none.batch([0, 1]).y.tolist() == [[2], [2]] and not none.batch([0]).mask.any()
    assert tasks.context_target(context=1.0, seed=0)[1].sizes.tolist() == [0, 0, 0]


def test_given_names_are_identities(tasks: Tasks) -> None:
    assert tasks.identities() == ("a", "b", "c")


def test_unnamed_tasks_are_known_by_their_collection() -> None:
    tasks, again = unnamed(), unnamed()
    identities = tasks.identities()
    assert len(set(identities)) == 4 and identities[2].endswith("#2")
    assert again.identities() == identities
    assert tasks[2:].identities() == identities[2:] and again[[3, 1]].identities() == (identities[3], identities[1])
    known, new = unnamed().split(new=2, seed=0)
    assert set(known.identities()) | set(new.identities()) == set(identities)
    assert tasks.context_target(context=1, seed=0)[0].identities() == identities
    assert not set(unnamed(shift=1e-9).identities()) & set(identities)
    assert not set(tasks[:2].identities()) & set(Tasks.from_arrays(None, [[1.0, 2.0], [3.0]]).identities())


def test_new_rows_for_the_same_tasks(tasks: Tasks) -> None:
    at = tasks.at(np.array([0.0, 1.0]), columns={"n": np.array([5, 6])})
    assert at.names == tasks.names and at.sizes.tolist() == [2, 2, 2] and at.y.tolist() == [2] * 6
    assert at.columns["n"].tolist() == [5, 6] * 3 and torch.equal(at.task_columns["u"], tasks.task_columns["u"])
    assert at.x.dtype == torch.float64 and at.observed.all()


def test_tasks_at_the_rows_of_others(tasks: Tasks) -> None:
    context, target = tasks.context_target(context=1, seed=0)
    at = context.at(target[["c", "a", "b"]])
    assert at.names == tasks.names and torch.equal(at.y, target.y) and at.sizes.tolist() == [2, 0, 1]
    assert torch.equal(at.columns["n"], target.columns["n"])
    with pytest.raises(ValueError, match="must have the same names; missing: 'c'; surplus: none"):
        context.at(target[:2])
    with pytest.raises(ValueError, match="columns: Tasks as x bring their own columns"):
        context.at(target, columns={"n": np.ones(2)})


def test_weights_are_dropped_at_new_rows() -> None:
    tasks = Tasks.from_arrays([[1.0], [2.0]], [[1.0], [2.0]], weight=[[2.0], [3.0]], task_weight=[1.0, 2.0])
    for at in (tasks.at(np.zeros(2)), tasks.at(tasks)):
        assert at.weight is None and at.task_weight is None and at.schema.weight is None
        assert set(at.batch([0]).tensors) == {"x", "y", "observed", "mask", "n"}


def test_missing_labels_stay_missing_at_the_rows_of_others() -> None:
    tasks = Tasks.from_arrays(None, [[1.0, np.nan]], missing="mask")
    at = tasks.at(tasks)
    assert at.observed.tolist() == [True, False] and at.schema.missing
    assert not tasks.at(np.zeros((1, 0))).schema.missing


def test_other_labels_and_copies(tasks: Tasks) -> None:
    simulated = tasks.with_labels(tasks.y.double() + 0.5)
    assert simulated.names == tasks.names and simulated.schema.placeholder().item() == 2.5
    assert simulated.fingerprints() != tasks.fingerprints()
    assert unnamed().with_labels(unnamed().y + 1).identities() != unnamed().identities()
    with pytest.raises(ValueError, match=r"y: expected labels of shape \(6,\), got \(5,\)"):
        tasks.with_labels(tasks.y[:5])
    copies = tasks.copies([1, 1, 0], names=["s0", "s1", "s2"])
    assert copies.names == ("s0", "s1", "s2") and copies.sizes.tolist() == [1, 1, 3]
    with pytest.raises(ValueError, match="names: expected one name a task, 2 in all, got a list of length 1"):
        tasks.copies([1, 1], names=["s0"])


def test_only_one_output() -> None:
    nan = float("nan")
    x, names = [[[1.0], [2.0]], [[3.0]]], ["a", "b"]
    both = Tasks.from_arrays(x, [[[1.0, nan], [2.0, 5.0]], [[nan, 7.0]]], missing="mask", names=names)
    alone = Tasks.from_arrays(x, [[nan, 5.0], [7.0]], missing="mask", names=names)
    for k in (1, "y1", -1):
        one = both.only(k)
        assert one.names == both.names and one.schema.y == ("y1",) and one.schema.y_shape == ()
        assert torch.equal(one.observed, alone.observed) and torch.equal(one.y[one.observed], alone.y[alone.observed])
        batch, want = one.batch([1, 0]), both.batch([1, 0]).only(k)
        assert all(torch.equal(batch.tensors[key], want.tensors[key]) for key in want.tensors)
    assert both.schema.y == ("y0", "y1") and both.y.shape == (3, 2) and both.fingerprints() != one.fingerprints()
    assert one[["b"]].y.tolist() == [7.0] and one.without_rows().batch([0]).y.tolist() == [[one.schema.placeholder()]]
    with pytest.raises(ValueError, match="unknown output 'y2'; known: 'y0', 'y1'"):
        both.only("y2")


def test_the_one_output_is_the_label(tasks: Tasks) -> None:
    assert tasks.only(0) is tasks and tasks.only("y") is tasks
    with pytest.raises(ValueError, match="unknown output 1; known: 'y'. Outputs are counted 0 … 0"):
        tasks.only(1)


@pytest.mark.parametrize("named", [True, False])
def test_state_round_trip(tasks: Tasks, named: bool) -> None:
    kept = tasks[1:] if named else unnamed()[1:]
    tensors, plain = kept.state()
    read = Tasks.from_state(tensors, json.loads(json.dumps(plain)))
    assert read.identities() == kept.identities() and read.fingerprints() == kept.fingerprints()
    assert read.schema == kept.schema and torch.equal(read.batch([0, 1]).y, kept.batch([0, 1]).y)
    assert read[1:].identities() == kept[1:].identities()
    del tensors["index"]
    with pytest.raises(ValueError, match="'index' or 'origin' missing; the file is damaged"):
        Tasks.from_state(tensors, plain)


def test_pickles(tasks: Tasks) -> None:
    assert pickle.loads(pickle.dumps(tasks)).fingerprints() == tasks.fingerprints()


def test_nothing_global_changes() -> None:
    state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    unnamed().split(new=1, seed=0)
    unnamed().context_target(context=1, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()


def test_a_million_rows() -> None:
    """The bars: loaded in 3 s, a batch of 256 in 1 ms, fingerprints in about 1 s; process time, the best of a few."""
    rng = np.random.default_rng(0)
    task = rng.permutation(np.repeat(np.arange(100_000), 10))
    df = pd.DataFrame({"task": task, "v": rng.normal(size=1_000_000), "y": rng.normal(size=1_000_000)})
    start = time.process_time()
    tasks = Tasks.from_dataframe(df, task="task", x=["v"], y="y")
    loaded = time.process_time() - start
    first = df[df.task == task[0]]
    assert len(tasks) == 100_000 and tasks[0].y.tolist() == first.y.tolist()
    start = time.process_time()
    assert len(set(tasks.fingerprints())) == 100_000
    printed = time.process_time() - start
    index, spans = torch.from_numpy(rng.integers(0, 100_000, 256)), []
    for _ in range(50):
        start = time.process_time()
        tasks.batch(index)
        spans.append(time.process_time() - start)
    assert loaded < 3.0 and printed < 2.0 and min(spans) < 1e-3, (loaded, printed, min(spans))


def test_merged_tasks_are_one_with_columns_of_its_rows() -> None:
    tasks = Tasks.from_arrays(
        [[1.0, 2.0], [], [3.0]],
        [[1.0, 2.0], [], [3.0]],
        columns={"site": [["a", "b"], [], ["b"]]},
        task_columns={"se": [0.1, 0.2, 0.3], "kind": ["u", "v", "v"]},
        weight=[[1.0, 2.0], [], [3.0]],
        task_weight=[1.0, 5.0, 2.0],
    )
    one = tasks.merged("all")
    assert one.names == ("all",) and one.sizes.tolist() == [3] and not one.task_columns
    assert one.schema.columns == ("site", "se", "kind") and one.schema.task_columns == ()
    assert one.columns["se"].tolist() == [0.1, 0.1, 0.3] and one.columns["kind"].tolist() == [0, 0, 1]
    assert one.weight is not None and one.weight.tolist() == [1.0, 2.0, 6.0] and one.task_weight is None
    batch = one.batch([0])
    assert batch["se"].shape == (1, 3) and batch.x.tolist() == [[1.0, 2.0, 3.0]]
    weighed = Tasks.from_arrays([[1.0], [2.0]], [[1.0], [2.0]], task_weight=[4.0, 2.0]).merged("all")
    assert weighed.weight is not None and weighed.weight.tolist() == [4.0, 2.0]
