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

from bayesmeta.hierarchy.rewriting import alike, depending_on, example, name_of, shape_of

_VIEWS = {"unsqueeze", "squeeze", "reshape", "view", "_unsafe_view", "alias", "clone", "contiguous"}
_ADDITIVE = {"add", "sub", "rsub", "neg"} | _VIEWS
_LINEAR = _ADDITIVE | {"expand", "permute", "transpose", "t", "select", "slice", "split_with_sizes", "split", "unbind"}
_LINEAR |= {"getitem", "sum", "cat", "stack", "flip", "cumsum"}
_OF_FIRST = {"gather", "index", "index_select", "div"}
BILINEAR = {"mul", "matmul", "mm", "bmm", "mv", "dot", "einsum", "linear", "addmm", "baddbmm"}


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
    moving = depending_on(nodes, [leaf])
    affine = _affine(nodes, leaf, moving)
    necks = [node for node in reversed(nodes) if node in affine and _rows(node, value.shape) > shape.shape[-1]]
    neck = next((node for node in necks if _is_rowwise(nodes, node, moving, value.dim())), None)
    return None if neck is None else Predictor(_before(graph, inputs, neck), _after(graph, inputs, neck))


def _parents(node: fx.Node, moving: set[fx.Node]) -> list[fx.Node]:
    return [parent for parent in node.all_input_nodes if parent in moving]


def _affine(nodes: list[fx.Node], leaf: fx.Node, moving: set[fx.Node]) -> set[fx.Node]:
    """Nodes that are affine functions of an input."""
    found = {leaf}
    for node in nodes:
        if node in moving and is_affine(node, moving) and found.issuperset(_parents(node, moving)):
            found.add(node)
    return found


def is_affine(node: fx.Node, moving: set[fx.Node]) -> bool:
    """Whether an operation is affine in all moving arguments together."""
    name = name_of(node)
    if name in _OF_FIRST:
        first = [argument is node.args[0] for argument in _arguments(node)]
        return occurrences(node, moving) == first and "rounding_mode" not in node.kwargs
    if name == "where":
        return node.args[0] not in moving
    if name == "_to_copy":
        return _floating(example(node))
    return name in _LINEAR or (name in BILINEAR and sum(occurrences(node, moving)) == 1)


def _floating(value: torch.Tensor | None) -> bool:
    return value is not None and value.is_floating_point()


def _arguments(node: fx.Node) -> list[fx.Node]:
    """Its node arguments in their order, as often as they stand there."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


def occurrences(node: fx.Node, moving: set[fx.Node]) -> list[bool]:
    """Which of its node arguments are among the moving ones, as often as they stand there."""
    return [argument in moving for argument in _arguments(node)]


def _rows(node: fx.Node, batch: torch.Size) -> int:
    """How many numbers a task has in a node that begins with the batch; 0 for others."""
    value = example(node)
    if value is None or value.shape[: len(batch)] != batch or not value.is_floating_point():
        return 0
    return value.shape[len(batch) :].numel() if value.dim() > len(batch) else 0


def _is_rowwise(nodes: list[fx.Node], neck: fx.Node, moving: set[fx.Node], batch: int) -> bool:
    """Whether the result is a sum of functions of single numbers of `neck`, and of what does not depend on it."""
    below = depending_on(nodes, [neck])
    rows: set[Any] = {neck}
    sums: set[Any] = set()
    for node in (node for node in nodes if node in below and node is not neck):
        parents = set(_parents(node, moving))
        if parents <= rows and _is_pointwise(node) and alike(example(node), example(neck)):
            rows.add(node)
        elif _sums_rows(node, batch) if parents <= rows else _adds_sums(node, rows, moving, shape_of(neck)[:batch]):
            sums.add(node)
        else:
            return False
    return nodes[-1].args[0] in sums


def _sums_rows(node: fx.Node, batch: int) -> bool:
    """Whether a node sums everything but the first `batch` dimensions."""
    if name_of(node) != "sum" or len(node.args) < 2:
        return False
    arguments: Any = node.args
    shape = shape_of(arguments[0])
    summed = {d % len(shape) for d in arguments[1]}
    return all((d in summed) == (d >= batch) for d in range(len(shape)) if shape[d] > 1)


def _adds_sums(node: fx.Node, rows: set[Any], moving: set[fx.Node], batch: torch.Size) -> bool:
    """Whether a node adds what there is one number of for each task, or scales it; it must not look at rows."""
    name = name_of(node)
    additive = name in _ADDITIVE or (name in ("mul", "div", "where") and is_affine(node, moving))
    return additive and rows.isdisjoint(_parents(node, moving)) and _rows(node, batch) <= 1


def _is_pointwise(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return False
    packet = getattr(torch.ops.aten, name_of(node), None)
    overloads = [] if packet is None else packet.overloads()
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in overloads)


def _before(graph: fx.GraphModule, inputs: list[fx.Node], neck: fx.Node) -> fx.GraphModule:
    made, copies = _begun(inputs)
    for node in graph.graph.nodes:
        if node not in copies:
            copies[node] = made.node_copy(node, copies.__getitem__)
        if node is neck:
            break
    made.output(copies[neck])
    made.eliminate_dead_code()
    return fx.GraphModule(graph, made)


def _after(graph: fx.GraphModule, inputs: list[fx.Node], neck: fx.Node) -> fx.GraphModule:
    made, copies = _begun(inputs)
    copies[neck] = made.placeholder("predictor")
    for node in graph.graph.nodes:
        if node not in copies:
            copies[node] = made.node_copy(node, copies.__getitem__)
    made.eliminate_dead_code()
    return fx.GraphModule(graph, made)


def _begun(inputs: list[fx.Node]) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    made = fx.Graph()
    return made, {node: made.node_copy(node) for node in inputs}
