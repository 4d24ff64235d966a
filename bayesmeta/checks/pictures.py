"""Pictures of checks: rank ECDFs with bands, coverage, misfitting tasks, posterior predictive statistics.

Every function returns a matplotlib `Figure`, as those of `plots.py` do; the results of the checks draw themselves with
them. Nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from bayesmeta.checks.bands import band
from bayesmeta.checks.plots import BLUE, FONT, GREY, ORANGE, legend, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PER_ROW = 3
SHADES = (0.35, 0.15)
MOST_TASKS = 60
"""So many tasks are drawn at most, those that fit worst."""


def rank_ecdfs(
    counts: Mapping[str, np.ndarray], total: int, *, probs: Sequence[float], p: Mapping[str, float]
) -> Figure:
    """Distribution functions of ranks minus that of uniform ones, with simultaneous bands.

    Args:
        counts: For every parameter how many ranks are below k = 1 … L.
        total: How many ranks there are.
        probs: Probabilities of the bands, ascending.
        p: p-value of every parameter.

    Returns:
        A panel a parameter; what leaves the outer band is drawn in another colour.
    """
    draws = len(next(iter(counts.values())))
    place = np.arange(1, draws + 1) / (draws + 1)
    figure, axes = panels(len(counts), width=4.6, height=3.5, per_row=PER_ROW)
    for axis, (name, below) in zip(axes, counts.items(), strict=True):
        for prob, shade in zip(reversed(probs), reversed(SHADES), strict=True):
            low, high = band(total, draws, prob)
            label = f"{100 * prob:.3g} % band"
            axis.fill_between(place, low / total - place, high / total - place, color=GREY, alpha=shade, label=label)
        low, high = band(total, draws, probs[-1])
        outside = bool(((below < low) | (below > high)).any())
        axis.plot(place, below / total - place, color=ORANGE if outside else BLUE, linewidth=2, label="ranks")
        axis.axhline(0, color="black", linewidth=0.7)
        axis.set(title=f"{name}   {_p(p[name])}", xlabel="rank / draws", ylabel="ECDF − uniform", xlim=(0, 1))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=FONT - 2, frameon=False)
    return figure


def coverages(shares: Mapping[str, np.ndarray], errors: Mapping[str, np.ndarray], probs: np.ndarray) -> Figure:
    """Shares of true values inside central intervals minus what the intervals promise, ± 2 standard errors.

    Args:
        shares: For every parameter `(prob,)`.
        errors: Their standard errors `(prob,)`.
        probs: Probabilities of the intervals.

    Returns:
        One panel, a group a probability, a point a parameter.
    """
    figure, (axis,) = panels(1, width=8.5, height=4.8)
    names = list(shares)
    offset = np.linspace(-0.3, 0.3, len(names)) if len(names) > 1 else np.zeros(1)
    position = np.arange(len(probs))
    colours = (BLUE, ORANGE, GREY, "black", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
    for k, name in enumerate(names):
        style = {"color": colours[k % len(colours)], "marker": "osD^v<>P"[k % 8], "markersize": 6, "capsize": 3}
        difference = 100 * (shares[name] - probs)
        axis.errorbar(position + offset[k], difference, 200 * errors[name], linestyle="none", label=name, **style)
    axis.axhline(0, color="black", linewidth=0.8, linestyle="--")
    axis.set_xticks(position, [f"{100 * prob:g} %" for prob in probs])
    axis.set(xlabel="probability of the central interval", ylabel="coverage − probability\n(points, ± 2 s.e.)")
    figure.legend(loc="outside right upper", fontsize=FONT - 2, frameon=False)
    return figure


def misfits(names: Sequence[str], z: np.ndarray, p: np.ndarray, named: Sequence[str], *, statistic: str) -> Figure:
    """How far each task's statistic is from those of tasks simulated by the fitted model.

    Args:
        names: Tasks.
        z: Distance of the observed statistic from the simulated mean, in simulated sds `(task,)`.
        p: p-values `(task,)`.
        named: Tasks that are unlike the others.
        statistic: What was compared.

    Returns:
        One panel, a line a task, those with the smallest p-value on top.
    """
    order = np.lexsort((-np.abs(z), p))[:MOST_TASKS]
    figure, (axis,) = panels(1, width=8.0, height=1.6 + 0.3 * len(order))
    line = np.arange(len(order), 0, -1)
    unlike = np.array([names[i] in named for i in order])
    if np.abs(z).max(initial=0.0) > 10:
        axis.set_xscale("symlog", linthresh=4, linscale=2)
        axis.xaxis.set_major_formatter("{x:g}")
    axis.axvspan(-2, 2, color=GREY, alpha=0.2, label="± 2 simulated sds")
    _points(axis, z[order], line, unlike, ("like the others", "unlike the others"))
    axis.axvline(0, color="black", linewidth=0.7)
    axis.set_yticks(line, [f"{names[i]}   {_p(p[i])}" for i in order])
    axis.set(xlabel=f"{statistic}: observed − simulated mean, in simulated sds", ylim=(0.3, len(order) + 0.7))
    figure.legend(loc="outside upper center", ncols=3, fontsize=FONT - 2, frameon=False)
    return figure


def _points(axis: Axes, x: np.ndarray, y: np.ndarray, odd: np.ndarray, labels: tuple[str, str]) -> None:
    """Points in two colours; of a kind that has none there is no legend."""
    for some, colour, label in ((~odd, BLUE, labels[0]), (odd, ORANGE, labels[1])):
        if some.any():
            axis.plot(x[some], y[some], "o", color=colour, markersize=7, label=label)


def left_out(names: Sequence[str], elpd: np.ndarray, khat: np.ndarray, limit: float, *, what: str) -> Figure:
    """What a fit says of tasks or rows that were left out, and whether that can be trusted.

    Args:
        names: Tasks.
        elpd: Log predictive density of each task, or the mean over its rows, in nats `(task,)`.
        khat: Largest k̂ of a task `(task,)`.
        limit: The k̂ above which a density is not to be trusted.
        what: What was left out, "task" or "row".

    Returns:
        Two panels, a line a task, the least expected on top: densities, and k̂ with its limit.
    """
    order = np.argsort(elpd, kind="stable")[:MOST_TASKS]
    figure, (left, right) = panels(2, width=5.4, height=1.6 + 0.3 * len(order))
    line = np.arange(len(order), 0, -1)
    bad = ~(khat[order] < limit)
    for axis, values in ((left, elpd[order]), (right, khat[order])):
        _points(axis, values, line, bad, ("reliable", f"k̂ above {limit:.2g}"))
        axis.set(ylim=(0.3, len(order) + 0.7))
    left.axvline(float(elpd.mean()), color="black", linewidth=0.7, linestyle="--", label="mean of all tasks")
    right.axvline(limit, color="black", linewidth=0.7, label="limit of k̂")
    left.set_yticks(line, [names[i] for i in order])
    right.set_yticks(line, [""] * len(order))
    each = "the task" if what == "task" else "a row of the task, mean"
    left.set(xlabel=f"log predictive density of {each} (nats)")
    right.set(xlabel="k̂" if what == "task" else "largest k̂ of its rows")
    shown = [axis.get_legend_handles_labels() for axis in (right, left)]
    entries = {text: handle for handles, texts in shown for handle, text in zip(handles, texts, strict=True)}
    figure.legend(
        entries.values(), entries, loc="outside upper center", ncols=len(entries), fontsize=FONT - 2, frameon=False
    )
    return figure


def replicated(observed: float, drawn: np.ndarray, p: np.ndarray, *, statistic: str, overall: float) -> Figure:
    """A statistic of the data against its posterior predictive distribution, and the p-values of all tasks.

    Args:
        observed: Mean over tasks of the observed statistic.
        drawn: The same of replicated data `(draw,)`.
        p: p-value of each task `(task,)`.
        statistic: Its name.
        overall: p-value of the mean over tasks.

    Returns:
        Left: the mean over tasks. Right: the ordered p-values of tasks against uniform ones.
    """
    figure, (left, right) = panels(2, width=5.4, height=4.4)
    left.hist(drawn, 40, color=BLUE, alpha=0.4, label="replicated")
    left.axvline(observed, color=ORANGE, linewidth=2.5, label="observed")
    left.set(xlabel=f"{statistic}, mean over tasks", ylabel="replicated data sets", title=_p(overall))
    left.margins(y=0.25)
    legend(left)
    share = (np.arange(len(p)) + 0.5) / len(p)
    right.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle="--", label="uniform")
    right.plot(np.sort(p), share, "o", color=BLUE, markersize=5, label="tasks")
    right.set(xlabel="p-value of a task", ylabel="share of tasks below", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    legend(right)
    return figure


def _p(value: float) -> str:
    return "p < 0.0001" if value < 1e-4 else f"p = {value:.3g}"


def gaps(sizes: np.ndarray, nats: np.ndarray, shift: np.ndarray, ratio: np.ndarray) -> Figure:
    """What a guide loses on each task, against its number of rows.

    Args:
        sizes: Rows of each task `(task,)`.
        nats: Divergences `(task,)`.
        shift: Shifts of means in sds `(task,)`.
        ratio: Sd ratios `(task,)`.
    """
    figure, axes = panels(3, width=4.6, height=3.6, per_row=3)
    drawn = (
        (nats, "KL(guide ‖ posterior) / nats", 0.0),
        (shift, "largest shift of a mean / sd", 0.0),
        (ratio, "sd of guide / sd of posterior", 1.0),
    )
    for axis, (values, label, ideal) in zip(axes, drawn, strict=True):
        axis.axhline(ideal, color="black", linewidth=0.7, label="perfect guide")
        axis.scatter(sizes, values, color=BLUE, s=22, alpha=0.7, label="a task")
        axis.set(xlabel="rows of the task", ylabel=label, xscale="log")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=FONT - 2, frameon=False)
    return figure
