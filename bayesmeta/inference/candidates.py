"""Weighted draws of task parameters: proposals from the guide, weighed with the model's density.

Proposals are defensive mixtures of the guide, its t(5) version and the prior, with the mixture density in the weights.
The guide itself keeps the weights of a good guide nearly constant (with t(5) alone the evidence of 85 tasks from 8
candidates each has a variance of 2); the t(5) gives the tails that k̂ needs, the prior what the guide has missed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.chunks import task_chunks, theta_chunks
from bayesmeta.inference.exact import ExactTasks
from bayesmeta.inference.gaussian import Pushed
from bayesmeta.inference.objectives import Guides
from bayesmeta.inference.protocols import Context, TaskPosterior

SHARES = {"guide": 0.7, "heavy": 0.2, "prior": 0.1}
"""Mixture weights of every proposal."""
BY_DRAW = (0, 0, None, None)


@dataclass
class Candidates:
    """Draws of all tasks' parameters for S draws of θ.

    Attributes:
        noise: Whitened draws `(S, T, d)`.
        log_weight: log p(φ_i, D_i | θ_s) − log proposal, `(S, T)`; -∞ where that is no number.
    """

    noise: Tensor
    log_weight: Tensor


def propose(density: TaskDensity, guides: Guides, context: Context, theta: Tensor) -> Candidates:
    """One weighted draw for every θ `(S, d_theta)` and task of a batch."""
    posterior = guides.task.condition(theta, context)
    if isinstance(posterior, ExactTasks):
        return Candidates(posterior.sample(), posterior.log_evidence)
    pick = torch.rand(len(theta), len(context.batch.names), dtype=theta.dtype)
    noise = _mixed(posterior, pick < SHARES["heavy"])
    from_prior = (pick > 1 - SHARES["prior"]).unsqueeze(-1)
    noise = torch.where(from_prior, prior_draws(density, guides, context, theta), noise)
    log_prior, log_likelihood = density.log_parts.mapped(theta, noise, context.data, guides.values, in_dims=BY_DRAW)
    light, heavy = _log_probs(posterior, noise)
    log_guide = torch.logaddexp(light + math.log(SHARES["guide"]), heavy + math.log(SHARES["heavy"]))
    log_proposal = torch.logaddexp(log_guide, log_prior + math.log(SHARES["prior"]))
    log_weight = log_prior + log_likelihood - log_proposal
    return Candidates(noise, torch.where(log_weight.isnan(), -math.inf, log_weight))


def _mixed(posterior: TaskPosterior, heavy: Tensor) -> Tensor:
    if isinstance(posterior, Pushed):
        return posterior.mixed(heavy)
    return torch.where(heavy.unsqueeze(-1), posterior.sample(heavy=True), posterior.sample())


def _log_probs(posterior: TaskPosterior, noise: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(posterior, Pushed):
        return posterior.log_probs(noise)
    return posterior.log_prob(noise), posterior.log_prob(noise, heavy=True)


def prior_draws(density: TaskDensity, guides: Guides, context: Context, theta: Tensor) -> Tensor:
    """Draws of the prior given each θ, in whitened coordinates `(S, T, d)`."""
    empty = theta.new_zeros(len(theta), len(context.batch.names), density.structure.task_size)
    if all(site.kind != "moments" for site in density.structure.task):
        return torch.randn_like(empty)
    return density.prior_noise.mapped(theta, empty, context.data, guides.values, in_dims=BY_DRAW)


def candidates(density: TaskDensity, guides: Guides, tasks: Tasks, theta: Tensor) -> Candidates:
    """One weighted draw for every θ `(S, d_theta)` and every task."""
    noise, log_weight = sweep(
        density, guides, tasks, theta, lambda context, part: _pair(propose(density, guides, context, part))
    )
    return Candidates(noise, torch.where(log_weight.isnan(), -math.inf, log_weight))


def guide_draws(density: TaskDensity, guides: Guides, tasks: Tasks, theta: Tensor) -> Tensor:
    """One draw of the guide for every θ and task, unweighted and unchecked: `(S, T, d)`."""
    return sweep(density, guides, tasks, theta, lambda c, part: (guides.task.condition(part, c).sample(),))[0]


def prior_noise(density: TaskDensity, guides: Guides, tasks: Tasks, theta: Tensor) -> Tensor:
    """One draw of the prior for every θ and task: `(S, T, d)`."""
    return sweep(density, guides, tasks, theta, lambda c, part: (prior_draws(density, guides, c, part),))[0]


def _pair(drawn: Candidates) -> tuple[Tensor, Tensor]:
    return drawn.noise, drawn.log_weight


def sweep(
    density: TaskDensity,
    guides: Guides,
    tasks: Tasks,
    theta: Tensor,
    function: Callable[[Context, Tensor], tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    """Runs a function of (context, θ) over all tasks and draws, chunk by chunk: tensors `(S, T, …)`."""
    results: tuple[Tensor, ...] = ()
    with torch.no_grad():
        exact, rounded = density.structure.exact_size, guides.task.rounded
        for chunk in task_chunks(tasks, exact_size=exact, rounded=rounded, draws=len(theta)):
            context = guides.task.prepare(chunk.batch, density.tensors(chunk.batch))
            index = torch.as_tensor(chunk.index)
            for place, part in theta_chunks(theta, chunk.batch, exact_size=exact):
                outputs = function(context, part)
                results = results or tuple(o.new_empty(len(theta), len(tasks), *o.shape[2:]) for o in outputs)
                for result, output in zip(results, outputs, strict=True):
                    result[place, index] = output[: place.stop - place.start, : len(index)]
    return results


def log_evidence(density: TaskDensity, guides: Guides, tasks: Tasks, theta: Tensor, *, per_theta: int) -> Tensor:
    """Estimates log p̂(D_i | θ_s) from `per_theta` candidates each: `(S, T)`."""
    repeated = theta.repeat_interleave(per_theta, 0)
    weights = candidates(density, guides, tasks, repeated).log_weight
    return weights.reshape(len(theta), per_theta, len(tasks)).logsumexp(1) - math.log(per_theta)
