"""Predictions of new rows against closed forms: means, noise, scores of rows alone and together, ragged shapes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import ROWS, SIGMA, TAU, close, conditional, density, make_tasks
from pyro import poutine
from scipy.stats import multivariate_normal, norm
from torch import Tensor

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.recording import seeded
from bayesmeta.results.prediction import flat_labels, log_rows, predict, row_mask

MU, DRAWS = 0.7, 20_000
LABELS = np.array([0.3, 2.0, 1.1])
NEW = np.zeros((3, 0))


def paired(draws: int = DRAWS) -> tuple[Tensor, Tensor]:
    """Draws of every task's exact posterior at a known mu."""
    mean, sd = conditional(ROWS, MU)
    a = mean + sd * np.random.default_rng(0).normal(size=(draws, len(ROWS)))
    noise = torch.as_tensor((a - MU) / TAU).unsqueeze(-1)
    return torch.full((draws, len(ROWS), 1), MU, dtype=torch.float64), noise


@pytest.fixture(scope="module")
def outcomes() -> Any:
    tasks = make_tasks(ROWS)
    return predict(density(), tasks.at(NEW), paired())


def test_outcomes_have_the_posterior_predictive_moments(outcomes: Any) -> None:
    mean, sd = conditional(ROWS, MU)
    spread = np.sqrt(sd**2 + SIGMA**2)
    assert outcomes.draws.shape == (DRAWS, 5, 3) and outcomes.mask.all() and outcomes.names == tuple(ROWS)
    for row in range(3):
        assert close(outcomes.mean[:, row], outcomes.sd[:, row], (mean, spread), DRAWS)
    lower, upper = outcomes.interval(0.8)
    truth = mean + norm.ppf([[0.1], [0.9]]) * spread
    error = math.sqrt(0.09 / DRAWS) / norm.pdf(norm.ppf(0.1)) * spread
    assert (np.abs(lower - truth[0][:, None]) < 4 * error[:, None]).all()
    assert (np.abs(upper - truth[1][:, None]) < 4 * error[:, None]).all()
    np.testing.assert_allclose(outcomes.quantile(0.5), np.quantile(outcomes.draws, 0.5, axis=0))


def test_rows_of_a_task_share_its_parameters_and_nothing_else(outcomes: Any) -> None:
    mean, sd = conditional(ROWS, MU)
    error = 4 * (sd**2 + SIGMA**2) * math.sqrt(2 / DRAWS)
    for task in range(5):
        found = np.cov(outcomes.draws[:, task].T)
        truth = sd[task] ** 2 + SIGMA**2 * np.eye(3)
        assert np.abs(found - truth).max() < error[task]
    assert abs(np.corrcoef(outcomes.draws[:, 0, 0], outcomes.draws[:, 1, 0])[0, 1]) < 4 / math.sqrt(DRAWS)


def test_means_leave_the_noise_out(outcomes: Any) -> None:
    theta, noise = paired(50)
    found = predict(density(), make_tasks(ROWS).at(NEW), (theta, noise), kind="mean")
    np.testing.assert_allclose(found.draws, np.repeat((theta + TAU * noise).numpy(), 3, 2))


def test_log_scores_equal_the_closed_form_alone_and_together(outcomes: Any) -> None:
    """The log of a mean over draws: its error is the relative sd of the terms over √draws."""
    alone, together = outcomes.log_prob(LABELS), outcomes.log_prob(LABELS, joint=True)
    assert alone.shape == (5, 3) and together.shape == (5,)
    mean, sd = conditional(ROWS, MU)
    for task in range(5):
        single = norm(mean[task], math.hypot(sd[task], SIGMA)).logpdf(LABELS)
        assert np.abs(alone[task] - single).max() < 4 * 2.0 / math.sqrt(DRAWS)
        joint = multivariate_normal(np.full(3, mean[task]), sd[task] ** 2 + SIGMA**2 * np.eye(3)).logpdf(LABELS)
        assert abs(together[task] - joint) < 4 * 3.0 / math.sqrt(DRAWS)
    wide = np.argmax(sd)
    assert abs(together[wide] - alone[wide].sum()) > 0.1


