"""A task without rows has the prior as its posterior, whatever the prior is."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

import bayesmeta as bm

DRAWS = 1000
MIN_P = 1e-3


def model(batch: bm.Batch) -> None:
    """One task site of every kind: exact and approximate whitening, an event, a funnel."""
    with batch.tasks():
        rate = pyro.sample("rate", dist.Gamma(0.7, 2.0))
        pyro.sample("share", dist.Dirichlet(torch.tensor([0.5, 1.0, 3.0])))
        heavy = pyro.sample("heavy", dist.StudentT(3.0, 1.0, 2.0))
        parts = dist.Categorical(probs=torch.tensor([0.3, 0.7]))
        pyro.sample("mixture", dist.MixtureSameFamily(parts, dist.Normal(torch.tensor([-2.0, 2.0]), 0.5)))
        width = pyro.sample("width", dist.Normal(0.0, 1.5))
        pyro.sample("funnel", dist.Normal(0.0, (width / 2).exp()))
        with batch.observations():
            pyro.sample("y", dist.Normal(heavy, 1.0 + rate), obs=batch.y)


@pytest.fixture(scope="module")
def posterior() -> bm.Posterior:
    generator = np.random.default_rng(0)
    tasks = bm.Tasks.from_arrays(None, [generator.standard_normal(3) for _ in range(6)])
    options = bm.Amortized(optimizer=bm.Optimizer(steps=30))
    fit = bm.fit(model, tasks, method=options, progress=False)
    return fit.prior(DRAWS, seed=1)


def test_each_margin_is_the_prior(posterior: bm.Posterior) -> None:
    def mixture(v: np.ndarray) -> np.ndarray:
        return 0.3 * stats.norm.cdf(v, -2, 0.5) + 0.7 * stats.norm.cdf(v, 2, 0.5)

    margins = {
        "rate": stats.gamma(0.7, scale=0.5).cdf,
        "heavy": stats.t(3.0, 1.0, 2.0).cdf,
        "mixture": mixture,
        "width": stats.norm(0, 1.5).cdf,
    }
    for name, cdf in margins.items():
        assert stats.kstest(posterior.draws(name)[:, 0], cdf).pvalue > MIN_P, name
    for k, alpha in enumerate((0.5, 1.0, 3.0)):
        share = posterior.draws("share")[:, 0, k]
        assert stats.kstest(share, stats.beta(alpha, 4.5 - alpha).cdf).pvalue > MIN_P, k


def test_the_funnel_keeps_its_dependence(posterior: bm.Posterior) -> None:
    width, funnel = posterior.draws("width")[:, 0], posterior.draws("funnel")[:, 0]
    assert stats.kstest(funnel / np.exp(width / 2), stats.norm.cdf).pvalue > MIN_P
    assert stats.kstest(funnel, stats.norm.cdf).pvalue < MIN_P


def test_it_says_so(posterior: bm.Posterior) -> None:
    assert list(posterior.method) == ["prior"]
    assert posterior.khat.tolist() == [0.0]
    assert posterior.flag.tolist() == [""]
