"""Whether Markov chains have mixed: R-hat and effective sample sizes, ArviZ's in both of its generations.

References:
    Vehtari, Gelman, Simpson, Carpenter, Bürkner: Rank-Normalization, Folding, and Localization: An Improved R-hat for
    Assessing Convergence of MCMC, 2021, https://doi.org/10.1214/20-BA1221
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np

Statistic = Callable[[np.ndarray], float]
"""Chains `(chain, draw)` of one quantity -> a number."""


def mixing(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rank-normalised split R-hat and bulk effective sample size, `(d,)` each, of draws `(chain, draw, d)`.

    What does not move in some chain has not been sampled: R-hat inf, no effective draw. R-hat of one chain is that of
    its halves.
    """
    rhat, ess = _statistics()
    half = draws.shape[1] // 2
    split = draws if len(draws) > 1 else np.stack([draws[0, :half], draws[0, -half:]])
    moving = ~(np.ptp(draws, axis=1) == 0).any(0)
    found = np.array([np.full(len(moving), np.inf), np.zeros(len(moving))])
    for i in np.flatnonzero(moving):
        found[:, i] = rhat(split[..., i]), ess(draws[..., i])
    return found[0], found[1]


def _statistics() -> tuple[Statistic, Statistic]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from arviz_stats.base import array_stats
        except ImportError:
            from arviz import ess, rhat

            return rhat, ess
    axes = {"chain_axis": 0, "draw_axis": 1}
    return (
        lambda chains: float(array_stats.rhat(chains, method="rank", **axes)),
        lambda chains: float(array_stats.ess(chains, method="bulk", **axes)),
    )
