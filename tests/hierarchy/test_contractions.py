from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from bayesmeta.hierarchy.contractions import contract
from bayesmeta.hierarchy.simplify import simplify

DRAWS, TASKS, ROWS, INPUTS = 3, 8, 16, 40
X = torch.randn(TASKS, ROWS, INPUTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
B = torch.randn(DRAWS, TASKS, 1, INPUTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def recorded(function: Callable[[Tensor, Tensor], Tensor], b: Tensor = B, x: Tensor = X) -> fx.GraphModule:
    return contract(simplify(make_fx(function)(b, x)))


def products(graph: fx.GraphModule) -> int:
    return sum(node.target is torch.einsum for node in graph.graph.nodes)


@pytest.mark.parametrize(
    "function",
    [
        lambda b, x: (x * b).sum(-1),
        lambda b, x: (b * x).sum(-1, keepdim=True),
        lambda b, x: (x.expand(DRAWS, -1, -1, -1) * b).sum((2, 3)),
        lambda b, x: (b.squeeze(2).unsqueeze(2) * x).sum((1, 3)).exp(),
    ],
)
def test_a_sum_of_repeated_factors_is_a_matrix_product(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    graph = recorded(function)
    assert products(graph) == 1
    for step in (0.0, 0.7):
        torch.testing.assert_close(graph(B + step, X - step), function(B + step, X - step))


def test_a_matrix_and_one_vector_a_task() -> None:
    graph = recorded(lambda b, x: (x * b).sum(-1), B[0])
    assert products(graph) == 1
    torch.testing.assert_close(graph(B[0], X), (X * B[0]).sum(-1))


@pytest.mark.parametrize(
    ("why", "function"),
    [
        ("nothing is repeated", lambda b, x: (x * x.exp()).sum(-1)),
        ("nothing that both have is summed", lambda b, x: (x * b).sum(0)),
        ("the product is used twice", lambda b, x: (x * b).sum(-1) + (x * b)[..., 0]),
        ("the product is small", lambda b, x: (x[:1, :2] * b[:1, :1]).sum(-1)),
        ("the product is repeated, not a factor", lambda b, x: (x * b).expand(2, -1, -1, -1, -1).sum(-1)),
        ("it is no product", lambda b, x: (x + b).sum(-1)),
    ],
)
def test_other_sums_stay(why: str, function: Callable[[Tensor, Tensor], Tensor]) -> None:
    graph = recorded(function)
    assert products(graph) == 0, why
    torch.testing.assert_close(graph(B, X), function(B, X))


def test_a_constant_that_is_repeated_is_a_factor_without_repetitions() -> None:
    """Columns of a Jacobian: unit vectors, the same for all draws, times data that all draws share too."""
    units = torch.eye(INPUTS, dtype=torch.float64).reshape(INPUTS, 1, 1, 1, INPUTS)
    units = units.expand(INPUTS, DRAWS, TASKS, ROWS, INPUTS)
    graph = recorded(lambda b, x: (units * x).sum(-1) + b.sum(-1))
    (product,) = [node for node in graph.graph.nodes if node.target is torch.einsum]
    assert max(node.meta["val"].numel() for node in product.all_input_nodes) == X.numel()
    torch.testing.assert_close(graph(B, X), X.movedim(-1, 0).unsqueeze(1) + B.sum(-1))


def test_whole_numbers_stay() -> None:
    graph = recorded(lambda b, x: (x * b).sum(-1), B.long(), X.long())
    assert products(graph) == 0
