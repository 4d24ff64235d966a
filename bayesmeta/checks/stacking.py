"""Stacking: weights of several predictive distributions that maximise the held-out log score of their mixture.

References:
    Yao, Vehtari, Simpson, Gelman: Using Stacking to Average Bayesian Predictive Distributions, 2018,
    https://doi.org/10.1214/17-BA1091
"""

from __future__ import annotations

import numpy as np

STEPS = 2000
SETTLED = 1e-9
"""EM stops when a step raises the mean log score by less than this."""


def stacking_weights(log_density: np.ndarray) -> np.ndarray:
    """Weights on the simplex `(candidate,)` that maximise mean log Σ_c w_c p_c(y), by EM, which is concave here.

    Args:
        log_density: Held-out log densities `(candidate, …)`; entries that are NaN for some candidate are left out.

    Raises:
        ValueError: Nothing is left, or all candidates give some row no density.
    """
    flat = log_density.reshape(len(log_density), -1)
    flat = flat[:, ~np.isnan(flat).any(0)]
    peak = flat.max(0) if flat.size else np.array([-np.inf])
    if not np.isfinite(peak).all():
        raise ValueError("stacking: expected held-out rows to which some candidate gives a density, got none")
    density = np.exp(flat - peak)
    weights, score = np.full(len(flat), 1 / len(flat)), -np.inf
    for _ in range(STEPS):
        mixture = weights @ density
        before, score = score, float(np.log(mixture).mean())
        if score - before < SETTLED:
            break
        weights = weights * (density / mixture).mean(1)
    return weights
