"""Derivatives of recorded graphs as graphs of their own: value, gradient and curvature, simplified.

`recording.py` and the inference methods that need more than a gradient build their functions here. What cannot be
recorded or compiled runs as it is and gives the same numbers.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from bayesmeta.hierarchy.compiling import compile_graph
from bayesmeta.hierarchy.contractions import contract
from bayesmeta.hierarchy.hoisting import hoist
from bayesmeta.hierarchy.predictors import Predictor, predictor_of
from bayesmeta.hierarchy.simplify import simplify

logger = logging.getLogger("bayesmeta")

TensorFunction = Callable[..., Any]

BY_COLUMN = 3
"""Up to this dimension a Hessian is recorded column by column."""


def traced(
    function: TensorFunction, examples: Sequence[Tensor], table: dict[Any, TensorFunction] | None = None
) -> torch.fx.GraphModule:
    """The flat graph of a function of tensors.

    Example values of all nodes share one mode: one for each node would take most of the time, and could not be mixed.

    Args:
        function: Maps tensors to a pytree of tensors.
        examples: Its arguments.
        table: Decompositions of operations.
    """
    with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
        return make_fx(function, decomposition_table=table)(*examples)


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
        function: Maps tensors to values `(*batch)`, each a function of its own vector of the argument. In a graph whose
            rows have a linear predictor (`predictors.py`) the Hessian is Gauss–Newton's.
        target: The position of the argument, `(*batch, d)`.
        *leaves: The arguments.

    Returns:
        `(*batch)`, `(*batch, d)` and `(*batch, d, d)`.
    """
    with torch.enable_grad():
        at = leaves[target] if leaves[target].requires_grad else leaves[target].detach().requires_grad_()
        leaves = (*leaves[:target], at, *leaves[target + 1 :])
        found = predictor_of(function, target) if isinstance(function, torch.fx.GraphModule) else None
        if found is not None:
            return _by_predictor(found, target, *leaves)
        value = function(*leaves)
        (gradient,) = torch.autograd.grad(value.sum(), at, create_graph=True, materialize_grads=True)
        return value, gradient, _columns(gradient, at)


def _by_predictor(parts: Predictor, target: int, *leaves: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """∇²prior + Jᵀ diag(ℓ'') J: one pass over the rows for ℓ'', however many columns the Hessian has."""
    at = leaves[target]
    rows = parts.before(*leaves)
    own = at.view_as(at)  # so that the two ways by which the value depends on it are told apart
    value = parts.after(*leaves[:target], own, *leaves[target + 1 :], rows)
    gradient, prior, slope = torch.autograd.grad(
        value.sum(), [at, own, rows], create_graph=True, materialize_grads=True
    )
    bend = torch.zeros_like(rows)
    if slope.requires_grad:
        (bend,) = torch.autograd.grad(slope.sum(), rows, create_graph=True, materialize_grads=True)
    jacobian = _jacobian(rows, at).flatten(at.dim() - 1, -2)
    bent = bend.flatten(at.dim() - 1).unsqueeze(-1) * jacobian
    return value, gradient, _columns(prior, own) + bent.mT @ jacobian


def _jacobian(rows: Tensor, at: Tensor) -> Tensor:
    """Of an affine function `(*batch, *rows)` of `(*batch, d)`, from its adjoint: `(*batch, *rows, d)`."""
    probe = torch.zeros_like(rows).requires_grad_()
    (adjoint,) = torch.autograd.grad(rows, at, probe, create_graph=True, materialize_grads=True)
    return _columns(adjoint, probe)


def _columns(gradient: Tensor, at: Tensor) -> Tensor:
    """Derivatives of `(*batch, d)` for a tensor, `(*at.shape, d)`: one by one, many at once in a smaller graph."""
    dim = gradient.shape[-1]
    if not gradient.requires_grad:
        return torch.zeros(*at.shape, dim, dtype=at.dtype)
    if dim <= BY_COLUMN:
        parts = (
            torch.autograd.grad(part.sum(), at, create_graph=True, materialize_grads=True)
            for part in gradient.unbind(-1)
        )
        return torch.stack([column for (column,) in parts], -1)
    basis = torch.eye(dim, dtype=at.dtype).reshape(dim, *[1] * (gradient.dim() - 1), dim).expand(dim, *gradient.shape)
    (rows,) = torch.autograd.grad(gradient, at, basis, create_graph=True, materialize_grads=True, is_grads_batched=True)
    return rows.movedim(0, -1)


class Prepared:
    """A function of varying tensors and of others, recorded; what depends on the others alone is computed once for all.

    Args:
        function: Maps `(*varying, *others)` to a pytree of tensors; it may differentiate inside.
        varying: Examples of the arguments that calls change.
        others: Examples of those that stay.
        recordable: Whether it may be recorded; otherwise, and where that fails, it runs as it is.
        compiled: Compile what is left to compute.
    """

    def __init__(
        self,
        function: TensorFunction,
        varying: Sequence[Tensor],
        others: Sequence[Tensor],
        *,
        recordable: bool = True,
        compiled: bool = False,
    ) -> None:
        self._prepare: Callable[..., Sequence[Tensor]] = lambda *fixed: fixed
        self._function = function
        graph = _recorded(function, [*varying, *others]) if recordable else None
        if graph is not None:
            before, after = hoist(graph, len(varying))
            self._prepare = contract(before).forward
            examples = [*varying, *self._prepare(*others)]
            self._function = compile_graph(after, examples) if compiled else contract(after).forward

    def of(self, others: Sequence[Tensor]) -> TensorFunction:
        """The function of the varying arguments with these others."""
        function, known = self._function, self._prepare(*others)
        return lambda *given: function(*given, *known)


def record(function: TensorFunction, leaves: Sequence[Tensor], *, compiled: bool = False) -> TensorFunction:
    """Records a function of tensors as a graph for the shapes of `leaves`.

    Args:
        function: Maps tensors to a pytree of tensors; it may differentiate inside.
        leaves: Examples of its arguments.
        compiled: Compile the graph; where that fails it runs as it is, with one line in the log.
    """
    graph = _recorded(function, leaves)
    if graph is None:
        return function
    return compile_graph(graph, leaves) if compiled else contract(graph).forward


def _recorded(function: TensorFunction, leaves: Sequence[Tensor]) -> torch.fx.GraphModule | None:
    try:
        return simplify(traced(function, leaves))
    except (RuntimeError, NotImplementedError) as error:
        logger.info("derivatives of a graph could not be recorded, autograd computes them: %s", error)
        return None
