"""Markov chains for the tasks that no proposal fits: Hamiltonian transitions of many chains at once.

Known tasks have one chain at each draw of θ, so that θ stays integrated over. New tasks have a population of pairs
(θ, φ) that moves from the prior to the posterior by tempering, which also finds the weights of separate modes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bayesmeta.inference import psis

TARGET = 0.8
"""Acceptance that step sizes are tuned to."""
LOWEST, HIGHEST = 0.6, 0.99
"""Acceptance outside of which chains are not trusted: too high, and they stand still because their steps are tiny."""
TUNING = 15
ROUNDS = (10, 20, 40, 80, 160)
"""Transitions between two looks at the chains: as many as all before, so that a slow drift shows."""
LEAST = 40
"""Rounds shorter than this only adapt: they are too short to show a drift."""
STUCK = 0.01
"""Share of the chains that may stay where they are for a whole round."""
SHORTEST = 0.02
"""Each chain's step is the tuned one times a factor between this and 1, log-uniform: necks need shorter steps."""
LEAPS = (3, 9)
"""Leapfrog steps of a transition, drawn uniformly."""
LARGEST_ERROR = 0.1
"""Of the means and sds of tempered particles, in sds: beyond it chance has weighed modes and necks."""
DRIFT = 4.0
"""Chains drift if the mean or the mean square of a coordinate moves by so many standard errors in a round."""
ALIVE = 0.5
"""Relative effective sample size that every step of tempering keeps."""
MAX_STAGES = 60
MOVES = 8
"""Transitions after a step of tempering."""

Target = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Noise `(S, T, d)` -> log density `(S, T)` and its gradient `(S, T, d)`."""


@dataclass
class Chains:
    """S chains of each of T tasks.

    Attributes:
        noise: Where they are `(S, T, d)`.
        scale: Lower factors of the covariance of a task's chains `(T, d, d)`, the unit of its steps.
        step: Step sizes `(T,)`.
        acceptance: Mean acceptance of the last transitions `(T,)`.
    """

    noise: Tensor
    scale: Tensor
    step: Tensor
    acceptance: Tensor

    @classmethod
    def at(cls, noise: Tensor) -> Chains:
        """Chains with the scale of their own spread."""
        dim = noise.shape[-1]
        step = torch.full((noise.shape[1],), 0.5 * dim**-0.25, dtype=noise.dtype)
        return cls(noise, spread(noise), step, torch.ones_like(step))


def spread(noise: Tensor) -> Tensor:
    """Lower factors of the covariances over the first dimension, `(S, T, d)` -> `(T, d, d)`; never singular."""
    count, dim = len(noise), noise.shape[-1]
    centred = (noise - noise.mean(0)).movedim(0, 1)
    covariance = centred.mT @ centred / max(count - 1, 1)
    share = count / (count + 5.0 * dim)
    floor = covariance.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-8)[:, None, None]
    return torch.linalg.cholesky(share * covariance + ((1 - share) + 1e-6) * floor * torch.eye(dim, dtype=noise.dtype))


def transition(target: Target, chains: Chains) -> None:
    """One Hamiltonian transition of all chains, in place."""
    start, scale = chains.noise, chains.scale
    leaps = int(torch.randint(LEAPS[0], LEAPS[1] + 1, ()))
    step = (chains.step * SHORTEST ** torch.rand(start.shape[:-1], dtype=start.dtype)).unsqueeze(-1)
    momentum = torch.randn_like(start)
    before, gradient = target(start)
    kinetic, noise, value = 0.5 * momentum.square().sum(-1), start, before
    for _ in range(leaps):
        momentum = momentum + 0.5 * step * _pulled(scale, gradient)
        noise = noise + _pushed(scale, step * momentum)
        value, gradient = target(noise)
        momentum = momentum + 0.5 * step * _pulled(scale, gradient)
    log_ratio = value - before + kinetic - 0.5 * momentum.square().sum(-1)
    accept = torch.nan_to_num(log_ratio, nan=-math.inf).clamp(max=0).exp()
    taken = torch.rand_like(accept) < accept
    chains.noise = torch.where(taken.unsqueeze(-1), noise, start)
    chains.acceptance = accept.mean(0)


def _pulled(scale: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in units of the scale: Cᵀ g."""
    return (gradient.unsqueeze(-2) @ scale).squeeze(-2)


def _pushed(scale: Tensor, move: Tensor) -> Tensor:
    """A move in units of the scale: C u."""
    return (scale @ move.unsqueeze(-1)).squeeze(-1)


def tune(target: Target, chains: Chains, *, transitions: int = TUNING) -> None:
    """Moves chains, and their step sizes to the target acceptance."""
    for _ in range(transitions):
        transition(target, chains)
        chains.step = chains.step * torch.exp(0.7 * (chains.acceptance - TARGET))


