"""The exchangeable Gaussian prior, the dial between independent tasks and one fit of all: φ_i ~ N(θ, S).

The scale of each block is learned (`tau`): τ → 0 is hard sharing, τ → ∞ no sharing. With θ integrated out the tasks'
covariance is s² I + κ² 11ᵀ, that of regularised multi-task learning; the sum of squared distances between all pairs of
tasks is its log density for flat θ. A full covariance is the matrix-normal prior with a covariance of the features.

References:
    Evgeniou, Pontil: Regularized multi-task learning, 2004, https://doi.org/10.1145/1014052.1014067
    Zhang, Yang: A Survey on Multi-Task Learning, 2021, https://arxiv.org/abs/1707.08114
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

import bayesmeta as bm
from bayesmeta.models.sharing.blocks import Sharing, positive

HARD = 1e-12
"""The sd of hard sharing: tasks are alike to numerical precision, and still have parameters."""


@dataclass(frozen=True)
class Gaussian(Sharing):
    """φ_i ~ N(centre, diag(τ) R diag(τ)).

    Args:
        scale: None to learn τ, the shared site `tau`; or a number ≥ 0 for all of φ: 0 is hard sharing, a large one
            makes the tasks independent. A noise of each task's own keeps its learned τ.
        by: One τ a "block", or one a "coordinate" of φ.
        cov: "diag", or "full" to learn the correlations R of φ, the shared site `corr` (a Cholesky factor).
        spread: For by="coordinate": pool the scales too. log τ of a coordinate ~ N(log τ of its block, spread²), the
            shared sites `tau`, one a block, and `log_ratio`, one a coordinate. 0.5 suits many coordinates that differ
            by factors; None: each coordinate's τ is learned from itself alone.
    """

    scale: float | None = None
    by: Literal["block", "coordinate"] = "block"
    cov: Literal["diag", "full"] = "diag"
    spread: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_scale()
        if self.by not in ("block", "coordinate"):
            raise ValueError(f'Gaussian: expected by="block" or by="coordinate", got {self.by!r}')
        if self.cov not in ("diag", "full"):
            raise ValueError(f'Gaussian: expected cov="diag" or cov="full", got {self.cov!r}')
        if self.cov == "full":
            self._refuse_correlations()
        if self.spread is not None:
            positive(self, spread=self.spread)
            if self.by != "coordinate" or self.scale is not None:
                raise ValueError(
                    'Gaussian: spread pools learned scales; expected by="coordinate" and scale=None with it'
                )

    def _check_scale(self) -> None:
        if self.scale is not None and not (isinstance(self.scale, int | float) and 0 <= self.scale < math.inf):
            raise ValueError(f"Gaussian: expected scale as None or a finite number ≥ 0, got {self.scale!r}")

    def _refuse_correlations(self) -> None:
        if self.scale == 0:
            raise ValueError('Gaussian: scale=0 is hard sharing, which has no correlations; use cov="diag"')
        if self.blocks.d == 1:
            raise ValueError('Gaussian: one task parameter has no correlations; use cov="diag"')

    @property
    def shared(self) -> dict[str, Distribution]:
        """`mu`, `tau` and `corr`, as far as they are learned."""
        sites = self.centres()
        if self.scale is None:
            apart = self.by == "coordinate" and self.spread is None
            sites |= self.scales(self.d if apart else len(self.blocks.all))
        elif self._free:
            sites |= self.scales(len(self._free))
        if self.spread is not None:
            sites["log_ratio"] = dist.Normal(torch.zeros(self.d), self.spread).to_event(1)
        if self.cov == "full":
            sites["corr"] = dist.LKJCholesky(self.d, torch.tensor(1.0))
        return sites

    def distribution(self, shared: Mapping[str, Tensor], batch: bm.Batch) -> Distribution:
        """Normal or multivariate normal."""
        centre, tau = self.blocks.centre(shared), self.tau(shared)
        if self.cov == "full":
            return dist.MultivariateNormal(centre, scale_tril=tau.unsqueeze(-1) * shared["corr"])
        return dist.Normal(centre, tau).to_event(1)

    def tau(self, shared: Mapping[str, Tensor]) -> Tensor:
        """Prior sd of each number of φ `(d,)`."""
        if self.scale is not None:
            return self._fixed(max(float(self.scale), HARD), shared)
        scales = self.learned_scales(shared)
        return scales[self.blocks.index] if self.by == "block" else scales

    def _fixed(self, scale: float, shared: Mapping[str, Tensor]) -> Tensor:
        """One sd for all numbers but those whose scale is free."""
        places = {name: i for i, name in enumerate(self._free)}
        parts = [
            shared["tau"][places[b.name]].expand(b.size) if b.free else torch.full((b.size,), scale)
            for b in self.blocks.all
        ]
        return torch.cat(parts)

    @property
    def _free(self) -> list[str]:
        return [block.name for block in self.blocks.all if block.free]

    @property
    def scaled(self) -> list[str]:
        """Blocks or coordinates; where the scale is fixed, the blocks whose own is free."""
        if self.scale is not None:
            return self._free
        return super().scaled if self.by == "block" else self.blocks.names

    def learned_scales(self, shared: Mapping[str, Tensor]) -> Tensor:
        """τ of each block or coordinate `(…, k)`."""
        if self.spread is None:
            return shared["tau"]
        return shared["tau"][..., self.blocks.index] * shared["log_ratio"].exp()

    def variance(self, shared: Mapping[str, Tensor]) -> Tensor:
        """τ²."""
        return self.tau(shared).square()
