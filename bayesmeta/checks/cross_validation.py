"""Leaving out: a task, by importance weights on θ, or a row, through ArviZ.

Leaving out a task asks how well the model predicts a task that is not yet seen; leaving out a row how well it predicts
one more row of a task that is. Nothing is fitted again.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from bayesmeta.checks import pictures
from bayesmeta.checks.evidence import PER_THETA, known_tasks, left_out, look_inside
from bayesmeta.checks.metrics import mean_and_error
from bayesmeta.data.tasks import Tasks
from bayesmeta.fitting import Fit
from bayesmeta.hierarchy.recording import seeded
from bayesmeta.inference import psis
from bayesmeta.results.arguments import check_tasks, check_whole
from bayesmeta.results.arviz_export import loo as arviz_loo
from bayesmeta.results.posterior import Posterior


@dataclass(frozen=True)
class LeftOut:
    """Log predictive densities of tasks or rows that were left out.

    Attributes:
        names: Tasks.
        elpd: Log predictive density, in nats: `(task,)`, or `(task, row)` with NaN where there is no row.
        khat: k̂ of the weights, of the same shape; NaN where there is no row.
        limit: The k̂ above which a density is not to be trusted.
    """

    names: tuple[str, ...]
    elpd: np.ndarray
    khat: np.ndarray
    limit: float

    @property
    def total(self) -> tuple[float, float]:
        """Sum over all that was left out, and its standard error."""
        values = self.elpd[~np.isnan(self.elpd)]
        mean, error = mean_and_error(values)
        return mean * len(values), error * len(values)

    @property
    def flag(self) -> np.ndarray:
        """What is wrong with a task, "" if nothing `(task,)`."""
        worst = np.array(
            [np.nanmax(row, initial=-np.inf) for row in np.atleast_1d(self.khat).reshape(len(self.names), -1)]
        )
        texts = [f"leaving it out changes too much: k̂ {k:.2f} (limit {self.limit:.2f})" for k in worst]
        return np.where(worst < self.limit, "", np.array(texts, dtype=object))

    def table(self) -> str:
        """A line a task: log predictive density, k̂ and flag, then the sum."""
        elpd = np.nansum(self.elpd.reshape(len(self.names), -1), 1)
        khat = [np.nanmax(row, initial=-np.inf) for row in self.khat.reshape(len(self.names), -1)]
        lines = [f"{'task':<24} {'elpd':>10} {'k̂':>6}"]
        for name, value, k, flag in zip(self.names, elpd, khat, self.flag, strict=True):
            lines.append(f"{name:<24} {value:>10.3f} {k:>6.2f}  {flag}".rstrip())
        total, error = self.total
        return "\n".join([*lines, f"{'sum':<24} {total:>10.3f} ± {error:.3f}"])

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the log predictive density of each task's rows, their mean, and its k̂ into a file (extra `plots`)."""
        rows = self.elpd.reshape(len(self.names), -1)
        counts = np.isfinite(rows).sum(1)
        elpd = np.nansum(rows, 1) / np.maximum(counts, 1)
        khat = np.array([np.nanmax(row, initial=-np.inf) for row in self.khat.reshape(len(self.names), -1)])
        some = counts > 0
        names = [name for name, there in zip(self.names, some, strict=True) if there]
        what = "row" if self.elpd.ndim > 1 else "task"
        pictures.left_out(names, elpd[some], khat[some], self.limit, what=what).savefig(path)


def leave_one_task_out(fit: Fit, tasks: Tasks | None = None, *, draws: int = 2000, seed: int = 0) -> LeftOut:
    """Log predictive density of each training task given all the others, log p(D_i | D_-i), in nats.

    1 / p(D_i | D_-i) is the mean of 1 / p(D_i | θ) over θ given all tasks, here with Pareto-smoothed weights and
    p(D_i | θ) estimated from weighted draws of φ_i.

    Args:
        fit: A fit.
        tasks: Some of its training tasks; None all of them.
        draws: Draws of θ.
        seed: Of the draws.

    Raises:
        ValueError: A task is not a training task: nothing has to be left out, use `fit.posterior` and score it; a task
            has no rows; or θ is a point.

    References:
        Vehtari, Gelman, Gabry: Practical Bayesian Model Evaluation Using Leave-One-Out Cross-Validation and WAIC, 2017,
        https://doi.org/10.1007/s11222-016-9696-4
    """
    check_whole("draws", draws, psis.MIN_TAIL)
    with seeded(seed, "leave one task out"):
        inside = look_inside(fit, draws)
        chosen = fit.tasks if tasks is None else tasks
        check_tasks("tasks", chosen)
        chosen, known = known_tasks(fit, chosen)
        _check(fit, chosen, known)
        log_evidence = inside.log_evidence(chosen, per_theta=PER_THETA)
    log_weight, khat = left_out(log_evidence)
    elpd = np.logaddexp.reduce(log_weight + log_evidence, 0)
    return LeftOut(chosen.names, elpd, khat, psis.khat_limit(draws))


def loo(post: Posterior, *, site: str | None = None) -> LeftOut:
    """Log predictive density of each row given all others, through ArviZ's `loo` of `post.to_arviz()`.

    Args:
        post: Of training tasks, whose draws are joint, or of new tasks, each with its own draws.
        site: The observed site, where there are several.

    Returns:
        Row by row. Rows of a task without others of its own can hardly be left out: their k̂ is high, and
        `leave_one_task_out` says more.

    Raises:
        ValueError: No posterior, several sites and none chosen, or no rows.
    """
    if not isinstance(post, Posterior):
        raise ValueError(f"loo: expected a Posterior, got {type(post).__name__}: loo(fit.posterior(tasks))")
    likelihood = post.log_likelihood(site)
    there = ~np.isnan(likelihood[0])
    if not there.any():
        raise ValueError("loo: expected tasks with rows, got none")
    elpd, khat = np.full(there.shape, np.nan), np.full(there.shape, np.nan)
    elpd[there], khat[there] = arviz_loo(likelihood[:, there])
    return LeftOut(post.names, elpd, khat, psis.khat_limit(len(likelihood)))


def _check(fit: Fit, tasks: Tasks, known: np.ndarray) -> None:
    if not known.all():
        name = tasks.names[int((~known).argmax())]
        raise ValueError(
            f"leave_one_task_out: task {name!r} is not a training task, so that nothing has to be left out; score it "
            "with fit.prior(like=…).predict(task).log_prob(joint=True)"
        )
    empty = np.asarray(tasks.sizes) == 0
    if empty.any():
        raise ValueError(
            f"leave_one_task_out: task {tasks.names[int(empty.argmax())]!r} has no rows; select the others"
        )
    if fit.shared.status == "plug-in":
        raise ValueError(
            "leave_one_task_out: θ is a point that has seen every task, and no weights undo that; fit with "
            'bm.Amortized(shared="normal")'
        )
