from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from scenarios import Scenario, make_net, make_tasks, network, radon, scenarios, supports
from torch import Tensor
from torch.distributions import MixtureSameFamily, biject_to

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import Read, TaskDensity, read

SCENARIOS = {scenario.name: scenario for scenario in scenarios()}
ALL = pytest.mark.parametrize("name", SCENARIOS)


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@functools.cache
def density_of(name: str, dtype: torch.dtype = torch.float64) -> TaskDensity:
    return TaskDensity(SCENARIOS[name].model, SCENARIOS[name].tasks, dtype=dtype)


def point(density: TaskDensity, tasks: int, seed: int = 0, spread: float = 0.4) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    theta = spread * torch.randn(density.structure.shared_size, generator=draw)
    return theta, spread * torch.randn(tasks, density.structure.task_size, generator=draw)


def transform_of(fn: Any) -> Any:
    base = fn
    while hasattr(base, "base_dist") and not isinstance(base, torch.distributions.TransformedDistribution):
        base = base.base_dist
    if not isinstance(base, MixtureSameFamily):
        return biject_to(fn.support)
    return biject_to(torch.distributions.constraints.independent(base.component_distribution.support, fn.event_dim))


class Unconstrained(Messenger):
    """An independent reading of a model: values from unconstrained ones (`flat`), or the other way round (`values`)."""

    def __init__(self, flat: dict[str, Tensor] | None = None, values: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        self.flat, self.given, self.values, self.log_jacobian = flat, values, {}, torch.zeros(())

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["is_observed"] or type(msg["fn"]).__name__ == "_Subsample":
            return
        transform, shape = transform_of(msg["fn"]), msg["fn"].shape()
        if self.given is not None:
            msg["value"] = self.given[msg["name"]]
            self.values[msg["name"]] = transform.inv(msg["value"])
            return
        u = self.flat[msg["name"]].reshape(transform.inverse_shape(shape))
        msg["value"] = self.values[msg["name"]] = transform(u)
        self.log_jacobian = self.log_jacobian + transform.log_abs_det_jacobian(u, msg["value"]).sum()


def cut(density: TaskDensity, theta: Tensor, u: Tensor) -> dict[str, Tensor]:
    sites, pieces = [*density.structure.shared, *density.structure.task], {}
    for group, flat in ((density.structure.shared, theta), (density.structure.task, u)):
        pieces |= dict(zip([s.name for s in group], flat.split([s.size for s in group], -1), strict=True))
    assert len(pieces) == len(sites)
    return pieces


def pyro_log_joint(density: TaskDensity, scenario: Scenario, batch: Batch, theta: Tensor, u: Tensor) -> Tensor:
    with Unconstrained(cut(density, theta, u)) as reading:
        scenario.reference(batch)
    with poutine.trace() as trace:
        pyro.condition(scenario.reference, reading.values)(batch)
    return trace.trace.log_prob_sum() + reading.log_jacobian


def ours(density: TaskDensity, data: dict[str, Tensor], theta: Tensor, u: Tensor) -> Tensor:
    values = dict(density.learned.values)
    return density.log_prior(theta) + density.log_task_unconstrained(theta, u, data, values).sum()


@ALL
def test_the_log_joint_density_and_its_gradient_equal_pyros(name: str) -> None:
    scenario, density = SCENARIOS[name], density_of(name)
    batch = scenario.tasks.batch(range(len(scenario.tasks)))
    for seed in (1, 2):
        theta, u = (t.requires_grad_() for t in point(density, len(scenario.tasks), seed))
        expected = pyro_log_joint(density, scenario, batch, theta, u)
        got = ours(density, density.tensors(batch), theta, u)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        inputs = [t for t in (theta, u) if t.numel()]
        for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
            assert torch.isfinite(a).all()


@ALL
def test_whitened_coordinates_differ_by_their_jacobian(name: str) -> None:
    scenario, density = SCENARIOS[name], density_of(name)
    batch = scenario.tasks.batch(range(len(scenario.tasks)))
    data, values = density.tensors(batch), dict(density.learned.values)
    theta, noise = point(density, len(scenario.tasks), 3)
    shared = density.shared_values(theta)

    def unconstrained(z: Tensor) -> Tensor:
        found = density.constrain(theta, z, data, values)
        sites = {site.name: found[site.name].unsqueeze(1) for site in density.structure.task}
        with Unconstrained(values=shared | sites) as reading:
            scenario.reference(batch)
        return torch.cat([reading.values[s.name].reshape(len(z), -1) for s in density.structure.task], -1)

    jacobian = torch.autograd.functional.jacobian(unconstrained, noise)
    blocks = torch.stack([jacobian[i, :, i] for i in range(len(noise))])
    assert torch.allclose(jacobian.sum(2), blocks), "tasks must not see each other"
    gap = density.log_task(theta, noise, data, values) - density.log_task_unconstrained(
        theta, unconstrained(noise), data, values
    )
    torch.testing.assert_close(gap, torch.linalg.slogdet(blocks).logabsdet, rtol=1e-8, atol=1e-8)
    prior, likelihood = density.log_parts.eager(theta, noise, data, values)
    torch.testing.assert_close(prior + likelihood, density.log_task(theta, noise, data, values))


@ALL
def test_recorded_equals_eager_elsewhere_and_mapped_equals_a_loop(name: str) -> None:
    scenario, density = SCENARIOS[name], density_of(name)
    values = dict(density.learned.values)
    for index in (range(len(scenario.tasks)), [0, 1]):
        data = density.tensors(scenario.tasks.batch(index))
        points = [point(density, len(index), seed, 1.0) for seed in (4, 5, 6)]
        eager = torch.stack([density.log_task.eager(theta, z, data, values) for theta, z in points])
        recorded = torch.stack([density.log_task(theta, z, data, values) for theta, z in points])
        torch.testing.assert_close(recorded, eager, rtol=1e-9, atol=1e-9)
        thetas, noise = (torch.stack(parts) for parts in zip(*points, strict=True))
        mapped = density.log_task.mapped(thetas, noise, data, values, in_dims=(0, 0, None, None))
        torch.testing.assert_close(mapped, eager, rtol=1e-9, atol=1e-9)
        priors = torch.stack([density.log_prior(theta) for theta, _ in points])
        torch.testing.assert_close(density.log_prior(thetas), priors)
    assert set(density.log_task.status.values()) == {"recorded"}


@ALL
def test_float32_gives_the_same_numbers_in_single_precision(name: str) -> None:
    scenario, density, single = SCENARIOS[name], density_of(name), density_of(name, torch.float32)
    batch = scenario.tasks.batch(range(len(scenario.tasks)))
    theta, noise = point(density, len(scenario.tasks), 7)
    expected = density.log_task(theta, noise, density.tensors(batch), dict(density.learned.values))
    got = single.log_task(theta.float(), noise.float(), single.tensors(batch), dict(single.learned.values))
    assert got.dtype is torch.float32 and single.log_prior(theta.float()).dtype is torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=2e-4, atol=2e-4)
    assert single.structure == density.structure


