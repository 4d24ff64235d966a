from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy import likelihoods
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.model import ConditionalModel, HierarchicalModel, with_conditional
from bayesmeta.hierarchy.priors import Gaussian


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def batch() -> Batch:
    tasks = Tasks.from_arrays(
        [[[0.1], [-0.5], [1.0]], [[0.4]]], [[0.3, -1.2, 2.0], [0.7]], columns={"se": [[0.5, 0.1, 0.2], [1.0]]}
    )
    return tasks.batch([0, 1])


def line(phi: Tensor, x: Tensor) -> Tensor:
    return phi[..., 0] + phi[..., 1] * x[..., 0]


def log_density(model: Callable[[Batch], Any], batch: Batch, values: dict[str, Tensor]) -> float:
    with poutine.trace() as trace, poutine.condition(data=values):
        model(batch)
    return trace.trace.log_prob_sum().item()


def draw(model: Callable[[Batch], Any], batch: Batch) -> dict[str, Any]:
    with poutine.trace() as trace:
        model(batch)
    sites = {name: site for name, site in trace.trace.nodes.items() if site["type"] == "sample"}
    return {name: site["value"] for name, site in sites.items() if name not in ("task", "obs")}


def test_sites_and_shapes(batch: Batch) -> None:
    model = HierarchicalModel(Gaussian(2, cov="full"), line, likelihoods.StudentT(), shared={"w": dist.Beta(2.0, 1.0)})
    sites = draw(model, batch)
    assert list(sites) == ["mu", "tau", "corr", "sigma", "nu", "w", "phi", "y"]
    shapes = {name: tuple(value.shape) for name, value in sites.items()}
    assert shapes["mu"] == shapes["tau"] == (2,) and shapes["corr"] == (2, 2) and shapes["phi"] == (2, 1, 2)
    assert shapes["sigma"] == shapes["w"] == () and shapes["y"] == (2, 3)
    assert all(value.dtype == torch.float64 for value in sites.values())
    assert repr(model) == "HierarchicalModel(phi: Gaussian, y: StudentT, shared: mu, tau, corr, sigma, nu, w)"


def test_shared_sites_may_depend_on_earlier_ones(batch: Batch) -> None:
    model = HierarchicalModel(
        lambda s: dist.Normal(s["centre"], s["width"]).to_event(1),
        line,
        likelihoods.Normal(0.1),
        shared={
            "width": torch.distributions.HalfNormal(2.0),
            "centre": lambda shared: dist.Normal(torch.zeros(2), shared["width"]),
        },
    )
    values = {"width": torch.tensor(0.6), "centre": torch.tensor([0.2, 0.4])}
    values["phi"] = torch.tensor([[[0.1, 0.3]], [[-0.4, 0.9]]])
    f = line(values["phi"], batch.x)
    terms = [
        dist.HalfNormal(2.0).log_prob(values["width"]),
        dist.Normal(0.0, 0.6).log_prob(values["centre"]).sum(),
        dist.Normal(values["centre"], 0.6).log_prob(values["phi"]).sum(),
        dist.Normal(f, 0.1).log_prob(batch.y)[batch.mask].sum(),
    ]
    assert log_density(model, batch, values) == pytest.approx(sum(term.item() for term in terms), abs=1e-10)


def test_a_known_prior_has_no_shared_site(batch: Batch) -> None:
    model = HierarchicalModel(dist.Normal(torch.zeros(2), 1.0).to_event(1), line, likelihoods.Normal(1.0))
    assert list(draw(model, batch)) == ["phi", "y"]


def test_predictor_gets_batch_and_shared_by_name(batch: Batch) -> None:
    seen: dict[str, Any] = {}

    def predictor(phi: Tensor, x: Tensor, shared: Any, batch: Batch) -> Tensor:
        seen.update(shared)
        return phi * batch["se"] + shared["sigma"]

    draw(
        HierarchicalModel(
            lambda shared: dist.Normal(0.0, shared["tau"]),
            predictor,
            likelihoods.Normal(),
            shared={"tau": lambda: dist.HalfNormal(0.1)},
        ),
        batch,
    )
    assert set(seen) == {"sigma", "tau"}


