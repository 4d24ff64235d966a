"""The evidence of tasks against conjugate formulas, dense grids and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import ROWS, TAU, WIDE, centre, drawn_rows, make_tasks
from conjugate import evidence as conjugate_evidence
from scenarios import make_tasks as scenario_tasks
from scenarios import process, radon
from scipy.stats import norm
from torch import Tensor

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference import collected, evidence
from bayesmeta.inference.evidence import Evidence, kind_of, nodes

LOW, HIGH = -30.0, 30.0


def schools(batch: Batch) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with batch.tasks():
        a = pyro.sample("a", dist.Normal(mu, tau))
        with batch.observations():
            pyro.sample("y", dist.Normal(a, batch["se"]), obs=batch.y)


def counts(size: int) -> Callable[[Batch], None]:
    """Poisson regression with `size` parameters a task; θ is (mu, log tau)."""

    def model(batch: Batch) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with batch.tasks():
            a = pyro.sample("a", dist.Normal(mu, tau).expand([1, 1, size]).to_event(1))
            with batch.observations():
                pyro.sample("y", dist.Poisson(torch.exp((a * batch.x).sum(-1))), obs=batch.y)

    return model


def wins(batch: Batch) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with batch.tasks():
        a = pyro.sample("a", dist.Normal(mu, tau))
        with batch.observations():
            pyro.sample("y", dist.Binomial(batch["trials"], logits=a), obs=batch.y)


def regressions(size: int, count: int = 6, *, rows: int = 6, seed: int = 0) -> Tasks:
    """Counts with inputs; the first input is constant."""
    rng = np.random.default_rng(seed)
    x = [np.concatenate([np.ones((rows, 1)), rng.uniform(-1, 1, (rows, size - 1))], 1) for _ in range(count)]
    phi = 0.4 + 0.6 * rng.standard_normal((count, size))
    return Tasks.from_arrays(x, [rng.poisson(np.exp(xi @ p)) for xi, p in zip(x, phi, strict=True)])


def theta_at(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def differences(function: Evidence, theta: Tensor, step: float = 1e-4) -> Tensor:
    """The gradient by differences of fourth order."""
    found = []
    for unit in torch.eye(len(theta), dtype=theta.dtype):
        at = [float(function(theta + k * step * unit)[0]) for k in (-2, -1, 1, 2)]
        found.append((at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * step))
    return torch.tensor(found, dtype=theta.dtype)


def grid_evidence(log_joint: Callable[[np.ndarray], np.ndarray], dim: int, points: int) -> float:
    """The integral over standardised parameters in [-9, 9]^dim by the trapezoid rule, exact to its digits."""
    axis = np.linspace(-9, 9, points)
    grid = np.stack(np.meshgrid(*[axis] * dim, indexing="ij"), -1).reshape(-1, dim)
    return float(np.logaddexp.reduce(log_joint(grid)) + dim * math.log(axis[1] - axis[0]))


def counts_answer(tasks: Tasks, mu: float, tau: float, points: int) -> float:
    """Σ log p(D_i | mu, tau) of `counts` by a dense grid."""
    total = 0.0
    for task in tasks:
        x, y = task.x.double().numpy(), task.y.double().numpy()
        size = x.shape[1]

        def log_joint(z: np.ndarray, x: np.ndarray = x, y: np.ndarray = y) -> np.ndarray:
            eta = (mu + tau * z) @ x.T
            return norm.logpdf(z).sum(-1) + (y * eta - np.exp(eta)).sum(-1)

        total += grid_evidence(log_joint, size, points) - sum(math.lgamma(k + 1) for k in y)
    return total


def counts_prior(mu: float, log_tau: float) -> float:
    return float(norm(0, 2).logpdf(mu) + math.log(2) + norm(0, 1).logpdf(math.exp(log_tau)) + log_tau)


@pytest.mark.parametrize("mu", [-3.0, 0.4, 9.0])
def test_gaussian_tasks_are_exact(mu: float, uncompiled: None) -> None:
    tasks = make_tasks(ROWS)
    value, _, _ = Evidence(TaskDensity(centre, tasks), tasks, kind="closed form")(theta_at(mu))
    assert float(value) == pytest.approx(norm(0, WIDE).logpdf(mu) + conjugate_evidence(ROWS, mu).sum(), rel=1e-12)


@pytest.mark.parametrize("log_tau", [-18.0, -5.0, 0.0, 3.0])
def test_schools_are_exact_as_tau_goes_to_zero(log_tau: float, uncompiled: None) -> None:
    y, se = np.array([28.0, 8, -3, 7, -1, 1, 18, 12]), np.array([15.0, 10, 16, 11, 9, 11, 10, 18])
    tasks = Tasks.from_arrays(None, [[v] for v in y], columns={"se": [[v] for v in se]})
    function, theta = Evidence(TaskDensity(schools, tasks), tasks, kind="closed form"), theta_at(2.0, log_tau)
    tau = math.exp(log_tau)
    prior = norm(0, 5).logpdf(2.0) + math.log(2 / math.pi / 5) - math.log1p((tau / 5) ** 2) + log_tau
    value, gradient, _ = function(theta)
    assert abs(float(value) - prior - norm(2.0, np.hypot(tau, se)).logpdf(y).sum()) < 1e-10
    torch.testing.assert_close(gradient, differences(function, theta), rtol=1e-6, atol=1e-6)


def test_lines_are_exact_with_weights_and_two_parameters(uncompiled: None) -> None:
    tasks = scenario_tasks(weighted=True)
    function = Evidence(TaskDensity(radon, tasks), tasks, kind="closed form")
    mu, tau, sigma = np.array([0.3, -0.5]), np.array([0.7, 1.3]), 0.6
    total = norm(0, 10).logpdf(mu).sum() + (math.log(2) + norm.logpdf(tau) + np.log(tau)).sum()
    total += math.log(2) + norm.logpdf(sigma) + math.log(sigma)
    weights = tasks.batch(slice(None)).tensors
    for i, task in enumerate(tasks):
        weight = (weights["weight"] * weights["task_weight"])[i, : len(task.y)].double().numpy()
        design = np.stack([np.ones(len(task.y)), task.x[:, 0].double().numpy()], 1)
        y = task.y.double().numpy() - design @ mu
        noise = np.diag(sigma**2 / weight)
        cover = design @ np.diag(tau**2) @ design.T + noise
        if len(y):
            total += -0.5 * (y @ np.linalg.solve(cover, y) + np.linalg.slogdet(2 * np.pi * cover)[1])
            # A weight multiplies the log likelihood, which is that of noise sigma² / w up to its normalisation.
            total += (-0.5 * (weight - 1) * math.log(2 * math.pi * sigma**2) - 0.5 * np.log(weight)).sum()
    value = function(theta_at(*mu, *np.log(tau), math.log(sigma)))[0]
    assert abs(float(value) - total) < 1e-10


def test_rows_that_depend_on_each_other_are_batched_by_size(uncompiled: None) -> None:
    tasks = scenario_tasks(sizes=(4, 2, 4, 3))
    function, length = Evidence(TaskDensity(process, tasks), tasks, kind="closed form"), 1.2
    total = float(norm(0, 0.3).logpdf(math.log(length)))
    for task in tasks:
        x, y = task.x.double().numpy(), task.y.double().numpy()
        cover = np.exp(-0.5 * np.square(x[:, None] - x).sum(-1) / length**2) + 0.3 * np.eye(len(y)) + 1.0
        total += -0.5 * (y @ np.linalg.solve(cover, y) + np.linalg.slogdet(2 * np.pi * cover)[1])
    assert abs(float(function(theta_at(math.log(length)))[0]) - total) < 1e-10


@pytest.mark.parametrize(("size", "points"), [(1, 2001), (2, 301), (3, 91)])
def test_quadrature_agrees_with_a_dense_grid(size: int, points: int, uncompiled: None) -> None:
    tasks = regressions(size, 4)
    function, theta = Evidence(TaskDensity(counts(size), tasks), tasks), theta_at(0.4, math.log(0.6))
    assert function.kind == "quadrature"
    truth = counts_answer(tasks, 0.4, 0.6, points) + counts_prior(0.4, math.log(0.6))
    error = abs(float(function(theta)[0]) - truth) / len(tasks)
    assert error < {1: 1e-6, 2: 1e-5, 3: 1e-3}[size]
    plain = Evidence(TaskDensity(counts(size), tasks), tasks, kind="Laplace")
    assert abs(float(plain(theta)[0]) - truth) / len(tasks) > 5 * error


def test_binomial_quadrature_agrees_with_a_dense_grid(uncompiled: None) -> None:
    won, games = [[2, 0], [7], [1, 3, 0], [9, 8], [0, 1]], [[9, 4], [10], [12, 9, 3], [11, 9], [6, 5]]
    tasks = Tasks.from_arrays(None, won, columns={"trials": games})
    function, (mu, tau) = Evidence(TaskDensity(wins, tasks), tasks), (0.2, 0.9)
    truth = counts_prior(mu, math.log(tau))
    from scipy.special import expit
    from scipy.stats import binom

    for k, n in zip(won, games, strict=True):
        truth += grid_evidence(
            lambda z, k=k, n=n: norm.logpdf(z[:, 0]) + binom.logpmf(k, n, expit(mu + tau * z)).sum(-1), 1, 2001
        )
    value, gradient, _ = function(theta_at(mu, math.log(tau)))
    assert abs(float(value) - truth) < 5e-6
    torch.testing.assert_close(gradient, differences(function, theta_at(mu, math.log(tau))), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_quadrature_gradients_are_those_of_the_rule_with_its_nodes_held(size: int, uncompiled: None) -> None:
    tasks = regressions(size, 4)
    density, theta = TaskDensity(counts(size), tasks), theta_at(0.4, math.log(0.6))
    function = Evidence(density, tasks)
    gradient = function(theta)[1]
    data, noise = density.tensors(tasks.batch(slice(None))), function._modes[0][function._collected.order]
    _, _, hessian = density.log_task.curvature(theta, noise, data, {})
    points, log_weights = nodes(size)
    factor = torch.linalg.inv(torch.linalg.cholesky(-hessian))
    held = noise.unsqueeze(1) + points @ factor
    bend = (log_weights + 0.5 * points.square().sum(-1)).unsqueeze(-1)

    def rule(at: Tensor) -> float:
        terms = torch.stack([density.log_task(at, held[:, k], data, {}) for k in range(len(points))])
        return float((terms + bend).logsumexp(0).sum() + density.log_prior(at))

    step, axes = 1e-4, torch.eye(2, dtype=theta.dtype)
    truth = [
        (
            rule(theta - 2 * step * u)
            - 8 * rule(theta - step * u)
            + 8 * rule(theta + step * u)
            - rule(theta + 2 * step * u)
        )
        / (12 * step)
        for u in axes
    ]
    torch.testing.assert_close(gradient, torch.tensor(truth, dtype=theta.dtype), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("size", "rows", "close"), [(1, 60, 1e-6), (2, 100, 1e-5)])
def test_quadrature_gradients_are_those_of_the_integral(size: int, rows: int, close: float, uncompiled: None) -> None:
    tasks = regressions(size, 3, rows=rows)
    function, theta = Evidence(TaskDensity(counts(size), tasks), tasks), theta_at(0.4, math.log(0.6))
    torch.testing.assert_close(function(theta)[1], differences(function, theta, 1e-3), rtol=0, atol=close)


def laplace_without_third_derivatives(graph: Any, theta: Tensor, noise: Tensor, leaves: Any) -> Tensor:
    """The mistake: the mode is held fixed while θ moves."""
    return evidence.log_evidence(*evidence.curvature(graph, 1, theta, noise, *leaves))


def test_laplace_gradients_carry_the_mode_along(uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = regressions(5, 3)
    density, theta = TaskDensity(counts(5), tasks), theta_at(0.4, math.log(0.6))
    function = Evidence(density, tasks)
    assert function.kind == "Laplace"
    truth = differences(function, theta, 1e-3)
    torch.testing.assert_close(function(theta)[1], truth, rtol=1e-6, atol=1e-6)
    monkeypatch.setitem(evidence._SMOOTH, "Laplace", laplace_without_third_derivatives)
    wrong = Evidence(density, tasks)(theta)[1]
    assert float((wrong - truth).abs().max()) > 1e-3


def test_gradients_of_learned_values(uncompiled: None) -> None:
    def model(batch: Batch) -> None:
        noise = pyro.param("noise", torch.tensor(0.5), constraint=dist.constraints.positive)
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with batch.tasks():
            a = pyro.sample("a", dist.Normal(mu, 1.0))
            with batch.observations():
                pyro.sample("y", dist.Normal(a, noise), obs=batch.y)

    tasks = make_tasks(ROWS)
    function, theta = Evidence(TaskDensity(model, tasks), tasks, kind="closed form"), theta_at(0.7)
    at = function.values["noise"]
    _, _, (gradient,) = function(theta, [at])
    up, down = (float(function(theta, [at + step])[0]) for step in (1e-5, -1e-5))
    assert float(gradient) == pytest.approx((up - down) / 2e-5, rel=1e-7)


def test_blocks_add_up(uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = drawn_rows(23, seed=0, sizes=(1, 2, 7))
    tasks = make_tasks(rows)
    density = TaskDensity(centre, tasks)
    whole = Evidence(density, tasks, kind="quadrature")(theta_at(0.4))
    monkeypatch.setattr(collected, "BLOCK_ELEMENTS", 200)
    function = Evidence(density, tasks, kind="quadrature")
    assert len(function._blocks) > 3
    parts = function(theta_at(0.4))
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-12, atol=1e-12)


def test_the_compiler_changes_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = regressions(1, 5)
    density, theta = TaskDensity(counts(1), tasks), theta_at(0.1, -0.4)
    compiled = Evidence(density, tasks)
    monkeypatch.setattr(torch._inductor, "compile", missing_compiler)
    plain = Evidence(density, tasks)
    for ours, theirs in zip(compiled(theta)[:2], plain(theta)[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def missing_compiler(*_: Any) -> Any:
    raise RuntimeError("no C++ compiler")


def test_a_model_that_cannot_be_recorded_gives_the_same_numbers(uncompiled: None) -> None:
    def branching(batch: Batch) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with batch.tasks():
            a = pyro.sample("a", dist.Normal(mu, tau).expand([1, 1, 1]).to_event(1))
            rate = (a * batch.x).sum(-1)
            shift = 0.0 if float(rate.detach().sum()) > -1e9 else 1.0
            with batch.observations():
                pyro.sample("y", dist.Poisson(torch.exp(rate + shift)), obs=batch.y)

    tasks, theta = regressions(1, 3), theta_at(0.1, -0.4)
    density = TaskDensity(branching, tasks)
    slow = Evidence(density, tasks)
    assert set(density.log_task.status.values()) != {"recorded"}
    fast = Evidence(TaskDensity(counts(1), tasks), tasks)
    for ours, theirs in zip(slow(theta)[:2], fast(theta)[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_modes_that_are_not_found_give_nan(uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = regressions(1, 3)
    function, theta = Evidence(TaskDensity(counts(1), tasks), tasks), theta_at(0.1, -0.4)
    good = function(theta)
    monkeypatch.setattr(evidence, "QUICK_STEPS", 0)
    monkeypatch.setattr(evidence, "find_modes", unconverged(evidence.find_modes))
    value, gradient, _ = function(theta)
    assert math.isfinite(float(good[0])) and math.isnan(float(value)) and bool((gradient == 0).all())


def unconverged(find: Any) -> Any:
    def lost(*args: Any, **options: Any) -> Any:
        modes = find(*args, **options)
        modes.converged[0, -1] = False
        return modes

    return lost


def test_every_chain_has_modes_of_its_own(uncompiled: None) -> None:
    tasks = regressions(1, 3)
    first = Evidence(TaskDensity(counts(1), tasks), tasks)
    first(theta_at(0.1, -0.4))
    other = first.again()
    assert all(bool((modes == 0).all()) for modes in other._modes)
    other(theta_at(2.0, 1.0))
    assert not torch.equal(first._modes[0], other._modes[0])


@pytest.mark.parametrize("size", [2, 9])
def test_the_damped_search_takes_over_where_plain_newton_fails(
    size: int, uncompiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heavy tails: at the prior's centre the curvature has the wrong sign."""

    def tails(batch: Batch) -> None:
        tau = pyro.sample("tau", dist.HalfNormal(3.0))
        with batch.tasks():
            a = pyro.sample("a", dist.Normal(0.0, tau).expand([1, 1, size]).to_event(1))
            with batch.observations():
                pyro.sample("y", dist.StudentT(2.0, a.sum(-1), 0.1), obs=batch.y)

    tasks, searched = make_tasks({"a": [4.0, 4.2], "b": [-3.0], "c": [4.9, 5.0]}), []
    find = evidence.find_modes
    monkeypatch.setattr(evidence, "find_modes", lambda *a, **k: searched.append(1) or find(*a, **k))
    value, gradient, _ = Evidence(TaskDensity(tails, tasks), tasks)(theta_at(1.0))
    assert searched and math.isfinite(float(value)) and bool(torch.isfinite(gradient).all())


