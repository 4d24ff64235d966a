"""How a guide depends on θ: standardised with q(θ), then a matrix as a smooth function of it.

Guides are built from these; nothing here knows tasks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bayesmeta.hierarchy.networks import MLP

THETA_BOUND = 3.0
"""Standardised θ is bent towards ± this: networks have seen no θ beyond, and must not extrapolate from it."""


class ThetaStandardiser(nn.Module):
    """θ in units of q(θ), softly bounded: `(S, d)` float64 to float32."""

    loc: Tensor
    scale: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(dim, dtype=torch.float64))

    def follow(self, loc: Tensor, scale: Tensor) -> None:
        """Takes over the location and scale of q(θ)."""
        self.loc.copy_(loc)
        self.scale.copy_(scale)

    def forward(self, theta: Tensor) -> Tensor:
        """Standardises."""
        standard = ((theta - self.loc) / self.scale).float()
        return THETA_BOUND * torch.tanh(standard / THETA_BOUND)


class Loadings(nn.Module):
    """A matrix `(rows, cols)` as a smooth function of θ: a constant plus a perceptron's output."""

    def __init__(self, dim: int, rows: int, cols: int, *, hidden: int, initial_sd: float) -> None:
        super().__init__()
        self.shape = (rows, cols)
        self.constant = nn.Parameter(initial_sd * torch.randn(rows, cols))
        self.net = MLP([dim, hidden, rows * cols], zero=True) if dim else None

    def forward(self, theta: Tensor) -> Tensor:
        """`(S, d_theta)` -> `(S, rows, cols)`."""
        if self.net is None:
            return self.constant.expand(len(theta), *self.shape)
        return self.constant + self.net(theta).reshape(-1, *self.shape)
