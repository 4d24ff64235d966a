"""Held-out scores against closed forms, verdicts where sharing helps and hurts, and folds that keep to themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import Tensor

import bayesmeta as bm
from bayesmeta.checks import folds
from bayesmeta.checks.folds import COMPLETE_POOLING, LEARNED, NO_POOLING, ROBUST, SharingScores, row_folds

NOISE = 0.5
METHOD = bm.Marginal(shared="normal", chains=2, draws=200)


def tasks_of(spread: float, *, count: int = 8, rows: int = 8, seed: int = 0) -> bm.Tasks:
    rng = np.random.default_rng(seed)
    levels = 1.0 + spread * rng.normal(size=count)
    y = levels[:, None] + NOISE * rng.normal(size=(count, rows))
    return bm.Tasks.from_arrays(None, list(y), names=[f"t{i}" for i in range(count)])


def levels(phi: Tensor, x: Tensor) -> Tensor:
    return phi[..., 0].expand(x.shape[:2])


def model(prior: Any = None) -> bm.HierarchicalModel:
    return bm.HierarchicalModel(prior or bm.priors.Gaussian(1), levels, bm.likelihoods.Normal(NOISE))


def predictive(given: np.ndarray, row: float, prior: np.ndarray) -> float:
    """Log density of a row given others, all jointly normal with covariance `prior` + noise."""
    y = np.append(given, row)
    joint = multivariate_normal(np.zeros(len(y)), prior + NOISE**2 * np.eye(len(y)))
    rest = multivariate_normal(np.zeros(len(given)), (prior + NOISE**2 * np.eye(len(y)))[:-1, :-1])
    return float(joint.logpdf(y) - rest.logpdf(given))


def test_baselines_are_those_of_closed_forms() -> None:
    """Rows given the others of their task, or all others: normal with φ ~ N(0, 10² y's variance), φ counted once."""
    tasks = tasks_of(1.0)
    scores = bm.compare_sharing(model(), tasks, folds=4, context=None, method=METHOD, draws=4000)
    fold, y = row_folds(tasks, 4, seed=0), tasks.y.numpy()
    task = np.repeat(np.arange(8), 8)
    for name, seen in ((NO_POOLING, lambda i: task == task[i]), (COMPLETE_POOLING, lambda i: np.full(64, True))):
        for i in range(0, 64, 7):
            given = y[seen(i) & (fold != fold[i])]
            train = y[fold != fold[i]]
            # No pooling is centred on the pooled mean, complete pooling on the mean of y.
            centre, sd = train.mean(), 10 * train.std()
            right = predictive(given - centre, y[i] - centre, np.full((len(given) + 1,) * 2, sd**2))
            assert scores.rows[name][task[i], i % 8] == pytest.approx(right, abs=0.02), (name, i)


def test_what_is_shared_decides() -> None:
    """Alike: no worse than complete pooling; unrelated: no worse than none, and the verdicts say so."""
    alike = bm.compare_sharing(model(), tasks_of(0.0), folds=2, method=METHOD)
    assert alike.total(LEARNED, over=NO_POOLING)[0] > 0 and alike.total(COMPLETE_POOLING, over=NO_POOLING)[0] > 0
    assert abs(alike.total(LEARNED, over=COMPLETE_POOLING)[0]) < 0.05
    apart = bm.compare_sharing(model(), tasks_of(5.0), folds=2, method=METHOD)
    assert apart.total(COMPLETE_POOLING)[0] < apart.total(NO_POOLING)[0] - 0.5 and apart.best != COMPLETE_POOLING
    assert abs(apart.total(LEARNED, over=NO_POOLING)[0]) < 0.05
    assert set(apart.verdicts(COMPLETE_POOLING).values()) >= {"negative transfer"}
    assert apart.total(LEARNED, new=True)[0] > apart.total(COMPLETE_POOLING, new=True)[0]
    assert not any(apart.flagged.values()) and "left-out tasks" in apart.table()


def rare(rate: np.ndarray, *, rows: int, seed: int) -> tuple[SharingScores, np.ndarray]:
    """Scores of Bernoulli tasks on three folds, Beta posteriors: one rate for all, or each its own; and positives."""
    y = np.random.default_rng(seed).random((len(rate), rows)) < rate[:, None]
    fold = np.arange(rows) % 3
    one, own = np.empty((2, *y.shape))
    for k in range(3):
        given, here = y[:, fold != k], fold == k
        pooled = (given.sum() + 0.5) / (given.size + 1)
        alone = (given.sum(1, keepdims=True) + 0.1 * pooled) / (given.shape[1] + 0.1)
        for scores, p in ((one, pooled), (own, alone)):
            scores[:, here] = np.log(np.where(y[:, here], p, 1 - p))
    names = tuple(f"t{i}" for i in range(len(rate)))
    return SharingScores(names, {COMPLETE_POOLING: one, NO_POOLING: own}, {}, 0, {}, {}), y.sum(1)


@pytest.mark.parametrize(("rate", "rows"), [(0.06, 30), (0.02, 30), (0.02, 100), (0.2, 10)])
def test_rare_positives_are_no_negative_transfer(rate: float, rows: int) -> None:
    """Identical tasks: those without positives score the same difference in every row, and are not hurt for that."""
    hurt, without = 0, 0
    for seed in range(20):
        scores, positives = rare(np.full(16, rate), rows=rows, seed=seed)
        hurt += len(scores.hurt)
        without += int((positives == 0).sum())
    assert without > 20 and hurt <= 0.05 * 320


def test_a_task_without_positives_that_sharing_hurts_is_found() -> None:
    """None of 100 where others have one in ten: 10 nats."""
    scores, positives = rare(np.r_[0.0, np.full(15, 0.1)], rows=100, seed=0)
    assert positives.min() == positives[0] == 0 and "t0" in scores.hurt


def test_tasks_that_are_hurt_are_found_beside_one_that_is_nothing_like_them() -> None:
    """What is said of a task does not depend on how much others scatter."""
    rng = np.random.default_rng(0)
    plain = np.zeros((6, 30))
    loss = np.r_[-200.0, np.full(5, -0.5)][:, None] + np.r_[60.0, np.full(5, 0.5)][:, None] * rng.normal(size=(6, 30))
    names = tuple("abcdef")
    assert SharingScores(names, {NO_POOLING: plain, LEARNED: loss}, {}, 0, {}, {}).hurt == names


def test_robust_sharing_is_chosen_inside_the_outer_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of an outer fold are found from the other rows alone: other labels in that fold change nothing."""
    tasks = tasks_of(0.3, count=4, rows=6)
    fold = row_folds(tasks, 2, seed=0)
    spoilt = tasks.with_labels(torch.where(torch.as_tensor(fold == 0), 50.0, tasks.y))
    found: list[np.ndarray] = []
    real = folds.stacking_weights

    def watched(scores: np.ndarray) -> np.ndarray:
        found.append(real(scores))
        return found[-1]

    monkeypatch.setattr(folds, "stacking_weights", watched)
    results = []
    for some in (tasks, spoilt):
        found.clear()
        scores = bm.compare_sharing(
            model(), some, folds=2, context=None, robust=True, method=bm.Marginal(shared="map"), draws=300
        )
        results.append([weights.copy() for weights in found])
    (first, *others), (same, *moved) = results
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(others[0], moved[0])
    assert ROBUST in scores.rows and sum(scores.weights.values()) == pytest.approx(1.0)


def test_left_out_tasks_are_scored_by_what_is_known_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four folds of tasks beside two of rows: each task is scored once, by candidates that were not given it."""
    seen: list[tuple[tuple[str, ...], tuple[str, ...]]] = []

    def scored(contest: Any, known: bm.Tasks, given: bm.Tasks, target: bm.Tasks) -> dict[str, np.ndarray]:
        seen.append((known.names, target.names))
        shape = len(target), int(max(target.sizes))
        return {name: np.full(shape, score) for name, score in ((LEARNED, -1.0), (NO_POOLING, -2.0))}

    monkeypatch.setattr(folds._Contest, "_scores", scored)
    tasks = tasks_of(1.0, count=4, rows=6)
    scores = bm.compare_sharing(model(), tasks, folds=(2, 4))
    assert scores.new.keys() == {LEARNED, NO_POOLING}
    np.testing.assert_allclose(scores.new[LEARNED], -1.0)
    of_tasks = seen[2:]
    assert sorted(target for _, target in of_tasks) == [(name,) for name in tasks.names]
    assert all(set(known) == set(tasks.names) - set(target) for known, target in of_tasks)


def test_folds_are_even_within_tasks() -> None:
    y = [np.zeros(n) for n in (1, 4, 7, 10)]
    fold = row_folds(bm.Tasks.from_arrays(None, y), 4, seed=3)
    for part in np.split(fold, np.cumsum([1, 4, 7])):
        counts = np.bincount(part, minlength=4)
        assert counts.max() - counts.min() <= 1


def test_a_trained_trunk_is_kept_for_the_baselines() -> None:
    """A network's features are those of its fit; no pooling gives every task its own head on them."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-2, 2, size=(6, 10, 1))
    y = np.sin(2 * x[..., 0]) * rng.normal(1, 0.3, size=(6, 1)) + 0.1 * rng.normal(size=(6, 10))
    tasks = bm.Tasks.from_arrays(list(x), list(y))
    trunk = torch.nn.Sequential(torch.nn.Linear(1, 6), torch.nn.Tanh())
    before = [weight.clone() for weight in trunk.parameters()]
    scores = bm.compare_sharing(
        bm.models.multitask(trunk),
        tasks,
        folds=2,
        context=None,
        method=bm.Amortized(optimizer=bm.Optimizer(steps=150)),
        draws=200,
    )
    assert all(np.isfinite(values).all() for values in scores.rows.values())
    assert all(torch.equal(a, b) for a, b in zip(before, trunk.parameters(), strict=True))


def test_several_outputs_are_scored_together() -> None:
    """Labels of both kinds count; a row without labels counts for nothing."""
    rng = np.random.default_rng(1)
    y = np.stack([rng.normal(size=(5, 8)), rng.integers(0, 2, size=(5, 8))], -1)
    y[0, 0], y[1, 1, 0] = np.nan, np.nan
    tasks = bm.Tasks.from_arrays(None, list(y), missing="mask")
    likelihood = bm.likelihoods.Outputs({0: bm.likelihoods.Normal(1.0), 1: bm.likelihoods.Bernoulli()})
    both = bm.HierarchicalModel(bm.priors.Gaussian(2), lambda phi, x: phi.expand(-1, x.shape[1], -1), likelihood)
    scores = bm.compare_sharing(both, tasks, folds=2, context=None, method=METHOD, draws=300)
    for values in scores.rows.values():
        assert np.isnan(values[0, 0]) and np.isfinite(values[1, 1]) and np.isnan(values).sum() == 1


@pytest.mark.parametrize(
    ("models", "options", "expected"),
    [
        ({}, {}, "models by name"),
        ({"robust": model()}, {}, "without the names"),
        (lambda batch: None, {}, "need a bm.HierarchicalModel"),
        (model(lambda shared: torch.distributions.Normal(0.0, 1.0)), {}, "has to define `origin`"),
        (model(), {"folds": 1}, "folds"),
        (model(), {"folds": (2, 1)}, "folds"),
    ],
)
def test_what_cannot_be_compared(models: Any, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        bm.compare_sharing(models, tasks_of(1.0), method=METHOD, **options)


def test_unknown_candidates_are_said() -> None:
    scores = SharingScores(("a",), {NO_POOLING: np.zeros((1, 2))}, {}, 0, {}, {})
    with pytest.raises(ValueError, match="held-out rows, got 'x'"):
        scores.total("x")
    with pytest.raises(ValueError, match="left-out tasks"):
        scores.total(NO_POOLING, new=True)