def test_a_predictor_that_ignores_rows_is_spread_over_them(batch: Batch) -> None:
    model = HierarchicalModel(Gaussian(1), lambda phi: phi[..., 0], likelihoods.Normal("se"))
    assert draw(model, batch)["phi"].shape == (2, 1, 1)


def test_log_likelihoods_become_a_masked_factor(batch: Batch) -> None:
    values = {"mu": torch.zeros(2), "tau": torch.ones(2), "phi": torch.full((2, 1, 2), 0.3)}
    built_in = HierarchicalModel(Gaussian(2), line, likelihoods.Normal(0.7))
    written = HierarchicalModel(
        Gaussian(2), line, lambda batch, f: -0.5 * ((batch.y - f) / 0.7) ** 2 - math.log(0.7 * math.sqrt(2 * math.pi))
    )
    assert log_density(written, batch, values) == pytest.approx(log_density(built_in, batch, values), abs=1e-10)


def test_several_outputs_are_one_event() -> None:
    tasks = Tasks.from_arrays(None, [[[1.0, 2.0], [0.0, 1.0]], [[3.0, 4.0]]])
    batch = tasks.batch([0, 1])
    model = HierarchicalModel(
        Gaussian(2),
        lambda phi: phi,
        lambda f, shared: dist.Normal(f, shared["s"]).to_event(1),
        shared={"s": dist.HalfNormal(torch.ones(2))},
    )
    values = {"mu": torch.zeros(2), "tau": torch.ones(2), "s": torch.tensor([0.5, 2.0])}
    values["phi"] = torch.tensor([[[0.1, 0.3]], [[-0.4, 0.9]]])
    rows = dist.Normal(values["phi"], values["s"]).log_prob(batch.y).sum(-1)[batch.mask].sum()
    shared = dist.Normal(0.0, 10.0).log_prob(values["mu"]).sum() + dist.HalfNormal(2.5).log_prob(values["tau"]).sum()
    shared = (
        shared + dist.HalfNormal(1.0).log_prob(values["s"]).sum() + dist.Normal(0.0, 1.0).log_prob(values["phi"]).sum()
    )
    assert log_density(model, batch, values) == pytest.approx((rows + shared).item(), abs=1e-10)


def covariance(batch: Batch, shared: Any) -> Tensor:
    distance = batch.x[..., 0].unsqueeze(-1) - batch.x[..., 0].unsqueeze(-2)
    return torch.exp(-0.5 * distance**2) + shared["noise"] ** 2 * torch.eye(batch.x.shape[1])


def coupled(f: Tensor, batch: Batch, shared: Any) -> Any:
    return dist.MultivariateNormal(f.unsqueeze(-2), covariance(batch, shared).unsqueeze(-3))


def gp(likelihood: Any = coupled) -> HierarchicalModel:
    return HierarchicalModel(Gaussian(2), line, likelihood, shared={"noise": dist.HalfNormal(1.0)})


@pytest.mark.parametrize("n", [1, 3])
def test_coupled_rows_are_observed_a_task_at_a_time(n: int) -> None:
    x = [[[0.1 * j + i] for j in range(n)] for i in range(2)]
    batch = Tasks.from_arrays(x, [[0.3 * j - i for j in range(n)] for i in range(2)]).batch([0, 1])
    values = {"mu": torch.zeros(2), "tau": torch.ones(2), "noise": torch.tensor(0.4)}
    values["phi"] = torch.tensor([[[0.1, 0.3]], [[-0.4, 0.9]]])
    with poutine.trace() as trace, poutine.condition(data=values):
        gp()(batch)
    site = trace.trace.nodes["y"]
    assert site["value"].shape == (2, 1, n) and [frame.name for frame in site["cond_indep_stack"]] == ["task"]
    f, cov = line(values["phi"], batch.x), covariance(batch, values)
    expected = sum(dist.MultivariateNormal(f[i], cov[i]).log_prob(batch.y[i]).item() for i in range(2))
    trace.trace.compute_log_prob()
    assert site["log_prob_sum"].item() == pytest.approx(expected, abs=1e-10)


