"""The table in Markdown and its picture; every gap is paired with the oracle's score of the same task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bayesmeta.checks import metrics
from bayesmeta.checks.plots import BLUE, FONT, GREY, ORANGE, panels
from benchmarks.scores import JOINT_ROWS, PROBS, Scores, paired

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MISSING = "–"
TICKS = (-100, -10, -1, -0.1, -0.02, 0)
"""Of gaps, in nats."""
COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
FIXED = ("oracle", "trivial", "no pooling", "complete pooling")
HEADINGS = (
    "learner",
    "marginal log score",
    "gap to oracle ± s.e.",
    "joint log score",
    "joint gap to oracle ± s.e.",
    "RMSE",
    "RMSE of a task",
    "CRPS",
    *(f"{100 * p:g} %" for p in PROBS),
    "calibration error of a task",
    "pooled",
    "parameters",
    "training CPU s",
    "CPU ms a new task",
)


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        name: The learner.
        scores: Its scores; None where there is no such predictor.
        parameters: How many numbers it learned.
        seconds: CPU seconds of training.
        learner: Of lines that differ in the seed alone, what they have in common; "" for the fixed rows.
    """

    name: str
    scores: Scores | None
    parameters: int = 0
    seconds: float = 0.0
    learner: str = ""


@dataclass(frozen=True)
class Table:
    """Scores of learners on one evaluation set.

    Attributes:
        suite: Name of the suite.
        about: What its tasks are.
        rows: The lines, the oracle's first.
        tasks: How many tasks were scored.
        pooled: What no pooling and complete pooling are, in words.
        judged: Heading of the suite's own score, "" without one.
        joint_rows: How many rows of a task were scored together at most.
    """

    suite: str
    about: str
    rows: Sequence[Row]
    tasks: int
    pooled: str = ""
    judged: str = ""
    joint_rows: int = JOINT_ROWS

    @property
    def oracle(self) -> Scores | None:
        """The oracle's scores, where it is known."""
        return self.rows[0].scores

    def markdown(self) -> str:
        """Heading, table and notes."""
        headings = [*HEADINGS, *([self.judged] if self.judged else [])]
        lines = [headings, ["---"] * len(headings), *(self._cells(row) for row in self.rows)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"## {self.suite}\n\n{self.about}\n\n{table}\n\n" + "\n".join(f"- {note}" for note in self._notes())

    def _cells(self, row: Row) -> list[str]:
        found = row.scores
        if found is None:
            return [row.name, *[MISSING] * (len(HEADINGS) - 1 + bool(self.judged))]
        joint = math.nan if found.joint is None else metrics.mean_and_error(found.joint)[0]
        judged = [] if found.judged is None else [_share(found.judged)]
        return [
            row.name,
            _number(metrics.mean_and_error(metrics.per_task(found.log_prob))[0]),
            _gap(*self._paired(found, "log_prob")),
            _number(joint),
            _gap(*self._paired(found, "joint")),
            *(_number(value, 4) for value in (*found.rmse(), metrics.mean_and_error(metrics.per_task(found.crps))[0])),
            *(_number(100 * share, 1) for share in found.coverage()),
            *(_number(value, 4) for value in found.calibration()),
            f"{row.parameters:,}",
            _number(row.seconds, 1),
            _number(found.milliseconds, 2),
            *judged,
        ]

    def _paired(self, found: Scores, name: str) -> tuple[float, float]:
        return paired(getattr(found, name), None if self.oracle is None else getattr(self.oracle, name))

    def _notes(self) -> list[str]:
        notes = [
            f"{self.tasks} tasks, the same for all; log scores in nats a row, averaged over the rows of a task, then "
            f"over tasks; marginal: each row alone, joint: the rows of a task together, at most {self.joint_rows}",
            "gap: score minus the oracle's on the same task; coverage: share of rows in central intervals, in %",
        ]
        if self.pooled:
            notes.append(f"no pooling, complete pooling: {self.pooled}")
        if self.oracle is not None:
            within, pooled = self.oracle.calibration()
            notes.append(
                f"calibration error: the floor is the oracle's own, {within:.4f} of a task, {pooled:.4f} pooled"
            )
        for row in self.rows:
            if row.scores is not None and row.scores.flagged:
                notes.append(f"{row.name}: {row.scores.flagged} of {self.tasks} tasks flagged by the learner itself")
        return notes + self._over_seeds()

    def _over_seeds(self) -> list[str]:
        """Mean and standard deviation over seeds of learners with several."""
        notes = []
        for learner in dict.fromkeys(row.learner for row in self.rows if row.learner):
            same = [row.scores for row in self.rows if row.learner == learner and row.scores is not None]
            if len(same) < 2:
                continue
            log = np.array([metrics.mean_and_error(metrics.per_task(found.log_prob))[0] for found in same])
            rmse = np.array([found.rmse()[0] for found in same])
            notes.append(
                f"{learner}, mean ± sd over {len(same)} seeds: marginal log score {log.mean():.3f} ± "
                f"{log.std(ddof=1):.3f}, RMSE {rmse.mean():.4f} ± {rmse.std(ddof=1):.4f}"
            )
        return notes

    def picture(self) -> Figure:
        """Log scores below the oracle, errors of means, and calibration of every line."""
        shown = [(row, row.scores) for row in self.rows if row.scores is not None]
        figure, (left, middle, right) = panels(3, width=5.4, height=1.9 + 0.42 * max(6, len(shown)))
        place = np.arange(len(shown))[::-1]
        self._draw_scores(left, shown, place)
        left.set_yticks(place, [row.name for row, _ in shown], fontsize=FONT - 1)
        middle.set_yticks(place, [""] * len(shown))
        for k, (row, scores) in enumerate(shown):
            middle.plot(scores.rmse()[0], place[k], "o", markersize=8, **_style(row, k, line=False))
            levels = np.asarray(metrics.LEVELS)
            curve = metrics.calibration_curve(scores.pit) - levels
            right.plot(levels, curve, label=row.name, linewidth=2, **_style(row, k, line=True))
        middle.set(xlabel="RMSE (units of y)", title="error of the predictive mean")
        right.axhline(0, color="black", linewidth=0.7)
        right.set(xlabel="level", ylabel="share of rows below − level", title="calibration")
        figure.legend(*right.get_legend_handles_labels(), loc="outside right upper", fontsize=FONT - 2, frameon=False)
        figure.suptitle(f"{self.suite}: {self.tasks} tasks", fontsize=FONT + 1)
        return figure

    def _draw_scores(self, axis: Any, shown: Sequence[tuple[Row, Scores]], place: np.ndarray) -> None:
        for k, (row, scores) in enumerate(shown):
            mean, error = (
                metrics.mean_and_error(metrics.per_task(scores.log_prob))
                if self.oracle is None
                else self._paired(scores, "log_prob")
            )
            axis.errorbar(
                mean, place[k], xerr=2 * error, fmt="o", markersize=8, capsize=3, **_style(row, k, line=False)
            )
        if self.oracle is None:
            axis.set(xlabel="nats a row, ± 2 s.e.", title="marginal log score")
            return
        axis.axvline(0, color="black", linewidth=0.7)
        worst = min(self._paired(scores, "log_prob")[0] for _, scores in shown)
        axis.set_xscale("symlog", linthresh=0.02)
        kept = [tick for tick in TICKS if tick >= 2 * worst]
        axis.set_xticks(kept, [f"{tick:g}" for tick in kept])
        axis.minorticks_off()
        axis.set_xlim(min(2 * worst, -0.02), 0.02)
        axis.set(xlabel="gap to the oracle (nats a row, ± 2 s.e.)", title="marginal log score")


def _style(row: Row, k: int, *, line: bool) -> dict[str, Any]:
    """Fixed rows in grey, told apart by their lines, learners in colour."""
    dashes = ("-", ":", "--", "-.")
    if not row.learner:
        colour = "black" if k == 0 else GREY
        return {"color": colour} | ({"linestyle": dashes[k % 4]} if line else {})
    return {"color": COLOURS[(k - len(FIXED)) % len(COLOURS)]}


def _number(value: float, digits: int = 3) -> str:
    return MISSING if math.isnan(value) else f"{value:.{digits}f}"


def _gap(mean: float, error: float) -> str:
    return MISSING if math.isnan(mean) else f"{mean:+.3f} ± {error:.3f}"


def _share(judged: np.ndarray) -> str:
    share, error = metrics.mean_and_error(judged)
    count = int(np.sum(~np.isnan(judged)))
    return MISSING if not count else f"{100 * share:.1f} ± {100 * error:.1f} % of {count}"
