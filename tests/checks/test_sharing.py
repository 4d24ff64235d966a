"""Comparisons of ways of sharing: which rows are scored, how scores are averaged, and what is said about tasks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bayesmeta.checks.sharing import SCHEMES, Comparison, HeldOut, compare, first_rows, together
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy import likelihoods, priors
from bayesmeta.hierarchy.model import HierarchicalModel
from bayesmeta.inference.amortized import Amortized
from bayesmeta.inference.training import Optimizer

NAN = math.nan


def simulated(count: int, *, sd: float, seed: int) -> Tasks:
    """Tasks whose means are spread by `sd`, noise 1."""
    generator = np.random.default_rng(seed)
    y = [3 + sd * generator.normal() + generator.normal(size=8) for _ in range(count)]
    return Tasks.from_arrays(None, y, names=[f"{seed}-{i}" for i in range(count)])


def means() -> HierarchicalModel:
    return HierarchicalModel(
        priors.Gaussian(1), lambda phi, x: phi.expand(*x.shape[:2], 1)[..., 0], likelihoods.Normal()
    )


def part(names: str, log_prob: list[list[float]], squared: float = 1.0) -> HeldOut:
    values = np.array(log_prob)
    y = np.where(np.isnan(values), NAN, 0.0)
    flag = ("",) * len(names)
    return HeldOut(tuple(names), y, values, y + math.sqrt(squared), y - 1, y + 1, y + 0.5, y, flag)


def test_rows_given_are_nested_and_the_right_ones() -> None:
    tasks = simulated(3, sd=1.0, seed=0)
    before = np.zeros((3, 8), dtype=bool)
    for count in (0, 1, 3, 8):
        context, given = first_rows(tasks, count, seed=5)
        assert given.sum(1).tolist() == [count] * 3
        assert (given | ~before).all()
        before = given
        np.testing.assert_array_equal(np.sort(context.y.numpy()), np.sort(tasks.y.numpy().reshape(3, 8)[given]))


def test_scores_are_averaged_over_rows_then_splits_then_tasks() -> None:
    first = Comparison({("learned prior", 1): [part("ab", [[-1.0, -3.0], [-1.0, NAN]])]})
    second = Comparison({("learned prior", 1): [part("bc", [[-3.0, NAN], [NAN, NAN]])]})
    both = together([first, second])
    assert both.contexts == (1,)
    assert both.tasks("learned prior", 1, "log score") == {"a": -2.0, "b": -2.0}
    mean, error = both.score("learned prior", 1, "log score")
    assert (mean, error) == (-2.0, 0.0)
    assert both.score("learned prior", 1, "rmse")[0] == 1.0
    assert both.score("learned prior", 1, "coverage")[0] == 1.0
    assert both.tasks("learned prior", 1, "rows") == {"a": 2.0, "b": 1.0, "c": 0.0}


def test_coverage_of_rows_counts_every_row_the_same() -> None:
    one = part("ab", [[-1.0, -1.0, -1.0], [-1.0, NAN, NAN]])
    one.lower[1] = 0.5
    both = Comparison({("learned prior", 0): [one]})
    assert both.score("learned prior", 0, "coverage")[0] == 0.5
    assert both.score("learned prior", 0, "coverage of rows")[0] == 0.75


def test_gain_is_paired_by_task() -> None:
    mine, other = part("ab", [[-1.0, -1.0], [-5.0, -5.0]]), part("ab", [[-2.0, -2.0], [-6.0, -6.0]])
    comparison = Comparison({("learned prior", 0): [mine], ("no pooling", 0): [other]})
    assert comparison.gain("no pooling", 0) == (1.0, 0.0)


def test_verdicts() -> None:
    mine = part("abc", [[-1.0, -1.1, -0.9], [-3.0, -3.1, -2.9], [-1.0, -3.0, -2.0]])
    alone = part("abc", [[-2.0, -2.0, -2.0]] * 3)
    found = Comparison({("learned prior", 2): [mine], ("no pooling", 2): [alone]}).verdicts(2)
    assert found == {"a": "sharing helps", "b": "negative transfer", "c": "no clear difference"}


def test_unknown_schemes_and_scores_are_refused() -> None:
    comparison = Comparison({("learned prior", 2): [part("a", [[-1.0]])]})
    with pytest.raises(ValueError, match=r"expected one of \[\('learned prior', 2\)\], got \('no pooling', 2\)"):
        comparison.tasks("no pooling", 2, "log score")
    with pytest.raises(ValueError, match="expected a score among .*'log score'.*got 'r2'"):
        comparison.tasks("learned prior", 2, "r2")


def test_the_learned_prior_lies_between_the_extremes_and_beats_both() -> None:
    """Means spread by 1, noise 1: after one row the scores have closed forms, which are reached."""
    sd, rows = 1.0, 1
    known, new = simulated(40, sd=sd, seed=1), simulated(100, sd=sd, seed=2)
    torch.set_num_threads(1)
    method = Amortized(optimizer=Optimizer(steps=300))
    result = compare(means(), known, new, contexts=(rows,), draws=1000, method=method)
    assert set(result.held_out) == {(scheme, rows) for scheme in SCHEMES}
    assert result.flagged == dict.fromkeys(SCHEMES, 0)
    variance = {"no pooling": 2.0, "learned prior": 1 + 1 / (1 / sd**2 + 1)}
    for scheme, expected in variance.items():
        value, error = result.score(scheme, rows, "log score")
        assert abs(value + 0.5 * (math.log(2 * math.pi * expected) + 1)) < 4 * error
    for scheme in SCHEMES[:2]:
        gain, error = result.gain(scheme, rows)
        assert 0 < gain < 0.5
        assert error < 0.1
    assert "learned prior" in result.table()
