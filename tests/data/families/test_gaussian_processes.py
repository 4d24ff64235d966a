from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import Tensor
from torch.distributions import Normal

from bayesmeta.data.batch import Batch
from bayesmeta.data.families import GaussianProcesses
from bayesmeta.data.families.rows import Rows

SUITE = {"rbf": (-0.257, -0.684), "matern52": (-0.371, -0.787), "weakly_periodic": (-0.630, -1.017)}
"""Measured elsewhere with 4,096 tasks: joint log score a target, and marginal; errors up to .012."""


def episodes(family: GaussianProcesses, n: int, seed: int = 0) -> tuple[Batch, Batch]:
    context, target = family.episodes(n, seed=seed)
    return context.batch(slice(None)), target.batch(slice(None))


def scores(family: GaussianProcesses, context: Batch, target: Batch) -> tuple[Tensor, Tensor]:
    """Joint and marginal log scores a target row, `(T,)` each."""
    marginal = family.oracle(context, target.x).log_prob(target.y)
    total = torch.where(target.mask, marginal, 0.0).sum(1)
    return family.joint_log_prob(context, target) / target.n, total / target.n


def within(values: Tensor, known: float, error: float) -> bool:
    return abs(float(values.mean()) - known) < 4 * math.hypot(error, float(values.std()) / math.sqrt(len(values)))


@pytest.mark.parametrize("kernel", SUITE)
def test_the_suite_s_known_scores(kernel: str) -> None:
    joint, marginal = scores(GaussianProcesses.suite(kernel), *episodes(GaussianProcesses.suite(kernel), 300))
    assert within(joint, SUITE[kernel][0], 0.012) and within(marginal, SUITE[kernel][1], 0.012)


@pytest.mark.parametrize(("kernel", "joint", "marginal"), [("rbf", 1.791, 1.493), ("matern52", 1.371, 1.092)])
def test_the_ceilings_of_unknown_kernels(kernel: str, joint: float, marginal: float) -> None:
    """Measured elsewhere with 16,000 tasks; errors .02 at most."""
    family = GaussianProcesses(kernel=kernel)
    found = scores(family, *episodes(family, 200))
    assert within(found[0], joint, 0.02) and within(found[1], marginal, 0.02)


@pytest.mark.parametrize(("kernel", "joint", "marginal"), [("rbf", 1.821, 1.542), ("periodic", 1.494, 1.192)])
def test_the_ceilings_of_known_kernels(kernel: str, joint: float, marginal: float) -> None:
    family = GaussianProcesses(kernel=kernel)
    generator = torch.Generator().manual_seed(0)
    given, new = family.sizes(800, generator)
    x = family.inputs(800, 49, generator)
    y, truth = family.labels(x, generator)
    row = torch.arange(49)
    context = Rows(x, y, row < given[:, None])
    target = Rows(x, y, (row >= given[:, None]) & (row < (given + new)[:, None]))
    kernels = family.known(truth)
    evidence = family.evidences(kernels, Rows(x, y, row < (given + new)[:, None])) - family.evidences(kernels, context)
    log_p = family.predictive_given(kernels, context, x).log_prob(y)
    assert within(evidence[:, 0] / new, joint, 0.02)
    assert within(torch.where(target.mask, log_p, 0.0).sum(1) / new, marginal, 0.02)


@pytest.mark.parametrize("kernel", ["rbf", "matern52"])
def test_the_grid_is_fine_enough(kernel: str) -> None:
    family = GaussianProcesses(kernel=kernel)
    context, target = episodes(family, 24)
    finer = scores(replace(family, grid=24), context, target)
    for coarse, fine in zip(scores(family, context, target), finer, strict=True):
        assert float((coarse - fine).abs().max()) < 0.02 and abs(float((coarse - fine).mean())) < 1e-3


def test_a_fixed_kernel_is_gaussian_process_regression() -> None:
    family = GaussianProcesses(length=0.3, scale=0.8, noise=0.1)
    context, target = episodes(family, 5)
    oracle = family.oracle(context, target.x)
    assert isinstance(oracle, Normal)
    for task in range(5):
        n, m = int(context.n[task]), int(target.n[task])
        x = torch.cat([context.x[task, :n, 0], target.x[task, :m, 0]]).numpy()
        y = torch.cat([context.y[task, :n], target.y[task, :m]]).numpy()
        whole = 0.64 * np.exp(-0.5 * (x[:, None] - x) ** 2 / 0.09) + 0.01 * np.eye(n + m)
        joint = multivariate_normal.logpdf(y, cov=whole) - multivariate_normal.logpdf(y[:n], cov=whole[:n, :n])
        assert float(family.joint_log_prob(context, target)[task]) == pytest.approx(joint)
        gain = np.linalg.solve(whole[:n, :n], whole[:n, n:]).T
        np.testing.assert_allclose(oracle.mean[task, :m], gain @ y[:n])
        np.testing.assert_allclose(oracle.variance[task, :m], np.diag(whole[n:, n:] - gain @ whole[:n, n:]))


