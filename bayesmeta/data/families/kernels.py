"""Correlation functions of Gaussian processes, by name."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

TINY = 1e-20
"""Added to squared distances: their root has derivatives at 0 too."""
Correlation = Callable[[Tensor, Tensor, Tensor], Tensor]


def differences(first: Tensor, second: Tensor) -> Tensor:
    """Differences `(…, N, M, dim)` of inputs `(…, N, dim)` and `(…, M, dim)`."""
    return first.unsqueeze(-2) - second.unsqueeze(-3)


def rbf(difference: Tensor, length: Tensor, period: Tensor) -> Tensor:
    """exp(−|δ|² / 2 l²)."""
    return torch.exp(-0.5 * difference.square().sum(-1) / length.square())


def matern52(difference: Tensor, length: Tensor, period: Tensor) -> Tensor:
    """(1 + r + r² / 3) exp(−r), r = √5 |δ| / l."""
    r = math.sqrt(5.0) * (difference.square().sum(-1) + TINY).sqrt() / length
    return (1 + r + r.square() / 3) * torch.exp(-r)


def periodic(difference: Tensor, length: Tensor, period: Tensor) -> Tensor:
    """exp(−2 Σ sin²(π δ / p) / l²)."""
    return torch.exp(-2 * _waves(difference, period) / length.square())


def weakly_periodic(difference: Tensor, length: Tensor, period: Tensor) -> Tensor:
    """exp(−|δ|² / 2 l² − 2 Σ sin²(π δ / p)): what recurs each period, and fades over l."""
    return rbf(difference, length, period) * torch.exp(-2 * _waves(difference, period))


def _waves(difference: Tensor, period: Tensor) -> Tensor:
    return (math.pi * difference / period.unsqueeze(-1)).sin().square().sum(-1)


KERNELS: dict[str, Correlation] = {
    "rbf": rbf,
    "matern52": matern52,
    "periodic": periodic,
    "weakly_periodic": weakly_periodic,
}
"""From differences `(…, N, M, dim)`, length and period, which broadcast to `(…, N, M)`."""
PERIODIC = ("periodic", "weakly_periodic")
