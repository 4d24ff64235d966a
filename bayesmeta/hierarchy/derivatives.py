"""Derivatives of recorded graphs as graphs of their own: value, gradient and curvature, simplified and compiled.

`recording.py` and the inference methods that need more than a gradient build their functions here. What cannot be
recorded or compiled runs as it is and gives the same numbers.
"""

from __future__ import annotations

import functools
import logging
import operator
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from bayesmeta.hierarchy.contractions import contract
from bayesmeta.hierarchy.hoisting import hoist
from bayesmeta.hierarchy.simplify import simplify

logger = logging.getLogger("bayesmeta")

TensorFunction = Callable[..., Any]

_COMPILING = threading.RLock()


def value_and_gradient(
    function: TensorFunction, targets: Sequence[int], weights: Sequence[float], *leaves: Tensor
) -> list[Tensor]:
    """The outputs of a function, and the gradient of their weighted sum for the arguments `targets`."""
    at = [leaf.detach().requires_grad_(i in targets) for i, leaf in enumerate(leaves)]
    with torch.enable_grad():
        value = function(*at)
        outputs = pytree.tree_leaves(value)
        terms = [weight * out.sum() for weight, out in zip(weights, outputs, strict=True)]
        total = functools.reduce(operator.add, terms)
        gradients = torch.autograd.grad(total, [at[i] for i in targets], materialize_grads=True)
    return [out.detach() for out in outputs] + list(gradients)


def curvature(function: TensorFunction, target: int, *leaves: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient and Hessian of a function for one argument, differentiable themselves.

    Args:
        function: Maps tensors to values `(*batch)`, each a function of its own vector of the argument.
        target: The position of the argument, `(*batch, d)`.
        *leaves: The arguments.

    Returns:
        `(*batch)`, `(*batch, d)` and `(*batch, d, d)`.
    """
    with torch.enable_grad():
        at = leaves[target] if leaves[target].requires_grad else leaves[target].detach().requires_grad_()
        value = function(*leaves[:target], at, *leaves[target + 1 :])
        (gradient,) = torch.autograd.grad(value.sum(), at, create_graph=True, materialize_grads=True)
        if not gradient.requires_grad:
            return value, gradient, torch.zeros(*at.shape, at.shape[-1], dtype=at.dtype)
        columns = [
            torch.autograd.grad(part.sum(), at, create_graph=True, materialize_grads=True)[0]
            for part in gradient.unbind(-1)
        ]
    return value, gradient, torch.stack(columns, -1)


def record(function: TensorFunction, leaves: Sequence[Tensor], *, compiled: bool = False) -> TensorFunction:
    """Records a function of tensors as a graph for the shapes of `leaves`.

    Args:
        function: Maps tensors to a pytree of tensors; it may differentiate inside.
        leaves: Examples of its arguments.
        compiled: Compile the graph; where that fails it runs as it is, with one line in the log.
    """
    try:
        graph = simplify(make_fx(function)(*leaves))
    except (RuntimeError, NotImplementedError) as error:
        logger.info("derivatives of a graph could not be recorded, autograd computes them: %s", error)
        return function
    return compile_graph(graph, leaves) if compiled else contract(graph).forward


def record_split(function: TensorFunction, varying: Sequence[Tensor], fixed: Sequence[Tensor]) -> TensorFunction:
    """Compiles a function of `varying` and `fixed` tensors; what depends on the fixed ones alone is computed once.

    Args:
        function: Maps `(*varying, *fixed)` to a pytree of tensors; it may differentiate inside.
        varying: Examples of the arguments that calls change.
        fixed: The other arguments.

    Returns:
        A function of the varying arguments.
    """
    try:
        graph = simplify(make_fx(function)(*varying, *fixed))
    except (RuntimeError, NotImplementedError) as error:
        logger.info("derivatives of a graph could not be recorded, autograd computes them: %s", error)
        return lambda *given: function(*given, *fixed)
    before, after = hoist(graph, len(varying))
    known = before(*fixed)
    compiled = compile_graph(after, [*varying, *known])
    return lambda *given: compiled(*given, *known)


def compile_graph(graph: torch.fx.GraphModule, leaves: Sequence[Tensor]) -> TensorFunction:
    """Compiles a graph; without a working compiler the graph itself."""
    try:
        with _COMPILING, warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            compiled = torch._inductor.compile(graph, list(leaves))
            compiled(*leaves)
            return compiled
    except (RuntimeError, OSError, ImportError) as error:
        logger.info("a graph runs uncompiled, the compiler failed: %s", error)
        return contract(graph).forward
