"""Training as a whole: options, mini-batches, points, weights, automatic stopping, and what stops it at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import ROWS, SIGMA, TAU, ExactGuide, centre, close, density, exact, known_mean, make_tasks
from torch import nn

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.recording import seeded
from bayesmeta.inference import amortized
from bayesmeta.inference.amortized import Amortized, build_guides, fit_amortized
from bayesmeta.inference.correction import SharedDraws
from bayesmeta.inference.guides import NaturalGuide
from bayesmeta.inference.objectives import OBJECTIVES, Guides, Step, elbo
from bayesmeta.inference.particles import ParticleShared
from bayesmeta.inference.shared import LowRankShared, NormalShared, PointShared
from bayesmeta.inference.training import History, Optimizer
from bayesmeta.results.weighted import weighted_mean, weighted_sd

DRAWS = amortized.FINAL_DRAWS


def learn(tasks: Tasks, model: Any = None, **options: Any) -> tuple[Guides, SharedDraws, History]:
    steps = options.pop("steps", 150)
    optimizer = options.pop("optimizer", None) or Optimizer(steps=steps)
    with seeded(0):
        read = density() if model is None else TaskDensity(model, tasks)
        return fit_amortized(read, tasks, Amortized(optimizer=optimizer, **options), progress=False)


def mu_of(drawn: SharedDraws) -> tuple[float, float]:
    theta = drawn.theta[:, 0].detach().numpy()
    return float(weighted_mean(theta, drawn.log_weight)), float(weighted_sd(theta, drawn.log_weight))


def test_options_are_checked_when_they_are_written() -> None:
    with pytest.raises(ValueError, match=r"Amortized: shared must be one of \[.*'map'.*\], got 'nuts'"):
        Amortized(shared="nuts")
    with pytest.raises(ValueError, match=r"Amortized: objective must be one of \['elbo', .*\], got 'mse'"):
        Amortized(objective="mse")
    with pytest.raises(ValueError, match="Optimizer: steps must be a positive whole number, got 0"):
        Amortized(optimizer=Optimizer(steps=0))
    assert Amortized(objective=elbo).objective is elbo


def test_guides_before_training() -> None:
    tasks = make_tasks(ROWS)
    kinds = {"normal": NormalShared, "lowrank": LowRankShared, "map": PointShared, "svgd": ParticleShared}
    for name, kind in kinds.items():
        guides = build_guides(density(), tasks, Amortized(shared=name))
        assert type(guides.shared) is kind and isinstance(guides.task, NaturalGuide)
        loc, _ = guides.shared.centre()
        assert float(loc) == 0.0
    own = ExactGuide()
    assert build_guides(density(), tasks, Amortized(guide=own)).task is own


@pytest.mark.parametrize("objective", ["elbo", "iw"])
def test_q_of_theta_is_exact_where_the_model_is_gaussian(objective: str) -> None:
    """Before any correction: the family holds the exact posterior of mu, and training finds it."""
    guides, drawn, history = learn(make_tasks(ROWS), objective=objective, guide=ExactGuide(), steps=300)
    mean, covariance = exact(ROWS)
    loc, scale = (float(v) for v in guides.shared.centre())
    sd = covariance[-1, -1] ** 0.5
    tolerance = 0.05 if objective == "elbo" else 0.3
    assert abs(loc - mean[-1]) < tolerance * sd and abs(scale / sd - 1) < tolerance
    assert drawn.status == "corrected"
    assert close(*mu_of(drawn), (mean[-1], sd), DRAWS * drawn.ess)
    assert history.stages[-1]["steps"] == 300 and history.steps[-1]["step"] == 299


def test_the_bound_is_the_evidence_where_q_is_exact() -> None:
    _, _, history = learn(make_tasks(ROWS), guide=ExactGuide(), steps=300)
    y = np.concatenate([np.array(y) for y in ROWS.values()])
    task = np.repeat(np.arange(len(ROWS)), [len(y) for y in ROWS.values()])
    covariance = SIGMA**2 * np.eye(len(y)) + TAU**2 * (task[:, None] == task) + 9.0
    log_evidence = -0.5 * (y @ np.linalg.solve(covariance, y) + np.linalg.slogdet(2 * np.pi * covariance)[1])
    assert history.stages[-1]["bound"] * len(ROWS) == pytest.approx(log_evidence, abs=0.02)


def test_mini_batches_of_tasks_see_all_of_them() -> None:
    """Two of five tasks a step, scaled up: the same posterior."""
    guides, drawn, _ = learn(
        make_tasks(ROWS), guide=ExactGuide(), optimizer=Optimizer(steps=400, batch_tasks=2, lr=2e-3)
    )
    mean, covariance = exact(ROWS)
    sd = covariance[-1, -1] ** 0.5
    loc, scale = (float(v) for v in guides.shared.centre())
    assert abs(loc - mean[-1]) < 0.5 * sd and abs(scale / sd - 1) < 0.3
    assert close(*mu_of(drawn), (mean[-1], sd), DRAWS * drawn.ess)


def test_tasks_are_drawn_uniformly_whatever_their_size() -> None:
    sizes = np.array([1, 50, 2, 50, 3, 1])
    torch.manual_seed(0)
    counts = np.zeros(6)
    draw = amortized._Draw(sizes, 2, exact_size=False)
    for _ in range(3000):
        index, rows = draw()
        counts[index] += 1
        assert rows is not None and rows >= sizes[index].max()
    assert np.abs(counts - 1000).max() < 4 * np.sqrt(3000 * 2 / 9)
    counts[:] = 0
    draw = amortized._Draw(sizes, 1, exact_size=True)
    for _ in range(3000):
        index, rows = draw()
        assert rows is None and len(set(sizes[index])) == 1
        counts[index] += 1
    assert np.abs(counts - 500).max() < 4 * np.sqrt(3000 * 5 / 36)


def test_a_point_is_the_mode_of_the_marginal() -> None:
    guides, drawn, _ = learn(make_tasks(ROWS), guide=ExactGuide(), shared="map", steps=300)
    mean, covariance = exact(ROWS)
    assert drawn.status == "plug-in"
    assert abs(float(guides.shared.centre()[0]) - mean[-1]) < 0.05 * covariance[-1, -1] ** 0.5


def test_weights_of_rows_and_tasks_are_powers_of_the_likelihood() -> None:
    generator = np.random.default_rng(0)
    weight = [generator.uniform(0.2, 3.0, len(y)) for y in ROWS.values()]
    task_weight = np.array([0.5, 2.0, 1.0, 3.0, 0.1])
    tasks = make_tasks(ROWS, weight=weight, task_weight=task_weight)
    _, drawn, _ = learn(tasks, centre, steps=300)
    mean, covariance = exact(ROWS, [w * t for w, t in zip(weight, task_weight, strict=True)])
    sd = covariance[-1, -1] ** 0.5
    assert drawn.status == "corrected"
    assert close(*mu_of(drawn), (mean[-1], sd), DRAWS * drawn.ess)
    unweighted = exact(ROWS)
    assert not close(*mu_of(drawn), (unweighted[0][-1], unweighted[1][-1, -1] ** 0.5), DRAWS * drawn.ess)


def test_training_stops_by_itself_when_the_diagnostic_is_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bayesmeta.inference.training.STAGES", (150, 150, 150, 150))
    _, drawn, history = learn(make_tasks(ROWS), guide=ExactGuide(), optimizer=Optimizer())
    assert [stage["done"] for stage in history.stages] == [False] * (len(history.stages) - 1) + [True]
    assert len(history.stages) < 4 and drawn.status == "corrected"
    assert history.stages[-1]["ess"] > 0.5 or history.stages[-1]["bound"] - history.stages[-2]["bound"] < 1e-3


def test_networks_learn_points_of_the_model() -> None:
    """A registered module and a pyro.param are learned with q; the user's own module stays as it was."""
    rng = np.random.default_rng(1)
    x = [rng.normal(size=(12, 1)) for _ in range(12)]
    y = [3.0 * v[:, 0] + rng.normal() + 0.5 * rng.normal(size=12) for v in x]
    net = nn.Linear(1, 1, bias=False)
    before = net.weight.detach().clone()

    def model(batch: Batch) -> None:
        pyro.module("net", net)
        noise = pyro.param("noise", torch.tensor(1.0), constraint=dist.constraints.positive)
        with batch.tasks():
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with batch.observations():
                pyro.sample("y", dist.Normal(a + net(batch.x).squeeze(-1), noise), obs=batch.y)

    guides, _, _ = learn(Tasks.from_arrays(x, y), model, optimizer=Optimizer(steps=500, lr=3e-2))
    values = {name.split("$$$")[-1]: value for name, value in guides.values.items()}
    assert torch.equal(net.weight.detach(), before) and len(pyro.get_param_store()) == 0
    slope, sd = _slope(x, y)
    assert abs(float(values["weight"]) - slope) < 3 * sd
    assert 0.4 < float(values["noise"].exp()) < 0.6


