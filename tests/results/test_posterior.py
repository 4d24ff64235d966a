"""Posteriors as users hold them: order, weights, pairing and shapes of hand-made draws; answers of a small fit."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import ROWS, SIGMA, TAU, centre, density, exact, make_tasks, setting
from scipy.stats import norm
from torch import Tensor

import bayesmeta as bm
from bayesmeta.data.batch import Batch
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.correction import SharedDraws, correct_shared
from bayesmeta.inference.weighing import TaskDraws, resample_theta, weigh_known
from bayesmeta.results.posterior import Posterior, Shared, constrained

CANDIDATES, DRAWS = 60, 25


def part(names: str, *, seed: int, joint: bool = False, method: str = "psis") -> tuple[np.ndarray, TaskDraws]:
    """Random weighted candidates of some of ROWS' tasks, and draws chosen among them at random."""
    rng = np.random.default_rng(seed)
    places = np.array([list(ROWS).index(name) for name in names])
    count = len(names)
    log_weight = rng.normal(size=(CANDIDATES, count))
    log_weight -= np.logaddexp.reduce(log_weight, 0)
    if joint:
        index = np.repeat(rng.integers(CANDIDATES // 4, size=(DRAWS, 1)) * 4, count, 1) + rng.integers(
            4, size=(DRAWS, count)
        )
        theta = np.repeat(rng.normal(size=(CANDIDATES // 4, 1)), 4, 0)
    else:
        index, theta = rng.integers(CANDIDATES, size=(DRAWS, count)), rng.normal(size=(CANDIDATES, 1))
    noise = rng.normal(size=(CANDIDATES, count, 1))
    return places, TaskDraws(
        torch.as_tensor(theta),
        torch.as_tensor(noise),
        log_weight,
        index,
        khat=rng.random(count),
        ess=rng.random(count),
        method=[method] * count,
        flag=[f"flag of {name}" for name in names],
        joint=joint,
    )


@pytest.fixture(scope="module")
def mixed() -> Posterior:
    """Tasks c and a from one part, e, b and d from another."""
    parts = [part("ca", seed=0), part("ebd", seed=1, method="prior")]
    return Posterior(density(), make_tasks(ROWS), parts)


def by_hand(posterior: Posterior) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Values, weights and index of the candidates of each task, mu + TAU × noise."""
    found = {}
    for places, drawn in posterior.parts:
        values = (drawn.theta + TAU * drawn.noise[..., 0]).numpy()
        for column, place in enumerate(places):
            found[list(ROWS)[place]] = values[:, column], np.exp(drawn.log_weight[:, column]), drawn.index[:, column]
    return found


def test_every_answer_keeps_the_order_of_the_tasks(mixed: Posterior) -> None:
    mean, sd, draws, median = mixed.mean("a"), mixed.sd("a"), mixed.draws("a"), mixed.quantile("a", [0.2, 0.5])
    assert mean.shape == sd.shape == (5,) and draws.shape == (DRAWS, 5) and median.shape == (2, 5)
    assert mixed.quantile("a", 0.5).shape == (5,)
    np.testing.assert_array_equal(mixed["a"], draws)
    for place, (values, weight, index) in enumerate(by_hand(mixed)[name] for name in ROWS):
        truth = weight @ values
        assert mean[place] == pytest.approx(truth)
        assert sd[place] == pytest.approx(math.sqrt(weight @ (values - truth) ** 2))
        np.testing.assert_allclose(draws[:, place], values[index])
        below = weight[values < median[1, place]].sum()
        assert 0.5 - weight.max() <= below <= 0.5 + weight.max()
    assert mixed.names == tuple(ROWS)
    assert mixed.method.tolist() == ["psis", "prior", "psis", "prior", "prior"]
    assert mixed.flag.tolist() == [f"flag of {name}" for name in ROWS]
    assert mixed.khat.tolist() == [mixed.parts[p][1].khat[i] for p, i in ((0, 1), (1, 1), (0, 0), (1, 2), (1, 0))]


def test_theta_is_paired_with_each_draw(mixed: Posterior) -> None:
    theta, noise = mixed.paired()
    np.testing.assert_allclose((theta + TAU * noise)[..., 0].numpy(), mixed.draws("a"))
    assert not mixed.joint and mixed.shared["mu"].shape == (DRAWS, 5)
    np.testing.assert_allclose(mixed.shared["mu"], theta[..., 0].numpy())


def test_theta_of_a_joint_posterior_is_one_for_all_tasks() -> None:
    joint = Posterior(density(), make_tasks(ROWS), [part("abcde", seed=2, joint=True)])
    theta, _ = joint.paired()
    assert joint.joint and joint.shared["mu"].shape == (DRAWS,)
    np.testing.assert_allclose(theta[..., 0].numpy(), np.repeat(joint.shared["mu"][:, None], 5, 1))


def test_log_likelihood_of_every_row_under_every_draw(mixed: Posterior) -> None:
    found, a = mixed.log_likelihood(), mixed.draws("a")
    assert found.shape == (DRAWS, 5, 6)
    for place, y in enumerate(ROWS.values()):
        truth = norm(a[:, place, None], SIGMA).logpdf(y)
        np.testing.assert_allclose(found[:, place, : len(y)], truth)
        assert np.isnan(found[:, place, len(y) :]).all()


def test_missing_labels_have_no_likelihood() -> None:
    rows = ROWS | {"a": [1.2, math.nan, 2.1]}
    tasks = make_tasks(rows, missing="mask")
    posterior = Posterior(TaskDensity(centre, tasks), tasks, [part("abcde", seed=0)])
    found = posterior.log_likelihood()[:, 0]
    assert np.isnan(found[:, [1, 3, 4, 5]]).all() and np.isfinite(found[:, [0, 2]]).all()
    np.testing.assert_allclose(found[:, 2], norm(posterior.draws("a")[:, 0], SIGMA).logpdf(2.1))


def test_unknown_names_say_what_there_is(mixed: Posterior) -> None:
    for verb in (mixed.mean, mixed.sd, mixed.draws):
        with pytest.raises(ValueError, match=r"unknown task parameter 'mu'; there are \['a'\]"):
            verb("mu")
    with pytest.raises(ValueError, match=r"quantile levels must lie in \[0, 1\]"):
        mixed.quantile("a", 95)


def two_sites(batch: Batch) -> None:
    """A vector and a positive site a task, a deterministic value, and two outputs."""
    tau = pyro.sample("tau", dist.HalfNormal(1.0).expand([2]).to_event(1))
    pyro.deterministic("ratio", tau[0] / tau[1])
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(torch.zeros(2), tau).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
        pyro.deterministic("first", phi[..., 0] * 2)
        with batch.observations():
            pyro.sample("low", dist.Normal(phi[..., 0], scale), obs=batch.y[..., 0])
            pyro.sample("high", dist.Normal(phi[..., 1], scale), obs=batch.y[..., 1])


def test_shapes_of_vector_sites_and_of_several_outputs() -> None:
    rng = np.random.default_rng(0)
    tasks = bm.Tasks.from_arrays(None, [rng.normal(size=(n, 2)) for n in (3, 1, 2)])
    read, count = TaskDensity(two_sites, tasks), 10
    theta, noise = (torch.as_tensor(rng.normal(size=shape)) for shape in ((count, 2), (count, 3, 3)))
    drawn = TaskDraws(
        theta,
        noise,
        np.full((count, 3), -math.log(count)),
        np.tile(np.arange(count)[:, None], (1, 3)),
        *(np.zeros(3), np.ones(3), ["psis"] * 3, [""] * 3),
        joint=True,
    )
    posterior = Posterior(read, tasks, [(np.arange(3), drawn)])
    assert set(posterior.sites) == {"phi", "scale", "first"}
    assert posterior.mean("phi").shape == (3, 2) and posterior.draws("phi").shape == (count, 3, 2)
    assert posterior.quantile("phi", [0.1, 0.5, 0.9]).shape == (3, 3, 2)
    np.testing.assert_allclose(posterior.draws("phi"), theta.exp().numpy()[:, None] * noise[..., :2].numpy())
    np.testing.assert_allclose(posterior.draws("first"), 2 * posterior.draws("phi")[..., 0])
    np.testing.assert_allclose(posterior.draws("scale"), np.exp(0.3 * noise[..., 2].numpy()), rtol=1e-6)
    assert posterior.shared["tau"].shape == (count, 2) and posterior.shared["ratio"].shape == (count,)
    with pytest.raises(ValueError, match=r"several observed sites \['low', 'high'\]; choose one with site="):
        posterior.log_likelihood()
    high = posterior.log_likelihood("high")
    truth = norm(posterior.draws("phi")[:, 0, 1, None], posterior.draws("scale")[:, 0, None])
    np.testing.assert_allclose(high[:, 0], truth.logpdf(tasks[0].y[:, 1].numpy()), rtol=1e-5)


def test_values_do_not_depend_on_how_work_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = make_tasks(ROWS)
    theta, noise = torch.randn(23, 1, dtype=torch.float64), torch.randn(23, 5, 1, dtype=torch.float64)
    whole = constrained(density(), tasks, theta, noise)["a"]
    monkeypatch.setattr("bayesmeta.inference.chunks.CHUNK_ELEMENTS", 20)
    np.testing.assert_array_equal(constrained(density(), tasks, theta, noise)["a"], whole)
    np.testing.assert_allclose(whole, (theta + noise[..., 0]).numpy())


@pytest.mark.parametrize("reads", [False, True])
def test_values_of_many_tasks_with_and_without_the_rows_in_them(reads: bool) -> None:
    def model(batch: Batch) -> None:
        offset = batch.x[:, :1] if reads else batch["u"]
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(offset, 1.0))
            with batch.observations():
                pyro.sample("y", dist.Normal(phi, 1.0), obs=batch.y)

    sizes = [1, 9, 2, 3, 17, 1, 4]
    at = [float(i) for i in range(len(sizes))]
    x, y = [np.full(n, u) for u, n in zip(at, sizes, strict=True)], [np.zeros(n) for n in sizes]
    tasks = bm.Tasks.from_arrays(x, y, task_columns={"u": at})
    noise = torch.randn(6, len(sizes), 1, dtype=torch.float64)
    found = constrained(TaskDensity(model, tasks), tasks, torch.zeros(6, 0, dtype=torch.float64), noise)["phi"]
    np.testing.assert_allclose(found, noise[..., 0].numpy() + np.array(at))


def shared_of(status: str = "corrected") -> Shared:
    theta = torch.tensor([[0.0], [1.0], [4.0]], dtype=torch.float64)
    return Shared(density(), SharedDraws(theta, np.log([0.5, 0.25, 0.25]), 0.3, 0.6, status), seed=0)


def test_shared_parameters_are_weighted() -> None:
    shared = shared_of()
    assert shared.mean("mu") == pytest.approx(1.25)
    assert shared.sd("mu") == pytest.approx(math.sqrt(0.25 + 4.0 - 1.25**2))
    assert shared.quantile("mu", 0.5).shape == () and shared.quantile("mu", [0.1, 0.9]).shape == (2,)
    draws = shared.draws("mu")
    counts = [int((draws == value).sum()) for value in (0.0, 1.0, 4.0)]
    assert np.abs(np.array(counts) - len(draws) * np.array([0.5, 0.25, 0.25])).max() <= 1
    np.testing.assert_array_equal(draws, shared.draws("mu"))
    assert "corrected, k̂ 0.30, ESS 60%" in repr(shared) and "mu: mean 1.25" in repr(shared)
    with pytest.raises(ValueError, match=r"unknown shared parameter 'a'; there are \['mu'\]"):
        shared.mean("a")


def test_a_point_estimate_has_no_sd() -> None:
    shared = shared_of("plug-in")
    assert np.isnan(shared.sd("mu")) and shared.mean("mu") == pytest.approx(1.25)
    assert "the uncertainty of θ is missing" in repr(shared)


def test_shared_parameters_as_an_arviz_object() -> None:
    exported = shared_of().to_arviz()
    assert exported["posterior"]["mu"].shape == (1, 4000) and exported["posterior"].sizes["draw"] == 4000


def test_rankings_of_known_tasks_follow_from_joint_draws() -> None:
    """P(a_i > a_j) of the exact bivariate posterior."""
    draws = 4000
    read, guides, tasks = setting(ROWS)
    with torch.no_grad():
        shared = correct_shared(read, guides, tasks, draws=draws)
        drawn = weigh_known(read, guides, resample_theta(shared, draws), tasks)
    mean, covariance = exact(ROWS)
    a, effective = Posterior(read, tasks, [(np.arange(5), drawn)]).draws("a"), draws * shared.ess / 2
    for i, j in ((0, 4), (1, 3), (0, 2)):
        sd = math.sqrt(covariance[i, i] + covariance[j, j] - 2 * covariance[i, j])
        truth = norm.cdf((mean[i] - mean[j]) / sd)
        assert abs((a[:, i] > a[:, j]).mean() - truth) < 4 * math.sqrt(truth * (1 - truth) / effective)


def test_values_that_read_rows_are_those_of_unpadded_tasks() -> None:
    def model(batch: Batch) -> None:
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            pyro.deterministic("at the mean", phi + batch.x.mean(-1, keepdim=True))
            with batch.observations():
                pyro.sample("y", dist.Normal(phi, 1.0), obs=batch.y)

    x = [np.arange(float(n)) for n in (6, 6, 3)]
    tasks = bm.Tasks.from_arrays(x, [0 * rows for rows in x])
    noise = torch.randn(5, 3, 1, dtype=torch.float64)
    found = constrained(TaskDensity(model, tasks), tasks, torch.zeros(5, 0, dtype=torch.float64), noise)
    means = np.array([rows.mean() for rows in x])
    np.testing.assert_allclose(found["at the mean"], noise[..., 0].numpy() + means, rtol=1e-12)


@pytest.mark.parametrize("second", [lambda x: x[:, 1:2], lambda x: x[:, 1].unsqueeze(-1)])
def test_values_of_a_model_that_needs_two_rows(second: Callable[[Tensor], Tensor]) -> None:
    def model(batch: Batch) -> None:
        step = second(batch.x) - batch.x[:, :1]
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(0.0, 2.0))
            with batch.observations():
                pyro.sample("y", dist.Normal(phi * batch.x / step, 1.0), obs=batch.y)

    x = [np.arange(float(n)) for n in (4, 2)]
    tasks = bm.Tasks.from_arrays(x, [0 * rows for rows in x])
    noise = torch.randn(5, 2, 1, dtype=torch.float64)
    found = constrained(TaskDensity(model, tasks), tasks, torch.zeros(5, 0, dtype=torch.float64), noise)["phi"]
    np.testing.assert_allclose(found, 2 * noise[..., 0].numpy())
