"""The evidence log p(D_i | θ) of all tasks with their parameters integrated out, as a function of θ with its gradient.

Gaussian tasks in closed form; others around their modes: adaptive Gauss–Hermite quadrature in up to three dimensions,
Laplace's approximation beyond. Modes are found by Newton steps that start at the last ones; what has not converged is
never used: the log density is then NaN, which a sampler refuses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from bayesmeta.hierarchy.derivatives import curvature
from bayesmeta.inference.collected import Collected
from bayesmeta.inference.exact import log_evidence
from bayesmeta.inference.gaussian import Lower
from bayesmeta.inference.laplace import Modes, find_modes

NODES = {1: 9, 2: 7, 3: 5}
"""Quadrature nodes a dimension; more dimensions have Laplace's approximation."""
NEAR = {"quadrature": 1e-3, "Laplace": 3e-5}
"""Newton stops after a step as short as this, in posterior sds: what is left is about its square."""
QUICK_STEPS = 12
"""Undamped Newton steps before the damped search takes over."""


class Evidence:
    """Log p(θ) + Σ_i log p(D_i | θ) of all tasks, compiled.

    Args:
        collected: The tasks.
        gaussian: Whether all of them are Gaussian.

    Attributes:
        kind: "closed form", "quadrature" or "Laplace".
    """

    def __init__(self, collected: Collected, *, gaussian: bool) -> None:
        self._collected = collected
        self._dim = collected.density.structure.task_size
        self._start = torch.zeros(collected.count, self._dim, dtype=collected.density.dtype)
        self._modes = self._start
        self.kind = "closed form" if gaussian else "quadrature" if self._dim in NODES else "Laplace"
        self._near = NEAR.get(self.kind, 0.0)
        theta = collected.density.initial_theta()
        one = {"closed form": _closed, "quadrature": _quadrature(self._dim), "Laplace": _laplace}[self.kind]
        self._total = collected.compiled(self._summed(one), theta, self._start)
        self._step = None if gaussian else collected.compiled(self._newton, theta, self._start)

    def again(self) -> Evidence:
        """The same function with a memory of modes of its own, for another chain."""
        other = object.__new__(Evidence)
        other.__dict__.update(self.__dict__)
        other._modes = self._start
        return other

    @property
    def values(self) -> dict[str, Tensor]:
        """The learned values that the model started with."""
        return self._collected.values

    @property
    def dtype(self) -> torch.dtype:
        """Of θ."""
        return self._start.dtype

    def __call__(self, theta: Tensor, values: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Log density, its gradient for θ `(d_theta,)` and for the learned values; NaN where modes are missing."""
        modes = self._start if self._step is None else self._find(theta, values)
        if modes is None:
            return theta.new_tensor(math.nan), torch.zeros_like(theta), [torch.zeros_like(v) for v in values]
        total, gradient, *others = self._total(theta, modes, *values)
        return total, gradient, others

    def _summed(self, one: Callable[..., Tensor]) -> Callable[..., Any]:
        """Log prior and evidence of all tasks, with the gradient for θ and the learned values."""
        collected, learned = self._collected, len(self._collected.values)

        def function(theta: Tensor, modes: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                at = theta.detach().requires_grad_()
                values = [leaf.detach().requires_grad_() for leaf in leaves[len(leaves) - learned :]]
                data = (*leaves[: len(leaves) - learned], *values)
                parts = collected.by_piece(one, at, modes.detach(), data)
                total = collected.log_prior(at, values) + torch.stack([part.sum() for part in parts]).sum()
                gradients = torch.autograd.grad(total, [at, *values], materialize_grads=True)
            return total.detach(), *gradients

        return function

    def _newton(self, theta: Tensor, noise: Tensor, *leaves: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log joints `(T,)`, the points after one Newton step `(T, d)`, and the length of the longest step in sds."""
        parts = self._collected.by_piece(_newton_step, theta, noise, leaves)
        value, moved, length = (torch.cat([part[k] for part in parts]) for k in range(3))
        return value.detach(), moved.detach(), length.amax().detach()

    def _find(self, theta: Tensor, values: Sequence[Tensor]) -> Tensor | None:
        """The modes of all tasks, in the order of the pieces; None where they are not found."""
        noise, value = self._modes, None
        for _ in range(QUICK_STEPS):
            now, moved, length = self._step(theta, noise, *values)  # type: ignore[misc]
            if not bool(torch.isfinite(length)) or (value is not None and bool((now < value - 1e-8).any())):
                break
            if float(length) < self._near:
                self._modes = moved
                return moved
            noise, value = moved, now
        return self._search(theta, values)

    def _search(self, theta: Tensor, values: Sequence[Tensor]) -> Tensor | None:
        """The damped search, from the prior's centre."""
        leaves = [*self._collected.data, *values]
        found = self._collected.by_piece(_piece_modes, theta, self._start, leaves)
        if not all(bool(modes.converged.all()) for modes in found):
            return None
        self._modes = torch.cat([modes.loc[0] for modes in found])
        return self._modes


def _piece_modes(graph: Callable[..., Any], theta: Tensor, start: Tensor, leaves: Sequence[Tensor]) -> Modes:
    def at(noise: Tensor) -> Any:
        parts = curvature(graph, 1, theta, noise[0].detach(), *leaves)
        return tuple(part.detach().unsqueeze(0) for part in parts)

    return find_modes(at, start.unsqueeze(0))


def _newton_step(graph: Callable[..., Any], theta: Tensor, noise: Tensor, leaves: Sequence[Tensor]) -> Any:
    value, gradient, hessian = curvature(graph, 1, theta, noise, *leaves)
    lower = Lower.cholesky(-hessian.movedim((-2, -1), (0, 1)))
    half = lower.solve(gradient.movedim(-1, 0))
    return value, noise + lower.solve_transposed(half).movedim(0, -1), half.square().sum(0).sqrt()


def _closed(graph: Callable[..., Any], theta: Tensor, noise: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    return log_evidence(*curvature(graph, 1, theta, noise, *leaves))


def _laplace(graph: Callable[..., Any], theta: Tensor, noise: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """One Newton step from the mode carries the mode's derivative for θ: the gradient is that of the approximation."""
    _, gradient, hessian = curvature(graph, 1, theta, noise, *leaves)
    lower = Lower.cholesky(-hessian.detach().movedim((-2, -1), (0, 1)))
    moved = noise + lower.solve_transposed(lower.solve(gradient.movedim(-1, 0))).movedim(0, -1)
    return log_evidence(*_at(graph, theta, moved, leaves))


def _at(graph: Callable[..., Any], theta: Tensor, noise: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Curvature at a point that depends on θ itself."""
    value = graph(theta, noise, *leaves)
    (gradient,) = torch.autograd.grad(value.sum(), noise, create_graph=True)
    columns = [torch.autograd.grad(part.sum(), noise, create_graph=True)[0] for part in gradient.unbind(-1)]
    return value, gradient, torch.stack(columns, -1)


def _quadrature(dim: int) -> Callable[..., Tensor]:
    """Adaptive Gauss–Hermite quadrature with nodes that are held fixed in φ while θ moves.

    References:
        Liu, Pierce: A Note on Gauss-Hermite Quadrature, 1994, https://doi.org/10.1093/biomet/81.3.624
    """
    points, log_weights = nodes(dim)

    def one(graph: Callable[..., Any], theta: Tensor, noise: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        _, _, hessian = curvature(graph, 1, theta, noise, *leaves)
        lower = Lower.cholesky(-hessian.detach().movedim((-2, -1), (0, 1)))
        white = points.to(noise.dtype).mT.unsqueeze(-1).expand(-1, -1, len(noise))
        spread = noise + lower.solve_transposed(white).movedim(0, -1)
        value = vmap(lambda at: graph(theta, at, *leaves))(spread)
        bend = (log_weights + 0.5 * points.square().sum(-1)).to(noise.dtype).unsqueeze(-1)
        constant = 0.5 * dim * math.log(2 * math.pi)
        return (value + bend).logsumexp(0) - lower.log_det() + constant

    return one


def nodes(dim: int) -> tuple[Tensor, Tensor]:
    """Gauss–Hermite nodes `(K, dim)` and log weights `(K,)` of a standard normal."""
    point, weight = np.polynomial.hermite_e.hermegauss(NODES[dim])
    grid = np.array(list(itertools.product(point, repeat=dim)))
    log_weight = np.log(np.array(list(itertools.product(weight / weight.sum(), repeat=dim)))).sum(1)
    return torch.as_tensor(grid), torch.as_tensor(log_weight)