def _slope(x: list[np.ndarray], y: list[np.ndarray]) -> tuple[float, float]:
    """Slope within tasks by least squares, which the model's marginal likelihood nearly maximises."""
    within = [(v[:, 0] - v.mean(), t - t.mean()) for v, t in zip(x, y, strict=True)]
    information = sum(float(v @ v) for v, _ in within)
    return sum(float(v @ t) for v, t in within) / information, 0.5 / information**0.5


def test_a_loss_that_is_not_finite_names_the_site_and_the_task() -> None:
    def model(batch: Batch) -> None:
        with batch.tasks():
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with batch.observations():
                scale = torch.where(batch.x[..., 0] > 5, torch.zeros(()), torch.ones(()))
                pyro.sample("y", dist.Normal(a, scale, validate_args=False), obs=batch.y)

    x = [np.zeros((2, 1)), np.array([[0.0], [9.0]]), np.zeros((3, 1))]
    tasks = Tasks.from_arrays(x, [np.zeros(2), np.zeros(2), np.zeros(3)], names=["fine", "bad", "good"])
    with pytest.raises(ValueError, match=r"log density of task 'bad' is not finite at site\(s\) \['y'\]; training has"):
        learn(tasks, model, steps=5)


def test_a_covariance_without_a_factor_is_told() -> None:
    """Beyond 0.3 it is no correlation any more; the prior of `alike` goes far beyond."""

    def model(batch: Batch) -> None:
        alike = pyro.sample("alike", dist.Normal(0.0, 1.0))
        with batch.tasks():
            covariance = torch.eye(2) + (alike - 0.3).exp() * (1 - torch.eye(2))
            phi = pyro.sample("phi", dist.MultivariateNormal(torch.zeros(2), covariance))
            with batch.observations():
                pyro.sample("y", dist.Normal(phi.sum(-1), SIGMA), obs=batch.y)

    with pytest.raises(ValueError, match="is not finite, a covariance has no Cholesky factor; training has stopped"):
        learn(Tasks.from_arrays(None, [np.array([3.0, 4.0]), np.array([-4.0, -3.0])] * 3), model, steps=600)


