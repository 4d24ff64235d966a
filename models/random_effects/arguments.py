"""The arguments of a meta-analysis, checked and brought into one form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Normal = tuple[Any, Any]


def numbers(name: str, values: Any) -> np.ndarray:
    """An array of finite numbers."""
    out = np.asarray(values, dtype=float)
    wrong = np.argwhere(~np.isfinite(out))
    if len(wrong):
        place = tuple(int(i) for i in wrong[0])
        raise ValueError(f"{name}: expected finite numbers, got {out[place]} at {place}; leave that study out")
    return out


def labels(names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """Different names, one a study."""
    found = tuple(str(name) for name in names) if names is not None else tuple(f"study {i + 1}" for i in range(count))
    if len(found) != count or len(set(found)) != count:
        raise ValueError(f"names: expected {count} different names, one a study, got {found!r:.200}")
    return found


def design_matrix(covariates: Any, count: int | None) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of the covariates and rows `(k, 1 + p)` with a leading 1."""
    if covariates is None:
        return (), np.ones((count or 1, 1))
    names, columns = _named_columns(covariates) if isinstance(covariates, Mapping) else _numbered_columns(covariates)
    if columns.ndim != 2 or count not in (None, len(columns)):
        raise ValueError(f"covariates: expected shape ({count or 'm'}, p), a row a study, got {columns.shape}")
    return names, np.concatenate([np.ones((len(columns), 1)), columns], 1)


def _named_columns(covariates: Mapping[Any, Any]) -> tuple[tuple[str, ...], np.ndarray]:
    named = {str(name): numbers(f"covariates[{name!r}]", values) for name, values in covariates.items()}
    if len({np.shape(values) for values in named.values()}) > 1:
        raise ValueError(f"covariates: expected columns of one length, got {[len(v) for v in named.values()]}")
    return tuple(named), np.stack(list(named.values()), -1)


def _numbered_columns(covariates: Any) -> tuple[tuple[str, ...], np.ndarray]:
    columns = numbers("covariates", covariates)
    columns = columns[:, None] if columns.ndim == 1 else columns
    return tuple(f"x{i}" for i in range(columns.shape[-1])), columns


def normal_prior(name: str, given: Normal | None, count: int) -> np.ndarray:
    """Means and sds `(count, 2)`; flat is an infinite sd."""
    if given is None:
        return np.tile([0.0, np.inf], (count, 1))
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise ValueError(f"{name}: expected a pair (mean, sd) of a normal prior, or None for a flat one, got {given!r}")
    try:
        mean, sd = (np.broadcast_to(numbers(name, part), (count,)) for part in given)
    except ValueError as error:
        raise ValueError(f"{name}: expected numbers, one or one a coefficient ({count}): {error}") from error
    if (sd <= 0).any():
        raise ValueError(f"{name}: expected a positive sd, got {sd.min():g}; None is a flat prior")
    return np.stack([mean, sd], 1)