@ALL
def test_padding_changes_nothing_unless_rows_are_coupled(name: str) -> None:
    scenario, density = SCENARIOS[name], density_of(name)
    tasks, values = scenario.tasks, dict(density.learned.values)
    assert density.structure.exact_size == (name == "process")
    assert density.structure.coupled == (("y",) if name == "process" else ())
    theta, noise = point(density, len(tasks), 8)
    together = density.log_task.eager(theta, noise, density.tensors(tasks.batch(range(len(tasks)))), values)
    alone = [
        density.log_task.eager(theta, noise[[i]], density.tensors(tasks.batch([i])), values) for i in range(len(tasks))
    ]
    torch.testing.assert_close(torch.cat(alone), together)
    rows = density.log_rows.eager(theta, noise, density.tensors(tasks.batch(range(len(tasks)))), values)
    _, likelihood = density.log_parts.eager(theta, noise, density.tensors(tasks.batch(range(len(tasks)))), values)
    torch.testing.assert_close(torch.stack([r.nansum(-1) for r in rows.values()]).sum(0), likelihood)


def test_rows_of_another_kind_leave_no_nan_in_gradients() -> None:
    def model(batch: Batch) -> None:
        with batch.tasks():
            shape = pyro.sample("shape", dist.LogNormal(0.0, 1.0))
            with batch.observations():
                with batch.rows_where("group", 0):
                    pyro.sample("normal", dist.Normal(shape, 1.0), obs=batch.y)
                with poutine.mask(mask=batch["group"] > 0):
                    pyro.sample("gamma", dist.Gamma(shape, 1.0), obs=batch.y)

    tasks = make_tasks("mixed")
    density = TaskDensity(model, tasks)
    noise = torch.full((4, 1), 0.3, requires_grad=True)
    batch = tasks.batch(range(4))
    total = density.log_task(torch.zeros(0), noise, density.tensors(batch), {})
    (gradient,) = torch.autograd.grad(total.sum(), noise)
    shape, kept = noise.exp(), [batch.mask & (batch["group"] == 0), batch.mask & (batch["group"] > 0)]
    terms = [
        dist.Normal(0.0, 1.0).log_prob(noise).squeeze(-1),
        (dist.Normal(shape, 1.0).log_prob(batch.y) * kept[0]).sum(-1),
        (dist.Gamma(shape, 1.0, validate_args=False).log_prob(batch.y.abs()) * kept[1]).sum(-1),
    ]
    torch.testing.assert_close(total, sum(terms))
    torch.testing.assert_close(gradient, torch.autograd.grad(sum(terms).sum(), noise)[0])


