from __future__ import annotations

import operator

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from bayesmeta.hierarchy import rewriting

aten = torch.ops.aten
X = torch.linspace(0.1, 2.0, 6, dtype=torch.float64).reshape(2, 3)


def named(graph: fx.GraphModule, target: object) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.target == target]


def test_a_step_replaces_the_calls_it_answers_for() -> None:
    graph = make_fx(lambda x: x.exp() + 1.0)(X)

    def doubled(inside: fx.Graph, node: fx.Node) -> fx.Node | None:
        return (
            rewriting.add_call(inside, aten.mul.Tensor, (node.args[0], 2.0))
            if node.target is aten.exp.default
            else None
        )

    rewriting.describe(graph)
    rewriting.rewrite(graph, doubled)
    graph.recompile()
    torch.testing.assert_close(graph(X), 2.0 * X + 1.0)
    (added,) = named(graph, aten.mul.Tensor)
    assert rewriting.shape_of(added) == X.shape and rewriting.alike(rewriting.example(added), X)


def test_equal_calls_are_computed_once_and_signed_zeros_are_told_apart() -> None:
    graph = make_fx(lambda x: x.exp() * x.exp() + (x + 0.0) / (x + -0.0))(X)
    rewriting.merge(graph)
    graph.recompile()
    assert len(named(graph, aten.exp.default)) == 1 and len(named(graph, aten.add.Tensor)) == 3
    torch.testing.assert_close(graph(X), X.exp() ** 2 + 1.0)


def test_what_a_node_is() -> None:
    held = torch.ones(3, dtype=torch.float64)
    graph = make_fx(lambda x: (x.sum(0, keepdim=True).expand(2, 3) + held + torch.rand_like(x)).as_strided((3,), (1,)))(
        X
    )
    (wide,), (random,), (strided,) = (
        named(graph, target) for target in (aten.expand.default, aten.rand_like.default, aten.as_strided.default)
    )
    assert rewriting.is_expanded(wide) and not rewriting.is_expanded(random) and not rewriting.is_expanded(2.0)
    assert rewriting.impure(random) and rewriting.impure(strided) and not rewriting.impure(wide)
    (constant,) = (node for node in graph.graph.nodes if node.op == "get_attr")
    assert torch.equal(rewriting.constant_of(graph, constant), held) and rewriting.constant_of(graph, wide) is None
    assert not named(graph, operator.getitem) and rewriting.example(2.0) is None
