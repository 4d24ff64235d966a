"""Gaussian tasks: recognised by a strict test, then answered in closed form, posterior and evidence.

A task is Gaussian when its log joint density is a quadratic of its whitened parameters. Whitened coordinates do not
cancel as the prior's scale goes to 0. The marginal path and the ladder call this file.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.polynomials import is_polynomial
from bayesmeta.inference.chunks import task_chunks
from bayesmeta.inference.gaussian import GaussianTasks, Lower, cholesky, solve_lower, solve_upper
from bayesmeta.inference.protocols import Context, TaskGuide

RADII = (0.5, 1.0, 2.0, 4.0, 7.0, 10.0, 15.0, 20.0)
"""Distances from the prior's centre, in prior sds, at which a log joint must equal its quadratic; both directions."""
SCATTERED, SCATTERED_WIDELY = 16, 170
"""How often further points are drawn, twice as wide as the prior; and of functions that may not be polynomials."""
INFORMED = 1e-6
"""The least precision that rows add to the prior's in some direction if anything is to be seen of them."""
THETAS = 3
TRIED = 0.3
"""θ at which all tasks are tried are normal around the prior's centre with this sd, in prior units."""
TRIED_TASKS = 64
"""How many tasks a guide tries."""
TOLERANCE = 1e-9
BY_DRAW = (0, 0, None, None)


@dataclass
class ExactTasks(GaussianTasks):
    """Exact posteriors of Gaussian tasks.

    Attributes:
        log_evidence: log p(D_i | θ_s), `(S, T)`.
    """

    log_evidence: Tensor


class ExactGuide(TaskGuide):
    """The closed-form posterior of Gaussian tasks; nothing is trained but the model.

    Args:
        tested: The tasks that it meets are known to be Gaussian; of others it would be wrong.
    """

    method = "exact"
    rounded = True

    def __init__(self, *, tested: bool = False) -> None:
        super().__init__()
        self._tested = tested

    def attach(self, density: TaskDensity, tasks: Tasks) -> None:
        """Keeps the model.

        Raises:
            ValueError: Some of the first tasks are not Gaussian, or the densities are in single precision.
        """
        self._density = density
        if not self._tested and not all_gaussian(density, tasks[:TRIED_TASKS]):
            raise ValueError(
                "guides.Exact: expected tasks whose log joint is quadratic in φ (normal labels, linear in φ, normal "
                "prior, dtype=torch.float64), got others; leave guide= out, or use method='marginal'"
            )

    def condition(self, theta: Tensor, context: Context) -> ExactTasks:
        """p(φ | D, θ) and p(D | θ) of every task for every θ `(S, d_theta)`."""
        origin = theta.new_zeros(len(theta), len(context.batch.names), self._density.structure.task_size)
        return closed_form(*_curvature(self._density, theta, context.data, origin))


