"""Graphs that draw random numbers: recorded so that every slice of a mapped graph gets numbers of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions

TensorFunction = Callable[..., Any]


def independent_fills() -> dict[Any, Callable[..., Any]]:
    """In-place random fills as out-of-place draws: functionalised fills repeat one noise in every vmapped slice."""
    aten = torch.ops.aten
    table: dict[Any, Callable[..., Any]] = dict(
        get_decompositions([aten.exponential, aten.cauchy, aten.geometric, aten.log_normal])
    )

    def normal(x: Tensor, mean: float = 0.0, std: float = 1.0, *, generator: Any = None) -> Tensor:
        return torch.randn_like(x) * std + mean

    def uniform(x: Tensor, low: float = 0.0, high: float = 1.0, *, generator: Any = None) -> Tensor:
        return torch.rand_like(x) * (high - low) + low

    def fill(x: Tensor, value: float) -> Tensor:
        return torch.full_like(x, value)  # which vmap maps as one; it copies fills slice by slice

    def clamp(x: Tensor, *bounds: Any, **named: Any) -> Tensor:
        return x.copy_(torch.clamp(x, *bounds, **named))  # vmap has no rule for clamping in place, and prints so

    table[aten.clamp_.default] = clamp
    return table | {aten.normal_functional.default: normal, aten.uniform.default: uniform, aten.fill.Scalar: fill}


def _random_numbers(graph: TensorFunction) -> int:
    """How many random numbers a graph draws."""
    nodes = graph.graph.nodes if isinstance(graph, torch.fx.GraphModule) else ()
    random = (n for n in nodes if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()))
    return sum(n.meta["tensor_meta"].shape.numel() for n in random if "tensor_meta" in n.meta)


def check_noise(single: TensorFunction, mapped: TensorFunction, count: int) -> None:
    """Refuses a graph that has been mapped over `count` slices and does not draw for each of them."""
    if isinstance(single, torch.fx.GraphModule) and _random_numbers(mapped) != count * _random_numbers(single):
        raise RuntimeError("the mapped graph would repeat random numbers from slice to slice")
