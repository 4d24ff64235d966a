"""Fitted candidates of a comparison of ways of sharing, and the stack of them: a prior to predict with.

`folds.py` scores candidates on held-out rows and finds their weights; `stack_sharing` learns all of them from all tasks
and predicts with their mixture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from bayesmeta.checks.baselines import Baseline
from bayesmeta.data.tasks import Tasks
from bayesmeta.fitting import Fit
from bayesmeta.results.prediction import Prediction, flat_labels
from bayesmeta.results.row_draws import RowDraws

Predict = Callable[[Tasks, Tasks], tuple[Sequence[Prediction], tuple[str, ...]]]
"""Given rows of some tasks and rows to predict: a prediction a site, and for each task what is wrong with it."""


@dataclass(frozen=True)
class Member:
    """A fitted candidate.

    Args:
        name: Of the candidate.
        predict: What it says of new rows.
        y_loc, y_scale: The units of its predictions.
    """

    name: str
    predict: Predict
    y_loc: float = 0.0
    y_scale: float = 1.0

    @classmethod
    def of_fit(cls, name: str, learned: Fit, *, draws: int, seed: int) -> Member:
        """A model as it was fitted."""
        return cls(name, partial(_predicted, learned, draws, seed))

    @classmethod
    def of_baseline(cls, baseline: Baseline) -> Member:
        """No pooling or complete pooling, whose predictions are in standard units."""
        return cls(baseline.name, baseline.predict, baseline.units.y_loc, baseline.units.y_scale)

    def scores(self, given: Tasks, target: Tasks) -> tuple[np.ndarray, int]:
        """Log density of the labels of each row `(task, M)`, NaN where there is none, and how many tasks have flags."""
        found, flags = self.predict(given, target)
        stacked = np.stack([one.log_prob() for one in found])
        total = np.where(np.isnan(stacked).all(0), np.nan, np.nansum(stacked, 0))
        return total - np.log(self.y_scale), sum(map(bool, flags))


def _predicted(learned: Fit, draws: int, seed: int, given: Tasks, target: Tasks) -> tuple[list[Prediction], Any]:
    posterior = learned.posterior(given, draws=draws, seed=seed)
    sites = posterior.density.structure.outcomes
    return [posterior.predict(target, site=site) for site in sites], tuple(posterior.flag)


def mixed(scores: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """Log density of a mixture of candidates, `(task, M)`."""
    with np.errstate(divide="ignore"):
        terms = np.stack([scores[name] + np.log(weight) for name, weight in weights.items()])
    result: np.ndarray = np.logaddexp.reduce(terms, 0)
    return result


@dataclass(frozen=True)
class Stacked:
    """The robust prior: candidates learned from all tasks, mixed with the weights that held-out rows gave them.

    Attributes:
        weights: By candidate.
    """

    weights: dict[str, float]
    members: dict[str, Member] = field(repr=False)
    seed: int = field(default=0, repr=False)

    def predict(
        self, context: Tasks, x: Any = None, columns: Any = None, *, site: str | None = None
    ) -> StackedPrediction:
        """Predicts new rows of known or new tasks.

        Args:
            context: The tasks with the rows that are given.
            x: New inputs `(M, *dx)` for all tasks, a list with one array a task, or `Tasks`.
            columns: The columns that the likelihood needs, `{name: (M,) or list}`.
            site: The observed site, where there are several.

        Raises:
            ValueError: If there are several sites and none is chosen, or what `fit.posterior` and `predict` refuse.
        """
        target = context.at(x, columns)
        found, flags = {}, {}
        for name, member in self.members.items():
            predictions, flags[name] = member.predict(context, target)
            found[name] = _of_site(predictions, site)
        draws = [found[name].draws * member.y_scale + member.y_loc for name, member in self.members.items()]
        chosen = _of_mixture(draws, np.array([self.weights[name] for name in self.members]), self.seed)
        return StackedPrediction(target.names, chosen, _together(flags), self, found, target, isinstance(x, Tasks))


@dataclass(frozen=True)
class StackedPrediction(RowDraws):
    """Draws of new rows of T tasks, in the user's units.

    Attributes:
        names: Task names.
        draws: `(draw, task, M, *dy)`, each from one candidate; NaN where a task has fewer than M rows.
        flag: For each task what is wrong with which candidate's posterior, "" if nothing.
    """

    names: tuple[str, ...]
    draws: np.ndarray
    flag: tuple[str, ...]
    stack: Stacked = field(repr=False)
    parts: dict[str, Prediction] = field(repr=False)
    target: Tasks = field(repr=False)
    labelled: bool = True

    def log_prob(self, y: Any = None) -> np.ndarray:
        """Log density of outcomes under the mixture `(task, M)`, each row by itself; NaN where there is no row.

        Args:
            y: Outcomes `(M, *dy)` for all tasks, `(task, M, *dy)` or a list with one array a task; None takes those of
                the `Tasks` given to `predict`.

        Raises:
            ValueError: Shapes do not fit, or there are no outcomes: `predict` was given inputs alone.
        """
        if y is None and not self.labelled:
            raise ValueError("log_prob: expected outcomes, got none: predict was given inputs alone; pass y")
        return mixed({name: self._score(name, y) for name in self.parts}, self.stack.weights)

    def _score(self, name: str, y: Any) -> np.ndarray:
        part, member = self.parts[name], self.stack.members[name]
        if y is None:
            return part.log_prob() - np.log(member.y_scale)
        flat = (flat_labels(y, self.target).numpy() - member.y_loc) / member.y_scale
        return part.log_prob(np.split(flat, self.target.offsets.tolist()[1:-1])) - np.log(member.y_scale)


def _together(flags: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """For each task the flags of all candidates."""
    said = [[f"{name}: {text}" if text else "" for text in texts] for name, texts in flags.items()]
    return tuple("; ".join(filter(None, texts)) for texts in zip(*said, strict=True))


def _of_site(predictions: Sequence[Prediction], site: str | None) -> Prediction:
    sites = [one.site for one in predictions]
    if len(sites) > 1 and site is None or site is not None and site not in sites:
        raise ValueError(f"predict: expected site= as one of {sites}, got {site!r}")
    return predictions[sites.index(site) if site is not None else 0]


def _of_mixture(draws: Sequence[np.ndarray], weights: np.ndarray, seed: int) -> np.ndarray:
    """As many draws as one candidate has, each candidate's share its weight, but for rounding."""
    count = min(map(len, draws))
    ends = np.cumsum(weights) / weights.sum()
    member = np.searchsorted(ends, (np.arange(count) + 0.5) / count)
    places = np.random.default_rng(seed).permutation(count)
    return np.stack([draws[m][s] for m, s in zip(member, places, strict=True)])
