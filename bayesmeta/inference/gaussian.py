"""The Gaussian q(φ | D, θ) by its precision, and its t(5) version for proposals."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

HEAVY_DF = 5.0
"""Degrees of freedom of every heavy-tailed proposal: Gaussian ones give false alarms of k̂."""
COLUMNWISE = 8
"""Up to this dimension a Cholesky factor is computed column by column for all matrices at once."""


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


class Pushed(ABC):
    """Task posteriors that are maps of standard noise, which may be normal or t(5), or a mixture of both."""

    @abstractmethod
    def push(self, white: Tensor) -> Tensor:
        """Standard noise `(S, T, d)` as draws `(S, T, d)`."""

    @abstractmethod
    def pull(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Draws as squared standard noise summed over d, and the log determinant of the inverse map, `(S, T)` each."""

    @property
    @abstractmethod
    def example(self) -> Tensor:
        """A tensor `(S, T, d)`: shape and dtype of a draw."""

    def sample(self, *, heavy: bool = False) -> Tensor:
        """One reparametrised draw each, `(S, T, d)`; `heavy`: of the t(5) with the same location and scale."""
        white = torch.randn_like(self.example)
        return self.push(self.heavier(white) if heavy else white)

    def mixed(self, heavy: Tensor) -> Tensor:
        """One draw each; `heavy` `(S, T)` says which are t(5)."""
        white = torch.randn_like(self.example)
        place = heavy.nonzero(as_tuple=True)
        white[place] = self.heavier(white[place])
        return self.push(white)

    def heavier(self, white: Tensor) -> Tensor:
        """Standard normal noise `(…, d)` as t(5) noise."""
        return white * heavy_scale((*white.shape[:-1], 1), white)

    def log_prob(self, noise: Tensor, *, heavy: bool = False) -> Tensor:
        """Log density `(S, T)` of `(S, T, d)`."""
        if heavy:
            return self.log_probs(noise)[1]
        quadratic, log_det = self.pull(noise)
        return normal_log_prob(quadratic, log_det, noise.shape[-1])

    def log_probs(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Normal and t(5) log densities `(S, T)` at once."""
        quadratic, log_det = self.pull(noise)
        dim = noise.shape[-1]
        return normal_log_prob(quadratic, log_det, dim), student_t_log_prob(quadratic, log_det, dim)


@dataclass
class GaussianTasks(Pushed):
    """Independent Gaussians of S × T task posteriors in whitened coordinates.

    Attributes:
        loc: Means `(S, T, d)`.
        factor: Lower Cholesky factors of the precisions `(S, T, d, d)`.
    """

    loc: Tensor
    factor: Tensor

    @property
    def example(self) -> Tensor:
        """The means."""
        return self.loc

    def push(self, white: Tensor) -> Tensor:
        """M + L⁻ᵀ ε."""
        return self.loc + solve_upper(self.factor.mT, white)

    def whiten(self, noise: Tensor) -> Tensor:
        """Lᵀ (z − m), the inverse of `push`."""
        return ((noise - self.loc).unsqueeze(-2) @ self.factor).squeeze(-2)

    def log_det(self) -> Tensor:
        """Log |L|, `(S, T)`."""
        return self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def pull(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """|Lᵀ (z − m)|² and log |L|."""
        return self.whiten(noise).square().sum(-1), self.log_det()


@dataclass
class DiagonalTasks(Pushed):
    """Gaussians of S × T task posteriors with independent coordinates: linear in d, for hundreds of them.

    Attributes:
        loc: Means `(S, T, d)`.
        sd: Standard deviations `(S, T, d)`.
    """

    loc: Tensor
    sd: Tensor

    @property
    def example(self) -> Tensor:
        """The means."""
        return self.loc

    def push(self, white: Tensor) -> Tensor:
        """M + σ ε."""
        return self.loc + self.sd * white

    def pull(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """|(z − m) / σ|² and −Σ log σ."""
        return ((noise - self.loc) / self.sd).square().sum(-1), -self.sd.log().sum(-1)


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


def solve_factored(factor: Tensor, right: Tensor) -> Tensor:
    """(L Lᵀ)⁻¹ r for a batch of vectors `(..., d)`."""
    return solve_upper(factor.mT, solve_lower(factor, right))


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


class Lower:
    """Many lower-triangular matrices L by their columns, component first.

    Small matrices are cheapest with one tensor operation for all matrices and a loop over the columns; with the batch
    last every operation runs over contiguous memory.

    Args:
        columns: Column j without its zeros, `(d − j, *batch)`.
    """

    def __init__(self, columns: list[Tensor]) -> None:
        self.columns = columns

    @classmethod
    def cholesky(cls, matrix: Tensor) -> Lower:
        """Factors symmetric positive definite matrices `(d, d, *batch)`; others become NaN."""
        if len(matrix) > COLUMNWISE:
            factor, info = torch.linalg.cholesky_ex(matrix.movedim((0, 1), (-2, -1)))
            dense = torch.where(info == 0, factor.movedim((-2, -1), (0, 1)), math.nan)
            return cls([dense[j:, j] for j in range(len(matrix))])
        columns = []
        while len(matrix):
            column = matrix[:, 0] * matrix[:1, 0].rsqrt()
            columns.append(column)
            below = column[1:]
            matrix = matrix[1:, 1:] - below.unsqueeze(1) * below if len(below) else below
        return cls(columns)

    @classmethod
    def identity_at_zero(cls, values: Tensor, *, bound: float) -> Lower:
        """A factor from `(d (d + 1) / 2, *batch)`: log diagonals, clamped to ± `bound`, then the rest by column."""
        dim = (math.isqrt(8 * len(values) + 1) - 1) // 2
        diagonal = values[:dim].clamp(-bound, bound).exp()
        below = values[dim:].split(list(range(dim - 1, -1, -1)))
        return cls([torch.cat([d.unsqueeze(0), b]) for d, b in zip(diagonal, below, strict=True)])

    def log_det(self) -> Tensor:
        """The log determinant, `(*batch)`."""
        return torch.stack([column[0] for column in self.columns]).log().sum(0)

    def solve(self, right: Tensor) -> Tensor:
        """L⁻¹ r for r `(d, *batch)`."""
        solved = []
        for column in self.columns:
            x = right[0] / column[0]
            solved.append(x)
            right = right[1:] - column[1:] * x if len(column) > 1 else right
        return torch.stack(solved)

    def solve_transposed(self, right: Tensor) -> Tensor:
        """L⁻ᵀ r for r `(d, *batch)`."""
        solved: list[Tensor] = []
        for row, column in zip(right.unbind()[::-1], self.columns[::-1], strict=True):
            if solved:
                row = row - (column[1:] * torch.stack(solved)).sum(0)
            solved.insert(0, row / column[0])
        return torch.stack(solved)

    def transposed_times(self, right: Tensor) -> Tensor:
        """Lᵀ r for r `(d, *batch)`."""
        return torch.stack([(column * right[j:]).sum(0) for j, column in enumerate(self.columns)])

    def dense(self) -> Tensor:
        """The matrices `(*batch, d, d)`."""
        dim = len(self.columns)
        rows = [torch.nn.functional.pad(c.movedim(0, -1), (dim - len(c), 0)) for c in self.columns]
        return torch.stack(rows, -1)


@dataclass
class NaturalTasks(Pushed):
    """Gaussians of S × T task posteriors with precision (L B)(L B)ᵀ and mean L⁻ᵀ h + s, component first.

    Attributes:
        half: h `(d, S, T)`.
        shift: s `(d, S, T)`.
        lower: L.
        bend: B.
    """

    half: Tensor
    shift: Tensor
    lower: Lower
    bend: Lower

    @property
    def loc(self) -> Tensor:
        """Means `(S, T, d)`."""
        return (self.lower.solve_transposed(self.half) + self.shift).movedim(0, -1)

    @property
    def factor(self) -> Tensor:
        """Lower Cholesky factors of the precisions `(S, T, d, d)`."""
        return self.lower.dense() @ self.bend.dense()

    @property
    def example(self) -> Tensor:
        """Of a draw's shape, component last but stored first."""
        return self.half.movedim(0, -1)

    def push(self, white: Tensor) -> Tensor:
        """L⁻ᵀ (h + B⁻ᵀ ε) + s."""
        bent = self.half + self.bend.solve_transposed(white.movedim(-1, 0))
        return (self.lower.solve_transposed(bent) + self.shift).movedim(0, -1).contiguous()

    def whiten(self, noise: Tensor) -> Tensor:
        """Bᵀ (Lᵀ (z − s) − h) `(d, S, T)`, the inverse of `push`."""
        centred = noise.movedim(-1, 0) - self.shift
        return self.bend.transposed_times(self.lower.transposed_times(centred) - self.half)

    def log_det(self) -> Tensor:
        """Log |L| + log |B|, `(S, T)`."""
        return self.lower.log_det() + self.bend.log_det()

    def pull(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The squares of `whiten` summed, and `log_det`."""
        return self.whiten(noise).square().sum(0), self.log_det()


@dataclass
class SkewedTasks(Pushed):
    """Gaussians of S × T task posteriors whose standard noise is skewed, coordinate by coordinate: sinh(arsinh ε + s).

    The tails stay normal, e^s times as wide on one side and e^-s times on the other.

    Attributes:
        base: The Gaussians.
        skew: s `(d, S, T)`, 0 for none.

    References:
        Jones, Pewsey: Sinh-arcsinh Distributions, 2009, https://doi.org/10.1093/biomet/asp053
    """

    base: NaturalTasks
    skew: Tensor

    @property
    def example(self) -> Tensor:
        """Of a draw's shape."""
        return self.base.example

    def push(self, white: Tensor) -> Tensor:
        """The Gaussian's draw of the skewed noise."""
        return self.base.push(torch.sinh(torch.asinh(white.movedim(-1, 0)) + self.skew).movedim(0, -1))

    def pull(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The squares of the standard noise summed, and the log determinant."""
        skewed = self.base.whiten(noise)
        white = torch.sinh(torch.asinh(skewed) - self.skew)
        slope = 0.5 * (white.square().log1p() - skewed.square().log1p())
        return white.square().sum(0), self.base.log_det() + slope.sum(0)