def returning(value: Any) -> Callable[..., Any]:
    return lambda f: value


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (3.0, "likelihood: expected a torch or Pyro distribution, got float"),
        (torch.zeros(2, 1), r"a log likelihood for each row, shape \(2, 3\), got \(2, 1\); expand it"),
        (
            dist.Normal(torch.zeros(2, 3, 2), 1.0),
            r"expected a distribution of batch shape \(2, 3\).*got batch shape \(2, 3, 2\)",
        ),
        (dist.Normal(torch.zeros(2, 3, 2), 1.0).to_event(1), r"and event shape \(2,\); use"),
        (
            dist.MultivariateNormal(torch.zeros(2, 3), torch.eye(3)),
            r"batch shape \(2, 1\) and event shape \(3,\); got batch shape \(2,\)",
        ),
    ],
)
def test_outcomes_of_the_wrong_kind_are_refused(outcome: Any, message: str, batch: Batch) -> None:
    with pytest.raises(ValueError, match=message):
        HierarchicalModel(Gaussian(2), line, returning(outcome))(batch)


def test_predictor_must_return_a_tensor(batch: Batch) -> None:
    with pytest.raises(ValueError, match="predictor: expected a tensor .*got Normal"):
        HierarchicalModel(Gaussian(2), lambda phi, x: dist.Normal(0.0, 1.0), likelihoods.Normal())(batch)


def test_missing_labels_need_one_output() -> None:
    y = [[[1.0, float("nan")], [0.0, 1.0]], [[3.0, 4.0]]]
    batch = Tasks.from_arrays(None, y, missing="mask").batch([0, 1])
    with pytest.raises(
        ValueError, match=r"complete labels for a distribution of event shape \(2,\).*batch.output\(k\)"
    ):
        HierarchicalModel(Gaussian(2), lambda phi: phi, lambda f: dist.Normal(f, 1.0).to_event(1))(batch)
    single = Tasks.from_arrays(None, [[1.0, float("nan")], [0.5]], missing="mask").batch([0, 1])
    model = HierarchicalModel(Gaussian(1), lambda phi: phi[..., 0], likelihoods.Normal(1.0))
    values = {"mu": torch.zeros(1), "tau": torch.ones(1), "phi": torch.zeros(2, 1, 1)}
    complete = Tasks.from_arrays(None, [[1.0], [0.5]]).batch([0, 1])
    assert log_density(model, single, values) == pytest.approx(log_density(model, complete, values), abs=1e-12)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.basis = nn.Linear(1, 2).double()
        self.basis.bias.requires_grad_(False)

    def forward(self, phi: Tensor, x: Tensor) -> Tensor:
        return (phi * self.basis(x)).sum(-1)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, shared: Any) -> Any:
        return dist.Normal(torch.zeros(2), self.log_scale.exp()).to_event(1)


class Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, f: Tensor) -> Any:
        return dist.Normal(f, self.log_scale.exp())


def test_modules_are_registered(batch: Batch) -> None:
    model = HierarchicalModel(Scale(), Net(), Noise())
    with poutine.trace(param_only=True) as trace:
        model(batch)
    names = set(trace.trace.param_nodes)
    assert names == {"prior$$$log_scale", "predictor$$$basis.weight", "likelihood$$$log_scale"}
    with poutine.trace() as full:
        model(batch)
    full.trace.log_prob_sum().backward()
    assert model.predictor.basis.weight.grad.abs().sum() > 0 and model.prior.function.log_scale.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shared": {"mu": dist.Normal(0.0, 1.0)}}, r"got \['mu'\] again; rename them"),
        ({"shared": {"sigma": dist.Normal(0.0, 1.0)}}, r"got \['sigma'\] again"),
        ({"shared": {"phi": dist.Normal(0.0, 1.0)}}, r"got \['phi'\] again"),
        ({"shared": {"w": 3.0}}, r"shared\['w'\]: expected a callable of \(shared\), got 3.0"),
        ({"shared": {3: dist.Normal(0.0, 1.0)}}, "shared: expected names of sites, got 3"),
        ({"conditional": 3}, r"conditional: expected a callable \(phi, shared, context, x\)"),
        ({"prior": 3}, r"prior: expected a callable of \(shared, batch\), got 3"),
        ({"predictor": "line"}, r"predictor: expected a callable of \(phi, x, batch, shared\), got 'line'"),
        ({"likelihood": likelihoods.Normal}, r"got the class Normal; call it: Normal\(\)"),
        ({"likelihood": lambda f, sigma: f}, r"likelihood: .*requires \['sigma'\]; rename them"),
    ],
)
def test_components_are_checked_when_put_together(options: dict[str, Any], message: str) -> None:
    parts = {"prior": Gaussian(2), "predictor": line, "likelihood": likelihoods.Normal()} | options
    with pytest.raises(ValueError, match=message):
        HierarchicalModel(parts.pop("prior"), parts.pop("predictor"), parts.pop("likelihood"), **parts)


