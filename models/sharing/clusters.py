"""Clusters of tasks: φ_i ~ Σ_k w_k N(μ_k, diag(τ²)), a mixture prior whose components are shared.

A task's posterior may have several modes; the ladder finds them or says so. The order of the clusters means nothing.
θ has many modes too: `bm.Marginal(starts=12)` looks for the highest from several places.

References:
    Bakker, Heskes: Task Clustering and Gating for Bayesian Multitask Learning, 2003
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

import bayesmeta as bm
from bayesmeta.models.sharing.blocks import Sharing, off_centre, positive, whole


@dataclass(frozen=True)
class Clusters(Sharing):
    """φ_i ~ Σ_k w_k N(centre + shift_k, diag(τ²)), τ one a block.

    Shared sites: `mu`; `tau`; `weights` (count,) ~ Dirichlet(`concentration`); `shifts` (count, d) ~
    Normal(0, `sd_scale`), but for a fixed .2 sds or so, which tells clusters apart.

    Args:
        count: Number of clusters, ≥ 2; those that are not needed get little weight.
        concentration: Of the Dirichlet; 1 makes all weights equally likely.
    """

    count: int = 2
    concentration: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self, count=self.count)
        positive(self, concentration=self.concentration)
        if self.count < 2:
            raise ValueError(f"Clusters: expected count ≥ 2, got {self.count}; one cluster is the Gaussian prior")

    @property
    def shared(self) -> dict[str, Distribution]:
        """`mu`, `tau`, `weights` and `shifts`."""
        return {
            **self.centres(),
            **self.scales(len(self.blocks.all)),
            "weights": dist.Dirichlet(torch.full((self.count,), float(self.concentration))),
            "shifts": dist.Normal(self.sd_scale * off_centre(self.count, self.d), self.sd_scale).to_event(2),
        }

    def distribution(self, shared: Mapping[str, Tensor], batch: bm.Batch) -> Distribution:
        """The mixture."""
        return dist.MixtureSameFamily(dist.Categorical(shared["weights"]), self._components(shared))

    def variance(self, shared: Mapping[str, Tensor]) -> Tensor:
        """τ² and the variance of the clusters' centres."""
        weights, shifts = shared["weights"].unsqueeze(-1), shared["shifts"]
        between = (weights * (shifts - (weights * shifts).sum(0)).square()).sum(0)
        return shared["tau"][self.blocks.index].square() + between

    def similarity(self, phi: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        """Probability that two tasks are of one cluster `(T, T)`; see the base class."""
        found = torch.zeros(phi.shape[1], phi.shape[1], dtype=phi.dtype)
        for s, draw in enumerate(phi):
            member = self.membership(draw, {name: values[s] for name, values in shared.items()})
            found += member @ member.mT / len(phi)
        return found.fill_diagonal_(1.0)

    def membership(self, phi: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        """Probability of each cluster given φ `(…, d)`: `(…, count)`."""
        each = self._components(shared).log_prob(phi.unsqueeze(-2))
        return torch.softmax(each + shared["weights"].log(), -1)

    def _components(self, shared: Mapping[str, Tensor]) -> Distribution:
        centres = self.blocks.centre(shared) + shared["shifts"]
        return dist.Normal(centres, shared["tau"][self.blocks.index]).to_event(1)
