"""The error of an approximate marginal is found, and mended, where the truth is known by dense quadrature."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import ROWS, centre, drawn_rows, make_tasks
from scipy.stats import norm
from torch import Tensor

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference import approximation
from bayesmeta.inference.approximation import (
    LOOKED_AT_AROUND_A_POINT,
    TOLERATED,
    Comparison,
    assess,
    compare,
    mended,
)
from bayesmeta.inference.correction import SharedDraws
from bayesmeta.inference.evidence import Evidence

pytestmark = pytest.mark.usefixtures("uncompiled")

Z, W = np.polynomial.hermite_e.hermegauss(120)
LOG_W = np.log(W / W.sum())
MUS, LOGS = np.linspace(-1.6, -0.4, 13), np.linspace(math.log(0.3), math.log(1.7), 15)
THETA = torch.as_tensor(np.stack(np.meshgrid(MUS, LOGS, indexing="ij"), -1).reshape(-1, 2))


def counts(batch: Batch) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with batch.tasks():
        a = pyro.sample("a", dist.Normal(mu, tau))
        with batch.observations():
            pyro.sample("y", dist.Poisson(torch.exp(a.expand(batch.y.shape))), obs=batch.y)


def few_counts() -> tuple[Tasks, np.ndarray]:
    y = np.random.default_rng(1).poisson(np.exp(-1.0 + 0.8 * np.random.default_rng(2).standard_normal(200)))
    return Tasks.from_arrays(None, [[k] for k in y]), y


def truth(y: np.ndarray) -> np.ndarray:
    """Σ log p(D_i | θ) at the points of the grid, up to a constant."""
    values, times = np.unique(y, return_counts=True)
    eta = THETA[:, :1].numpy() + np.exp(THETA[:, 1:].numpy()) * Z
    return np.stack([np.logaddexp.reduce(LOG_W + k * eta - np.exp(eta), 1) for k in values], 1) @ times


def own(density: TaskDensity, function: Evidence) -> np.ndarray:
    values = np.array([float(function(at)[0]) for at in THETA])
    return values - density.log_prior(THETA).numpy()


def draws(theta: Tensor, **fields: Any) -> SharedDraws:
    count = len(theta)
    return SharedDraws(theta, np.full(count, -math.log(count)), 0.0, 1.0, "sampled", **fields)


def test_exact_evidence_has_no_error() -> None:
    tasks = make_tasks(drawn_rows(20, seed=0))
    density = TaskDensity(centre, tasks)
    theta = 1.0 + 0.3 * torch.randn(100, 1, dtype=torch.float64)
    record = assess(density, Evidence(density, tasks, kind="closed form"), tasks, draws(theta))
    assert record["error"] < TOLERATED and record["noise"] < 0.05


def test_the_error_of_laplace_is_that_against_dense_quadrature() -> None:
    tasks, y = few_counts()
    density = TaskDensity(counts, tasks)
    function = Evidence(density, tasks, kind="Laplace")
    off = truth(y) - own(density, function)
    near = THETA[::3]
    found = compare(density, function, tasks, near)
    ours, off = found.ratios.mean(0).numpy(), off[::3]
    assert off.std() > 0.5
    assert np.abs(ours - ours.mean() - off + off.mean()).max() < 0.1 * np.ptp(off)
    assert found.noise < TOLERATED
    assert abs(found.error - off.std(ddof=1)) < 4 * found.noise


def posterior(log_weight: np.ndarray) -> np.ndarray:
    """Probabilities of the points of the grid."""
    weight = np.exp(log_weight - log_weight.max())
    return weight / weight.sum()


def test_draws_of_a_wrong_marginal_are_mended() -> None:
    tasks, y = few_counts()
    density = TaskDensity(counts, tasks)
    function = Evidence(density, tasks, kind="Laplace")
    prior = density.log_prior(THETA).numpy()
    right, wrong = posterior(truth(y) + prior), posterior(own(density, function) + prior)
    tau = np.exp(THETA[:, 1].numpy())
    chosen = np.random.default_rng(0).choice(len(THETA), 800, p=wrong)
    better = mended(density, function, tasks, draws(THETA[chosen], chains=2))
    mean, sd = (right * tau).sum(), math.sqrt((right * tau**2).sum() - (right * tau).sum() ** 2)
    assert better.status == "corrected" and better.chains == 0
    found = (np.exp(better.log_weight) * np.exp(better.theta[:, 1].numpy())).sum()
    error = sd / math.sqrt(800 * better.ess)
    assert abs((wrong * tau).sum() - mean) > 5 * error > abs(found - mean)


def test_where_it_cannot_be_mended_the_draws_stay_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks, _ = few_counts()
    density = TaskDensity(counts, tasks)
    function, before = Evidence(density, tasks, kind="Laplace"), draws(THETA, chains=3, stats={"lp": np.zeros((3, 65))})
    monkeypatch.setattr(approximation, "BUDGET", 200)
    after = mended(density, function, tasks, before)
    assert after.status == "uncorrected" and after.khat == math.inf
    assert torch.equal(after.theta, before.theta) and after.chains == 3 and after.stats is before.stats


def squares(batch: Batch) -> None:
    """Two modes a task; the evidence of one of them misses a part that depends on mu."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with batch.tasks():
        a = pyro.sample("a", dist.Normal(mu, 1.0))
        with batch.observations():
            pyro.sample("y", dist.Normal(a.square(), 0.5), obs=batch.y)


