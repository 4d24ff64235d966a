from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.priors import Custom, Gaussian, Prior, as_prior, one_phi_a_task


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def batch() -> Batch:
    return Tasks.from_arrays(None, [[1.0, 2.0], [3.0], [4.0]], task_columns={"u": [0.5, 1.0, 2.0]}).batch([0, 1, 2])


def test_gaussian_diag_is_the_independent_normal(batch: Batch) -> None:
    prior = Gaussian(2, loc_scale=0.1, sd_scale=[0.3, 0.7])
    mu, tau = torch.tensor([0.2, -0.1]), torch.tensor([0.4, 1.5])
    assert list(prior.shared) == ["mu", "tau"]
    expected = dist.Normal(0.0, 0.1).log_prob(mu).sum()
    assert prior.shared["mu"].log_prob(mu).item() == pytest.approx(expected.item(), abs=1e-12)
    half_normal = math.log(2) + dist.Normal(0.0, torch.tensor([0.3, 0.7])).log_prob(tau).sum()
    assert prior.shared["tau"].log_prob(tau).item() == pytest.approx(half_normal.item() + math.log(2), abs=1e-12)
    phi = prior.distribution({"mu": mu, "tau": tau}, batch)
    point = torch.tensor([0.7, 0.3])
    assert phi.log_prob(point).item() == pytest.approx(dist.Normal(mu, tau).log_prob(point).sum().item(), abs=1e-12)


def test_gaussian_full_has_the_covariance_of_tau_and_corr(batch: Batch) -> None:
    prior = Gaussian(3, cov="full")
    assert list(prior.shared) == ["mu", "tau", "corr"]
    tau, corr = torch.tensor([0.5, 1.0, 2.0]), prior.shared["corr"].sample()
    phi = prior.distribution({"mu": torch.zeros(3), "tau": tau, "corr": corr}, batch)
    torch.testing.assert_close(phi.covariance_matrix, torch.diag(tau) @ corr @ corr.T @ torch.diag(tau))
    assert phi.event_shape == (3,) and phi.batch_shape == ()


def test_lkj_makes_the_correlation_of_two_uniform() -> None:
    corr = Gaussian(2, cov="full").shared["corr"]
    rho = corr.sample((4000,))[:, 1, 0]
    assert abs(rho.mean().item()) < 4 * math.sqrt(1 / 3 / 4000)
    assert abs((rho**2).mean().item() - 1 / 3) < 4 * math.sqrt((1 / 5 - 1 / 9) / 4000)
    factor = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    # The density of the factor is 1/2, that of rho, whatever the entry below the diagonal.
    assert corr.log_prob(factor).item() == pytest.approx(math.log(0.5), abs=1e-10)


def test_priors_are_built_in_the_dtype_of_the_call() -> None:
    torch.set_default_dtype(torch.float32)
    prior = Gaussian(2, cov="full", loc_scale=0.1)
    assert all(site.sample().dtype == torch.float32 for site in prior.shared.values())
    torch.set_default_dtype(torch.float64)
    assert all(site.sample().dtype == torch.float64 for site in prior.shared.values())
    assert prior.shared["mu"].base_dist.scale.tolist() == [0.1, 0.1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d": 0}, "integer ≥ 1, got 0"),
        ({"d": 2.0}, "integer ≥ 1, got 2.0"),
        ({"d": 2, "cov": "dense"}, 'expected cov="diag" or cov="full", got \'dense\''),
        ({"d": 1, "cov": "full"}, 'needs d ≥ 2, got d=1.*use "diag"'),
        ({"d": 2, "sd_scale": -1.0}, "sd_scale as a positive number or 2 of them, got -1.0"),
        ({"d": 2, "loc_scale": [1.0, 2.0, 3.0]}, "loc_scale as a positive number or 2 of them"),
        ({"d": 1, "loc_scale": math.inf}, "loc_scale as a positive number"),
    ],
)
def test_gaussian_refuses_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gaussian(options.pop("d"), **options)


def test_any_function_or_distribution_is_a_prior(batch: Batch) -> None:
    shared = {"w": torch.tensor([1.0, 2.0])}
    by_place = as_prior(lambda theta: dist.Normal(theta["w"], 1.0).to_event(1))
    assert by_place.distribution(shared, batch).mean.tolist() == [1.0, 2.0]
    with_columns = as_prior(lambda shared, batch: dist.Normal(batch["u"], shared["w"][0]))
    assert one_phi_a_task(with_columns.distribution(shared, batch), batch).batch_shape == (3, 1)
    known = as_prior(torch.distributions.Normal(torch.zeros(2, dtype=torch.float32), 1.0).expand([2]))
    assert known.distribution({}, batch).sample().dtype == torch.float64
    assert isinstance(known, Custom) and known.shared == {}
    gaussian = Gaussian(1)
    assert as_prior(gaussian) is gaussian


def test_a_scalar_phi_has_one_value_a_task(batch: Batch) -> None:
    with batch.tasks():
        phi = pyro.sample("phi", one_phi_a_task(as_prior(dist.Normal(0.0, 1.0)).distribution({}, batch), batch))
    assert phi.shape == (3, 1)


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (dist.Normal(torch.zeros(2), 1.0), r"batch shape \(\) or \(3, 1\).*got \(2,\); .*to_event\(1\)"),
        (dist.Normal(torch.zeros(3, 2), 1.0), r"got \(3, 2\)"),
        (dist.Normal(torch.zeros(2, 1), 1.0), r"got \(2, 1\)"),
        (dist.LKJCholesky(3, 1.0), r"event shape \(d,\) or \(\), got \(3, 3\)"),
        (torch.zeros(2), "expected a torch or Pyro distribution, got Tensor"),
    ],
)
def test_shapes_of_no_task_parameter_are_refused(prior: Any, message: str, batch: Batch) -> None:
    with pytest.raises(ValueError, match=message):
        one_phi_a_task(prior, batch)


def test_a_prior_of_ones_own_brings_its_shared_sites(batch: Batch) -> None:
    class Horseshoe(Prior):
        @property
        def shared(self) -> dict[str, Any]:
            return {"scale": dist.HalfCauchy(1.0)}

        def distribution(self, shared: Any, batch: Batch) -> Any:
            return dist.Normal(torch.zeros(2), shared["scale"]).to_event(1)

    prior = Horseshoe()
    assert as_prior(prior).distribution({"scale": torch.tensor(2.0)}, batch).stddev.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("cov", ["diag", "full"])
def test_density_under_vmap(cov: Any, batch: Batch) -> None:
    prior = Gaussian(3, cov=cov)

    def draw() -> dict[str, Tensor]:
        shared = {name: site.sample() for name, site in prior.shared.items()}
        return shared | {"phi": prior.distribution(shared, batch).sample()}

    def density(values: dict[str, Tensor]) -> Tensor:
        with poutine.trace() as trace, poutine.condition(data=values):
            for name, site in prior.shared.items():
                pyro.sample(name, site)
            pyro.sample("phi", prior.distribution(values, batch))
        return trace.trace.log_prob_sum()

    with pyro.validation_enabled(False):
        each = [draw() for _ in range(4)]
        draws = {name: torch.stack([one[name] for one in each]) for name in each[0]}
        batched = torch.func.vmap(make_fx(torch.func.functionalize(density))(each[0]))(draws)
        single = [density(one) for one in each]
    torch.testing.assert_close(batched, torch.stack(single), rtol=0, atol=1e-10)
