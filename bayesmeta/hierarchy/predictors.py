"""The predictor of each row, found in a recorded graph: where it is linear in φ, curvature takes one pass over rows.

Most likelihoods see a task's parameters through one number a row, f_n = J_n φ + c_n: the log joint is then
`prior(φ) + Σ_n ℓ_n(f_n)`, its Hessian `∇²prior + Jᵀ diag(ℓ''(f)) J`, which is Gauss–Newton's and exact. The split is
read off the graph's operations; where any of them is not known to allow it, there is none.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bayesmeta.hierarchy.rewriting import alike, example, shape_of

_VIEWS = {"unsqueeze", "squeeze", "reshape", "view", "_unsafe_view", "alias", "clone", "contiguous"}
_ADDITIVE = {"add", "sub", "rsub", "neg"} | _VIEWS
_LINEAR = _ADDITIVE | {"expand", "permute", "transpose", "t", "select", "slice", "split_with_sizes", "split", "unbind"}
_LINEAR |= {"getitem", "sum", "cat", "stack", "flip", "cumsum", "gather", "index", "index_select"}
_LINEAR |= {"_to_copy"}
_BILINEAR = {"mul", "matmul", "mm", "bmm", "mv", "dot", "einsum", "linear", "addmm", "baddbmm"}


@dataclass(frozen=True)
class Predictor:
    """A graph in two: `before (*inputs) -> f` and `after (*inputs, f) -> the graph's value`.

    `before` is affine in one input `(*batch, d)`, and gives `(*batch, *rows)`; `after` sums functions of single rows.
    """

    before: fx.GraphModule
    after: fx.GraphModule


def predictor_of(graph: fx.GraphModule, target: int) -> Predictor | None:
    """Splits a graph of values `(*batch)` at the predictor of the input `target` `(*batch, d)`, if it has one."""
    key = f"predictor of {target}"
    if key not in graph.meta:
        graph.meta[key] = _split(graph, target)
    return graph.meta[key]  # type: ignore[no-any-return]


def _split(graph: fx.GraphModule, target: int) -> Predictor | None:
    nodes = list(graph.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    leaf, (result,) = inputs[target], nodes[-1].args
    shape, value = example(leaf), example(result)
    if shape is None or value is None or value.shape != shape.shape[:-1]:
        return None
    moving = _below(nodes, leaf)
    affine = {leaf}
    for node in nodes:
        if node in moving and _is_affine(node, moving) and affine.issuperset(_parents(node, moving)):
            affine.add(node)
    for node in reversed(nodes):
        if (
            node in affine
            and _rows(node, value.shape) > shape.shape[-1]
            and _is_rowwise(nodes, node, moving, value.dim())
        ):
            return Predictor(_graph(graph, inputs, node, upto=True), _graph(graph, inputs, node, upto=False))
    return None


def _below(nodes: list[fx.Node], start: fx.Node) -> set[fx.Node]:
    """A node and all that depend on it."""
    found = {start}
    for node in nodes:
        if node.op == "call_function" and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _parents(node: fx.Node, moving: set[fx.Node]) -> list[fx.Node]:
    return [parent for parent in node.all_input_nodes if parent in moving]


def _name(node: fx.Node) -> str:
    target: Any = node.target
    return str(getattr(getattr(target, "overloadpacket", target), "__name__", target))


def _is_affine(node: fx.Node, moving: set[fx.Node]) -> bool:
    """Whether an operation is affine in all moving arguments together."""
    name = _name(node)
    if name in ("gather", "index", "index_select"):
        return node.args[0] in moving and len(_parents(node, moving)) == 1
    if name == "where":
        return node.args[0] not in moving
    if name == "div":
        return node.args[0] in moving and node.args[1] not in moving and "rounding_mode" not in node.kwargs
    return name in _LINEAR or (name in _BILINEAR and sum(_occurrences(node, moving)) == 1)


def _occurrences(node: fx.Node, moving: set[fx.Node]) -> list[bool]:
    found: list[bool] = []
    fx.node.map_arg((node.args, node.kwargs), lambda argument: found.append(argument in moving))
    return found


def _rows(node: fx.Node, batch: torch.Size) -> int:
    """How many numbers a task has in a node that begins with the batch; 0 for others."""
    value = example(node)
    if value is None or value.shape[: len(batch)] != batch or not value.is_floating_point():
        return 0
    return value.shape[len(batch) :].numel() if value.dim() > len(batch) else 0


def _is_rowwise(nodes: list[fx.Node], neck: fx.Node, moving: set[fx.Node], batch: int) -> bool:
    """Whether the result is a sum of functions of single numbers of `neck`, and of what does not depend on it."""
    rows: set[Any] = {neck}
    sums: set[Any] = set()
    for node in nodes:
        parents = set(_parents(node, moving)) if node in moving and node is not neck else set()
        if (rows | sums).isdisjoint(parents):
            continue
        if parents <= rows and _is_pointwise(node) and alike(example(node), example(neck)):
            rows.add(node)
        elif (parents <= rows and _sums_rows(node, batch)) or (
            parents.isdisjoint(rows) and _is_additive(node, moving) and _rows(node, shape_of(neck)[:batch]) <= 1
        ):
            sums.add(node)
        else:
            return False
    return nodes[-1].args[0] in sums


def _sums_rows(node: fx.Node, batch: int) -> bool:
    """Whether a node sums everything but the first `batch` dimensions."""
    if _name(node) != "sum" or len(node.args) < 2:
        return False
    arguments: Any = node.args
    shape = shape_of(arguments[0])
    summed = {d % len(shape) for d in arguments[1]}
    return all((d in summed) == (d >= batch) for d in range(len(shape)) if shape[d] > 1)


def _is_additive(node: fx.Node, moving: set[fx.Node]) -> bool:
    name = _name(node)
    return name in _ADDITIVE or (name == "mul" and sum(_occurrences(node, moving)) == 1)


def _is_pointwise(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return False
    packet = getattr(torch.ops.aten, _name(node), None)
    overloads = [] if packet is None else packet.overloads()
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in overloads)


def _graph(graph: fx.GraphModule, inputs: list[fx.Node], neck: fx.Node, *, upto: bool) -> fx.GraphModule:
    """The part of a graph up to a node, or with the node as one more input."""
    made = fx.Graph()
    copies = {node: made.node_copy(node) for node in inputs}
    if not upto:
        copies[neck] = made.placeholder("predictor")
    for node in graph.graph.nodes:
        if node in copies:
            continue
        if node.op == "output":
            made.output(copies[neck] if upto else copies[node.args[0]])
            break
        copies[node] = made.node_copy(node, copies.__getitem__)
    made.eliminate_dead_code()
    return fx.GraphModule(graph, made)
