"""Steps of variational inference from the prior: exact where they can be, the best diagonal Gaussian elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import one_dimensional
import pytest
import torch
from conjugate import ROWS, TAU, WIDE, centre, close, conditional, density, exact, known_mean, make_tasks
from scenarios import known_prior
from scenarios import make_tasks as make_lines
from scipy.optimize import minimize
from torch import Tensor

import bayesmeta as bm
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.adaptation import _points
from bayesmeta.inference.gaussian import DiagonalTasks
from bayesmeta.inference.protocols import Context

RAGGED = ROWS | {"empty": []}


def adapted(
    model: TaskDensity, tasks: bm.Tasks, theta: Tensor, rate: float | None = None, **options: int
) -> DiagonalTasks:
    """The posterior of an untrained guide, with step sizes of its own or given ones."""
    guide = bm.guides.Variational(**options)
    guide.attach(model, tasks)
    batch = tasks.batch(slice(None))
    with torch.no_grad():
        if rate is not None:
            guide.log_rate.fill_(np.log(rate))
        return guide.condition(theta, guide.prepare(batch, model.tensors(batch)))


def moments(posterior: DiagonalTasks) -> tuple[np.ndarray, np.ndarray]:
    """Means and sds `(S, T, d)`."""
    return posterior.loc.numpy(), posterior.sd.numpy()


def errors(theta: Tensor, **options: int) -> tuple[float, float]:
    """The largest error of a mean in posterior sds, and of the log of an sd."""
    mean, sd = moments(adapted(density(), make_tasks(ROWS), theta, **options))
    answer, answer_sd = conditional(ROWS, theta[:, 0].numpy())
    off = (mean[..., 0] * TAU + theta.numpy() - answer) / answer_sd
    return float(np.abs(off).max()), float(np.abs(np.log(sd[..., 0] * TAU / answer_sd)).max())


def test_one_full_step_is_exact_for_a_gaussian_task() -> None:
    theta = torch.tensor([[-1.0], [0.5], [2.0]], dtype=torch.float64)
    mean, sd = moments(adapted(density(), make_tasks(RAGGED), theta, rate=1.0, steps=1))
    answer, answer_sd = conditional(ROWS, theta[:, 0].numpy())
    np.testing.assert_allclose(
        mean[:, :-1, 0] * TAU + theta.numpy(), answer, atol=0.02
    )  # moves of 3 sds are bent by .01
    np.testing.assert_allclose(sd[:, :-1, 0] * TAU, np.broadcast_to(answer_sd, (3, 5)), rtol=1e-9)


def test_an_untrained_guide_comes_closer_with_every_step() -> None:
    theta = torch.linspace(-1.0, 2.0, 4, dtype=torch.float64).unsqueeze(1)
    found = [errors(theta, steps=steps) for steps in (1, 3, 9)]
    assert all(
        first > 2 * second
        for one, two in zip(found, found[1:], strict=False)
        for first, second in zip(one, two, strict=True)
    )
    assert max(found[-1]) < 0.02


def test_a_task_without_rows_keeps_its_prior() -> None:
    theta = torch.zeros(2, 1, dtype=torch.float64)
    mean, sd = moments(adapted(density(), make_tasks(RAGGED), theta, steps=4, draws=3))
    np.testing.assert_allclose(mean[:, -1], 0.0, atol=1e-12)
    np.testing.assert_allclose(sd[:, -1], 1.0, atol=1e-12)
    assert (sd[:, :-1] < 0.9).all()


def test_of_coordinates_that_hang_together_it_finds_the_best_diagonal_gaussian() -> None:
    """Of a Gaussian posterior that is its mean, with sds 1/√Λ_kk."""
    tasks = make_lines(sizes=(3, 8))
    mean, sd = moments(
        adapted(TaskDensity(known_prior, tasks), tasks, torch.zeros(1, 0, dtype=torch.float64), steps=60)
    )
    for i, task in enumerate(tasks):
        x = np.stack([np.ones(len(task.y)), task.x[:, 0]], 1)
        precision = np.eye(2) + 4 * x.T @ x / 0.36
        np.testing.assert_allclose(mean[0, i], np.linalg.solve(precision, 2 * x.T @ task.y.numpy() / 0.36), rtol=1e-3)
        np.testing.assert_allclose(sd[0, i], precision.diagonal() ** -0.5, rtol=1e-6)


def test_where_tasks_are_not_gaussian_it_ends_near_the_highest_bound() -> None:
    """Counts: E log p(m + σ ε, D) + log σ by quadrature, at the guide's end and at its maximum over m and σ."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    counts, mu = one_dimensional.COUNTS, 0.7
    theta = torch.tensor([[mu]], dtype=torch.float64)
    model, tasks = one_dimensional.density("counts"), one_dimensional.make_tasks(counts)

    def loss(place: np.ndarray, y: list[float]) -> float:
        z = place[0] + np.exp(place[1]) * nodes
        phi = mu + one_dimensional.TAU["counts"] * z
        log_p = -(z**2) / 2 + sum(one_dimensional.LOG_LIKELIHOODS["counts"](np.float64(one), phi) for one in y)
        return -float(weights @ log_p / weights.sum() + place[1])

    lost = []
    for steps in (1, 3, 10):
        mean, sd = moments(adapted(model, tasks, theta, steps=steps))
        places = [np.array([mean[0, i, 0], np.log(sd[0, i, 0])]) for i in range(len(tasks))]
        best = [minimize(loss, place, (y,)).fun for place, y in zip(places, counts.values(), strict=True)]
        lost.append(max(loss(p, y) - b for p, y, b in zip(places, counts.values(), best, strict=True)))
    assert lost[0] > 2 * lost[1] > 4 * lost[2]
    assert lost[2] < 0.01


