"""Task covariances: φ_i = centre + Σ_k a_ik f_k + s ε_i, with shared factors f_k and loadings a_i of each task.

Over tasks φ has covariance A Aᵀ + s² I, as in the tensor-normal prior of deep relation networks and the linear model of
coregionalisation; given the factors tasks are independent, so that a new task infers its loadings. They are N(0, I) and
integrated out: φ_i ~ N(centre, FᵀF + s² I), and a_i given φ_i is normal in closed form (`loadings`).

Deviation from the paper: low rank plus a diagonal in place of a full task covariance, which would say nothing about a
task not yet seen. F is known up to a rotation, which changes neither covariances nor predictions.

References:
    Long, Cao, Wang, Yu: Learning Multiple Tasks with Multilinear Relationship Networks, 2017,
    https://arxiv.org/abs/1506.02117
    Bonilla, Chai, Williams: Multi-task Gaussian Process Prediction, 2007
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

import bayesmeta as bm
from bayesmeta.models.sharing.blocks import Sharing, correlation, off_centre, whole


@dataclass(frozen=True)
class Factors(Sharing):
    """φ_i ~ N(centre, FᵀF + diag(τ²)), τ one a block.

    Shared sites: `mu`, `tau` and `factors` F (rank, d) ~ Normal(0, `sd_scale`), but for a fixed .2 sds or so, which
    tells signs apart.

    Args:
        rank: Number of factors.
    """

    rank: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self, rank=self.rank)

    @property
    def shared(self) -> dict[str, Distribution]:
        """`mu`, `tau` and `factors`."""
        factors = dist.Normal(self.sd_scale * off_centre(self.rank, self.d), self.sd_scale).to_event(2)
        return {**self.centres(), **self.scales(len(self.blocks.all)), "factors": factors}

    def distribution(self, shared: Mapping[str, Tensor], batch: bm.Batch) -> Distribution:
        """Multivariate normal, loadings integrated out."""
        factors, tau = shared["factors"], shared["tau"][self.blocks.index]
        covariance = factors.mT @ factors + torch.diag(tau**2)
        return dist.MultivariateNormal(self.blocks.centre(shared), scale_tril=torch.linalg.cholesky(covariance))

    def variance(self, shared: Mapping[str, Tensor]) -> Tensor:
        """diag(FᵀF) + τ²."""
        return shared["factors"].square().sum(0) + shared["tau"][self.blocks.index].square()

    def similarity(self, phi: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        """Correlation of what the factors say of tasks, A F; see the base class."""
        drawn = []
        for s, draw in enumerate(phi):
            mean, covariance = self.loadings(draw, one := {name: values[s] for name, values in shared.items()})
            noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(s), dtype=mean.dtype)
            loadings = mean + noise @ torch.linalg.cholesky(covariance).mT
            drawn.append(loadings @ one["factors"])
        return correlation(torch.stack(drawn))

    def loadings(self, phi: Tensor, shared: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What φ says of the loadings.

        Args:
            phi: `(…, d)`.
            shared: Values of the shared sites.

        Returns:
            Their mean `(…, rank)` and covariance `(rank, rank)`, a_i given φ_i.
        """
        precise = shared["factors"] / shared["tau"][self.blocks.index] ** 2
        covariance = torch.linalg.inv(torch.eye(self.rank, dtype=phi.dtype) + precise @ shared["factors"].mT)
        return (phi - self.blocks.centre(shared)) @ precise.mT @ covariance, covariance
