"""Closed forms against the conjugate hierarchy; what is recognised as Gaussian and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import ROWS, SIGMA, TAU, conditional, density, evidence, make_tasks
from scenarios import make_tasks as mixed_tasks
from scenarios import outliers, outputs, process, radon, vector
from scipy.stats import multivariate_normal

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference import exact
from bayesmeta.inference.exact import ExactGuide, are_gaussian, closed_form, log_evidence
from bayesmeta.inference.protocols import Context


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def solved(read: TaskDensity, tasks: Tasks, theta: torch.Tensor) -> Any:
    guide = ExactGuide()
    guide.attach(read, tasks)
    batch = tasks.batch(np.arange(len(tasks)))
    return guide.condition(theta, Context(batch, read.tensors(batch)))


def test_posterior_and_evidence_of_the_conjugate_hierarchy() -> None:
    mu = torch.tensor([[-3.0], [0.4], [5.0]], dtype=torch.float64)
    found = solved(density(), make_tasks(ROWS), mu)
    mean, sd = conditional(ROWS, mu[:, 0].numpy())
    np.testing.assert_allclose(mu.numpy() + TAU * found.loc[..., 0].numpy(), mean, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(TAU / found.factor[..., 0, 0].numpy(), np.tile(sd, (3, 1)), rtol=1e-10)
    np.testing.assert_allclose(found.log_evidence.numpy(), evidence(ROWS, mu[:, 0].numpy()), rtol=1e-10)


def scaled(batch: Batch) -> None:
    """Both hyperparameters are learned: intercepts and slopes, correlated under the prior."""
    log_tau = pyro.sample("log_tau", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    with batch.tasks():
        scale = torch.diag(log_tau.exp()) @ torch.tensor([[1.0, 0.0], [0.6, 0.8]])
        phi = pyro.sample("phi", dist.MultivariateNormal(torch.tensor([0.3, -0.2]), scale_tril=scale))
        with batch.observations():
            pyro.sample("y", dist.Normal(phi[..., 0] + phi[..., 1] * batch.x[..., 0], 0.5), obs=batch.y)


@pytest.mark.parametrize("log_tau", [0.7, -18.0])
def test_two_parameters_also_as_the_prior_shrinks_to_a_point(log_tau: float) -> None:
    tasks = mixed_tasks()[np.array([0, 1, 3])]
    found = solved(TaskDensity(scaled, tasks), tasks, torch.full((1, 2), log_tau, dtype=torch.float64))
    root = math.exp(log_tau) * np.array([[1.0, 0.0], [0.6, 0.8]])
    for i, task in enumerate(tasks):
        design = np.stack([np.ones(len(task.y)), task.x[:, 0].numpy()], 1)
        covariance = design @ root @ root.T @ design.T + 0.25 * np.eye(len(task.y))
        centred = task.y.numpy() - design @ np.array([0.3, -0.2])
        right = multivariate_normal(np.zeros(len(centred)), covariance).logpdf(centred)
        assert float(found.log_evidence[0, i]) == pytest.approx(right, rel=1e-10, abs=1e-10)
        gain = (design @ root).T @ np.linalg.inv(covariance)
        np.testing.assert_allclose(found.loc[0, i], gain @ centred, rtol=1e-10, atol=1e-14)
        spread = np.linalg.inv((found.factor[0, i] @ found.factor[0, i].mT).numpy())
        np.testing.assert_allclose(spread, np.eye(2) - gain @ design @ root, atol=1e-10)


def test_the_evidence_alone_is_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 3, 3, generator=generator, dtype=torch.float64)
    value, gradient = torch.randn(5, generator=generator), torch.randn(5, 3, generator=generator, dtype=torch.float64)
    hessian = -(root @ root.mT + torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(
        log_evidence(value, gradient, hessian), closed_form(value, gradient, hessian).log_evidence
    )


def custom(prior: Callable[[], Any], likelihood: Callable[[torch.Tensor, Batch], Any]) -> Callable[[Batch], None]:
    def model(batch: Batch) -> None:
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with batch.tasks():
            phi = pyro.sample("phi", prior())
            with batch.observations():
                likelihood(tau.clamp(min=0.1) * phi, batch)

    return model


def normal(mean: torch.Tensor, batch: Batch) -> None:
    pyro.sample("y", dist.Normal(mean, 0.5), obs=batch.y)


def relu(phi: torch.Tensor, batch: Batch) -> None:
    normal(torch.relu(phi + 0.2) * batch.x[..., 0], batch)


def huber(phi: torch.Tensor, batch: Batch) -> None:
    off = (batch.y - phi).abs()
    pyro.factor("y", -torch.where(off < 2.0, 0.5 * off.square(), 2.0 * off - 2.0))


def censored(phi: torch.Tensor, batch: Batch) -> None:
    cut = batch.y > 0.5
    inside = dist.Normal(phi, 0.5).log_prob(batch.y)
    above = torch.special.log_ndtr((phi - 0.5) / 0.5)
    pyro.factor("y", torch.where(cut, above, inside))


def heavy(phi: torch.Tensor, batch: Batch) -> None:
    pyro.sample("y", dist.StudentT(30.0, phi, 0.5), obs=batch.y)


def nearly_normal(phi: torch.Tensor, batch: Batch) -> None:
    pyro.sample("y", dist.StudentT(1e6, phi, 0.5), obs=batch.y)


REFUSED = {
    "a Laplace prior": custom(lambda: dist.Laplace(0.0, 1.0), normal),
    "a Student prior": custom(lambda: dist.StudentT(50.0, 0.0, 1.0), normal),
    "a gamma prior": custom(lambda: dist.Gamma(2.0, 1.0), normal),
    "a log-normal prior": custom(lambda: dist.LogNormal(0.0, 0.3), normal),
    "a ReLU weight": custom(lambda: dist.Normal(0.0, 1.0), relu),
    "Huber's likelihood": custom(lambda: dist.Normal(0.0, 1.0), huber),
    "censored labels": custom(lambda: dist.Normal(0.0, 1.0), censored),
    "a Student likelihood": custom(lambda: dist.Normal(0.0, 1.0), heavy),
    "a Student likelihood of a million degrees": custom(lambda: dist.Normal(0.0, 1.0), nearly_normal),
}


def verdicts(model: Any, tasks: Tasks, **options: Any) -> np.ndarray:
    read = TaskDensity(model, tasks, **options)
    theta = read.initial_theta() + 0.3 * torch.randn(20, read.structure.shared_size, dtype=read.dtype)
    return are_gaussian(read, tasks, theta)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_gaussian_is_refused(name: str) -> None:
    """All the labels are small: no task is far out, where the difference would be plain."""
    tasks = Tasks.from_arrays([np.linspace(-1, 1, 4)[:, None]] * 2, [np.array([0.1, 0.9, -0.2, 0.4]), np.full(4, 0.7)])
    assert not verdicts(REFUSED[name], tasks).any()


def test_each_task_for_itself() -> None:
    """Only tasks without a cut label are Gaussian."""
    tasks = make_tasks({"in": [0.1, -0.4], "cut": [0.1, 0.9], "also in": [0.2]})
    assert verdicts(REFUSED["censored labels"], tasks).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("model", "tasks"),
    [
        (radon, mixed_tasks(weighted=True)),
        (radon, mixed_tasks("missing")),
        (outputs, mixed_tasks("outputs")),
        (vector, mixed_tasks()),
        (scaled, mixed_tasks()),
        (process, mixed_tasks(sizes=(4, 4, 4))),
        (radon, mixed_tasks(sizes=(1, 1))),
    ],
)
def test_linear_gaussian_tasks_are_recognised(model: Any, tasks: Tasks) -> None:
    assert verdicts(model, tasks).all()


def test_single_precision_is_never_trusted() -> None:
    assert not verdicts(radon, mixed_tasks(), dtype=torch.float32).any()


def test_one_draw_of_theta_is_enough_to_judge() -> None:
    theta = torch.zeros(1, 1, dtype=torch.float64)
    assert are_gaussian(density(), make_tasks(ROWS), theta).all() and SIGMA > 0


def test_a_narrow_second_mode_between_the_points_that_are_tried_is_not_gaussian(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One row that is probably wild: nearly its prior, but for a spike nine sds of the noise wide at 2.8 prior sds."""
    tasks = Tasks.from_arrays(None, [[-8.53], [40.0]])
    density, theta = TaskDensity(outliers, tasks), torch.zeros(10, 0, dtype=torch.float64)
    assert not are_gaussian(density, tasks, theta).any()
    monkeypatch.setattr(exact, "is_polynomial", lambda leaf: True)
    assert are_gaussian(density, tasks, theta).tolist() == [False, True], "the test would not see what follows"
    suspected = torch.tensor([0.0, 40.0 / 3, 13.0] * 4, dtype=torch.float64)[:, None, None].expand(-1, 2, 1)
    assert not are_gaussian(density, tasks, theta, suspected=suspected).any()


