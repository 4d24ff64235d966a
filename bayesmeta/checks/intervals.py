"""Empirical coverage: how often do central intervals hold what is true?

Of parameters on simulated data, where the truth is known, and of predictions on held-out rows. `calibration.py` asks
more of simulated data; this asks it in the words that users of intervals use.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bayesmeta.checks import metrics, pictures
from bayesmeta.checks.calibration import Calibration
from bayesmeta.results.posterior import Posterior
from bayesmeta.results.prediction import Prediction

PROBS = (0.5, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Coverage:
    """Shares of true values inside central intervals.

    Attributes:
        probs: Probabilities of the intervals `(prob,)`.
        share: For every parameter, component by component, the share inside `(prob,)`.
        error: Its standard error over tasks or replicates `(prob,)`; where all of them agree, so that their spread says
            nothing, that of as many independent intervals of the right probability.
    """

    probs: np.ndarray
    share: dict[str, np.ndarray]
    error: dict[str, np.ndarray]

    def z(self) -> dict[str, np.ndarray]:
        """Share minus probability in standard errors, `(prob,)` for every parameter."""
        return {name: (share - self.probs) / self.error[name] for name, share in self.share.items()}

    def table(self) -> str:
        """A line a parameter, per cent inside ± standard error."""
        lines = [f"{'parameter':<24}" + "".join(f"{f'{100 * p:g} %':>16}" for p in self.probs)]
        for name, share in self.share.items():
            cells = [f"{100 * s:.1f} ± {100 * e:.1f}" for s, e in zip(share, self.error[name], strict=True)]
            lines.append(f"{name:<24}" + "".join(f"{cell:>16}" for cell in cells))
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws coverage minus probability into a file (extra `plots`)."""
        pictures.coverages(self.share, self.error, self.probs).savefig(path)


def coverage(
    source: Posterior | Prediction | Calibration,
    truth: Mapping[str, Any] | None = None,
    *,
    probs: Sequence[float] = PROBS,
) -> Coverage:
    """How often central intervals of 50, 80, 90 and 95 % hold the truth.

    Args:
        source: A `Posterior` of simulated tasks, with `truth`; a `Prediction` of held-out rows that came with labels
            (`post.predict(target)`); or what `sbc` returned (flagged replicates are left out).
        truth: True values of task parameters `{site: (task, *event)}`, as `bm.simulate` gives them; shared ones and
            others that the posterior does not have are ignored. A posterior alone needs it.
        probs: Probabilities of the intervals.

    Returns:
        Shares and standard errors. Those of tasks take the tasks as independent given what the fit has learned: a θ
        that is off by chance moves all of them. Rows are averaged within a task first. Intervals of counts hold more
        than they promise, since their ends belong to them.

    Raises:
        ValueError: A probability outside (0, 1), a truth that is missing or of the wrong shape, predictions without
            labels.
    """
    levels = np.asarray(probs, dtype=float)
    if levels.ndim != 1 or not len(levels) or not ((levels > 0) & (levels < 1)).all():
        raise ValueError(f"probs: expected probabilities in (0, 1), got {probs!r}")
    if (truth is not None) != isinstance(source, Posterior):
        raise ValueError(
            f"coverage: expected a Posterior with its truth, or a Prediction or Calibration without, got a "
            f"{type(source).__name__} {'with' if truth is not None else 'without'} truth"
        )
    inside = _inside(source, truth or {}, levels)
    return Coverage(levels, *_shares(inside, levels))


def _inside(source: Any, truth: Mapping[str, Any], levels: np.ndarray) -> dict[str, np.ndarray]:
    """For every parameter the share inside, of each task or replicate, `(prob, task)`; NaN where there is none."""
    if isinstance(source, Posterior):
        return _of_posterior(source, truth, levels)
    if isinstance(source, Prediction):
        return {source.site: _of_prediction(source, levels)}
    if isinstance(source, Calibration):
        return _of_ranks(source, levels)
    raise ValueError(f"coverage: expected a Posterior, a Prediction or a Calibration, got {type(source).__name__}")


def _of_posterior(posterior: Posterior, truth: Mapping[str, Any], levels: np.ndarray) -> dict[str, np.ndarray]:
    found = {}
    for site in (name for name in posterior.sites if name in truth):
        ends, true = posterior.quantile(site, _ends(levels).tolist()), np.asarray(truth[site], dtype=float)
        if true.shape != ends.shape[1:]:
            raise ValueError(f"truth[{site!r}]: expected shape {ends.shape[1:]} (task, …), got {true.shape}")
        held = (ends[: len(levels)] <= true) & (true <= ends[len(levels) :])
        for place in np.ndindex(true.shape[1:]):
            label = site + (f"[{','.join(map(str, place))}]" if place else "")
            found[label] = held[:, :, *place].astype(float)
    if not found:
        raise ValueError(f"truth: expected values of some of {list(posterior.sites)}, got {sorted(truth)}")
    return found


def _of_prediction(prediction: Prediction, levels: np.ndarray) -> np.ndarray:
    if not prediction.labelled:
        raise ValueError(
            "coverage: expected predictions of rows with labels; pass Tasks to predict: post.predict(target)"
        )
    batch = prediction.density.labels(prediction.site, prediction.target.batch(np.arange(len(prediction.names))))
    rows = batch.mask.reshape(*batch.mask.shape, *[1] * (batch.y.dim() - 2))
    y = np.where((batch.observed & rows).numpy(), batch.y.double().numpy(), np.nan)
    if y.shape != prediction.draws.shape[1:]:
        raise ValueError(
            f"coverage: expected one observed site with the labels' shape {y.shape}, got draws of {prediction.site!r} "
            f"of shape {prediction.draws.shape[1:]}"
        )
    ends = prediction.quantile(_ends(levels).tolist())
    pairs = zip(ends[: len(levels)], ends[len(levels) :], strict=True)
    return np.stack([metrics.coverage(*(a.reshape(len(y), -1) for a in (low, high, y))) for low, high in pairs])


def _of_ranks(calibration: Calibration, levels: np.ndarray) -> dict[str, np.ndarray]:
    """A rank is one of L + 1 places: intervals that end between them hold it in part."""
    places = calibration.draws + 1
    found = {}
    for name, ranks in calibration.ranks.items():
        from_edge = np.minimum(ranks, calibration.draws - ranks)[calibration.accepted]
        tail = (1 - levels[:, None]) / 2 * places
        found[name] = np.clip(from_edge + 1 - tail, 0.0, 1.0)
    return found


def _ends(levels: np.ndarray) -> np.ndarray:
    """Levels of all lower ends, then of all upper ones."""
    return np.concatenate([(1 - levels) / 2, (1 + levels) / 2])


def _shares(inside: Mapping[str, np.ndarray], levels: np.ndarray) -> tuple[dict[str, Any], dict[str, Any]]:
    share, error = {}, {}
    for name, held in inside.items():
        pairs = np.array([metrics.mean_and_error(row) for row in held])
        nominal = np.sqrt(levels * (1 - levels) / max(1, int((~np.isnan(held[0])).sum())))
        share[name] = pairs[:, 0]
        error[name] = np.where(pairs[:, 1] > 0, pairs[:, 1], nominal)
    return share, error
