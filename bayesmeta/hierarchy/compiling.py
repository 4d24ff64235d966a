"""Compiled graphs: faster by an order where they are called thousands of times; checked against the graph itself."""

from __future__ import annotations

import contextlib
import logging
import operator
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from bayesmeta.hierarchy.contractions import contract

logger = logging.getLogger("bayesmeta")

TensorFunction = Callable[..., Any]

ROUNDING = {torch.float64: (1e-8, 1e-12), torch.float32: (1e-3, 1e-5)}
"""What a number of a compiled graph may differ by, relative to itself, and to 1 + the largest of its output."""
MOVED = 0.1
"""A compiled graph is compared at its examples, and with up to so much added to all numbers."""

LOW_PRECISION = ("_is_avx512_bf16_supported", "_is_vnni_supported")
"""Questions of `torch.cpu` after instructions that no float graph uses: torch compiles programs to try them out."""

_COMPILING = threading.RLock()
_COMPILER_FAILED = (RuntimeError, OSError, ImportError, AssertionError, AttributeError)


def compile_graph(graph: torch.fx.GraphModule, leaves: Sequence[Tensor]) -> TensorFunction:
    """Compiles a graph, or finds it in torch's cache on disk; without a working compiler the graph itself.

    Compilers make mistakes (torch 2.13 sums some fused, vectorised loops wrongly): what is compiled must give the
    graph's numbers at two points, or it is compiled without vector instructions, or not at all.
    """
    try:
        with _COMPILING, warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            points = _points(graph, leaves)
            expected = _outputs(graph, points)
            for vectors in (True, False):
                compiled = _compiled_anyhow(graph, leaves, {} if vectors else {"cpp.simdlen": 0})
                if all(map(_agree, _outputs(compiled, points), expected)):
                    return compiled
        logger.info("a graph runs uncompiled, the compiled one gives other numbers")
    except _COMPILER_FAILED as error:
        logger.info("a graph runs uncompiled, the compiler failed: %s", error)
    return contract(graph).forward


def _points(function: TensorFunction, leaves: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """The examples, and arguments a little beside them where the function has values there."""
    generator = torch.Generator().manual_seed(0)
    beside = [_moved(leaf, generator) for leaf in leaves]
    try:
        function(*beside)
    except RuntimeError:  # a matrix is no longer positive definite
        return [leaves]
    return [leaves, beside]


def _moved(leaf: Tensor, generator: torch.Generator) -> Tensor:
    """Compiled graphs depend on strides: what is not contiguous stays."""
    if not leaf.is_floating_point() or not leaf.is_contiguous():
        return leaf
    return leaf + MOVED * torch.rand(leaf.shape, dtype=leaf.dtype, generator=generator)


def _outputs(function: TensorFunction, points: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [output for point in points for output in pytree.tree_leaves(function(*point))]


def _agree(one: Tensor, other: Tensor) -> bool:
    """Whether outputs are the same up to rounding, infinities and what is not a number included."""
    if other.dtype not in ROUNDING:
        return torch.equal(one, other)
    finite = torch.isfinite(other)
    if not torch.allclose(one[~finite], other[~finite], equal_nan=True):
        return False
    one, other = one[finite], other[finite]
    relative, least = ROUNDING[other.dtype]
    largest = float(other.abs().max()) if other.numel() else 0.0
    return bool(((one - other).abs() <= relative * other.abs() + least * (1 + largest)).all())


def _compiled_anyhow(graph: torch.fx.GraphModule, leaves: Sequence[Tensor], options: dict[str, Any]) -> TensorFunction:
    with torch._inductor.config.patch(options):
        try:
            return _compiled(graph, leaves, trusted=True)
        except _COMPILER_FAILED:
            _forget_processor()
            return _compiled(graph, leaves, trusted=False)


def _compiled(graph: torch.fx.GraphModule, leaves: Sequence[Tensor], *, trusted: bool) -> TensorFunction:
    """The compiled graph; `trusted`: the vector instructions that the processor names are not tried out (seconds)."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # takes a third of a second, for sympy

    config = torch._inductor.config
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)  # without shapes nothing is cached
    examples: list[Any] = [mode.from_tensor(leaf, static_shapes=True) for leaf in leaves]
    asked = config.cpp.vec_isa_ok
    vectors = {"cpp.vec_isa_ok": True if asked is None and trusted else asked}
    with tracing(TracingContext(mode)), config.patch(vectors), _floats_alone():
        compiled = torch._inductor.compile(_cacheable(graph), examples)
    compiled(*leaves)
    return compiled  # type: ignore[no-any-return]


@contextlib.contextmanager
def _floats_alone() -> Iterator[None]:
    """Low-precision instructions count as missing, so that torch does not try them out (seconds, in cold processes)."""
    known = torch._inductor.cpu_vec_isa.valid_vec_isa_list.cache_info().currsize > 0
    asked = {name: getattr(torch.cpu, name) for name in LOW_PRECISION if hasattr(torch.cpu, name)}
    try:
        for name in asked:
            setattr(torch.cpu, name, lambda: False)
        yield
    finally:
        for name, function in asked.items():
            setattr(torch.cpu, name, function)
        if not known:
            _forget_processor()


def _forget_processor() -> None:
    """Makes torch forget which vector instructions it took for granted."""
    for found in vars(torch._inductor.cpu_vec_isa).values():
        for remembered in vars(found).values() if isinstance(found, type) else [found]:
            if hasattr(remembered, "cache_clear"):
                remembered.cache_clear()


def _cacheable(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The graph as torch's cache takes it, with few inputs: methods as operations, single numbers in the code."""
    copied = torch.fx.Graph()
    copied.output(copied.graph_copy(graph.graph, {}))
    for node in copied.nodes:
        if isinstance(node.target, types.MethodDescriptorType):
            node.target = getattr(torch.ops.aten, node.target.__name__)
        elif node.op == "get_attr":
            _inline(node, operator.attrgetter(node.target)(graph))
    return torch.fx.GraphModule(graph, copied)


def _inline(node: torch.fx.Node, value: Any) -> None:
    """Each tensor that a graph holds is checked at every call; a number costs nothing."""
    if isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point():
        node.op, node.target, node.args = "call_function", torch.ops.aten.full.default, ([], value.item())
        node.kwargs = {"dtype": value.dtype}
