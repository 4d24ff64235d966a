from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
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
from bayesmeta.hierarchy import likelihoods
from bayesmeta.hierarchy.model import HierarchicalModel
from bayesmeta.hierarchy.priors import Gaussian
from bayesmeta.hierarchy.recording import Recorded

SIZES = (3, 1, 4)
Shared = dict[str, Tensor]


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def line(phi: Tensor, x: Tensor) -> Tensor:
    return phi[..., 0] + phi[..., 1] * x[..., 0]


def softmax_logits(phi: Tensor, x: Tensor) -> Tensor:
    return torch.stack([line(phi, x), 0.5 * line(phi, x) ** 2, torch.zeros_like(x[..., 0])], -1)


def location_and_scale(phi: Tensor, x: Tensor) -> Tensor:
    return torch.stack([line(phi, x), phi[..., 1] - x[..., 0]], -1)


def normal(f: Tensor, batch: Batch, shared: Shared) -> Any:
    return dist.Normal(f, shared["sigma"])


def normal_known(f: Tensor, batch: Batch, shared: Shared) -> Any:
    return dist.Normal(f, batch["se"])


def normal_fixed(f: Tensor, batch: Batch, shared: Shared) -> Any:
    return dist.Normal(f, 0.1)


def location_scale(f: Tensor, batch: Batch, shared: Shared) -> Any:
    return dist.Normal(f[..., 0], (2 * f[..., 1]).exp().sqrt())


def student(f: Tensor, batch: Batch, shared: Shared) -> Any:
    return dist.StudentT(shared["nu"], f, shared["sigma"])


def bernoulli(f: Tensor, batch: Batch, shared: Shared) -> Any:
    return dist.Bernoulli(probs=torch.sigmoid(f))


def binomial(f: Tensor, batch: Batch, shared: Shared) -> Any:
    return dist.Binomial(batch["trials"], probs=torch.sigmoid(f))


def poisson(f: Tensor, batch: Batch, shared: Shared) -> Any:
    return dist.Poisson(torch.exp(f))


def poisson_exposed(f: Tensor, batch: Batch, shared: Shared) -> Any:
    return dist.Poisson(torch.exp(f + batch["exposure"].log()))


def overdispersed(f: Tensor, batch: Batch, shared: Shared) -> Any:
    return dist.GammaPoisson(shared["concentration"], shared["concentration"] / (batch["exposure"] * torch.exp(f)))


def categorical(f: Tensor, batch: Batch, shared: Shared) -> Any:
    return dist.Categorical(probs=torch.softmax(f, -1))


def ordered(f: Tensor, batch: Batch, shared: Shared) -> Any:
    return dist.OrderedLogistic(f, shared["cutpoints"])


def gamma(f: Tensor, batch: Batch, shared: Shared) -> Any:
    return dist.Gamma(shared["concentration"], shared["concentration"] / torch.exp(f))


def beta(f: Tensor, batch: Batch, shared: Shared) -> Any:
    mean = torch.sigmoid(f)
    return dist.Beta(shared["concentration"] * mean, shared["concentration"] * (1 - mean))


def cutpoints() -> Any:
    base = dist.Normal(torch.tensor([-1.0, 0.0, 0.0]), torch.tensor([2.5, 1.0, 1.0]))
    return dist.TransformedDistribution(base, [dist.transforms.OrderedTransform()])


@dataclasses.dataclass
class Case:
    """A built-in likelihood, and the same written by hand: outcome, priors of its shared sites, labels, a point."""

    built_in: Callable[[], likelihoods.Likelihood]
    outcome: Callable[[Tensor, Batch, Shared], Any]
    y: list[float]
    point: dict[str, Any] = dataclasses.field(default_factory=dict)
    priors: dict[str, Callable[[], Any]] = dataclasses.field(default_factory=dict)
    predictor: Callable[[Tensor, Tensor], Tensor] = line


