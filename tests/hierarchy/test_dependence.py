"""What a model's values depend on: rows, other sites, columns as places in a vector."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scenarios import make_tasks, radon
from torch import Tensor

import bayesmeta as bm
from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity


@pytest.mark.parametrize("reading", ["nothing", "task column", "x", "size", "loop", "padding"])
def test_what_reads_rows_is_known_whatever_the_rows_are(reading: str) -> None:
    def model(batch: Batch) -> None:
        seen = {
            "nothing": lambda: 0.0,
            "task column": lambda: batch["u"],
            "x": lambda: batch.x[:, :1],
            "size": lambda: batch.n.unsqueeze(-1).double(),
            "loop": lambda: sum(batch.mask[:, j : j + 1] * 1.0 for j in range(1, batch.x.shape[1])),
            "padding": lambda: 1.0 * (batch.x.shape[1] > 1),
        }[reading]()
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(seen, 1.0))
            with batch.observations():
                pyro.sample("y", dist.Normal(phi + batch.x, 1.0), obs=batch.y)

    y = [[0.1], [0.3, 0.2]]
    tasks = bm.Tasks.from_arrays([np.ones(1), np.ones(2)], y, task_columns={"u": [1.0, 2.0]})
    assert TaskDensity(model, tasks).values_read_rows == (reading not in ("nothing", "task column"))


def test_sites_are_inferred_scales_first_and_after_those_that_they_depend_on() -> None:
    def model(batch: Batch) -> None:
        with batch.tasks():
            mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
            spread = pyro.sample("spread", dist.Gamma(2.0, 1.0))
            parts = pyro.sample("parts", dist.Normal(mean.unsqueeze(-1).expand(-1, -1, 2), 1.0).to_event(1))
            last = pyro.sample("last", dist.LogNormal(parts[..., 0], spread))
            noise = pyro.sample("noise", dist.HalfNormal(1.0))
            with batch.observations():
                pyro.sample("y", dist.Normal(last, noise), obs=batch.y)

    assert TaskDensity(model, make_tasks()).stages == ((1, 5), (0,), (2, 3), (4,))
    assert len(TaskDensity(radon, make_tasks()).stages) == 1


@pytest.mark.parametrize(
    "look_up",
    [
        lambda effects, codes: effects[codes],
        lambda effects, codes: effects.index_select(0, codes.flatten()).reshape(codes.shape),
        lambda effects, codes: effects.expand(codes.shape[0], -1).gather(-1, codes),
    ],
)
def test_columns_that_are_places_in_a_vector_are_found(look_up: Callable[[Tensor, Tensor], Tensor]) -> None:
    def model(batch: Batch) -> None:
        effects = pyro.sample("effects", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with batch.tasks():
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with batch.observations():
                rate = a + look_up(effects, batch["place"]) + batch["trials"].log()
                pyro.sample("y", dist.Normal(rate, 1.0), obs=batch.y)

    columns = {"place": [[0, 2], [1]], "trials": [[3, 4], [5]]}
    tasks = Tasks.from_arrays(None, [[0.1, 0.2], [0.3]], columns=columns)
    assert TaskDensity(model, tasks).index_columns == {"column:place": 3}


def test_what_is_looked_up_in_a_table_of_constants_is_a_number() -> None:
    table = torch.linspace(0.0, 1.0, 50)

    def model(batch: Batch) -> None:
        with batch.tasks():
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with batch.observations():
                pyro.sample("y", dist.Normal(a + table[batch["age"]], 1.0), obs=batch.y)

    tasks = Tasks.from_arrays(None, [[0.1, 0.2], [0.3]], columns={"age": [[10, 20], [30]]})
    assert TaskDensity(model, tasks).index_columns == {}