def test_plain_laplace_moves_tau_where_quadrature_is_right(uncompiled: None) -> None:
    """400 tasks with one small count: the mean of tau under three evidences on one grid of θ."""
    rng = np.random.default_rng(1)
    y = [rng.poisson(np.exp(-1.0 + 0.8 * rng.standard_normal()), 1) for _ in range(400)]
    tasks = Tasks.from_arrays([np.ones((1, 1)) for _ in y], y)
    density = TaskDensity(counts(1), tasks)
    mus, logs = np.linspace(-1.5, -0.5, 11), np.linspace(math.log(0.4), math.log(1.6), 13)
    z, log_w = nodes_of_hermite(60)
    found = {}
    for kind in ("quadrature", "Laplace", "truth"):
        function = None if kind == "truth" else Evidence(density, tasks, kind=kind)
        table = np.array([[log_density(function, y, m, s, z, log_w) for s in logs] for m in mus])
        weight = np.exp(table - table.max()).sum(0)
        mean = (weight * np.exp(logs)).sum() / weight.sum()
        found[kind] = mean, math.sqrt((weight * (np.exp(logs) - mean) ** 2).sum() / weight.sum())
    truth, sd = found["truth"]
    assert abs(found["quadrature"][0] - truth) < 0.01 * sd
    assert abs(found["Laplace"][0] - truth) > 0.5 * sd


