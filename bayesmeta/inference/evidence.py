"""The evidence log p(D_i | θ) of all tasks with their parameters integrated out, as a function of θ with its gradient.

Gaussian tasks in closed form; others around their modes: adaptive Gauss–Hermite quadrature in up to three dimensions,
Laplace's approximation beyond. Modes are found by Newton steps that start at the last ones; what has not converged is
never used: the log density is then NaN, which a sampler refuses. Of a task's modes one is integrated around.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.derivatives import curvature
from bayesmeta.inference.collected import Block, Collected
from bayesmeta.inference.exact import log_evidence
from bayesmeta.inference.gaussian import Lower
from bayesmeta.inference.laplace import mirrored
from bayesmeta.inference.newton import Modes, find_modes

logger = logging.getLogger("bayesmeta")

NODES = {1: 11, 2: 9, 3: 7}
"""Quadrature nodes a dimension; more dimensions have Laplace's approximation."""
NEAR = {"quadrature": 1e-3, "Laplace": 3e-5}
"""Newton stops after a step as short as this, in posterior sds: what is left is about its square."""
WOBBLE = 1e-12
"""Relative loss of a log joint in a Newton step that is rounding."""
QUICK_STEPS = 12
"""Undamped Newton steps before the damped search takes over."""
STARTS, LEAST_STARTS, ALL_STARTS = 16, 2, 50_000
"""Draws of the prior from which better modes are looked for, besides the prior's centre and the last modes: at most and
at least for each task, and about how many for all tasks."""
HIGHER = 0.1
"""A mode is better where its log evidence is so much higher."""

CALL_ELEMENTS, COMPILE_ELEMENTS = 40_000, 2**28
"""What a call of a graph that is not compiled and what compiling cost, in rows × points: .3 ms and 2 s."""