def test_one_unknown_of_two() -> None:
    """A grid over lengths alone, against the mean of the evidences of 400 fixed lengths."""
    family = GaussianProcesses(scale=0.8, noise=0.1)
    tasks, truth = family.simulate(4, rows=8)
    batch = tasks.batch(slice(None))
    assert (truth["scale"] == 0.8).all() and len(set(truth["length"].tolist())) == 4
    lengths = 0.1 + 0.5 * (np.arange(400) + 0.5) / 400
    fixed = [replace(family, length=float(length)).log_evidence(batch) for length in lengths]
    torch.testing.assert_close(
        family.log_evidence(batch), torch.stack(fixed).logsumexp(0) - math.log(400), atol=5e-3, rtol=0
    )


def test_truth_and_sizes_follow_the_recipe() -> None:
    family = GaussianProcesses(kernel="periodic")
    _, truth = family.simulate(500, rows=1)
    for name, (low, high) in {"length": (0.1, 0.6), "scale": (0.1, 1.0), "period": (0.1, 0.5)}.items():
        share = (truth[name] - low) / (high - low)
        assert 0 <= share.min() and share.max() <= 1 and abs(share.mean() - 0.5) < 4 / math.sqrt(12 * 500)
    given, new = family.sizes(4000, torch.Generator().manual_seed(0))
    assert given.min() == 3 and given.max() == 46 and new.min() == 3 and int((given + new).max()) == 49
    # E[nt | nc] is halfway from 3 to 49 − nc.
    residual = new - (3 + 49 - given) / 2
    assert abs(float(residual.mean())) < 4 * float(residual.std()) / math.sqrt(4000)


@pytest.mark.parametrize("regime", ["interpolation", "beyond", "extrapolation"])
@pytest.mark.parametrize("dim", [1, 3])
def test_the_suite_s_inputs(regime: str, dim: int) -> None:
    family = GaussianProcesses.suite("matern52", dim=dim, regime=regime)
    context, target = family.episodes(30)
    moved = {"interpolation": (0, 0), "beyond": (4, 4), "extrapolation": (0, 4)}[regime]
    for tasks, offset in zip((context, target), moved, strict=True):
        centred = tasks.x - offset
        assert float(centred.min()) < -1.9 and float(centred.max()) > 1.9 and float(centred.abs().max()) <= 2
    assert context.sizes.max() <= 30 * dim and (target.sizes == 50 * dim).all()
    assert family.length == pytest.approx(0.25 * math.sqrt(dim)) and family.noise**2 == pytest.approx(0.05)
    assert GaussianProcesses.suite("weakly_periodic", dim=dim).period == pytest.approx(0.25 * math.sqrt(dim))


def test_beyond_is_as_predictable_as_inside() -> None:
    family = GaussianProcesses.suite("weakly_periodic", regime="beyond")
    joint, marginal = scores(family, *episodes(family, 300, seed=5))
    assert within(joint, SUITE["weakly_periodic"][0], 0.012) and within(marginal, SUITE["weakly_periodic"][1], 0.012)


def test_an_unknown_period_has_no_oracle() -> None:
    family = GaussianProcesses(kernel="periodic")
    tasks, _ = family.simulate(2, rows=4)
    batch = tasks.batch(slice(None))
    with pytest.raises(ValueError, match="is not known where the period is an interval"):
        family.oracle(batch, batch.x)
    assert bool(torch.isfinite(replace(family, period=0.3).oracle(batch, batch.x).mean).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "cosine"}, "expected kernel as one of"),
        ({"length": 0.0}, "expected length as a positive number"),
        ({"scale": (1.0, 0.5)}, "expected scale as"),
        ({"noise": 0.0}, "expected noise"),
        ({"interval": (1.0, 1.0)}, "expected interval"),
        ({"dim": 0}, "expected dim"),
        ({"grid": 0}, "expected grid"),
    ],
)
def test_constants_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianProcesses(**options)


def test_sizes_that_do_not_fit_and_unknown_suites() -> None:
    with pytest.raises(ValueError, match="leaves no 3 of most_rows=49"):
        GaussianProcesses(context_rows=47).episodes(2)
    with pytest.raises(ValueError, match="suite: expected a kernel of"):
        GaussianProcesses.suite("periodic")
    with pytest.raises(ValueError, match="and a regime of"):
        GaussianProcesses.suite("rbf", regime="inside")
