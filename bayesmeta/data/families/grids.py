"""Cells on an interval that crowd where a posterior is, task by task: the nodes of the oracles' integrals."""

from __future__ import annotations

import torch
from torch import Tensor

TEMPER = 0.25
"""Cells follow this power of the posterior density, twice as wide: its tails need nodes too."""
EVERYWHERE = 0.1
"""Share of the cells that is spread evenly."""


def cells(edges: Tensor) -> tuple[Tensor, Tensor]:
    """Middles and widths `(T, K)` of the cells between edges `(T, K + 1)`."""
    return 0.5 * (edges[:, 1:] + edges[:, :-1]), edges.diff(dim=1)


def refined(edges: Tensor, log_mass: Tensor) -> Tensor:
    """Moves the edges of cells so that all get the same share of a posterior, widened.

    Args:
        edges: Where the cells are, from the lower to the upper end, `(T, K + 1)`.
        log_mass: Log posterior mass of each cell `(T, K)`, up to a constant.

    Returns:
        Edges with the same ends.

    References:
        Lepage: A new algorithm for adaptive multidimensional integration, 1978,
        https://doi.org/10.1016/0021-9991(78)90004-9
    """
    width = edges.diff(dim=1)
    tempered = (TEMPER * (log_mass - width.log()) + width.log()).softmax(-1)
    # A peak narrower than a cell may lie across its edge.
    widened = torch.nn.functional.max_pool1d(tempered, 3, stride=1, padding=1)
    share = (1 - EVERYWHERE) * widened / widened.sum(-1, keepdim=True)
    share = share + EVERYWHERE * width / width.sum(-1, keepdim=True)
    below = torch.cat([torch.zeros_like(share[:, :1]), share.cumsum(-1)], -1)
    wanted = torch.linspace(0, 1, edges.shape[1], dtype=torch.float64) * below[:, -1:]
    cell = (torch.searchsorted(below, wanted.contiguous(), right=True) - 1).clamp(0, width.shape[1] - 1)
    within = (wanted - below.gather(1, cell)) / share.gather(1, cell)
    moved = edges.gather(1, cell) + within.clamp(0, 1) * width.gather(1, cell)
    return torch.cat([edges[:, :1], moved[:, 1:-1], edges[:, -1:]], 1)
