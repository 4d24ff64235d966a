"""The objectives "predictive" and "predictive-elbo": held-out rows of a hierarchical model, scored through the guide.

Where the ELBO asks for the posterior, these ask for predictions from few rows, as meta-learners train. Learners without
task parameters have theirs in `conditional.py`; `amortized.py` calls these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesmeta.data.batch import Batch
from bayesmeta.data.episodes import Episode
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.objectives import BY_DRAW, Guides, Info, Objective, Step

DEFAULT_CONTEXT = (0, 10)


@dataclass(frozen=True)
class Predictive:
    """-log mean_s p(y_target | θ_s, φ_s), φ_s ~ q(φ | context, θ_s), a task, with KL(q(θ) | p(θ)).

    Args:
        context: Smallest and largest number of rows in a context, drawn uniformly and cut to n - 1.

    References:
        Gordon et al.: Meta-Learning Probabilistic Inference for Prediction, 2019, https://arxiv.org/abs/1805.09921

    Raises:
        ValueError: If not 0 ≤ smallest ≤ largest.
    """

    context: tuple[int, int] = DEFAULT_CONTEXT

    def __post_init__(self) -> None:
        _check_sizes(self.context)

    def __call__(self, density: TaskDensity, guides: Guides, step: Step) -> tuple[Tensor, Info]:
        """The loss of one step, in nats a task.

        Raises:
            ValueError: The likelihood couples the rows of a task or does not mask padding.
        """
        episode = episode_of(density, step, self.context)
        theta = guides.shared.sample(step.draws)
        context = guides.task.prepare(episode.context, density.tensors(episode.context))
        noise = guides.task.condition(theta, context).sample()
        target = density.tensors(episode.target)
        _, log_p = density.log_parts.mapped(theta, noise, target, guides.values, in_dims=BY_DRAW)
        score = log_p.logsumexp(0) - math.log(step.draws)
        loss = _shared_divergence(density, guides, theta) / step.tasks - score.mean(dtype=torch.float64)
        return loss, {"log_p": log_p, "theta": theta, "noise": noise}


@dataclass(frozen=True)
class PredictiveBound:
    """-E_q [log p(y_target | θ, φ)] + KL(q(φ | all rows, θ) | q(φ | context, θ)) a task, with KL(q(θ) | p(θ)).

    φ is drawn from the posterior given all rows, context and target: what is known of a task from its context is the
    prior of the target. It is a bound on the log density of the target that one draw estimates well, where "predictive"
    needs many.

    Args:
        context: As in `Predictive`.

    References:
        Finn, Xu, Levine: Probabilistic Model-Agnostic Meta-Learning, 2018, https://arxiv.org/abs/1806.02817
        Garnelo et al.: Neural Processes, 2018, https://arxiv.org/abs/1807.01622

    Raises:
        ValueError: If not 0 ≤ smallest ≤ largest.
    """

    context: tuple[int, int] = DEFAULT_CONTEXT

    def __post_init__(self) -> None:
        _check_sizes(self.context)

    def __call__(self, density: TaskDensity, guides: Guides, step: Step) -> tuple[Tensor, Info]:
        """The loss of one step, in nats a task.

        Raises:
            ValueError: The likelihood couples the rows of a task or does not mask padding.
        """
        episode = episode_of(density, step, self.context)
        theta = guides.shared.sample(step.draws)
        given = guides.task.condition(theta, guides.task.prepare(episode.context, density.tensors(episode.context)))
        posterior = guides.task.condition(theta, step.context)
        noise = posterior.sample()
        target = density.tensors(episode.target)
        _, log_p = density.log_parts.mapped(theta, noise, target, guides.values, in_dims=BY_DRAW)
        bound = log_p + given.log_prob(noise) - posterior.log_prob(noise)
        loss = _shared_divergence(density, guides, theta) / step.tasks - bound.mean(dtype=torch.float64)
        return loss, {"log_p": log_p, "theta": theta, "noise": noise}


EPISODIC: dict[str, Callable[[tuple[int, int]], Objective]] = {
    "predictive": Predictive,
    "predictive-elbo": PredictiveBound,
}
"""Objectives of a context and a target."""


def _check_sizes(context: tuple[int, int]) -> None:
    if len(context) != 2 or not 0 <= context[0] <= context[1]:
        raise ValueError(f"context: expected sizes (lo, hi) with 0 <= lo <= hi, got {context}")


def _shared_divergence(density: TaskDensity, guides: Guides, theta: Tensor) -> Tensor:
    """KL(q(θ) | p(θ)) from draws."""
    return (guides.shared.log_prob(theta) - density.log_prior(theta, guides.values)).mean()


def episode_of(density: TaskDensity, step: Step, context: tuple[int, int]) -> Episode:
    """The tasks of a step, split at random.

    Raises:
        ValueError: The likelihood couples the rows of a task or does not mask padding.
    """
    if density.structure.exact_size:
        raise ValueError(
            "predictive objectives need rows that are independent given φ, inside batch.observations(); use "
            "objective='elbo' or 'pac-bayes' for this model"
        )
    return split_batch(step.context.batch, context)


def split_batch(batch: Batch, context: tuple[int, int]) -> Episode:
    """Splits the rows of each task at random by masks; every task with rows keeps a target.

    Args:
        batch: Some tasks.
        context: Smallest and largest size of a context.

    Returns:
        Context and target, both with all rows of the batch and masks of their own.
    """
    size = torch.randint(context[0], context[1] + 1, (len(batch),))
    size = torch.minimum(size, (batch.mask.sum(1) - 1).clamp(min=0))
    order = torch.rand(batch.mask.shape).masked_fill(~batch.mask, 2.0).argsort(1)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
    chosen = rank < size.unsqueeze(1)
    return Episode(_masked(batch, chosen), _masked(batch, ~chosen))


def _masked(batch: Batch, keep: Tensor) -> Batch:
    mask = batch.mask & keep
    observed = batch.observed & keep.reshape(*keep.shape, *[1] * (batch.observed.dim() - 2))
    return batch.replace(batch.tensors | {"mask": mask, "observed": observed, "n": mask.sum(1)})