def test_scores_of_one_draw_are_exact() -> None:
    theta, noise = paired(1)
    found = predict(density(), make_tasks(ROWS).at(NEW), (theta, noise))
    a = (theta + TAU * noise)[0].numpy()
    np.testing.assert_allclose(found.log_prob(LABELS), norm(a, SIGMA).logpdf(LABELS))
    np.testing.assert_allclose(found.log_prob(LABELS, joint=True), norm(a, SIGMA).logpdf(LABELS).sum(1))
    each = np.stack([LABELS + i for i in range(5)])
    np.testing.assert_allclose(found.log_prob(each), norm(a, SIGMA).logpdf(each))


def test_ragged_new_rows_are_nan_where_there_are_none() -> None:
    sizes = [2, 0, 3, 1, 1]
    target = make_tasks(ROWS).at([np.zeros((n, 0)) for n in sizes])
    found = predict(density(), target, paired(40))
    real = np.arange(3)[None] < np.array(sizes)[:, None]
    np.testing.assert_array_equal(found.mask, real)
    np.testing.assert_array_equal(row_mask(target), real)
    assert (np.isnan(found.draws) == ~real).all()
    assert (np.isnan(found.mean) == ~real).all() and (np.isnan(found.quantile([0.1, 0.9])) == ~real).all()
    labels = [np.full(n, 0.5) for n in sizes]
    scores = found.log_prob(labels)
    assert (np.isnan(scores) == ~real).all()
    whole = predict(density(), make_tasks(ROWS).at(NEW), paired(40)).log_prob(np.full(3, 0.5))
    np.testing.assert_allclose(scores[real], whole[real])
    assert found.log_prob(labels, joint=True)[1] == pytest.approx(0.0, abs=1e-12)
    padded = np.full((5, 3), 0.5)
    np.testing.assert_allclose(found.log_prob(padded), scores)


def test_labels_that_came_with_the_rows_are_scored() -> None:
    tasks = make_tasks(ROWS)
    found = predict(density(), tasks, paired(30))
    explicit = found.log_prob([np.array(y) for y in ROWS.values()])
    np.testing.assert_allclose(found.log_prob(), explicit)
    assert found.log_prob().shape == (5, 6)
    assert repr(found) == "Prediction(site='y', kind='outcome', 5 tasks, up to 6 rows, 30 draws)"


def test_missing_labels_are_not_scored() -> None:
    rows = {name: list(y) for name, y in ROWS.items()} | {"a": [1.2, math.nan, 2.1]}
    tasks = make_tasks(rows, missing="mask")
    found = predict(density(), tasks, paired(30))
    complete = predict(density(), make_tasks(ROWS), paired(30))
    assert np.isnan(found.log_prob()[0, 1]) and found.mask[0, 1] and np.isfinite(found.draws[:, 0, 1]).all()
    np.testing.assert_allclose(found.log_prob()[0, [0, 2]], complete.log_prob()[0, [0, 2]])
    rows_alone = log_rows(density(), tasks, paired(30), site=None)
    assert np.isnan(rows_alone[:, 0, 1]).all()
    np.testing.assert_allclose(
        found.log_prob(joint=True)[0], np.logaddexp.reduce(np.nansum(rows_alone[:, 0], 1)) - math.log(30)
    )


def outputs(batch: Batch) -> None:
    """Two outputs, one of them a count, each with its own site and its own missing labels."""
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        with batch.observations():
            for name, make in (("size", lambda: dist.Normal(phi, 0.5)), ("count", lambda: dist.Poisson(phi.exp()))):
                y, ok = batch.output(name)
                with poutine.mask(mask=ok):
                    pyro.sample(name, make(), obs=y)


