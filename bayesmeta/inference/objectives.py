"""Objectives: plain functions `(density, guide, episode) -> (loss, info)`; training knows none of them by name.

The guide is the pair of a shared posterior and a task guide (`Guides`); the loss is minimised and is in nats a task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.protocols import Context, SharedPosterior, TaskGuide, TaskPosterior

Info = Mapping[str, Tensor]


@dataclass
class Guides:
    """Everything that is learned: q(θ), q(φ | D, θ) and the model's own point estimates."""

    shared: SharedPosterior
    task: TaskGuide
    values: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """What one training step works on: some tasks, how many there are in all, how many θ to draw."""

    context: Context
    tasks: int
    draws: int = 8


Objective = Callable[[TaskDensity, Guides, Step], tuple[Tensor, Info]]


def elbo(density: TaskDensity, guides: Guides, step: Step) -> tuple[Tensor, Info]:
    """The negative evidence lower bound a task, with the sticking-the-landing gradient.

    Parameters of q are held fixed inside log q, so that the gradient's variance vanishes at the exact posterior.

    References:
        Roeder, Wu, Duvenaud: Sticking the Landing, 2017, https://arxiv.org/abs/1703.09194
    """
    theta = guides.shared.sample(step.draws)
    log_q_shared = guides.shared.log_prob(theta)
    noise = guides.task.condition(theta, step.context).sample()
    log_q = frozen(guides.task, theta, step.context).log_prob(noise)
    log_p = density.log_task.mapped(theta, noise, step.context.data, guides.values, in_dims=(0, 0, None, None))
    per_task = log_p - log_q
    shared = density.log_prior(theta, guides.values) - log_q_shared
    scale = step.tasks / per_task.shape[1]
    value = shared + scale * per_task.sum(1, dtype=torch.float64)
    return -value.mean() / step.tasks, {"log_p": log_p, "theta": theta, "noise": noise}


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
    evidence = (log_p - log_q).logsumexp(0) - torch.log(torch.tensor(float(step.draws)))
    shared = (density.log_prior(theta, guides.values) - log_q_shared).squeeze(0)
    value = shared + step.tasks * evidence.mean(dtype=torch.float64)
    return -value / step.tasks, {"log_p": log_p, "theta": theta, "noise": noise}


def frozen(guide: nn.Module, theta: Tensor, context: Context) -> TaskPosterior:
    """q(φ | D, θ) with the guide's parameters and the encoded data held fixed; the gradient with respect to θ stays."""
    parameters = {name: p.detach() for name, p in guide.named_parameters()}
    return functional_call(guide, parameters, (theta, context.detached()))


OBJECTIVES: dict[str, Objective] = {"elbo": elbo, "iw": importance_weighted}
