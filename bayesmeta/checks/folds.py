"""Which way of sharing is right for these tasks? Held-out rows and held-out tasks, candidate by candidate.

`compare_sharing` refits every candidate on folds of the rows within each task, and on folds of the tasks; `robust`
stacks the candidates by folds inside the training rows. The two baselines are in `baselines.py`, fitted candidates and
their mixture in `stacked.py`, weights in `stacking.py`, pictures in `sharing_pictures.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bayesmeta.checks.baselines import baselines, origin_of
from bayesmeta.checks.metrics import clustered_mean, per_task, score_difference, verdict
from bayesmeta.checks.sharing_pictures import differences
from bayesmeta.checks.stacked import Member, Stacked, mixed
from bayesmeta.checks.stacking import stacking_weights
from bayesmeta.data.tasks import Tasks
from bayesmeta.fitting import Fit, fit
from bayesmeta.hierarchy.model import HierarchicalModel
from bayesmeta.results.arguments import check_tasks, check_whole

NO_POOLING, COMPLETE_POOLING, LEARNED, ROBUST = "no pooling", "complete pooling", "learned prior", "robust"


@dataclass(frozen=True)
class SharingScores:
    """Held-out log scores of several ways of sharing, in nats.

    Attributes:
        names: Tasks.
        rows: For each candidate the log predictive density of each row given the other folds of its task `(task, M)`,
            NaN where there is no row.
        new: For each candidate that of each row of a task left out, given `context` of its rows `(task, M)`; those
            given are NaN. Empty if no tasks were left out.
        context: How many rows of a left-out task are given.
        weights: Stacking weights by candidate, from all rows; empty without `robust`.
        flagged: For each candidate how many task posteriors it flagged.
    """

    names: tuple[str, ...]
    rows: dict[str, np.ndarray]
    new: dict[str, np.ndarray]
    context: int
    weights: dict[str, float]
    flagged: dict[str, int]

    @property
    def candidates(self) -> tuple[str, ...]:
        """Names of the candidates."""
        return tuple(self.rows)

    def per_task(self, candidate: str, *, new: bool = False) -> np.ndarray:
        """Mean log score of each task's rows `(task,)`, NaN for a task without scored rows."""
        return per_task(self._scores(candidate, new))

    def difference(self, one: str, other: str, *, new: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Per task the mean difference of two candidates' log scores, and its standard error over rows, `(task,)`.

        The error is no less than log(20)/2n for n rows: rows with the same labels are alike by chance too.
        """
        mean, error = np.transpose([score_difference(row) for row in self._scores(one, new) - self._scores(other, new)])
        return mean, error

    def total(self, candidate: str, *, over: str | None = None, new: bool = False) -> tuple[float, float]:
        """Mean log score of all rows, or of the paired difference to another candidate, and its standard error.

        Rows of a task hang together: the error is that of a mean over tasks.
        """
        values = self._scores(candidate, new)
        return clustered_mean(values if over is None else values - self._scores(over, new))

    def _scores(self, candidate: str, new: bool) -> np.ndarray:
        scores = self.new if new else self.rows
        if candidate not in scores:
            what = "left-out tasks" if new else "held-out rows"
            raise ValueError(f"expected one of {list(scores)} for {what}, got {candidate!r}")
        return scores[candidate]

    @property
    def _sharing(self) -> tuple[str, ...]:
        return tuple(name for name in self.candidates if name != NO_POOLING)

    @property
    def _best_sharing(self) -> str:
        """`ROBUST` is none: it may be no pooling by another name."""
        return max((name for name in self._sharing if name != ROBUST), key=lambda name: self.total(name)[0])

    @property
    def best(self) -> str:
        """The candidate with the highest log score of held-out rows."""
        return max(self.candidates, key=lambda name: self.total(name)[0])

    def verdicts(self, candidate: str | None = None) -> dict[str, str]:
        """What sharing does for each task: a candidate, by default the best that shares, against no pooling.

        "sharing helps" or "negative transfer" where the mean difference over rows is more than two standard errors from
        0 (of `difference`: the task's labels are then at least 20 times likelier in all), else "no clear difference".
        Each task is judged by itself: of those not hurt up to 5 % may be called so by chance.
        """
        shared = self._scores(self._best_sharing if candidate is None else candidate, False)
        values = shared - self._scores(NO_POOLING, False)
        return {name: verdict(row) for name, row in zip(self.names, values, strict=True)}

    @property
    def hurt(self) -> tuple[str, ...]:
        """Tasks that the best way of sharing hurts."""
        return tuple(name for name, text in self.verdicts().items() if text == "negative transfer")

    def table(self) -> str:
        """A line a candidate: log score of rows and of left-out tasks, and the differences to no pooling."""
        lines = [f"{'candidate':<20} {'rows':>18} {'to no pooling':>18} {'left-out tasks':>18} {'weight':>7}"]
        for name in self.candidates:
            cells = [_cell(*self.total(name)), _cell(*self.total(name, over=NO_POOLING))]
            cells.append(_cell(*self.total(name, new=True)) if name in self.new else "")
            weight = f"{self.weights[name]:.2f}" if name in self.weights else ""
            lines.append(f"{name:<20} {cells[0]:>18} {cells[1]:>18} {cells[2]:>18} {weight:>7}".rstrip())
        hurt = ", ".join(self.hurt) or "none"
        return "\n".join([*lines, f"tasks that sharing hurts: {hurt}"])

    def plot(self, path: str | None = None) -> Any:
        """A picture of the differences to no pooling, task by task; saved if a path is given.

        Returns:
            A matplotlib figure.
        """
        found = {name: self.difference(name, NO_POOLING) for name in self._sharing}
        figure = differences(self.names, found, best=self._best_sharing)
        if path is not None:
            figure.savefig(path)
        return figure


def _cell(mean: float, error: float) -> str:
    return f"{mean:.3f} ± {error:.3f}"


def compare_sharing(
    models: HierarchicalModel | Mapping[str, Any],
    tasks: Tasks,
    *,
    folds: int | tuple[int, int] = 5,
    context: int | None = 0,
    robust: bool = False,
    method: Any = "amortized",
    draws: int = 1000,
    seed: int = 0,
) -> SharingScores:
    """Scores ways of sharing on held-out rows and on held-out tasks.

    *no pooling* and *complete pooling* keep the first model's predictor and likelihood: φ_i ~ N(φ̂ of complete pooling,
    10² I), noise learned from all tasks, and one uncertain φ for all tasks. x and normal labels are standardised for
    them; where the predictor is a module, x is not, and where it has weights or units of its own, nothing is: weights
    are those of its fit, and 10 is in its units, so give `multitask` the tasks as `standardize=`; those units are of
    all rows then, held-out ones too. A noise that is part of φ is the task's own without pooling.

    Args:
        models: A model, the *learned prior*, or several by name. The first one is of components.
        tasks: The tasks; those with a single row are scored without rows of their own.
        folds: Folds of the rows within each task, and of the tasks; a pair where they differ: `(5, len(tasks))` leaves
            out one task at a time.
        context: Rows of a left-out task that are given; those with no more rows are not scored there. None to leave
            no tasks out.
        robust: Add a candidate that stacks all others with weights from `folds` inside the training rows of each fold,
            so that it is no worse than the better of no pooling and complete pooling by more than noise. Left-out
            tasks are not scored by it: weights of rows of known tasks give no pooling more than suits a new one.
        method: How models are fitted, as in `bm.fit`.
        draws: Draws of each posterior.
        seed: Of folds, fits and draws.

    Returns:
        Scores with `.table()`, `.verdicts()`, `.hurt`, `.best` and `.plot()`; `stack_sharing` predicts with `.weights`.

    Raises:
        ValueError: If the first model has no components, names clash, or a task has too few rows.

    References:
        Yao, Vehtari, Simpson, Gelman: Using Stacking to Average Bayesian Predictive Distributions, 2018,
        https://doi.org/10.1214/17-BA1091
    """
    check_tasks("tasks", tasks)
    of_rows, of_tasks = folds if isinstance(folds, tuple) and len(folds) == 2 else (folds, folds)
    check_whole("folds", of_rows, 2)
    check_whole("folds", of_tasks, 2)
    check_whole("draws", draws, 1)
    contest = _Contest(_named(models), method, draws, seed)
    scores = contest.held_out(tasks, of_rows, inner=of_rows if robust else 0)
    weights: dict[str, float] = {}
    if robust:
        plain = {name: values for name, values in scores.items() if name != ROBUST}
        weights = dict(zip(plain, stacking_weights(np.stack(list(plain.values()))).tolist(), strict=True))
    flagged = dict(contest.flagged)
    new = {} if context is None else contest.left_out(tasks, of_tasks, context)
    return SharingScores(tasks.names, scores, new, context or 0, weights, flagged)


def stack_sharing(
    models: HierarchicalModel | Mapping[str, Any],
    tasks: Tasks,
    weights: Mapping[str, float],
    *,
    method: Any = "amortized",
    draws: int = 1000,
    seed: int = 0,
) -> Stacked:
    """The robust prior to predict with: all candidates learned from all tasks, mixed.

    Args:
        models: As in `compare_sharing`.
        tasks: The tasks to learn from.
        weights: `SharingScores.weights` of `compare_sharing(..., robust=True)`.
        method: How models are fitted, as in `bm.fit`.
        draws: Draws of each posterior.
        seed: Of fits and draws.

    Returns:
        What `.predict(context, x)` gives `.mean`, `.interval(0.9)` and `.log_prob(y)` of.

    Raises:
        ValueError: If weights are not those of the candidates, or what `compare_sharing` refuses.
    """
    check_tasks("tasks", tasks)
    check_whole("draws", draws, 1)
    named = _named(models)
    expected = [*named, NO_POOLING, COMPLETE_POOLING]
    if set(weights) != set(expected):
        raise ValueError(f"weights: expected one for each of {expected}, got {dict(weights)}; robust=True finds them")
    members = {member.name: member for member in _Contest(named, method, draws, seed).members(tasks)}
    return Stacked({name: float(weights[name]) for name in members}, members, seed)


def row_folds(tasks: Tasks, folds: int, *, seed: int) -> np.ndarray:
    """A fold for each row `(R,)`: within each task at random and as even as its rows allow."""
    generator = np.random.default_rng(seed)
    parts = [(generator.permutation(int(n)) + generator.integers(folds)) % folds for n in tasks.sizes]
    return np.concatenate(parts)


def _named(models: Any) -> dict[str, Any]:
    found = dict(models) if isinstance(models, Mapping) else {LEARNED: models}
    taken = sorted({NO_POOLING, COMPLETE_POOLING, ROBUST} & found.keys())
    if not found or taken:
        raise ValueError(f"models: expected models by name, without the names {taken}, got {list(found)}")
    origin_of(next(iter(found.values())))
    return found


@dataclass
class _Contest:
    """Fits all candidates to some tasks and scores others."""

    models: dict[str, Any]
    method: Any
    draws: int
    seed: int

    def __post_init__(self) -> None:
        self.flagged = dict.fromkeys([*self.models, NO_POOLING, COMPLETE_POOLING], 0)

    def held_out(self, tasks: Tasks, folds: int, *, inner: int) -> dict[str, np.ndarray]:
        """Log densities `(task, M)` of all rows, each predicted from the other folds; with `inner`, `ROBUST` too."""
        fold = row_folds(tasks, folds, seed=self.seed)
        parts: list[dict[str, np.ndarray]] = []
        for k in range(folds):
            target, given = tasks.split_rows(torch.as_tensor(fold == k))
            scores = self._scores(given, given, target)
            if inner:
                scores[ROBUST] = mixed(scores, self._weights(given, inner))
            parts.append({name: _flat(values, target) for name, values in scores.items()})
        return {name: _padded(tasks, fold, [part[name] for part in parts]) for name in parts[0]}

    def _weights(self, given: Tasks, folds: int) -> dict[str, float]:
        """Stacking weights from the rows of `given` alone."""
        inside = dataclasses.replace(self, seed=self.seed + 1).held_out(given, folds, inner=0)
        return dict(zip(inside, stacking_weights(np.stack(list(inside.values()))).tolist(), strict=True))

    def left_out(self, tasks: Tasks, folds: int, context: int) -> dict[str, np.ndarray]:
        """Log densities `(task, M)` of the rows of tasks that were not trained on, but for the rows given."""
        count = min(folds, len(tasks))
        fold = np.random.default_rng(self.seed).permutation(len(tasks)) % count
        found: dict[str, np.ndarray] = {}
        for k in range(count):
            known, new = tasks[np.flatnonzero(fold != k)], tasks[np.flatnonzero(fold == k)]
            scores = self._scores(known, *new.context_target(context=context, seed=self.seed))
            for name, values in scores.items():
                into = found.setdefault(name, np.full((len(tasks), int(max(tasks.sizes))), np.nan))
                into[fold == k, : values.shape[1]] = values
        return found

    def _scores(self, known: Tasks, given: Tasks, target: Tasks) -> dict[str, np.ndarray]:
        """Log densities `(task, M)` of rows given others, by candidate, all of them learned from `known`."""
        found: dict[str, np.ndarray] = {}
        for member in self.members(known):
            found[member.name], flagged = member.scores(given, target)
            self.flagged[member.name] += flagged
        return found

    def members(self, known: Tasks) -> Iterator[Member]:
        """All candidates, learned from some tasks."""
        for place, (name, model) in enumerate(self.models.items()):
            learned = fit(model, known, method=self.method, seed=self.seed, progress=False)
            if not place:
                first = learned
            yield Member.of_fit(name, learned, draws=self.draws, seed=self.seed)
        plain = _with_trained_parts(next(iter(self.models.values())), first)
        yield from map(Member.of_baseline, baselines(plain, known, draws=self.draws, seed=self.seed))


def _with_trained_parts(model: HierarchicalModel, learned: Fit) -> HierarchicalModel:
    """The model with the predictor's weights as they were trained, frozen; the model itself where there are none."""
    if "predictor" not in learned.modules:
        return model
    return model.with_predictor(learned.modules["predictor"].requires_grad_(False))


def _flat(values: np.ndarray, tasks: Tasks) -> np.ndarray:
    """Padded `(task, M)` as one value a row `(R,)`."""
    return np.concatenate([row[:n] for row, n in zip(values, tasks.sizes, strict=True)])


def _padded(tasks: Tasks, fold: np.ndarray, parts: Sequence[np.ndarray]) -> np.ndarray:
    """The values of the rows of each fold, put together as `(task, M)`."""
    flat = np.empty(len(fold))
    for k, part in enumerate(parts):
        flat[fold == k] = part
    padded = np.full((len(tasks), int(max(tasks.sizes))), np.nan)
    padded[np.arange(padded.shape[1]) < np.asarray(tasks.sizes)[:, None]] = flat
    return padded
