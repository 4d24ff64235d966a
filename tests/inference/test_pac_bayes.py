"""The PAC-optimal hyper-posterior against its formula, where everything is Gaussian."""

from __future__ import annotations

import math
import pathlib

import numpy as np
import pytest
import torch
from conjugate import ROWS, SIGMA, TAU, WIDE, ExactGuide, centre, close, density, evidence, fitted, make_tasks
from scenarios import make_tasks as make_lines

import bayesmeta as bm
from bayesmeta.inference.objectives import Guides, Step
from bayesmeta.inference.shared import NormalShared

SIZES = np.array([len(y) for y in ROWS.values()])
SHARE = 1 / (1 + len(SIZES) / (1 / SIZES).sum())


def hyper_posterior(share: float) -> tuple[float, float]:
    """Mean and sd of mu: tasks' means are N(mu, TAU² + SIGMA² / n), and count `share` times."""
    precision = share / (TAU**2 + SIGMA**2 / SIZES)
    means = np.array([np.mean(y) for y in ROWS.values()])
    total = 1 / WIDE**2 + precision.sum()
    return float(precision @ means / total), total**-0.5


def test_the_share_of_the_evidence_is_that_of_the_paper() -> None:
    assert bm.PACBayes().share(make_tasks(ROWS)) == pytest.approx(SHARE)
    n, beta = 2, 8 / 3
    tasks = make_tasks({"a": [1.0, 2.0], "b": [0.0] * 4, "none": []})
    assert bm.PACBayes().share(tasks) == pytest.approx(1 / (1 + beta))
    assert bm.PACBayes(math.sqrt(n)).share(tasks) == pytest.approx(math.sqrt(n) / (n * beta + math.sqrt(n)))
    assert bm.PACBayes(math.inf).share(tasks) == 1.0


def test_weights_and_missing_labels_count_as_rows_do() -> None:
    rows = {"a": [1.0, 2.0], "b": [0.0] * 4}
    by_task = make_tasks(rows, task_weight=[0.5, 0.25])
    by_row = make_tasks(rows, weight=[np.array([1.0, 0.0]), np.array([0.1, 0.2, 0.3, 0.4])])
    assert bm.PACBayes().share(by_task) == pytest.approx(0.5)
    assert bm.PACBayes().share(by_row) == pytest.approx(0.5)
    missing = make_lines("missing", sizes=(3, 1, 4))
    beta = 3 / (1 / 2 + 1 / 1 + 1 / 3)
    assert bm.PACBayes().share(missing) == pytest.approx(1 / (1 + beta))


@pytest.mark.parametrize("lam", [None, 2.0, math.inf])
def test_at_the_hyper_posterior_the_loss_is_its_constant(lam: float | None) -> None:
    """With exact task posteriors log p(θ) + share · Σ ln Z − log q(θ) is the same at every θ: log ∫ p Z^share dθ.

    The formula of the task guide is in single precision.
    """
    tasks, objective = make_tasks(ROWS), bm.PACBayes(lam)
    share = objective.share(tasks)
    mean, sd = hyper_posterior(share)
    shared = NormalShared(torch.tensor([mean], dtype=torch.float64), torch.tensor([sd], dtype=torch.float64))
    with torch.no_grad():
        shared.log_diagonal.zero_()
    batch, guides = tasks.batch(slice(None)), Guides(shared, ExactGuide())
    step = Step(guides.task.prepare(batch, density().tensors(batch)), len(tasks), draws=4)
    loss, info = objective.over(tasks)(density(), guides, step)
    grid = np.linspace(mean - 12 * sd, mean + 12 * sd, 2001)
    log_p = -0.5 * (grid / WIDE) ** 2 - 0.5 * math.log(2 * math.pi * WIDE**2) + share * evidence(ROWS, grid).sum(-1)
    constant = float(np.log(np.trapezoid(np.exp(log_p - log_p.max()), grid)) + log_p.max())
    assert -float(loss.detach()) * len(tasks) == pytest.approx(constant, abs=1e-6)
    assert info["log_p"].shape == (32, 5) and info["theta"].shape == (32, 1) and info["noise"].shape == (32, 5, 1)


def test_some_of_the_tasks_stand_for_all() -> None:
    """A step that sees one task counts it as often as there are tasks."""
    tasks, guides = make_tasks(ROWS), Guides(NormalShared(*density().prior_scale()), ExactGuide())
    found = []
    for chosen in ([0], [1], [2], [3], [4], [0, 1, 2, 3, 4]):
        batch = tasks.batch(chosen)
        torch.manual_seed(1)
        step = Step(guides.task.prepare(batch, density().tensors(batch)), len(tasks), draws=4)
        found.append(float(bm.PACBayes().over(tasks)(density(), guides, step)[0].detach()))
    assert np.mean(found[:5]) == pytest.approx(found[5], abs=1e-6)


@pytest.mark.parametrize("objective", ["pac-bayes", bm.PACBayes(math.inf)], ids=str)
def test_a_fit_draws_theta_from_it(objective: str | bm.PACBayes) -> None:
    """Far from the posterior, whose sd is 2 / 3 of that: neither training nor the correction leads back there."""
    fit = fitted(ROWS, objective=objective)
    answer = hyper_posterior(SHARE if objective == "pac-bayes" else 1.0)
    assert fit.shared.status == "corrected" and fit.shared.ess > 0.5
    assert close(fit.shared.mean("mu"), fit.shared.sd("mu"), answer, 4000 * fit.shared.ess)
    assert hyper_posterior(SHARE)[1] > 1.3 * hyper_posterior(1.0)[1]


def test_the_draws_of_a_guide_give_a_bound_that_more_or_better_ones_raise() -> None:
    tasks, shared = make_tasks(ROWS), NormalShared(*density().prior_scale())
    batch = tasks.batch(slice(None))
    lost = []
    for guide in (ExactGuide(), ExactGuide(0.5, 1.3), ExactGuide(2.0, 0.7)):
        torch.manual_seed(1)
        step = Step(guide.prepare(batch, density().tensors(batch)), len(tasks), draws=200)
        with torch.no_grad():
            lost.append(float(bm.PACBayes().over(tasks)(density(), Guides(shared, guide), step)[0]))
    assert lost[0] < lost[1] < lost[2]


def test_a_fit_is_saved_with_its_lambda(tmp_path: pathlib.Path) -> None:
    fit = fitted(ROWS, objective=bm.PACBayes(3.0))
    path = tmp_path / "fit.bm"
    fit.save(path)
    method = bm.Amortized(guide=ExactGuide(), objective=bm.PACBayes(3.0), optimizer=bm.Optimizer(steps=200))
    loaded = bm.load(path, centre, method=method)
    np.testing.assert_array_equal(loaded.shared.draws("mu"), fit.shared.draws("mu"))
    other = bm.Amortized(guide=ExactGuide(), objective=bm.PACBayes(4.0), optimizer=bm.Optimizer(steps=200))
    with pytest.raises(ValueError, match=r"objective: PACBayes\(lam=3.0\) in the file, PACBayes\(lam=4.0\) here"):
        bm.load(path, centre, method=other)


@pytest.mark.parametrize("lam", [0.0, -1.0, math.nan, "n", True])
def test_errors(lam: object) -> None:
    with pytest.raises(ValueError, match="PACBayes: lam must be a number > 0, ∞ included, or None, got"):
        bm.PACBayes(lam)  # type: ignore[arg-type]
