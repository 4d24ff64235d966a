"""Objectives: plain functions `(density, guide, episode) -> (loss, info)`; training knows none of them by name.

The guide is the pair of a shared posterior and a task guide (`Guides`); the loss is minimised and is in nats a task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.exact import ExactTasks
from bayesmeta.inference.gaussian import Pushed
from bayesmeta.inference.protocols import Context, SharedPosterior, TaskGuide, TaskPosterior

Info = Mapping[str, Tensor]
FARTHEST = 5.0
"""Bound on what one draw of a task moves its posterior, in sds."""
BY_DRAW = (0, 0, None, None)
"""The density's arguments θ and noise are mapped over draws, data and learned values are not."""


@dataclass
class Guides:
    """Everything that is learned: q(θ), q(φ | D, θ) and the model's own point estimates."""

    shared: SharedPosterior
    task: TaskGuide
    values: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """What one training step works on.

    Attributes:
        context: Some tasks, encoded.
        tasks: How many there are in all; where held-out tasks are scored, so many that the prior of θ does not count.
        draws: How many θ to draw.
        pieces: The same tasks in pieces of like size, `(positions (T',), data)`: less padding for the density. Empty:
            all at once.
    """

    context: Context
    tasks: int
    draws: int = 8
    pieces: Sequence[tuple[Tensor, dict[str, Tensor]]] = ()


Objective = Callable[[TaskDensity, Guides, Step], tuple[Tensor, Info]]


def elbo(density: TaskDensity, guides: Guides, step: Step) -> tuple[Tensor, Info]:
    """The negative evidence lower bound a task, with the sticking-the-landing gradient.

    Parameters of q are held fixed inside log q, so that the gradient's variance vanishes at the exact posterior. A step
    that sees some of the tasks only has the noise of their choice in any case: there θ follows the slope of the model
    alone, by Fisher's identity. What the guide loses on each task as θ moves would draw θ, times all tasks, to where
    the guide is good, and shrink q(θ) to nothing.

    References:
        Roeder, Wu, Duvenaud: Sticking the Landing, 2017, https://arxiv.org/abs/1703.09194
    """
    theta = guides.shared.sample(step.draws)
    partial = step.tasks > len(step.context.batch.names)
    posterior = guides.task.condition(theta.detach() if partial else theta, step.context)
    if isinstance(posterior, ExactTasks):
        return _evidence(density, guides, step, theta, posterior)
    white, noise = _drawn(posterior)
    log_p, log_joint, gradients = _log_joint(density, guides, step, theta, noise)
    scale = step.tasks / noise.shape[1]
    log_q, held = _log_q(guides, posterior, theta, noise, scale)
    gradients[: len(held)] = [a - b for a, b in zip(gradients, held, strict=False)]
    if white is not None:
        gradients[0] = _bounded(gradients[0], noise, white, scale)
    bound = _Known.apply(log_joint - log_q, gradients, noise, theta, *guides.values.values())
    return -bound / (step.draws * step.tasks), {"log_p": log_p, "theta": theta, "noise": noise}


def _evidence(
    density: TaskDensity, guides: Guides, step: Step, theta: Tensor, posterior: ExactTasks
) -> tuple[Tensor, Info]:
    """The bound where q(φ | D, θ) is exact: the evidence, whose gradient has no noise but that of θ and of the batch.

    It is the mean of the log joint's gradient under q (Fisher's identity), a quadratic in φ: 2 d points give it.
    """
    dim = posterior.loc.shape[-1]
    axes = math.sqrt(dim) * torch.eye(dim, dtype=posterior.loc.dtype)
    white = torch.cat([axes, -axes])[:, None, None].expand(-1, *posterior.loc.shape)
    count, noise = len(white), posterior.push(white).flatten(0, 1)
    log_p, _, (_, by_theta, *others) = _log_joint(density, guides, step, theta.detach().repeat(count, 1), noise)
    log_q = guides.shared.log_prob(theta).sum()
    by_theta = by_theta.unflatten(0, (count, -1)).mean(0)
    if log_q.requires_grad:
        by_theta = by_theta - torch.autograd.grad(log_q, theta, retain_graph=True, materialize_grads=True)[0]
    gradients = [by_theta, *(part / count for part in others)]
    scale = step.tasks / noise.shape[1]
    log_prior = density.log_prior(theta.detach(), guides.values).sum()
    value = scale * posterior.log_evidence.sum() + log_prior - log_q.detach()
    bound = _Known.apply(value, gradients, theta, *guides.values.values())
    return -bound / (step.draws * step.tasks), {"log_p": log_p, "theta": theta, "noise": noise}


def _drawn(posterior: TaskPosterior) -> tuple[Tensor | None, Tensor]:
    """The standard noise, where a posterior is a map of it, and a draw."""
    if not isinstance(posterior, Pushed) or not torch.is_grad_enabled():
        return None, posterior.sample()
    white = torch.randn_like(posterior.example).requires_grad_()
    return white, posterior.push(white)


