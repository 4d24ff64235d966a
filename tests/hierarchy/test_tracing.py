from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from scenarios import make_net, make_tasks
from torch import Tensor, nn
from torch.distributions import constraints

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.tracing import cast_observed


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


def in_tasks(site: Callable[[Batch], Tensor]) -> Callable[[Batch], None]:
    """A model with one more statement in the task plate."""

    def model(batch: Batch) -> None:
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0)) + site(batch)
            with batch.observations():
                pyro.sample("y", dist.Normal(phi, 1.0), obs=batch.y)

    return model


def observed(fn: Callable[[Tensor, Batch], Any]) -> Callable[[Batch], None]:
    def model(batch: Batch) -> None:
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            with batch.observations():
                pyro.sample("y", fn(phi, batch), obs=batch.y)

    return model


def log_task(model: Callable[[Batch], object], tasks: Tasks, noise: float = 0.3) -> Tensor:
    density = TaskDensity(model, tasks)
    z = torch.full((len(tasks), density.structure.task_size), noise)
    theta = torch.zeros(density.structure.shared_size)
    return density.log_task(theta, z, density.tensors(tasks.batch(range(len(tasks)))), dict(density.learned.values))


def test_discrete_latent_sites_are_refused() -> None:
    for fn in (dist.Bernoulli(0.5), dist.Poisson(2.0), dist.Categorical(torch.ones(3))):
        text = f"latent site 'k' is discrete ({type(fn).__name__}); sum it out of the likelihood"
        assert refused(in_tasks(lambda batch, fn=fn: pyro.sample("k", fn)), text)

    def shared(batch: Batch) -> None:
        pyro.sample("k", dist.Bernoulli(0.5))
        in_tasks(lambda b: torch.zeros(()))(batch)

    assert refused(shared, "latent site 'k' is discrete")


def test_latent_sites_inside_the_rows_are_refused() -> None:
    def model(batch: Batch) -> None:
        with batch.tasks(), batch.observations():
            pyro.sample("u", dist.Normal(0.0, 1.0))

    assert refused(
        model, "latent site 'u' is inside batch.observations(), one value a row; sample it in batch.tasks() as a"
    )


def test_subsampled_plates_are_refused() -> None:
    def by_size(batch: Batch) -> Tensor:
        with pyro.plate("sub", 8, subsample_size=2, dim=-3):
            return torch.zeros(())

    def by_index(batch: Batch) -> Tensor:
        with pyro.plate("sub", 8, subsample=torch.arange(2), dim=-3):
            pyro.factor("extra", torch.zeros(()))
        return torch.zeros(())

    for site in (by_size, by_index):
        assert refused(in_tasks(site), "plate 'sub' subsamples 2 of 8, which would silently change the density")


def test_a_model_without_a_task_site_is_refused() -> None:
    def no_plate(batch: Batch) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0).mask(batch.mask), obs=batch.y)

    def no_site(batch: Batch) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with batch.tasks(), batch.observations():
            pyro.sample("y", dist.Normal(mu, 1.0), obs=batch.y)

    for model in (no_plate, no_site):
        assert refused(model, "the model samples nothing inside `with batch.tasks():`; expected at least one task site")


def test_improper_task_priors_are_refused() -> None:
    for fn in (
        dist.ImproperUniform(constraints.positive, (), ()),
        dist.ImproperUniform(constraints.real, (2,), ()).to_event(1),
    ):
        assert refused(
            in_tasks(lambda batch, fn=fn: pyro.sample("flat", fn).sum()),
            "task site 'flat' has an improper prior; give it",
        )


def test_further_plates_and_batch_dimensions_are_refused() -> None:
    def plate(batch: Batch) -> Tensor:
        with pyro.plate("k", 3, dim=-3):
            return pyro.sample("w", dist.Normal(0.0, 1.0)).sum(0)

    assert refused(in_tasks(plate), "task site 'w' is inside further plates ['k']; use .expand([...]).to_event(...)")
    wide = in_tasks(lambda batch: pyro.sample("w", dist.Normal(torch.zeros(5), 1.0)).sum(-1, keepdim=True))
    assert refused(wide, "task site 'w': expected one value a task, batch shape (3, 1), got (3, 5)")


