from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from bayesmeta.data.tasks import Tasks
from bayesmeta.inference.chunks import (
    CHUNK_ELEMENTS,
    COUPLED_ENTRIES,
    GRAPH_ELEMENTS,
    PIECE_ELEMENTS,
    different,
    like_sizes,
    padded_rows,
    task_chunks,
    theta_chunks,
)

SIZES = [0, 1, 3, 4, 5, 17, 2, 64, 65, 4]


def tasks() -> Tasks:
    return Tasks.from_arrays([np.zeros((n, 1)) for n in SIZES], [np.arange(n, dtype=float) for n in SIZES])


def test_padded_sizes_are_powers_of_four() -> None:
    assert [padded_rows(n) for n in (0, 1, 2, 4, 5, 16, 17, 64, 65)] == [1, 1, 4, 4, 16, 16, 64, 64, 256]


@pytest.mark.parametrize("exact_size", [False, True])
@pytest.mark.parametrize("limit", [1, 2, 100])
def test_chunks_hold_every_task_once_with_all_its_rows(exact_size: bool, limit: int) -> None:
    seen: list[int] = []
    for chunk in task_chunks(tasks(), exact_size=exact_size, limit=limit):
        sizes = [SIZES[i] for i in chunk.index]
        assert len(sizes) <= limit
        assert chunk.batch.n.tolist() == sizes
        assert chunk.batch.mask.sum(1).tolist() == sizes
        if exact_size:
            assert len(set(sizes)) == 1 or max(sizes) <= 1
            assert chunk.batch.mask.shape[1] == max(1, sizes[0])
        else:
            assert chunk.batch.mask.shape[1] <= padded_rows(max(sizes))
        seen += chunk.index.tolist()
    assert sorted(seen) == list(range(len(SIZES)))


def test_chunks_of_a_group_have_one_shape() -> None:
    shapes = [chunk.batch.mask.shape[1] for chunk in task_chunks(tasks(), exact_size=False, limit=1)]
    assert len(set(shapes)) == len({padded_rows(n) for n in SIZES})


def test_where_few_draws_are_evaluated_tasks_of_all_sizes_are_together() -> None:
    few = [chunk.index.tolist() for chunk in task_chunks(tasks(), exact_size=False, draws=100)]
    assert few == [list(range(len(SIZES)))]
    some = [chunk.batch.mask.shape[1] for chunk in task_chunks(tasks(), exact_size=False, draws=5000)]
    assert some == [5, 65]  # 5 beside 1 and 64 beside 17 cost less than another graph, all beside 65 more
    many = list(task_chunks(tasks(), exact_size=False, draws=GRAPH_ELEMENTS))
    assert len(many) == len({padded_rows(n) for n in SIZES})
    assert len(list(task_chunks(tasks(), exact_size=True, draws=1))) == len({max(1, n) for n in SIZES})


def test_chunks_of_theta_put_together_are_theta() -> None:
    batch = tasks().batch(range(len(SIZES)))
    count = 3 * CHUNK_ELEMENTS // batch.mask.numel() + 1
    theta = torch.randn(count, 2)
    found = torch.full_like(theta, torch.nan)
    lengths = set()
    for place, part in theta_chunks(theta, batch):
        lengths.add(len(part))
        found[place] = part[: place.stop - place.start]
    assert torch.equal(found, theta)
    assert len(lengths) == 1
    assert lengths.pop() * batch.mask.numel() < 1.5 * CHUNK_ELEMENTS


def cost(groups: list[np.ndarray], sizes: np.ndarray, draws: int) -> int:
    return sum(PIECE_ELEMENTS + draws * len(g) * max(1, int(sizes[g].max())) for g in groups)


def test_groups_of_like_size_cost_least() -> None:
    sizes = np.array([1, 400, 3, 900, 390, 2, 7])
    for draws in (1, 40, 1000):
        groups = like_sizes(sizes, draws=draws)
        assert sorted(np.concatenate(groups).tolist()) == list(range(len(sizes)))
        order = np.argsort(sizes)
        every = [
            [order[a:b] for a, b in itertools.pairwise([0, *cuts, len(sizes)])]
            for count in range(len(sizes))
            for cuts in itertools.combinations(range(1, len(sizes)), count)
        ]
        assert cost(groups, sizes, draws) == min(cost(g, sizes, draws) for g in every)
    assert len(like_sizes(sizes, draws=1)) == 1 < len(like_sizes(sizes, draws=1000))


def test_rounded_chunks_have_few_shapes_and_every_row() -> None:
    """Whatever the number of tasks and their sizes, numbers of tasks and rows are powers of two, within the limit."""
    shapes = set()
    for count in range(1, 24):
        tasks = Tasks.from_arrays(None, [np.arange(1 + (7 * i) % 13, dtype=float) for i in range(count)])
        seen = []
        for chunk in task_chunks(tasks, exact_size=False, limit=8, rounded=True):
            shapes.add(tuple(chunk.batch.mask.shape))
            seen += chunk.index.tolist()
            assert chunk.batch.n[: len(chunk.index)].tolist() == tasks.sizes[chunk.index].tolist()
        assert sorted(seen) == list(range(count))
    assert shapes <= {(t, n) for t in (1, 2, 4, 8) for n in (1, 2, 4, 8, 16)}
    exact = [c.batch.mask.shape[1] for c in task_chunks(tasks, exact_size=True, rounded=True)]
    assert sorted(set(exact)) == sorted(set(tasks.sizes.tolist()))


def test_repeated_draws_of_theta_are_taken_once() -> None:
    theta = torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    with torch.no_grad():
        some, place = different(theta)
    assert len(some) == 4 and torch.equal(some[place], theta) and len(set(place.tolist())) == 3
    some, place = different(theta)
    assert some is theta and place.tolist() == [0, 1, 2, 3, 4], "gradients cannot pass through a choice"
    point = torch.tensor([0.5, 1.0], requires_grad=True)
    some, place = different(point.expand(6, -1))
    assert some.shape == (1, 2) and place.tolist() == [0] * 6
    some[place].sum().backward()
    assert point.grad is not None and point.grad.tolist() == [6.0, 6.0]
    some, place = different(torch.zeros(7, 0))
    assert some.shape == (1, 0) and some[place].shape == (7, 0)


def test_coupled_tasks_are_cut_by_the_size_of_their_covariances() -> None:
    """70 tasks of 20 rows: chunks of one shape, none larger than the bound, and few θ at once."""
    many = Tasks.from_arrays(None, [np.arange(20.0)] * 70)
    chunks = list(task_chunks(many, exact_size=True, rounded=True))
    shapes = {tuple(chunk.batch.mask.shape) for chunk in chunks}
    assert shapes == {(16, 20)} and 16 * 20**2 <= COUPLED_ENTRIES < 32 * 20**2
    assert sorted(i for chunk in chunks for i in chunk.index) == list(range(70))
    (alone,) = task_chunks(Tasks.from_arrays(None, [np.arange(200.0)] * 2)[:1], exact_size=True)
    assert alone.batch.mask.shape == (1, 200)
    theta = torch.arange(1000.0).reshape(-1, 1)
    parts = list(theta_chunks(theta, chunks[0].batch, exact_size=True))
    assert all(part.numel() * 16 * 20**2 <= 1.1 * CHUNK_ELEMENTS for _, part in parts)
    torch.testing.assert_close(torch.cat([part[: place.stop - place.start] for place, part in parts]), theta)
