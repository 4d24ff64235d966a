"""Checks of models with several observed sites see the labels of each site, and no others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

import bayesmeta as bm
from bayesmeta.checks import coverage, posterior_predictive

METHOD = bm.Marginal(shared="normal", chains=2, draws=200)
L = bm.likelihoods


def frame() -> pd.DataFrame:
    """Ten tasks, every second one of lengths far from 0 and 1, the others of yes and no."""
    rng = np.random.default_rng(0)
    rows = [
        {"task": f"t{i}", "x": rng.normal(), "kind": ("length", "works")[i % 2], "code": i % 2, "level": 20 + i}
        for i in range(10)
        for _ in range(8)
    ]
    table = pd.DataFrame(rows)
    table["length"] = table["level"] + 0.5 * rng.normal(size=len(table))
    table["works"] = (rng.random(len(table)) < 0.7).astype(float)
    table["y"] = np.where(table["kind"] == "length", table["length"], table["works"])
    return table


OUTPUTS = L.Outputs({"works": L.Bernoulli(), "length": L.Normal()})
KINDS = L.Kinds("kind", {"works": L.Bernoulli(), "length": L.Normal()})


def outputs() -> bm.Tasks:
    return bm.Tasks.from_dataframe(frame(), task="task", x="x", y=["length", "works"])


def kinds(column: str = "kind") -> bm.Tasks:
    return bm.Tasks.from_dataframe(frame(), task="task", x="x", y="y", task_columns=column)


@pytest.mark.parametrize(("likelihood", "tasks"), [(OUTPUTS, outputs()), (KINDS, kinds())])
def test_simulated_labels_stand_where_their_site_looks_for_them(likelihood: Any, tasks: bm.Tasks) -> None:
    """Yes and no for one site, never for the other, whatever the order."""
    model = bm.models.multitask(features=1, likelihood=likelihood)
    simulated, _ = bm.simulate(model, like=tasks, seed=1)
    if likelihood is OUTPUTS:
        length, works = simulated.y.T.numpy()
    else:
        kind = np.repeat(np.arange(10) % 2, 8)
        length, works = simulated.y.numpy()[kind == 0], simulated.y.numpy()[kind == 1]
    assert set(works) <= {0.0, 1.0} and len(set(length)) == len(length)


def test_checks_look_at_the_labels_of_a_site() -> None:
    """Means are those of the lengths, coverage is near its level; another kind's rows count for nothing."""
    wide = bm.models.sharing.Gaussian(loc_scale=50.0, sd_scale=10.0)
    table = frame()
    means = table.groupby("task", sort=False)["length"].mean().to_numpy()
    for likelihood, tasks, site in ((OUTPUTS, outputs(), "length"), (KINDS, kinds(), "y_length")):
        fit = bm.fit(bm.models.multitask(features=1, sharing=wide, likelihood=likelihood), tasks, method=METHOD)
        post = fit.posterior(tasks, draws=300)
        some = slice(None) if likelihood is OUTPUTS else slice(0, None, 2)
        np.testing.assert_allclose(posterior_predictive(post, site=site).observed, means[some], rtol=1e-12)
        found = coverage(post.predict(tasks, site=site), probs=(0.9,))
        assert abs(float(np.ravel(found.share[site])[0]) - 0.9) < 0.12


def test_kinds_that_nobody_modelled_are_refused_for_new_tasks() -> None:
    tasks = kinds("code")
    likelihood = L.Kinds("code", {1: L.Bernoulli(), 0: L.Normal()})
    method = bm.Amortized(shared="map", optimizer=bm.Optimizer(steps=1))
    fit = bm.fit(bm.models.multitask(features=1, likelihood=likelihood), tasks, method=method, progress=False)
    table = frame().query("task == 't1'").assign(task="new", code=2)
    new = bm.Tasks.from_dataframe(table, task="task", x="x", y="y", task_columns="code")
    with pytest.raises(ValueError, match="expected 'code' among"):
        fit.posterior(new)


@pytest.mark.parametrize(("likelihood", "tasks"), [(OUTPUTS, outputs()), (KINDS, kinds())])
def test_sharing_is_compared_by_names_and_levels(likelihood: Any, tasks: bm.Tasks) -> None:
    wide = bm.models.sharing.Gaussian(loc_scale=50.0, sd_scale=10.0)
    model = bm.models.multitask(features=1, sharing=wide, likelihood=likelihood)
    scores = bm.compare_sharing(model, tasks[:4], folds=2, context=None, method=bm.Marginal(shared="map"), draws=200)
    assert all(np.isfinite(values).all() for values in scores.rows.values())
