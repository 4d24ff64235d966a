"""One network for all data sets that a model can produce: a task guide trained on simulations, θ at its prior.

Each simulated task has its own θ, and the guide is trained at that θ: at an independent one, as in a fit, most pairs of
θ and data would be absurd. `calibration.py` calls it; `alone.py` infers data sets with it.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from bayesmeta.checks.simulations import BY_TASK, Simulated
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.amortized import Amortized, fit_amortized
from bayesmeta.inference.objectives import Guides, Info, Step
from bayesmeta.inference.shared import PriorShared

PAIRS = 64
"""Tasks a step, each with its own θ: the guide conditions every task on every θ, only pairs are used."""
STEPS = 2000
MAX_GRADIENT = 10.0
"""Bound on the gradient of a pair, in prior sds: tiny scales give huge ones. At the exact posterior all are 0."""


def train_encoder(density: TaskDensity, simulated: Simulated, options: Amortized, *, progress: bool = False) -> Guides:
    """Trains the guide that the options describe on simulated tasks; their q(θ) and objective are not used.

    Args:
        density: The model.
        simulated: Tasks, each simulated from its own θ ~ p(θ).
        options: Guide and optimizer; without steps of its own, `STEPS`.
        progress: Whether to show a bar.
    """
    theta = dict(zip(simulated.tasks.names, simulated.theta, strict=True))
    steps = options.optimizer.steps or STEPS
    optimizer = replace(options.optimizer, steps=steps, batch_tasks=min(PAIRS, options.optimizer.batch_tasks))
    own = replace(options, objective=functools.partial(paired_elbo, theta), context=None, optimizer=optimizer)
    prior = PriorShared(density)
    return fit_amortized(density, simulated.tasks, own, progress=progress, shared=prior)[0]


def paired_elbo(theta_of: dict[str, Tensor], density: TaskDensity, guides: Guides, step: Step) -> tuple[Tensor, Info]:
    """The negative bound of log p(D_i | θ_i) a task, each task at its own θ, with the sticking-the-landing gradient.

    References:
        Roeder, Wu, Duvenaud: Sticking the Landing, 2017, https://arxiv.org/abs/1703.09194
    """
    context = step.context
    theta = torch.stack([theta_of[name] for name in context.batch.names])
    posterior = guides.task.condition(theta, context)
    noise = posterior.sample()
    at = noise.detach().requires_grad_()
    with torch.enable_grad():
        log_q = _pairs(posterior.log_prob(at))
    (by_noise,) = torch.autograd.grad(log_q.sum(), at, retain_graph=True)
    point = _pairs(noise)
    data = {name: tensor.unsqueeze(1) for name, tensor in context.data.items()}
    args = (theta, point.detach().unsqueeze(1), data, guides.values)
    log_p, (gradient,) = density.log_task.gradient(*args, wrt=(1,), in_dims=BY_TASK)
    gradient = _bounded(gradient.squeeze(1) - _pairs(by_noise))
    moved = ((point - point.detach()) * gradient).sum(-1)
    bound = (log_p.squeeze(1) - log_q).detach() + moved
    return -bound.mean(), {}


def _pairs(values: Tensor) -> Tensor:
    """The values of each task at its own θ: `(T, T, …)` -> `(T, …)`."""
    index = torch.arange(len(values))
    return values[index, index]


def _bounded(gradient: Tensor) -> Tensor:
    """Gradients `(T, d)` of at most `MAX_GRADIENT`; one that is not finite counts for nothing."""
    gradient = torch.where(torch.isfinite(gradient).all(-1, keepdim=True), gradient, 0.0)
    return gradient * (MAX_GRADIENT / gradient.norm(dim=-1, keepdim=True).clamp(min=MAX_GRADIENT))
