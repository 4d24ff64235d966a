"""Gaussian process regression with noise: the evidence of rows and the moments of new ones, for many kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bayesmeta.data.families.rows import Rows


def condition(covariance: Tensor, residual: Tensor, rows: Rows, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Factors the covariance of rows.

    Args:
        covariance: Of the function at the rows' inputs, `(T, K, N, N)`, one for each of K kernels.
        residual: Labels less the prior mean `(T, N)`.
        rows: The rows, for their mask.
        noise: Standard deviation of the noise.

    Returns:
        Log evidence `(T, K)`; the Cholesky factor `(T, K, N, N)`; the whitened residual `(T, K, N, 1)`.

    Raises:
        ValueError: If the noise is so small that a covariance is not positive definite.
    """
    mask = rows.mask.unsqueeze(1)
    both = mask.unsqueeze(-1) & mask.unsqueeze(-2)
    diagonal = torch.where(mask, noise**2, 1.0).to(covariance.dtype)
    lower, failed = torch.linalg.cholesky_ex(torch.where(both, covariance, 0.0) + torch.diag_embed(diagonal))
    if bool(failed.any()):
        raise ValueError(f"the noise {noise:g} is too small for the covariance of so many rows; use a larger one")
    seen = torch.where(rows.mask, residual, 0.0)[:, None, :, None].expand(-1, lower.shape[1], -1, -1)
    white = torch.linalg.solve_triangular(lower, seen, upper=False)
    log_det = lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    constant = 0.5 * math.log(2 * math.pi) * rows.n
    return -0.5 * white.square().sum((-2, -1)) - log_det - constant.unsqueeze(-1), lower, white


def predict(
    cross: Tensor, prior: Tensor, conditioned: tuple[Tensor, Tensor], rows: Rows, noise: float
) -> tuple[Tensor, Tensor]:
    """Predicts labels of new rows.

    Args:
        cross: Covariance of the function at the rows and at the new ones, `(T, K, N, M)`.
        prior: Prior variance of the function, broadcasting to `(T, K, M)`.
        conditioned: The factor and the whitened residual of `condition`.
        rows: The rows, for their mask.
        noise: Standard deviation of the noise.

    Returns:
        Means, less the prior mean, and standard deviations, `(T, M, K)` each.
    """
    lower, white = conditioned
    seen = torch.where(rows.mask[:, None, :, None], cross, 0.0)
    weights = torch.linalg.solve_triangular(lower, seen, upper=False)
    variance = (prior - weights.square().sum(-2)).clamp(min=0.0) + noise**2
    return (weights * white).sum(-2).mT, variance.sqrt().mT
