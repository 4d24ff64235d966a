"""Passes over recorded graphs: less work for the same numbers, up to rounding.

What Pyro's handlers leave behind (constants computed on every call, views to the same shape, the logarithm of one scale
expanded to every row) goes away here; `recording.py` calls `simplify` on everything it records.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from bayesmeta.hierarchy.rewriting import (
    add_call,
    alike,
    constant_of,
    describe,
    example,
    impure,
    is_expanded,
    merge,
    number_of,
    rewrite,
    shape_of,
)
from bayesmeta.hierarchy.row_sums import factored

aten = torch.ops.aten

_SAME = {aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default}
_SHAPED = {
    aten.clone.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.slice.Tensor,
    aten._to_copy.default,
}
"""Operations that change nothing where the result has the shape and dtype of the input."""
_UNDONE = {aten.squeeze.dims, aten.unsqueeze.default}
"""Views that can cancel each other."""
_POINTWISE = {
    aten.exp.default,
    aten.log.default,
    aten.log1p.default,
    aten.neg.default,
    aten.sqrt.default,
    aten.square.default,
    aten.abs.default,
    aten.reciprocal.default,
    aten.sigmoid.default,
    aten.softplus.default,
    aten.lgamma.default,
    aten.tanh.default,
    aten.pow.Tensor_Scalar,
}
_WITH_NUMBER = {aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor}
"""Pointwise too where the second argument is a number."""
_UNITS: dict[Any, int] = {
    aten.add.Tensor: 0,
    aten.sub.Tensor: 0,
    aten.mul.Tensor: 1,
    aten.div.Tensor: 1,
    aten.pow.Tensor_Scalar: 1,
}
_SIGN: dict[Any, float] = {aten.add.Tensor: 1.0, aten.sub.Tensor: -1.0}
_FILLED = {
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
}
"""Their values depend on no input, only their shapes do, and those are fixed in a graph."""
_CALLED: dict[Any, Any] = {
    aten.view.default: torch.reshape,
    aten._unsafe_view.default: torch.reshape,
    aten.mul.Tensor: torch.mul,
    aten.mul.Scalar: torch.mul,
    aten.add.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.div.Tensor: torch.div,
    aten.neg.default: torch.neg,
    aten.exp.default: torch.exp,
    aten.log.default: torch.log,
    aten.reciprocal.default: torch.reciprocal,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.sum.dim_IntList: torch.sum,
    aten.sum.default: torch.sum,
    aten.where.self: torch.where,
    aten.expand.default: Tensor.expand,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.squeeze.dim: torch.squeeze,
    aten.squeeze.dims: torch.squeeze,
    aten.select.int: torch.select,
    aten.split_with_sizes.default: torch.split_with_sizes,
    aten.bitwise_and.Tensor: torch.bitwise_and,
    aten.ge.Scalar: torch.ge,
    aten.cat.default: torch.cat,
    aten.stack.default: torch.stack,
    aten.mm.default: torch.mm,
    aten.bmm.default: torch.bmm,
    aten.t.default: torch.t,
    aten.permute.default: torch.permute,
}
"""The same by PyTorch's own Python bindings, which cost half as much a call. Views copy where the strides need it."""
LARGEST_CONSTANT = 2**19
"""Bytes of the largest constant that is kept in a graph."""


