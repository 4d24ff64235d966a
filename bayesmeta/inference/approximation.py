"""How far a marginal posterior of θ is off because the tasks' parameters were integrated out approximately.

Quadrature and Laplace's approximation see one mode of each task. Importance sampling around all modes that several
starts find, with prior draws among the proposals, estimates the same evidence without that error. The random numbers
are common to all θ: what is left of their noise hardly moves with θ, and only what moves with θ matters.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.candidates import SHARES, prior_draws
from bayesmeta.inference.chunks import task_chunks, theta_chunks
from bayesmeta.inference.correction import SharedDraws, weighed
from bayesmeta.inference.evidence import Evidence
from bayesmeta.inference.gaussian import Pushed, heavy_scale
from bayesmeta.inference.laplace import LaplaceGuide, MixtureTasks
from bayesmeta.inference.objectives import Guides
from bayesmeta.inference.protocols import Context, TaskPosterior
from bayesmeta.inference.shared import PointShared
from bayesmeta.inference.weighing import resample_theta

LOOKED_AT = 64
"""θ at which the evidence is compared."""
LOOKED_AT_AROUND_A_POINT = 16
"""Likewise where θ is a point: nothing is reweighed, only reported."""
CHECKED_TASKS = 1000
"""Of more tasks a sample is looked at; the error then grows with the number of tasks."""
CANDIDATES = 16
MOST_CANDIDATES = 256
"""Of one half of an estimate, a task and θ."""
TOLERATED = 0.1
"""Standard deviation over θ of the error of Σ log p̂ that moves a posterior mean by at most so many of its sds."""
REWEIGHED = 1000
MOST_NOISE = 0.5
BUDGET = 20_000_000
"""Bound on θ × tasks × candidates."""
BY_DRAW = (0, 0, None, None)


@dataclass(frozen=True)
class Comparison:
    """Log ratios of two independent estimates of the evidence to the marginal's, `(2, S)` at S draws of θ."""

    ratios: Tensor

    @property
    def error(self) -> float:
        """Standard deviation over θ of the marginal's error: what both halves agree on beyond chance, or infinity."""
        if not bool(torch.isfinite(self.ratios).all()):
            return math.inf
        count = self.ratios.shape[1]
        first, second = self.ratios - self.ratios.mean(1, keepdim=True)
        chance = 2 * 2 * self.noise**2 / math.sqrt(count)
        return math.sqrt(max(0.0, float((first * second).sum()) / (count - 1) - chance))

    @property
    def noise(self) -> float:
        """Standard deviation over θ of the Monte Carlo error of the halves' mean."""
        return float((self.ratios[0] - self.ratios[1]).std() / 2)


def assess(
    density: TaskDensity, evidence: Evidence, tasks: Tasks, shared: SharedDraws, *, point: bool = False
) -> dict[str, float]:
    """The error of the marginal's evidence at draws of θ: entries "error" and "noise", in nats of Σ log p̂.

    Args:
        density: The model.
        evidence: The marginal's evidence.
        tasks: The training tasks.
        shared: Draws of θ; of a point estimate, draws around it.
        point: Whether θ is a point.
    """
    index = np.flatnonzero(np.asarray(tasks.sizes) > 0)
    if not len(index):
        return {"error": 0.0, "noise": 0.0}
    scale = 1.0
    if len(index) > CHECKED_TASKS:
        scale = len(index) / CHECKED_TASKS
        index = np.sort(index[torch.randperm(len(index))[:CHECKED_TASKS].numpy()])
    if len(index) < len(tasks):
        evidence, tasks = evidence.of(density, tasks, index, calls=LOOKED_AT), tasks[index]
    theta = resample_theta(shared, LOOKED_AT_AROUND_A_POINT if point else LOOKED_AT)
    found = compare(density, evidence, tasks, theta)
    return {"error": scale * found.error, "noise": scale * found.noise}


def mended(density: TaskDensity, evidence: Evidence, tasks: Tasks, shared: SharedDraws) -> SharedDraws:
    """Weighs at most 1,000 draws of θ by what the marginal's evidence is off; where that fails, "uncorrected"."""
    affordable = BUDGET // (2 * CANDIDATES * len(tasks))
    if affordable < LOOKED_AT:
        return replace(shared, khat=math.inf, ess=math.nan, status="uncorrected")
    theta = resample_theta(shared, min(REWEIGHED, affordable, len(shared.theta)))
    found = compare(density, evidence, tasks, theta)
    better = weighed(theta, found.ratios.mean(0))
    if better.status == "corrected" and found.noise <= MOST_NOISE:
        return better
    return replace(shared, khat=better.khat, ess=better.ess, status="uncorrected")