def test_supports_without_a_smooth_map_are_refused() -> None:
    wishart = in_tasks(lambda batch: pyro.sample("w", dist.Wishart(torch.tensor(3.0), torch.eye(2)))[..., 0, 1])
    assert refused(wishart, "latent site 'w': no smooth map from real numbers onto its support")


def test_two_sites_of_one_name_are_refused() -> None:
    assert refused(in_tasks(lambda batch: pyro.sample("phi", dist.Normal(0.0, 1.0))), "two sites are named 'phi'")


def test_log_densities_have_one_line_a_task() -> None:
    def model(batch: Batch) -> None:
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            with pyro.plate("k", 2, dim=-3):
                pyro.factor("extra", phi + torch.zeros(2, 1, 1))

    assert refused(model, "observed site 'extra': expected a log density of shape (3, rows) or (3, 1)")


def test_unregistered_trainable_modules_are_refused_and_frozen_ones_allowed() -> None:
    net = make_net()
    model = observed(lambda phi, batch: dist.Normal(phi + net(batch.x)[..., 0], 1.0))
    assert refused(model, "the model uses 3 trainable parameter(s) that nobody registered")
    assert refused(model, 'register their module with pyro.module("net", net) inside the model, or freeze it')
    weight = torch.ones(2, requires_grad=True)
    assert refused(observed(lambda phi, batch: dist.Normal(phi + batch.x @ weight, 1.0)), "1 trainable parameter(s)")
    net.requires_grad_(False)
    density = TaskDensity(model, make_tasks())
    assert {tuple(p.shape) for p in density.frozen.values()} == {(4, 2), (4,), (3, 4)}
    assert not density.learned.values


def test_captured_single_precision_is_promoted() -> None:
    tasks = make_tasks()
    batch = tasks.batch(range(4))
    net, slope = make_net().requires_grad_(False), torch.tensor([0.1, 0.7], dtype=torch.float32)
    loc = torch.tensor(0.3, dtype=torch.float32)

    def model(batch: Batch) -> None:
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(loc, 1.0))
            with batch.observations():
                parts = torch.stack([net(batch.x)[..., 0], torch.cat([slope, slope])[1] * batch.x[..., 1]])
                mean = phi + parts.sum(0) + torch.einsum("tnk,k->tn", batch.x, slope)
                assert mean.dtype is torch.float64
                pyro.sample("y", dist.Normal(mean, 1.0), obs=batch.y)

    double, wide = make_net().double(), slope.double()
    phi = loc.double() + 0.3
    mean = phi + double(batch.x)[..., 0] + wide[1] * batch.x[..., 1] + batch.x @ wide
    expected = (dist.Normal(mean, 1.0).log_prob(batch.y) * batch.mask).sum(-1) + dist.Normal(0.0, 1.0).log_prob(
        torch.tensor(0.3)
    )
    torch.testing.assert_close(log_task(model, tasks), expected, rtol=1e-12, atol=1e-12)
    assert slope.dtype is torch.float32 and net[0].weight.dtype is torch.float32


def test_buffers_of_a_registered_module_stay_the_users() -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, dtype=torch.float32))
            self.register_buffer("offset", torch.tensor([0.1, 0.2], dtype=torch.float32))

        def forward(self, x: Tensor) -> Tensor:
            return ((x + self.offset) * self.weight).sum(-1)

    net = Shift()
    model = observed(lambda phi, batch: dist.Normal(phi + pyro.module("net", net)(batch.x), 1.0))
    density = TaskDensity(model, make_tasks())
    assert list(density.learned.modules) == ["net"] and list(density.learned.values) == ["net$$$weight"]
    assert [b.dtype for b in density.learned.buffers.values()] == [torch.float64]
    assert net.offset.dtype is torch.float32 and len(pyro.get_param_store()) == 0


def test_a_param_needs_an_initial_value() -> None:
    assert refused(
        in_tasks(lambda batch: pyro.param("a")), "pyro.param 'a' has no initial value; give one: pyro.param('a', init"
    )
    density = TaskDensity(in_tasks(lambda batch: pyro.param("a", lambda: torch.tensor(2.0))), make_tasks())
    assert density.learned.values["a"].item() == 2.0


