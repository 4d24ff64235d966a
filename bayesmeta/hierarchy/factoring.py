"""Cholesky factors in recorded graphs: a matrix that has none makes a density 0 instead of ending the run.

Searches and samplers try far points, where a covariance that a model computes (a Gaussian process with a long length
scale) is singular to working precision. Called eagerly, PyTorch raises there; in a graph for many points at once that
would be the end of all of them. An infinite factor gives the log density -inf: the point is one to turn back from.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from bayesmeta.hierarchy.rewriting import describe

aten = torch.ops.aten
_CHECK, _FACTOR = aten._linalg_check_errors.default, aten.linalg_cholesky_ex.default


def factor_anything(graph: fx.GraphModule) -> None:
    """Rewrites a graph in place: no error where there is no factor, but the factor ∞ · I."""
    for node in list(graph.graph.nodes):
        if node.target is _CHECK and _is_factor(node.args[0]):
            graph.graph.erase_node(node)
    found = [node for node in graph.graph.nodes if node.target is _FACTOR]
    if found:
        describe(graph)
    for node in found:
        _replace(graph, node)


def _is_factor(info: Any) -> bool:
    return info.target is operator.getitem and info.args[0].target is _FACTOR


def _replace(graph: fx.GraphModule, node: fx.Node) -> None:
    factors = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
    if not factors:
        return
    value: Tensor = factors[0].meta["val"]
    batch = value.shape[:-2]
    name = f"_no_factor_{node.name}"
    graph.register_buffer(name, torch.full(value.shape[-1:], torch.inf, dtype=value.dtype).diag())
    with graph.graph.inserting_after(factors[0]):
        infinite = graph.graph.get_attr(name)
    infinite.meta["val"] = value.new_empty(value.shape[-2:])
    info = _after(infinite, operator.getitem, (node, 1), value.new_empty(batch, dtype=torch.int32))
    sound = _after(info, aten.eq.Scalar, (info, 0), value.new_empty(batch, dtype=torch.bool))
    for _ in range(2):
        sound = _after(sound, aten.unsqueeze.default, (sound, -1), sound.meta["val"].unsqueeze(-1))
    chosen = _after(sound, aten.where.self, (sound, factors[0], infinite), value)
    for factor in factors:
        factor.replace_all_uses_with(chosen, delete_user_cb=lambda user: user is not chosen)


def _after(node: fx.Node, target: Any, args: Any, value: Tensor) -> fx.Node:
    with node.graph.inserting_after(node):
        added = node.graph.call_function(target, args)
    added.meta["val"] = value
    return added
