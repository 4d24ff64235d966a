"""What the table asks of a learner, and how its answers are scored, on tasks that are the same for every learner.

A learner's answer is a `Predicted`; `score` turns it into `Scores`, one number a row or a task, so that two learners
are compared pair by pair. Marginal log scores are of each row alone, joint ones of the rows of a task together, divided
by their number; the two are never mixed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

import bayesmeta as bm
from bayesmeta.checks import metrics

DRAWS = 399
"""With so many, coverage of 50, 80, 90 and 95 % intervals has no error from ranking among draws."""
ELEMENTS = 1 << 22
"""Draws × tasks × rows that are held at once."""
PROBS = (0.5, 0.8, 0.9, 0.95)
JOINT_ROWS = 50
"""Rows of a task that are scored together: learners that go row by row take time with the square of their number."""


@dataclass(frozen=True)
class Predicted:
    """A learner's predictions of the rows of T tasks.

    Attributes:
        log_prob: Log density of each row alone `(task, M)`, NaN where there is no row.
        mean: Predictive means `(task, M)`.
        draws: Outcomes of each row alone `(draw, task, M)`.
        joint: Computes log densities of some rows of each task together, `(target) -> (task,)`; None where the learner
            has none.
        flags: For each task what the learner says is wrong with its answer, "" if nothing; may be left out.
    """

    log_prob: np.ndarray
    mean: np.ndarray
    draws: np.ndarray
    joint: Callable[[bm.Tasks], np.ndarray] | None = None
    flags: tuple[str, ...] = ()


class Predictor(Protocol):
    """A learner that has learned."""

    @property
    def parameters(self) -> int:
        """How many numbers were learned."""

    def predict(self, context: bm.Tasks, target: bm.Tasks, *, draws: int, seed: int) -> Predicted:
        """Predicts the rows of `target` given those of `context`, the same tasks in the same order."""


Judge = Callable[[bm.Tasks, bm.Tasks, np.ndarray], np.ndarray]
"""(context, target, draws `(draw, task, M)`) -> a score of each task `(task,)`, NaN where it has none."""


@dataclass(frozen=True)
class Scores:
    """Scores of one learner on T tasks.

    Attributes:
        log_prob: Marginal log scores `(task, M)`, NaN where there is no row.
        joint: Joint log scores, divided by the rows of the task, `(task,)`; None where there are none.
        squared: Squared errors of the means `(task, M)`.
        crps: `(task, M)`.
        pit: Where each row lies among the draws, in (0, 1) `(task, M)`.
        judged: What the suite's own judge found `(task,)`; None without one.
        milliseconds: CPU milliseconds a task for marginal scores, means and draws, all tasks at once.
        flagged: Tasks whose answer the learner itself doubts.
    """

    log_prob: np.ndarray
    joint: np.ndarray | None
    squared: np.ndarray
    crps: np.ndarray
    pit: np.ndarray
    judged: np.ndarray | None
    milliseconds: float
    flagged: int

    def coverage(self) -> tuple[float, ...]:
        """Share of rows inside central intervals of probability `PROBS`, averaged within tasks, then over tasks."""
        half = np.abs(self.pit - 0.5)
        return tuple(metrics.mean_and_error(metrics.coverage(-0.5 * p, 0.5 * p, half))[0] for p in PROBS)

    def calibration(self) -> tuple[float, float]:
        """Calibration error (root mean square over levels): averaged over tasks, and of all tasks pooled."""
        levels = np.asarray(metrics.LEVELS)
        below = [metrics.per_task(np.where(np.isnan(self.pit), np.nan, self.pit <= level)) for level in levels]
        within = np.sqrt(np.square(np.stack(below, 1) - levels).mean(1))
        return metrics.mean_and_error(within)[0], metrics.calibration_error(self.pit)

    def rmse(self) -> tuple[float, float]:
        """Root mean squared error: over all tasks, and of each task, averaged."""
        squared = metrics.per_task(self.squared)
        return metrics.root(squared)[0], metrics.mean_and_error(np.sqrt(squared))[0]


def score(
    predictor: Predictor,
    context: bm.Tasks,
    target: bm.Tasks,
    *,
    draws: int = DRAWS,
    joint_rows: int = JOINT_ROWS,
    judge: Judge | None = None,
) -> Scores:
    """Scores a learner.

    Args:
        predictor: The learner.
        context: Rows that are given.
        target: Rows that are scored, of the same tasks in the same order.
        draws: Outcomes drawn for each row.
        joint_rows: How many rows of a task, the first, are scored together at most; 0 for none.
        judge: A score of the suite's own.

    Raises:
        ValueError: If the learner's log scores are not numbers, with the task, or `context` and `target` differ.
    """
    if context.names != target.names:
        raise ValueError("score: expected a context and a target of the same tasks in the same order, names differ")
    few = context[:2], target[:2]
    predictor.predict(*few, draws=draws, seed=0)  # imports and graphs are not the time of a task
    found = [
        (index, _part(predictor, context[index], target[index], draws=draws, joint_rows=joint_rows, judge=judge))
        for index in _chunks(context, target, draws)
    ]
    rows = max(1, int(target.sizes.max()))
    everywhere = np.concatenate([index for index, _ in found])

    def gathered(name: str) -> np.ndarray:
        return _gathered([(index, getattr(part, name)) for index, part in found], len(target), rows)

    parts = [part for _, part in found]
    return Scores(
        log_prob=gathered("log_prob"),
        joint=gathered("joint") if all(part.joint is not None for part in parts) else None,
        squared=gathered("squared"),
        crps=gathered("crps"),
        pit=gathered("pit"),
        judged=gathered("judged") if judge is not None else None,
        milliseconds=sum(part.milliseconds * len(index) for index, part in found) / len(everywhere),
        flagged=sum(part.flagged for part in parts),
    )


def first_rows(tasks: bm.Tasks, count: int) -> bm.Tasks:
    """The first rows of each task, at most `count`."""
    sizes = torch.from_numpy(tasks.sizes)
    place = torch.arange(int(sizes.sum())) - tasks.offsets[:-1].repeat_interleave(sizes)
    return tasks.split_rows(place < count)[0]


def paired(ours: np.ndarray | None, theirs: np.ndarray | None) -> tuple[float, float]:
    """Mean over tasks of the differences of two learners on the same tasks, and its standard error.

    Args:
        ours: Scores `(task,)` or `(task, M)`; rows are averaged within their task first.
        theirs: The other's, of the same shape.

    Returns:
        (mean, standard error), NaN where one has no scores.
    """
    if ours is None or theirs is None:
        return float("nan"), float("nan")
    difference = ours - theirs
    return metrics.mean_and_error(metrics.per_task(difference) if difference.ndim == 2 else difference)


def _part(
    predictor: Predictor, context: bm.Tasks, target: bm.Tasks, *, draws: int, joint_rows: int, judge: Judge | None
) -> Scores:
    start = time.process_time()
    found = predictor.predict(context, target, draws=draws, seed=0)
    spent = time.process_time() - start
    batch = target.batch(slice(None))
    y = np.where(batch.mask.numpy(), batch.y.double().numpy(), np.nan)
    _check(found, y, target)
    together = None if found.joint is None or not joint_rows else found.joint(first_rows(target, joint_rows))
    # A rank among S draws is one of S + 1; in the middle of its share of (0, 1) none lies on an edge.
    pit = (len(found.draws) * metrics.pit(found.draws, y) + 0.5) / (len(found.draws) + 1)
    return Scores(
        log_prob=found.log_prob,
        joint=None if together is None else together / np.minimum(target.sizes, joint_rows),
        squared=np.square(found.mean - y),
        crps=metrics.crps(found.draws, y),
        pit=pit,
        judged=None if judge is None else judge(context, target, found.draws),
        milliseconds=1e3 * spent / len(target),
        flagged=sum(bool(flag) for flag in found.flags),
    )


def _check(found: Predicted, y: np.ndarray, target: bm.Tasks) -> None:
    for name in ("log_prob", "mean"):
        values = getattr(found, name)
        if values.shape != y.shape:
            raise ValueError(f"{name}: expected shape {y.shape}, tasks and rows, got {values.shape}")
        bad = (np.isnan(values) & ~np.isnan(y)).any(1)
        if bad.any():
            raise ValueError(f"{name}: expected numbers, got NaN in task {target.names[int(bad.argmax())]!r}")


def _chunks(context: bm.Tasks, target: bm.Tasks, draws: int) -> list[np.ndarray]:
    """Positions of tasks with contexts of similar size, so many that their draws fit into memory."""
    order = np.argsort(context.sizes, kind="stable")
    step = max(1, ELEMENTS // (draws * max(1, int(target.sizes.max()))))
    return [order[start : start + step] for start in range(0, len(order), step)]


def _gathered(parts: list[tuple[np.ndarray, np.ndarray]], tasks: int, rows: int) -> np.ndarray:
    """Puts the scores of chunks where their tasks are."""
    found = np.full((tasks, rows) if parts[0][1].ndim == 2 else (tasks,), np.nan)
    for index, values in parts:
        if values.ndim == 2:
            found[index, : values.shape[1]] = values
        else:
            found[index] = values
    return found