def test_several_observed_sites_need_a_choice() -> None:
    y = [np.array([[0.1, 2.0], [0.3, 0.0]]), np.array([[-1.0, 1.0]])]
    tasks = _frame(y)
    read = TaskDensity(outputs, tasks)
    pairs = torch.zeros(3000, 2, 0, dtype=torch.float64), torch.full((3000, 2, 1), 0.8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"several observed sites \['size', 'count'\]; choose one with site="):
        predict(read, tasks, pairs)
    with pytest.raises(ValueError, match=r"unknown observed site 'y'; there are \['size', 'count'\]"):
        predict(read, tasks, pairs, site="y")
    size, count = (predict(read, tasks, pairs, site=site) for site in ("size", "count"))
    rate = math.exp(0.8)
    assert close(size.mean[0, 0], size.sd[0, 0], (0.8, 0.5), 3000)
    assert abs(count.mean[0, 1] - rate) < 4 * math.sqrt(rate / 3000)
    assert set(np.unique(count.draws[:, 0]) % 1) == {0.0}
    np.testing.assert_allclose(size.log_prob()[0], norm(0.8, 0.5).logpdf([0.1, 0.3]))


def test_missing_outputs_have_no_score() -> None:
    y = [np.array([[0.1, math.nan], [0.3, 2.0]]), np.array([[math.nan, 1.0]])]
    tasks = _frame(y, missing="mask")
    read = TaskDensity(outputs, tasks)
    pairs = torch.zeros(3, 2, 0, dtype=torch.float64), torch.full((3, 2, 1), 0.8, dtype=torch.float64)
    size, count = (log_rows(read, tasks, pairs, site=site) for site in ("size", "count"))
    assert np.isnan(size[0]).tolist() == [[False, False], [True, True]]
    assert np.isnan(count[0]).tolist() == [[True, False], [False, True]]
    score = predict(read, tasks, pairs, site="size").log_prob(joint=True)
    np.testing.assert_allclose(score, [norm(0.8, 0.5).logpdf([0.1, 0.3]).sum(), 0.0], atol=1e-12)


def _frame(y: list[np.ndarray], *, missing: str = "error") -> Tasks:
    import pandas

    rows = [(f"t{i}", *line) for i, part in enumerate(y) for line in part]
    return Tasks.from_dataframe(
        pandas.DataFrame(rows, columns=["task", "size", "count"]), task="task", y=["size", "count"], missing=missing
    )


def factors(batch: Batch) -> None:
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        with batch.observations():
            pyro.factor("y", -((batch.y - phi) ** 2))


def test_factors_alone_predict_nothing() -> None:
    tasks = make_tasks(ROWS)
    pairs = torch.zeros(2, 5, 0, dtype=torch.float64), torch.zeros(2, 5, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"no observed site that can be predicted, only factors \(pyro.factor\)"):
        predict(TaskDensity(factors, tasks), tasks, pairs)


def test_wrong_arguments_are_errors_with_a_cure(outcomes: Any) -> None:
    with pytest.raises(ValueError, match="kind must be 'outcome' or 'mean', got 'median'"):
        predict(density(), make_tasks(ROWS), paired(2), kind="median")
    with pytest.raises(ValueError, match=r"prob must lie in \(0, 1\), got 90"):
        outcomes.interval(90)
    for y, text in (
        (np.zeros((2, 3)), "y: expected 5 arrays, one a task, got 2"),
        (np.zeros(4), r"y of task 'a': expected \(3,\), got \(4,\)"),
        ([np.zeros(3)] * 4, "y: expected 5 arrays, one a task, got 4"),
        (np.array([0.0, math.nan, 1.0]), "y of task 'a' has values that are not finite"),
        (np.zeros((5, 3, 1)), r"y: expected \(M, \*dy\) or \(task, M, \*dy\) with dy \(\), got \(5, 3, 1\)"),
    ):
        with pytest.raises(ValueError, match=text):
            outcomes.log_prob(y)


