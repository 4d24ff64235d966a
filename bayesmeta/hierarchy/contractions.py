"""Sums of products as matrix products: Σ_k a·b without the array of all products.

Broadcasting writes a linear predictor over draws, tasks and rows as a product that is summed; where a factor is
repeated along a dimension that is kept, a matrix product does the same with less memory traffic. It is applied to
graphs that run as they are; a compiler fuses the loops by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any

import torch
from torch import fx

from bayesmeta.hierarchy.rewriting import add_call, constant_of, example, is_expanded, rewrite, shape_of

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
    if node.target not in SUMS or len(node.args) < 2 or node.kwargs or not _large_product(node.args[0]):
        return None
    product: Any = node.args[0]
    dims: Any = node.args[1]
    shape = shape_of(product)
    summed = {d % len(shape) for d in dims}
    first, second = (_factor(argument, shape) for argument in product.args)
    if not _worth_while(first, second, summed, shape):
        return None
    total = _einsum(graph, first, second, summed, shape)
    return add_call(graph, torch.reshape, (total, list(shape_of(node))))


def _einsum(graph: fx.Graph, first: _Factor, second: _Factor, summed: set[int], shape: torch.Size) -> fx.Node:
    """The sum, with the summed dimensions kept as 1 and repeated where neither factor has a dimension."""
    kept = sorted({*first.dims, *second.dims} - summed)
    equation = f"{_letters(first.dims)},{_letters(second.dims)}->{_letters(kept)}"
    total = add_call(graph, torch.einsum, (equation, _squeezed(graph, first, shape), _squeezed(graph, second, shape)))
    total = add_call(graph, torch.reshape, (total, [n if d in kept else 1 for d, n in enumerate(shape)]))
    whole = [1 if d in summed else n for d, n in enumerate(shape)]
    return total if list(shape_of(total)) == whole else add_call(graph, torch.Tensor.expand, (total, whole))


def _letters(dims: Iterable[int]) -> str:
    return "".join(ascii_lowercase[d] for d in dims)


def _large_product(node: Any) -> bool:
    """Whether a node is a product of two tensors of floats that only one sum uses."""
    if not isinstance(node, fx.Node) or node.target not in PRODUCTS or node.kwargs:
        return False
    values = [example(part) for part in (node, *node.args)]
    dtypes = {value.dtype if value is not None else None for value in values}
    floats = dtypes in ({torch.float32}, {torch.float64})
    return floats and len(node.users) == 1 and shape_of(node).numel() >= SMALLEST


def _factor(node: Any, shape: torch.Size) -> _Factor:
    source = node.args[0] if is_expanded(node) else node
    own, constant = shape_of(source), constant_of(source.graph.owning_module, source)
    strides = own if constant is None else constant.stride()
    offset = len(shape) - len(own)
    dims = (d for d in range(len(own)) if own[d] > 1 and strides[d] > 0)
    return _Factor(source, tuple(d + offset for d in dims))


def _worth_while(first: _Factor, second: _Factor, summed: set[int], shape: torch.Size) -> bool:
    """Both have a dimension that is summed; one or both are repeated along one that is kept, not both along a sum."""
    one, two = set(first.dims), set(second.dims)
    missing = {d for d in range(len(shape)) if shape[d] > 1} - one - two
    return not missing & summed and bool(one & two & summed) and bool(((one ^ two) - summed) | missing)


def _squeezed(graph: fx.Graph, factor: _Factor, shape: torch.Size) -> fx.Node:
    source, offset = factor.source, len(shape) - len(shape_of(factor.source))
    for d in range(offset, len(shape)):
        if d not in factor.dims and shape_of(source)[d - offset] > 1:
            source = add_call(graph, torch.narrow, (source, d - offset, 0, 1))
    return add_call(graph, torch.reshape, (source, [shape[d] for d in factor.dims]))
