"""The last rung of the ladder: Markov chains on the model's density, for the few tasks that need them.

`transitions.py` moves chains; here they meet the model. Known tasks start at their Laplace draws, one chain at each
draw of θ; new tasks, and all tasks where there is one θ only, are tempered from the prior together with θ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.candidates import BY_DRAW, prior_draws
from bayesmeta.inference.chunks import task_chunks
from bayesmeta.inference.gaussian import GaussianTasks
from bayesmeta.inference.laplace import is_one, modes_of
from bayesmeta.inference.newton import Modes
from bayesmeta.inference.objectives import Guides
from bayesmeta.inference.protocols import Context
from bayesmeta.inference.transitions import LARGEST_ERROR, Chains, Target, settle, standard_errors, temper, tune
from bayesmeta.inference.weighing import TaskDraws, equal_draws

TOGETHER = 16
"""Tasks whose chains move at once."""
LARGEST = 2**26
"""Numbers that the copies of the data, one for each pair, and what is computed of coupled rows may hold."""
COVARIANCES = 32
"""Matrices of a task, with those of the derivatives, that are held at once."""
BY_PAIR = (0, 0, 0, None)
SLACK = 1.0
"""Nats that the highest mode may be above what particles of a Gaussian would reach."""
LACKING = 2.0
"""Nats that the evidence of particles may lack of what is found around the modes."""
UNSETTLED = "Markov chains have not settled"
SEVERAL = "several modes: chains cannot tell their weights"

Parts = list[tuple[np.ndarray, TaskDraws]]


def move_known(density: TaskDensity, guides: Guides, theta: Tensor, tasks: Tasks, start: Tensor) -> Parts:
    """One chain at each θ `(S, d_theta)` of every training task, from `start` `(S, T, d)`."""
    noise, flags = torch.empty_like(start), [""] * len(tasks)
    for chunk in task_chunks(tasks, exact_size=density.structure.exact_size, limit=TOGETHER, rounded=True):
        target = _target(density, guides, theta, density.tensors(chunk.batch))
        filled = np.pad(chunk.index, (0, len(chunk.batch.names) - len(chunk.index)), "edge")
        chains = Chains.at(start[:, filled])
        tune(target, chains)
        settled = settle(target, chains)
        noise[:, chunk.index] = chains.noise[:, : len(chunk.index)]
        for place, task in enumerate(chunk.index):
            flags[task] = "" if settled[place] else UNSETTLED
    drawn = equal_draws(theta, noise, "nuts", math.nan, "", joint=True)
    drawn.flag = flags
    return [(np.arange(len(tasks)), drawn)]


def _target(density: TaskDensity, guides: Guides, theta: Tensor, data: dict[str, Tensor]) -> Target:
    def at(noise: Tensor) -> tuple[Tensor, Tensor]:
        value, (gradient,) = density.log_task.gradient(theta, noise, data, guides.values, wrt=(1,), in_dims=BY_DRAW)
        return value, gradient

    return at


def move_new(
    density: TaskDensity, guides: Guides, theta: Tensor, tasks: Tasks, log_weight: Tensor, *, joint: bool = False
) -> Parts:
    """Particles (θ, φ) of every new task, θ from its draws `(S, d_theta)` with log weights `(S, T)` to begin with.

    Where there is one θ known tasks are no different (`joint`: their draws hang together, which is nothing then).
    Particles that descend from the same one of the prior may still be alike; the relative ESS counts them so.
    """
    parts: Parts = []
    generator = np.random.default_rng(int(torch.randint(2**62, ())))
    together = max(1, min(TOGETHER, LARGEST // (len(theta) * _elements(tasks, density.structure.exact_size))))
    for chunk in task_chunks(tasks, exact_size=density.structure.exact_size, limit=together, rounded=True):
        filled = np.pad(chunk.index, (0, len(chunk.batch.names) - len(chunk.index)), "edge")
        population = _Population(density, guides, theta, density.tensors(chunk.batch))
        noise = prior_draws(density, guides, Context(chunk.batch, population.data), theta)
        weight = log_weight[:, filled].log_softmax(0)
        chains, pairs, evidence = temper(population.log_likelihood, population.target, noise, weight, generator)
        settled = settle(population.target(pairs, torch.ones_like(evidence)), chains, pairs)
        both = standard_errors(torch.cat([chains.noise, theta[pairs]], -1), pairs).amax(-1)
        reached = _reached(population, pairs, chains.noise, evidence, tasks[chunk.index])
        for place, task in enumerate(chunk.index):
            one = theta[pairs[:, place]]
            known = bool(evidence[place].isfinite()) and float(both[:, place].max()) <= LARGEST_ERROR
            flag = "" if settled[place] and known and reached[place] else UNSETTLED
            drawn = equal_draws(one, chains.noise[:, place : place + 1], "nuts", math.nan, flag, joint)
            drawn.ess = np.array([1 / max(1.0, len(theta) * float(both[0, place]) ** 2)])
            parts.append((np.array([task]), drawn))
    return parts


def _elements(tasks: Tasks, coupled: bool) -> int:
    """Numbers in the data of the largest task, and where its rows are coupled in its covariances."""
    largest = tasks.batch([int(np.argmax(tasks.sizes))])
    covariances = COVARIANCES * largest.mask.numel() ** 2 if coupled else 0
    return sum(value.numel() for value in largest.tensors.values()) + covariances


def _reached(population: _Population, pairs: Tensor, noise: Tensor, evidence: Tensor, tasks: Tasks) -> Sequence[bool]:
    """Whether particles `(S, T, d)` are where a search finds the modes of each task, where θ is not in the way.

    They must have been about as high as the highest one: a narrow neck may hold much of a posterior and no particle. Of
    S draws of a Gaussian a few are lower than its mode by no more than a low quantile of χ²_d/2 (Wilson and Hilferty's
    approximation). And their `evidence` `(T,)` must not be less than what weighted draws around a mode tell of it: what
    particles came upon late has too few of them.
    """
    if not is_one(population.theta):
        return [True] * len(tasks)
    dim = noise.shape[-1]
    low = 0.5 * dim * max(0.0, 1 - 2 / (9 * dim) - 2 * math.sqrt(2 / (9 * dim))) ** 3
    power = torch.ones(noise.shape[1], dtype=noise.dtype)
    value = population.target(pairs, power)(noise)[0].nan_to_num(nan=-math.inf).amax(0)
    modes, there = modes_of(population.density, tasks, population.theta[0], alone=True)
    highest = torch.where(there & modes.converged, modes.value, -math.inf).amax(0)
    expected, count = _evidence_around(population, pairs, modes, there), len(tasks)
    found = (value[:count] >= highest - low - SLACK) & (evidence[:count] >= expected[:count] - LACKING)
    return found.tolist()  # type: ignore[no-any-return]


def _evidence_around(population: _Population, pairs: Tensor, modes: Modes, there: Tensor) -> Tensor:
    """The evidence `(T,)` that weighted draws around one of a task's modes `(m, t, …)` tell of, the most of them.

    T is the population's number of tasks, t ≤ T how many of them are more than padding.
    """
    filled = torch.arange(pairs.shape[1]).clamp(max=there.shape[1] - 1)
    joint = population.target(pairs, torch.ones(len(filled), dtype=modes.value.dtype))
    found = [torch.full((len(filled),), -math.inf, dtype=modes.value.dtype)]
    for place, usable in enumerate(there & modes.converged):
        shape = (len(pairs), len(filled))
        around = GaussianTasks(
            modes.loc[place, filled].expand(*shape, -1), modes.factor[place, filled].expand(*shape, -1, -1)
        )
        noise = around.sample(heavy=True)
        log_weight = (joint(noise)[0] - around.log_prob(noise, heavy=True)).nan_to_num(nan=-math.inf, neginf=-math.inf)
        found.append(torch.where(usable[filled], log_weight.logsumexp(0) - math.log(len(pairs)), -math.inf))
    return torch.stack(found).amax(0)


class _Population:
    """Pairs (θ, task) of a batch as one mapped dimension: each is a batch of one task."""

    def __init__(self, density: TaskDensity, guides: Guides, theta: Tensor, data: dict[str, Tensor]) -> None:
        self.density, self.theta, self.data, self._values = density, theta, data, guides.values
        tasks = next(iter(data.values())).shape[0]
        task = torch.arange(tasks).repeat(len(theta))
        self._data = {name: value.unsqueeze(1)[task] for name, value in data.items()}
        self._plain = all(site.kind != "moments" for site in density.structure.task)

    def log_likelihood(self, pairs: Tensor, noise: Tensor) -> Tensor:
        """Log p(φ, D_i | θ) less the density of the prior's draws, of pairs `(S, T)` and noise `(S, T, d)`: `(S, T)`.

        It is more than the likelihood where a prior is scaled or masked.
        """
        args = (self.theta[pairs.flatten()], noise.flatten(0, 1).unsqueeze(1), self._data, self._values)
        prior, likelihood = (
            part.reshape(pairs.shape) for part in self.density.log_parts.mapped(*args, in_dims=BY_PAIR)
        )
        if not self._plain:
            return likelihood
        return likelihood + prior + 0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1)

    def target(self, pairs: Tensor, power: Tensor) -> Target:
        """Prior times the `power` `(T,)` of the likelihood."""
        theta = self.theta[pairs.flatten()]

        def at(noise: Tensor) -> tuple[Tensor, Tensor]:
            flat = noise.flatten(0, 1).unsqueeze(1)
            args = (theta, flat, self._data, self._values)
            value, (slope,) = self.density.log_task.gradient(*args, wrt=(1,), in_dims=BY_PAIR)
            joint, gradient = value.reshape(pairs.shape), slope.reshape(noise.shape)
            prior, prior_gradient = self._prior(args, noise)
            weight = power.unsqueeze(-1)
            return power * joint + (1 - power) * prior, weight * gradient + (1 - weight) * prior_gradient

        return at

    def _prior(
        self, args: tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]], noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self._plain:
            return -0.5 * noise.square().sum(-1), -noise
        values, (gradient,) = self.density.log_parts.gradient(*args, wrt=(1,), in_dims=BY_PAIR, weights=(1.0, 0.0))
        return values[0].reshape(noise.shape[:2]), gradient.reshape(noise.shape)
