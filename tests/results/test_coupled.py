"""New rows of tasks whose rows are coupled, against Gaussian process formulas written out in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import multivariate_normal, norm
from torch import Tensor

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.model import with_conditional
from bayesmeta.results.coupled import _pairs
from bayesmeta.results.prediction import predict

NOISE, S, NEW = 0.1, 5, np.array([[-0.5], [0.3], [1.7]])
SIZES = (4, 0, 4, 4)


def kernel(a: Any, b: Any, ell: Any) -> Any:
    distance = (a[..., :, None] - b[..., None, :]) / ell
    return (torch.exp if isinstance(distance, Tensor) else np.exp)(-0.5 * distance**2)


def gp(batch: Batch) -> None:
    ell = pyro.sample("ell", dist.LogNormal(0.0, 0.5))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        x = batch.x[..., 0].unsqueeze(-2)
        covariance = kernel(x, x, ell) + NOISE**2 * torch.eye(x.shape[-1])
        pyro.sample(
            "y", dist.MultivariateNormal(phi.unsqueeze(-1).expand(x.shape), covariance), obs=batch.y.unsqueeze(-2)
        )


def conditional(phi: Tensor, shared: dict[str, Tensor], context: Batch, x: Tensor) -> dist.TorchDistribution:
    old, new, ell = context.x[..., 0], x[..., 0], shared["ell"]
    covariance = kernel(old, old, ell) + NOISE**2 * torch.eye(old.shape[-1])
    gain = torch.linalg.solve(covariance, kernel(old, new, ell)).mT
    loc = phi + (gain @ (context.y - phi).unsqueeze(-1)).squeeze(-1)
    rest = kernel(new, new, ell) + NOISE**2 * torch.eye(new.shape[-1]) - gain @ kernel(old, new, ell)
    return dist.MultivariateNormal(loc, rest)


def marginal_conditional(phi: Tensor, shared: dict[str, Tensor], context: Batch, x: Tensor) -> dist.TorchDistribution:
    whole = conditional(phi, shared, context, x)
    return dist.Normal(whole.loc, whole.variance.sqrt())


MODELS = {
    "multivariate normal": gp,
    "conditional": with_conditional(gp, conditional),
    "conditional of rows": with_conditional(gp, marginal_conditional),
}


@pytest.fixture
def tasks() -> Tasks:
    rng = np.random.default_rng(0)
    return Tasks.from_arrays([rng.normal(size=(n, 1)) for n in SIZES], [rng.normal(size=n) for n in SIZES])


def setting(name: str, tasks: Tasks, draws: int = S) -> tuple[TaskDensity, tuple[Tensor, Tensor], np.ndarray]:
    """The density, paired draws, and ell of each draw and task; φ is the noise itself."""
    density = TaskDensity(MODELS[name], tasks)
    generator = torch.Generator().manual_seed(1)
    theta = 0.3 * torch.randn(draws, len(tasks), 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(draws, len(tasks), 1, generator=generator, dtype=torch.float64)
    return density, (theta, noise), theta[..., 0].exp().numpy()


def closed_form(x: np.ndarray, y: np.ndarray, new: np.ndarray, phi: float, ell: float) -> tuple[np.ndarray, np.ndarray]:
    covariance = kernel(x, x, ell) + NOISE**2 * np.eye(len(x))
    gain = np.linalg.solve(covariance, kernel(x, new, ell)).T
    rest = kernel(new, new, ell) + NOISE**2 * np.eye(len(new)) - gain @ kernel(x, new, ell)
    return phi + gain @ (y - phi), rest


def exact(tasks: Tasks, paired: tuple[Tensor, Tensor], ell: np.ndarray) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    phi = paired[1][..., 0].numpy()
    rows = [(task.x[:, 0].numpy(), task.y.numpy()) for task in tasks]
    return [
        [closed_form(x, y, NEW[:, 0], phi[s, t], ell[s, t]) for t, (x, y) in enumerate(rows)] for s in range(len(ell))
    ]


@pytest.mark.parametrize("name", MODELS)
def test_means_and_log_scores_equal_the_closed_form(name: str, tasks: Tasks) -> None:
    density, paired, ell = setting(name, tasks)
    predicted = predict(density, tasks.at(NEW), paired, kind="mean", context=tasks)
    known = exact(tasks, paired, ell)
    np.testing.assert_allclose(predicted.draws, [[loc for loc, _ in row] for row in known], atol=1e-6)
    labels = np.array([0.2, -0.4, 1.0])
    joint = [[multivariate_normal(loc, cov).logpdf(labels) for loc, cov in row] for row in known]
    single = [[norm(loc, np.sqrt(np.diag(cov))).logpdf(labels) for loc, cov in row] for row in known]
    expected = np.logaddexp.reduce(joint, 0) - np.log(S), np.logaddexp.reduce(single, 0) - np.log(S)
    np.testing.assert_allclose(predicted.log_prob(labels, joint=True), expected[0], atol=1e-6)
    np.testing.assert_allclose(predicted.log_prob(labels), expected[1], atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_draws_have_the_joint_distribution_of_the_closed_form(name: str, tasks: Tasks) -> None:
    draws, tasks = 4000, tasks[[0]]
    density, (theta, noise), ell = setting(name, tasks, draws)
    theta, noise = theta[:1].expand(draws, -1, -1), noise[:1].expand(draws, -1, -1)
    predicted = predict(density, tasks.at(NEW), (theta, noise), context=tasks, joint=True)
    for t, (loc, cov) in enumerate(exact(tasks, (theta[:1], noise[:1]), ell[:1])[0]):
        white = np.linalg.solve(np.linalg.cholesky(cov), (predicted.draws[:, t] - loc).T)
        assert np.abs(white.mean(1)).max() < 4 / np.sqrt(draws)
        assert np.abs(np.cov(white) - np.eye(len(loc))).max() < 4 * np.sqrt(2 / draws)


def test_an_integrated_constant_is_a_wider_kernel(tasks: Tasks) -> None:
    """φ ~ N(0, 1) drawn from its exact posterior and averaged: a GP with the kernel k + 1."""
    draws, task = 4000, tasks[0]
    x, y, ell = task.x[:, 0].numpy(), task.y.numpy(), 1.3
    covariance = kernel(x, x, ell) + NOISE**2 * np.eye(len(x))
    precision = 1 + np.linalg.solve(covariance, np.ones_like(y)).sum()
    loc = np.linalg.solve(covariance, y).sum() / precision
    noise = loc + torch.randn(draws, 1, 1, dtype=torch.float64) / precision**0.5
    theta = torch.full((draws, 1, 1), np.log(ell), dtype=torch.float64)
    predicted = predict(TaskDensity(gp, task), task.at(NEW), (theta, noise), context=task)
    wide = covariance + 1.0
    gain = np.linalg.solve(wide, kernel(x, NEW[:, 0], ell) + 1).T
    rest = kernel(NEW[:, 0], NEW[:, 0], ell) + NOISE**2 * np.eye(3) + 1 - gain @ (kernel(x, NEW[:, 0], ell) + 1)
    labels = gain @ y + 0.2
    score = multivariate_normal(gain @ y, rest).logpdf(labels)
    assert abs(predicted.log_prob(labels, joint=True)[0] - score) < 0.1
    assert np.abs((predicted.mean[0] - gain @ y) / np.sqrt(np.diag(rest))).max() < 4 / np.sqrt(draws)


def test_ragged_new_rows_and_labels_from_tasks(tasks: Tasks) -> None:
    density, paired, _ = setting("multivariate normal", tasks)
    whole = predict(density, tasks.at(NEW), paired, kind="mean", context=tasks).draws
    ragged = predict(density, tasks.at([NEW, NEW[:1], NEW[:0], NEW[:2]]), paired, kind="mean", context=tasks)
    np.testing.assert_allclose(ragged.draws[:, 1, 0], whole[:, 1, 0], atol=1e-9)
    np.testing.assert_allclose(ragged.draws[:, 3, :2], whole[:, 3, :2], atol=1e-9)
    assert np.isnan(ragged.draws[:, 2]).all() and np.isnan(ragged.draws[:, 3, 2]).all()
    scores = ragged.log_prob([np.zeros(n) for n in (3, 1, 0, 2)])
    assert np.isfinite(scores[ragged.mask]).all() and np.isnan(scores[~ragged.mask]).all()
    assert ragged.log_prob([np.zeros(n) for n in (3, 1, 0, 2)], joint=True)[2] == 0.0


def student(batch: Batch) -> None:
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        rows = batch.y.shape[1]
        loc, scale = phi.unsqueeze(-1).expand(-1, -1, rows), torch.eye(rows)
        pyro.sample("y", dist.MultivariateStudentT(4.0, loc, scale), obs=batch.y.unsqueeze(-2))


def test_other_couplings_need_a_conditional(tasks: Tasks) -> None:
    density = TaskDensity(student, tasks)
    paired = torch.zeros(2, 4, 0, dtype=torch.float64), torch.zeros(2, 4, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"rows of site 'y' depend on each other.*bm.with_conditional\(model, fn\)"):
        predict(density, tasks.at(NEW), paired, context=tasks)


def test_a_conditional_of_the_wrong_shape_is_an_error(tasks: Tasks) -> None:
    def wrong(phi: Any, shared: Any, context: Batch, x: Tensor) -> Any:
        return dist.Normal(torch.zeros(7), 1.0)

    density = TaskDensity(with_conditional(gp, wrong), tasks)
    paired = torch.zeros(2, 4, 1, dtype=torch.float64), torch.zeros(2, 4, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"conditional: expected a distribution of batch shape \(1, 3\)"):
        predict(density, tasks.at(NEW), paired, context=tasks)


def test_missing_labels_are_an_error() -> None:
    tasks = Tasks.from_arrays([[0.0, 1.0], [0.5, 2.0]], [[1.0, np.nan], [0.5, 1.0]], missing="mask")
    paired = torch.zeros(2, 2, 1, dtype=torch.float64), torch.zeros(2, 2, 1, dtype=torch.float64)

    def flat(batch: Batch) -> None:
        gp(batch.replace(batch.tensors | {"x": batch.x.unsqueeze(-1)}))

    with pytest.raises(ValueError, match="couples the rows of a task, and some labels are missing"):
        predict(TaskDensity(flat, tasks), tasks.at(np.array([0.1])), paired, context=tasks)


def factor(batch: Batch) -> None:
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        with batch.observations():
            pyro.factor("y", -0.5 * (batch.y - phi) ** 2)


def test_a_conditional_predicts_what_only_a_factor_scores(tasks: Tasks) -> None:
    def rows(phi: Tensor, shared: Any, context: Batch, x: Tensor) -> Any:
        return dist.Normal(phi.expand(1, x.shape[1]), 1.0)

    noise = torch.arange(8.0, dtype=torch.float64).reshape(2, 4, 1)
    paired = torch.zeros(2, 4, 0, dtype=torch.float64), noise
    density = TaskDensity(with_conditional(factor, rows), tasks)
    predicted = predict(density, tasks.at(NEW), paired, kind="mean", context=tasks)
    np.testing.assert_array_equal(predicted.draws, noise.expand(2, 4, 3).numpy())


def test_a_covariance_that_is_not_positive_definite_is_an_error(tasks: Tasks) -> None:
    def broken(batch: Batch) -> None:
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            rows = batch.y.shape[1]
            covariance = torch.eye(rows) * (1.0 - 2.0 * (batch.x[..., :1] > 4).any())
            loc = phi.unsqueeze(-1).expand(-1, -1, rows)
            pyro.sample("y", dist.MultivariateNormal(loc, covariance), obs=batch.y.unsqueeze(-2))

    paired = torch.zeros(3, 4, 0, dtype=torch.float64), torch.zeros(3, 4, 1, dtype=torch.float64)
    density = TaskDensity(broken, tasks)
    predict(density, tasks.at(NEW), paired, context=tasks)
    with pytest.raises(ValueError, match="covariance of a task's rows together with the new ones is not positive"):
        predict(density, tasks.at(NEW + 10), paired, context=tasks)


@pytest.mark.parametrize(("draws", "tasks", "limit"), [(3, 10, 12), (5, 1, 100), (7, 2, 3), (4, 6, 0)])
def test_pairs_come_once_each_in_pieces_of_few_sizes(draws: int, tasks: int, limit: int) -> None:
    pieces = list(_pairs(draws, tasks, limit))
    pairs = [pair for draw, task in pieces for pair in zip(draw.tolist(), task.tolist(), strict=True)]
    assert sorted(pairs) == [(draw, task) for draw in range(draws) for task in range(tasks)]
    assert max(len(draw) for draw, _ in pieces) <= max(1, limit)


def test_groups_of_all_lengths_have_pieces_of_two_sizes() -> None:
    assert {len(draw) for tasks in range(1, 20) for draw, _ in _pairs(3, tasks, 12)} == {3, 12}