def nodes_of_hermite(count: int) -> tuple[np.ndarray, np.ndarray]:
    z, w = np.polynomial.hermite_e.hermegauss(count)
    return z, np.log(w / w.sum())


def log_density(
    function: Evidence | None, y: list[np.ndarray], mu: float, log_tau: float, z: np.ndarray, log_w: np.ndarray
) -> float:
    """Of (mu, log tau), by the function or by plain quadrature over the prior."""
    if function is not None:
        return float(function(theta_at(mu, log_tau))[0])
    eta = mu + math.exp(log_tau) * z
    total = counts_prior(mu, log_tau)
    for k in y:
        total += np.logaddexp.reduce(log_w + k.sum() * eta - len(k) * np.exp(eta)) - sum(math.lgamma(v + 1) for v in k)
    return total


def test_kinds() -> None:
    assert kind_of(7, gaussian=True) == "closed form"
    assert [kind_of(d, gaussian=False) for d in (1, 3, 4)] == ["quadrature", "quadrature", "Laplace"]


def test_nodes_integrate_polynomials() -> None:
    points, log_weights = nodes(2)
    weight = log_weights.exp()
    assert float(weight.sum()) == pytest.approx(1.0)
    assert float((weight * points[:, 0] ** 4 * points[:, 1] ** 2).sum()) == pytest.approx(3.0)
    assert TAU == 1.0


