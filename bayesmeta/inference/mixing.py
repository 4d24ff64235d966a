"""Whether Markov chains have mixed: R-hat and effective sample sizes, ArviZ's in both of its generations.

References:
    Vehtari, Gelman, Simpson, Carpenter, Bürkner: Rank-Normalization, Folding, and Localization: An Improved R-hat for
    Assessing Convergence of MCMC, 2021, https://doi.org/10.1214/20-BA1221
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

MAX_RHAT = 1.05
MIN_ESS = 100.0
"""Beyond these bounds chains have not mixed."""
SHORTEST = 8
"""Chains with fewer draws cannot have."""

Statistic = Callable[[np.ndarray], float]
"""Chains `(chain, draw)` of one quantity -> a number."""


class Mixing(NamedTuple):
    """Rank-normalised split R-hat and bulk effective sample size of d quantities, `(d,)` each."""

    rhat: np.ndarray
    ess: np.ndarray

    @property
    def bad(self) -> np.ndarray:
        """Which quantities' chains have not mixed `(d,)`; what is not a number has not."""
        return ~((self.rhat <= MAX_RHAT) & (self.ess >= MIN_ESS))

    def of(self, some: slice) -> Mixing:
        """Those of some of the quantities."""
        return Mixing(self.rhat[some], self.ess[some])


def mixing(draws: np.ndarray) -> Mixing:
    """How well chains `(chain, draw, d)` of d quantities have mixed.

    What does not move in some chain has not been sampled: R-hat inf, no effective draw. R-hat of one chain is that of
    its halves.
    """
    if draws.shape[1] < SHORTEST:
        return Mixing(np.full(draws.shape[2], np.inf), np.zeros(draws.shape[2]))
    rhat, ess = _statistics()
    half = draws.shape[1] // 2
    split = draws if len(draws) > 1 else np.stack([draws[0, :half], draws[0, -half:]])
    moving = ~(np.ptp(draws, axis=1) == 0).any(0)
    found = np.array([np.full(len(moving), np.inf), np.zeros(len(moving))])
    for i in np.flatnonzero(moving):
        found[:, i] = rhat(split[..., i]), ess(draws[..., i])
    return Mixing(found[0], found[1])


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