def _bounded(gradient: Tensor, noise: Tensor, white: Tensor, scale: float) -> Tensor:
    """The gradient for each draw of a task, at most `FARTHEST` sds of its posterior a coordinate.

    It is the difference of two slopes, nothing at the exact posterior. Far from there a few tasks whose data are many
    sds away would outweigh all others. Where no q of the family is exact, draws in the tails count for less than in the
    bound, and q may come out a little wider than the bound's own optimum.
    """
    (steep,) = torch.autograd.grad(noise, white, gradient, retain_graph=True)
    length = steep.norm(dim=-1, keepdim=True) / scale
    return gradient * (FARTHEST * math.sqrt(white.shape[-1]) / length).clamp(max=1.0)


def importance_weighted(density: TaskDensity, guides: Guides, step: Step) -> tuple[Tensor, Info]:
    """The negative importance-weighted bound: the evidence of each task from all draws at one θ.

    References:
        Burda, Grosse, Salakhutdinov: Importance Weighted Autoencoders, 2016, https://arxiv.org/abs/1509.00519
    """
    theta = guides.shared.sample(1)
    log_q_shared = guides.shared.log_prob(theta)
    repeated = theta.expand(step.draws, -1)
    posterior = guides.task.condition(repeated, step.context)
    noise = posterior.sample()
    log_p = density.log_task.mapped(repeated, noise, step.context.data, guides.values, in_dims=(0, 0, None, None))
    log_q = posterior.log_prob(noise)
    evidence = (log_p - log_q).logsumexp(0) - math.log(step.draws)
    shared = (density.log_prior(theta, guides.values) - log_q_shared).squeeze(0)
    value = shared + step.tasks * evidence.mean(dtype=torch.float64)
    return -value / step.tasks, {"log_p": log_p, "theta": theta, "noise": noise}


class _Known(torch.autograd.Function):
    """A number whose gradients with respect to some tensors are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        return None, None, *[gradient * outer[0] for gradient in ctx.gradients]


def _log_joint(
    density: TaskDensity, guides: Guides, step: Step, theta: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The log densities log p(φ_i, D_i | θ) `(S, T)`, J = Σ_s [log p(θ_s) + scale · Σ_i log p(φ_i, D_i | θ_s)], ∇J.

    The gradient is with respect to the noise, θ and the learned values.
    """
    scale = step.tasks / noise.shape[1]
    data = step.pieces[0][1] if step.pieces else step.context.data
    point = noise.detach()[:, step.pieces[0][0]] if step.pieces else noise.detach()
    (log_p, log_prior), (by_theta, by_noise, by_values) = density.log_joint.gradient(
        theta, point, data, guides.values, wrt=(0, 1, 3), in_dims=BY_DRAW, weights=(scale, 1.0)
    )
    others = [by_theta, *by_values.values()]
    if len(step.pieces) > 1:
        log_p, by_noise, others = _more_pieces(density, guides, step, theta, noise, (log_p, by_noise, others))
    total = scale * log_p.sum() + log_prior.sum()
    return log_p, total, [by_noise, *others]


Parts = tuple[Tensor, Tensor, list[Tensor]]


def _more_pieces(density: TaskDensity, guides: Guides, step: Step, theta: Tensor, noise: Tensor, first: Parts) -> Parts:
    """Log densities, gradients for the noise and for the rest of all pieces, tasks in their own order."""
    log_p, by_noise, others = [first[0]], [first[1]], first[2]
    for index, data in step.pieces[1:]:
        value, (by_theta, by_point, by_values) = density.log_task.gradient(
            theta,
            noise.detach()[:, index],
            data,
            guides.values,
            wrt=(0, 1, 3),
            in_dims=BY_DRAW,
            weights=(step.tasks / noise.shape[1],),
        )
        log_p.append(value)
        by_noise.append(by_point)
        others = [a + b for a, b in zip(others, [by_theta, *by_values.values()], strict=True)]
    back = torch.cat([index for index, _ in step.pieces]).argsort()
    return torch.cat(log_p, 1)[:, back], torch.cat(by_noise, 1)[:, back], others


def _log_q(
    guides: Guides, posterior: TaskPosterior, theta: Tensor, noise: Tensor, scale: float
) -> tuple[Tensor, Sequence[Tensor]]:
    """J = Σ_s [log q(θ_s) + scale · Σ_i log q(φ_i | D_i, θ_s)] and ∇J for noise and θ; q's parameters are fixed."""
    at = noise.detach().requires_grad_()
    with torch.enable_grad():
        tasks = scale * posterior.log_prob(at).sum()
        total = tasks + guides.shared.log_prob(theta).sum()
    inputs = [at, theta] if theta.requires_grad else [at]
    return total.detach(), torch.autograd.grad(total, inputs, retain_graph=True, materialize_grads=True)


OBJECTIVES: dict[str, Objective] = {"elbo": elbo, "iw": importance_weighted}
