"""Passes over recorded graphs: less work for the same numbers, up to rounding.

What Pyro's handlers leave behind (constants computed on every call, views to the same shape, the logarithm of one scale
expanded to every row) goes away here; `recording.py` calls `simplify` on everything it records.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

_SAME = {aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default, aten.clone.default}
_SHAPED = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.permute.default,
    aten.slice.Tensor,
    aten._to_copy.default,
}
"""Operations that change nothing where the result has the shape, strides and dtype of the input."""
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
_IN_PLACE = "_"
LARGEST_CONSTANT = 2**16
"""Elements of the largest constant that is kept in a graph."""


def simplify(graph: fx.GraphModule) -> fx.GraphModule:
    """Simplifies a recorded graph in place, and returns it.

    Graphs that write into tensors or draw random numbers only lose their dead code.
    """
    if not any(_impure(node) for node in graph.graph.nodes):
        _fold_constants(graph)
        for step in (_same, _neutral, _single, _hoisted, _same, _hoisted):
            _rewrite(graph, step)
        _merge(graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _impure(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.op == "call_function" and node.target is not operator.getitem
    random = torch.Tag.nondeterministic_seeded in node.target.tags
    return random or node.target._schema.is_mutable


def _value(node: Any) -> Tensor | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def _alike(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def _rewrite(graph: fx.GraphModule, step: Callable[[fx.Graph, fx.Node], fx.Node | None]) -> None:
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        with graph.graph.inserting_before(node):
            replacement = step(graph.graph, node)
        if replacement is not None:
            node.replace_all_uses_with(replacement)
            graph.graph.erase_node(node)


def _same(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Views and copies that change nothing."""
    if node.target in _SAME:
        return node.args[0]  # type: ignore[return-value]
    if node.target in _SHAPED and _alike(_value(node), _value(node.args[0])):
        return node.args[0]  # type: ignore[return-value]
    return None


def _neutral(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """x + 0, x − 0, x · 1, x / 1 and x¹."""
    if len(node.args) < 2 or not isinstance(node.args[1], (int, float)):
        return None
    additive = node.target in (aten.add.Tensor, aten.sub.Tensor) and node.args[1] == 0
    scaling = node.target in (aten.mul.Tensor, aten.div.Tensor, aten.pow.Tensor_Scalar) and node.args[1] == 1
    if (additive or scaling) and _alike(_value(node), _value(node.args[0])):
        return node.args[0]  # type: ignore[return-value]
    return None


def _single(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Sums over dimensions of size one, and stacks and concatenations of one tensor, are views."""
    value, source = _value(node), _value(node.args[0]) if node.args else None
    if node.target in (aten.stack.default, aten.cat.default):
        parts = node.args[0]
        if not isinstance(parts, (list, tuple)) or len(parts) != 1:
            return None
        return _as_view(graph, parts[0], value)
    if node.target is aten.sum.dim_IntList and source is not None and value is not None:
        if source.numel() == value.numel() and source.dtype == value.dtype:
            return _as_view(graph, node.args[0], value)
    return None


def _as_view(graph: fx.Graph, source: Any, value: Tensor | None) -> fx.Node | None:
    if value is None or not value.is_contiguous() or not source.meta["val"].is_contiguous():
        return None
    return _call(graph, aten.view.default, (source, list(value.shape)), value)


def _hoisted(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """f(expand(x)) = expand(f(x)), and a / expand(b) = a · expand(1 / b)."""
    if node.target is aten.div.Tensor and _expanded(node.args[1]):
        return _times_reciprocal(graph, node)
    unary = node.target in _POINTWISE
    number = node.target in _WITH_NUMBER and len(node.args) > 1 and isinstance(node.args[1], (int, float))
    if not (unary or number) or not node.args or not _expanded(node.args[0]):
        return None
    expanded: Any = node.args[0]
    small = _call(graph, node.target, (expanded.args[0], *node.args[1:]), None, node.kwargs)
    return _call(graph, aten.expand.default, (small, list(_shape(node))), None)


def _times_reciprocal(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    divisor: Any = node.args[1]
    source, value = _value(divisor.args[0]), _value(node)
    if node.kwargs or source is None or value is None or source.dtype != value.dtype:
        return None
    inverse = _call(graph, aten.reciprocal.default, (divisor.args[0],), None)
    wide = _call(graph, aten.expand.default, (inverse, list(_shape(divisor))), None)
    return _call(graph, aten.mul.Tensor, (node.args[0], wide), value)


def _expanded(node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.target is not aten.expand.default:
        return False
    value, source = _value(node), _value(node.args[0])
    return value is not None and source is not None and source.numel() < value.numel()


def _shape(node: fx.Node) -> torch.Size:
    value: Tensor = node.meta["val"]
    return value.shape


def _call(graph: fx.Graph, target: Any, args: Any, value: Tensor | None, kwargs: Any = None) -> fx.Node:
    """Adds a node; its example value is computed (on fake or small tensors) where it is not known."""
    node = graph.call_function(target, args, dict(kwargs or {}))
    if value is None:
        real = fx.node.map_arg(args, lambda n: n.meta["val"])
        value = target(*real, **(kwargs or {}))
    node.meta["val"] = value
    return node


def _fold_constants(graph: fx.GraphModule) -> None:
    """Computes once what depends on no input."""
    known: dict[fx.Node, Any] = {}
    for node in list(graph.graph.nodes):
        if node.op == "get_attr":
            known[node] = getattr(graph, str(node.target))
        elif node.op == "call_function" and all(n in known for n in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    for place, (node, value) in enumerate(known.items()):
        used = any(user not in known for user in node.users)
        if node.op != "get_attr" and used and isinstance(value, Tensor) and value.numel() <= LARGEST_CONSTANT:
            name = f"_folded{place}"
            graph.register_buffer(name, value.detach(), persistent=False)
            with graph.graph.inserting_before(node):
                constant = graph.graph.get_attr(name)
            constant.meta = dict(node.meta)
            node.replace_all_uses_with(constant)


def _merge(graph: fx.GraphModule) -> None:
    """Computes equal expressions once."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        key = (node.target, _hashable(node.args), _hashable(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.graph.erase_node(node)


def _hashable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _hashable(v)) for k, v in value.items())
    if isinstance(value, float):
        return (float, value, math.copysign(1.0, value))
    return (type(value), value)
