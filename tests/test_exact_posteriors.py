"""Sampled posteriors of five published models against exact moments, with 2 × 1,000 draws."""

from __future__ import annotations

import numpy as np
import pytest

import bayesmeta as bm
from benchmarks.exact_posteriors import POSTERIORS, Agreement, agreement, agreements

METHODS = {"marginal": bm.Marginal(chains=2), "nuts": bm.NUTS(chains=2)}

FITS = 3
"""Parameters hang together: the rms of their z has an sd of .14 in one fit (12 seeds of radon with slopes, NUTS)."""


def disagreements(found: dict[str, Agreement]) -> list[str]:
    """Parameters whose mean or sd is off by more than Monte Carlo errors explain."""
    return [name for name, one in found.items() if not (one.mean_agrees and one.sd_agrees)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", POSTERIORS)
def test_every_mean_and_sd_is_exact_but_for_monte_carlo_errors(name: str, method: str) -> None:
    spec = POSTERIORS[name]
    tasks = spec.tasks()
    squares = []
    for seed in range(FITS):
        fit = bm.fit(spec.model, tasks, method=METHODS[method], seed=seed, progress=False)
        post = fit.posterior(tasks, draws=2000, seed=1)
        found = agreements(name, post, chains=2)
        assert disagreements(found) == []
        squares.append(np.mean([one.z**2 for one in found.values()]))
        if len(found) < 80:
            break
    else:
        assert 0.8 < np.sqrt(np.mean(squares)) < 1.2
    assert fit.shared.status == "sampled" and post.joint
    assert set(post.method) == {"exact" if method == "marginal" else "nuts"} and (post.flag == "").all()


@pytest.mark.parametrize(("shift", "stretch", "agrees"), [(0.0, 1.0, True), (0.15, 1.0, False), (0.0, 1.12, False)])
def test_what_is_off_is_noticed(shift: float, stretch: float, agrees: bool) -> None:
    draws = 3.0 + shift + stretch * np.random.default_rng(0).normal(size=2000)
    one = agreement(draws, (3.0, 1.0), chains=2)
    assert (one.mean_agrees and one.sd_agrees) == agrees
