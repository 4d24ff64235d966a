"""Posteriors of the shared parameters θ in unconstrained, prior-scaled coordinates: full normal, low rank, a point."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.gaussian import heavy_scale, normal_log_prob, student_t_log_prob
from bayesmeta.inference.protocols import SharedPosterior

WIDE = 1.5
"""How much wider than q the importance proposal for θ is."""
INITIAL_SD = 0.1
"""Of q(θ), in units of the prior's sd."""
INITIAL_SD_LOG = math.log(INITIAL_SD)


class NormalShared(SharedPosterior):
    """q(θ) = N(c + s·m, s L Lᵀ s) with full L; c and s are the prior's location and scale.

    Args:
        loc: Prior location `(d,)` in unconstrained coordinates, the start.
        scale: Prior scale `(d,)`, the unit of every parameter.
    """

    origin: Tensor
    unit: Tensor
    identity: Tensor
    below: Tensor

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("origin", loc.clone())
        self.register_buffer("unit", scale.clone())
        identity = torch.eye(len(loc), dtype=loc.dtype)
        self.register_buffer("identity", identity, persistent=False)
        self.register_buffer("below", torch.ones_like(identity).tril(-1), persistent=False)
        self.mean = nn.Parameter(torch.zeros_like(loc))
        self.log_diagonal = nn.Parameter(torch.full_like(loc, INITIAL_SD).log())
        self.lower = nn.Parameter(torch.zeros(len(loc), len(loc), dtype=loc.dtype))

    def recentre(self) -> None:
        """Moves origin and unit to the present q, so that an optimiser's steps are in units of the posterior."""
        loc, sd = self.centre()
        with torch.no_grad():
            relative = sd / self.unit
            self.log_diagonal.add_(INITIAL_SD_LOG - relative.log())
            self.origin.copy_(loc)
            self.unit.copy_(sd / INITIAL_SD)
            self.mean.zero_()

    def factor(self) -> Tensor:
        """The Cholesky factor L `(d, d)` in prior units: rows scaled by the sds, so that `lower` has no unit."""
        return torch.addcmul(self.identity, self.lower, self.below) * self.log_diagonal.exp().unsqueeze(-1)

    def sample(self, count: int, *, wide: bool = False) -> Tensor:
        """Reparametrised draws `(count, d)`."""
        noise = torch.randn(count, len(self.mean), dtype=self.mean.dtype)
        if wide:
            noise = WIDE * noise * heavy_scale((count, 1), noise)
        return self.origin + self.unit * (self.mean + noise @ self.factor().mT)

    def log_prob(self, theta: Tensor, *, wide: bool = False) -> Tensor:
        """Log density `(S,)`, parameters held fixed."""
        with torch.no_grad():
            loc = self.origin + self.unit * self.mean
            factor = WIDE * self.factor() if wide else self.factor()
            inverse = torch.linalg.solve_triangular(factor, self.unit.reciprocal().diag(), upper=False)
            log_det = inverse.diagonal().log().sum()
        white = (theta - loc) @ inverse.mT
        density = student_t_log_prob if wide else normal_log_prob
        return density(white.square().sum(-1), log_det, theta.shape[-1])

    def centre(self) -> tuple[Tensor, Tensor]:
        """Mean and marginal sd `(d,)`, detached."""
        factor = self.factor().detach()
        return self.origin + self.unit * self.mean.detach(), self.unit * factor.square().sum(-1).sqrt()


class LowRankShared(NormalShared):
    """q(θ) with covariance D + VVᵀ of rank `rank`, for many shared parameters."""

    def __init__(self, loc: Tensor, scale: Tensor, *, rank: int = 10) -> None:
        super().__init__(loc, scale)
        self.lower = nn.Parameter(0.01 * torch.randn(len(loc), min(rank, len(loc)), dtype=loc.dtype))

    def factor(self) -> Tensor:
        """The Cholesky factor of D + VVᵀ in prior units."""
        diagonal = self.log_diagonal.exp()
        rank = diagonal.unsqueeze(-1) * self.lower
        return torch.linalg.cholesky(diagonal.square().diag() + rank @ rank.mT)

    def sample(self, count: int, *, wide: bool = False) -> Tensor:
        """Reparametrised draws `(count, d)`."""
        diagonal = self.log_diagonal.exp()
        noise = torch.randn(count, len(diagonal), dtype=diagonal.dtype)
        ranks = torch.randn(count, self.lower.shape[1], dtype=diagonal.dtype)
        joint = diagonal * (noise + ranks @ self.lower.mT)
        if wide:
            joint = WIDE * joint * heavy_scale((count, 1), noise)
        return self.origin + self.unit * (self.mean + joint)


class PointShared(SharedPosterior):
    """A point estimate of θ, in prior-scaled coordinates."""

    origin: Tensor
    unit: Tensor

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("origin", loc.clone())
        self.register_buffer("unit", scale.clone())
        self.mean = nn.Parameter(torch.zeros_like(loc))

    def sample(self, count: int, *, wide: bool = False) -> Tensor:
        """The point, `count` times: `(count, d)`."""
        return (self.origin + self.unit * self.mean).expand(count, -1)

    def log_prob(self, theta: Tensor, *, wide: bool = False) -> Tensor:
        """Zero: a point has no density."""
        return theta.new_zeros(theta.shape[0])

    def centre(self) -> tuple[Tensor, Tensor]:
        """The point and the prior's scale `(d,)`."""
        return self.sample(1)[0].detach(), self.unit


class PriorShared(SharedPosterior):
    """θ's own prior in place of a posterior, by simulation: what is known of θ before any data. Nothing is learned.

    Args:
        density: The model; its shared sites have proper priors.

    Raises:
        ValueError: A shared site has an improper prior.
    """

    def __init__(self, density: TaskDensity, *, pool: int = 4096) -> None:
        super().__init__()
        self._density = density
        drawn = density.draw_theta(pool)
        self._loc, self._scale = drawn.median(0).values, _spread(drawn)

    def sample(self, count: int, *, wide: bool = False) -> Tensor:
        """Draws of the prior `(count, d)`."""
        return self._density.draw_theta(count)

    def log_prob(self, theta: Tensor, *, wide: bool = False) -> Tensor:
        """Log prior `(S,)` with its Jacobian."""
        return self._density.log_prior(theta)

    def centre(self) -> tuple[Tensor, Tensor]:
        """Median and a robust scale of simulated draws `(d,)`."""
        return self._loc, self._scale


def _spread(drawn: Tensor) -> Tensor:
    """Half the distance between the quantiles of a normal's ± sd; heavy tails do not move it."""
    low, high = drawn.quantile(torch.tensor([0.16, 0.84], dtype=drawn.dtype), 0)
    return (high - low) / 2
