"""All tasks together: every task once, blocks of one shape, data computed once, single precision made double."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import ROWS, centre, drawn_rows, exact, make_tasks
from scenarios import make_net, network
from scenarios import make_tasks as scenario_tasks
from torch import Tensor

import bayesmeta as bm
from bayesmeta.hierarchy import derivatives
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference import collected
from bayesmeta.inference.collected import Block, Collected, in_double

SIZES = (1, 2, 7, 0, 30)


def gathered(monkeypatch: pytest.MonkeyPatch, most: int, *, points: int = 1) -> Collected:
    monkeypatch.setattr(collected, "BLOCK_ELEMENTS", most)
    tasks = make_tasks(drawn_rows(40, seed=0, sizes=SIZES))
    return Collected(TaskDensity(centre, tasks), tasks, points=points)


@pytest.mark.parametrize(("most", "points"), [(2**20, 1), (60, 1), (60, 5), (1, 1)])
def test_every_task_is_there_once(monkeypatch: pytest.MonkeyPatch, most: int, points: int) -> None:
    found = gathered(monkeypatch, most, points=points)
    index = np.concatenate([piece.index for block in found.blocks for piece in block.pieces])
    assert sorted(index) == list(range(40))
    np.testing.assert_array_equal(index[found.order.numpy()], np.arange(40))
    assert sum(block.count for block in found.blocks) == 40
    sizes = np.maximum(np.array([SIZES[i % 5] for i in range(40)]), 1)
    assert found.elements == points * sizes.sum()


def test_few_tasks_are_one_block_and_many_share_their_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(gathered(monkeypatch, 2**20).blocks) == 1
    many = gathered(monkeypatch, 120)
    assert len({block.shape for block in many.blocks}) < len(many.blocks)
    whole = many.blocks[:-1]
    assert all(len(b.pieces) == 1 and b.count * b.leaves[0].shape[1] <= 120 for b in whole)


def test_rows_of_least_squares_are_condensed_alike_in_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = gathered(monkeypatch, 2**20), gathered(monkeypatch, 120)
    assert [len(piece.index) for piece in few.blocks[0].pieces] == [40]
    graphs = {(id(piece.graph), piece.leaves[1].shape) for block in many.blocks for piece in block.pieces}
    assert len(graphs) == len({shape for _, shape in graphs})
    assert any("linalg_qr" in str(node.target) for node in few.blocks[0].pieces[0].graph.graph.nodes)  # type: ignore[attr-defined]


def test_tasks_stay_in_pieces_where_another_term_sees_every_row() -> None:
    def both(batch: bm.Batch) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with batch.tasks():
            a = pyro.sample("a", dist.Normal(mu, 1.0))
            with batch.observations():
                pyro.sample("y", dist.Normal(a, 0.5), obs=batch.y)
                pyro.sample("n", dist.Poisson((a + batch["x"]).exp()), obs=batch["n"])

    sizes = [5] * 40 + [2000]
    columns = {"x": [np.linspace(0, 1, n) for n in sizes], "n": [np.ones(n) for n in sizes]}
    tasks = bm.Tasks.from_arrays(None, [np.zeros(n) for n in sizes], columns=columns)
    assert [len(piece.index) for piece in Collected(TaskDensity(both, tasks), tasks).blocks[0].pieces] == [40, 1]


def summed(block: Block, theta: Tensor, noise: Tensor, *leaves: Tensor) -> tuple[Tensor]:
    return (torch.stack([p.sum() for p in block.by_piece(one, theta, noise, leaves)]).sum(),)


def one(graph: Any, theta: Tensor, noise: Tensor, leaves: Any) -> Tensor:
    return graph(theta, noise, *leaves)


@pytest.mark.parametrize("most", [2**20, 120])
def test_compiled_functions_have_the_data_of_their_block(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    made: list[int] = []
    monkeypatch.setattr(derivatives, "compile_graph", lambda graph, leaves: made.append(1) or graph)
    found = gathered(monkeypatch, most)
    theta = torch.tensor([0.7], dtype=torch.float64)
    functions = found.by_block(summed, lambda block: (theta, torch.zeros(block.count, 1, dtype=theta.dtype)))
    total = sum(
        float(f(theta, torch.full((b.count, 1), 0.3, dtype=theta.dtype))[0])
        for f, b in zip(functions, found.blocks, strict=True)
    )
    tasks = make_tasks(drawn_rows(40, seed=0, sizes=SIZES))
    batch = tasks.batch(slice(None))
    noise = torch.full((40, 1), 0.3, dtype=torch.float64)
    assert total == pytest.approx(float(found.density.log_task(theta, noise, found.density.tensors(batch), {}).sum()))
    assert len(made) == len({block.shape for block in found.blocks})


def test_the_prior_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found, theta = gathered(monkeypatch, 120), torch.tensor([0.7], dtype=torch.float64)
    assert float(found.log_prior(theta, [])) == pytest.approx(float(found.density.log_prior(theta)))


def test_single_precision_becomes_double() -> None:
    tasks = make_tasks(ROWS)
    single = TaskDensity(centre, tasks, dtype=torch.float32)
    precise = in_double(single, tasks)
    assert precise.dtype == torch.float64 and in_double(precise, tasks) is precise
    assert exact(ROWS)[0].shape == (6,)


def test_learned_values_are_kept_in_double() -> None:
    tasks = scenario_tasks()
    single = TaskDensity(network(make_net()), tasks, dtype=torch.float32)
    moved = {name: value + 0.25 for name, value in single.learned.values.items()}
    single.learned.values.update(moved)
    precise = in_double(single, tasks)
    assert set(precise.learned.values) == set(moved)
    for name, value in precise.learned.values.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, moved[name].double(), rtol=0, atol=0)
