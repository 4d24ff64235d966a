"""Objectives for tasks that pull shared weights different ways: the worst tasks first, or gradients made to agree.

Neither is a prior: they change which weights training ends at, not what a posterior means. Task posteriors given θ and
the weights stay those of the model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.objectives import BY_DRAW, Guides, Info, Objective, Step

SHARPNESS = 2.0
"""How much a nat a row worse raises the log weight of a task."""


def minimax(density: TaskDensity, guides: Guides, step: Step) -> tuple[Tensor, Info]:
    """The negative bound a task, tasks weighted by how badly they do: Σ_i w_i L_i at the worst w near the uniform.

    w maximises Σ_i w_i L_i − KL(w ‖ uniform) / `SHARPNESS` over the simplex, L_i the negative bound a row: a soft
    worst case. The tasks' own posteriors do not depend on it.

    References:
        Sagawa, Koh, Hashimoto, Liang: Distributionally Robust Neural Networks, 2020, https://arxiv.org/abs/1911.08731
    """
    shared, bounds, info = task_bounds(density, guides, step)
    rows = step.context.batch.n.clamp(min=1).to(bounds.dtype)
    weights = torch.softmax(-SHARPNESS * bounds.detach().mean(0) / rows, 0)
    value = shared.mean() + step.tasks * (weights * bounds.mean(0)).sum()
    return -value / step.tasks, info


def pcgrad(density: TaskDensity, guides: Guides, step: Step) -> tuple[Tensor, Info]:
    """The negative bound a task; in the gradient of the trained weights conflicts between tasks are projected out.

    The part of a task's gradient that points against another task's is taken away, against all others in random order.
    One backward pass a task: for few tasks a step.

    References:
        Yu, Kumar, Gupta, Levine, Hausman, Finn: Gradient Surgery for Multi-Task Learning, 2020,
        https://arxiv.org/abs/2001.06782
    """
    shared, bounds, info = task_bounds(density, guides, step)
    each, values = bounds.mean(0), list(guides.values.values())
    scale = step.tasks / len(each)
    value = shared.mean() + scale * each.sum()
    if not values or not torch.is_grad_enabled():
        return -value / step.tasks, info
    gradients = torch.stack([_flat_gradient(one, values) for one in each])
    change = scale * (projected(gradients) - gradients.sum(0))
    pieces = change.split([weight.numel() for weight in values])
    moved = sum(
        ((weight - weight.detach()) * piece.reshape(weight.shape)).sum()
        for weight, piece in zip(values, pieces, strict=True)
    )
    return -(value + moved) / step.tasks, info


def projected(gradients: Tensor) -> Tensor:
    """Sum of the tasks' gradients `(T, P)` without what is in conflict: `(P,)`."""
    total = torch.zeros_like(gradients[0])
    for place, gradient in enumerate(gradients):
        for other in torch.randperm(len(gradients)).tolist():
            against = gradient @ gradients[other]
            if other != place and float(against) < 0:
                gradient = gradient - against / gradients[other].square().sum() * gradients[other]
        total = total + gradient
    return total


def _flat_gradient(value: Tensor, inputs: list[Tensor]) -> Tensor:
    parts = torch.autograd.grad(value, inputs, retain_graph=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def task_bounds(density: TaskDensity, guides: Guides, step: Step) -> tuple[Tensor, Tensor, Info]:
    """Log p(θ) − log q(θ) `(S,)` and log p(φ_i, D_i | θ) − log q(φ_i | D_i, θ) `(S, T)`, draw by draw.

    Parameters of q are held fixed inside log q, as in `objectives.elbo`.
    """
    theta = guides.shared.sample(step.draws)
    posterior = guides.task.condition(theta, step.context)
    noise = posterior.sample()
    log_p = density.log_task.mapped(theta, noise, step.context.data, guides.values, in_dims=BY_DRAW)
    log_prior = density.log_prior(theta, guides.values)
    at = noise.detach().requires_grad_()
    with torch.enable_grad():
        log_q, log_shared = posterior.log_prob(at), guides.shared.log_prob(theta)
        inputs = [at, theta] if theta.requires_grad else [at]
        total = log_q.sum() + log_shared.sum()
        slopes = torch.autograd.grad(total, inputs, retain_graph=True, materialize_grads=True)
    along = log_q.detach() + ((noise - noise.detach()) * slopes[0]).sum(-1)
    shared = log_prior - log_shared.detach()
    if len(slopes) > 1:
        shared = shared - ((theta - theta.detach()) * slopes[1]).sum(-1)
    return shared, log_p - along, {"log_p": log_p, "theta": theta, "noise": noise}


CONFLICTS: dict[str, Objective] = {"minimax": minimax, "pcgrad": pcgrad}
