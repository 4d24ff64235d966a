"""What holds for every family: sizes, seeds and names, and that oracle, evidence and simulation agree."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import bayesmeta as bm
from bayesmeta.data.batch import Batch
from bayesmeta.data.families.base import Family, check_dim, check_intervals, check_positive, draw_sizes

KNOWN: list[Family] = [
    bm.families.Sinusoids(),
    bm.families.SinusoidOrLine(context_rows=(0, 5)),
    bm.families.DriftingSinusoids(context_rows=(0, 6)),
    bm.families.Cauchy(context_rows=(0, 20)),
    bm.families.GaussianProcesses(),
    bm.families.GaussianProcesses.suite("weakly_periodic", dim=2),
]
FAMILIES: list[Family] = [*KNOWN, bm.families.GaussianProcesses(kernel="periodic"), bm.families.Sawtooth(dim=2)]


def label(family: Family) -> str:
    return f"{type(family).__name__}-{family.dim}"


def everything(tasks: bm.Tasks) -> Batch:
    return tasks.batch(slice(None))


@pytest.mark.parametrize("family", FAMILIES, ids=label)
def test_tasks_and_truth_have_the_promised_shapes(family: Family) -> None:
    tasks, truth = family.simulate(6, rows=[4, 0, 1, 7, 2, 3], seed=3)
    assert tasks.sizes.tolist() == [4, 0, 1, 7, 2, 3] and tasks.x.shape == (17, family.dim)
    assert truth and all(len(value) == 6 and np.isfinite(value).all() for value in truth.values())
    again, same = family.simulate(6, rows=[4, 0, 1, 7, 2, 3], seed=3)
    assert torch.equal(again.y, tasks.y) and all(np.array_equal(same[name], truth[name]) for name in truth)
    other, _ = family.simulate(6, rows=[4, 0, 1, 7, 2, 3], seed=4)
    assert not torch.equal(other.y, tasks.y) and not set(other.names) & set(tasks.names)


@pytest.mark.parametrize("family", FAMILIES, ids=label)
def test_episodes_have_the_recipe_s_sizes_and_are_new_tasks(family: Family) -> None:
    context, target = family.episodes(40, seed=3)
    tasks, _ = family.simulate(40, seed=3)
    assert context.names == target.names and not set(context.names) & set(tasks.names)
    assert not torch.equal(context.x[:1], tasks.x[:1]), "other tasks than those of the same seed"
    for tasks, rows in ((context, family.context_rows), (target, family.target_rows)):
        low, high = rows if isinstance(rows, tuple) else (rows, rows)
        assert low <= tasks.sizes.min() and tasks.sizes.max() <= high
        assert len(set(tasks.sizes.tolist())) > 1 or low == high


@pytest.mark.parametrize("family", KNOWN, ids=label)
def test_a_row_s_predictive_is_the_ratio_of_evidences(family: Any) -> None:
    context, target = (everything(tasks) for tasks in replace(family, target_rows=1).episodes(24, seed=1))
    alone = family.oracle(context, target.x).log_prob(target.y)[:, 0]
    # Both are exact up to their own nodes: those of the joint rows are others.
    torch.testing.assert_close(alone, family.joint_log_prob(context, target), atol=5e-3, rtol=0)


@pytest.mark.parametrize("family", KNOWN, ids=label)
def test_simulated_labels_are_as_the_oracle_expects(family: Any) -> None:
    context, target = (everything(tasks) for tasks in replace(family, target_rows=1).episodes(400, seed=2))
    oracle = family.oracle(context, target.x)
    assert oracle.batch_shape == (400, 1)
    squared = ((target.y - oracle.mean).square() / oracle.variance)[:, 0]
    assert abs(float(squared.mean()) - 1) < 4 * float(squared.std()) / math.sqrt(400)
    draws = oracle.sample((99,))
    assert draws.dtype == torch.float64
    ranks = torch.bincount((draws < target.y).sum(0)[:, 0] // 10, minlength=10)
    assert float(((ranks - 40).square() / 40).sum()) < 29.7, "chi-squared with 9 degrees of freedom, p = 5e-4"


@pytest.mark.parametrize("family", KNOWN, ids=label)
def test_padding_and_missing_labels_say_nothing(family: Family) -> None:
    full, _ = family.simulate(3, rows=[6, 4, 6], seed=0)
    given = full.batch([0, 1, 2], rows=9)
    hidden = given.replace(given.tensors | {"observed": given.observed & (torch.arange(9) < 4)})
    x = full.batch([0]).x[:, :2].expand(3, -1, -1)
    short = bm.Tasks.from_arrays(
        [task.x[:4].numpy() for task in full], [task.y[:4].numpy() for task in full], names=full.names
    )
    expected, got = (family.oracle(batch, x) for batch in (everything(short), hidden))
    torch.testing.assert_close(got.mean, expected.mean)
    torch.testing.assert_close(got.log_prob(got.mean), expected.log_prob(expected.mean))
    torch.testing.assert_close(family.log_evidence(hidden), family.log_evidence(everything(short)))


@pytest.mark.parametrize("family", KNOWN, ids=label)
def test_without_rows_nothing_is_known(family: Family) -> None:
    tasks, _ = family.simulate(2, rows=3)
    empty = everything(tasks.without_rows())
    assert family.log_evidence(empty).abs().max() < 2e-4
    oracle = family.oracle(empty, everything(tasks).x[:1].expand(2, -1, -1))
    assert torch.equal(oracle.mean[0], oracle.mean[1]) and bool(torch.isfinite(oracle.variance).all())


@pytest.mark.parametrize("family", KNOWN, ids=label)
def test_float32_data_are_answered_in_float64(family: Family) -> None:
    context, target = (everything(tasks[:3]) for tasks in family.episodes(3))
    short, x = context.to(dtype=torch.float32), target.x.float()
    got = family.oracle(short, x).log_prob(target.y.float())
    assert got.dtype == torch.float64 and torch.get_default_dtype() is torch.float32
    rounded = family.oracle(short.to(dtype=torch.float64), x.double()).log_prob(target.y.float().double())
    assert torch.equal(got, rounded)


def test_an_oracle_is_a_learner() -> None:
    family = bm.families.SinusoidOrLine()
    known, _ = family.simulate(30, rows=6)
    context, target = family.episodes(8, seed=1)
    fit = bm.fit(bm.ConditionalModel(family.oracle), known, progress=False)
    assert isinstance(fit, bm.ConditionalFit)
    prediction = fit.predict(context, target, draws=20)
    batches = everything(context), everything(target)
    expected = family.oracle(batches[0], batches[1].x).log_prob(batches[1].y)
    np.testing.assert_allclose(prediction.log_prob(), expected.numpy(), atol=1e-9)
    assert prediction.draws.shape == (20, 8, 200)
    row = torch.arange(len(target.y)) % 200
    few, _ = target.split_rows(row < 3)
    joint = fit.predict(context, few, joint=True, draws=2).log_prob(joint=True)
    np.testing.assert_allclose(joint, family.joint_log_prob(batches[0], everything(few)).numpy(), atol=0.01)


def test_a_family_without_an_oracle_says_so() -> None:
    family = bm.families.Sawtooth()
    context, target = (everything(tasks) for tasks in family.episodes(2))
    calls: list[Any] = [
        lambda: family.oracle(context, target.x),
        lambda: family.log_evidence(context),
        lambda: family.joint_log_prob(context, target),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="Sawtooth: the Bayes-optimal predictive of this family is not known"):
            call()


def test_wrong_shapes_are_named() -> None:
    family = bm.families.Sinusoids()
    context, target = family.episodes(3)
    with pytest.raises(ValueError, match=r"expected x of shape \(3, M, 1\).*got \(2, 4, 1\)"):
        family.oracle(everything(context), torch.zeros(2, 4, 1))
    with pytest.raises(ValueError, match="of the same tasks"):
        family.joint_log_prob(everything(context), everything(target[[1, 0, 2]]))
    with pytest.raises(ValueError, match=r"expected rows with 1 input\(s\) and one label"):
        family.log_evidence(everything(bm.families.Cauchy().simulate(2, rows=3)[0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n: expected a whole number from 1"),
        ({"seed": -1}, "seed: expected a whole number from 0"),
        ({"seed": 0.5}, "seed: expected a whole number from 0"),
        ({"rows": [1, 2]}, "a list of 3 numbers"),
        ({"rows": (4, 2)}, "rows: expected"),
        ({"rows": -1}, "rows: expected"),
        ({"rows": 2.5}, "rows: expected"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bm.families.Sinusoids().simulate(**({"n": 3} | options))


def test_sizes_are_uniform_on_a_range() -> None:
    counts = torch.bincount(draw_sizes((2, 5), 4000, torch.Generator().manual_seed(0)), minlength=6)
    assert counts[:2].tolist() == [0, 0] and len(counts) == 6
    assert ((counts[2:] - 1000) / math.sqrt(4000 * 0.25 * 0.75)).abs().max() < 4


def test_constants_are_checked() -> None:
    with pytest.raises(ValueError, match="F: expected width as a positive number, got 0"):
        check_positive("F", width=0)
    with pytest.raises(ValueError, match=r"F: expected range as \(low, high\)"):
        check_intervals("F", range=(1.0, 1.0))
    with pytest.raises(ValueError, match="F: expected dim"):
        check_dim("F", 0)
    check_positive("F", width=1.0)
    check_intervals("F", range=(1.0, 1.5))
    check_dim("F", 3)
