from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bayesmeta.hierarchy import compiling
from bayesmeta.hierarchy.compiling import compile_graph
from bayesmeta.hierarchy.derivatives import traced

X = torch.linspace(0.5, 2.0, 7, dtype=torch.float64)


def wavy(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.sin() * x, x.log().sum()


def broken(wrong: Tensor | float, *, scalar_too: bool) -> Any:
    """A compiler that adds `wrong` to an output of what it compiles for vector instructions, or of everything."""

    def compiled(graph: torch.fx.GraphModule, examples: object) -> Any:
        right = torch._inductor.config.cpp.simdlen == 0 and not scalar_too
        return lambda x: (graph(x)[0], graph(x)[1] + (0.0 if right else wrong))

    return compiled


@pytest.mark.parametrize("wrong", [1e-6, math.nan, math.inf])
def test_a_compiler_that_is_wrong_with_vectors_does_without(monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    monkeypatch.setattr(torch._inductor, "compile", broken(wrong, scalar_too=False))
    found = compile_graph(traced(wavy, [X]), [X])
    assert "compiled" in found.__qualname__
    torch.testing.assert_close(found(X), wavy(X), rtol=0, atol=0)


def test_a_compiler_that_is_wrong_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch._inductor, "compile", broken(1e-6, scalar_too=True))
    with caplog.at_level(logging.INFO, logger="bayesmeta"):
        found = compile_graph(traced(wavy, [X]), [X])
    torch.testing.assert_close(found(X), wavy(X))
    assert "other numbers" in caplog.text


def test_rounding_and_what_is_not_finite_are_no_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor, "compile", broken(1e-14, scalar_too=True))
    assert "compiled" in compile_graph(traced(wavy, [X]), [X]).__qualname__
    below = X - 1.0
    assert "compiled" in compile_graph(traced(wavy, [below]), [below]).__qualname__


@pytest.mark.parametrize(
    ("graph", "leaf"),
    [
        (lambda x: torch.linalg.cholesky(x), torch.full((2, 2), 0.99, dtype=torch.float64) + 0.01 * torch.eye(2)),
        (lambda x: x.exp().sum(1), X[:3, None].expand(3, 4)),
        (lambda x: x > 1.0, X),
    ],
)
def test_what_cannot_be_moved_or_has_no_digits_is_compiled_too(graph: Any, leaf: Tensor) -> None:
    found = compile_graph(traced(lambda x: (graph(x),), [leaf]), [leaf])
    assert "aot" in found.__qualname__
    torch.testing.assert_close(found(leaf)[0], graph(leaf))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ([1e9, 1.0], [1e9, 1.5]),
        ([1e-10], [0.0]),
        ([-math.inf], [5.0]),
        ([math.nan], [5.0]),
        ([math.nan], [0.0]),
        ([math.inf], [-math.inf]),
    ],
)
def test_one_large_number_hides_no_other(
    right: list[float], wrong: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = (torch.tensor(numbers, dtype=torch.float64) for numbers in (right, wrong))
    graph = traced(lambda at: (at * 1.0, at.sum()), [x])
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, examples: lambda at: (y, graph(at)[1]))
    torch.testing.assert_close(compile_graph(graph, [x])(x)[0], x, equal_nan=True)


def test_instructions_that_floats_do_not_use_are_not_tried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each trial is a program that torch compiles and a process that loads it."""
    tried: list[str] = []
    vectors = torch._inductor.cpu_vec_isa
    monkeypatch.setattr(vectors.VecISA, "check_build", lambda self, code: tried.append(code) or False)
    for name in compiling.LOW_PRECISION:
        monkeypatch.setattr(torch.cpu, name, lambda: True)
    compiling._forget_processor()
    compiled = compile_graph(traced(wavy, [X]), [X])
    assert not tried and all(getattr(torch.cpu, name)() for name in compiling.LOW_PRECISION)
    assert vectors.valid_vec_isa_list.cache_info().currsize == 0  # what others compile has the processor as it is
    torch.testing.assert_close(list(compiled(X)), list(wavy(X)))


@pytest.mark.parametrize("value", [0.1, -math.inf, 1e300, -0.0, math.nan])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_single_numbers_of_a_graph_are_compiled_into_it(
    monkeypatch: pytest.MonkeyPatch, value: float, dtype: torch.dtype
) -> None:
    """Vectors stay inputs, whose sizes torch checks at every call."""
    number, vector, given = torch.tensor(value, dtype=dtype), torch.arange(7).to(dtype), []
    inputs = torch._inductor.compile

    def spy(graph: torch.fx.GraphModule, examples: object) -> Any:
        given.extend(node.target for node in graph.graph.nodes if node.op == "get_attr")
        return inputs(graph, examples)

    monkeypatch.setattr(torch._inductor, "compile", spy)
    graph = traced(lambda x: (x * number, torch.where(x < 1, x, number), torch.copysign(x, number), x + vector), [X])
    found = compile_graph(graph, [X])
    assert len(given) == 1
    for one, other in zip(found(X), graph(X), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-15, atol=0, equal_nan=True)


def test_compiling_leaves_random_numbers_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    compile_graph(traced(wavy, [X]), [X])
    assert bool((torch.get_rng_state() == before).all())