def test_a_site_that_counts_padding_is_batched_by_exact_size_and_counts_nothing_without_rows() -> None:
    def model(batch: Batch) -> None:
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(0.0, tau))
            pyro.sample("y", dist.Normal(phi, 1.0), obs=batch.y)

    tasks = make_tasks()
    density = TaskDensity(model, tasks)
    assert density.structure.exact_size and density.structure.unmasked == ("y",)
    _, likelihood = density.log_parts(torch.zeros(1), torch.zeros(1, 1), density.tensors(tasks.batch([2])), {})
    assert likelihood.item() == 0.0


def test_structure_names_every_site() -> None:
    structure = density_of("non_centred").structure
    assert [s.name for s in structure.shared] == ["mu", "tau"] and [s.name for s in structure.task] == ["raw"]
    assert structure.shared_values == ("mu", "tau", "ratio") and structure.task_values == ("raw", "phi")
    supports = density_of("supports").structure
    assert [(s.name, s.shape, s.unconstrained, s.kind) for s in supports.task] == [
        ("weights", (3,), (2,), "moments"),
        ("scale", (), (), "normal"),
        ("size", (), (), "moments"),
        ("corr", (3, 3), (3,), "moments"),
        ("cut", (), (), "icdf"),
        ("phi", (2,), (2,), "normal"),
    ]
    assert density_of("factors").structure.outcomes == ()
    assert density_of("outputs").structure.outcomes == ("y0", "y1")
    assert [s.improper for s in density_of("flat").structure.shared] == [True] * 3


def test_constrain_gives_values_inside_their_supports() -> None:
    density, tasks = density_of("supports"), SCENARIOS["supports"].tasks
    theta, noise = point(density, len(tasks), 9, 2.0)
    values = density.constrain(theta, noise, density.tensors(tasks.batch(range(len(tasks)))), {})
    assert values["weights"].shape == (4, 3) and values["corr"].shape == (4, 3, 3)
    torch.testing.assert_close(values["weights"].sum(-1), torch.ones(4))
    torch.testing.assert_close(values["corr"].square().sum(-1), torch.ones(4, 3))
    shared = density.shared_values(theta)
    assert ((values["cut"] > shared["bound"]) & (values["cut"] < shared["bound"] + 1)).all()
    torch.testing.assert_close(density.theta_of(shared), theta)


def test_given_shared_values_are_checked() -> None:
    density = density_of("radon")
    good = {"mu": [0.0, 1.0], "tau": [1.0, 1.0], "sigma": 0.5}
    torch.testing.assert_close(density.theta_of(good)[-1], torch.tensor(0.5).log())
    with pytest.raises(ValueError, match="expected a value for each of"):
        density.theta_of({"mu": [0.0, 1.0]})
    with pytest.raises(ValueError, match=r"'tau' must have shape \(2,\), got \(\)"):
        density.theta_of(good | {"tau": 1.0})
    with pytest.raises(ValueError, match="'sigma' = -1.0 is outside its support"):
        density.theta_of(good | {"sigma": -1.0})