def simplify(graph: fx.GraphModule) -> fx.GraphModule:
    """Simplifies a recorded graph in place, and returns it.

    Graphs that write into tensors, draw random numbers or depend on strides only lose their dead code.
    """
    if not any(impure(node) for node in graph.graph.nodes):
        _fold_constants(graph)
        describe(graph)
        for step in (_same, _neutral, _single, _hoisted, _same, _hoisted, _signs, _chained, factored, _same):
            rewrite(graph, step)
        merge(graph)
        for node in graph.graph.nodes:
            called: Any = node.target
            node.target = _CALLED.get(called, called)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _same(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Views and copies that change nothing."""
    if node.target in _SAME:
        return node.args[0]  # type: ignore[return-value]
    if node.target in _UNDONE and isinstance(node.args[0], fx.Node) and node.args[0].target in _UNDONE:
        before: Any = node.args[0].args[0]
        return before if alike(example(node), example(before)) else None
    if node.target is aten.permute.default:
        return node.args[0] if _in_order(node.args[1]) else None  # type: ignore[return-value]
    if node.target in _SHAPED and alike(example(node), example(node.args[0])):
        return node.args[0]  # type: ignore[return-value]
    return None


def _in_order(dims: Any) -> bool:
    """Whether a permutation moves nothing; of a square tensor the shape does not tell."""
    return [d % len(dims) for d in dims] == list(range(len(dims)))


def _neutral(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Drops the neutral element: x + 0, x − 0, x · 1, x / 1 and x¹."""
    for place, other in ((0, 1), (1, 0))[: len(node.args)]:
        unit = _UNITS.get(node.target)
        if unit is None or (place and node.target not in (aten.add.Tensor, aten.mul.Tensor)):
            continue
        if _is_number(graph.owning_module, node.args[other], unit) and alike(example(node), example(node.args[place])):
            return node.args[place]  # type: ignore[return-value]
    return None


def _is_number(graph: Any, argument: Any, number: float) -> bool:
    if isinstance(argument, (int, float)):
        return argument == number
    constant = constant_of(graph, argument)
    return constant is not None and bool((constant == number).all())


def _single(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Sums over dimensions of size one, and stacks and concatenations of one tensor, are views."""
    if example(node) is None or not node.args:
        return None
    if node.target in (aten.stack.default, aten.cat.default):
        return _lone_part(graph, node)
    return _sum_of_one(graph, node) if node.target is aten.sum.dim_IntList else None


def _lone_part(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    parts: Any = node.args[0]
    if len(parts) != 1:
        return None
    if node.target is aten.cat.default:
        return parts[0]  # type: ignore[no-any-return]
    return add_call(graph, aten.unsqueeze.default, (parts[0], *(node.args[1:] or (0,))))


def _sum_of_one(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    source: Any = node.args[0]
    dims: Any = node.args[1]
    shape = shape_of(source)
    if source.meta["val"].dtype != node.meta["val"].dtype or not dims or any(shape[d] != 1 for d in dims):
        return None
    kept = len(node.args) > 2
    return source if kept else add_call(graph, aten.squeeze.dims, (source, dims))  # type: ignore[no-any-return]


def _hoisted(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Swaps f(expand(x)) for expand(f(x)), and a / expand(b) for a · expand(1 / b)."""
    if node.target is aten.div.Tensor and is_expanded(node.args[1]):
        return _times_reciprocal(graph, node)
    if not _pointwise(node) or not is_expanded(node.args[0]):
        return None
    expanded: Any = node.args[0]
    small = add_call(graph, node.target, (expanded.args[0], *node.args[1:]), node.kwargs)
    return add_call(graph, aten.expand.default, (small, list(shape_of(node))))


def _pointwise(node: fx.Node) -> bool:
    """Says whether each number of the result depends on one number of the first argument and on nothing else."""
    if node.target in _WITH_NUMBER:
        return len(node.args) > 1 and isinstance(node.args[1], (int, float))
    return node.target in _POINTWISE and bool(node.args)


def _chained(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Sums up the numbers in x ± a ± b, and drops the logarithm of an exponential."""
    before: Any = node.args[0] if node.args else None
    if not isinstance(before, fx.Node) or node.kwargs or before.kwargs:
        return None
    if node.target is aten.log.default:
        return before.args[0] if before.target is aten.exp.default else None  # type: ignore[return-value]
    return _one_shift(graph, before, node)


def _one_shift(graph: fx.Graph, before: fx.Node, node: fx.Node) -> fx.Node | None:
    """Two shifts in one, of floats only: integers would become floats."""
    source, value = before.args[0] if before.args else None, example(node)
    first, second = (_shift(graph.owning_module, n) for n in (before, node))
    if value is None or not value.is_floating_point() or not alike(value, example(source)):
        return None
    return None if first is None or second is None else add_call(graph, aten.add.Tensor, (source, first + second))


def _shift(graph: Any, node: fx.Node) -> float | None:
    """The number that a node adds to its first argument, if that is what it does."""
    sign = _SIGN.get(node.target)
    number = None if sign is None else number_of(node.args[1])
    return None if sign is None or number is None else sign * number


def _signs(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Signs move to the smaller tensor: Σ −x = −Σ x and −a · expand(b) = a · expand(−b)."""
    arguments: Any = node.args
    if node.target is aten.sum.dim_IntList and _negated(arguments[0]) is not None:
        total = add_call(graph, node.target, (_negated(arguments[0]), *arguments[1:]), node.kwargs)
        return add_call(graph, aten.neg.default, (total,))
    if node.target is not aten.mul.Tensor:
        return None
    for first, second in (arguments, arguments[::-1]):
        if _negated(first) is not None and is_expanded(second):
            small = add_call(graph, aten.neg.default, (second.args[0],))
            wide = add_call(graph, aten.expand.default, (small, list(shape_of(second))))
            return add_call(graph, aten.mul.Tensor, (_negated(first), wide))
    return None


def _negated(node: Any) -> fx.Node | None:
    """What a node is the negative of."""
    negative = isinstance(node, fx.Node) and node.target is aten.neg.default
    return node.args[0] if negative else None  # type: ignore[return-value]


def _times_reciprocal(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    divisor: Any = node.args[1]
    source, value = example(divisor.args[0]), example(node)
    if node.kwargs or source is None or value is None or source.dtype != value.dtype:
        return None
    inverse = add_call(graph, aten.reciprocal.default, (divisor.args[0],))
    wide = add_call(graph, aten.expand.default, (inverse, list(shape_of(divisor))))
    return add_call(graph, aten.mul.Tensor, (node.args[0], wide))


def _fold_constants(graph: fx.GraphModule) -> None:
    """Computes once what depends on no input, and keeps the small results that the rest of the graph uses."""
    known = _independent(graph)
    for place, (node, value) in enumerate(known.items()):
        used = any(user not in known for user in node.users)
        if node.op != "get_attr" and used and isinstance(value, Tensor) and _stored(value) <= LARGEST_CONSTANT:
            name = f"_folded{place}"
            setattr(graph, name, value.detach())
            with graph.graph.inserting_before(node):
                folded = graph.graph.create_node("get_attr", name)
            folded.meta = dict(node.meta)
            node.replace_all_uses_with(folded)


def _independent(graph: fx.GraphModule) -> dict[fx.Node, Any]:
    """The values of all nodes that depend on no input and no parameter."""
    known = _constants(graph)
    for node in graph.graph.nodes:
        if node.target in _FILLED and example(node) is not None:
            known[node] = _filled(node)
        elif _to_the_zeroth(node):
            known[node] = torch.ones((), dtype=node.meta["val"].dtype).expand(shape_of(node))
        elif node.op == "call_function" and all(n in known for n in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return known


def _to_the_zeroth(node: fx.Node) -> bool:
    """Whether a node is x⁰, 1 whatever x is: what second derivatives of squares leave behind."""
    return bool(node.target is aten.pow.Tensor_Scalar and node.args[1] == 0) and example(node) is not None


def _constants(graph: fx.GraphModule) -> dict[fx.Node, Any]:
    """The values that a graph holds; parameters may change, so they are none."""
    held = {node: getattr(graph, str(node.target)) for node in graph.graph.nodes if node.op == "get_attr"}
    return {node: value for node, value in held.items() if not isinstance(value, nn.Parameter)}


def _stored(value: Tensor) -> int:
    return value.untyped_storage().nbytes()


def _filled(node: fx.Node) -> Tensor:
    source = node.args[0].meta["val"]  # type: ignore[union-attr]
    value: Tensor = node.target(torch.zeros(source.shape, dtype=source.dtype), *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return value.flatten()[0].clone().expand(value.shape) if value.numel() else value
