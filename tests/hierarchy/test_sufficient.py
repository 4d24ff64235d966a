from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from bayesmeta.hierarchy.simplify import simplify
from bayesmeta.hierarchy.sufficient import MOST_TERMS, condensed

TASKS, N = 3, 20
torch.manual_seed(0)
PHI = torch.randn(TASKS, 2, dtype=torch.float64)
X = torch.randn(TASKS, N, 2, dtype=torch.float64)
Y = torch.randn(TASKS, N, dtype=torch.float64)
MASK = torch.arange(N) < torch.tensor([[20], [7], [0]])
ZERO = torch.zeros((), dtype=torch.float64)

Function = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def line(phi: Tensor, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    residual = y - (phi[:, :1] + phi[:, 1:] * x[..., 0])
    return torch.where(mask, residual**2, ZERO).sum(-1)


def recorded(function: Function) -> fx.GraphModule:
    return simplify(make_fx(function)(PHI, X, Y, MASK))


def widest(graph: fx.GraphModule) -> int:
    """Most numbers a task in operations that depend on φ."""
    moving = {next(node for node in graph.graph.nodes if node.op == "placeholder")}
    for node in graph.graph.nodes:
        if node.op == "call_function" and moving & set(node.all_input_nodes):
            moving.add(node)
    tensors = [node.meta["val"] for node in moving if isinstance(node.meta.get("val"), Tensor)]
    return max(tensor.numel() for tensor in tensors) // TASKS


@pytest.mark.parametrize(
    ("function", "terms"),
    [
        (line, 3),
        (lambda phi, x, y, mask: ((y - phi[:, :1]) ** 2).sum(-1), 2),
        (lambda phi, x, y, mask: (((x * phi.unsqueeze(1)).sum(-1) - y) ** 2).sum(-1, keepdim=True), 3),
        (lambda phi, x, y, mask: torch.where(mask, (2.0 * phi[:, :1] - phi[:, 1:] - y + 0.5) ** 2, ZERO).sum(1), 2),
        (lambda phi, x, y, mask: ((-(y * phi[:, :1]) - y * phi[:, 1:] + x[..., 1]) ** 2).sum(1), 2),
    ],
)
def test_residuals_that_are_linear_in_data_take_as_many_rows_as_terms(function: Function, terms: int) -> None:
    graph = recorded(function)
    small = condensed(graph, [0])
    assert small is not graph and widest(graph) >= N and widest(small) <= terms**2
    for phi in (PHI, 10 * PHI, PHI - 3.0):
        torch.testing.assert_close(small(phi, X, Y, MASK), graph(phi, X, Y, MASK), rtol=1e-12, atol=1e-12)
    other = X.flip(0), Y - 2.0, MASK.flip(0)
    torch.testing.assert_close(small(PHI, *other), function(PHI, *other))


def test_masked_rows_may_hold_anything() -> None:
    y = torch.where(MASK, Y, float("nan"))
    torch.testing.assert_close(condensed(recorded(line), [0])(PHI, X, y, MASK), line(PHI, X, Y, MASK))


def test_small_noise_around_large_numbers_keeps_its_digits() -> None:
    """Sums of squares and products would lose all of them: (1e7)² · 1e-16 is 1e-2, the residuals' squares 1e-8."""
    year = 1e7 + torch.arange(N, dtype=torch.float64).expand(TASKS, N)
    x = torch.stack([year, year], -1)
    y = 3.0 * year + 1.0 + 1e-4 * Y
    phi = torch.tensor([[1.0, 3.0]], dtype=torch.float64).expand(TASKS, 2).contiguous()
    found = condensed(recorded(line), [0])(phi, x, y, MASK)
    torch.testing.assert_close(found, line(phi, x, y, MASK), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "function",
    [
        lambda phi, x, y, mask: ((y - phi[:, :1].exp() * x[..., 0].sin() * phi[:, 1:] * y) ** 2).sum(-1),
        lambda phi, x, y, mask: ((y - phi[:, :1]).abs() ** 2).sum(-1),
        lambda phi, x, y, mask: ((y - phi[:, :1]) ** 4).sum(-1),
        lambda phi, x, y, mask: ((y - phi[:, :1]) ** 2).sum(0),
        lambda phi, x, y, mask: ((y - (phi[:, :1] * x[..., 0]).exp()) ** 2).sum(-1),
        lambda phi, x, y, mask: torch.where(phi[:, :1] > y, (y - phi[:, :1]) ** 2, ZERO).sum(-1),
        lambda phi, x, y, mask: torch.where(mask, (y - phi[:, :1]) ** 2, 1.0 + ZERO).sum(-1),
        lambda phi, x, y, mask: (y**2).sum(-1) + phi[:, 0],
        lambda phi, x, y, mask: (phi[:, :1].expand(TASKS, N) ** 2).sum(-1),
        lambda phi, x, y, mask: ((y[:, :2] - phi[:, :1]) ** 2).sum(-1),
    ],
)
def test_everything_else_stays_as_it_is(function: Function) -> None:
    graph = recorded(function)
    assert condensed(graph, [0]) is graph


def test_what_is_learned_is_no_data() -> None:
    """Columns that training moves would be factored again and again, and differentiated."""
    graph = recorded(line)
    assert condensed(graph, [0, 1]) is graph


def test_many_terms_stay_rows() -> None:
    wide = torch.randn(TASKS, 40, MOST_TERMS, dtype=torch.float64)
    phi, y = torch.randn(TASKS, 1, MOST_TERMS, dtype=torch.float64), torch.randn(TASKS, 40, dtype=torch.float64)
    graph = simplify(make_fx(lambda phi, x, y: ((y - (x * phi).sum(-1)) ** 2).sum(-1))(phi, wide, y))
    assert condensed(graph, [0]) is graph
