"""Predictions of a conditional model, against the exact predictive of a normal mean: y = φ + ε, φ ~ N(0, 1)."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, norm
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Normal

import bayesmeta as bm
from bayesmeta.data.batch import Batch
from bayesmeta.results.conditional import ConditionalFit

VARIANCE = 0.25
NEW = 3


class Exact(nn.Module):
    """p(y* | context) with φ integrated out; the parameter moves nothing and is there to be stored."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, context: Batch, x: Tensor) -> Distribution:
        precision = 1 + context.mask.sum(-1, keepdim=True) / VARIANCE
        loc = (context.y * context.mask).sum(-1, keepdim=True) / VARIANCE / precision
        return Normal((loc + 0 * self.unused).expand(x.shape[:2]), (1 / precision + VARIANCE).sqrt())


@pytest.fixture(scope="module")
def fit() -> ConditionalFit:
    tasks = bm.Tasks.from_arrays([np.zeros((3, 1))] * 3, [[0.3, 1.0, 2.0], [-1.0, 0.0, 0.4], [0.0, 0.1, 0.2]])
    options = bm.Amortized(optimizer=bm.Optimizer(steps=4))
    return bm.fit(bm.ConditionalModel(Exact()), tasks, method=options, progress=False)


@pytest.fixture
def context() -> bm.Tasks:
    y = [[0.3, 1.0, 2.0], [-1.0], []]
    return bm.Tasks.from_arrays([np.zeros((len(row), 1)) for row in y], y, names=["a", "b", "c"])


def exact(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    precision = 1 + len(y) / VARIANCE
    return np.full(NEW, y.sum() / VARIANCE / precision), 1 / precision + VARIANCE * np.eye(NEW)


X = np.zeros((NEW, 1))
LABELS = np.array([0.1, 0.9, 0.5])


def test_log_scores_of_rows_alone_and_together(fit: ConditionalFit, context: bm.Tasks) -> None:
    known = [exact(task.y.numpy()) for task in context]
    single = np.array([norm(loc, np.sqrt(np.diag(cov))).logpdf(LABELS) for loc, cov in known])
    alone, together = fit.predict(context, X, draws=2), fit.predict(context, X, joint=True, draws=2)
    np.testing.assert_allclose(alone.log_prob(LABELS), single, rtol=1e-9)
    np.testing.assert_allclose(alone.log_prob(LABELS, joint=True), single.sum(1), rtol=1e-9)
    joint = [multivariate_normal(loc, cov).logpdf(LABELS) for loc, cov in known]
    np.testing.assert_allclose(together.log_prob(LABELS, joint=True), joint, rtol=1e-9)


def test_draws_alone_and_together(fit: ConditionalFit, context: bm.Tasks) -> None:
    draws = 4000
    alone, together = (fit.predict(context, X, joint=joint, draws=draws).draws for joint in (False, True))
    for t, (loc, cov) in enumerate(exact(task.y.numpy()) for task in context):
        for drawn, covariance in ((alone, np.diag(np.diag(cov))), (together, cov)):
            white = np.linalg.solve(np.linalg.cholesky(covariance), (drawn[:, t] - loc).T)
            assert np.abs(white.mean(1)).max() < 4 / np.sqrt(draws)
            assert np.abs(np.cov(white) - np.eye(NEW)).max() < 4 * np.sqrt(2 / draws)


def test_moments_quantiles_and_the_mean_itself(fit: ConditionalFit, context: bm.Tasks) -> None:
    predicted, mean = fit.predict(context, X), fit.predict(context, X, kind="mean")
    loc = np.array([exact(task.y.numpy())[0] for task in context])
    np.testing.assert_allclose(mean.mean, loc, rtol=1e-9)
    assert mean.draws.shape == (1, 3, NEW)
    assert np.abs((predicted.mean - loc) / predicted.sd).max() < 4.5 / np.sqrt(1000)
    lower, upper = predicted.interval(0.5)
    np.testing.assert_array_equal(predicted.quantile([0.25, 0.75]), [lower, upper])
    with pytest.raises(ValueError, match="prob must lie in"):
        predicted.interval(2.0)


def test_ragged_rows_and_labels_of_tasks(fit: ConditionalFit, context: bm.Tasks) -> None:
    y = [[0.1, 0.9, 0.5], [0.1], []]
    target = bm.Tasks.from_arrays([np.zeros((len(row), 1)) for row in y], y, names=["a", "b", "c"])
    for joint in (False, True):
        predicted = fit.predict(context, target, joint=joint, draws=20)
        assert np.array_equal(predicted.mask, [[True] * 3, [True, False, False], [False] * 3])
        assert np.array_equal(np.isnan(predicted.draws).all(0), ~predicted.mask)
        scores = predicted.log_prob()
        assert np.array_equal(np.isfinite(scores), predicted.mask)
        whole = fit.predict(context, X, joint=joint, draws=20)
        assert predicted.log_prob(joint=True)[0] == pytest.approx(whole.log_prob(LABELS, joint=True)[0])
        assert predicted.log_prob(joint=True)[2] == 0.0
        with pytest.raises(ValueError, match="expected outcomes, got none: predict was given inputs alone; pass y"):
            whole.log_prob()


def test_a_saved_fit_is_the_same_fit(fit: ConditionalFit, context: bm.Tasks, tmp_path: pathlib.Path) -> None:
    fit.save(tmp_path / "fit.bm")
    loaded = bm.load(tmp_path / "fit.bm", bm.ConditionalModel(Exact()))
    np.testing.assert_array_equal(loaded.predict(context, X).draws, fit.predict(context, X).draws)
    assert repr(loaded) == repr(fit) and loaded.seed == fit.seed
    with pytest.raises(ValueError, match="the module is not the one that was fitted"):
        bm.load(tmp_path / "fit.bm", bm.ConditionalModel(nn.Linear(1, 1)))


def test_a_posterior_is_refused_and_says_why(fit: ConditionalFit, context: bm.Tasks) -> None:
    with pytest.raises(ValueError, match=r"maps a context to predictions; use bm.fit\(model, tasks\).predict"):
        fit.posterior(context)


def test_errors(fit: ConditionalFit, context: bm.Tasks) -> None:
    with pytest.raises(ValueError, match="kind must be 'outcome' or 'mean'"):
        fit.predict(context, X, kind="median")
    with pytest.raises(ValueError, match="draws must be at least 1"):
        fit.predict(context, X, draws=0)

    def labels(context: Batch, x: Tensor) -> Distribution:
        return Categorical(torch.ones(*x.shape[:2], 3))

    tasks = bm.Tasks.from_arrays([[0.0, 1.0]] * 2, [[0, 2], [1, 2]])
    coded = bm.fit(bm.ConditionalModel(labels), tasks, progress=False)
    np.testing.assert_allclose(coded.predict(tasks, tasks).log_prob(), -np.log(3))
    with pytest.raises(ValueError, match="mean of Categorical is not a number; use kind='outcome'"):
        coded.predict(tasks, tasks, kind="mean")
