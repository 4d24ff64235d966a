"""The posterior of θ and φ given one data set alone, θ integrated out under its prior, for many data sets in turn.

θ starts at draws of its prior, weighed by p̂(D | θ) as for any new task; where one data set says much about θ, few of
those draws count, and a t(5) fitted to them (with a share of prior draws) proposes better ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference import psis
from bayesmeta.inference.candidates import candidates
from bayesmeta.inference.correction import LEAST, Adapted, flattened
from bayesmeta.inference.objectives import Guides

PRIOR_SHARE = 0.15
"""Of prior draws in every proposal for θ."""
ROUNDS = 6
"""Proposals at most, the prior counted as the first."""


@dataclass(frozen=True)
class Alone:
    """Equally weighted draws of each data set's posterior.

    Attributes:
        theta: `(draw, T, d_theta)`.
        noise: `(draw, T, d)`.
        flag: What is wrong with the weights they were drawn with, "" if nothing `(T,)`.
    """

    theta: Tensor
    noise: Tensor
    flag: np.ndarray


def infer_alone(density: TaskDensity, guides: Guides, tasks: Tasks, *, draws: int, pool: int) -> Alone:
    """Draws from p(θ, φ_i | D_i) of every task i by itself.

    Args:
        density: The model.
        guides: A guide for the task parameters, good at any θ that the prior allows.
        tasks: The data sets.
        draws: Equally weighted draws kept of each.
        pool: Weighted draws they are resampled from.
    """
    theta = density.draw_theta(pool)
    drawn = candidates(density, guides, tasks, theta)
    samples = [_Sample(theta, drawn.noise[:, i], drawn.log_weight[:, i]) for i in range(len(tasks))]
    if density.structure.shared_size:
        samples = [_improved(density, guides, tasks[[i]], sample) for i, sample in enumerate(samples)]
    generator = np.random.default_rng(int(torch.randint(2**62, ())))
    smoothed, khat = psis.smooth(np.stack([sample.log_weight.numpy() for sample in samples]))
    ess = np.array([sample.ess for sample in samples])
    kept = torch.as_tensor(psis.resample(smoothed, pool, generator)[:, :draws].copy())
    theta, noise = (
        torch.stack([getattr(sample, name)[index] for sample, index in zip(samples, kept, strict=True)], 1)
        for name in ("theta", "noise")
    )
    return Alone(theta, noise, _flags(khat, ess, pool))


def _flags(khat: np.ndarray, ess: np.ndarray, count: int) -> np.ndarray:
    good = psis.accepted(khat, ess, count)
    texts = [f"importance sampling failed: k̂ {k:.2f}, relative ESS {e:.3f}" for k, e in zip(khat, ess, strict=True)]
    return np.where(good, "", np.array(texts, dtype=object))


@dataclass(frozen=True)
class _Sample:
    """Weighted draws of one data set's parameters: θ `(S, d_theta)`, noise `(S, d)`, log weights `(S,)`."""

    theta: Tensor
    noise: Tensor
    log_weight: Tensor

    @property
    def ess(self) -> float:
        return float(psis.relative_ess(self.log_weight.numpy()))


def _improved(density: TaskDensity, guides: Guides, task: Tasks, sample: _Sample) -> _Sample:
    """Better weighted draws, where the weights leave too few."""
    count, dim = sample.theta.shape
    for _ in range(ROUNDS - 1):
        if sample.ess >= 2 * psis.MIN_RELATIVE_ESS:
            break
        flat = flattened(sample.log_weight, least=LEAST * (dim + 1))
        if float(psis.relative_ess(flat.numpy())) * count <= 2 * dim:
            break
        proposal = Adapted(sample.theta, flat)
        from_prior = torch.rand(count, 1) < PRIOR_SHARE
        theta = torch.where(from_prior, density.draw_theta(count), proposal.sample(count))
        log_prior = density.log_prior(theta)
        log_fitted = proposal.log_prob(theta) + math.log(1 - PRIOR_SHARE)
        correction = log_prior - torch.logaddexp(log_fitted, log_prior + math.log(PRIOR_SHARE))
        drawn = candidates(density, guides, task, theta)
        better = _Sample(theta, drawn.noise[:, 0], drawn.log_weight[:, 0] + correction)
        sample = better if better.ess > sample.ess else sample
    return sample
