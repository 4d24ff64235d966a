"""Tools to rewrite recorded graphs node by node; `simplify.py` and `contractions.py` are made of them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
_EXPANSIONS = (aten.expand.default, Tensor.expand)
_VIEWS: set[Any] = {*_EXPANSIONS, aten.view.default, aten.unsqueeze.default, aten.squeeze.dims, aten.squeeze.dim}
_VIEWS |= {torch.reshape, torch.unsqueeze, torch.squeeze, aten.clone.default, aten._unsafe_view.default}
_LOOKUPS: set[Any] = {aten.gather.default, aten.index.Tensor, aten.index_select.default, aten.embedding.default}
_LOOKUPS |= {torch.gather, torch.index_select}


def describe(graph: fx.GraphModule) -> None:
    """Replaces example values by tensors without storage: those of different recordings cannot be mixed."""
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            node.meta["val"] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def impure(node: fx.Node) -> bool:
    """Whether a node writes into a tensor, draws random numbers or depends on strides."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.op == "call_function" and node.target is not operator.getitem
    if node.target is aten.as_strided.default:
        return True
    random = torch.Tag.nondeterministic_seeded in node.target.tags
    return random or node.target._schema.is_mutable


def example(node: Any) -> Tensor | None:
    """The example value of a node, where it is a tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def alike(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two example values have the same shape and dtype."""
    return a is not None and b is not None and (a.shape, a.dtype) == (b.shape, b.dtype)


def constant_of(graph: Any, node: Any) -> Tensor | None:
    """The tensor that a node of a graph holds."""
    value = getattr(graph, str(node.target)) if isinstance(node, fx.Node) and node.op == "get_attr" else None
    return value if isinstance(value, Tensor) else None


def number_of(argument: Any) -> float | None:
    """A number, given as such or as a constant that is the same everywhere."""
    if isinstance(argument, (int, float)):
        return float(argument)
    constant = constant_of(argument.graph.owning_module, argument) if isinstance(argument, fx.Node) else None
    if constant is None or not constant.is_floating_point() or not constant.numel():
        return None
    if not bool((constant == constant.flatten()[0]).all()):
        return None
    return float(constant.flatten()[0])


def repeated(argument: Any, shape: torch.Size, dims: Sequence[int]) -> Any:
    """What an argument of a pointwise operation on `shape` repeats along `dims`, or a number; None if it does not."""
    number = number_of(argument)
    if number is not None:
        return number
    source = argument.args[0] if is_expanded(argument) else argument
    own = example(source)
    if own is None:
        return None
    missing = len(shape) - own.dim()
    return source if all(d < missing or own.shape[d - missing] == 1 for d in dims) else None


def unmasked(node: Any) -> tuple[Any, Any, Any]:
    """Of what is 0 where a mask says so, and what nothing else uses: the mask, the numbers and the 0; else the node."""
    masked = isinstance(node, fx.Node) and name_of(node) == "where" and len(node.users) == 1 and len(node.args) == 3
    zero = node.args[2] if masked else None
    return node.args if isinstance(zero, fx.Node) and number_of(zero) == 0.0 else (None, node, None)


def name_of(node: fx.Node) -> str:
    """The name of an operation, whether PyTorch's own or a Python binding of it."""
    target: Any = node.target
    return str(getattr(getattr(target, "overloadpacket", target), "__name__", target))


def depending_on(nodes: Sequence[fx.Node], start: Iterable[fx.Node]) -> set[fx.Node]:
    """Some nodes and all that depend on any of them."""
    found = set(start)
    for node in nodes:
        if node.op == "call_function" and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def looked_up(node: fx.Node) -> int:
    """Among how many things a tensor of whole numbers, or a view of it, chooses; 0 where it does not choose.

    What is looked up in a table of constants is a function of a number: that does not count.
    """
    value = example(node)
    if value is None or value.dtype not in (torch.int64, torch.int32):
        return 0
    found = [_choices(user, node) if user.target in _LOOKUPS else 0 for user in node.users]
    return max([0, *found, *(looked_up(user) for user in node.users if user.target in _VIEWS)])


def _choices(node: fx.Node, index: fx.Node) -> int:
    arguments: Any = node.args
    source = arguments[0]
    if source is index or not isinstance(source, fx.Node) or source.op == "get_attr":
        return 0
    if node.target is aten.index.Tensor:
        return shape_of(source)[arguments[1].index(index)]
    return shape_of(source)[0 if node.target is aten.embedding.default else arguments[1]]


def rewrite(graph: fx.GraphModule, step: Callable[[fx.Graph, fx.Node], fx.Node | None]) -> None:
    """Replaces each call for which `step` returns another node; before that, what nothing uses goes away."""
    graph.graph.eliminate_dead_code()
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        with graph.graph.inserting_before(node):
            replacement = step(graph.graph, node)
        if replacement is not None:
            node.replace_all_uses_with(replacement)
            graph.graph.erase_node(node)


def shape_of(node: fx.Node) -> torch.Size:
    """The shape of a node."""
    value: Tensor = node.meta["val"]
    return value.shape


def add_call(graph: fx.Graph, target: Any, args: Any, kwargs: Any = None) -> fx.Node:
    """Adds a node, and its example value."""
    node = graph.call_function(target, args, dict(kwargs or {}))
    node.meta["val"] = target(*fx.node.map_arg(args, lambda n: n.meta["val"]), **(kwargs or {}))
    return node


def merge(graph: fx.GraphModule) -> None:
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


def is_expanded(node: Any) -> bool:
    """Whether a node repeats a smaller tensor."""
    if not isinstance(node, fx.Node) or node.target not in _EXPANSIONS:
        return False
    value, source = example(node), example(node.args[0])
    return value is not None and source is not None and source.numel() < value.numel()
