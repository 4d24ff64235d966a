"""Posterior predictive checks: would the fitted model produce data that look like these?

A statistic of each task's labels is compared with the same statistic of labels that are drawn anew at the same rows,
from the task's own posterior. What the posterior can absorb (a task far from the others) it will not see: for that see
`misfits.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bayesmeta.checks import pictures
from bayesmeta.data.tasks import Tasks
from bayesmeta.results.posterior import Posterior

Statistic = Callable[[np.ndarray], float]
"""Of the labels `(n, *dy)` of one task."""


def _zeros(y: np.ndarray) -> float:
    return float((y == 0).mean())


STATISTICS: dict[str, Statistic] = {
    "mean": np.mean,
    "sd": np.std,
    "min": np.min,
    "max": np.max,
    "median": np.median,
    "zeros": _zeros,
}
"""By name: "zeros" is the share of labels that are 0; "sd" is that of the labels, not of a population."""


@dataclass(frozen=True)
class Replicated:
    """An observed statistic and replicated ones.

    Attributes:
        names: Tasks that have rows.
        statistic: Its name.
        observed: `(task,)`.
        drawn: `(draw, task)`.
    """

    names: tuple[str, ...]
    statistic: str
    observed: np.ndarray
    drawn: np.ndarray

    @property
    def p(self) -> np.ndarray:
        """Share of replicated statistics above the observed one, ties counted half: `(task,)`.

        Near 0 or 1 the model does not produce such data. The task's data are used twice, for its posterior and for
        the comparison, so that these are nearer to 0.5 than uniform ones.
        """
        return _above(self.drawn, self.observed)

    @property
    def overall(self) -> float:
        """The same of the mean of the statistic over tasks."""
        return float(_above(self.drawn.mean(1), self.observed.mean()))

    def table(self) -> str:
        """A line a task: observed, mean and sd of replicated statistics, p; then the mean over tasks."""
        lines = [f"{self.statistic:<24} {'observed':>10} {'replicated':>20} {'p':>7}"]
        rows = [*zip(self.names, self.observed, self.drawn.T, self.p, strict=True)]
        rows.append(("mean over tasks", self.observed.mean(), self.drawn.mean(1), self.overall))
        for name, value, drawn, p in rows:
            lines.append(f"{name:<24} {value:>10.3f} {f'{drawn.mean():.3f} ± {drawn.std():.3f}':>20} {p:>7.3f}")
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the mean over tasks and the p-values of tasks into a file (extra `plots`)."""
        mean = self.drawn.mean(1)
        figure = pictures.replicated(
            float(self.observed.mean()), mean, self.p, statistic=self.statistic, overall=self.overall
        )
        figure.savefig(path)


def posterior_predictive(
    post: Posterior, statistic: str | Statistic = "mean", *, site: str | None = None
) -> Replicated:
    """Compares a statistic of each task's labels with that of labels drawn from its posterior at the same rows.

    Args:
        post: Of tasks with labels. Known tasks: draw s of all of them is one joint draw, and so is the mean over tasks.
        statistic: "mean", "sd", "min", "max", "median", "zeros", or a function of one task's labels `(n, *dy)`.
        site: The observed site, where there are several.

    Raises:
        ValueError: No posterior, an unknown statistic, no rows, rows that are coupled by the likelihood (their new rows
            would be conditioned on the old ones), or statistics that are not finite numbers.
    """
    if not isinstance(post, Posterior):
        raise ValueError(f"posterior_predictive: expected a Posterior, got {type(post).__name__}: fit.posterior(tasks)")
    if post.density.structure.coupled:
        raise ValueError(
            f"posterior_predictive: site {post.density.structure.coupled[0]!r} couples the rows, so that labels "
            "drawn at the observed rows would repeat them; check predictions of held-out rows instead"
        )
    name, function = chosen_statistic(statistic)
    prediction = post.predict(post.tasks, site=site)
    batch = post.density.labels(prediction.site, post.tasks.batch(np.arange(len(post.tasks))))
    labels, there = batch.y.numpy(), _complete(batch.observed.numpy(), prediction.mask & batch.mask.numpy())
    filled = np.flatnonzero(there.any(1))
    if not len(filled):
        raise ValueError("posterior_predictive: expected tasks with rows, got none")
    observed, drawn = np.empty(len(filled)), np.empty((len(prediction.draws), len(filled)))
    for place, task in enumerate(filled):
        rows, task_name = there[task], post.names[task]
        observed[place] = value_of(function, labels[task, rows], name, task_name)
        drawn[:, place] = [value_of(function, y[rows], name, task_name) for y in prediction.draws[:, task]]
    return Replicated(tuple(post.names[i] for i in filled), name, observed, drawn)


def chosen_statistic(statistic: str | Statistic) -> tuple[str, Statistic]:
    """A statistic's name and function.

    Raises:
        ValueError: Neither a known name nor a function.
    """
    if isinstance(statistic, str) and statistic in STATISTICS:
        return statistic, STATISTICS[statistic]
    if isinstance(statistic, str) or not callable(statistic):
        raise ValueError(f"statistic: expected one of {list(STATISTICS)} or a function of labels, got {statistic!r}")
    return getattr(statistic, "__name__", "statistic"), statistic


def value_of(function: Statistic, y: np.ndarray, name: str, task: str) -> float:
    """The statistic of one task's labels.

    Raises:
        ValueError: It is not a finite number.
    """
    value = np.asarray(function(y), dtype=float)
    if value.shape != () or not np.isfinite(value):
        raise ValueError(f"statistic {name!r} of task {task!r}: expected a finite number, got {value!r:.80}")
    return float(value)


def labels_of(tasks: Tasks) -> list[np.ndarray]:
    """The labels of each task `(n, *dy)`."""
    return np.split(tasks.y.numpy(), tasks.offsets.numpy()[1:-1])


def _complete(observed: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Rows with all their labels `(task, M)`."""
    return mask & observed.reshape(*mask.shape, -1).all(-1)


def _above(drawn: np.ndarray, observed: np.ndarray | float) -> np.ndarray:
    return ((drawn > observed).mean(0) + (drawn >= observed).mean(0)) / 2