def test_simulate_draws_shared_values_then_tasks_then_outcomes() -> None:
    density, tasks = density_of("radon"), SCENARIOS["radon"].tasks
    values, outcomes = density.simulate(tasks.batch(range(4)))
    assert values["mu"].shape == (2,) and values["phi"].shape == (4, 2) and outcomes["y"].shape == (4, 4)
    with pytest.raises(ValueError, match="'mu' has a flat .improper. prior, which cannot be simulated"):
        density_of("flat").simulate(tasks.batch(range(4)))


def test_rows_outside_the_support_are_named() -> None:
    def model(batch: Batch) -> None:
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            with batch.observations():
                pyro.sample("y", dist.Exponential(phi.exp()), obs=batch.y)

    tasks = Tasks.from_arrays(None, [[1.0, -2.0], [3.0]])
    outside = TaskDensity(model, tasks).outside_support(tasks.batch([0, 1]), torch.zeros(0))
    assert outside["y"].tolist() == [[False, True], [False, False]]


def test_supports_that_depend_on_parameters_exclude_no_row() -> None:
    """On those of a task or of all; a site whose bounds are known is judged."""

    def model(batch: Batch) -> None:
        width = pyro.sample("width", dist.LogNormal(0.0, 1.0))
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            with batch.observations():
                pyro.sample("own", dist.Uniform(phi, phi + 1.0), obs=batch.y)
                pyro.sample("shared", dist.Uniform(-width, width), obs=batch.y)
                pyro.sample("known", dist.Uniform(-4.0, 4.0), obs=batch.y)

    tasks = Tasks.from_arrays(None, [[1.0, 3.0], [-5.0]])
    outside = TaskDensity(model, tasks).outside_support(tasks.batch([0, 1]), torch.zeros(1))
    assert not any(outside[name].any() for name in ("own", "shared"))
    assert outside["known"].tolist() == [[False, False], [True, False]]


def test_terms_name_the_site_and_the_task() -> None:
    density, tasks = density_of("outputs"), SCENARIOS["outputs"].tasks
    theta, noise = point(density, 4)
    batch = tasks.batch(range(4))
    terms = density.terms(batch, theta, noise)
    assert list(terms) == ["phi", "y0", "y1"]
    torch.testing.assert_close(sum(terms.values()), density.log_task(theta, noise, density.tensors(batch), {}))


def test_prior_scale_is_the_scale_of_the_prior_in_unconstrained_space() -> None:
    location, scale = density_of("radon").prior_scale()
    torch.testing.assert_close(location[:2], torch.zeros(2))
    torch.testing.assert_close(scale[:2], torch.full((2,), 10.0))
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert density_of("known_prior").prior_scale()[0].shape == (0,)


def test_modules_are_read_and_given_back_with_the_fits_weights() -> None:
    density = density_of("network")
    assert sorted(density.learned.values) == ["net$$$0.bias", "net$$$0.weight", "net$$$2.weight", "noise"]
    torch.testing.assert_close(density.learned.values["noise"].exp(), torch.tensor(0.5))
    density.learned.values["net$$$0.bias"].add_(1.0)
    try:
        torch.testing.assert_close(density.modules()["net"][0].bias, make_net()[0].bias + 1.0)
    finally:
        density.learned.values["net$$$0.bias"].sub_(1.0)


def test_the_density_has_gradients_for_registered_parameters() -> None:
    density, tasks = density_of("network"), SCENARIOS["network"].tasks
    theta, noise = point(density, 4, 2, 1.0)
    values = {name: value.clone().requires_grad_() for name, value in density.learned.values.items()}
    total = density.log_task(theta, noise, density.tensors(tasks.batch(range(4))), values).sum()
    gradients = torch.autograd.grad(total, list(values.values()))
    assert all(g.abs().sum() > 0 for g in gradients)


