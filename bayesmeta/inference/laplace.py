"""Modes and curvatures of task posteriors, for all tasks at once, and Gaussians around them.

They are the proposals of the ladder's Laplace rung, the start of the marginal path's quadrature, and what the baselines
of `checks/` use. What has not converged is marked, never used as if it had.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.chunks import different, task_chunks
from bayesmeta.inference.gaussian import GaussianTasks, Pushed
from bayesmeta.inference.newton import LONGEST, Curvature, Modes, find_modes
from bayesmeta.inference.protocols import Context, TaskGuide, TaskPosterior

USUAL_STEPS = 20
"""Of a search for a mode."""
DENSE = 3
"""Dimensions in which hundreds of draws come near most modes."""
WIDE = 2.0
"""Of hundreds of draws the second half is so much wider than the prior, whose own draws are few where its tails are."""
ANCHORS = 64
"""Draws of θ at which modes are found."""
GROUP = 8
"""Anchors that are searched together from several starts."""
STARTS = 8
"""Draws of the prior from which further modes are looked for, besides the prior's centre."""
APART = 0.1
"""Modes nearer to each other than this, in posterior sds, are one."""
MOST_MODES = 4
LARGEST = 2**20
"""Rows, or pairs of coupled ones, that are looked at at once, those of every start."""
NOWHERE = -1e30
"""The log evidence of a mode that was not reached: it has no share beside one that was."""
SMALLEST_SHARE = 1e-3
"""Modes with a smaller share of a task's evidence are left to the prior's part of the proposal."""
BY_DRAW = (0, 0, None, None)


def curvature_of(density: TaskDensity, data: dict[str, Tensor], theta: Tensor) -> Curvature:
    """The curvature of the log joint of a batch at draws of θ `(S, d_theta)`."""
    noise = theta.new_zeros(len(theta), len(data["n"]), density.structure.task_size)
    values = dict(density.learned.values)
    return density.log_task.curvature_at(theta, data, values, example=noise, in_dims=BY_DRAW)


def distinct_modes(curvature: Curvature, starts: Tensor) -> tuple[Modes, Tensor]:
    """The different modes that a search from several starts finds.

    Args:
        curvature: Of T log joints, each repeated for K starts.
        starts: `(K, T, d)`.

    Returns:
        The first `MOST_MODES` modes by evidence, `(m, T, …)`, and which of them are there `(m, T)`: the first always.
    """
    found = find_modes(curvature, starts, several=True)
    evidence = torch.where(found.converged, found.log_evidence, -math.inf)
    order = evidence.argsort(0, descending=True)
    every = torch.arange(starts.shape[1]).expand_as(order)
    modes = Modes(found.loc[order, every], found.factor[order, every], found.value[order, every], found.converged)
    modes.converged = found.converged[order, every]
    evidence = evidence[order, every]
    left = modes.converged & (evidence - evidence[0] > math.log(SMALLEST_SHARE))
    kept, task = torch.zeros_like(left), torch.arange(starts.shape[1])
    for _ in range(MOST_MODES):
        best = left.to(torch.uint8).argmax(0)
        kept[best, task] |= left.any(0)
        other = (modes.loc - modes.loc[best, task]).unsqueeze(-2) @ modes.factor[best, task]
        left &= other.squeeze(-2).square().sum(-1).sqrt() >= APART
    kept[0] = True
    first = (~kept).to(torch.int64).argsort(dim=0, stable=True)[: int(kept.sum(0).max())]
    columns = task.expand_as(first)
    parts = (part[first, columns] for part in (modes.loc, modes.factor, modes.value, modes.converged))
    return Modes(*parts), kept[first, columns]


@dataclass
class MixtureTasks:
    """Mixtures of m Gaussians of S × T task posteriors.

    Attributes:
        parts: The m components.
        log_share: Their log weights `(m, S, T)`.
    """

    parts: Sequence[Pushed]
    log_share: Tensor

    def sample(self, *, heavy: bool = False) -> Tensor:
        """One draw for each θ and task, `(S, T, d)`."""
        gumbel = -torch.empty_like(self.log_share).exponential_().log()
        pick = (self.log_share + gumbel).argmax(0)
        noise = self.parts[0].sample(heavy=heavy)
        for place, part in enumerate(self.parts[1:], 1):
            noise = torch.where((pick == place).unsqueeze(-1), part.sample(heavy=heavy), noise)
        return noise

    def log_prob(self, noise: Tensor, *, heavy: bool = False) -> Tensor:
        """Log density `(S, T)` of `(S, T, d)`."""
        terms = torch.stack([part.log_prob(noise, heavy=heavy) for part in self.parts])
        return (terms + self.log_share).logsumexp(0)


