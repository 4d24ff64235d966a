from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from scenarios import make_tasks
from scipy import stats
from torch import Tensor

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.latents import Flat, Structure, shaped, split
from bayesmeta.hierarchy.tracing import Site

DRAWS = 2000


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


SITES = (Site("a", (3,), (2,), "moments"), Site("b", (), (), "normal"))


def test_split_cuts_a_flat_vector_into_sites() -> None:
    parts = split(SITES, torch.arange(6.0).reshape(2, 3))
    assert parts["a"].tolist() == [[0.0, 1.0], [3.0, 4.0]] and parts["b"].tolist() == [2.0, 5.0]


def test_structure_adds_up_sizes() -> None:
    structure = Structure(SITES, (SITES[1],), (), (), ())
    assert structure.shared_size == 3 and structure.task_size == 1 and not structure.exact_size


def test_masked_and_scaled_priors_are_told_apart_from_plain_ones() -> None:
    latents = Flat(Structure((), (SITES[1],), (), (), ()), torch.zeros(0), torch.tensor([[0.3]]), True)
    fn = dist.Normal(1.0, 2.0).expand([1, 1])
    value, log_prob, log_jacobian = latents.task("b", fn, True)
    assert value.item() == pytest.approx(1.6) and log_jacobian.item() == 0.0
    _, unscaled, jacobian = latents.task("b", fn, False)
    torch.testing.assert_close(unscaled, fn.log_prob(value))
    torch.testing.assert_close(jacobian, torch.tensor([[2.0]]).log())
    torch.testing.assert_close(log_prob, unscaled + jacobian)


def test_a_given_value_must_have_the_sites_shape() -> None:
    assert shaped(SITES[0], [1, 2, 3], torch.float64).tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match=r"shared: 'a' must have shape \(3,\), got \(2,\)"):
        shaped(SITES[0], [1.0, 2.0], torch.float64)


def _prior(name: str) -> Callable[[], dict[str, Tensor]]:
    halves = dist.Categorical(torch.tensor([0.3, 0.7]))
    single: dict[str, Any] = {
        "Gamma": dist.Gamma(0.6, 2.0),
        "Dirichlet": dist.Dirichlet(torch.tensor([0.7, 1.0, 4.0])),
        "StudentT": dist.StudentT(3.0, 1.0, 2.0),
        "LKJCholesky": dist.LKJCholesky(3, 1.5),
        "HalfCauchy": dist.HalfCauchy(2.0),
        "mixture": dist.MixtureSameFamily(halves, dist.Normal(torch.tensor([-2.0, 1.0]), 0.5)),
        "positive mixture": dist.MixtureSameFamily(halves, dist.LogNormal(torch.tensor([-2.0, 1.0]), 0.5)),
    }

    def funnel() -> dict[str, Tensor]:
        width = pyro.sample("width", dist.Normal(0.0, 1.5))
        return {"width": width, "phi": pyro.sample("phi", dist.StudentT(4.0, 0.0, torch.exp(width)))}

    return funnel if name == "funnel" else lambda: {"phi": pyro.sample("phi", single[name])}


def _exact(name: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """Uniform variables made of a draw `(draw, *event)`, by the prior's distribution function."""
    beta = {0: (0.7, 5.0), 1: (1.0, 4.7), 2: (4.0, 1.7)}

    def mixed(x: Tensor) -> Tensor:
        return 0.3 * dist.Normal(-2.0, 0.5).cdf(x) + 0.7 * dist.Normal(1.0, 0.5).cdf(x)

    return {
        "Gamma": {"0": lambda d: dist.Gamma(0.6, 2.0).cdf(d["phi"])},
        "Dirichlet": {str(k): lambda d, k=k: _cdf(stats.beta(*beta[k]), d["phi"][:, k]) for k in beta},
        "StudentT": {"0": lambda d: _cdf(stats.t(3, 1.0, 2.0), d["phi"])},
        "HalfCauchy": {"0": lambda d: dist.HalfCauchy(2.0).cdf(d["phi"])},
        "LKJCholesky": {
            f"{i}{j}": lambda d, i=i, j=j: _cdf(stats.beta(2.0, 2.0), 0.5 + 0.5 * _correlation(d["phi"])[:, i, j])
            for i, j in ((1, 0), (2, 0), (2, 1))
        },
        "mixture": {"0": lambda d: mixed(d["phi"])},
        "positive mixture": {"0": lambda d: mixed(d["phi"].log())},
        "funnel": {
            "width": lambda d: dist.Normal(0.0, 1.5).cdf(d["width"]),
            "phi": lambda d: _cdf(stats.t(4), d["phi"] / d["width"].exp()),
        },
    }[name]


def _correlation(factor: Tensor) -> Tensor:
    return factor @ factor.mT


def _cdf(family: Any, x: Tensor) -> Tensor:
    return torch.as_tensor(family.cdf(x.numpy()))


NAMES = ["Gamma", "Dirichlet", "StudentT", "LKJCholesky", "HalfCauchy", "mixture", "positive mixture", "funnel"]


@pytest.mark.parametrize("name", NAMES)
def test_a_task_without_rows_has_its_prior(name: str) -> None:
    prior = _prior(name)

    def model(batch: Batch) -> None:
        with batch.tasks():
            values = prior()
            with batch.observations():
                pyro.sample("y", dist.Normal(values["phi"].reshape(len(batch), -1)[:, :1], 1.0), obs=batch.y)

    tasks = make_tasks(sizes=(2, 0))
    density = TaskDensity(model, tasks)
    data = density.tensors(tasks.batch([1]))
    theta, empty = torch.zeros(DRAWS, 0), torch.zeros(DRAWS, 1, density.structure.task_size)
    torch.manual_seed(11)
    noise = density.prior_noise.mapped(theta, empty, data, {}, in_dims=(0, 0, None, None))
    values = density.constrain.mapped(theta, noise, data, {}, in_dims=(0, 0, None, None))
    draws = {site: value.squeeze(1) for site, value in values.items()}
    exact = _exact(name)
    for cdf in exact.values():
        assert stats.kstest(cdf(draws).numpy(), "uniform").pvalue > 1e-3 / len(exact)


def test_prior_draws_of_the_tasks_of_a_batch_are_independent() -> None:
    def model(batch: Batch) -> None:
        with batch.tasks():
            phi = pyro.sample("phi", dist.StudentT(5.0, 0.0, 1.0))
            with batch.observations():
                pyro.sample("y", dist.Normal(phi, 1.0), obs=batch.y)

    tasks = Tasks.from_arrays(None, [[0.0], [1.0]])
    density = TaskDensity(model, tasks)
    data = density.tensors(tasks.batch([0, 1]))
    torch.manual_seed(3)
    theta, empty = torch.zeros(DRAWS, 0), torch.zeros(DRAWS, 2, 1)
    noise = density.prior_noise.mapped(theta, empty, data, {}, in_dims=(0, 0, None, None)).squeeze(-1)
    assert len(noise.unique()) == 2 * DRAWS
    ranks = noise.argsort(0).argsort(0).double()
    assert abs(float(torch.corrcoef(ranks.T)[0, 1])) * DRAWS**0.5 < 4
