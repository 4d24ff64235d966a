"""Attention to a context: masked, fused, and defined for an empty one by a learned row that is always there."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention of queries `(T, M, width)` to keys and values `(T, N, width)`: `(T, M, width)`.

    Args:
        width: Numbers in each of them; `heads` must divide it.
        heads: Number of heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"attention: expected a width that {heads} heads divide, got {width}; change one of them")
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Attends to rows: `mask` `(T, 1, 1, N)` says which, or `(T, heads, M, N)` is added to what they score."""
        parts = ((self.query, queries), (self.key, keys), (self.value, values))
        q, k, v = (layer(rows).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer, rows in parts)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        result: Tensor = self.out(seen.transpose(1, 2).flatten(2))
        return result


class Nearness(nn.Module):
    """What distance costs each head: -Σ_d a_hd (x_d - x'_d)², from heads that see far to heads that see near.

    Args:
        dx: Numbers of an input, in standard units.
        heads: Number of heads; before training 1 / √(2 a) is 3 for the first and .06 for the last.
    """

    def __init__(self, dx: int, heads: int) -> None:
        super().__init__()
        self.log_rate = nn.Parameter(torch.linspace(-3, 5, heads).unsqueeze(1).repeat(1, dx))

    def forward(self, squares: Tensor) -> Tensor:
        """Squared differences `(T, M, N, dx)` -> `(T, heads, M, N)`."""
        return -torch.einsum("tmnd,hd->thmn", squares, self.log_rate.exp())


class Null(nn.Module):
    """A learned row before all others, so that there is something to attend to where a context is empty."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.randn(width) / math.sqrt(width))

    def forward(self, rows: Tensor) -> Tensor:
        """Rows `(T, N, width)` -> `(T, 1 + N, width)`."""
        return torch.cat([self.row.expand(len(rows), 1, -1), rows], 1)

    @staticmethod
    def kept(kept: Tensor) -> Tensor:
        """Which rows may be attended to, bool `(T, N)` -> `(T, 1, 1, 1 + N)`."""
        return nn.functional.pad(kept, (1, 0), value=True)[:, None, None]
