"""Tables and ArviZ objects of posteriors: every number is the posterior's own, every label the task's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import ROWS, SIGMA, centre, density, make_tasks
from scipy.stats import norm

import bayesmeta as bm
from bayesmeta.data.batch import Batch
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.weighing import TaskDraws
from bayesmeta.results.posterior import Posterior

DRAWS = 30


def posterior(model: Any, tasks: bm.Tasks, *, joint: bool = True) -> Posterior:
    """Random draws of the model's parameters for all tasks."""
    rng = np.random.default_rng(0)
    read = density() if model is centre else TaskDensity(model, tasks)
    count, size = len(tasks), read.structure.task_size
    drawn = TaskDraws(
        torch.as_tensor(rng.normal(size=(DRAWS, read.structure.shared_size))),
        torch.as_tensor(rng.normal(size=(DRAWS, count, size))),
        np.full((DRAWS, count), -math.log(DRAWS)),
        np.tile(np.arange(DRAWS)[:, None], (1, count)),
        rng.random(count),
        rng.random(count),
        ["psis"] * count,
        ["", "bad", "", "", ""][:count],
        joint=joint,
    )
    return Posterior(read, tasks, [(np.arange(count), drawn)])


def vectors(batch: Batch) -> None:
    """Vectors, a table and a number as values of a task, with x and two kinds of shared values."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(mu, 1.0).to_event(1))
        pyro.sample("table", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        with batch.observations():
            pyro.sample("y", dist.Normal(phi[..., 0] + phi[..., 1] * batch.x[..., 0], sigma), obs=batch.y)


@pytest.fixture(scope="module")
def plain() -> Posterior:
    return posterior(centre, make_tasks(ROWS))


@pytest.fixture(scope="module")
def rich() -> Posterior:
    rng = np.random.default_rng(1)
    x = [rng.normal(size=(n, 2)) for n in (3, 1, 4)]
    return posterior(vectors, bm.Tasks.from_arrays(x, [v[:, 0] for v in x], names=["u", "v", "w"]))


def test_a_table_has_one_line_a_task_and_number(rich: Posterior) -> None:
    table = rich.summary()
    columns = ["task", "parameter", "mean", "sd", "q05", "q50", "q95", "method", "khat", "ess", "flag"]
    assert list(table.columns) == columns
    names = ["phi[0]", "phi[1]", *(f"table[{i},{j}]" for i in range(2) for j in range(3))]
    assert len(table) == 3 * len(names)
    assert sorted(zip(table.task, table.parameter, strict=True)) == sorted((t, n) for t in "uvw" for n in names)
    for line in table.itertuples():
        name, _, rest = line.parameter.partition("[")
        at = (rich.names.index(line.task), *(int(i) for i in rest.rstrip("]").split(",")))
        assert line.mean == rich.mean(name)[at] and line.sd == rich.sd(name)[at]
        assert (line.q05, line.q50, line.q95) == tuple(rich.quantile(name, q)[at] for q in (0.05, 0.5, 0.95))
        assert line.khat == rich.khat[at[0]] and line.ess == rich.ess[at[0]]
        assert line.flag == ("bad" if line.task == "v" else "") and line.method == "psis"


def test_scalars_are_named_without_brackets(plain: Posterior) -> None:
    table = plain.summary()
    assert set(table.parameter) == {"a"} and table.task.tolist() == list(ROWS)
    np.testing.assert_allclose(table["mean"], plain.mean("a"))


def test_groups_of_the_exported_object(rich: Posterior) -> None:
    exported = rich.to_arviz()
    for group in ("posterior", "posterior_predictive", "log_likelihood", "observed_data", "constant_data"):
        assert group in _groups(exported)
    drawn = exported["posterior"]
    assert drawn["phi"].dims == ("chain", "draw", "task", "phi_dim_0")
    assert drawn["table"].dims == ("chain", "draw", "task", "table_dim_0", "table_dim_1")
    assert drawn["mu"].dims == ("chain", "draw", "mu_dim_0") and drawn["sigma"].dims == ("chain", "draw")
    assert list(drawn["phi"].coords["task"].values) == ["u", "v", "w"]
    np.testing.assert_array_equal(drawn["phi"][0].sel(task="w"), rich.draws("phi")[:, 2])
    np.testing.assert_array_equal(drawn["mu"][0], rich.shared["mu"])


def test_rows_of_the_exported_object(rich: Posterior) -> None:
    exported = rich.to_arviz()
    assert exported["log_likelihood"]["y"].dims == ("chain", "draw", "task", "row")
    np.testing.assert_array_equal(exported["log_likelihood"]["y"][0], rich.log_likelihood())
    predictive, observed = exported["posterior_predictive"]["y"], exported["observed_data"]["y"]
    assert predictive.shape == (1, DRAWS, 3, 4) and observed.shape == (3, 4)
    real = np.arange(4)[None] < np.array([[3], [1], [4]])
    assert (np.isfinite(observed.values) == real).all() and (np.isfinite(predictive.values) == real).all()
    constant = exported["constant_data"]
    assert constant["x"].shape == (3, 4, 2) and np.isnan(constant["x"].values[~real]).all()
    np.testing.assert_array_equal(constant["x"].sel(task="u").values[:3], rich.tasks[0].x.numpy())


def test_diagnostics_travel_with_their_tasks(plain: Posterior) -> None:
    constant = plain.to_arviz()["constant_data"]
    assert constant["khat"].dims == ("task",)
    np.testing.assert_allclose(constant["khat"], plain.khat)
    np.testing.assert_allclose(constant["relative_ess"], plain.ess)
    assert constant["flag"].sel(task="b").item() == "bad" and set(constant["method"].values) == {"psis"}


def test_the_export_says_whether_draws_are_joint(plain: Posterior) -> None:
    alone = posterior(centre, make_tasks(ROWS), joint=False)
    remarks = [p.to_arviz().attrs.get("draws") or p.to_arviz()["posterior"].attrs["draws"] for p in (plain, alone)]
    assert remarks == ["draw s of all tasks is one joint draw", "tasks were inferred independently"]
    assert alone.to_arviz()["posterior"]["mu"].dims == ("chain", "draw", "task")


def test_predictions_in_the_export_follow_their_draws(plain: Posterior) -> None:
    predictive = plain.to_arviz()["posterior_predictive"]["y"].values[0]
    off = (predictive - plain.draws("a")[:, :, None])[np.isfinite(predictive)] / SIGMA
    assert abs(off.std() - 1) < 4 / math.sqrt(2 * off.size) and abs(off.mean()) < 4 / math.sqrt(off.size)
    likelihood = plain.to_arviz()["log_likelihood"]["y"].values[0, :, 3, 0]
    np.testing.assert_allclose(likelihood, norm(plain.draws("a")[:, 3], SIGMA).logpdf(ROWS["d"][0]))


def test_tasks_without_rows_have_draws_and_no_data() -> None:
    exported = posterior(centre, make_tasks({"x": [], "z": []})).to_arviz()
    assert set(_groups(exported)) == {"posterior", "prior", "sample_stats", "constant_data"}
    assert list(exported["posterior"].coords["task"].values) == ["x", "z"]


def test_the_export_has_the_learned_prior_and_the_weights() -> None:
    post = posterior(centre, make_tasks({"x": [], "z": [1.0, 3.0]}))
    exported = post.to_arviz()
    prior = np.asarray(exported["prior"]["a"])
    assert prior.shape == (1, *post.draws("a").shape)
    assert abs(prior.std(1) / post.draws("a")[:, :1].std() - 1).max() < 0.2
    assert exported["sample_stats"]["log_weight"].shape == (1, prior.shape[1], 2)


def test_a_file_of_the_export_is_read_back(plain: Posterior, tmp_path: Any) -> None:
    import arviz

    plain.to_arviz().to_netcdf(str(tmp_path / "post.nc"))
    back = arviz.from_netcdf(str(tmp_path / "post.nc"))
    np.testing.assert_array_equal(back["posterior"]["a"][0], plain.draws("a"))


def _groups(exported: Any) -> list[str]:
    groups = exported.groups
    return [name.strip("/") for name in (groups() if callable(groups) else groups) if name.strip("/")]