def test_labels_of_all_tasks_in_one_line() -> None:
    target = make_tasks(ROWS).at([np.zeros((n, 0)) for n in (1, 2, 0, 1, 1)])
    flat = flat_labels([[1.0], [2.0, 3.0], [], [4.0], [5.0]], target)
    assert flat.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0] and flat.dtype == torch.float64


def test_predictions_do_not_depend_on_how_work_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks, pairs = make_tasks(ROWS), paired(30)
    whole = predict(density(), tasks, pairs, kind="mean").draws
    monkeypatch.setattr("bayesmeta.results.prediction.CHUNK_ELEMENTS", 40)
    np.testing.assert_array_equal(predict(density(), tasks, pairs, kind="mean").draws, whole)


def test_noise_depends_on_its_seed_alone() -> None:
    tasks, pairs = make_tasks(ROWS), paired(30)
    first, again, other = (predict(density(), tasks, pairs, seed=seed).draws for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    real = np.isfinite(first)
    assert (first[real] != other[real]).all()


def test_noise_does_not_repeat_the_random_numbers_of_the_draws() -> None:
    """Posteriors are drawn under the same seed: outcomes from the same numbers would depend on the parameters."""
    tasks = make_tasks(ROWS)
    pairs = torch.full((500, len(tasks), 1), MU, dtype=torch.float64), torch.zeros(500, len(tasks), 1).double()
    noise = (predict(density(), tasks.at(NEW), pairs, seed=3).draws.ravel() - MU) / SIGMA
    for numbers in ("rand", "randn"):
        with seeded(3):
            drawn = getattr(torch, numbers)(20_000, dtype=torch.float64).numpy()
        assert not np.isin(noise.round(9), drawn.round(9)).any()


def test_new_columns_reach_the_likelihood() -> None:
    """Known standard errors of new rows: the predictive sd follows them."""

    def model(batch: Batch) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with batch.tasks():
            a = pyro.sample("a", dist.Normal(mu, 1.0))
            with batch.observations():
                pyro.sample("y", dist.Normal(a, batch["se"]), obs=batch.y)

    tasks = make_tasks(ROWS, columns={"se": [np.ones(len(y)) for y in ROWS.values()]})
    read = TaskDensity(model, tasks)
    zeros = torch.zeros(DRAWS, 5, 1, dtype=torch.float64)
    found = predict(read, tasks.at(None, {"se": np.array([0.1, 2.0])}), (zeros, zeros))
    assert close(found.mean[0], found.sd[0], (0.0, np.array([0.1, 2.0])), DRAWS)
    with pytest.raises(ValueError, match="se"):
        tasks.at(np.zeros((2, 0)))


@pytest.mark.parametrize("count", [3, 515])
def test_where_tasks_share_each_theta_rows_are_computed_once_for_all_draws(count: int) -> None:
    """Means of every draw are the formula's whether θ is one for all tasks or one a task; the network runs once."""
    seen: list[tuple[int, ...]] = []

    def model(batch: Batch) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            with batch.observations():
                seen.append(tuple(batch.x.shape))
                pyro.sample("y", dist.Normal(phi + slope * batch.x[..., 0].sin(), 1.0), obs=batch.y)

    x = np.random.default_rng(0).normal(size=(count, 4, 1))
    tasks = Tasks.from_arrays(list(x), list(x[..., 0]))
    read = TaskDensity(model, tasks)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(6, count, 1, generator=generator, dtype=torch.float64)
    for theta in (torch.randn(6, 1, 1, generator=generator).double().expand(6, count, 1), noise + 1):
        seen.clear()
        found = predict(read, tasks.at(tasks), (theta, noise), kind="mean").draws
        np.testing.assert_allclose(
            found, noise.numpy() + theta.numpy() * np.sin(x[None, ..., 0]), rtol=1e-12, atol=1e-12
        )
        together = bool((theta == theta[:, :1]).all())
        assert {shape[0] == 1 for shape in seen} == {not together}