class Evidence:
    """Log p(θ) + Σ_i log p(D_i | θ) of all tasks, compiled where that pays.

    Args:
        density: The model, in float64.
        tasks: The tasks.
        kind: "closed form", "quadrature" or "Laplace"; by default `kind_of` of tasks that are not Gaussian.
        calls: About how often it will be called; None if very often.
    """

    def __init__(
        self, density: TaskDensity, tasks: Tasks, *, kind: str | None = None, calls: int | None = None
    ) -> None:
        self._dim = density.structure.task_size
        self.kind = kind_of(self._dim, gaussian=False) if kind is None else kind
        self._collected = collected = Collected(density, tasks, points=points_of(self._dim, self.kind))
        self._blocks = collected.blocks
        self._start = [torch.zeros(block.count, self._dim, dtype=density.dtype) for block in self._blocks]
        self._modes = list(self._start)
        self._generator = torch.Generator().manual_seed(0)
        one = _quadrature(self._dim) if self.kind == "quadrature" else _SMOOTH[self.kind]
        theta = density.initial_theta()

        def examples(block: Block) -> tuple[Tensor, Tensor]:
            return theta, torch.zeros(block.count, self._dim, dtype=density.dtype)

        pays = calls is None or calls * (CALL_ELEMENTS + collected.elements) > COMPILE_ELEMENTS
        make = functools.partial(collected.by_block, examples=examples, compiled=pays)
        self._totals = make(functools.partial(self._summed, one))
        self._steps = [] if self.kind == "closed form" else make(_newton)

    def again(self) -> Evidence:
        """The same function with a memory of modes of its own, for another chain."""
        other = object.__new__(Evidence)
        other.__dict__.update(self.__dict__, _modes=list(self._start))
        return other

    @property
    def elements(self) -> int:
        """Rows × points a task: what one evaluation costs."""
        return self._collected.elements

    @property
    def values(self) -> dict[str, Tensor]:
        """The learned values that the model started with."""
        return self._collected.values

    def __call__(self, theta: Tensor, values: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Log density, its gradient for θ `(d_theta,)` and for the learned values; NaN where modes are missing."""
        found = [self._of_block(place, theta, values) for place in range(len(self._blocks))]
        if len(found) == 1:
            total, gradient, *others = found[0]
        else:
            total, gradient, *others = (torch.stack(parts).sum(0) for parts in zip(*found, strict=True))
        return total, gradient, others

    @property
    def modes(self) -> list[Tensor]:
        """The modes of the tasks at the last θ, block by block; those that are set are where searches start from."""
        return list(self._modes)

    @modes.setter
    def modes(self, modes: Sequence[Tensor]) -> None:
        self._start, self._modes = list(modes), list(modes)

    @property
    def modes_by_task(self) -> Tensor:
        """The same in the order of the tasks, `(T, d)`."""
        return torch.cat(self._modes)[self._collected.order]

    def improve(self, theta: Tensor, values: Sequence[Tensor] = ()) -> bool:
        """Looks from several starts for modes of the tasks with more evidence at θ than the last ones, and takes them.

        Returns:
            Whether there were any.
        """
        if not self._steps:
            return False
        found = [self._improved(place, theta, values) for place in range(len(self._blocks))]
        self.modes = [modes for modes, _ in found]
        return any(better for _, better in found)

    def _improved(self, place: int, theta: Tensor, values: Sequence[Tensor]) -> tuple[Tensor, bool]:
        last = self._modes[place]
        count = max(LEAST_STARTS, min(STARTS, ALL_STARTS // self._collected.count))
        drawn = mirrored(count, *last.shape, dtype=last.dtype, generator=self._generator)
        found = [self._tried(place, start, theta, values) for start in (last, torch.zeros_like(last), *drawn)]
        if found[0] is None:
            return last, False
        ends = [end for end in found if end is not None]
        evidence = torch.cat([torch.where(end.converged, end.log_evidence, -math.inf) for end in ends])
        gain, best = evidence.max(0)
        better = gain > evidence[0] + HIGHER
        loc = torch.cat([end.loc for end in ends])
        return loc[torch.where(better, best, 0), torch.arange(len(last))], bool(better.any())

    def of(self, density: TaskDensity, tasks: Tasks, index: np.ndarray, *, calls: int) -> Evidence:
        """The evidence of some of the tasks, around the modes that they have here; `calls` as at the start."""
        some = Evidence(density, tasks[index], kind=self.kind, calls=calls)
        modes = self.modes_by_task[index]
        placed = torch.empty_like(modes)
        placed[some._collected.order] = modes
        some.modes = placed.split([block.count for block in some._blocks])
        return some

    def _of_block(self, place: int, theta: Tensor, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        modes = self._find(place, theta, values) if self._steps else self._start[place]
        if modes is None:
            return (theta.new_tensor(math.nan), *(torch.zeros_like(leaf) for leaf in (theta, *values)))
        return self._totals[place](theta, modes, *values)  # type: ignore[no-any-return]

    def _summed(
        self, one: Callable[..., Tensor], block: Block, theta: Tensor, modes: Tensor, *leaves: Tensor
    ) -> tuple[Tensor, ...]:
        """Evidence of a block's tasks and its share of the log prior, and the gradients for θ and learned values."""
        learned = len(self._collected.values)
        with torch.enable_grad():
            at = theta.detach().requires_grad_()
            values = [leaf.detach().requires_grad_() for leaf in leaves[len(leaves) - learned :]]
            data = (*leaves[: len(leaves) - learned], *values)
            parts = block.by_piece(one, at, modes.detach(), data)
            prior = self._collected.log_prior(at, values) / len(self._blocks)
            total = prior + torch.stack([part.sum() for part in parts]).sum()
            gradients = torch.autograd.grad(total, [at, *values], materialize_grads=True)
        return total.detach(), *gradients

    def _find(self, place: int, theta: Tensor, values: Sequence[Tensor]) -> Tensor | None:
        """The modes of a block's tasks; None where they are not found."""
        noise, value = self._modes[place], None
        for _ in range(QUICK_STEPS):
            now, moved, length = self._steps[place](theta, noise, *values)
            if not math.isfinite(length) or (value is not None and _lost(value, now)):
                break
            if float(length) < NEAR[self.kind]:
                self._modes[place] = moved
                return moved
            noise, value = moved, now
        return self._search(place, theta, values)

    def _search(self, place: int, theta: Tensor, values: Sequence[Tensor]) -> Tensor | None:
        """The damped search, from the prior's centre or the best modes at an earlier θ."""
        found = self._climbed(place, self._start[place], theta, values)
        if not bool(found.converged.all()):
            return None
        self._modes[place] = found.loc[0]
        return self._modes[place]

    def _tried(self, place: int, start: Tensor, theta: Tensor, values: Sequence[Tensor]) -> Modes | None:
        """Likewise; None where the density cannot be had on the way."""
        try:
            return self._climbed(place, start, theta, values)
        except RuntimeError:  # a matrix that is not positive definite
            return None

    def _climbed(self, place: int, start: Tensor, theta: Tensor, values: Sequence[Tensor]) -> Modes:
        """Where the damped search of a block's tasks ends, `(1, T, …)`."""
        block = self._blocks[place]
        found = block.by_piece(piece_modes, theta, start, [*block.leaves, *values])
        return Modes(*(torch.cat(parts, 1) for parts in zip(*map(astuple, found), strict=True)))


def kind_of(dim: int, *, gaussian: bool) -> str:
    """How tasks with `dim` parameters are integrated."""
    return "closed form" if gaussian else "quadrature" if dim in NODES else "Laplace"


def points_of(dim: int, kind: str = "quadrature") -> int:
    """At how many points the density of a task with `dim` parameters is evaluated at once."""
    if kind == "quadrature" and dim in NODES:
        return NODES[dim] ** dim
    return 2 * dim if kind == "closed form" else dim + 1


def _lost(before: Tensor, now: Tensor) -> bool:
    """Whether a step has lowered a log joint by more than rounding."""
    return bool((now < before - WOBBLE * (1e3 + before.abs())).any())


def _newton(block: Block, theta: Tensor, noise: Tensor, *leaves: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log joints `(T,)`, the points after one Newton step `(T, d)`, and the length of the longest step in sds."""
    parts = block.by_piece(_newton_step, theta, noise, leaves)
    value, moved, length = (torch.cat([part[k] for part in parts]) for k in range(3))
    return value.detach(), moved.detach(), length.amax().detach()


def piece_modes(graph: Callable[..., Any], theta: Tensor, start: Tensor, leaves: Sequence[Tensor]) -> Modes:
    """The modes of a piece's tasks at one θ `(1, T, …)`, by the damped search from `start` `(T, d)`."""

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
    """The gradient is the mean of that of the log joint (Fisher's identity), a quadratic in φ: 2 d points give it."""
    value, gradient, hessian = (part.detach() for part in curvature(graph, 1, theta, noise, *leaves))
    lower = Lower.cholesky(-hessian.movedim((-2, -1), (0, 1)))
    mode = noise + lower.solve_transposed(lower.solve(gradient.movedim(-1, 0))).movedim(0, -1)
    dim = noise.shape[-1]
    axes = math.sqrt(dim) * torch.eye(dim, dtype=noise.dtype)
    joint = _at_nodes(graph, theta, _spread(mode, lower, torch.cat([axes, -axes])), leaves).mean(0)
    return log_evidence(value, gradient, hessian) + (joint - joint.detach())


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
    columns = [
        torch.autograd.grad(part.sum(), noise, create_graph=True, materialize_grads=True)[0]
        for part in gradient.unbind(-1)
    ]
    return value, gradient, torch.stack(columns, -1)


_SMOOTH = {"closed form": _closed, "Laplace": _laplace}


def _quadrature(dim: int) -> Callable[..., Tensor]:
    """Adaptive Gauss–Hermite quadrature with nodes that are held fixed in φ while θ moves.

    References:
        Liu, Pierce: A Note on Gauss-Hermite Quadrature, 1994, https://doi.org/10.1093/biomet/81.3.624
    """
    points, log_weights = nodes(dim)

    def one(graph: Callable[..., Any], theta: Tensor, noise: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        _, _, hessian = curvature(graph, 1, theta, noise, *leaves)
        lower = Lower.cholesky(-hessian.detach().movedim((-2, -1), (0, 1)))
        value = _at_nodes(graph, theta, _spread(noise, lower, points.to(noise.dtype)), leaves)
        bend = (log_weights + 0.5 * points.square().sum(-1)).to(noise.dtype).unsqueeze(-1)
        constant = 0.5 * dim * math.log(2 * math.pi)
        return (value + bend).logsumexp(0) - lower.log_det() + constant

    return one


def _spread(centre: Tensor, lower: Lower, white: Tensor) -> Tensor:
    """Points `(K, d)` of a standard normal as points `(K, T, d)` of normals around `(T, d)` with precisions L Lᵀ."""
    columns = white.mT.unsqueeze(-1).expand(-1, -1, len(centre))
    by_node = Lower([column.unsqueeze(1) for column in lower.columns])
    return centre + by_node.solve_transposed(columns).movedim(0, -1)


def _at_nodes(graph: Callable[..., Any], theta: Tensor, spread: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """Log joints `(K, T)` at `(K, T, d)`; what cannot be mapped is called node by node."""
    if isinstance(graph, torch.fx.GraphModule):
        try:
            return vmap(lambda at: graph(theta, at, *leaves))(spread)
        except (RuntimeError, NotImplementedError) as error:
            logger.info("a graph could not be mapped over quadrature nodes, they run one by one: %s", error)
    return torch.stack([graph(theta, at, *leaves) for at in spread])


def nodes(dim: int) -> tuple[Tensor, Tensor]:
    """Gauss–Hermite nodes `(K, dim)` and log weights `(K,)` of a standard normal."""
    point, weight = np.polynomial.hermite_e.hermegauss(NODES[dim])
    grid = np.array(list(itertools.product(point, repeat=dim)))
    log_weight = np.log(np.array(list(itertools.product(weight / weight.sum(), repeat=dim)))).sum(1)
    return torch.as_tensor(grid), torch.as_tensor(log_weight)