def settle(target: Target, chains: Chains, family: Tensor | None = None) -> np.ndarray:
    """Moves chains until their acceptance is good and their moments stand still; says for which tasks: `(T,)`.

    With `family` `(S, T)`, from which particle of the prior each chain descends, they also have to be few enough alike.
    """
    settled = torch.zeros(chains.noise.shape[1], dtype=torch.bool)
    for length in ROUNDS:
        before, acceptance = chains.noise, torch.zeros_like(chains.step)
        for _ in range(length):
            transition(target, chains)
            acceptance = acceptance + chains.acceptance / length
        stuck = (chains.noise == before).all(-1).double().mean(0)
        settled = (acceptance > LOWEST) & (acceptance < HIGHEST) & (stuck <= STUCK) & _still(before, chains.noise)
        if family is not None:
            settled &= standard_errors(chains.noise, family).amax((0, 2)) <= LARGEST_ERROR
        if bool(settled.all()) and length >= LEAST:
            break
        chains.scale = spread(chains.noise)
        factor = torch.exp(0.7 * (acceptance - TARGET).clamp(max=0))
        chains.step = chains.step * torch.where(acceptance < HIGHEST, factor, 2.0)
    return settled.numpy()


def _still(before: Tensor, after: Tensor) -> Tensor:
    """Whether means and mean squares of `(S, T, d)` have not moved, `(T,)`."""
    if len(before) == 1:
        return torch.zeros(before.shape[1], dtype=torch.bool)
    still = torch.ones(before.shape[1], dtype=torch.bool)
    centre, unit = after.mean(0), after.std(0).clamp(min=1e-12)
    one, two = ((part - centre) / unit for part in (before, after))
    for power in (1, 2):
        difference = two**power - one**power
        error = difference.std(0) / math.sqrt(len(difference)) + 1e-12
        still &= ((difference.mean(0) / error).abs() < DRIFT).all(-1)
    return still


def temper(
    log_likelihood: Callable[[Tensor, Tensor], Tensor],
    tempered: Callable[[Tensor, Tensor], Target],
    noise: Tensor,
    log_weight: Tensor,
    generator: np.random.Generator,
) -> tuple[Chains, Tensor, Tensor]:
    """Moves a population from the prior to the posterior of each task.

    Args:
        log_likelihood: Pairs `(S, T)` (which θ each particle has) and noise `(S, T, d)` -> `(S, T)`.
        tempered: Pairs and powers `(T,)` of the likelihood -> the target of transitions.
        noise: Draws of the prior, particle s at the s-th θ `(S, T, d)`.
        log_weight: Log weights that the θ have from the start `(S, T)`.
        generator: Of the resampling.

    Returns:
        The particles, the pairs `(S, T)`, and the log evidence `(T,)`.

    References:
        Del Moral, Doucet, Jasra: Sequential Monte Carlo Samplers, 2006,
        https://doi.org/10.1111/j.1467-9868.2006.00553.x
    """
    count, tasks = log_weight.shape
    pairs = torch.arange(count).unsqueeze(1).expand(count, tasks)
    chains, power = Chains.at(noise), torch.zeros(tasks, dtype=noise.dtype)
    evidence = -log_weight.logsumexp(0)
    for _ in range(MAX_STAGES):
        value = torch.nan_to_num(log_likelihood(pairs, chains.noise), nan=-1e30, neginf=-1e30)
        rise = _rise(value, log_weight, 1 - power)
        log_weight = log_weight + rise * value
        evidence = evidence + log_weight.logsumexp(0)
        power = power + rise
        index = torch.as_tensor(psis.resample(log_weight.T.numpy(), count, generator)).T
        every = torch.arange(tasks)
        pairs, chains.noise = pairs[index, every], chains.noise[index, every]
        log_weight = torch.full_like(log_weight, -math.log(count))
        chains.scale = spread(chains.noise)
        tune(tempered(pairs, power), chains, transitions=MOVES)
        if bool((power >= 1).all()):
            break
    return chains, pairs, torch.where(power >= 1, evidence, math.nan)


def standard_errors(noise: Tensor, family: Tensor) -> Tensor:
    """Monte Carlo standard errors of means and sds of tempered particles, in sds: `(2, T, d)`.

    Args:
        noise: Particles `(S, T, d)`.
        family: From which particle of the prior each descends `(S, T)`: what is alike within a family counts once.

    References:
        Lee, Whiteley: Variance estimation in the particle filter, 2018, https://doi.org/10.1093/biomet/asy028
    """
    unit = (noise - noise.mean(0)) / noise.std(0, correction=0).clamp(min=1e-12)
    square = 0.5 * (unit.square() - unit.square().mean(0))
    index = family.unsqueeze(-1).expand_as(unit)
    return torch.stack([torch.zeros_like(f).scatter_add(0, index, f).norm(dim=0) / len(f) for f in (unit, square)])


def _rise(value: Tensor, log_weight: Tensor, most: Tensor) -> Tensor:
    """The largest step of the power, at most `most` `(T,)`, that keeps `ALIVE` of the weights effective."""
    low, high = torch.zeros_like(most), most.clone()

    def alive(step: Tensor) -> Tensor:
        weights = log_weight + step * value
        return (2 * weights.logsumexp(0) - (2 * weights).logsumexp(0)).exp() / len(weights) >= ALIVE

    done = alive(high)
    for _ in range(40):
        middle = 0.5 * (low + high)
        good = alive(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return torch.where(done, most, torch.maximum(low, 1e-6 * torch.ones_like(low)).minimum(most))