def most_typical(theta: Tensor) -> Tensor:
    """The draw of θ `(S, d_theta)` that is nearest to their mean, `(d_theta,)`."""
    return theta[((theta - theta.mean(0)) / _unit(theta)).square().sum(-1).argmin()]


def _unit(theta: Tensor) -> Tensor:
    """Standard deviations of draws, 1 where they do not vary."""
    scale = (theta - theta.mean(0)).square().mean(0).sqrt()
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def spread_out(theta: Tensor, count: int) -> Tensor:
    """Some of the draws of θ `(S, d_theta)`: the most typical one, others in turn, and those far from all of these.

    The second half are the draws that are farthest from what has been taken, so that every draw has one nearby.
    """
    typical = most_typical(theta).unsqueeze(0)
    if len(theta) < count:
        return torch.cat([typical, theta])[torch.arange(count) % (len(theta) + 1)]
    chosen = torch.cat([typical, theta[torch.linspace(0, len(theta) - 1, count // 2).long()]])
    white = theta / _unit(theta)
    distance = torch.stack([(white - one / _unit(theta)).square().sum(-1) for one in chosen]).amin(0)
    while len(chosen) < count:
        far = int(distance.argmax())
        chosen = torch.cat([chosen, theta[far : far + 1]])
        distance = torch.minimum(distance, (white - white[far]).square().sum(-1))
    return chosen


def modes_at(density: TaskDensity, data: dict[str, Tensor], theta: Tensor, begin: Tensor) -> tuple[Modes, Tensor]:
    """The different modes of T task posteriors at A draws of θ `(A, d_theta)`, from K starts each `(K, A, T, d)`.

    Returns:
        Up to `MOST_MODES` modes, best first, `(m, A, T, …)`, and which of them are there `(m, A, T)`.
    """
    many, count, tasks, dim = begin.shape
    plain = curvature_of(density, data, theta.repeat(many, 1))

    def curvature(noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, gradient, hessian = plain(noise.reshape(many * count, tasks, dim))
        flat = (many, count * tasks)
        return value.reshape(flat), gradient.reshape(*flat, dim), hessian.reshape(*flat, dim, dim)

    found, there = distinct_modes(curvature, begin.reshape(many, count * tasks, dim))
    parts = (found.loc, found.factor, found.value, found.converged, there)
    loc, factor, value, converged, there = (part.reshape(-1, count, tasks, *part.shape[2:]) for part in parts)
    return Modes(loc, factor, value, converged), there


def mirrored(count: int, *shape: int, dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal draws `(count, *shape)`, every second one the one before with other signs.

    Of two modes that mirror each other both are found from them.
    """
    drawn = torch.randn(-(-count // 2), *shape, dtype=dtype, generator=generator)
    return torch.stack([drawn, -drawn], 1).flatten(0, 1)[:count]


def is_one(theta: Tensor) -> bool:
    """Whether draws of θ `(S, d_theta)` are all the same: nothing is shared, or θ is a point."""
    return bool((theta == theta[0]).all())


def starts_alone(density: TaskDensity) -> int:
    """How many starts a search has where nothing is shared: nothing else tells of modes far from the prior's centre."""
    return STARTS * (ANCHORS if density.structure.task_size <= DENSE else GROUP)


def _starts(theta: Tensor, tasks: int, dim: int, starts: int) -> Tensor:
    """The prior's centre and draws of it for each θ and task, `(starts + 1, A, T, d)`; of hundreds some are wider."""
    drawn = mirrored(starts, len(theta), tasks, dim, dtype=theta.dtype)
    if starts >= STARTS * ANCHORS:
        drawn[starts // 2 :] *= WIDE
    return torch.cat([drawn.new_zeros(1, *drawn.shape[1:]), drawn])


def _modes_at_one(
    density: TaskDensity, data: dict[str, Tensor], theta: Tensor, starts: int, further: Tensor | None = None
) -> tuple[Modes, Tensor]:
    """Modes at one θ `(1, d_theta)`, `(m, 1, T, …)`, of so many tasks at a time that memory stays small."""
    tasks, rows = data["mask"].shape
    size = min(tasks, max(1, LARGEST // ((starts + 1) * rows ** (2 if density.structure.exact_size else 1))))
    found = []
    for place in range(0, tasks, size):
        index = torch.arange(place, place + size).clamp(max=tasks - 1)
        begin = _starts(theta, size, density.structure.task_size, starts)
        begin = begin if further is None else torch.cat([further[:, :, index], begin])
        found.append(modes_at(density, {name: value[index] for name, value in data.items()}, theta, begin))
    return _together(found, 2, tasks)


def modes_of(density: TaskDensity, tasks: Tasks, theta: Tensor, *, alone: bool = False) -> tuple[Modes, Tensor]:
    """The modes that the posterior of each task has at one θ `(d_theta,)`, as far as draws of the prior lead to them.

    Args:
        density: The model.
        tasks: The tasks.
        theta: The θ.
        alone: Whether to search from as many starts as `starts_alone` says, not a few.

    Returns:
        Up to `MOST_MODES` modes, best first, `(m, T, …)`, and which of them are there `(m, T)`: the first always.
    """
    starts = starts_alone(density) if alone else 2 * STARTS
    order, found = [], []
    for chunk in task_chunks(
        tasks, exact_size=density.structure.exact_size, rounded=True, draws=(starts + 1) * USUAL_STEPS
    ):
        modes, there = _modes_at_one(density, density.tensors(chunk.batch), theta.unsqueeze(0), starts)
        parts = (modes.loc, modes.factor, modes.value, modes.converged, there)
        loc, factor, value, converged, there = (part[:, 0, : len(chunk.index)] for part in parts)
        found.append((Modes(loc, factor, value, converged), there))
        order.append(chunk.index)
    place = torch.as_tensor(np.argsort(np.concatenate(order)))
    modes, there = _together(found, 1, len(tasks))
    ordered = (part[:, place] for part in (modes.loc, modes.factor, modes.value, modes.converged))
    return Modes(*ordered), there[:, place]


class LaplaceGuide(TaskGuide):
    """Gaussians at the modes of the task posterior: at some θ, used for the nearest.

    Args:
        anchors: θ at which modes are looked for `(K, d_theta)`, the first the most typical.
        scale: Unit in which θ is near or far `(d_theta,)`.
        starts: Further starts of the search, draws from the prior; with none there is one mode a task.
        further: Modes that are known of each task of a batch `(T, d)`, to start from too.
    """

    method = "laplace"
    rounded = True

    anchors: Tensor
    scale: Tensor

    def __init__(self, anchors: Tensor, scale: Tensor, *, starts: int = STARTS, further: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("anchors", anchors)
        self.register_buffer("scale", scale)
        self._starts, self._further = starts, further

    @classmethod
    def around(cls, theta: Tensor, *, starts: int = STARTS) -> LaplaceGuide:
        """Anchors spread over draws of θ `(S, d_theta)`, the first the one nearest to their mean."""
        return cls(spread_out(theta, ANCHORS), _unit(theta), starts=starts)

    def attach(self, density: TaskDensity, tasks: Tasks) -> None:
        """Keeps the model."""
        self._density = density

    def prepare(self, batch: Batch, data: dict[str, Tensor]) -> Context:
        """Finds the modes of a batch: from several starts at some anchors, and at all if there are several modes."""
        if is_one(self.anchors):
            return self._at_one(batch, data)
        begin = _starts(self.anchors, len(batch.names), self._density.structure.task_size, self._starts)
        if self._further is not None:
            begin = torch.cat([self._further.expand_as(begin[:1]), begin])
        modes, there = self._searched(data, begin[:, :GROUP])
        if len(there) == 1:
            start = modes.loc[0, 0].expand(len(self.anchors), -1, -1)
            modes = find_modes(curvature_of(self._density, data, self.anchors), start)
            return Context(batch, data, {"loc": modes.loc.unsqueeze(0), "factor": modes.factor.unsqueeze(0)})
        modes, there = self._searched(data, begin)
        modes, there = self._searched(data, torch.cat([modes.loc, self._neighbours(modes.loc, there)]))
        return _mixed(batch, data, modes, there)

    def _at_one(self, batch: Batch, data: dict[str, Tensor]) -> Context:
        """The modes at the one θ: from all starts where nothing is shared, else from more where several are found."""
        search = functools.partial(_modes_at_one, self._density, data, self.anchors[:1])
        further = None if self._further is None else self._further[None, None]
        if self._starts and not self._density.structure.shared_size:
            return _mixed(batch, data, *search(starts_alone(self._density), further))
        modes, there = search(2 * self._starts, further)
        if len(there) > 1:
            modes, there = search(GROUP * self._starts, modes.loc)
        return _mixed(batch, data, modes, there)

    def _searched(self, data: dict[str, Tensor], begin: Tensor) -> tuple[Modes, Tensor]:
        """Modes at the first anchors from starts `(K, A, T, d)`, in groups of one size: `(m, A, T, …)`."""
        count = begin.shape[1]
        found = []
        for place in range(0, count, GROUP):
            index = torch.arange(place, place + GROUP).clamp(max=count - 1)
            found.append(modes_at(self._density, data, self.anchors[index], begin[:, index]))
        return _together(found, 1, count)

    def _neighbours(self, loc: Tensor, there: Tensor) -> Tensor:
        """For each anchor and task the modes `(m, A, T, d)` at the nearest anchor that has the most of them."""
        distance = torch.cdist(self.anchors / self.scale, self.anchors / self.scale)
        count = there.sum(0)
        lacking = (count < count.amax(0)).to(loc.dtype)
        source = (distance.unsqueeze(-1) + 1e9 * lacking).argmin(1)
        return loc[:, source, torch.arange(loc.shape[2])]

    def nearest(self, theta: Tensor) -> Tensor:
        """The anchor nearest to each θ, `(S,)`; of equal ones the first."""
        if is_one(self.anchors):
            return torch.zeros(len(theta), dtype=torch.long)
        here, there = ((points - self.anchors[0]) / self.scale for points in (theta, self.anchors))
        return torch.cdist(here, there).argmin(1)

    def condition(self, theta: Tensor, context: Context) -> TaskPosterior:
        """Gaussians, or mixtures of them, one Newton step from the modes at the nearest anchor of a θ that is none."""
        some, place = different(theta)
        near = self.nearest(some)
        summary = {name: value[:, near] for name, value in context.summary.items()}
        moved = list(zip(summary["loc"], summary["factor"], strict=True))
        if not torch.equal(some, self.anchors[near]):
            curvature = curvature_of(self._density, context.data, some)
            moved = [_stepped(curvature, *pair) for pair in moved]
        parts = [GaussianTasks(one[place], two[place]) for one, two in moved]
        return MixtureTasks(parts, summary["log_share"][:, place]) if "log_share" in summary else parts[0]


def _mixed(batch: Batch, data: dict[str, Tensor], modes: Modes, there: Tensor) -> Context:
    """What is kept of modes `(m, A, T, …)`: of several also their shares of the evidence."""
    summary = {"loc": modes.loc, "factor": modes.factor}
    if len(there) > 1:
        share = torch.where(modes.converged, modes.log_evidence, NOWHERE)
        summary["log_share"] = torch.where(there, share, -math.inf).log_softmax(0)
    return Context(batch, data, summary)


def _together(found: Sequence[tuple[Modes, Tensor]], dim: int, count: int) -> tuple[Modes, Tensor]:
    """Modes of several searches side by side along a dimension, the first `count` of them."""
    most = max(len(there) for _, there in found)
    columns = zip(*[(m.loc, m.factor, m.value, m.converged, there) for m, there in found], strict=True)
    whole = [torch.cat([_padded(part, most) for part in parts], dim).narrow(dim, 0, count) for parts in columns]
    return Modes(*whole[:4]), whole[4]


def _padded(part: Tensor, most: int) -> Tensor:
    """Modes `(m, A, …)`, or which are there, filled up to `most` by copies of the first that are not there."""
    extra = part[:1].expand(most - len(part), *part.shape[1:])
    return torch.cat([part, torch.zeros_like(extra) if part.dtype == torch.bool else extra])


def _stepped(curvature: Curvature, loc: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Locations and factors after one Newton step, as they were where that does not lead to a maximum."""
    _, gradient, hessian = curvature(loc)
    lower, info = torch.linalg.cholesky_ex(-(hessian + hessian.mT) / 2)
    step = torch.cholesky_solve(gradient.unsqueeze(-1), lower).squeeze(-1)
    usable = (info == 0) & torch.isfinite(step).all(-1) & (step.abs().amax(-1) < LONGEST)
    moved = torch.where(usable.unsqueeze(-1), loc + step, loc)
    return moved, torch.where(usable[..., None, None], lower, factor)
