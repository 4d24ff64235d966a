"""Derivatives of recorded graphs against autograd's own and against formulas; what fails runs as it is."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from bayesmeta.hierarchy import derivatives
from bayesmeta.hierarchy.derivatives import compile_graph, curvature, record, traced, value_and_gradient


def wavy(x: Tensor, y: Tensor) -> Tensor:
    """A value for every vector of y `(b, d)`; x `(b,)` shifts it."""
    return (y.sin() * y.flip(-1).exp()).sum(-1) + x * y.prod(-1)


def arguments(dim: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(dim)
    x, y = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((4,), (4, dim)))
    return x, y


def test_value_and_gradient_of_a_weighted_sum() -> None:
    x, y = arguments(3)
    first, second, by_y, by_x = value_and_gradient(lambda a, b: (a * b, b**3), (1, 0), (2.0, 5.0), x[:3], y[0])
    torch.testing.assert_close(first, x[:3] * y[0])
    torch.testing.assert_close(second, y[0] ** 3)
    torch.testing.assert_close(by_y, 2 * x[:3] + 15 * y[0] ** 2)
    torch.testing.assert_close(by_x, 2 * y[0])


@pytest.mark.parametrize("dim", [1, 3, 4, 9])
def test_curvature_column_by_column_and_at_once(dim: int) -> None:
    x, y = arguments(dim)
    recorded = record(lambda *leaves: curvature(wavy, 1, *leaves), (x, y))
    for found in (curvature(wavy, 1, x, y), recorded(x, y)):
        for i in range(4):
            one = lambda z, i=i: wavy(x[i], z)  # noqa: E731
            torch.testing.assert_close(found[0][i].detach(), one(y[i]))
            torch.testing.assert_close(found[1][i].detach(), torch.func.grad(one)(y[i]))
            torch.testing.assert_close(found[2][i].detach(), torch.func.jacrev(torch.func.grad(one))(y[i]))


@pytest.mark.parametrize("dim", [2, 5])
def test_curvature_can_be_differentiated(dim: int) -> None:
    x, y = arguments(dim)
    y = y.requires_grad_()
    _, _, hessian = curvature(lambda x, y: x * (y**4).sum(-1), 1, x, y)
    (third,) = torch.autograd.grad(hessian.sum(), y)
    torch.testing.assert_close(third, 24 * x.unsqueeze(-1) * y)


def test_a_linear_function_has_no_curvature() -> None:
    x, y = arguments(2)
    value, gradient, hessian = curvature(lambda x, y: x * y.sum(-1), 1, x, y)
    torch.testing.assert_close(gradient, x.unsqueeze(-1).expand(4, 2))
    assert hessian.shape == (4, 2, 2) and bool((hessian == 0).all()) and value.shape == (4,)


def test_example_values_share_one_mode() -> None:
    """They could not be mixed otherwise, as rewriting graphs does."""
    x, y = arguments(3)
    graph = traced(wavy, (x, y))
    modes = {id(node.meta["val"].fake_mode) for node in graph.graph.nodes if isinstance(node.meta.get("val"), Tensor)}
    assert len(modes) == 1
    torch.testing.assert_close(graph(x, 2 * y), wavy(x, 2 * y))


def test_what_cannot_be_recorded_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    def branching(x: Tensor, y: Tensor) -> Tensor:
        return wavy(x, y) if float(y.sum()) > 0 else -wavy(x, y)

    x, y = arguments(2)
    with caplog.at_level(logging.INFO, logger="bayesmeta"):
        found = record(branching, (x, y))
    assert found is branching and "could not be recorded" in caplog.text


def test_without_a_compiler_the_graph_runs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def missing(*args: object) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch._inductor, "compile", missing)
    x, y = arguments(2)
    with caplog.at_level(logging.INFO, logger="bayesmeta"):
        found = record(wavy, (x, y), compiled=True)
    torch.testing.assert_close(found(x, 3 * y), wavy(x, 3 * y))
    assert "no compiler here" in caplog.text and derivatives.BY_COLUMN >= 1


def test_what_an_earlier_process_compiled_is_found_but_other_constants_are_another_graph() -> None:
    x = torch.arange(5, dtype=torch.float64)
    for shift in (1.0, 2.0, 1.0):
        constant = torch.full((5,), shift, dtype=torch.float64)
        graph = traced(functools.partial(lambda c, at: (at.expand(3, 5) * c,), constant), [x])
        hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
        torch.testing.assert_close(compile_graph(graph, [x])(x)[0], (x * constant).expand(3, 5))
    assert counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"] > hits


COMPILER = """#!/bin/sh
for given in "$@"; do case "$given" in *avx*|*AVX*|*amx*) exit 1;; esac; done
exec c++ "$@"
"""
USER = """
import torch
from bayesmeta.hierarchy.derivatives import compile_graph, traced
x = torch.linspace(0, 1, 64, dtype=torch.float64)  # the cosine of a large exp is another on every processor
graph = traced(lambda at: (at.sin() + at.exp().cos(),), [x])
compiled = compile_graph(graph, [x])
assert "aot" in compiled.__qualname__, compiled
torch.testing.assert_close(compiled(x)[0], graph(x)[0])
torch.testing.assert_close(torch.compile(lambda at: at.sin() + 1)(x), x.sin() + 1)
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_where_the_processor_promises_too_much_graphs_and_users_functions_are_compiled(tmp_path: Path) -> None:
    compiler = tmp_path / "poor-c++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    env = os.environ | {"CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", USER], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
