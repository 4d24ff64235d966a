"""Sums of products as matrix products: Σ_k a·b without the array of all products.

Broadcasting writes a linear predictor over draws, tasks and rows as a product that is summed; where a factor is
repeated along a dimension that is kept, a matrix product does the same with less memory traffic. `recording.py` applies
it to graphs that run as they are; a compiler fuses the loops by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any

import torch
from torch import fx

from bayesmeta.hierarchy.rewriting import add_call, example, is_expanded, rewrite, shape_of

aten = torch.ops.aten
PRODUCTS = {aten.mul.Tensor, torch.mul}
SUMS = {aten.sum.dim_IntList, torch.sum}
SMALLEST = 4096
"""Products of fewer numbers than this stay as they are."""


@dataclass(frozen=True)
class _Factor:
    """A factor without its repetitions, and which dimensions of the product it has."""

    source: fx.Node
    dims: tuple[int, ...]


def contract(graph: fx.GraphModule) -> fx.GraphModule:
    """Replaces sums of products in place, and returns the graph."""
    rewrite(graph, _contracted)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _contracted(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    product: Any = node.args[0] if node.args else None
    if node.target not in SUMS or len(node.args) < 2 or node.kwargs or not _large_product(product):
        return None
    shape = shape_of(product)
    dims: Any = node.args[1]
    summed = {d % len(shape) for d in dims}
    first, second = (_factor(argument, shape) for argument in product.args)
    if not _worth_while(first, second, summed, shape):
        return None
    letters = ["".join(ascii_lowercase[d] for d in factor.dims) for factor in (first, second)]
    kept = [d for d in range(len(shape)) if shape[d] > 1 and d not in summed]
    equation = f"{letters[0]},{letters[1]}->{''.join(ascii_lowercase[d] for d in kept)}"
    parts = [_squeezed(graph, factor, shape) for factor in (first, second)]
    total = add_call(graph, torch.einsum, (equation, *parts))
    return add_call(graph, torch.reshape, (total, list(shape_of(node))))


def _large_product(node: Any) -> bool:
    """Whether a node is a product of two tensors of floats that only one sum uses."""
    if not isinstance(node, fx.Node) or node.target not in PRODUCTS or len(node.users) != 1 or node.kwargs:
        return False
    dtypes = {None if value is None else value.dtype for value in map(example, (node, *node.args))}
    floats = dtypes <= {torch.float32, torch.float64} and len(dtypes) == 1
    return floats and shape_of(node).numel() >= SMALLEST


def _factor(node: Any, shape: torch.Size) -> _Factor:
    source = node.args[0] if is_expanded(node) else node
    own = shape_of(source)
    offset = len(shape) - len(own)
    return _Factor(source, tuple(d for d in range(offset, len(shape)) if own[d - offset] > 1))


def _worth_while(first: _Factor, second: _Factor, summed: set[int], shape: torch.Size) -> bool:
    """Both have a dimension that is summed, one is repeated along a dimension that is kept, none along both."""
    one, two = set(first.dims), set(second.dims)
    covered = one | two == {d for d in range(len(shape)) if shape[d] > 1}
    return covered and bool(one & two & summed) and bool((one ^ two) - summed)


def _squeezed(graph: fx.Graph, factor: _Factor, shape: torch.Size) -> fx.Node:
    return add_call(graph, torch.reshape, (factor.source, [shape[d] for d in factor.dims]))