def test_weights_and_scales_count_data_and_never_the_prior() -> None:
    plain, weighted = make_tasks(), make_tasks(weighted=True)
    model = observed(lambda phi, batch: dist.Normal(phi, 1.0))
    prior = dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.3))
    rows = dist.Normal(0.3, 1.0).log_prob(plain.batch(range(4)).y) * plain.batch(range(4)).mask
    batch = weighted.batch(range(4))
    expected = (rows * batch.tensors["weight"] * batch.tensors["task_weight"]).sum(-1) + prior
    torch.testing.assert_close(log_task(model, weighted), expected)
    torch.testing.assert_close(log_task(model, plain), rows.sum(-1) + prior)

    def halved(batch: Batch) -> None:
        with poutine.scale(scale=torch.tensor(0.5)):
            model(batch)

    torch.testing.assert_close(log_task(halved, plain), 0.5 * (rows.sum(-1) + prior))


def test_reparametrised_models_are_read() -> None:
    def model(batch: Batch) -> None:
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(0.5, tau))
            with batch.observations():
                pyro.sample("y", dist.Normal(phi, 1.0), obs=batch.y)

    tasks = make_tasks()
    decentred = poutine.reparam(model, config={"phi": LocScaleReparam(0.0)})
    structure = TaskDensity(decentred, tasks).structure
    assert [s.name for s in structure.task] == ["phi_decentered"] and "phi" in structure.task_values
    torch.testing.assert_close(log_task(decentred, tasks), log_task(model, tasks))


def test_a_latent_delta_is_deterministic() -> None:
    model = in_tasks(lambda batch: pyro.sample("fixed", dist.Delta(torch.tensor(0.5))))
    structure = TaskDensity(model, make_tasks()).structure
    assert [s.name for s in structure.task] == ["phi"] and structure.task_values == ("phi", "fixed")


def test_observed_values_have_the_dtype_of_their_distribution() -> None:
    codes = torch.tensor([0, 2])
    assert cast_observed(dist.Categorical(torch.ones(3)), codes.double()).dtype is torch.int64
    assert cast_observed(dist.Categorical(torch.ones(3)).expand([2]).to_event(1), codes).dtype is torch.int64
    assert cast_observed(dist.Poisson(1.0), codes).dtype is torch.float64
    assert cast_observed(dist.Normal(0.0, 1.0), 0.5).dtype is torch.float64


FAMILIES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "Normal": lambda m, s: dist.Normal(m, s),
    "StudentT": lambda m, s: dist.StudentT(5.0, m, s),
    "Laplace": lambda m, s: dist.Laplace(m, s),
    "Cauchy": lambda m, s: dist.Cauchy(m, s),
    "Logistic": lambda m, s: dist.Logistic(m, s),
    "Gumbel": lambda m, s: dist.Gumbel(m, s),
    "Exponential": lambda m, s: dist.Exponential(s),
    "Weibull": lambda m, s: dist.Weibull(s, 1.5),
    "HalfCauchy": lambda m, s: dist.HalfCauchy(s),
    "LogNormal": lambda m, s: dist.LogNormal(m, s),
    "Gamma": lambda m, s: dist.Gamma(2.0 * s, 1.0),
    "Beta": lambda m, s: dist.Beta(2.0 * s, 1.0),
    "Uniform": lambda m, s: dist.Uniform(m, m + s),
    "Poisson": lambda m, s: dist.Poisson(50.0 * s),
    "Geometric": lambda m, s: dist.Geometric(0.02 * s),
    "NegativeBinomial": lambda m, s: dist.NegativeBinomial(20.0 * s, logits=m),
    "BetaBinomial": lambda m, s: dist.BetaBinomial(s, s, 100),
    "mixture": lambda m, s: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(*m.shape, 2)), dist.Normal(torch.stack([m, -m], -1), s.unsqueeze(-1))
    ),
    "VonMises": lambda m, s: dist.VonMises(m, s),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_outcomes_are_independent_over_draws_tasks_and_rows(name: str) -> None:
    tasks = Tasks.from_arrays(None, [torch.full((40,), 0.5), torch.full((40,), 0.5)])
    make = FAMILIES[name]
    model = observed(lambda phi, batch: make(0.0 * phi.expand(batch.y.shape), 1.0 + 0.0 * batch.y))
    density = TaskDensity(model, tasks)
    data = density.tensors(tasks.batch([0, 1]))
    torch.manual_seed(2)
    theta, noise = torch.zeros(20, 0), torch.zeros(20, 2, 1)
    draws = density.outcomes.mapped(theta, noise, data, {}, in_dims=(0, 0, None, None))["y"]
    assert draws.shape == (20, 2, 40) and draws.dtype is torch.float64
    flat = draws.reshape(40, 40)
    ranks = flat.argsort(-1).argsort(-1).double()
    across = torch.corrcoef(ranks)[~torch.eye(40, dtype=torch.bool)]
    assert (across.abs() * 39**0.5).max() < 5 and (flat.unsqueeze(0) != flat.unsqueeze(1)).any(-1).sum() == 40 * 39
    sampled = make(torch.zeros(4000), torch.ones(4000)).sample().sort().values
    quantile = torch.searchsorted(sampled, flat.reshape(-1).contiguous(), right=False).double()
    upper = torch.searchsorted(sampled, flat.reshape(-1).contiguous(), right=True).double()
    middle = (0.5 * (quantile + upper) / 4000).mean()
    assert abs(float(middle) - 0.5) < 4 * (1 / 12 * (1 / 1600 + 1 / 4000)) ** 0.5


