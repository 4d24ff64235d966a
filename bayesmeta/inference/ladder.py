"""The ladder: each task's posterior by the cheapest way that can be trusted, found without being asked.

Weighted draws of the guide first; tasks that fail the gates climb: a closed form where they are Gaussian, Laplace
proposals from several starts, then Markov chains. Some of the accepted tasks are audited: importance weights cannot see
a mode where no candidate is. Failing tasks run together, so that the cost grows with their number only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference import psis
from bayesmeta.inference.candidates import candidates, log_evidence
from bayesmeta.inference.chains import SEVERAL, move_known, move_new
from bayesmeta.inference.exact import ExactGuide, are_gaussian
from bayesmeta.inference.gaussian import GaussianTasks
from bayesmeta.inference.laplace import LaplaceGuide, is_one, modes_of, most_typical
from bayesmeta.inference.newton import Modes
from bayesmeta.inference.objectives import Guides
from bayesmeta.inference.protocols import TaskGuide
from bayesmeta.inference.weighing import (
    EFFECTIVE_CANDIDATES,
    Parts,
    draw_unchecked,
    pieces,
    weigh_known,
    weigh_new,
)

REFINEMENTS = ("auto", "none", "laplace", "nuts")
LEAST_DRAWS = 200
"""Fewer weights are not judged: whoever wants fewer draws gets some of these."""
JUDGED = 1000
"""Weights by which Laplace proposals of a new task are judged: k̂ of fewer is so noisy that it fails good ones."""
SUSPECTED = 48
"""Draws of a guide that failed at which a task must be Gaussian to count as such."""
AUDITED, LEAST_AUDITED = 0.05, 32
"""Share of the accepted tasks that is audited, and how many are at least."""
COMPARED = 512
"""Candidates at one θ, some of whose weight must lie at the mode."""
CENTRAL = 0.5
"""Probability of what counts as at the mode, were the posterior a Gaussian."""
LOPSIDED = 0.1
"""Relative ESS of these candidates below which their evidence is that of a few, and says nothing of what they miss."""
NOTICED, FAR_FEWER = 0.05, 8
"""What should lie at the mode is looked for if it is so much of the evidence, and missed if so many times less is."""


def climb(
    density: TaskDensity,
    guides: Guides,
    theta: Tensor,
    tasks: Tasks,
    *,
    known: bool,
    refine: str,
    replaced: Tasks | None = None,
) -> Parts:
    """Infers tasks that have rows, all of them known or all new.

    Args:
        density: The model.
        guides: What was learned.
        theta: Draws of θ given the training tasks `(S, d_theta)`.
        tasks: The tasks.
        known: Whether θ has learned from them: then draw s of all of them is paired with the s-th θ.
        refine: "none": the guide's draws, unchecked; "auto": as far up as needed; "laplace", "nuts": that rung.
        replaced: The training tasks that new ones replace: their evidence is divided out of θ.

    Returns:
        Positions of tasks and their draws; every task is in one part.
    """
    if refine == "none" and replaced is None:
        return [(np.arange(len(tasks)), draw_unchecked(density, guides, theta, tasks, joint=known))]
    climber = _Climber(density, guides, theta, tasks, known, replaced)
    learned = guides.task.method == "psis"
    rungs: dict[str, tuple[Callable[[], None], ...]] = {
        "none": (climber.guide,),
        "auto": (climber.guide, climber.audit) * learned + (climber.exact, climber.laplace, climber.chains),
        "laplace": (climber.laplace,),
        "nuts": (climber.laplace, functools.partial(climber.chains, every=True)),
    }
    for rung in rungs[refine]:
        rung()
    return climber.found.parts()


class _Found:
    """The draws that each task has so far."""

    def __init__(self, count: int) -> None:
        self._parts: Parts = []
        self._owner = np.full(count, -1)
        self._doubt = np.zeros(count, dtype=bool)

    def put(self, parts: Parts, positions: np.ndarray) -> None:
        """Replaces the draws of tasks; parts count from the first of `positions`."""
        for index, drawn in parts:
            self._owner[positions[index]] = len(self._parts)
            self._doubt[positions[index]] = [bool(flag) for flag in drawn.flag]
            self._parts.append((positions[index], drawn))

    def doubt(self, positions: np.ndarray) -> None:
        """Sends accepted tasks further up."""
        self._doubt[positions] = True

    @property
    def open(self) -> np.ndarray:
        """Positions without draws that can be trusted."""
        return np.flatnonzero(self._doubt | (self._owner < 0))

    @property
    def accepted(self) -> np.ndarray:
        """Positions with draws that passed the gates."""
        return np.flatnonzero(~self._doubt & (self._owner >= 0))

    def parts(self) -> Parts:
        """What each part still owns."""
        kept = [(index, drawn, self._owner[index] == place) for place, (index, drawn) in enumerate(self._parts)]
        return [(index[own], drawn.of(own)) for index, drawn, own in kept if own.any()]

    def chosen(self, positions: np.ndarray) -> Tensor:
        """The equally weighted noise of tasks, `(S, T, d)`."""
        place = {int(task): (drawn, column) for index, drawn in self.parts() for column, task in enumerate(index)}
        found = [place[int(task)] for task in positions]
        return torch.stack([drawn.noise[torch.as_tensor(drawn.index[:, c].copy()), c] for drawn, c in found], 1)


@dataclass
class _Climber:
    """The rungs, each for the tasks that are still open."""

    density: TaskDensity
    guides: Guides
    theta: Tensor
    tasks: Tasks
    known: bool
    replaced: Tasks | None

    def __post_init__(self) -> None:
        self.found = _Found(len(self.tasks))

    def guide(self) -> None:
        """Weighted draws of the learned guide."""
        every = np.arange(len(self.tasks))
        self._weigh(self.guides.task, every)

    def audit(self) -> None:
        """Looks for modes that the guide has missed, of some accepted tasks, and of all if there are any."""
        accepted = self.found.accepted
        count = max(LEAST_AUDITED, math.ceil(AUDITED * len(accepted)))
        order = torch.randperm(len(accepted)).numpy()
        for some in (accepted[order[:count]], accepted[order[count:]]):
            parts = pieces(some, COMPARED * (self.density.structure.task_size + 2))
            missed = np.concatenate([some[:0], *(part[self._missed(part)] for part in parts)])
            if not len(missed):
                return
            self.found.doubt(missed)

    def exact(self) -> None:
        """The closed form of Gaussian tasks."""
        positions = self.found.open
        if len(positions):
            drawn = self.found.chosen(positions)[:SUSPECTED] if self.guides.task.method == "psis" else None
            gaussian = are_gaussian(self.density, self.tasks[positions], self.theta, suspected=drawn)
            if self.replaced is not None:
                gaussian &= are_gaussian(self.density, self.replaced[positions], self.theta)
            if gaussian.any():
                self._weigh(self._attached(ExactGuide(tested=True)), positions[gaussian])

    def laplace(self) -> None:
        """Laplace proposals from several starts."""
        positions = self.found.open
        if len(positions):
            each = 1 if self.known else math.ceil(JUDGED / len(self.theta))
            self._weigh(self._attached(LaplaceGuide.around(self.theta)), positions, each=each)

    def chains(self, *, every: bool = False) -> None:
        """Markov chains."""
        positions = np.arange(len(self.tasks)) if every else self.found.open
        if not len(positions):
            return
        tasks = self.tasks[positions]
        if self.known and not is_one(self.theta):
            parts = move_known(self.density, self.guides, self.theta, tasks, self.found.chosen(positions))
            several = self._modes(positions)[1].sum(0) > 1
            for index, drawn in parts:
                drawn.flag = [SEVERAL if several[i] else f for i, f in zip(index, drawn.flag, strict=True)]
        else:
            parts = move_new(
                self.density, self.guides, self.theta, tasks, self._log_weight(positions), joint=self.known
            )
        self.found.put(parts, positions)

    def _attached(self, guide: TaskGuide) -> TaskGuide:
        guide.attach(self.density, self.tasks)
        return guide

    def _weigh(self, guide: TaskGuide, positions: np.ndarray, *, each: int = 1) -> None:
        """Weighs draws of a guide, of new tasks `each` at every θ."""
        guides, tasks = replace(self.guides, task=guide), self.tasks[positions]
        if self.known:
            drawn = weigh_known(self.density, guides, self.theta, tasks)
        else:
            old = None if self.replaced is None else self.replaced[positions]
            drawn = weigh_new(self.density, guides, self.theta.repeat_interleave(each, 0), tasks, replaced=old)
        self.found.put([(np.arange(len(positions)), drawn)], positions)

    def _modes(self, positions: np.ndarray) -> tuple[Modes, Tensor]:
        alone = not self.density.structure.shared_size
        return modes_of(self.density, self.tasks[positions], most_typical(self.theta), alone=alone)

    def _missed(self, positions: np.ndarray) -> np.ndarray:
        """Whether there are several modes, or hardly any weight at the one: the end of a neck, say.

        One candidate on the wall of a neck can weigh more than all others and hide how much is missed: its task counts
        as missed too.
        """
        modes, there = self._modes(positions)
        theta = most_typical(self.theta).expand(COMPARED, -1)
        drawn = candidates(self.density, self.guides, self.tasks[positions], theta)
        distance = GaussianTasks(modes.loc[0], modes.factor[0]).pull(drawn.noise)[0]
        at_mode = _chi_square_cdf(distance, self.density.structure.task_size) < CENTRAL
        evidence = drawn.log_weight.logsumexp(0) - math.log(COMPARED)
        share = (drawn.log_weight.softmax(0) * at_mode).sum(0)
        expected = CENTRAL * (modes.log_evidence[0] - evidence).exp().clamp(max=1.0)
        lacking = modes.converged[0] & ~(expected <= NOTICED) & ~(share >= expected / FAR_FEWER)
        lopsided = ~(psis.relative_ess(drawn.log_weight.T.numpy()) >= LOPSIDED)
        missed: np.ndarray = ((there.sum(0) > 1) | lacking).numpy() | lopsided
        return missed

    def _log_weight(self, positions: np.ndarray) -> Tensor:
        """What the θ weigh before new tasks are seen: replaced tasks are taken out of them."""
        if self.replaced is None:
            return self.theta.new_zeros(len(self.theta), len(positions))
        guides = replace(self.guides, task=self._attached(LaplaceGuide.around(self.theta)))
        old = self.replaced[positions]
        return -log_evidence(self.density, guides, old, self.theta, per_theta=EFFECTIVE_CANDIDATES)


def _chi_square_cdf(value: Tensor, size: int) -> Tensor:
    """Of the squared distance of a standard normal vector from 0; torch has it as the incomplete gamma function."""
    return torch.special.gammainc(value.new_tensor(size / 2), value / 2)
