"""Does sharing help? No pooling, complete pooling and the learned prior on the same new tasks, and a verdict a task.

This is the one piece of code for every such comparison: examples, benchmarks and users call `compare`. The two
baselines are in `baselines.py`, the scores in `metrics.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from bayesmeta.checks import metrics
from bayesmeta.checks.baselines import Baseline, baselines
from bayesmeta.data.tasks import Tasks
from bayesmeta.fitting import Fit
from bayesmeta.fitting import fit as learn
from bayesmeta.hierarchy.model import HierarchicalModel
from bayesmeta.inference.amortized import Amortized
from bayesmeta.results.prediction import Prediction

SCHEMES = ("no pooling", "complete pooling", "learned prior")
INTERVAL = 0.9


@dataclass(frozen=True)
class HeldOut:
    """Predictions of held-out rows in the user's units; arrays `(task, M)`, NaN where a task has no row.

    Attributes:
        names: Tasks.
        y: Outcomes.
        log_prob: Log predictive density of every row by itself.
        mean: Predictive means.
        lower, upper: Central 90 % intervals.
        pit: Probability integral transforms.
        crps: Continuous ranked probability scores.
        flag: What is wrong with a task's posterior, "" if nothing.
    """

    names: tuple[str, ...]
    y: np.ndarray
    log_prob: np.ndarray
    mean: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    pit: np.ndarray
    crps: np.ndarray
    flag: tuple[str, ...]

    def per_task(self) -> dict[str, np.ndarray]:
        """Scores of each task `(task,)`: means over its rows."""
        return {
            "log score": metrics.per_task(self.log_prob),
            "squared error": metrics.squared_error(self.mean, self.y),
            "coverage": metrics.coverage(self.lower, self.upper, self.y),
            "rows": (~np.isnan(self.y)).sum(-1).astype(float),
            "crps": metrics.per_task(self.crps),
        }


def held_out(
    prediction: Prediction, flag: Iterable[str], given: np.ndarray, *, y_loc: float = 0.0, y_scale: float = 1.0
) -> HeldOut:
    """Scores a prediction against the labels of its target tasks.

    Args:
        prediction: Made for `Tasks` that bring their labels, one output.
        flag: For each task what is wrong.
        given: Rows that the prediction has seen `(task, M)`; they are left out.
        y_loc: Origin of the prediction's labels in the user's units.
        y_scale: Their scale.
    """
    batch = prediction.target.batch(np.arange(len(prediction.names)))
    there = batch.mask.numpy() & batch.observed.numpy() & ~given
    y = np.where(there, batch.y.double().numpy() * y_scale + y_loc, np.nan)
    draws = np.where(there, prediction.draws * y_scale + y_loc, np.nan)
    tail = (1 - INTERVAL) / 2
    lower, upper = np.quantile(draws, [tail, 1 - tail], axis=0)
    with np.errstate(invalid="ignore"):
        log_prob = np.where(there, prediction.log_prob() - np.log(y_scale), np.nan)
    pit, crps = metrics.pit(draws, y), metrics.crps(draws, y)
    return HeldOut(prediction.names, y, log_prob, draws.mean(0), lower, upper, pit, crps, tuple(flag))


@dataclass
class Comparison:
    """Held-out predictions of several ways of sharing.

    Attributes:
        held_out: For each (scheme, rows of context) the held-out predictions; several if splits were put together.
    """

    held_out: dict[tuple[str, int], list[HeldOut]] = field(default_factory=dict)

    @property
    def contexts(self) -> tuple[int, ...]:
        """Rows of context, ascending."""
        return tuple(sorted({context for _, context in self.held_out}))

    def tasks(self, scheme: str, context: int, score: str) -> dict[str, float]:
        """A score of every task by name, averaged over the splits in which the task was new.

        Args:
            scheme: One of `SCHEMES`.
            context: Rows of context.
            score: "log score", "squared error", "coverage", "crps" or "rows", how many were scored.

        Raises:
            ValueError: There is no such comparison or score.
        """
        if (scheme, context) not in self.held_out:
            raise ValueError(f"expected one of {sorted(self.held_out)}, got {(scheme, context)!r}")
        found: dict[str, list[float]] = {}
        for part in self.held_out[scheme, context]:
            scores = part.per_task()
            if score not in scores:
                raise ValueError(f"expected a score among {sorted(scores)}, got {score!r}")
            for name, value in zip(part.names, scores[score], strict=True):
                found.setdefault(name, []).append(float(value))
        return {name: float(np.mean(values)) for name, values in found.items() if not np.isnan(values).any()}

    def score(self, scheme: str, context: int, score: str) -> tuple[float, float]:
        """Mean over tasks and its standard error.

        "rmse" is the root of the mean squared error; "coverage of rows" the share of all rows within their intervals,
        every row counting the same, where "coverage" lets every task count the same.
        """
        if score == "rmse":
            return metrics.root(np.array(list(self.tasks(scheme, context, "squared error").values())))
        if score == "coverage of rows":
            rows = self.tasks(scheme, context, "rows")
            shares = self.tasks(scheme, context, "coverage")
            count = np.array([rows[name] for name in shares])
            return metrics.ratio_and_error(np.array(list(shares.values())) * count, count)
        return metrics.mean_and_error(np.array(list(self.tasks(scheme, context, score).values())))

    def gain(self, over: str, context: int) -> tuple[float, float]:
        """Log score of the learned prior minus that of another scheme, paired by task: mean and standard error."""
        mine, other = (self.tasks(scheme, context, "log score") for scheme in (SCHEMES[2], over))
        return metrics.mean_and_error(np.array([mine[name] - other[name] for name in mine]))

    def verdicts(self, context: int) -> dict[str, str]:
        """What sharing does for each task: held-out log score of the learned prior against no pooling.

        "sharing helps" or "negative transfer" where the mean difference over rows is more than two standard errors
        from 0 (`metrics.score_difference`), else "no clear difference".
        """
        mine, alone = (self.held_out[scheme, context] for scheme in (SCHEMES[2], SCHEMES[0]))
        rows: dict[str, list[float]] = {}
        for a, b in zip(mine, alone, strict=True):
            for name, difference in zip(a.names, a.log_prob - b.log_prob, strict=True):
                rows.setdefault(name, []).extend(difference[~np.isnan(difference)].tolist())
        return {name: metrics.verdict(np.array(values)) for name, values in rows.items()}

    def table(self) -> str:
        """Mean held-out log score and RMSE, and the share of rows in 90 % intervals, a line a scheme and context."""
        lines = [f"{'rows given':>10}  {'scheme':<17} {'log score':>17} {'RMSE':>16} {'90 % coverage':>16}"]
        for context in self.contexts:
            for scheme in SCHEMES:
                cells = [_cell(*self.score(scheme, context, s)) for s in ("log score", "rmse")]
                share, error = self.score(scheme, context, "coverage of rows")
                cells.append(f"{100 * share:.1f} ± {100 * error:.1f} %")
                lines.append(f"{context:>10}  {scheme:<17} {cells[0]:>17} {cells[1]:>16} {cells[2]:>16}")
        return "\n".join(lines)

    @property
    def flagged(self) -> dict[str, int]:
        """For each scheme the number of posteriors that are not to be trusted."""
        return {
            scheme: sum(
                bool(f) for (s, _), parts in self.held_out.items() if s == scheme for p in parts for f in p.flag
            )
            for scheme in SCHEMES
        }


def together(comparisons: Iterable[Comparison]) -> Comparison:
    """Puts the comparisons of several splits together."""
    result = Comparison()
    for comparison in comparisons:
        for key, parts in comparison.held_out.items():
            result.held_out.setdefault(key, []).extend(parts)
    return result


def compare(
    model: HierarchicalModel,
    known: Tasks,
    new: Tasks,
    *,
    fit: Fit | None = None,
    contexts: Sequence[int] = (0, 1, 2, 3, 5),
    draws: int = 4000,
    seed: int = 0,
    method: str | Amortized = "amortized",
) -> Comparison:
    """Gives new tasks a few rows each and scores the rest under no pooling, complete pooling and the learned prior.

    *No pooling*: φ_i ~ N(φ̂ of complete pooling, 10² I) with x and y standardised, noise learned from all training
    tasks. *Complete pooling*: one uncertain φ. Tasks that have no row left to score are left out.

    Args:
        model: Components, with a `Gaussian` prior.
        known: Training tasks.
        new: New tasks.
        fit: The learned prior, if there is one already (of any model); else `model` is fitted.
        contexts: How many rows of each new task are given; they are drawn at random.
        draws: Draws of every posterior.
        seed: Of the choice of rows and of all draws.
        method: How to fit.
    """
    learned = learn(model, known, seed=seed, method=method, progress=False) if fit is None else fit
    others = baselines(model, known, draws=draws, seed=seed)
    result = Comparison()
    for count in contexts:
        context, given = first_rows(new, count, seed=seed)
        for baseline in others:
            result.held_out[baseline.name, count] = [_of_baseline(baseline, context, new, given)]
        posterior = learned.posterior(context, draws=draws, seed=seed)
        result.held_out[SCHEMES[2], count] = [held_out(posterior.predict(new), posterior.flag, given)]
    return result


def first_rows(tasks: Tasks, count: int, *, seed: int) -> tuple[Tasks, np.ndarray]:
    """Each task with `count` of its rows at random, and which rows those are `(task, M)`.

    The rows of a task are put in one random order for a seed, so that those given with a smaller count are among those
    given with a larger one.
    """
    generator = np.random.default_rng(seed)
    ranks = np.concatenate([generator.permutation(int(n)) for n in tasks.sizes])
    context, _ = tasks.split_rows(torch.as_tensor(ranks < count))
    given = np.zeros((len(tasks), max(1, int(np.max(tasks.sizes)))), dtype=bool)
    for row, (a, b) in zip(given, pairwise(tasks.offsets.tolist()), strict=True):
        row[: b - a] = ranks[a:b] < count
    return context, given


def _of_baseline(baseline: Baseline, context: Tasks, target: Tasks, given: np.ndarray) -> HeldOut:
    (prediction,), flags = baseline.predict(context, target)
    return held_out(prediction, flags, given, y_loc=baseline.units.y_loc, y_scale=baseline.units.y_scale)


def _cell(value: float, error: float) -> str:
    return f"{value:.3f} ± {error:.3f}"