def test_where_the_log_joint_is_convex_the_spread_stays_bounded() -> None:
    """Between two modes: every step widens, by a bounded factor, and nothing is NaN."""
    theta = torch.full((1, 1), -one_dimensional.LEAN, dtype=torch.float64)
    tasks = one_dimensional.make_tasks(one_dimensional.SQUARES)
    mean, sd = moments(adapted(one_dimensional.density("squares"), tasks, theta, steps=6))
    assert np.isfinite(mean).all() and (np.abs(mean) < 30).all()
    assert (sd > 1e-3).all() and (sd < 10**3).all()


@pytest.mark.parametrize(("pairs", "dim"), [(1, 1), (4, 2), (6, 6), (2, 5)])
def test_points_have_the_moments_of_standard_normals(pairs: int, dim: int) -> None:
    points = _points(pairs, dim, torch.float64)
    assert points.shape == (2 * pairs, dim)
    torch.testing.assert_close(points.mean(0), torch.zeros(dim, dtype=torch.float64))
    second = points.mT @ points / len(points)
    target = torch.eye(dim, dtype=torch.float64)
    if pairs < dim:
        second, target = second.diagonal(), target.diagonal()
    torch.testing.assert_close(second, target)


def test_equal_theta_have_equal_posteriors_with_and_without_gradients() -> None:
    tasks = make_tasks(RAGGED)
    guide = bm.guides.Variational(steps=2)
    guide.attach(density(), tasks)
    batch = tasks.batch(slice(None))
    context = Context(batch, density().tensors(batch))
    theta = torch.tensor([[0.3], [0.3], [1.0]], dtype=torch.float64)
    recorded = guide.condition(theta, context)
    with torch.no_grad():
        plain = guide.condition(theta, context)
    torch.testing.assert_close(plain.loc, recorded.loc.detach())
    torch.testing.assert_close(plain.sd, recorded.sd.detach())
    assert plain.loc.shape == (3, 6, 1) and torch.equal(plain.loc[0], plain.loc[1])
    recorded.loc.sum().backward()
    assert guide.log_rate.grad is not None and (guide.log_rate.grad.abs().amax((0, 2)) > 0).all()


def test_step_sizes_are_learned() -> None:
    """One step is exact if it has full size; it starts with half of it."""
    tasks = make_tasks(ROWS)
    options = bm.Amortized(guide=bm.guides.Variational(steps=1), optimizer=bm.Optimizer(steps=500, lr=0.1))
    fit = bm.fit(known_mean, tasks, method=options, progress=False)
    post = fit.posterior(tasks, refine="none", draws=4000)
    mean, sd = conditional(ROWS, 0.0)
    assert np.abs((post.mean("a") - mean) / sd).max() < 0.1
    assert np.abs(post.sd("a") / sd - 1).max() < 0.1


def test_a_fit_is_exact_after_refinement_and_is_stored(tmp_path: Path) -> None:
    tasks = make_tasks(ROWS)
    options = bm.Amortized(guide=bm.guides.Variational(steps=4), optimizer=bm.Optimizer(steps=150))
    fit = bm.fit(centre, tasks, method=options, progress=False)
    post = fit.posterior(tasks)
    mean, covariance = exact(ROWS)
    sd = np.sqrt(covariance.diagonal())
    assert fit.shared.status == "corrected" and set(post.method) == {"psis"} and (post.flag == "").all()
    assert close(post.mean("a"), post.sd("a"), (mean[:-1], sd[:-1]), 1000)
    assert sd[-1] < WIDE / 4
    fit.save(tmp_path / "fit.bm")
    loaded = bm.load(
        tmp_path / "fit.bm",
        centre,
        method=bm.Amortized(guide=bm.guides.Variational(steps=4), optimizer=bm.Optimizer(steps=150)),
    )
    assert np.array_equal(loaded.posterior(tasks).draws("a"), post.draws("a"))


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 1.5}, {"draws": 0}, {"draws": True}])
def test_options_must_be_positive_whole_numbers(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"Variational: {next(iter(options))} must be a whole number of at least 1"):
        bm.guides.Variational(**options)