CONCENTRATION: dict[str, Any] = {
    "point": {"concentration": 3.2},
    "priors": {"concentration": lambda: dist.Gamma(2.0, 0.1)},
}
COUNTS = [0.0, 3.0, 1.0, 7.0, 0.0, 2.0, 2.0, 11.0]
REALS = [0.3, -1.2, 2.0, 0.7, -0.4, 0.1, 9.0, 0.0]
LEVELS = [0.0, 3.0, 1.0, 2.0, 0.0, 2.0, 3.0, 1.0]
SIGMA: dict[str, Any] = {"point": {"sigma": 0.7}, "priors": {"sigma": lambda: dist.HalfNormal(2.5)}}
CASES: dict[str, Case] = {
    "normal": Case(likelihoods.Normal, normal, REALS, **SIGMA),
    "normal, known": Case(lambda: likelihoods.Normal("se"), normal_known, REALS),
    "normal, fixed": Case(lambda: likelihoods.Normal(0.1), normal_fixed, REALS),
    "location and scale": Case(likelihoods.LocationScale, location_scale, REALS, predictor=location_and_scale),
    "student": Case(
        lambda: likelihoods.StudentT(prior_scale=0.1),
        student,
        REALS,
        {"sigma": 0.7, "nu": 4.5},
        {"sigma": lambda: dist.HalfNormal(0.1), "nu": lambda: dist.Gamma(2.0, 0.1)},
    ),
    "bernoulli": Case(likelihoods.Bernoulli, bernoulli, [0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0]),
    "binomial": Case(lambda: likelihoods.Binomial("trials"), binomial, COUNTS),
    "poisson": Case(likelihoods.Poisson, poisson, COUNTS),
    "poisson, exposed": Case(lambda: likelihoods.Poisson(exposure="exposure"), poisson_exposed, COUNTS),
    "negative binomial": Case(
        lambda: likelihoods.NegativeBinomial(exposure="exposure"), overdispersed, COUNTS, **CONCENTRATION
    ),
    "categorical": Case(
        likelihoods.Categorical, categorical, [0.0, 2.0, 1.0, 2.0, 0.0, 2.0, 1.0, 1.0], predictor=softmax_logits
    ),
    "ordered": Case(
        lambda: likelihoods.OrderedLogistic(4),
        ordered,
        LEVELS,
        {"cutpoints": [-1.0, 0.2, 1.3]},
        {"cutpoints": cutpoints},
    ),
    "gamma": Case(likelihoods.Gamma, gamma, [0.2, 1.5, 3.0, 0.7, 2.2, 1.0, 0.4, 5.0], **CONCENTRATION),
    "beta": Case(likelihoods.Beta, beta, [0.2, 0.5, 0.9, 0.01, 0.3, 0.6, 0.99, 0.4], **CONCENTRATION),
}


def ragged(values: list[Any]) -> list[list[Any]]:
    start, parts = 0, []
    for size in SIZES:
        parts.append(values[start : start + size])
        start += size
    return parts


def make_tasks(y: list[Any]) -> Tasks:
    x = [[0.1, -0.5, 1.0], [0.4], [-1.0, 0.2, 0.8, -0.3]]
    columns = {
        "se": ragged([0.5, 0.1, 0.2, 1.0, 0.3, 0.4, 2.0, 0.7]),
        "trials": ragged([5, 3, 4, 7, 1, 9, 6, 12]),
    }
    return Tasks.from_arrays(
        [[[v] for v in part] for part in x],
        ragged(y),
        columns=columns,
        task_columns={"exposure": [0.5, 2.0, 10.0]},
        names=["a", "b", "c"],
    )


def built_in(case: Case) -> HierarchicalModel:
    return HierarchicalModel(Gaussian(2), case.predictor, case.built_in())


def by_callable(case: Case) -> HierarchicalModel:
    shared = {name: (lambda _, prior=prior: prior()) for name, prior in case.priors.items()}
    return HierarchicalModel(Gaussian(2), case.predictor, case.outcome, shared=shared)


