from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from bayesmeta.hierarchy.hoisting import hoist
from bayesmeta.hierarchy.simplify import simplify

THETA = torch.tensor([0.3, -0.2], dtype=torch.float64)
Y = torch.tensor([[0.0, 1.0, 4.0], [2.0, 0.0, 7.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, False], [True, False, True]])


def poisson(theta: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    rate = theta.unsqueeze(-1).exp()
    rows = y * theta.unsqueeze(-1) - rate - torch.lgamma(y + 1.0)
    return torch.where(mask, rows, 0.0).sum(-1), (y > 1).to(y.dtype).sum()


def names(graph: fx.GraphModule) -> list[str]:
    return [getattr(node.target, "__name__", "") for node in graph.graph.nodes if node.op == "call_function"]


def test_what_depends_on_data_alone_is_computed_beforehand() -> None:
    graph = simplify(make_fx(poisson)(THETA, Y, MASK))
    before, after = hoist(graph, 1)
    known = before(Y, MASK)
    assert any("lgamma" in name for name in names(before))
    assert not any("lgamma" in name for name in names(after))
    for theta in (THETA, THETA + 1.0):
        for found, expected in zip(after(theta, *known), poisson(theta, Y, MASK), strict=True):
            torch.testing.assert_close(found, expected)


def test_the_same_graphs_serve_other_data() -> None:
    before, after = hoist(simplify(make_fx(poisson)(THETA, Y, MASK)), 1)
    found = after(THETA, *before(Y + 2.0, ~MASK))
    for one, other in zip(found, poisson(THETA, Y + 2.0, ~MASK), strict=True):
        torch.testing.assert_close(one, other)


def test_views_of_data_are_not_stored() -> None:
    graph = make_fx(lambda theta, y: theta[:, None, None] * y.unsqueeze(0).expand(2, 2, 3))(THETA, Y)
    before, after = hoist(simplify(graph), 1)
    assert [tuple(value.shape) for value in before(Y)] == [(2, 3)]
    torch.testing.assert_close(after(THETA, *before(Y)), THETA[:, None, None] * Y)


def test_constants_stay_and_random_numbers_are_left_alone() -> None:
    held = torch.ones(3, dtype=torch.float64)
    before, after = hoist(simplify(make_fx(lambda theta, y: (y + held).sum() * theta)(THETA, Y)), 1)
    torch.testing.assert_close(after(THETA, *before(Y)), (Y + held).sum() * THETA)
    before, after = hoist(make_fx(lambda theta, y: theta.sum() + y + torch.rand(2, 3))(THETA, Y), 1)
    assert not any("rand" in name for name in names(before))