def squared(batch: Batch) -> None:
    """Two modes a task that differ in evidence, and between them the prior's centre."""
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with batch.tasks():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with batch.observations():
            f = a.square() * batch.x[..., 0] + a * batch.x[..., 1]
            pyro.sample("y", dist.Normal(f, sigma), obs=batch.y)


def squared_tasks() -> Tasks:
    rng = np.random.default_rng(0)
    x = [rng.uniform(0, 1, (n, 2)) for n in (6, 3, 9, 6, 2, 12, 4, 5)]
    a = np.array([1.0, -1.2, 0.7, 1.5, -0.8, -1.4, 1.1, -0.9])
    return Tasks.from_arrays(x, [a**2 * at[:, 0] + a * at[:, 1] for at, a in zip(x, a, strict=True)])


def test_better_modes_are_found_and_kept_by_the_evidence_of_some_tasks(uncompiled: None) -> None:
    tasks, theta = squared_tasks(), theta_at(math.log(0.2))
    density = TaskDensity(squared, tasks)
    function = Evidence(density, tasks)
    before = float(function(theta)[0])
    assert function.improve(theta) and not function.improve(theta)
    after = float(function(theta)[0])
    assert after > before + 5
    assert float(function.again()(theta)[0]) == pytest.approx(after, abs=1e-6)
    parts = [function.of(density, tasks, np.array(index), calls=1) for index in ([6, 1, 4], [0, 2, 3, 5, 7])]
    total = sum(float(part(theta)[0]) for part in parts) - float(density.log_prior(theta))
    assert total == pytest.approx(after, abs=1e-6)


def test_starts_from_which_the_density_cannot_be_had_are_left_out(
    uncompiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, theta = squared_tasks(), theta_at(math.log(0.2))
    function = Evidence(TaskDensity(squared, tasks), tasks)
    before = float(function(theta)[0])
    last, search = torch.cat(function.modes), evidence.piece_modes

    def fails(graph: Any, theta: Tensor, start: Tensor, leaves: Any) -> Any:
        if not bool(torch.isin(start, last).all()):
            raise RuntimeError("a matrix is not positive definite")
        return search(graph, theta, start, leaves)

    monkeypatch.setattr(evidence, "piece_modes", fails)
    assert not function.improve(theta)
    assert float(function(theta)[0]) == pytest.approx(before, abs=1e-9)
