"""Cholesky factors in recorded graphs: a matrix that has none makes a density 0 instead of ending the run.

Searches and samplers try far points, where a covariance that a model computes (a Gaussian process with a long length
scale) is singular to working precision. Called eagerly, PyTorch raises there; in a graph for many points at once that
would be the end of all of them. A factor that only a normal density reads becomes infinite, so that the log density is
-inf: the point is one to turn back from. Any other becomes NaN: an infinite one times noise, say, would be latent
values with which the labels of a classifier are sure. Gradients of the other points do not notice.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from bayesmeta.hierarchy.rewriting import describe

aten = torch.ops.aten
_CHECK, _FACTOR = aten._linalg_check_errors.default, aten.linalg_cholesky_ex.default
_VIEWS: set[Any] = {aten.view.default, aten.expand.default, aten.unsqueeze.default, aten.clone.default}
_VIEWS |= {aten.transpose.int, aten.permute.default, aten.t.default, aten.detach.default, aten.alias.default}
_READ: dict[Any, int] = {
    aten.linalg_solve_triangular.default: 0,
    aten.cholesky_solve.default: 1,
    aten.diagonal.default: 0,
}
"""What a log density does with a factor, and which argument that is."""


def unchecked() -> dict[Any, Any]:
    """The decomposition with which a graph is recorded wherever it is called first, also where there is no factor."""
    return {_CHECK: lambda *_, **__: None}


def factor_anything(graph: fx.GraphModule) -> None:
    """Rewrites a graph in place: where there is no factor it is ∞ · I, or NaN."""
    found = [node for node in graph.graph.nodes if node.target is _FACTOR]
    if found:
        describe(graph)
    for node in found:
        _replace(graph, node)


def _replace(graph: fx.GraphModule, node: fx.Node) -> None:
    """What has no factor is replaced before it is factored, too: the gradient of a failed factor is NaN."""
    factors = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
    if not factors:
        return
    value: Tensor = factors[0].meta["val"]
    identity = torch.eye(value.shape[-1], dtype=value.dtype)
    without = torch.full_like(identity, torch.nan)
    if all(_only_for_density(factor) for factor in factors):
        without = torch.full_like(identity[0], torch.inf).diag()
    with graph.graph.inserting_before(node.next):
        sound = _sound(graph, node, value.new_empty(value.shape[:-2], dtype=torch.int32))
        held = (sound, node.args[0], _constant(graph, f"_identity_{node.name}", identity))
        safe = _call(graph, aten.where.self, held, value)
        again = graph.graph.call_function(_FACTOR, (safe, *node.args[1:]), node.kwargs)
        factor = _call(graph, operator.getitem, (again, 0), value)
        held = (sound, factor, _constant(graph, f"_no_factor_{node.name}", without))
        chosen = _call(graph, aten.where.self, held, value)
    for factor in factors:
        factor.replace_all_uses_with(chosen)


def _sound(graph: fx.GraphModule, node: fx.Node, info: Tensor) -> fx.Node:
    """Which matrices have a factor, `(…, 1, 1)`."""
    place = _call(graph, operator.getitem, (node, 1), info)
    sound = _call(graph, aten.eq.Scalar, (place, 0), info.bool())
    for _ in range(2):
        sound = _call(graph, aten.unsqueeze.default, (sound, -1), sound.meta["val"].unsqueeze(-1))
    return sound


def _only_for_density(factor: fx.Node) -> bool:
    """Whether a factor is solved with and has the logarithm of its diagonal taken, both, and nothing else."""
    uses = list(_uses(factor))
    if any(use.target not in _READ or use.args[_READ[use.target]] is not seen for use, seen in uses):
        return False
    diagonals = [use for use, _ in uses if use.target is aten.diagonal.default]
    logs = all(user.target is aten.log.default for diagonal in diagonals for user in diagonal.users)
    return logs and 0 < len(diagonals) < len(uses)


def _uses(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """What uses a node or a view of it, and that view."""
    for user in node.users:
        if user.target in _VIEWS:
            yield from _uses(user)
        else:
            yield user, node


def _constant(graph: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    graph.register_buffer(name, value)
    node = graph.graph.get_attr(name)
    node.meta["val"] = value.to("meta")
    return node


def _call(graph: fx.GraphModule, target: Any, args: Any, value: Tensor) -> fx.Node:
    node = graph.graph.call_function(target, args)
    node.meta["val"] = value
    return node
