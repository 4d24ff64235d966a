from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from bayesmeta.hierarchy.simplify import LARGEST_CONSTANT, simplify

X = torch.tensor([[0.5], [1.25], [3.0]], dtype=torch.float64)
WIDE = torch.linspace(0.1, 2.0, 12, dtype=torch.float64).reshape(3, 4)


def calls(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "call_function"]


def largest(graph: fx.GraphModule, name: str) -> int:
    """Numbers that the operations of this name compute."""
    named = [node for node in calls(graph) if node.target.__name__.split(".")[0] == name]  # type: ignore[union-attr]
    return max((node.meta["val"].numel() for node in named), default=0)


def folded(graph: fx.GraphModule) -> list[Tensor]:
    held = [getattr(graph, str(node.target)) for node in graph.graph.nodes if node.op == "get_attr"]
    return [value for value in held if isinstance(value, Tensor)]


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda x: x.detach().clone().reshape(x.shape) * 2.0, 1),
        (lambda x: x.squeeze((1,)).unsqueeze(1) * 2.0, 1),
        (lambda x: (x + 0.0 - 0) * 1.0 / 1 * 2.0, 1),
        (lambda x: (x * torch.ones(3, 1, dtype=torch.float64) + torch.zeros(1, dtype=torch.float64)) * 2.0, 1),
        (lambda x: torch.ones(3, 1, dtype=torch.float64) * (torch.zeros(1, dtype=torch.float64) + x) * 2.0, 1),
        (lambda x: torch.cat([x]) * 2.0, 1),
        (lambda x: x.sum(1, keepdim=True) * 2.0, 1),
        (lambda x: x.sum(1) * 2.0, 2),
        (lambda x: torch.stack([x]) * 2.0, 2),
        (lambda x: torch.stack([x], -1) * 2.0, 2),
        (lambda x: x.exp() * x.exp(), 2),
        (lambda x: x**0.0 * x * 2.0, 1),
        (lambda x: x * torch.arange(3, dtype=torch.float64).exp().log1p()[:, None], 1),
    ],
)
def test_what_changes_nothing_goes_away(function: Callable[[Tensor], Tensor], left: int) -> None:
    graph = make_fx(function)(X)
    assert simplify(graph) is graph
    assert len(calls(graph)) == left
    for x in (X, X + 1.0):
        torch.testing.assert_close(graph(x), function(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + 1.0,
        lambda x: 0.0 - x,
        lambda x: torch.zeros(3, 1, dtype=torch.float64) - x,
        lambda x: torch.ones(3, 1, dtype=torch.float64) / x,
        lambda x: 1.0 / x,
        lambda x: x.sum(0),
        lambda x: x.sum((0, 1)),
        lambda x: torch.cat([x, x]),
        lambda x: x.to(torch.float32) * 1.0,
        lambda x: x * torch.ones(3, 4, dtype=torch.float64),
        lambda x: x.int().sum(1),
        lambda x: x.int() + 1 + 2,
        lambda x: x - 1.0 - 2.0,
        lambda x: (x + 1.0).exp().log() - 3.0,
        lambda x: -(x.expand(3, 4)) * x.expand(3, 4),
        lambda x: (-x.expand(3, 4)).sum(1),
        lambda x: x.transpose(0, 1),
    ],
)
def test_what_changes_something_stays(function: Callable[[Tensor], Tensor]) -> None:
    graph = simplify(make_fx(function)(X))
    result, expected = graph(X + 1.0), function(X + 1.0)
    assert len(calls(graph)) >= 1 and result.shape == expected.shape and result.dtype == expected.dtype
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda s, y: y * s.expand(3, 4).log(), "log"),
        (lambda s, y: y + s.expand(3, 4) ** 2, "pow"),
        (lambda s, y: y + s.expand(3, 4).div(3.0).exp(), "exp"),
        (lambda s, y: y / s.expand(3, 4), "reciprocal"),
    ],
)
def test_pointwise_work_comes_before_the_expansion(function: Callable[[Tensor, Tensor], Tensor], name: str) -> None:
    graph = simplify(make_fx(function)(X, WIDE))
    assert largest(graph, name) == 3
    torch.testing.assert_close(graph(X + 0.5, WIDE), function(X + 0.5, WIDE))


def test_gradients_are_the_same() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return (
            torch.distributions.Normal(x.expand(3, 4), x.exp().expand(3, 4), validate_args=False)
            .log_prob(y)
            .sum(1)
            .sum()
        )

    before, after = make_fx(function)(X, WIDE), simplify(make_fx(function)(X, WIDE))
    assert largest(before, "log") == 12 and largest(after, "log") <= 3
    expected, got = (torch.autograd.functional.jacobian(graph, (X + 0.3, WIDE)) for graph in (before, after))
    torch.testing.assert_close(got, expected)


def test_random_numbers_and_writes_are_left_alone() -> None:
    def draws(x: Tensor) -> Tensor:
        return torch.randn(3, 1) + torch.randn(3, 1) + x * 1.0

    def writes(x: Tensor) -> Tensor:
        total = torch.zeros(3, 1, dtype=torch.float64)
        total.add_(x)
        total.add_(x)
        return total

    graph = simplify(make_fx(draws)(X))
    torch.manual_seed(0)
    got = graph(X)
    torch.manual_seed(0)
    assert torch.equal(got, draws(X)) and not torch.equal(graph(X), got)
    written = simplify(make_fx(writes)(X))
    for _ in range(2):
        torch.testing.assert_close(written(X), 2 * X)


def test_large_constants_are_computed_in_the_graph() -> None:
    def function(rows: int) -> Callable[[Tensor], Tensor]:
        return lambda x: x + torch.arange(rows, dtype=torch.float64).exp().sin()

    most = LARGEST_CONSTANT // 8
    for rows, kept in ((most, 1), (most + 1, 0)):
        graph = simplify(make_fx(function(rows))(X[0]))
        assert sum(value.numel() == rows for value in folded(graph)) == kept
        torch.testing.assert_close(graph(X[0]), function(rows)(X[0]), equal_nan=True)


def test_parameters_are_no_constants() -> None:
    module: Any = nn.Linear(1, 2, dtype=torch.float64)
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.get_attr("weight")
    x.meta["val"], weight.meta["val"] = X, module.weight
    root = nn.Module()
    root.weight = module.weight
    doubled = graph.call_function(torch.ops.aten.mul.Tensor, (weight, 2.0))
    doubled.meta["val"] = module.weight.detach() * 2.0
    graph.output(graph.call_function(torch.ops.aten.mul.Tensor, (x, doubled)))
    simplified = simplify(fx.GraphModule(root, graph))
    with torch.no_grad():
        module.weight.fill_(3.0)
        torch.testing.assert_close(simplified(X[:1]), torch.full((2, 1), 3.0, dtype=torch.float64))


def test_a_square_tensor_is_still_transposed() -> None:
    """Its shape does not tell: Newton's steps of three parameters for three tasks were NaN."""
    square = torch.arange(9.0).reshape(3, 3)
    graph = simplify(make_fx(lambda x: x.permute(1, 0) + 2.0 * x.permute(0, 1))(square))
    torch.testing.assert_close(graph(square), square.mT + 2.0 * square)
    assert len(calls(graph)) == 3