def test_check_asks_the_likelihood() -> None:
    model = HierarchicalModel(Gaussian(1), lambda phi: phi[..., 0], likelihoods.Poisson())
    with pytest.raises(ValueError, match="Poisson likelihood: expected y as a count"):
        model.check(Tasks.from_arrays(None, [[1.5], [2.0]]))


@pytest.mark.parametrize("verb", ["posterior", "predict", "save"])
def test_unfitted_models_say_so(verb: str) -> None:
    with pytest.raises(
        ValueError, match=rf"{verb}: .*HierarchicalModel that is not fitted: fit = bm.fit\(model, tasks\) first"
    ):
        getattr(gp(), verb)("anything", draws=3)
    learner = ConditionalModel(lambda context, x: dist.Normal(x[..., 0], 1.0))
    message = (
        "task parameters, got a ConditionalModel" if verb == "posterior" else "ConditionalModel that is not fitted"
    )
    with pytest.raises(ValueError, match=message):
        getattr(learner, verb)("anything")


def conditional(phi: Any, shared: Any, context: Batch, x: Tensor) -> Any:
    return dist.Normal(x[..., 0], 1.0)


def test_with_conditional_leaves_the_model_alone(batch: Batch) -> None:
    def model(batch: Batch) -> str:
        """A model."""
        return "called"

    carrying = with_conditional(model, conditional)
    assert carrying(batch) == "called" and carrying.conditional is conditional
    assert carrying.__doc__ == "A model." and carrying.__name__ == "model" and not hasattr(model, "conditional")
    components = gp()
    again = with_conditional(components, conditional)
    assert isinstance(again, HierarchicalModel) and again.conditional is conditional and components.conditional is None
    assert (
        HierarchicalModel(
            Gaussian(2), line, coupled, shared={"noise": dist.HalfNormal(1.0)}, conditional=conditional
        ).conditional
        is conditional
    )
    for wrong in (lambda: with_conditional(3, conditional), lambda: with_conditional(model, None)):
        with pytest.raises(ValueError, match="with_conditional: expected a model and a callable"):
            wrong()
    with pytest.raises(ValueError, match=r"conditional: expected a callable \(phi, shared, context, x\)"):
        with_conditional(model, 3)


def test_conditional_model_holds_a_module(batch: Batch) -> None:
    learner = ConditionalModel(lambda context, x: dist.Normal(x[..., 0], 1.0), objective="predictive", context=(1, 5))
    assert learner.context == (1, 5) and learner.objective == "predictive"
    assert learner(batch, batch.x).batch_shape == (2, 3)
    flat = ConditionalModel(lambda context, x: dist.Normal(x, 1.0))
    with pytest.raises(ValueError, match=r"batch shape \(2, 3\), tasks and rows of x, got \(2, 3, 1\)"):
        flat(batch, batch.x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"module": 3}, r"expected a callable \(context, x\) -> Distribution, got 3"),
        ({"objective": 3}, "expected objective as a name or a callable, got 3"),
        ({"context": (5, 2)}, r"0 ≤ smallest ≤ largest, got \(5, 2\)"),
        ({"context": 3}, "got 3"),
        ({"context": (0, 0.5)}, r"got \(0, 0.5\)"),
    ],
)
def test_conditional_model_refuses_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConditionalModel(options.pop("module", line), **options)