def test_outcomes_of_a_gaussian_process_are_one_event_a_task() -> None:
    def model(batch: Batch) -> None:
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            rows = batch.y.shape[1]
            mean = phi.unsqueeze(-1).expand(len(batch), 1, rows)
            pyro.sample("y", dist.MultivariateNormal(mean, torch.eye(rows)), obs=batch.y.unsqueeze(-2))

    tasks = make_tasks(sizes=(4, 4))
    density = TaskDensity(model, tasks)
    data = density.tensors(tasks.batch([0, 1]))
    draws = density.outcomes.mapped(torch.zeros(5, 0), torch.zeros(5, 2, 1), data, {}, in_dims=(0, 0, None, None))["y"]
    assert draws.shape == (5, 2, 1, 4) and len(draws.unique()) == 40


def test_means_of_the_observed_sites() -> None:
    tasks = make_tasks("count")
    batch = tasks.batch(range(4))
    density = TaskDensity(observed(lambda phi, batch: dist.Poisson(phi.exp() * batch["se"])), tasks)
    means = density.means(torch.zeros(0), torch.full((4, 1), 0.2), density.tensors(batch), {})["y"]
    torch.testing.assert_close(means, torch.tensor(0.2).exp() * batch["se"])
    categorical = TaskDensity(observed(lambda phi, batch: dist.Categorical(torch.ones(5))), tasks)
    with pytest.raises(ValueError, match="site 'y' is categorical and has no mean; use kind='outcome'"):
        categorical.means(torch.zeros(0), torch.zeros(4, 1), categorical.tensors(batch), {})


def test_masks_of_contexts_and_of_distributions_leave_rows_out_of_the_support_check() -> None:
    tasks = Tasks.from_arrays(None, [[1.0, -2.0], [3.0]], columns={"ok": [[1, 0], [1]]})
    model = observed(lambda phi, batch: dist.Exponential(phi.exp()).mask(batch["ok"] == 1))
    density = TaskDensity(model, tasks)
    assert not density.outside_support(tasks.batch([0, 1]), torch.zeros(0))["y"].any()
    noise = torch.zeros(2, 1, requires_grad=True)
    total = density.log_task(torch.zeros(0), noise, density.tensors(tasks.batch([0, 1])), {}).sum()
    (gradient,) = torch.autograd.grad(total, noise)
    torch.testing.assert_close(gradient.squeeze(-1), torch.tensor([1.0 - 1.0, 1.0 - 3.0]))


def test_masked_categories_may_lie_outside() -> None:
    tasks = Tasks.from_arrays(None, [[0, 7, 1], [2]], columns={"ok": [[1, 0, 1], [1]]})

    def model(batch: Batch) -> None:
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            with batch.observations(), poutine.mask(mask=batch["ok"] == 1):
                logits = torch.stack([phi, 0 * phi, -phi], -1)
                pyro.sample("y", dist.Categorical(logits=logits), obs=batch.y)

    logits = torch.tensor([0.3, 0.0, -0.3]).log_softmax(-1)
    prior = dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.3))
    torch.testing.assert_close(log_task(model, tasks), torch.stack([logits[0] + logits[1], logits[2]]) + prior)
