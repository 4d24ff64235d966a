"""NUTS on the joint density against exact moments, and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import bayesmeta as bm
from bayesmeta.inference.mixing import Mixing
from bayesmeta.inference.nuts import from_chains
from bayesmeta.inference.sampling import Drawn
from benchmarks.awkward import judge
from benchmarks.awkward_densities import REFERENCES
from benchmarks.awkward_models import CASES
from benchmarks.exact_posteriors import eight_schools, schools


def test_chains_are_stored_and_exported(tmp_path: Path) -> None:
    fit = bm.fit(eight_schools, schools(), method=bm.NUTS(chains=2), progress=False)
    fit.save(tmp_path / "fit.bm")
    loaded = bm.load(tmp_path / "fit.bm", eight_schools)
    before, after = (f.posterior(schools(), draws=2000) for f in (fit, loaded))
    assert np.array_equal(before.draws("effect"), after.draws("effect"))
    assert set(after.method) == {"nuts"} and set(after.flag) == {""} and fit.history.stages[0]["done"]
    assert (after.ess > 0.05).all() and (after.ess <= 1).all()
    np.testing.assert_array_equal(before.ess, after.ess)
    exported = after.to_arviz()
    assert dict(exported["posterior"].sizes)["chain"] == 2
    shared = loaded.shared.to_arviz()
    np.testing.assert_array_equal(exported["sample_stats"]["diverging"], shared["sample_stats"]["diverging"])
    assert shared.attrs["max_rhat"] < 1.05 and shared.attrs["min_ess"] > 100


def test_without_nutpie_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nutpie", None)
    with pytest.raises(ValueError, match=r"bayesmeta\[nuts\]"):
        bm.fit(eight_schools, schools(), method=bm.NUTS(chains=1, warmup=5, draws=5), progress=False)


def test_lengths_are_whole_numbers() -> None:
    with pytest.raises(ValueError, match="chains must be a whole number of at least 1, got 0"):
        bm.NUTS(chains=0)


def test_draws_of_chains_weigh_alike() -> None:
    drawn = Drawn(np.zeros((2, 250, 1)), {}, Mixing(np.ones(1), np.array([150.0])))
    shared = from_chains(torch.zeros(500, 1), drawn)
    assert shared.chains == 2 and shared.ess == 0.3 and shared.status == "sampled"
    np.testing.assert_allclose(np.exp(shared.log_weight), 0.002)


@pytest.mark.parametrize("rhat, ess", [(1.06, 150.0), (1.0, 99.0), (np.nan, 150.0)])
def test_chains_of_theta_that_have_not_mixed_are_no_sample_of_it(rhat: float, ess: float) -> None:
    drawn = Drawn(np.zeros((2, 250, 2)), {}, Mixing(np.array([1.0, rhat]), np.array([150.0, ess])))
    assert from_chains(torch.zeros(500, 2), drawn).status == "uncorrected"
    assert from_chains(torch.zeros(500, 1), drawn).status == "sampled"


def test_tasks_whose_chains_sit_in_one_of_two_modes_are_flagged(tmp_path: Path) -> None:
    case = CASES["square"]
    tasks = case.tasks(count=4)
    with pytest.warns(UserWarning, match="have not mixed well.*, or method='marginal'"):
        fit = bm.fit(case.model, tasks, method=bm.NUTS(chains=4, warmup=200, draws=200), progress=False)
    assert not fit.history.stages[0]["done"]
    fit.save(tmp_path / "fit.bm")
    posterior = bm.load(tmp_path / "fit.bm", case.model).posterior(tasks, draws=400)
    flagged = posterior.flag != ""
    assert flagged.any() and all("the chains have not mixed: R-hat" in flag for flag in posterior.flag[flagged])
    assert (posterior.ess[flagged] < 0.125).all()
    assert not judge(posterior, REFERENCES["square"](tasks)).missed.any()
    assert set(fit.posterior(tasks, refine="laplace").flag) == {""}