def compare(density: TaskDensity, evidence: Evidence, tasks: Tasks, theta: Tensor) -> Comparison:
    """Compares estimates of the evidence at draws of θ `(S, d_theta)`, with as many candidates as they need."""
    values = list(density.learned.values.values())
    own = torch.stack([evidence(at, values)[0] for at in theta]) - density.log_prior(theta)
    prepared = _prepared(density, tasks, theta, evidence.modes_by_task)
    per_theta, most = CANDIDATES, max(CANDIDATES, min(MOST_CANDIDATES, BUDGET // (len(theta) * len(tasks))))
    while True:
        found = Comparison(_estimates(density, prepared, len(theta), per_theta) - own)
        if found.noise < TOLERATED / 2 or per_theta >= most or not math.isfinite(found.noise):
            return found
        needed = per_theta * (2 * found.noise / TOLERATED) ** 2
        per_theta = min(most, max(2 * per_theta, math.ceil(needed)))


@dataclass(frozen=True)
class _Part:
    """Some tasks at some θ: where these belong, how many tasks count, and the modes of the tasks there."""

    place: slice
    tasks: int
    theta: Tensor
    guide: LaplaceGuide
    context: Context


def _prepared(density: TaskDensity, tasks: Tasks, theta: Tensor, known: Tensor) -> list[list[_Part]]:
    """The modes of all tasks at every θ, tasks in chunks; the search starts from `known` ones `(T, d)` too."""
    scale = LaplaceGuide.around(theta).scale
    found = []
    with torch.no_grad():
        for chunk in task_chunks(tasks, exact_size=density.structure.exact_size):
            data, parts = density.tensors(chunk.batch), []
            further = known.new_zeros(len(chunk.batch.names), known.shape[1])
            further[: len(chunk.index)] = known[chunk.index]
            for place, some in theta_chunks(theta, chunk.batch, exact_size=density.structure.exact_size):
                guide = LaplaceGuide(some, scale, further=further)
                guide.attach(density, tasks)
                parts.append(_Part(place, len(chunk.index), some, guide, guide.prepare(chunk.batch, data)))
            found.append(parts)
    return found


def _estimates(density: TaskDensity, prepared: list[list[_Part]], draws: int, per_theta: int) -> Tensor:
    """Two estimates of Σ log p(D_i | θ_s), `(2, S)`."""
    total = torch.zeros(2, draws, dtype=torch.float64)
    shared, values = PointShared(*density.prior_scale()), dict(density.learned.values)
    with torch.no_grad():
        for parts in prepared:
            seed = int(torch.randint(2**62, ()))
            for part, half in itertools.product(parts, range(2)):
                guides = Guides(shared, part.guide, values)
                generator = torch.Generator().manual_seed(seed ^ half)
                weights = _weights(density, guides, part.context, part.theta, generator, per_theta)
                evidence = torch.stack(list(weights)).logsumexp(0) - math.log(per_theta)
                kept = evidence[: part.place.stop - part.place.start, : part.tasks]
                total[half, part.place] += kept.sum(1, dtype=torch.float64)
    return total


def _weights(
    density: TaskDensity, guides: Guides, context: Context, theta: Tensor, generator: torch.Generator, count: int
) -> Iterator[Tensor]:
    """Log weights `(S, T)` of candidates made of the same random numbers at every θ."""
    posterior = guides.task.condition(theta, context)
    for _ in range(count):
        noise = _candidate(density, guides, context, theta, posterior, generator)
        log_prior, log_likelihood = density.log_parts.mapped(theta, noise, context.data, guides.values, in_dims=BY_DRAW)
        terms = [
            posterior.log_prob(noise) + math.log(SHARES["guide"]),
            posterior.log_prob(noise, heavy=True) + math.log(SHARES["heavy"]),
            log_prior + math.log(SHARES["prior"]),
        ]
        yield log_prior + log_likelihood - torch.stack(terms).logsumexp(0)


def _candidate(
    density: TaskDensity,
    guides: Guides,
    context: Context,
    theta: Tensor,
    posterior: TaskPosterior,
    generator: torch.Generator,
) -> Tensor:
    """One draw of the defensive mixture for every θ and task, `(S, T, d)`."""
    shape = (len(context.batch.names), density.structure.task_size)
    white = torch.randn(shape, generator=generator, dtype=theta.dtype)
    pick, component = torch.rand(2, shape[0], 1, generator=generator, dtype=theta.dtype)
    heavy = _heavy(white, generator)
    spread = torch.where(pick < SHARES["heavy"], white * heavy, white).expand(len(theta), *shape)
    noise = _pushed(posterior, spread, component.squeeze(-1))
    if all(site.kind != "moments" for site in density.structure.task):
        prior = white.expand_as(noise)
    else:
        prior = prior_draws(density, guides, context, theta)
    return torch.where(pick > 1 - SHARES["prior"], prior, noise)


def _heavy(white: Tensor, generator: torch.Generator) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        return heavy_scale((len(white), 1), white)


def _pushed(posterior: TaskPosterior, white: Tensor, component: Tensor) -> Tensor:
    """Standard noise `(S, T, d)` as draws; a mixture takes the component that `component` `(T,)` falls into."""
    if isinstance(posterior, Pushed):
        return posterior.push(white)
    if not isinstance(posterior, MixtureTasks):
        raise TypeError(f"expected Gaussians or mixtures of them, got {type(posterior).__name__}")
    place = (posterior.log_share.exp().cumsum(0) < component).sum(0).clamp(max=len(posterior.parts) - 1)
    noise = posterior.parts[0].push(white)
    for k, part in enumerate(posterior.parts[1:], 1):
        noise = torch.where((place == k).unsqueeze(-1), part.push(white), noise)
    return noise
