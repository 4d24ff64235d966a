"""Pareto-smoothed importance sampling: smoothed weights, k̂ and relative effective sample sizes.

The smoothing is ArviZ's, in both of its generations; here are the gates of this project.

References:
    Vehtari, Simpson, Gelman, Yao, Gabry: Pareto Smoothed Importance Sampling, 2024, https://jmlr.org/papers/v25/19-556.html
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch

CONSTANT_WEIGHTS = 1e-3
"""Log weights whose sd is below this are constant: k̂ is 0 by definition, an estimate would be noise."""
MIN_RELATIVE_ESS = 0.2
NO_WEIGHT = -1e100
"""The log weight of a draw whose density is zero or not a number."""
MIN_TAIL = 25
"""Fewer weights than this are not smoothed: there is no tail to fit."""


def smooth(log_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smooths importance weights.

    Args:
        log_weights: `(..., S)`, unnormalised.

    Returns:
        Normalised smoothed log weights `(..., S)` and k̂ `(...)`.
    """
    log_weights = _usable(log_weights)
    dead = log_weights.max(-1) <= NO_WEIGHT
    constant = (log_weights.std(-1) < CONSTANT_WEIGHTS) & ~dead
    if log_weights.shape[-1] < MIN_TAIL or (constant | dead).all():
        return _normalised(log_weights), np.where(constant, 0.0, np.inf)
    varied = ~(constant | dead)
    kept, khat = _normalised(log_weights), np.where(dead, np.inf, 0.0)
    kept[varied], khat[varied] = _psislw(log_weights[varied])
    return kept, khat


def relative_ess(log_weights: np.ndarray) -> np.ndarray:
    """Relative effective sample size 1 / (S Σ w²) of log weights `(..., S)`."""
    usable = torch.as_tensor(_usable(log_weights))
    return (2 * usable.logsumexp(-1) - (2 * usable).logsumexp(-1)).exp().numpy() / usable.shape[-1]


def khat_limit(count: int) -> float:
    """The k̂ above which S weights are not to be trusted: min(0.7, 1 - 1/log₁₀ S)."""
    return min(0.7, 1 - 1 / math.log10(count)) if count > 10 else -math.inf


def accepted(khat: np.ndarray, ess: np.ndarray, count: int) -> np.ndarray:
    """Which importance samples of `count` weights pass both gates."""
    return (khat == 0) | ((khat < khat_limit(count)) & (ess >= MIN_RELATIVE_ESS))


def resample(log_weights: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Systematic resampling: indices `(..., count)` drawn with weights `(..., S)`, shuffled alike."""
    weights = np.exp(_normalised(np.asarray(log_weights, dtype=float)))
    cumulative = torch.as_tensor(weights).cumsum(-1)
    cumulative = cumulative / cumulative[..., -1:]
    start = torch.as_tensor(generator.random((*weights.shape[:-1], 1)))
    points = (start + torch.arange(count)) / count
    index = torch.searchsorted(cumulative, points).clamp(max=weights.shape[-1] - 1).numpy()
    return index[..., generator.permutation(count)]


def _usable(log_weights: np.ndarray) -> np.ndarray:
    """Log weights with what is not a number counted as (nearly) no weight, so that one draw cannot spoil the others."""
    return np.maximum(np.nan_to_num(np.asarray(log_weights, dtype=float), nan=NO_WEIGHT, posinf=np.inf), NO_WEIGHT)


def _normalised(log_weights: np.ndarray) -> np.ndarray:
    peak = log_weights.max(-1, keepdims=True)
    return log_weights - peak - np.log(np.exp(log_weights - peak).sum(-1, keepdims=True))


def _psislw(log_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from arviz_stats.base import array_stats
        except ImportError:
            from arviz import psislw

            smoothed, khat = psislw(log_weights)
        else:
            smoothed, khat = array_stats.psislw(-log_weights, axis=-1)  # takes log likelihoods, not weights
    return np.asarray(smoothed), np.asarray(khat)
