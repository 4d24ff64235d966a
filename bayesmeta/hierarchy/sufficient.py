"""Least squares over rows by their sufficient statistics: Σ_r (y_r − a − b x_r)² = ‖R (1, −a, −b)‖², [y 1 x] = Q R.

As many rows as the residual has terms then do what all rows of a task did, as exactly: a triangular factor keeps the
digits that sums of squares and products lose. The factor depends on data alone; `hoisting.py` computes it once.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from bayesmeta.hierarchy.rewriting import (
    add_call,
    depending_on,
    example,
    name_of,
    repeated,
    rewrite,
    shape_of,
    unmasked,
)

MOST_TERMS = 32
"""Residuals with more terms stay as they are."""

Column = tuple[Any, int | None]
"""A node with one number a row, or one place of its last dimension; (None, None) is 1 in all rows."""
Terms = dict[Column, list[tuple[float, Column]]]
"""Data columns, and the signed parts of what each is multiplied by, which rows share."""


def condensed(graph: fx.GraphModule, varying: Sequence[int]) -> fx.GraphModule:
    """The graph with sums of squares of residuals over fewer rows; the graph itself where it has none.

    Args:
        graph: A graph of pure operations; the same one always gets the same answer.
        varying: Which inputs change between calls; all others are data.
    """
    key = f"condensed, {list(varying)} varying"
    if key not in graph.meta:
        graph.meta[key] = _condensed(graph, varying)
    return graph.meta[key]  # type: ignore[no-any-return]


def widest(graph: fx.GraphModule, varying: Sequence[int], tasks: int) -> int:
    """Most numbers a task in what a graph computes from inputs that change."""
    nodes = list(graph.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    moving = depending_on(nodes, [inputs[place] for place in varying])
    return max(value.numel() // tasks for value in map(example, moving) if value is not None)


def _condensed(graph: fx.GraphModule, varying: Sequence[int]) -> fx.GraphModule:
    made = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    nodes = list(made.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    moving = depending_on(nodes, [inputs[place] for place in varying])
    squares = _Squares({node for node in nodes if node.op != "output" and node not in moving})
    rewrite(made, squares.step)
    if not squares.found:
        return graph
    made.graph.eliminate_dead_code()
    made.recompile()
    return made


class _Squares:
    """Replaces sums of squares of what is linear in data.

    Args:
        fixed: Nodes that depend on data alone.
    """

    def __init__(self, fixed: set[fx.Node]) -> None:
        self._fixed = fixed
        self.found = 0

    def step(self, graph: fx.Graph, node: fx.Node) -> fx.Node | None:
        """The same sum over fewer rows."""
        mask, residual = self._squared(node)
        terms = None if residual is None else self._terms(residual, shape_of(residual))
        if residual is None or not terms or len(terms) >= min(shape_of(residual)[-1], MOST_TERMS + 1):
            return None
        data = [column for column, _ in terms if column is not None]
        if not data:
            return None
        self.found += 1
        build = _Builder(graph, shape_of(residual), data[0])
        factor = build.factor(list(terms), mask)
        coefficients = build.stacked([build.coefficient(parts) for parts in terms.values()])
        rows = build.call(torch.sum, build.call(torch.mul, factor, coefficients), [-1])
        return build.call(torch.sum, build.call(torch.pow, rows, 2), [-1], *node.args[2:])

    def _squared(self, node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
        """The mask, and the residual whose squares a node sums over the last dimension; no residual if it does not."""
        summed = _summed_over_last(node)
        mask, source, _ = unmasked(summed)
        if summed is None or name_of(source) != "pow" or source.args[1] != 2 or not {mask} <= self._fixed | {None}:
            return None, None
        residual: Any = source.args[0]
        return (None, None) if residual in self._fixed or shape_of(residual) != shape_of(summed) else (mask, residual)

    def _terms(self, node: Any, shape: torch.Size) -> Terms | None:
        """A linear function of data columns; None if it is not one."""
        if self._is_column(node, shape):
            return {(node, None): [(1.0, (1.0, None))]}
        small = repeated(node, shape, [len(shape) - 1])
        if small is not None:
            return {(None, None): [(1.0, (small, None))]}
        return self._combined(node, shape) if isinstance(node, fx.Node) and not node.kwargs else None

    def _combined(self, node: fx.Node, shape: torch.Size) -> Terms | None:
        name = name_of(node)
        if name in ("add", "sub"):
            first, second = (self._terms(argument, shape) for argument in node.args)
            return _merged(first, second, -1.0 if name == "sub" else 1.0)
        if name == "neg":
            return _merged({}, self._terms(node.args[0], shape), -1.0)
        return self._product(node, shape) if name == "mul" else self._dot(node, shape)

    def _product(self, node: fx.Node, shape: torch.Size) -> Terms | None:
        """A data column times what rows share."""
        for one, other in (node.args, node.args[::-1]):
            small = repeated(other, shape, [len(shape) - 1])
            if small is not None and self._is_column(one, shape):
                return {(one, None): [(1.0, (small, None))]}
        return None

    def _dot(self, node: fx.Node, shape: torch.Size) -> Terms | None:
        """Σ_k x_k φ_k of data `(…, N, d)` and what rows share."""
        product: Any = _summed_over_last(node) if len(node.args) == 2 else None
        if product is None or name_of(product) != "mul":
            return None
        wide = shape_of(product)
        for one, other in (product.args, product.args[::-1]):
            small = repeated(other, wide, [len(wide) - 2])
            if isinstance(small, fx.Node) and self._is_column(one, wide) and shape_of(small)[-1:] == wide[-1:]:
                return {(one, k): [(1.0, (small, k))] for k in range(wide[-1])}
        return None

    def _is_column(self, node: Any, shape: torch.Size) -> bool:
        value = example(node)
        return node in self._fixed and value is not None and value.shape == shape and value.is_floating_point()


def _summed_over_last(node: fx.Node) -> fx.Node | None:
    """What a node sums over its last dimension alone."""
    source: Any = node.args[0] if len(node.args) > 1 else None
    value = example(source)
    if name_of(node) != "sum" or node.kwargs or value is None or not value.dim():
        return None
    dims: Any = node.args[1]
    return source if [d % value.dim() for d in dims] == [value.dim() - 1] else None  # type: ignore[no-any-return]


def _merged(first: Terms | None, second: Terms | None, sign: float) -> Terms | None:
    if first is None or second is None:
        return None
    found = {column: list(parts) for column, parts in first.items()}
    for column, parts in second.items():
        found.setdefault(column, []).extend((sign * own, part) for own, part in parts)
    return found


class _Builder:
    """Adds the operations that take the place of a sum of squares of shape `(…, N)`; `like` is one of its data."""

    def __init__(self, graph: fx.Graph, shape: torch.Size, like: fx.Node) -> None:
        self._graph, self._shape, self._like = graph, shape, like

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Adds one operation."""
        return add_call(self._graph, target, args, kwargs)

    def stacked(self, parts: Sequence[fx.Node]) -> fx.Node:
        """Columns side by side."""
        return self.call(torch.stack, list(parts), -1)

    def factor(self, columns: Sequence[Column], mask: fx.Node | None) -> fx.Node:
        """R of the data columns, `(…, K, K)`; rows that do not count are 0."""
        data = self.stacked([self._expanded(self._taken(column, 1.0), self._shape) for column in columns])
        if mask is not None:
            wide = self.call(torch.unsqueeze, self._expanded(mask, self._shape), -1)
            data = self.call(torch.where, wide, data, self._constant(0.0))
        return self.call(operator.getitem, self.call(torch.linalg.qr, data, mode="r"), 1)

    def coefficient(self, parts: Sequence[tuple[float, Column]]) -> fx.Node:
        """Σ of signed parts, `(…, 1)`."""
        total: Any = 0.0
        for sign, part in parts:
            own = self._taken(part, 0.0)
            signed = self.call(torch.mul, own, sign) if isinstance(own, fx.Node) else sign * own
            both = isinstance(signed, fx.Node) or isinstance(total, fx.Node)
            total = self.call(torch.add, *_node_first(signed, total)) if both else signed + total
        return self._expanded(total, torch.Size((*self._shape[:-1], 1)))

    def _taken(self, column: Column, otherwise: float) -> Any:
        """The node of a column, or a number."""
        node, place = column
        if node is None:
            return otherwise
        return node if place is None else self.call(torch.select, node, -1, place)

    def _expanded(self, value: Any, shape: torch.Size) -> fx.Node:
        if not isinstance(value, fx.Node):
            value = self._constant(value)
        return self.call(torch.Tensor.expand, value, list(shape))

    def _constant(self, number: float) -> fx.Node:
        return self.call(torch.ops.aten.new_full.default, self._like, [], number)


def _node_first(one: Any, other: Any) -> tuple[Any, Any]:
    return (one, other) if isinstance(one, fx.Node) else (other, one)