def test_a_mixture_in_several_dimensions_is_not_gaussian() -> None:
    """All of the mass is 3.2 prior sds away; at the points that are tried nothing is to be seen of it."""

    def model(batch: Batch) -> None:
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(torch.zeros(3), 3.0).to_event(1))
            with batch.observations():
                near = dist.Normal(phi.expand(batch.y.shape), 0.3).to_event(1).log_prob(batch.y)
                pyro.factor("y", torch.logaddexp(near, dist.Normal(0.0, 5.0).log_prob(batch.y).sum(-1)))

    tasks = Tasks.from_arrays(None, [np.full((5, 3), 5.5) + 0.1 * np.arange(5)[:, None]] * 8)
    density, theta = TaskDensity(model, tasks), torch.zeros(10, 0, dtype=torch.float64)
    assert not are_gaussian(density, tasks, theta).any()


def one_or_two(batch: Batch) -> None:
    """The share of a second cluster, far away, may be as good as 0."""
    share = pyro.sample("share", dist.Beta(1.0, 1.0))
    with batch.tasks():
        apart = dist.Normal(torch.tensor([0.0, 1e3]), 1.0)
        a = pyro.sample("a", dist.MixtureSameFamily(dist.Categorical(torch.stack([1 - share, share])), apart))
        with batch.observations():
            pyro.sample("y", dist.Normal(a, SIGMA), obs=batch.y)


def test_a_mixture_that_looks_gaussian_at_some_theta_is_not_gaussian() -> None:
    """Its curvature was not positive definite at other θ, which ended the fit."""
    tasks = make_tasks(ROWS)
    read = TaskDensity(one_or_two, tasks)
    assert not are_gaussian(read, tasks, torch.full((4, 1), -800.0, dtype=torch.float64)).any()


def test_as_a_guide_it_refuses_tasks_that_are_not_gaussian() -> None:
    def heavy(batch: Batch) -> None:
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            with batch.observations():
                pyro.sample("y", dist.StudentT(4.0, phi, 1.0), obs=batch.y)

    tasks = make_tasks(ROWS)
    with pytest.raises(ValueError, match="quadratic in φ"):
        ExactGuide().attach(TaskDensity(heavy, tasks), tasks)
    with pytest.raises(ValueError, match="float64"):
        ExactGuide().attach(TaskDensity(scaled, mixed_tasks(), dtype=torch.float32), mixed_tasks())
    ExactGuide(tested=True).attach(TaskDensity(heavy, tasks), tasks)