def test_an_objective_that_is_not_finite_is_told_from_the_model() -> None:
    def broken(density: Any, guides: Guides, step: Any) -> Any:
        loss, info = elbo(density, guides, step)
        return loss * torch.nan, info

    def silent(density: Any, guides: Guides, step: Any) -> Any:
        return elbo(density, guides, step)[0] * torch.nan, {}

    with pytest.raises(ValueError, match="Every task's log density is finite: the guide has diverged; lower lr"):
        learn(make_tasks(ROWS), guide=ExactGuide(), objective=broken, steps=5)
    with pytest.raises(ValueError, match="its info names no log_p, theta and noise"):
        learn(make_tasks(ROWS), guide=ExactGuide(), objective=silent, steps=5)


def test_theta_is_neither_drawn_away_nor_collapses_where_steps_see_some_of_the_tasks() -> None:
    """Twelve shared effects that rows look up, 3,000 tasks, 64 a step: q(θ) stays near the exact posterior."""
    count, rows, sigma = 12, 6, 0.7

    def model(batch: Batch) -> None:
        effects = pyro.sample("effects", dist.Normal(0.0, 1.0).expand([count]).to_event(1))
        with batch.tasks():
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with batch.observations():
                pyro.sample("y", dist.Normal(a + effects[batch["place"]], sigma), obs=batch.y)

    rng = np.random.default_rng(0)
    place, effects = rng.integers(count, size=(3000, rows)), rng.normal(size=count)
    y = rng.normal(size=(3000, 1)) + effects[place] + sigma * rng.normal(size=place.shape)
    tasks = Tasks.from_arrays(None, list(y), columns={"place": list(place)})
    chosen, weight = np.eye(count)[place], np.linalg.inv(sigma**2 * np.eye(rows) + 1)
    covariance = np.linalg.inv(np.eye(count) + np.einsum("tij,ik,tkl->jl", chosen, weight, chosen))
    mean, sd = covariance @ np.einsum("tij,ik,tk->j", chosen, weight, y), np.sqrt(np.diag(covariance))
    options = Amortized(optimizer=Optimizer(steps=800, batch_tasks=64))
    torch.manual_seed(0)
    guides, _, _ = fit_amortized(TaskDensity(model, tasks), tasks, options, progress=False)
    loc, scale = (part.numpy() for part in guides.shared.centre())
    assert np.sqrt((((loc - mean) / sd) ** 2).mean()) < 2
    assert (scale / sd > 0.6).all() and (scale / sd < 1.7).all()


@pytest.mark.parametrize(("objective", "count"), [("elbo", 1), ("iw", 8), ("predictive", 8), ("pac-bayes", 1)])
def test_at_a_point_theta_only_logs_of_means_take_several_draws(objective: str, count: int) -> None:
    options, tasks = Amortized(shared="map", objective=objective), make_tasks(ROWS)
    assert amortized._draws(density(), options, len(tasks)) == count


@pytest.mark.parametrize(("objective", "counts"), [("elbo", (8, 5, 2)), ("iw", (8, 8, 8)), ("predictive", (8, 8, 8))])
def test_a_step_draws_fewer_posteriors_only_where_the_bound_is_their_mean(
    objective: str, counts: tuple[int, ...]
) -> None:
    """With K = 2 inside a logarithm posteriors of "predictive" came out four times too narrow."""
    found = []

    def spy(density: TaskDensity, guides: Guides, step: Step) -> tuple[torch.Tensor, Any]:
        found.append(step.draws)
        return OBJECTIVES["elbo"](density, guides, step)

    for tasks in (4, 100, 300):
        alone = make_tasks({f"t{i}": [0.5] for i in range(tasks)})
        options = Amortized(objective=objective, optimizer=Optimizer(steps=1))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(amortized, "_objective", lambda options, tasks: spy)
            fit_amortized(TaskDensity(known_mean, alone), alone, options, progress=False)
    assert tuple(found) == counts