def test_an_undeclared_shared_parameter_is_named() -> None:
    model = HierarchicalModel(Gaussian(1), lambda phi, x: phi[..., 0], lambda f, shared: dist.Normal(f, shared["s"]))
    tasks = Tasks.from_arrays(None, [[0.0, 1.0], [2.0]])
    with pytest.raises(
        ValueError, match=r"unknown shared parameter 's'; known: \['mu', 'tau'\]. Declare it with shared="
    ):
        model(tasks.batch([0, 1]))


def test_shared_sites_expanded_outside_the_model_are_recorded() -> None:
    """`dist.Normal(0, 1).expand([k])`, the field's idiom, would go on validating inside the model."""
    weights = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
    model = HierarchicalModel(
        dist.Normal(0.0, 1.0).expand([1]).to_event(1),
        lambda phi, x, shared: phi[..., 0] + (x * shared["weights"]).sum(-1),
        likelihoods.Normal(),
        shared={"weights": weights},
    )
    rng = np.random.default_rng(0)
    tasks = Tasks.from_arrays(list(rng.normal(size=(3, 4, 2))), list(rng.normal(size=(3, 4))))
    density = TaskDensity(model, tasks)
    batch = tasks.batch(slice(None))
    density.log_task(torch.zeros(density.structure.shared_size), torch.zeros(3, 1), density.tensors(batch), {})
    assert set(density.log_task.status.values()) == {"recorded"}


def test_a_likelihood_brings_parameters_of_its_own(batch: Batch) -> None:
    """Then it fits into whatever builds a model from a likelihood."""
    function = lambda f, shared: dist.Normal(f, shared["width"])  # noqa: E731
    own = likelihoods.Custom(function, priors={"width": dist.LogNormal(0.0, 1.0)})
    model = HierarchicalModel(Gaussian(1), lambda phi, x: phi[..., 0], own)
    trace = poutine.trace(model).get_trace(batch)
    assert trace.nodes["y"]["fn"].scale.unique().item() == trace.nodes["width"]["value"].item()
    with pytest.raises(ValueError, match=r"expected priors\['width'\] as a distribution"):
        likelihoods.Custom(function, priors={"width": 1.0})  # type: ignore[dict-item]
    for priors, message in (
        (None, "expected priors as distributions by name"),
        ({"": dist.Normal(0.0, 1.0)}, "expected a name for each of priors, got ''"),
    ):
        with pytest.raises(ValueError, match=message):
            likelihoods.Custom(function, priors=priors)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got \['mu'\] again; rename them"):
        HierarchicalModel(
            Gaussian(1), lambda phi, x: phi[..., 0], likelihoods.Custom(function, priors={"mu": dist.Normal(0.0, 1.0)})
        )


class Learned(nn.Module):
    """A likelihood with a weight to be trained and a shared parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(0.5))

    def forward(self, f: Tensor, shared: Any) -> dist.Normal:
        """Labels around f and the shift."""
        return dist.Normal(f + self.shift, shared["width"])


@pytest.mark.parametrize("several", [False, True])
def test_a_likelihood_with_parameters_of_its_own_may_be_a_module(several: bool) -> None:
    rng = np.random.default_rng(0)
    own: Any = likelihoods.Custom(Learned(), priors={"width": dist.LogNormal(0.0, 1.0)})
    if several:
        own = likelihoods.Outputs({0: own, 1: own})
    tasks = Tasks.from_arrays(list(rng.normal(size=(3, 4, 2))), list(rng.normal(size=(3, 4, 2) if several else (3, 4))))
    density = TaskDensity(
        HierarchicalModel(Gaussian(2), lambda phi, x: phi * x if several else (phi * x).sum(-1), own), tasks
    )
    assert [name.split("$$$")[-1] for name in density.learned.values] == ["shift"]
