"""Sums over rows without what the rows share: Σ_r (y_r log λ − λ) = log λ Σ_r y_r − n λ.

A likelihood whose rows see their task through one number, such as counts around a rate of each task, then costs a task
what a row did; where only a scale is shared, its factor and its logarithm leave the sum. `simplify.py` applies it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bayesmeta.hierarchy.rewriting import add_call, alike, example, repeated, shape_of, unmasked

aten = torch.ops.aten
_TERMS = {aten.add.Tensor, aten.sub.Tensor, aten.neg.default}
_LINEAR = {aten.mul.Tensor, aten.div.Tensor, aten.xlogy.Tensor}
"""Linear in the first argument whatever the second is; of a product either may be the second."""
_A_SUM = 2
"""Operations on all rows that one more sum takes: the mask and the sum."""


def factored(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """A sum over rows, masked or not, as sums of what differs between rows, where that is no more work."""
    found = _rows_of(graph, node)
    if found is None or not found[0].shares(found[1]):
        return None
    rows, source = found
    kept = [1 if d in rows.dims else size for d, size in enumerate(rows.shape)]
    total = add_call(graph, aten.expand.default, (rows.present(rows.total(source)), kept))
    return total if len(node.args) > 2 else add_call(graph, aten.squeeze.dims, (total, list(rows.dims)))


def _rows_of(graph: fx.Graph, node: fx.Node) -> tuple[_Rows, fx.Node] | None:
    """What a node sums, and over which rows.

    In float64 only: sums that are taken apart from each other cancel, which leaves float32 too few digits.
    """
    if node.target is not aten.sum.dim_IntList or node.kwargs or not node.args[1]:
        return None
    value = example(node)
    mask, source, zero = unmasked(node.args[0])
    if value is None or value.dtype != torch.float64 or not alike(example(source), example(node.args[0])):
        return None
    shape = shape_of(source)
    dims: Any = node.args[1]
    return _Rows(graph, shape, value.dtype, tuple(sorted(d % len(shape) for d in dims)), mask, zero), source


@dataclass(frozen=True)
class _Rows:
    """Sums over the dimensions `dims`, which stay, of arrays of one shape, where `mask` says so: others are `zero`."""

    graph: fx.Graph
    shape: torch.Size
    dtype: torch.dtype
    dims: tuple[int, ...]
    mask: fx.Node | None
    zero: fx.Node | None

    def shares(self, node: fx.Node) -> bool:
        """Whether rows share terms or factors of an array, and summing apart what is left costs no more."""
        saved, sums, shared = self._costs(node)
        return shared and _A_SUM * sums <= saved + _A_SUM

    def _costs(self, node: Any) -> tuple[int, int, bool]:
        """Operations on all rows that fall away, sums that take their place, and whether rows share anything."""
        if self._shared(node) is not None:
            return 0, 0, True
        terms, product = self._terms(node), self._product(node)
        if terms:
            costs = [self._costs(term) for term in terms]
            return 1 + sum(c[0] for c in costs), sum(c[1] for c in costs), any(c[2] for c in costs)
        if product:
            saved, sums, _ = self._costs(product[0])
            return 1 + saved, sums, True
        return 0, 1, False

    def total(self, node: Any) -> Any:
        """The sum of an array; that of a number without a mask is a number."""
        small = self._shared(node)
        if small is not None:
            return self._times_count(small)
        terms, product = self._terms(node), self._product(node)
        if terms:
            return self._call(node.target, *map(self.total, terms))
        if product:
            return self._call(node.target, self.total(product[0]), product[1])
        if self.mask is not None:
            node = self._call(aten.where.self, self.mask, node, self.zero)
        return self._call(aten.sum.dim_IntList, node, list(self.dims), True)

    def _times_count(self, small: Any) -> Any:
        """Something times the number of rows that count."""
        if self.mask is None:
            count = float(math.prod(self.shape[d] for d in self.dims))
            return self._call(aten.mul.Tensor, small, count) if isinstance(small, fx.Node) else small * count
        return self._call(aten.mul.Tensor, self._count(), small)

    def _count(self) -> fx.Node:
        """How many rows count, by the mask."""
        ones = add_call(self.graph, aten._to_copy.default, (self.mask,), {"dtype": self.dtype})
        whole = self._call(aten.expand.default, ones, list(self.shape))
        return self._call(aten.sum.dim_IntList, whole, list(self.dims), True)

    def present(self, total: fx.Node) -> fx.Node:
        """A sum, 0 where no row counts even if what rows share is infinite."""
        if self.mask is None:
            return total
        return self._call(aten.where.self, self._call(aten.gt.Scalar, self._count(), 0), total, self.zero)

    def _shared(self, argument: Any) -> Any:
        """What an argument repeats along the rows; None if it does not, or holds whole numbers."""
        found = repeated(argument, self.shape, self.dims)
        return found if not isinstance(found, fx.Node) or found.meta["val"].dtype == self.dtype else None

    def _terms(self, node: fx.Node) -> tuple[Any, ...]:
        """The terms of a sum, a difference or a negative that nothing else uses."""
        if node.target not in _TERMS or node.kwargs or len(node.users) > 1:
            return ()
        return node.args if all(self._whole(t) or self._shared(t) is not None for t in node.args) else ()

    def _product(self, node: fx.Node) -> tuple[Any, Any] | tuple[()]:
        """What differs between rows in a product, and what they share."""
        if node.target not in _LINEAR or node.kwargs or len(node.users) > 1:
            return ()
        first, second = node.args
        for one, other in ((first, second), (second, first))[: 1 + (node.target is aten.mul.Tensor)]:
            if self._whole(one) and self._shared(other) is not None:
                return one, self._shared(other)
        return ()

    def _whole(self, node: Any) -> bool:
        value = example(node)
        return value is not None and (value.shape, value.dtype) == (self.shape, self.dtype)

    def _call(self, target: Any, *args: Any) -> fx.Node:
        return add_call(self.graph, target, args)