def by_hand(case: Case) -> Callable[[Batch], None]:
    def model(batch: Batch) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
        tau = pyro.sample("tau", dist.HalfNormal(2.5).expand([2]).to_event(1))
        shared = {name: pyro.sample(name, prior()) for name, prior in case.priors.items()}
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(mu, tau).to_event(1))
            with batch.observations():
                outcome = case.outcome(case.predictor(phi, batch.x), batch, shared)
                pyro.sample("y", outcome, obs=batch.y)

    return model


def point(case: Case, shift: float = 0.0) -> dict[str, Tensor]:
    phi = torch.tensor([[0.3, -0.6], [0.1, 0.9], [1.1, 0.4]]).unsqueeze(-2)
    values = {"mu": torch.tensor([0.3, -0.2]), "tau": torch.tensor([0.5, 0.8]), "phi": phi}
    values |= {name: torch.as_tensor(value) for name, value in case.point.items()}
    return {name: value + shift for name, value in values.items()}


def log_density(model: Callable[[Batch], None], batch: Batch, values: dict[str, Tensor]) -> Tensor:
    with pyro.validation_enabled(False), poutine.trace() as trace, poutine.condition(data=values):
        model(batch)
    return trace.trace.log_prob_sum()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_built_in_callable_and_pyro_function_are_one_density(case: Case) -> None:
    tasks = make_tasks(case.y)
    batch, at = tasks.batch([0, 1, 2]), point(case)
    expected = log_density(by_hand(case), batch, at).item()
    assert log_density(built_in(case), batch, at).item() == pytest.approx(expected, abs=1e-10)
    assert log_density(by_callable(case), batch, at).item() == pytest.approx(expected, abs=1e-10)
    built_in(case).check(tasks)
    # The padding counts nothing: the tasks one by one make the same sum.
    prior = {name: value for name, value in at.items() if name != "phi"}
    single = [
        log_density(built_in(case), tasks.batch([i]), prior | {"phi": at["phi"][i : i + 1]}).item() for i in range(3)
    ]
    alone = log_density(lambda _: built_in(case)._sample_shared() and None, batch, prior).item()
    assert sum(single) - 2 * alone == pytest.approx(expected, abs=1e-10)


WHOLE = {name: case for name, case in CASES.items() if not any(value % 1 for value in case.y)}


@pytest.mark.parametrize("case", WHOLE.values(), ids=WHOLE)
def test_integer_labels_are_the_same_labels(case: Case) -> None:
    whole = make_tasks([int(value) for value in case.y])
    assert whole.y.dtype == torch.int64
    with pyro.validation_enabled(True), poutine.trace() as trace, poutine.condition(data=point(case)):
        built_in(case)(whole.batch([0, 1, 2]))
    expected = log_density(built_in(case), make_tasks(case.y).batch([0, 1, 2]), point(case))
    assert trace.trace.log_prob_sum().item() == pytest.approx(expected.item(), abs=1e-10)


