"""Means, standard deviations and quantiles of weighted draws, NumPy only.

Values are `(K, *event)` with log weights `(K,)`, or `(K, T, *event)` with log weights `(K, T)` a task.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def _flat(values: np.ndarray, log_weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights `(K, L)` and values `(K, L, E)` whose products are sums over K; without weight they may be no numbers."""
    weight = np.exp(log_weight - log_weight.max(0))
    weight = (weight / weight.sum(0)).reshape(len(weight), -1)
    flat = values.reshape(*weight.shape, -1)
    nothing = (weight == 0)[..., None] & ~np.isfinite(flat)
    if nothing.any():
        flat = np.where(nothing, np.take_along_axis(flat, weight.argmax(0)[None, :, None], 0), flat)
    return weight, flat


def weighted_mean(values: np.ndarray, log_weight: np.ndarray) -> np.ndarray:
    """Weighted mean over the first axis."""
    weight, flat = _flat(values, log_weight)
    return np.einsum("kl,kle->le", weight, flat).reshape(values.shape[1:])


def weighted_sd(values: np.ndarray, log_weight: np.ndarray) -> np.ndarray:
    """Weighted standard deviation over the first axis."""
    weight, flat = _flat(values, log_weight)
    centred = flat - np.einsum("kl,kle->le", weight, flat)
    return np.sqrt(np.einsum("kl,kle,kle->le", weight, centred, centred)).reshape(values.shape[1:])


def weighted_quantile(values: np.ndarray, log_weight: np.ndarray, q: float | Sequence[float]) -> np.ndarray:
    """Weighted quantiles over the first axis: `(*q, *rest)`, the inverse of the weighted distribution function.

    Raises:
        ValueError: A level outside [0, 1].
    """
    levels = np.asarray(q, dtype=float)
    if ((levels < 0) | (levels > 1)).any() or np.isnan(levels).any():
        raise ValueError(f"quantile levels must lie in [0, 1], got {q}")
    weight, flat = _flat(values, log_weight)
    values = flat.reshape(values.shape)
    weight = weight.reshape(log_weight.shape + (1,) * (values.ndim - log_weight.ndim))
    weight = np.broadcast_to(weight, values.shape)
    order = np.argsort(values, 0)
    ordered = np.take_along_axis(values, order, 0)
    cumulative = np.cumsum(np.take_along_axis(weight, order, 0), 0)
    middle = cumulative - 0.5 * np.take_along_axis(weight, order, 0)
    flat_values, flat_middle = (a.reshape(len(values), -1) for a in (ordered, middle))
    columns = range(flat_values.shape[1])
    found = np.stack([np.interp(levels.reshape(-1), flat_middle[:, c], flat_values[:, c]) for c in columns], -1)
    return found.reshape((*levels.shape, *values.shape[1:]))