def _curvature(
    density: TaskDensity, theta: Tensor, data: dict[str, Tensor], noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return density.log_task.curvature(theta, noise, data, dict(density.learned.values), in_dims=BY_DRAW)


def closed_form(value: Tensor, gradient: Tensor, hessian: Tensor) -> ExactTasks:
    """The Gaussian whose log density at the origin has this value `(*b)`, gradient `(*b, d)` and Hessian."""
    factor = cholesky(-hessian)
    half = solve_lower(factor, gradient)
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    evidence = value + 0.5 * half.square().sum(-1) - log_det + 0.5 * gradient.shape[-1] * math.log(2 * math.pi)
    return ExactTasks(solve_upper(factor.mT, half), factor, evidence)


def log_evidence(value: Tensor, gradient: Tensor, hessian: Tensor) -> Tensor:
    """The evidence of `closed_form` alone, by operations that differentiate and compile well: `(*b)`."""
    lower = Lower.cholesky(-hessian.movedim((-2, -1), (0, 1)))
    half = lower.solve(gradient.movedim(-1, 0))
    constant = 0.5 * gradient.shape[-1] * math.log(2 * math.pi)
    return value + 0.5 * half.square().sum(0) - lower.log_det() + constant


def all_gaussian(density: TaskDensity, tasks: Tasks) -> bool:
    """Whether tasks are Gaussian at θ around the prior's centre."""
    location, scale = density.prior_scale()
    theta = location + TRIED * scale * torch.randn(THETAS, len(location), dtype=density.dtype)
    return bool(are_gaussian(density, tasks, theta).all())


def are_gaussian(density: TaskDensity, tasks: Tasks, theta: Tensor, *, suspected: Tensor | None = None) -> np.ndarray:
    """Which tasks are Gaussian at draws of θ `(S, d_theta)`, `(T,)`.

    The log joint and its gradient must equal the quadratic at the prior's centre to 1e-9 × (1 + the sum of the sizes
    of their terms) at 16 points up to 20 prior sds away, at draws twice as wide as the prior and at those `suspected`
    `(K, T, d)` where another method has found weight, and at 3 θ. A mixture may be quadratic there and not between:
    where operations may make other functions than polynomials there are ten times as many draws, and a task of whose
    rows nothing is to be seen at the prior's centre is none, unless its prior is a point. Densities in float32 are too
    coarse for the test: none of their tasks counts as Gaussian. Nor do those of other priors than normal and flat ones:
    a mixture may have one normal alone near some θ and not near others.
    """
    found = np.zeros(len(tasks), dtype=bool)
    sites = density.structure.task
    if density.dtype != torch.float64 or not sites or any(s.kind != "normal" and not s.improper for s in sites):
        return found
    some = theta[torch.linspace(0, len(theta) - 1, THETAS).long()]
    draws = THETAS * (1 + 2 * len(RADII))
    for chunk in task_chunks(tasks, exact_size=density.structure.exact_size, rounded=True, draws=draws):
        filled = torch.as_tensor(np.pad(chunk.index, (0, len(chunk.batch.names) - len(chunk.index)), "edge"))
        passed = _pass(density, chunk.batch, some, () if suspected is None else suspected[:, filled].split(THETAS))
        found[chunk.index] = passed[: len(chunk.index)]
    return found


def _pass(density: TaskDensity, batch: Batch, theta: Tensor, suspected: Sequence[Tensor]) -> np.ndarray:
    data = density.tensors(batch)
    shape = (len(theta), len(batch.names), density.structure.task_size)
    values = dict(density.learned.values)
    args = (theta[0], theta.new_zeros(shape[1:]), data, values)
    surely = density.log_task.inputs(is_polynomial, *args, eagerly=False)[1]
    curvature = functools.partial(_curvature, density, theta, data)
    with torch.no_grad():
        quadratic = curvature(theta.new_zeros(shape))
        precise = torch.linalg.cholesky_ex(-quadratic[2]).info == 0
        passed = precise.all(0) & _finite(quadratic).all(0)
        unseen = passed & ~_informed(quadratic[2])
        if not surely and bool(unseen.any()):
            passed &= ~unseen | _still(density, theta, data)
        for noise in itertools.chain(_points(shape, theta.dtype, SCATTERED if surely else SCATTERED_WIDELY), suspected):
            if not bool(passed.any()):
                break
            passed &= _agrees(curvature(noise), quadratic, noise)
    return passed.numpy()


def _informed(hessian: Tensor) -> Tensor:
    """Which tasks have rows that are informative in some direction, at all θ, `(T,)`."""
    eye = torch.eye(hessian.shape[-1], dtype=hessian.dtype)
    finite = torch.isfinite(hessian).flatten(-2).all(-1)[..., None, None]
    added = torch.linalg.eigvalsh(torch.where(finite, -hessian, eye) - eye)
    return (added[..., -1] > INFORMED).all(0)


def _still(density: TaskDensity, theta: Tensor, data: dict[str, Tensor]) -> Tensor:
    """Tasks whose values no noise moves at any θ: their prior is a point, `(T,)`."""
    shape = (len(theta), data["mask"].shape[0], density.structure.task_size)
    args = data, dict(density.learned.values)
    zero, one = (
        density.constrain.mapped(theta, theta.new_full(shape, at), *args, in_dims=BY_DRAW) for at in (0.0, 1.0)
    )
    moved = [(one[site.name] - zero[site.name]).abs() / (1 + zero[site.name].abs()) for site in density.structure.task]
    same = [(part <= TOLERANCE).reshape(*shape[:2], -1).all(-1) for part in moved]
    return torch.stack(same).flatten(0, 1).all(0)


def _points(shape: tuple[int, ...], dtype: torch.dtype, scattered: int) -> Iterator[Tensor]:
    """Where tasks are tried, `(S, T, d)` each: on spheres, which in one dimension are two points, and scattered."""
    generator = torch.Generator().manual_seed(0)
    for radius in RADII:
        direction = torch.randn(shape, generator=generator, dtype=dtype)
        step = radius * direction / direction.square().mean(-1, keepdim=True).sqrt()
        yield from (step, -step)
    for _ in range(scattered):
        yield 2 * torch.randn(shape, generator=generator, dtype=dtype)


def _finite(parts: tuple[Tensor, ...]) -> Tensor:
    """Whether all numbers of a θ and task are finite, `(S, T)`."""
    return torch.stack([torch.isfinite(part).reshape(*part.shape[:2], -1).all(-1) for part in parts]).all(0)


def _agrees(at: tuple[Tensor, ...], quadratic: tuple[Tensor, ...], noise: Tensor) -> Tensor:
    """Whether value and gradient at `noise` are those of the quadratic, for each task at all θ: `(T,)`."""
    value, gradient, hessian = quadratic
    bend = (hessian @ noise.unsqueeze(-1)).squeeze(-1)
    expected = value + (noise * (gradient + 0.5 * bend)).sum(-1)
    log_prior = 0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1)
    size = 1 + log_prior + (at[0] + log_prior).abs()
    steep = 1 + gradient.abs().amax(-1) + bend.abs().amax(-1)
    close = (at[0] - expected).abs() <= TOLERANCE * size
    return (close & ((at[1] - gradient - bend).abs().amax(-1) <= TOLERANCE * steep)).all(0)
