from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor

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


def test_compiling_leaves_random_numbers_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    compile_graph(traced(wavy, [X]), [X])
    assert bool((torch.get_rng_state() == before).all())
