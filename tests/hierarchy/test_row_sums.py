from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from bayesmeta.hierarchy.simplify import simplify

ROWS = torch.linspace(0.1, 2.0, 12, dtype=torch.float64).reshape(3, 4)
"""Three tasks with four rows."""
RATE = torch.tensor([[0.5], [1.25], [3.0]], dtype=torch.float64)
"""What the rows of a task share."""
MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
ZERO = torch.zeros((), dtype=torch.float64)

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def on_rows(graph: fx.GraphModule) -> list[str]:
    """Operations on floats of all rows."""
    wide = [n for n in graph.graph.nodes if n.op == "call_function" and n.meta["val"].shape == ROWS.shape]
    return [str(n.target) for n in wide if n.meta["val"].is_floating_point() and "expand" not in str(n.target)]


def check(function: Function, mask: Tensor = MASK) -> fx.GraphModule:
    graph = simplify(make_fx(function)(ROWS, RATE, mask))
    for y, rate in ((ROWS, RATE), (ROWS - 1.0, 2 * RATE), (ROWS.flip(0), RATE.exp())):
        torch.testing.assert_close(graph(y, rate, mask), function(y, rate, mask), rtol=1e-13, atol=1e-13)
    return graph


def poisson(y: Tensor, rate: Tensor, mask: Tensor) -> Tensor:
    wide = rate.expand(3, 4)
    return torch.where(mask, y.xlogy(wide) - wide - torch.lgamma(y + 9), ZERO).sum(-1)


def normal(y: Tensor, scale: Tensor, mask: Tensor) -> Tensor:
    wide = scale.expand(3, 4)
    terms = -((y - 0.3) ** 2) / (2 * wide**2) - wide.log() - 0.9
    return torch.where(mask, terms, ZERO).sum(-1)


@pytest.mark.parametrize("mask", [MASK, torch.ones_like(MASK), torch.zeros_like(MASK)], ids=["some", "all", "none"])
def test_rates_and_scales_leave_the_sum(mask: Tensor) -> None:
    counts = on_rows(check(poisson, mask))
    assert not any("xlogy" in name or "sub" in name for name in counts), counts
    assert not any("log" in name or "mul" in name for name in on_rows(check(normal, mask)))


@pytest.mark.parametrize(
    "function",
    [
        lambda y, rate, mask: (y * rate).sum(-1),
        lambda y, rate, mask: (rate * y).sum(1, keepdim=True),
        lambda y, rate, mask: (y.exp() * rate - 2.0 * rate).sum(1),
        lambda y, rate, mask: (rate.expand(3, 4) + y.exp()).sum([1]),
        lambda y, rate, mask: torch.where(mask, rate.expand(3, 4) - y.exp(), ZERO).sum(1),
        lambda y, rate, mask: torch.where(mask[:, :1], y * rate, ZERO).sum(1),
        lambda y, rate, mask: (y * rate[1]).sum([0, 1]),
        lambda y, rate, mask: (y * rate).sum(0),
        lambda y, rate, mask: (y * rate[0, 0] + rate[0, 0]).sum(0, keepdim=True),
        lambda y, rate, mask: (y.exp() + 3.0).sum(1),
        lambda y, rate, mask: torch.where(mask, -(y**2) / 0.3 - 2.0, ZERO).sum(1),
        lambda y, rate, mask: torch.where(mask, -(y.exp() / rate + rate), ZERO).sum(1),
        lambda y, rate, mask: (rate / y.exp() - rate).sum(1),
        lambda y, rate, mask: rate[0].expand(3, 4).sum(1),
        lambda y, rate, mask: rate[0, 0].expand(2, 3, 4).square().sum(-1).sqrt() + y.sum(),
        lambda y, rate, mask: rate.expand(2, 3, 4).sum(-1, keepdim=True),
        lambda y, rate, mask: (y * rate).sum(dim=None),
        lambda y, rate, mask: (y * rate).sum(dim=()),
        lambda y, rate, mask: (y.exp() + (rate * 0 + 16777217.0).long()).sum(1),
        lambda y, rate, mask: (rate.expand(3, 4) * 3.0).sum(1),
    ],
)
def test_sums_keep_their_values_and_shapes(function: Function) -> None:
    assert check(function)(ROWS, RATE, MASK).shape == function(ROWS, RATE, MASK).shape


def test_counts_of_rows_keep_the_precision_of_what_they_multiply() -> None:
    """A count as a whole number times a Python number would be a float32."""
    graph = check(lambda y, rate, mask: torch.where(mask, (y.exp() - 0.1) * rate, ZERO).sum(1))
    assert graph(ROWS, RATE, MASK).dtype == torch.float64


@pytest.mark.parametrize(
    "function",
    [
        lambda y, rate, mask: torch.where(mask, y.exp() + y.sin(), ZERO).sum(1),  # nothing is shared
        lambda y, rate, mask: torch.where(mask, y * rate, 1.0 + ZERO).sum(1),  # masked rows count
        lambda y, rate, mask: torch.where(mask, rate.xlogy(y.exp()), ZERO).sum(1),  # not linear in what is shared
        lambda y, rate, mask: torch.where(mask, torch.add(y, rate, alpha=2), ZERO).sum(1),
        lambda y, rate, mask: (lambda terms: terms.sum(1) + terms.amax(1))(torch.where(mask, y * rate, ZERO)),
    ],
)
def test_other_sums_stay_as_they_are(function: Function) -> None:
    graph = check(function)
    assert len(on_rows(graph)) >= len([name for name in on_rows(make_fx(function)(ROWS, RATE, MASK))])


def test_single_precision_has_no_digits_for_sums_that_cancel() -> None:
    y, rate = torch.full((3, 50), 1000.0), torch.full((3, 1), 1000.0)

    def terms(y: Tensor, rate: Tensor) -> Tensor:
        wide = rate.expand(3, 50)
        return (y.xlogy(wide) - wide - torch.lgamma(y + 1)).sum(-1)

    torch.testing.assert_close(simplify(make_fx(terms)(y, rate))(y, rate), terms(y, rate), rtol=0, atol=0)


def test_a_task_without_rows_has_no_terms_even_where_what_rows_share_is_infinite() -> None:
    for rate in (RATE * math.inf, RATE * 0.0):
        for function in (normal, poisson):
            graph = simplify(make_fx(function)(ROWS, RATE, MASK))
            assert float(graph(ROWS, rate, MASK)[2]) == 0.0
