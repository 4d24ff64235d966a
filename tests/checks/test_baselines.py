"""No pooling and complete pooling against closed forms with the noise integrated on a grid."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from bayesmeta.checks.baselines import PRIOR_SD, THETA_DRAWS, CompletePooling, NoPooling, Units, baselines
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy import likelihoods, priors
from bayesmeta.hierarchy.model import HierarchicalModel

SIGMA_SCALE = 2.0
GRID = np.exp(np.linspace(math.log(0.1), math.log(8.0), 1500))
DRAWS = 20_000
MIN_RELATIVE_ESS = 0.5
"""Of the importance weights of these easy tasks."""


def simulated(*, tasks: int, seed: int) -> Tasks:
    generator = np.random.default_rng(seed)
    x = [generator.normal(3.0, 2.0, (int(n), 1)) for n in generator.integers(2, 9, tasks)]
    y = [5 + generator.normal() + (1 + generator.normal()) * a[:, 0] + generator.normal(size=len(a)) for a in x]
    return Tasks.from_arrays(x, y, names=[f"{seed}-{i}" for i in range(tasks)])


def model() -> HierarchicalModel:
    return HierarchicalModel(
        priors.Gaussian(2),
        lambda phi, x: phi[..., 0] + phi[..., 1] * x[..., 0],
        likelihoods.Normal(prior_scale=SIGMA_SCALE),
    )


def designs(tasks: Tasks) -> list[tuple[np.ndarray, np.ndarray]]:
    edges = tasks.offsets.tolist()
    x, y = tasks.x.numpy()[:, 0], tasks.y.numpy()
    return [(np.stack([np.ones(b - a), x[a:b]], 1), y[a:b]) for a, b in zip(edges, edges[1:], strict=False)]


def gaussian(
    design: np.ndarray, y: np.ndarray, centre: np.ndarray, sigma: float
) -> tuple[float, np.ndarray, np.ndarray]:
    """Log evidence, mean and covariance of φ ~ N(centre, 10² I) given rows."""
    covariance = PRIOR_SD**2 * design @ design.T + sigma**2 * np.eye(len(y))
    residual = y - design @ centre
    log_det = np.linalg.slogdet(covariance)[1]
    evidence = -0.5 * (residual @ np.linalg.solve(covariance, residual) + log_det + len(y) * math.log(2 * math.pi))
    precision = np.eye(2) / PRIOR_SD**2 + design.T @ design / sigma**2
    mean = np.linalg.solve(precision, centre / PRIOR_SD**2 + design.T @ y / sigma**2)
    return evidence, mean, np.linalg.inv(precision)


def grid_posterior(groups: list[tuple[np.ndarray, np.ndarray]], centre: np.ndarray, prior_scale: float) -> np.ndarray:
    """Weights of the noises of `GRID` given independent groups."""
    log_weight = -0.5 * (GRID / prior_scale) ** 2 + np.log(GRID)
    log_weight = log_weight + [sum(gaussian(d, y, centre, s)[0] for d, y in groups) for s in GRID]
    weight = np.exp(log_weight - log_weight.max())
    return weight / weight.sum()


def exact_predictive(
    weights: np.ndarray, given: tuple[np.ndarray, np.ndarray], at: np.ndarray, y: np.ndarray, centre: np.ndarray
) -> np.ndarray:
    """Log predictive density of rows of a new task, its own rows weighing the noise too."""
    parts = [gaussian(*given, centre, s) for s in GRID]
    evidence = np.array([p[0] for p in parts])
    weights = weights * np.exp(evidence - evidence.max())
    total = np.zeros(len(y))
    for weight, sigma, (_, mean, covariance) in zip(weights / weights.sum(), GRID, parts, strict=True):
        if weight > 1e-10:
            sd = np.sqrt(np.einsum("md,de,me->m", at, covariance, at) + sigma**2)
            total += weight * np.exp(-0.5 * ((y - at @ mean) / sd) ** 2) / (sd * math.sqrt(2 * math.pi))
    return np.log(total)


@pytest.fixture(scope="module")
def fitted() -> tuple[Tasks, NoPooling, CompletePooling]:
    torch.set_num_threads(1)
    known = simulated(tasks=12, seed=0)
    alone, pooled = baselines(model(), known, draws=DRAWS)
    assert isinstance(alone, NoPooling)
    assert isinstance(pooled, CompletePooling)
    return known, alone, pooled


def test_complete_pooling_is_one_regression(fitted: tuple[Tasks, NoPooling, CompletePooling]) -> None:
    known, _, pooled = fitted
    groups = designs(pooled.units.tasks(known))
    whole = np.concatenate([d for d, _ in groups]), np.concatenate([y for _, y in groups])
    weights = grid_posterior([whole], np.zeros(2), SIGMA_SCALE / pooled.units.y_scale)
    means = np.array([gaussian(*whole, np.zeros(2), s)[1] for s in GRID])
    sd = math.sqrt(gaussian(*whole, np.zeros(2), float(weights @ GRID))[2].max())
    assert np.abs(pooled.phi - weights @ means).max() < 4 * sd / math.sqrt(pooled.fit.shared.ess * DRAWS)


def test_noise_without_pooling(fitted: tuple[Tasks, NoPooling, CompletePooling]) -> None:
    known, alone, pooled = fitted
    weights = grid_posterior(designs(alone.units.tasks(known)), pooled.phi, SIGMA_SCALE / alone.units.y_scale)
    mean = weights @ GRID
    sd = math.sqrt(weights @ (GRID - mean) ** 2)
    found = float(alone.fit.shared.mean("sigma"))
    assert abs(found - mean) < 4 * sd / math.sqrt(alone.fit.shared.ess * THETA_DRAWS)


@pytest.mark.parametrize("rows", [1, 4])
def test_predictions_of_new_tasks_are_exact(fitted: tuple[Tasks, NoPooling, CompletePooling], rows: int) -> None:
    known, alone, pooled = fitted
    new = Tasks.from_arrays([np.linspace(0, 6, 8)[:, None]], [np.linspace(2, 14, 8)], names=["new"])
    context, target = new.split_rows(torch.arange(8) < rows)
    for baseline, centre in ((alone, pooled.phi), (pooled, np.zeros(2))):
        groups = designs(baseline.units.tasks(known))
        own = designs(baseline.units.tasks(context))[0]
        if baseline is pooled:
            whole = np.concatenate([d for d, _ in groups]), np.concatenate([y for _, y in groups])
            weights = grid_posterior([], centre, SIGMA_SCALE / baseline.units.y_scale)
            own = np.concatenate([whole[0], own[0]]), np.concatenate([whole[1], own[1]])
        else:
            weights = grid_posterior(groups, centre, SIGMA_SCALE / baseline.units.y_scale)
        at, y = designs(baseline.units.tasks(target))[0]
        exact = exact_predictive(weights, own, at, y, centre)
        (prediction,), flags = baseline.predict(context, target)
        assert flags == ("",)
        noise = float(weights @ GRID)
        error = np.sqrt(1 / (2 * math.sqrt(math.pi) * noise * np.exp(exact) * DRAWS))
        assert (np.abs(prediction.log_prob()[0] - exact) < 4 * error / math.sqrt(MIN_RELATIVE_ESS)).all()


def test_a_task_without_rows_gets_the_vague_prior(fitted: tuple[Tasks, NoPooling, CompletePooling]) -> None:
    _, alone, pooled = fitted
    new = Tasks.from_arrays([np.array([[3.0]])], [np.array([5.0])], names=["new"])
    context, target = new.split_rows(torch.tensor([False]))
    x = float(alone.units.tasks(target).x[0, 0])
    (prediction,), _ = alone.predict(context, target)
    spread = PRIOR_SD * math.sqrt(1 + x**2)
    assert prediction.sd[0, 0] == pytest.approx(spread, rel=0.05)
    assert abs(prediction.mean[0, 0] - pooled.phi @ [1, x]) < 4 * spread / math.sqrt(DRAWS)


def test_complete_pooling_takes_what_each_task_brings() -> None:
    """Standard errors and weights of tasks follow their rows: the one level is the weighted mean of all rows."""
    y, se, weight = [[1.0, 2.0], [5.0], [7.0, 8.0, 9.0]], np.array([0.5, 1.0, 2.0]), np.array([1.0, 3.0, 0.5])
    known = Tasks.from_arrays(None, y, task_columns={"se": se}, task_weight=weight, names=["a", "b", "c"])
    level = HierarchicalModel(
        priors.Gaussian(1), lambda phi, x: phi[..., 0].expand(*x.shape[:2]), likelihoods.Normal("se")
    )
    pooled = CompletePooling(level, known, centre=np.zeros(1), draws=DRAWS)
    precision = np.repeat(weight / se**2, [2, 1, 3])
    rows = np.concatenate(y)
    unit = rows.std()
    total = precision.sum() + 1 / (PRIOR_SD * unit) ** 2
    mean, sd = (precision @ rows + rows.mean() / (PRIOR_SD * unit) ** 2) / total, 1 / math.sqrt(total)
    assert abs(pooled.phi[0] * unit + rows.mean() - mean) < 4 * sd / math.sqrt(DRAWS)
    assert float(pooled.posterior(known).sd("phi")[0, 0]) * unit == pytest.approx(sd, rel=0.03)


def test_kinds_of_tasks_are_pooled_as_rows_of_their_kind() -> None:
    rng = np.random.default_rng(0)
    y = [rng.poisson(3.0, 30), rng.normal(math.log(3.0), 0.5, 30), rng.poisson(3.0, 30)]
    kinds = likelihoods.Kinds("kind", {"count": likelihoods.Poisson(), "log": likelihoods.Normal(0.5)})
    known = Tasks.from_arrays(None, y, task_columns={"kind": ["count", "log", "count"]}, names=["a", "b", "c"])
    one = HierarchicalModel(priors.Gaussian(1), lambda phi, x: phi[..., 0].expand(*x.shape[:2]), kinds)
    alone, pooled = baselines(one, known, draws=1000)
    assert pooled.phi[0] == pytest.approx(math.log(3.0), abs=0.2)
    for baseline in (alone, pooled):
        (counts, logs), flags = baseline.predict(known, known)
        assert flags == ("", "", "")
        assert counts.mean[[0, 2], 0] == pytest.approx(3.0, rel=0.3)
        assert logs.mean[1, 0] == pytest.approx(math.log(3.0), rel=0.3)


def test_rows_that_hang_together_stay_in_their_tasks() -> None:
    """Rows of a task share an unknown level of sd 1, a covariance: the one mean is known no better than 1/√T."""
    rng = np.random.default_rng(0)
    y = 2 + rng.normal(size=(6, 1)) + 0.3 * rng.normal(size=(6, 4))
    known = Tasks.from_arrays(None, list(y), names=list("abcdef"))

    def coupled(f: torch.Tensor, batch: Any, shared: Any) -> Any:
        size = f.shape[-1]
        covariance = 0.09 * torch.eye(size, dtype=f.dtype) + torch.ones(size, size, dtype=f.dtype)
        return torch.distributions.MultivariateNormal(f.unsqueeze(1), covariance)

    one = HierarchicalModel(priors.Gaussian(1), lambda phi, x: phi[..., 0].expand(*x.shape[:2]), coupled)
    pooled = CompletePooling(one, known, centre=np.zeros(1), draws=4000)
    precision = 6 / (1 + 0.09 / 4) + 1 / PRIOR_SD**2
    mean, sd = y.mean(1).sum() / (1 + 0.09 / 4) / precision, precision**-0.5
    found = pooled.posterior(known)
    assert found.flag.tolist() == [""] * 6
    assert abs(pooled.phi[0] - mean) < 5 * sd / math.sqrt(pooled.fit.shared.ess * 4000)
    assert float(found.sd("phi")[0, 0]) == pytest.approx(sd, rel=0.06)


def test_a_predictor_that_reads_its_task_reads_no_other() -> None:
    """Inputs centred within each task: with the mean of all rows the slope would be lost."""
    rng = np.random.default_rng(0)
    x = [10.0 * i + rng.normal(size=(8, 1)) for i in range(6)]
    known = Tasks.from_arrays(x, [2 * (a - a.mean())[:, 0] + 0.3 * rng.normal(size=8) for a in x], names=list("abcdef"))

    def within(phi: torch.Tensor, x: torch.Tensor, batch: Any) -> torch.Tensor:
        rows = batch.mask.to(x.dtype)
        mean = (x[..., 0] * rows).sum(1, keepdim=True) / rows.sum(1, keepdim=True).clamp(min=1)
        return phi[..., 0] * (x[..., 0] - mean)

    one = HierarchicalModel(priors.Gaussian(1), within, likelihoods.Normal())
    pooled = CompletePooling(one, known, centre=np.zeros(1), draws=1000)
    slope = pooled.phi[0] * pooled.units.y_scale / float(np.ravel(pooled.units.x_scale)[0])
    assert slope == pytest.approx(2.0, abs=0.15)


def test_many_parameters() -> None:
    """Least squares of each task, and of all rows, are within reach of the posterior means, 20 parameters a task."""
    rng = np.random.default_rng(0)
    x = [rng.normal(size=(60, 20)) for _ in range(6)]
    y = [a @ np.arange(20) / 10 + 0.5 * rng.normal(size=60) for a in x]
    known = Tasks.from_arrays(x, y, names=list("abcdef"))
    linear = HierarchicalModel(priors.Gaussian(20), lambda phi, x: (phi * x).sum(-1), likelihoods.Normal())
    alone, pooled = baselines(linear, known, draws=500)
    u = alone.units
    standard = [((a - u.x_loc) / u.x_scale, (b - u.y_loc) / u.y_scale) for a, b in zip(x, y, strict=True)]
    found = alone.posterior(known)
    assert set(found.method) == {"exact"} and not any(found.flag)
    for mean, (a, b) in zip(found.mean("phi"), standard, strict=True):
        np.testing.assert_allclose(mean, np.linalg.lstsq(a, b)[0], atol=0.02)
    a, b = (np.concatenate(part) for part in zip(*standard, strict=True))
    np.testing.assert_allclose(pooled.phi, np.linalg.lstsq(a, b)[0], atol=0.01)


def test_known_tasks_with_other_rows_are_refused() -> None:
    known = simulated(tasks=3, seed=0)
    for baseline in baselines(model(), known, draws=200):
        with pytest.raises(ValueError, match="were in the fit with other data"):
            baseline.posterior(known.with_values({"y": known.y + 1}))


def test_units_standardise_labels_only_where_the_likelihood_has_a_scale() -> None:
    known = simulated(tasks=5, seed=1)
    normal = Units.of(model(), known)
    assert float(normal.tasks(known).y.std(correction=0)) == pytest.approx(1.0)
    assert float(normal.tasks(known).x.mean()) == pytest.approx(0.0, abs=1e-12)
    poisson = HierarchicalModel(priors.Gaussian(2), lambda phi, x: phi[..., 0] * x[..., 0], likelihoods.Poisson())
    assert (Units.of(poisson, known).y_loc, Units.of(poisson, known).y_scale) == (0.0, 1.0)


def test_known_standard_errors_are_in_the_units_of_the_labels() -> None:
    tasks = Tasks.from_arrays(None, [[1.0, 5.0], [9.0]], columns={"se": [[1.0, 2.0], [3.0]]}, names=["a", "b"])
    known = HierarchicalModel(
        priors.Gaussian(1), lambda phi, x: phi.expand(*x.shape[:2], 1)[..., 0], likelihoods.Normal("se")
    )
    units = Units.of(known, tasks)
    np.testing.assert_allclose(units.tasks(tasks).columns["se"].numpy() * units.y_scale, [1.0, 2.0, 3.0])
    fixed = units.likelihood(likelihoods.Normal(0.5))
    assert fixed.scale * units.y_scale == pytest.approx(0.5)


def test_what_cannot_be_compared_is_refused() -> None:
    known = simulated(tasks=3, seed=0)
    with pytest.raises(ValueError, match=r"need a bm.HierarchicalModel, .*got function"):
        baselines(lambda batch: None, known)
    fixed = HierarchicalModel(lambda shared: None, lambda phi, x: x[..., 0], likelihoods.Normal())
    with pytest.raises(ValueError, match=r"bm.priors.Gaussian\(d\) or one of bm.models.sharing, got Custom"):
        baselines(fixed, known)
    net = HierarchicalModel(priors.Gaussian(1), Tower(), likelihoods.Normal())
    with pytest.raises(ValueError, match="trainable parameters, which no pooling"):
        baselines(net, known)


class Tower(torch.nn.Module):
    """A predictor that would have to be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.features = torch.nn.Linear(1, 1)

    def forward(self, phi: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (phi * self.features(x)).squeeze(-1)
