"""Tasks of which some are unlike all others: φ_i ~ (1 − ε) p(φ | inner prior) + ε N(centre, wide).

Without the second part one odd task widens the scales of all; with it the odd ones pay for themselves. A task's
posterior may have two modes; the ladder finds them or says so. θ has several as well (all tasks follow, scales being
wide, or some are odd): `bm.Marginal(starts=12)` looks for the highest from several places.

References:
    Tukey: A Survey of Sampling from Contaminated Distributions, 1960
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

import bayesmeta as bm
from bayesmeta.models.sharing.blocks import Blocks, Sharing
from bayesmeta.models.sharing.clusters import Clusters
from bayesmeta.models.sharing.factors import Factors
from bayesmeta.models.sharing.gaussian import Gaussian


@dataclass(frozen=True)
class Contaminated(Sharing):
    """Another sharing prior, and a share of tasks that do not follow it.

    Shared sites: those of the inner prior; `odd`, the share ~ Beta(1, 1); `wide`, one a block, how much wider their sds
    are: variance of the inner prior + wide², wide ~ HalfNormal(`sd_scale`).

    Args:
        inner: The prior of the others: Gaussian, Factors or Clusters.
    """

    inner: Sharing = dataclasses.field(default_factory=Factors)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.inner, Gaussian | Factors | Clusters):
            raise ValueError(
                f"Contaminated: expected Gaussian, Factors or Clusters of bm.models.sharing inside, got {self.inner!r}"
            )
        if isinstance(self.inner, Gaussian) and self.inner.scale == 0:
            raise ValueError("Contaminated: expected tasks that differ inside, got hard sharing; use a small scale")
        if self.loc_scale not in (Sharing.loc_scale, self.inner.loc_scale):
            raise ValueError(
                f"Contaminated: expected loc_scale of the inner prior, got {self.loc_scale}; give it there"
            )

    def over(self, blocks: Blocks) -> Self:
        """Returns both parts over some blocks."""
        return dataclasses.replace(self, blocks=blocks, inner=self.inner.over(blocks))

    @property
    def shared(self) -> dict[str, Distribution]:
        """Those of the inner prior, `odd` and `wide`."""
        wide = dist.HalfNormal(torch.full((len(self.blocks.all),), self.sd_scale)).to_event(1)
        return {**self.inner.shared, "odd": dist.Beta(1.0, 1.0), "wide": wide}

    def distribution(self, shared: Mapping[str, Tensor], batch: bm.Batch) -> Distribution:
        """The mixture."""
        weights, loc, factor = self._parts(shared, batch)
        return dist.MixtureSameFamily(dist.Categorical(weights), dist.MultivariateNormal(loc, scale_tril=factor))

    def variance(self, shared: Mapping[str, Tensor]) -> Tensor:
        """Of the mixture."""
        weights, loc, factor = self._parts(shared, None)
        mean = weights @ loc
        return weights @ (factor.square().sum(-1) + (loc - mean).square())

    def learned_scales(self, shared: Mapping[str, Tensor]) -> Tensor:
        """Those of the inner prior."""
        return self.inner.learned_scales(shared)

    @property
    def scaled(self) -> list[str]:
        """Those of the inner prior."""
        return self.inner.scaled

    def similarity(self, phi: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        """That of the inner prior, times the probabilities that both tasks follow it `(T, T)`."""
        follows = torch.zeros(phi.shape[1], dtype=phi.dtype)
        for s, draw in enumerate(phi):
            follows += self.following(draw, {name: values[s] for name, values in shared.items()}) / len(phi)
        return (self.inner.similarity(phi, shared) * follows * follows.unsqueeze(-1)).fill_diagonal_(1.0)

    def following(self, phi: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        """Probability that a task with parameters φ `(…, d)` follows the inner prior, `(…)`."""
        weights, loc, factor = self._parts(shared, None)
        each = dist.MultivariateNormal(loc, scale_tril=factor).log_prob(phi.unsqueeze(-2))
        return 1 - torch.softmax(each + weights.log(), -1)[..., -1]

    def _parts(self, shared: Mapping[str, Tensor], batch: bm.Batch | None) -> tuple[Tensor, Tensor, Tensor]:
        """Weights `(K,)`, means `(K, d)` and triangular factors `(K, d, d)`; the last is that of the odd tasks."""
        weights, loc, factor = _normals(self.inner.distribution(shared, batch))  # type: ignore[arg-type]
        sd = (self.inner.variance(shared) + shared["wide"][self.blocks.index].square()).sqrt()
        odd = shared["odd"].unsqueeze(-1)
        return (
            torch.cat([(1 - odd) * weights, odd]),
            torch.cat([loc, self.blocks.centre(shared).expand(1, -1)]),
            torch.cat([factor, torch.diag(sd).unsqueeze(0)]),
        )


def _normals(prior: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, means and triangular factors of a mixture of normals, or of one normal."""
    if isinstance(prior, torch.distributions.MixtureSameFamily):
        _, loc, factor = _normals(prior.component_distribution)
        return prior.mixture_distribution.probs, loc, factor
    if isinstance(prior, torch.distributions.MultivariateNormal):
        loc, factor = prior.loc, prior.scale_tril
    else:
        loc, factor = prior.base_dist.loc, torch.diag_embed(prior.base_dist.scale)
    return torch.ones(1), torch.atleast_2d(loc), factor.reshape(-1, *factor.shape[-2:])
