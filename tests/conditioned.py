"""What tests of conditionings share: sizes, a trunk, and functions of φ and x evaluated one row at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bayesmeta.models.conditioning.base import Conditioned, Sizes

T, N, D, H, K = 3, 5, 2, 4, 2
SIZES = Sizes(H, K)


def trunk() -> nn.Module:
    return nn.Sequential(nn.Linear(D, H), nn.Tanh())


def drawn(function: Conditioned) -> tuple[Tensor, list[dict[str, Tensor]], Tensor]:
    """Random φ `(T, 1, d)`, for each task its blocks, cut by hand, and x `(T, N, D)`."""
    phi, parts = torch.randn(T, 1, function.blocks.d), []
    for numbers in phi[:, 0]:
        own, start = {}, 0
        for block in function.blocks.all:
            size = int(torch.ones(block.shape).sum())
            own[block.name] = numbers[start : start + size].reshape(block.shape)
            start += size
        assert start == len(numbers)
        parts.append(own)
    return phi, parts, torch.randn(T, N, D)


def check_by_rows(function: Conditioned, one: Callable[[dict[str, Tensor], Tensor], Tensor]) -> None:
    """The function's value is `one(blocks of the task, its row)` `(K,)` for each row."""
    phi, parts, x = drawn(function)
    by_row = [torch.stack([one(own, row) for row in rows]) for own, rows in zip(parts, x, strict=True)]
    found = function(phi, x)
    assert found.shape == (T, N, K)
    torch.testing.assert_close(found, torch.stack(by_row))


def layout(function: Conditioned) -> list[tuple[str, tuple[int, ...], float | None]]:
    """Name, shape and centre of each block."""
    return [(block.name, block.shape, block.centre) for block in function.blocks.all]
