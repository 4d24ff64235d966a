from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scenarios import make_tasks
from torch import Tensor

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.probing import first_rows


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def refused(model: Callable[[Batch], object], text: str, tasks: Tasks | None = None) -> bool:
    with pytest.raises(ValueError) as error:
        TaskDensity(model, tasks or make_tasks())
    assert text in str(error.value)
    return True


def with_mean(mean: Callable[[Tensor, Batch], Tensor]) -> Callable[[Batch], None]:
    def model(batch: Batch) -> None:
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            with batch.observations():
                pyro.sample("y", dist.Normal(mean(phi, batch), 1.0), obs=batch.y)

    return model


@pytest.mark.parametrize("sizes", [(3, 1, 0, 4), (3, 3, 3), (2, 2), (4,), (1,)])
def test_data_in_a_closure_must_be_a_column(sizes: tuple[int, ...]) -> None:
    tasks = make_tasks(sizes=sizes)
    by_task = torch.linspace(0.0, 1.0, len(sizes)).unsqueeze(-1)
    by_row = torch.zeros(len(sizes), max(sizes))
    text = "pass it as a column"
    if len(sizes) > 1:
        assert refused(with_mean(lambda phi, batch: phi + by_task), text, tasks)
        assert refused(with_mean(lambda phi, batch: phi + by_task[: len(batch) + 1, 0][:, None]), text, tasks)
    if max(sizes) > 1:
        assert refused(with_mean(lambda phi, batch: phi + by_row), text, tasks)
        assert refused(with_mean(lambda phi, batch: phi + by_row[0]), text, tasks)


def test_what_the_cure_says_works() -> None:
    density = TaskDensity(with_mean(lambda phi, batch: phi + batch["uranium"] + batch["se"]), make_tasks())
    assert not density.structure.exact_size


def test_one_latent_value_a_row_is_refused_even_as_an_event() -> None:
    def model(batch: Batch) -> None:
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0).expand([batch.x.shape[1]]).to_event(1))
            pyro.factor("y", -phi.square().sum(-1))

    assert refused(model, "its size must not depend on the tasks or rows")


def test_one_shared_value_a_task_is_refused() -> None:
    def model(batch: Batch) -> None:
        effects = pyro.sample("effects", dist.Normal(0.0, 1.0).expand([len(batch)]).to_event(1))
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(effects.unsqueeze(-1), 1.0))
            with batch.observations():
                pyro.sample("y", dist.Normal(phi, 1.0), obs=batch.y)

    assert refused(model, "shared site 'effects' has shape")
    assert refused(model, "shared site 'effects' has shape (1,) in one batch and (4,)", make_tasks(sizes=(3,)))


def test_observed_sites_outside_the_task_plate_must_not_see_the_batch() -> None:
    def model(batch: Batch) -> None:
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(phi, 1.0).mask(batch.mask), obs=batch.y)

    assert refused(model, "the log density outside batch.tasks() depends on the batch (observed sites there: ['y'])")


def test_shared_priors_must_not_see_the_data() -> None:
    def model(batch: Batch) -> None:
        mu = pyro.sample("mu", dist.Normal(batch.y.mean(), 1.0))
        with batch.tasks():
            pyro.sample("phi", dist.Normal(mu, 1.0))

    assert refused(model, "let shared priors use constants only")


@pytest.mark.parametrize(
    "seen",
    [
        lambda phi, batch: phi.mean(0),
        lambda phi, batch: batch.x[:1, :1, 0],
        lambda phi, batch: batch.x[-1:, :1, 0],
        lambda phi, batch: phi[-1:],
        lambda phi, batch: phi.cumsum(0) - phi,
        lambda phi, batch: phi.flip(0).cumsum(0).flip(0) - phi,
    ],
)
def test_tasks_must_not_see_each_other(seen: Callable[[Tensor, Batch], Tensor]) -> None:
    text = "the density of one task depends on the other tasks of the batch"
    assert refused(with_mean(lambda phi, batch: phi - seen(phi, batch)), text)


def test_sites_must_not_change_from_batch_to_batch() -> None:
    def model(batch: Batch) -> None:
        with batch.tasks():
            for k in range(len(batch)):
                pyro.sample(f"phi{k}", dist.Normal(0.0, 1.0))

    assert refused(model, "the model has other sites in another batch")


def test_padding_that_counts_asks_for_exact_sizes() -> None:
    def model(batch: Batch) -> None:
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(batch.x[..., 0].mean(-1, keepdim=True), 1.0))
            with batch.observations():
                pyro.sample("y", dist.Normal(phi, 1.0), obs=batch.y)

    structure = TaskDensity(model, make_tasks()).structure
    assert structure.exact_size and structure.coupled == ()
    assert not TaskDensity(with_mean(lambda phi, batch: phi), make_tasks()).structure.exact_size


def test_values_of_rows_are_not_values_of_a_task() -> None:
    def model(batch: Batch) -> None:
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            pyro.deterministic("rows", phi * batch.x[..., 0])
            pyro.deterministic("twice", 2 * phi)
            pyro.deterministic("constant", torch.ones(3, 1, 2))
            pyro.factor("y", -phi.square())

    for sizes in ((1, 1, 1), (3, 1, 0, 4), (1,)):
        assert TaskDensity(model, make_tasks(sizes=sizes)).structure.task_values == ("phi", "twice")


def test_single_and_empty_tasks_can_be_read() -> None:
    for sizes in ((0,), (1,), (0, 0), (0, 5)):
        tasks = make_tasks(sizes=sizes)
        density = TaskDensity(with_mean(lambda phi, batch: phi), tasks)
        assert not density.structure.exact_size
        got = density.log_task(torch.zeros(0), torch.zeros(1, 1), density.tensors(tasks.batch([0])), {})
        assert torch.isfinite(got).all()


def test_the_first_reading_has_two_rows_at_least() -> None:
    assert first_rows(make_tasks(sizes=(1, 0))) == ([0, 1], 2)
    index, rows = first_rows(make_tasks(sizes=(3, 1, 7, 9)))
    assert index == [0, 1, 2] and rows == 7 and isinstance(rows, int) and not isinstance(rows, np.integer)
