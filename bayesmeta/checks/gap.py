"""The amortization gap: how far the guide's posterior of each task is from the model's own, before any refinement.

In nats, KL(q(φ | D, θ) ‖ p(φ | D, θ)) on average over θ, with the evidence in closed form for Gaussian tasks and from
Laplace proposals for others; and in posterior sds, against the same fit's refined posterior or another fit's.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bayesmeta.checks import pictures
from bayesmeta.checks.evidence import Inside, look_inside
from bayesmeta.data.tasks import Tasks
from bayesmeta.fitting import Fit
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.recording import seeded
from bayesmeta.inference.candidates import BY_DRAW, log_evidence, sweep
from bayesmeta.inference.exact import ExactGuide, are_gaussian
from bayesmeta.inference.laplace import LaplaceGuide
from bayesmeta.inference.objectives import Guides
from bayesmeta.inference.protocols import Context, TaskGuide
from bayesmeta.results.arguments import check_choice, check_tasks, check_whole
from bayesmeta.results.posterior import Posterior

REFERENCES = ("laplace", "nuts")
THETAS = 64
"""Draws of θ that the divergence is averaged over."""
PER_THETA = 64
"""Candidates at each of them."""


@dataclass(frozen=True)
class Gap:
    """Distances of unrefined posteriors from the reference.

    Attributes:
        names: Tasks.
        sizes: Their rows `(task,)`.
        nats: KL(q ‖ p) of the task's parameters given θ, averaged over θ `(task,)`; estimated, so that a perfect guide
            may have a small negative one.
        shift: Largest difference of means over a task's parameters, in reference sds `(task,)`.
        ratio: The sd ratio, guide by reference, that is farthest from 1 `(task,)`.
        flag: What is wrong with the reference, "" if nothing `(task,)`.
    """

    names: tuple[str, ...]
    sizes: np.ndarray
    nats: np.ndarray
    shift: np.ndarray
    ratio: np.ndarray
    flag: np.ndarray

    def table(self) -> str:
        """A line a task, the largest gap first."""
        lines = [f"{'task':<24} {'rows':>5} {'nats':>8} {'shift/sd':>9} {'sd ratio':>9}"]
        for i in np.argsort(-self.nats, kind="stable"):
            numbers = f"{self.sizes[i]:>5} {self.nats[i]:>8.3f} {self.shift[i]:>9.2f} {self.ratio[i]:>9.2f}"
            lines.append(f"{self.names[i]:<24} {numbers}  {self.flag[i]}".rstrip())
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws gaps against the number of rows into a file (extra `plots`)."""
        pictures.gaps(self.sizes, self.nats, self.shift, self.ratio).savefig(path)


def amortization_gap(
    fit: Fit, tasks: Tasks, *, reference: str | Fit = "laplace", draws: int = 4000, seed: int = 0
) -> Gap:
    """Measures what the guide loses on each task, training task or new.

    Args:
        fit: A fit with a learned guide.
        tasks: Tasks with rows.
        reference: "laplace" (weighted proposals around the modes), "nuts" (chains), or another fit of the same model,
            for example one by method "marginal" or "nuts", whose posterior of the tasks then counts.
        draws: Draws of both posteriors.
        seed: Of all draws.

    Raises:
        ValueError: A task without rows, an unknown reference, or one of another model.
    """
    check_tasks("tasks", tasks)
    check_whole("draws", draws, 100)
    if not isinstance(reference, Fit):
        check_choice("reference", reference, REFERENCES)
    empty = [name for name, size in zip(tasks.names, tasks.sizes, strict=True) if size == 0]
    if empty:
        raise ValueError(
            f"amortization_gap: task(s) {empty[:5]} have no rows, their posterior is the prior; leave them out"
        )
    guessed = fit.posterior(tasks, draws=draws, refine="none", seed=seed)
    if isinstance(reference, Fit):
        better = reference.posterior(tasks, draws=draws, seed=seed)
    else:
        better = fit.posterior(tasks, draws=draws, refine=reference, seed=seed)
    with seeded(seed, "gap"), torch.no_grad():
        inside = look_inside(fit, THETAS)
        nats = _divergence(inside, tasks.aligned(inside.density.schema))
    shift, ratio = _differences(guessed, better)
    return Gap(tasks.names, np.asarray(tasks.sizes), nats, shift, ratio, better.flag)


def _divergence(inside: Inside, tasks: Tasks) -> np.ndarray:
    """Mean over θ of E_q [log q(φ) − log p(φ, D | θ)] + log p(D | θ)."""
    density, guides, theta = inside.density, inside.guides, inside.theta
    repeated = theta.repeat_interleave(PER_THETA, 0)
    excess = sweep(density, guides, tasks, repeated, lambda c, part: (_excess(density, guides, c, part),))[0]
    gaussian = are_gaussian(density, tasks, theta)
    evidence = np.empty(len(tasks))
    exact: TaskGuide = ExactGuide(tested=True)
    for guide, some, each in ((exact, gaussian, 1), (LaplaceGuide.around(theta), ~gaussian, PER_THETA)):
        if some.any():
            guide.attach(density, tasks)
            own = replace(guides, task=guide)
            found = log_evidence(density, own, tasks[np.flatnonzero(some)], theta, per_theta=each)
            evidence[some] = found.mean(0).numpy()
    return excess.mean(0).numpy() + evidence


def _excess(density: TaskDensity, guides: Guides, context: Context, theta: Tensor) -> Tensor:
    """Log q(φ | D, θ_s) − log p(φ, D | θ_s) at a draw of q, `(S, T)`."""
    posterior = guides.task.condition(theta, context)
    noise = posterior.sample()
    joint = density.log_task.mapped(theta, noise, context.data, guides.values, in_dims=BY_DRAW)
    return posterior.log_prob(noise) - joint


def _differences(guessed: Posterior, better: Posterior) -> tuple[np.ndarray, np.ndarray]:
    """Largest shift of a mean in sds, and the sd ratio farthest from 1, `(task,)` each."""
    if sorted(guessed.sites) != sorted(better.sites):
        raise ValueError(
            f"reference: a fit of another model, with sites {sorted(better.sites)}, not {sorted(guessed.sites)}"
        )
    count = len(guessed.names)
    shifts, ratios = [], []
    for name in guessed.sites:
        sd = better.sd(name).reshape(count, -1)
        usable = np.where(sd > 0, sd, np.nan)
        shifts.append((guessed.mean(name) - better.mean(name)).reshape(count, -1) / usable)
        ratios.append(guessed.sd(name).reshape(count, -1) / usable)
    shift = np.nanmax(np.abs(np.concatenate(shifts, 1)), 1)
    ratio = np.concatenate(ratios, 1)
    far = np.nanargmax(np.abs(np.log(ratio)), 1)
    return shift, ratio[np.arange(count), far]
