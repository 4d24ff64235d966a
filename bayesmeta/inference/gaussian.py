"""The Gaussian q(φ | D, θ) by its precision, and its t(5) version for proposals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

HEAVY_DF = 5.0
"""Degrees of freedom of every heavy-tailed proposal: Gaussian ones give false alarms of k̂."""


def student_t_log_prob(quadratic: Tensor, log_det_precision: Tensor, dim: int) -> Tensor:
    """Log density of a multivariate t(5) from (x-m)ᵀΛ(x-m) and ½ log|Λ|, both `(...)`."""
    constant = math.lgamma((HEAVY_DF + dim) / 2) - math.lgamma(HEAVY_DF / 2) - dim / 2 * math.log(HEAVY_DF * math.pi)
    return constant + log_det_precision - (HEAVY_DF + dim) / 2 * torch.log1p(quadratic / HEAVY_DF)


def normal_log_prob(quadratic: Tensor, log_det_precision: Tensor, dim: int) -> Tensor:
    """Log density of a multivariate normal from (x-m)ᵀΛ(x-m) and ½ log|Λ|, both `(...)`."""
    return log_det_precision - 0.5 * (quadratic + dim * math.log(2 * math.pi))


def heavy_scale(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Draws of √(ν/χ²_ν), which turn normal noise into t(5) noise."""
    half = torch.full(shape, HEAVY_DF / 2, dtype=like.dtype, device=like.device)
    return (HEAVY_DF / 2 / torch._standard_gamma(half)).sqrt()


@dataclass
class GaussianTasks:
    """Independent Gaussians of S × T task posteriors in whitened coordinates.

    Attributes:
        loc: Means `(S, T, d)`.
        factor: Lower Cholesky factors of the precisions `(S, T, d, d)`.
    """

    loc: Tensor
    factor: Tensor

    def sample(self, *, heavy: bool = False) -> Tensor:
        """One reparametrised draw each, `(S, T, d)`; `heavy`: of the t(5) with the same location and scale."""
        noise = torch.randn_like(self.loc)
        if heavy:
            noise = noise * heavy_scale(tuple(self.loc.shape[:-1]), noise).unsqueeze(-1)
        return self.loc + solve_upper(self.factor.mT, noise)

    def log_prob(self, noise: Tensor, *, heavy: bool = False) -> Tensor:
        """Log density `(S, T)` of `(S, T, d)`."""
        white = ((noise - self.loc).unsqueeze(-2) @ self.factor).squeeze(-2)
        log_det = self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        density = student_t_log_prob if heavy else normal_log_prob
        return density(white.square().sum(-1), log_det, noise.shape[-1])


def solve_upper(upper: Tensor, right: Tensor) -> Tensor:
    """Solves `upper x = right` for a batch of vectors `(..., d)`; by hand for d ≤ 2, where the batched call is slow."""
    if upper.shape[-1] == 1:
        return right / upper[..., 0]
    if upper.shape[-1] == 2:
        second = right[..., 1] / upper[..., 1, 1]
        first = (right[..., 0] - upper[..., 0, 1] * second) / upper[..., 0, 0]
        return torch.stack([first, second], -1)
    return torch.linalg.solve_triangular(upper, right.unsqueeze(-1), upper=True).squeeze(-1)


def solve_lower(lower: Tensor, right: Tensor) -> Tensor:
    """Solves `lower x = right` for a batch of vectors `(..., d)`."""
    if lower.shape[-1] <= 2:
        return solve_upper(lower.flip(-1, -2), right.flip(-1)).flip(-1)
    return torch.linalg.solve_triangular(lower, right.unsqueeze(-1), upper=False).squeeze(-1)


def cholesky(matrix: Tensor) -> Tensor:
    """Lower Cholesky factors of `(..., d, d)`; by hand for d ≤ 2, where the batched call is slow."""
    if matrix.shape[-1] == 1:
        return matrix.sqrt()
    if matrix.shape[-1] == 2:
        a = matrix[..., 0, 0].sqrt()
        b = matrix[..., 1, 0] / a
        c = (matrix[..., 1, 1] - b.square()).sqrt()
        return torch.stack([torch.stack([a, torch.zeros_like(a)], -1), torch.stack([b, c], -1)], -2)
    return torch.linalg.cholesky(matrix)
