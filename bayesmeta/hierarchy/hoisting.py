"""Splitting a graph: what depends on data alone is computed once, the rest takes the results as inputs.

A compiled graph with data as inputs serves all data of the same sizes, but computes factorials and masks on every call;
`derivatives.py` takes them out before it compiles.
"""

from __future__ import annotations

import torch
from torch import fx

from bayesmeta.hierarchy.rewriting import example

aten = torch.ops.aten
_VIEWS = {
    aten.expand.default,
    aten.view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.permute.default,
    aten.select.int,
    torch.Tensor.expand,
    torch.reshape,
    torch.unsqueeze,
    torch.squeeze,
    torch.permute,
    torch.select,
}
"""They cost nothing: only what they look at is worth computing beforehand."""


def hoist(graph: fx.GraphModule, varying: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Splits a graph.

    Args:
        graph: Its first `varying` inputs change between calls, the others do not.
        varying: Their number.

    Returns:
        A graph of the fixed inputs that computes a list of tensors, and one of the varying inputs and these tensors
        that computes what `graph` did.
    """
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    fixed = _fixed(graph, inputs[varying:])
    border = [node for node in graph.graph.nodes if node in fixed and _border(node, fixed)]
    return _before(graph, inputs[varying:], fixed, border), _after(graph, inputs[:varying], border)


def _fixed(graph: fx.GraphModule, inputs: list[fx.Node]) -> set[fx.Node]:
    """Nodes that depend on these inputs alone; constants of the graph stay where they are."""
    found = set(inputs)
    for node in graph.graph.nodes:
        parents = node.all_input_nodes
        held = all(parent in found or parent.op == "get_attr" for parent in parents)
        if node.op == "call_function" and parents and held and any(parent in found for parent in parents):
            found.add(node)
    return found


def _border(node: fx.Node, fixed: set[fx.Node]) -> bool:
    """Whether a tensor is handed over: something outside, or a view that leads outside, looks at it."""
    if example(node) is None or node.target in _VIEWS:
        return False
    return any(user not in fixed or _leads_outside(user, fixed) for user in node.users)


def _leads_outside(node: fx.Node, fixed: set[fx.Node]) -> bool:
    viewed = node.target in _VIEWS or example(node) is None
    return viewed and any(user not in fixed or _leads_outside(user, fixed) for user in node.users)


def _before(graph: fx.GraphModule, inputs: list[fx.Node], fixed: set[fx.Node], border: list[fx.Node]) -> fx.GraphModule:
    made, copies = fx.Graph(), {}
    for node in inputs:
        copies[node] = made.placeholder(node.name)
    for node in graph.graph.nodes:
        if (node in fixed and node not in copies) or node.op == "get_attr":
            copies[node] = made.node_copy(node, copies.__getitem__)
    made.output([copies[node] for node in border])
    made.eliminate_dead_code()
    return fx.GraphModule(graph, made)


def _after(graph: fx.GraphModule, inputs: list[fx.Node], border: list[fx.Node]) -> fx.GraphModule:
    made, copies = fx.Graph(), {}
    for node in (*inputs, *border):
        copies[node] = made.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in graph.graph.nodes:
        if node in copies or node.op == "placeholder":
            continue
        if all(parent in copies for parent in node.all_input_nodes):
            copies[node] = made.node_copy(node, copies.__getitem__)
    made.eliminate_dead_code()
    return fx.GraphModule(graph, made)