def recorded(function: Callable[[Any], Tensor], example: Any) -> Callable[[Any], Tensor]:
    """The graph of a function as a density is recorded: what is written in place becomes out of place."""
    with pyro.validation_enabled(False):
        return make_fx(torch.func.functionalize(function))(example)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_density_and_gradient_under_vmap_and_recorded(case: Case) -> None:
    batch, model = make_tasks(case.y).batch([0, 1, 2]), built_in(case)
    points = {name: torch.stack([value, value + 0.05, value + 0.1]) for name, value in point(case).items()}

    def density(values: dict[str, Tensor]) -> Tensor:
        return log_density(model, batch, values)

    graph = recorded(density, point(case))
    gradients, values = torch.func.vmap(torch.func.grad_and_value(graph))(points)
    for i in range(3):
        at = {name: value[i].clone().requires_grad_() for name, value in points.items()}
        expected = log_density(by_hand(case), batch, at)
        expected.backward()
        torch.testing.assert_close(values[i], expected.detach(), rtol=0, atol=1e-10)
        torch.testing.assert_close(graph(at).detach(), expected.detach(), rtol=0, atol=1e-10)
        for name in at:
            torch.testing.assert_close(gradients[name][i], at[name].grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_sampling_under_vmap_has_the_mean_of_the_outcome(name: str) -> None:
    case, draws = CASES[name], 2000
    batch, model = make_tasks(case.y).batch([0, 1, 2]), built_in(case)

    def sample(_: Tensor) -> Tensor:
        with pyro.validation_enabled(False), poutine.trace() as trace, poutine.condition(data=point(case)):
            model(batch)
        return trace.trace.nodes["y"]["fn"].sample().to(torch.float64)

    recorder = Recorded(sample, random=True)
    y = recorder.mapped(torch.zeros(draws), in_dims=(0,))
    assert set(recorder.status.values()) == {"recorded"}
    outcome = case.outcome(case.predictor(point(case)["phi"], batch.x), batch, point(case)).expand([3, 4])
    if isinstance(outcome, torch.distributions.Categorical):
        y, mean = (y == 1).double(), outcome.probs[..., 1]
        variance = mean * (1 - mean)
    else:
        mean, variance = outcome.mean, outcome.variance
    z = (y.mean(0) - mean) / (variance / draws).sqrt()
    # 12 entries a case, 14 cases: the largest of 168 standard normals.
    assert z.abs().max().item() < 4.5


def test_ordered_logits_are_exact_far_out() -> None:
    cuts = torch.tensor([-1.0, -1.0 + 1e-9, 3.0])
    logits = likelihoods._ordered_logits(torch.tensor([0.0, 60.0, -60.0]), cuts)
    # P(y = 1) of the second: the density of the logistic at −61 times 1e-9; Pyro's own difference is 0.
    assert logits[1, 1].item() == pytest.approx(-61 + torch.tensor(1e-9).log().item(), abs=1e-6)
    torch.testing.assert_close(torch.logsumexp(logits, -1), torch.zeros(3), rtol=0, atol=1e-12)


def test_two_ordered_levels_are_a_bernoulli() -> None:
    logits = likelihoods._ordered_logits(torch.tensor([0.7]), torch.tensor([0.2]))
    torch.testing.assert_close(logits.exp()[:, 1], torch.sigmoid(torch.tensor([0.5])))


REFUSED: dict[str, tuple[likelihoods.Likelihood, dict[int, float], str]] = {
    "bernoulli": (likelihoods.Bernoulli(), {0: 1, 1: 0, 2: 1, 3: 2}, "y as 0 or 1, got 2 in task 'b'"),
    "binomial": (likelihoods.Binomial("trials"), {5: 10}, r"y ≤ trials, got 10 in task 'c' \(1 of 8 rows"),
    "binomial, trials": (likelihoods.Binomial("se"), {}, "column 'se' as a count.*got 0.5 in task 'a'"),
    "binomial, fixed": (likelihoods.Binomial(2), {3: 3}, "y ≤ trials, got 3 in task 'b'"),
    "poisson": (likelihoods.Poisson(), {7: -1}, "y as a count, 0, 1, 2, …, got -1 in task 'c'"),
    "negative binomial": (likelihoods.NegativeBinomial(), {2: 0.5}, "y as a count, 0, 1, 2, …, got 0.5 in task 'a'"),
    "exposure": (likelihoods.Poisson(exposure="zero"), {}, "column 'zero' finite and > 0, got 0 in task 'b'"),
    "scale": (likelihoods.Normal("zero"), {}, "Normal likelihood: expected column 'zero' finite and > 0"),
    "categorical": (likelihoods.Categorical(levels=3), {4: 3}, "y as a level, 0 … 2, got 3 in task 'c'"),
    "categorical, open": (likelihoods.Categorical(), {4: 0.5}, "y as a count, 0, 1, 2, …, got 0.5 in task 'c'"),
    "ordered": (likelihoods.OrderedLogistic(2), {1: 2}, "y as a level, 0 … 1, got 2 in task 'a'"),
    "gamma": (likelihoods.Gamma(), {0: 0, 1: 1, 2: 1}, "y > 0, got 0 in task 'a' .*correct or drop these rows"),
    "beta": (likelihoods.Beta(), {0: 0.5, 1: 0.5, 2: 1}, "y strictly between 0 and 1, got 1 in task 'a'"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_data_outside_the_support_are_refused(case: tuple[Any, dict[int, float], str]) -> None:
    likelihood, labels, message = case
    y = [labels.get(row, 0.0) for row in range(8)]
    tasks = Tasks.from_arrays(
        None,
        ragged(y),
        columns={"trials": ragged([9] * 8), "se": ragged([0.5] * 8)},
        task_columns={"zero": [1.0, 0.0, 2.0]},
        names=["a", "b", "c"],
    )
    with pytest.raises(ValueError, match=message):
        likelihood.check(tasks)


def test_missing_labels_are_not_judged() -> None:
    tasks = Tasks.from_arrays(None, [[1.0, float("nan")], [0.0]], missing="mask")
    likelihoods.Bernoulli().check(tasks)
    assert not tasks.observed.all()


def test_columns_must_exist() -> None:
    with pytest.raises(ValueError, match=r"unknown column 'exposed'; known: \['se', 'trials', 'exposure'\]"):
        likelihoods.Poisson(exposure="exposed").check(make_tasks(COUNTS))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: likelihoods.Normal(-1.0), "Normal: expected scale as a finite number > 0, got -1.0"),
        (lambda: likelihoods.Normal(prior_scale=0.0), "expected prior_scale as a finite number > 0, got 0.0"),
        (lambda: likelihoods.StudentT(prior_rate="nu"), "expected prior_rate as a finite number > 0, got 'nu'"),
        (lambda: likelihoods.Binomial(2.5), "Binomial: expected trials as an integer or the name of a column, got 2.5"),
        (lambda: likelihoods.Poisson(exposure=None), "expected exposure as a finite number > 0, got None"),
        (lambda: likelihoods.Categorical(levels=1), "Categorical: expected levels as an integer ≥ 2, got 1"),
        (lambda: likelihoods.OrderedLogistic(None), "OrderedLogistic: expected levels as an integer ≥ 2, got None"),
        (lambda: likelihoods.Custom(dist.Normal(0.0, 1.0)), "got a distribution; wrap it"),
    ],
)
def test_options_out_of_range_are_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_shapes_that_would_broadcast_are_refused() -> None:
    batch = make_tasks(REALS).batch([0, 1, 2])
    with pytest.raises(ValueError, match=r"Normal likelihood: .*of shape \(3, 4\).*got \(3, 4, 1\); index or sum"):
        likelihoods.Normal(1.0).distribution(torch.zeros(3, 4, 1), batch, {})
    with pytest.raises(ValueError, match=r"of shape \(3, 4, K\): 3 tasks, 4 rows, levels; got \(3, 4\)"):
        likelihoods.Categorical().distribution(torch.zeros(3, 4), batch, {})
    with pytest.raises(ValueError, match=r"of shape \(3, 4, 5\).*got \(3, 4, 6\)"):
        likelihoods.Categorical(levels=5).distribution(torch.zeros(3, 4, 6), batch, {})
    with pytest.raises(ValueError, match=r"LocationScale likelihood: .*of shape \(3, 4, 2\).*got \(3, 4\)"):
        likelihoods.LocationScale().distribution(torch.zeros(3, 4), batch, {})
    assert likelihoods.Normal(1.0).distribution(torch.zeros(3, 1), batch, {}).batch_shape == (3, 4)


def test_several_outputs_need_a_function() -> None:
    tasks = Tasks.from_arrays(None, [[[1.0, 2.0]], [[3.0, 4.0]]])
    with pytest.raises(ValueError, match=r"Normal likelihood: expected one output, got labels of shape \(2,\); write"):
        likelihoods.Normal().check(tasks)
    with pytest.raises(ValueError, match=r"LocationScale likelihood: expected one output, got labels of shape \(2,\)"):
        likelihoods.LocationScale().check(tasks)
    with pytest.raises(ValueError, match=r"expected one output, got labels of shape \(2,\)"):
        likelihoods.Normal(1.0).distribution(torch.zeros(2, 1), tasks.batch([0, 1]), {})