def test_a_missed_mode_is_seen() -> None:
    rng = np.random.default_rng(0)
    y = [rng.normal(rng.normal(0.3, 1.0) ** 2, 0.5, 3) for _ in range(12)]
    tasks = Tasks.from_arrays(None, y)
    density = TaskDensity(squares, tasks)
    theta = torch.linspace(-0.9, 0.9, 60, dtype=torch.float64).unsqueeze(-1)
    function = Evidence(density, tasks)
    assert function.kind == "quadrature"
    axis = np.linspace(-9, 9, 4001)
    phi = theta.numpy() + axis
    right = np.zeros(60)
    for rows in y:
        log_joint = norm.logpdf(axis) + norm(phi[..., None] ** 2, 0.5).logpdf(rows).sum(-1)
        right += np.logaddexp.reduce(log_joint, 1) + math.log(axis[1] - axis[0])
    ours = np.array([float(function(at)[0]) for at in theta]) - density.log_prior(theta).numpy()
    found = compare(density, function, tasks, theta)
    assert (right - ours).std() > 0.5
    assert found.error == pytest.approx((right - ours).std(ddof=1), rel=0.15)


def test_of_many_tasks_a_sample_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks, _ = few_counts()
    density = TaskDensity(counts, tasks)
    function, near = Evidence(density, tasks, kind="Laplace"), draws(THETA)
    whole = assess(density, function, tasks, near)["error"]
    monkeypatch.setattr(approximation, "CHECKED_TASKS", 50)
    assert assess(density, function, tasks, near)["error"] == pytest.approx(whole, rel=0.3)


def test_tasks_without_rows_are_left_out() -> None:
    rows = ROWS | {"empty": []}
    tasks = make_tasks(rows)
    density = TaskDensity(centre, tasks)
    record = assess(
        density, Evidence(density, tasks, kind="closed form"), tasks, draws(torch.zeros(70, 1, dtype=torch.float64))
    )
    assert record["error"] < 0.02


def test_noise_is_no_error_and_numbers_that_are_missing_are() -> None:
    generator = torch.Generator().manual_seed(0)
    common, noise = torch.randn(1, 4000, generator=generator), torch.randn(2, 4000, generator=generator)
    found = Comparison(2.0 * common + 0.5 * noise)
    assert found.error == pytest.approx(2.0, rel=0.05)
    assert found.noise == pytest.approx(0.5 / math.sqrt(2), rel=0.05)
    assert Comparison(torch.tensor([[0.0, math.nan], [0.0, 1.0]])).error == math.inf


def test_independent_halves_agree_on_nothing() -> None:
    """Noise alone is no error: with many tasks it would be multiplied by their number."""
    generator = torch.Generator().manual_seed(0)
    errors = [Comparison(torch.randn(2, 64, generator=generator)).error for _ in range(200)]
    assert np.mean(np.array(errors) > 0) < 0.06


def test_around_a_point_estimate_fewer_theta_tell_the_same_error() -> None:
    """The sd over θ of the error of Laplace's approximation, from 64 and from 16 draws of θ."""
    tasks, _ = few_counts()
    density = TaskDensity(counts, tasks)
    function = Evidence(density, tasks, kind="Laplace")
    spread = draws(THETA.repeat(20, 1))
    many, few = (assess(density, function, tasks, spread, point=point)["error"] for point in (False, True))
    assert many > 0.5 and abs(few / many - 1) < 4 / np.sqrt(2 * LOOKED_AT_AROUND_A_POINT)


def test_estimates_add_up_over_chunks_of_tasks() -> None:
    """600 Gaussian tasks, more than one chunk: their log evidence itself, not only how it moves with θ."""
    tasks = make_tasks(drawn_rows(600, seed=0))
    density = TaskDensity(centre, tasks)
    theta = torch.tensor([[0.8], [1.0], [1.2]], dtype=torch.float64)
    found = compare(density, Evidence(density, tasks, kind="closed form"), tasks, theta)
    assert float(found.ratios.abs().max()) < 4 * np.sqrt(600 * 0.5 / 16)
