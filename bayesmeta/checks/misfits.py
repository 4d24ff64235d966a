"""Is an observed task unlike the tasks that the model has learned from?

Tasks are simulated from the fitted model with the x and the size of the observed one; a statistic of the observed task,
by default how probable its data are under the model, has its p-value among theirs. A training task is compared with
what the others say of it: θ is weighed as if the task had been left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from bayesmeta.checks import pictures
from bayesmeta.checks.evidence import Inside, known_tasks, left_out, look_inside
from bayesmeta.checks.replicated import Statistic, chosen_statistic, labels_of, value_of
from bayesmeta.checks.simulations import numbered, simulate_each, unweighted
from bayesmeta.data.tasks import Tasks
from bayesmeta.fitting import Fit
from bayesmeta.hierarchy.recording import seeded
from bayesmeta.inference import psis
from bayesmeta.results.arguments import check_tasks, check_whole

EVIDENCE = "log evidence"
LEVEL = 0.05
MOST_REPLICATES = 5000
PIECE = 32768
"""Simulated tasks at once."""

Measure = Callable[[Tasks, np.ndarray], np.ndarray]
"""The statistic of tasks `(T,)`, with log weights of θ `(S, T)`."""


@dataclass(frozen=True)
class Misfit:
    """How unlike simulated tasks each observed task is.

    Attributes:
        names: Tasks.
        statistic: What was compared.
        observed: Its observed value `(task,)`.
        z: Distance from the mean of simulated values, in their sds `(task,)`; 0 where they do not vary.
        p: Two-sided p-value `(task,)`: uniform for a task that is like the others.
        flag: Why p is not to be trusted, "" if nothing is wrong `(task,)`.
    """

    names: tuple[str, ...]
    statistic: str
    observed: np.ndarray
    z: np.ndarray
    p: np.ndarray
    flag: np.ndarray

    def unlike(self, level: float = LEVEL) -> tuple[str, ...]:
        """Tasks that are unlike the others, most unlike first.

        If none is, the probability that any is named is at most `level` (Holm's rule over all tasks).

        References:
            Holm: A Simple Sequentially Rejective Multiple Test Procedure, 1979, https://www.jstor.org/stable/4615733
        """
        order = np.argsort(self.p, kind="stable")
        below = self.p[order] <= level / (len(order) - np.arange(len(order)))
        count = len(order) if below.all() else int(below.argmin())
        return tuple(self.names[i] for i in order[:count])

    def table(self) -> str:
        """A line a task, the most unlike first: p, distance in sds, and whether it is named."""
        named = self.unlike()
        lines = [f"{'task':<24} {'p':>8} {'z':>7}  {self.statistic}"]
        for i in np.lexsort((-np.abs(self.z), self.p)):
            word = "unlike the others" if self.names[i] in named else ""
            remark = "; ".join(part for part in (word, self.flag[i]) if part)
            lines.append(f"{self.names[i]:<24} {self.p[i]:>8.4f} {self.z[i]:>7.2f}  {remark}".rstrip())
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the distances, the most unlike task on top, into a file (extra `plots`)."""
        pictures.misfits(self.names, self.z, self.p, self.unlike(), statistic=self.statistic).savefig(path)


def misfit(
    fit: Fit,
    tasks: Tasks,
    *,
    statistic: str | Statistic = EVIDENCE,
    replicates: int = 200,
    draws: int = 200,
    seed: int = 0,
) -> Misfit:
    """Says of each task, training task or new, how unlike tasks of the fitted model it is.

    With "log evidence" a task is unlike the others if its data are less probable than those of nearly all simulated
    tasks of the same x and size, or more (labels that are all equal, say).

    Args:
        fit: A fit.
        tasks: Training tasks or new ones.
        statistic: "log evidence", "mean", "sd", "min", "max", "median", "zeros", or a function of one task's labels
            `(n, *dy)`.
        replicates: Simulated tasks for each observed one. Those with p ≤ 0.05 get a second, larger set (at most 5000),
            enough for Holm's rule over all tasks.
        draws: Draws of θ that the evidence is averaged over.
        seed: Of the simulation.

    Raises:
        ValueError: Unknown statistic, columns or levels; a training task with other data; weights or missing labels,
            which no simulated task has.
    """
    check_tasks("tasks", tasks)
    check_whole("replicates", replicates, 20)
    check_whole("draws", draws, psis.MIN_TAIL)
    with seeded(seed, "misfit"):
        inside = look_inside(fit, draws)
        tasks, known = known_tasks(fit, unweighted(tasks))
        log_weight, flag = _without_themselves(inside, tasks, known)
        name, measure = _measure(inside, statistic)
        compare = _Compare(inside, tasks, log_weight, measure)
        p, z = compare(np.arange(len(tasks)), replicates)
        suspects = np.flatnonzero(p <= LEVEL)
        more = min(MOST_REPLICATES, int(4 * len(tasks) / LEVEL))
        if len(suspects) and more > replicates:
            p[suspects], z[suspects] = compare(suspects, more)
    return Misfit(tasks.names, name, compare.observed, z, p, flag)


class _Compare:
    """Compares observed tasks with simulated ones."""

    def __init__(self, inside: Inside, tasks: Tasks, log_weight: np.ndarray, measure: Measure) -> None:
        self._inside, self._tasks, self._log_weight, self._measure = inside, tasks, log_weight, measure
        self._generator = np.random.default_rng(int(torch.randint(2**62, ())))
        self.observed = measure(tasks, log_weight)

    def __call__(self, index: np.ndarray, replicates: int) -> tuple[np.ndarray, np.ndarray]:
        """p-values and distances of some tasks, with so many simulated tasks each."""
        p, z = np.empty(len(index)), np.zeros(len(index))
        for place in _pieces(len(index), max(1, PIECE // replicates)):
            drawn = self._simulated(index[place], replicates)
            observed = self.observed[index[place]]
            lower, upper = ((1 + (s * (drawn - observed) >= 0).sum(0)) / (1 + replicates) for s in (-1, 1))
            p[place] = np.minimum(1.0, 2 * np.minimum(lower, upper))
            sd = drawn.std(0)
            z[place] = np.divide(observed - drawn.mean(0), sd, out=np.zeros(len(sd)), where=sd > 0)
        return p, z

    def _simulated(self, index: np.ndarray, replicates: int) -> np.ndarray:
        """The statistic of simulated tasks `(replicate, task)`."""
        repeated = np.repeat(index, replicates)
        shells = self._tasks.copies(repeated, names=numbered("simulated", len(repeated)))
        chosen = [psis.resample(self._log_weight[:, i], replicates, self._generator) for i in index]
        theta = self._inside.theta[torch.as_tensor(np.concatenate(chosen))]
        data = simulate_each(self._inside.density, shells, theta).tasks
        return self._measure(data, self._log_weight[:, repeated]).reshape(len(index), replicates).T


def _measure(inside: Inside, statistic: str | Statistic) -> tuple[str, Measure]:
    if isinstance(statistic, str) and statistic == EVIDENCE:

        def evidence(tasks: Tasks, weight: np.ndarray) -> np.ndarray:
            found = np.logaddexp.reduce(weight + inside.log_evidence(tasks, per_theta=1), 0)
            return np.where(np.asarray(tasks.sizes) > 0, found, 0.0)

        return EVIDENCE, evidence
    name, function = chosen_statistic(statistic)

    def summary(tasks: Tasks, weight: np.ndarray) -> np.ndarray:
        pairs = zip(labels_of(tasks), tasks.names, strict=True)
        return np.array([value_of(function, y, name, task) if len(y) else 0.0 for y, task in pairs])

    return name, summary


def _without_themselves(inside: Inside, tasks: Tasks, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log weights of θ `(S, task)`, training tasks left out one by one, and flags `(task,)`."""
    count = len(inside.theta)
    log_weight = np.full((count, len(tasks)), -np.log(count))
    flag = np.full(len(tasks), "", dtype=object)
    for place in np.array_split(np.flatnonzero(known), max(1, int(known.sum()) // PIECE)):
        if len(place):
            weight, khat = left_out(inside.log_evidence(tasks[place], per_theta=4))
            log_weight[:, place] = weight
            bad = khat > psis.khat_limit(count)
            texts = [f"leaving it out changes θ too much: k̂ {k:.2f}" for k in khat]
            flag[place] = np.where(bad, np.array(texts, dtype=object), "")
    return log_weight, flag


def _pieces(count: int, size: int) -> Iterator[slice]:
    yield from (slice(start, min(start + size, count)) for start in range(0, count, size))