def test_nothing_outside_is_changed() -> None:
    net = make_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    torch.set_default_dtype(torch.float32)
    state, validation = torch.get_rng_state(), torch.distributions.Distribution._validate_args
    tasks = make_tasks()
    density = TaskDensity(network(net), tasks)
    data = density.tensors(tasks.batch(range(4)))
    theta, noise = torch.zeros(1, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64)
    density.log_task(theta, noise, data, dict(density.learned.values))
    density.log_task.mapped(
        theta.expand(2, 1), noise.expand(2, 4, 3), data, dict(density.learned.values), in_dims=(0, 0, None, None)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.distributions.Distribution._validate_args == validation
    assert torch.get_default_dtype() is torch.float32
    assert len(pyro.get_param_store()) == 0 and net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.requires_grad and p.dtype is torch.float32 and p.grad is None for p in net.parameters())
    torch.set_default_dtype(torch.float64)


def test_radon_by_hand() -> None:
    density, tasks = density_of("radon"), SCENARIOS["radon"].tasks
    theta, noise = point(density, 4, 11)
    tau, sigma = theta[2:4].exp(), theta[4].exp()
    phi = theta[:2] + tau * noise
    for i in range(4):
        rows = slice(int(tasks.offsets[i]), int(tasks.offsets[i + 1]))
        mean = phi[i, 0] + phi[i, 1] * tasks.x[rows, 0]
        by_hand = dist.Normal(mean, sigma).log_prob(tasks.y[rows]).sum() + dist.Normal(0, 1).log_prob(noise[i]).sum()
        got = density.log_task(theta, noise[[i]], density.tensors(tasks.batch([i])), {})
        torch.testing.assert_close(got, by_hand.reshape(1))
    assert radon.__name__ == "radon"


def test_draws_of_theta_are_those_of_its_prior() -> None:
    density, count = density_of("supports"), 4000
    drawn = density.shared_values(density.draw_theta(count))
    moments = {"rate": (2 / 1.5, 2 / 1.5**2), "bound": (0.5, 9 / 12), "share": (2 / 5, 0.04)}
    for name, (mean, variance) in moments.items():
        assert abs(drawn[name].mean() - mean) < 4 * (variance / count) ** 0.5
        assert len(drawn[name].unique()) == count
    torch.testing.assert_close(drawn["mix"].mean(0), torch.tensor([1.0, 2.0, 3.0]) / 6, atol=0.02, rtol=0)
    assert abs(drawn["chol"][:, 1, 0].mean()) < 0.04
    assert abs(torch.corrcoef(torch.stack([drawn["rate"], drawn["bound"]]))[0, 1]) < 0.08


def test_a_model_that_has_been_read_is_read_once_and_untrained_again() -> None:
    scenario = SCENARIOS["network"]
    first = TaskDensity(scenario.model, scenario.tasks)
    again = read(Read(first), scenario.tasks, dtype=torch.float64)
    assert again.log_task is first.log_task
    before = {name: value.clone() for name, value in first.learned.values.items()}
    again.learned.values.update({name: value + 1 for name, value in again.learned.values.items()})
    torch.testing.assert_close(dict(first.learned.values), before)
    torch.testing.assert_close(dict(read(Read(again), scenario.tasks, dtype=torch.float64).learned.values), before)
    assert read(scenario.model, scenario.tasks, dtype=torch.float32).dtype is torch.float32
    with pytest.raises(ValueError, match="read it anew"):
        read(Read(first), scenario.tasks, dtype=torch.float32)
    assert Read(density_of("supports")).density.model is SCENARIOS["supports"].model


def test_drawing_from_gamma_and_dirichlet_priors_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """Their draws are clamped in place; vmap has no rule for that and says so on the terminal."""
    read = TaskDensity(supports, make_tasks())
    theta = torch.zeros(50, read.structure.shared_size, dtype=torch.float64)
    empty = torch.zeros(50, 4, read.structure.task_size, dtype=torch.float64)
    data = read.tensors(make_tasks().batch([0, 1, 2, 3]))
    with torch.no_grad():
        drawn = read.prior_noise.mapped(theta, empty, data, {}, in_dims=(0, 0, None, None))
    assert capfd.readouterr() == ("", "") and bool(torch.isfinite(drawn).all())
    assert set(read.prior_noise.status.values()) == {"recorded"}
