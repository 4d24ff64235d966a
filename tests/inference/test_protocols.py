"""The contracts: what a guide must bring, and the defaults of the rest (whole learners are in `test_rooms.py`)."""

from __future__ import annotations

import inspect

import pyro
import pytest
import torch
from conjugate import ROWS, Normals, make_tasks, setting
from torch import Tensor

from bayesmeta.inference.protocols import Context, SharedPosterior, TaskGuide


class Least(TaskGuide):
    """What one must write, and no more."""

    def condition(self, theta: Tensor, context: Context) -> Normals:
        zero = theta.new_zeros(len(theta), len(context.batch.names), 1)
        return Normals(zero, zero + 1.0)


def test_defaults_of_a_guide() -> None:
    density, _, tasks = setting(ROWS)
    guide, batch = Least(), tasks.batch([0, 1])
    data = density.tensors(batch)
    guide.attach(density, tasks)
    guide.follow(torch.zeros(1), torch.ones(1))
    context = guide.prepare(batch, data)
    assert context.batch is batch and context.data is data and context.summary == {}
    theta = torch.zeros(3, 1, dtype=torch.float64)
    assert guide(theta, context).sample().shape == (3, 2, 1)


def test_what_must_be_written_is_asked_for() -> None:
    assert inspect.isabstract(TaskGuide) and inspect.isabstract(SharedPosterior)
    with pytest.raises(TypeError, match="condition"):
        TaskGuide()  # type: ignore[abstract]
    with pytest.raises(TypeError, match="centre"):
        SharedPosterior()  # type: ignore[abstract]


def test_a_detached_context_is_cut_off_from_the_graph() -> None:
    batch = make_tasks(ROWS).batch([0])
    weight = torch.ones(2, requires_grad=True)
    context = Context(batch, {}, {"sums": 2 * weight})
    cut = context.detached()
    assert context.summary["sums"].requires_grad and not cut.summary["sums"].requires_grad
    assert torch.equal(cut.summary["sums"], context.summary["sums"].detach()) and cut.batch is batch


def test_pyro_is_left_alone() -> None:
    density, guides, tasks = setting(ROWS)
    context = guides.task.prepare(tasks.batch([0]), density.tensors(tasks.batch([0])))
    guides.task.condition(torch.zeros(2, 1, dtype=torch.float64), context).sample()
    assert len(pyro.get_param_store()) == 0
