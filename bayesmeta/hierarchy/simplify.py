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
from torch import Tensor, fx, nn

aten = torch.ops.aten

_SAME = {aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default}
_SHAPED = {
    aten.clone.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.permute.default,
    aten.slice.Tensor,
    aten._to_copy.default,
}
"""Operations that change nothing where the result has the shape, strides and dtype of the input."""
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
_UNITS = {
    aten.add.Tensor: 0,
    aten.sub.Tensor: 0,
    aten.mul.Tensor: 1,
    aten.div.Tensor: 1,
    aten.pow.Tensor_Scalar: 1,
}
_FILLED = {
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
}
"""Their values depend on no input, only their shapes do, and those are fixed in a graph."""
LARGEST_CONSTANT = 2**19
"""Bytes of the largest constant that is kept in a graph."""


def simplify(graph: fx.GraphModule) -> fx.GraphModule:
    """Simplifies a recorded graph in place, and returns it.

    Graphs that write into tensors, draw random numbers or depend on strides only lose their dead code.
    """
    if not any(_impure(node) for node in graph.graph.nodes):
        _fold_constants(graph)
        _describe(graph)
        for step in (_same, _neutral, _single, _hoisted, _same, _hoisted, _same):
            _rewrite(graph, step)
        _merge(graph)
        for node in graph.graph.nodes:
            if node.target in (
                aten.view.default,
                aten._unsafe_view.default,
            ):  # the strides may now be others than those recorded
                node.target = aten.reshape.default
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _describe(graph: fx.GraphModule) -> None:
    """Replaces example values by tensors without storage: those of different recordings cannot be mixed."""
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            node.meta["val"] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _impure(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.op == "call_function" and node.target is not operator.getitem
    if node.target is aten.as_strided.default:
        return True
    random = torch.Tag.nondeterministic_seeded in node.target.tags
    return random or node.target._schema.is_mutable


def _value(node: Any) -> Tensor | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def _alike(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def _constant(graph: fx.GraphModule, node: Any) -> Tensor | None:
    value = getattr(graph, str(node.target)) if isinstance(node, fx.Node) and node.op == "get_attr" else None
    return value if isinstance(value, Tensor) else None


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
    if node.target in _UNDONE and isinstance(node.args[0], fx.Node) and node.args[0].target in _UNDONE:
        before: Any = node.args[0].args[0]
        return before if _alike(_value(node), _value(before)) else None
    if node.target in _SHAPED and _alike(_value(node), _value(node.args[0])):
        return node.args[0]  # type: ignore[return-value]
    return None


def _neutral(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Drops the neutral element: x + 0, x − 0, x · 1, x / 1 and x¹."""
    for place, other in ((0, 1), (1, 0))[: len(node.args) - 1]:
        unit = _UNITS.get(node.target)
        if unit is None or (place and node.target not in (aten.add.Tensor, aten.mul.Tensor)):
            continue
        if _is_number(graph.owning_module, node.args[other], unit) and _alike(_value(node), _value(node.args[place])):
            return node.args[place]  # type: ignore[return-value]
    return None


def _is_number(graph: Any, argument: Any, number: float) -> bool:
    if isinstance(argument, (int, float)):
        return argument == number
    constant = _constant(graph, argument)
    return constant is not None and bool((constant == number).all())


def _single(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Sums over dimensions of size one, and stacks and concatenations of one tensor, are views."""
    value = _value(node)
    if value is None or not node.args:
        return None
    if node.target in (aten.stack.default, aten.cat.default):
        parts: Any = node.args[0]
        if len(parts) != 1 or node.target is aten.cat.default:
            return parts[0] if len(parts) == 1 else None
        return _call(graph, aten.unsqueeze.default, (parts[0], *node.args[1:]) if node.args[1:] else (parts[0], 0))
    source = _value(node.args[0])
    if node.target is not aten.sum.dim_IntList or source is None or source.dtype != value.dtype:
        return None
    dims: Any = node.args[1]
    if not dims or any(source.shape[d] != 1 for d in dims):
        return None
    return node.args[0] if len(node.args) > 2 else _call(graph, aten.squeeze.dims, (node.args[0], dims))  # type: ignore[return-value]


def _hoisted(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Swaps f(expand(x)) for expand(f(x)), and a / expand(b) for a · expand(1 / b)."""
    if node.target is aten.div.Tensor and _expanded(node.args[1]):
        return _times_reciprocal(graph, node)
    unary = node.target in _POINTWISE
    number = node.target in _WITH_NUMBER and len(node.args) > 1 and isinstance(node.args[1], (int, float))
    if not (unary or number) or not node.args or not _expanded(node.args[0]):
        return None
    expanded: Any = node.args[0]
    small = _call(graph, node.target, (expanded.args[0], *node.args[1:]), node.kwargs)
    return _call(graph, aten.expand.default, (small, list(_shape(node))))


def _times_reciprocal(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    divisor: Any = node.args[1]
    source, value = _value(divisor.args[0]), _value(node)
    if node.kwargs or source is None or value is None or source.dtype != value.dtype:
        return None
    inverse = _call(graph, aten.reciprocal.default, (divisor.args[0],))
    wide = _call(graph, aten.expand.default, (inverse, list(_shape(divisor))))
    return _call(graph, aten.mul.Tensor, (node.args[0], wide))


def _expanded(node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.target is not aten.expand.default:
        return False
    value, source = _value(node), _value(node.args[0])
    return value is not None and source is not None and source.numel() < value.numel()


def _shape(node: fx.Node) -> torch.Size:
    value: Tensor = node.meta["val"]
    return value.shape


def _call(graph: fx.Graph, target: Any, args: Any, kwargs: Any = None) -> fx.Node:
    """Adds a node, and its example value."""
    node = graph.call_function(target, args, dict(kwargs or {}))
    node.meta["val"] = target(*fx.node.map_arg(args, lambda n: n.meta["val"]), **(kwargs or {}))
    return node


def _fold_constants(graph: fx.GraphModule) -> None:
    """Computes once what depends on no input."""
    known: dict[fx.Node, Any] = {}
    for node in list(graph.graph.nodes):
        if node.op == "get_attr":
            constant = getattr(graph, str(node.target))
            if not isinstance(constant, nn.Parameter):
                known[node] = constant
        elif node.target in _FILLED and _value(node) is not None:
            known[node] = _filled(node)
        elif node.op == "call_function" and all(n in known for n in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    for place, (node, value) in enumerate(known.items()):
        used = any(user not in known for user in node.users)
        if node.op != "get_attr" and used and isinstance(value, Tensor) and _stored(value) <= LARGEST_CONSTANT:
            name = f"_folded{place}"
            graph.register_buffer(name, value.detach(), persistent=False)
            with graph.graph.inserting_before(node):
                folded = graph.graph.get_attr(name)
            folded.meta = dict(node.meta)
            node.replace_all_uses_with(folded)


def _stored(value: Tensor) -> int:
    return value.untyped_storage().nbytes()


def _filled(node: fx.Node) -> Tensor:
    source = node.args[0].meta["val"]  # type: ignore[union-attr]
    value: Tensor = node.target(torch.zeros(source.shape, dtype=source.dtype), *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return value.flatten()[0].clone().expand(value.shape) if value.numel() else value


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
