"""Pictures of what was learned: shrinkage, a posterior as rows arrive, the learned prior, calibration, a forest plot.

Every function returns a matplotlib `Figure`, which belongs to no window and to no pyplot state; save it with
`figure.savefig(path)`. matplotlib is the extra `plots` (`pip install bayesmeta[plots]`) and is imported at the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bayesmeta.checks.sharing import SCHEMES, Comparison
from bayesmeta.results.posterior import Posterior, Shared

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#7F7F7F"
COLOURS = dict(zip(SCHEMES, (GREY, ORANGE, BLUE), strict=True))
MARKERS = dict(zip(SCHEMES, ("s", "^", "o"), strict=True))
OUTER, INNER = (0.05, 0.95), (0.25, 0.75)
LEVELS = np.linspace(0.05, 0.95, 19)
FONT = 13


def shrinkage(
    posterior: Posterior,
    raw: np.ndarray,
    *,
    site: str = "phi",
    component: int = 0,
    centre: float | None = None,
    labels: tuple[str, str] = ("rows of the task", "task parameter"),
) -> Figure:
    """How far each task is pulled from its own estimate towards the others, by the number of its rows.

    Args:
        posterior: Of the tasks.
        raw: What each task's own data say `(task,)`; NaN leaves it out.
        site: Task parameter.
        component: Which component of it.
        centre: Mean of the learned prior, drawn as a line.
        labels: Of the axes, with units.

    Returns:
        One panel: hollow the task's own estimate, filled the posterior mean with its 90 % interval.
    """
    figure, axes = panels(1, width=9.0, height=5.5)
    axis = axes[0]
    sizes = np.asarray(posterior.tasks.sizes, dtype=float)
    x = np.maximum(sizes, 0.5) * np.exp(_spread(sizes))
    mean = _component(posterior.mean(site), component)
    lower, upper = _component(posterior.quantile(site, OUTER), component, lead=2)
    axis.vlines(x, lower, upper, color=BLUE, alpha=0.3, linewidth=1.5, label="posterior 90 % interval")
    axis.vlines(x, np.minimum(raw, mean), np.maximum(raw, mean), color=GREY, linewidth=0.8, linestyle=":")
    axis.plot(x, raw, "o", markerfacecolor="white", color=GREY, markersize=5, label="the task's own estimate")
    axis.plot(x, mean, "o", color=BLUE, markersize=5, label="posterior mean")
    if centre is not None:
        axis.axhline(centre, color=ORANGE, linewidth=1.5, label="mean of the learned prior")
    axis.set_xscale("log")
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if t <= 1.5 * sizes.max()]
    axis.set_xticks(ticks, [str(t) for t in ticks])
    axis.minorticks_off()
    axis.set(xlabel=labels[0], ylabel=labels[1])
    legend(axis)
    return figure


def arrival(
    posterior: Posterior,
    *,
    site: str = "phi",
    labels: Sequence[str] | None = None,
    rows: str = "rows given",
    title: str = "",
    reference: np.ndarray | None = None,
) -> Figure:
    """The posterior of one task as its rows arrive.

    Args:
        posterior: Of copies of the task (`Tasks.copies`) that have been given more and more rows.
        site: Task parameter.
        labels: Of its components, with units.
        rows: What a row is.
        title: Name of the task.
        reference: A value of each component to compare with, such as the posterior mean given all rows.

    Returns:
        A panel a component: medians, 50 % and 90 % intervals by the number of rows.
    """
    counts = [str(int(size)) for size in posterior.tasks.sizes]
    bands = posterior.quantile(site, (*OUTER, *INNER, 0.5)).reshape(5, len(counts), -1)
    names = _names(site, bands.shape[2], labels)
    figure, axes = panels(bands.shape[2], width=5.0, height=4.5)
    position = np.arange(len(counts))
    for component, axis in enumerate(axes):
        low, high, lower, upper, middle = bands[..., component]
        axis.vlines(position, low, high, color=BLUE, linewidth=2.0, alpha=0.5, label="90 % interval")
        axis.vlines(position, lower, upper, color=BLUE, linewidth=7.0, alpha=0.5, label="50 % interval")
        axis.plot(position, middle, "o", color=BLUE, label="median")
        if reference is not None:
            label = "posterior mean, all rows"
            axis.axhline(np.atleast_1d(reference)[component], color=ORANGE, linestyle="--", label=label)
        axis.set_xticks(position, counts)
        axis.set(xlabel=rows, ylabel=names[component])
        axis.margins(x=0.1)
    handles, texts = axes[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=4, fontsize=FONT - 2, frameon=False)
    figure.suptitle(title, fontsize=FONT + 1)
    return figure


def learned_prior(
    prior: Posterior, posterior: Posterior | None = None, *, site: str = "phi", labels: Sequence[str] | None = None
) -> Figure:
    """The prior that the tasks share: what is expected of a task not yet seen.

    Args:
        prior: `fit.prior(draws)`.
        posterior: Tasks whose posterior means are drawn over it.
        site: Task parameter.
        labels: Of its components, with units.

    Returns:
        Histograms of every component; with two components also their joint density.
    """
    draws = _flat(prior.draws(site)[:, 0])
    means = None if posterior is None else _flat(posterior.mean(site))
    names = _names(site, draws.shape[1], labels)
    joint = draws.shape[1] == 2
    figure, axes = panels(draws.shape[1] + joint, width=4.6, height=4.3)
    for component, axis in enumerate(axes[: draws.shape[1]]):
        low, high = np.quantile(draws[:, component], [0.002, 0.998])
        bins = np.linspace(low, high, 40)
        axis.hist(draws[:, component], bins, density=True, color=BLUE, alpha=0.35, label="learned prior")
        if means is not None:
            axis.plot(means[:, component], np.zeros(len(means)), "|", color="black", markersize=14, label="task means")
        axis.set(xlabel=names[component], ylabel="density", xlim=(low, high))
    if joint:
        _joint(axes[2], draws, means, names)
    axes[0].margins(y=0.25)
    legend(axes[0])
    return figure


def calibration(comparison: Comparison, *, rows: str = "rows given") -> Figure:
    """Whether intervals of held-out rows hold what they promise.

    Args:
        comparison: Ways of sharing on new tasks.
        rows: What a row is.

    Returns:
        Left: the share of held-out rows within central intervals of each probability, over all context sizes. Right:
        that of 90 % intervals by context size, with standard errors over tasks.
    """
    figure, (left, right) = panels(2, width=5.6, height=4.8)
    left.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle="--", label="calibrated")
    pits: dict[str, list[np.ndarray]] = {}
    for (scheme, _), parts in comparison.held_out.items():
        pits.setdefault(scheme, []).extend(part.pit for part in parts)
    for offset, scheme in enumerate(scheme for scheme in SCHEMES if scheme in pits):
        shares = [_inside(pits[scheme], level) for level in LEVELS]
        style: dict[str, Any] = {"color": COLOURS[scheme], "marker": MARKERS[scheme], "markersize": 5}
        left.plot(LEVELS, shares, label=scheme, **style)
        scores = np.array([comparison.score(scheme, context, "coverage of rows") for context in comparison.contexts])
        position = np.arange(len(scores)) + 0.12 * (offset - 1)
        right.errorbar(position, scores[:, 0], scores[:, 1], linestyle="none", capsize=3, **style)
    right.axhline(0.9, color="black", linewidth=0.8, linestyle="--")
    right.set_xticks(np.arange(len(comparison.contexts)), [str(c) for c in comparison.contexts])
    left.set(xlabel="probability of the interval", ylabel="share of held-out rows inside", aspect="equal")
    right.set(xlabel=rows, ylabel="coverage of 90 % intervals (± 1 s.e.)")
    legend(left)
    return figure


def forest(
    posterior: Posterior,
    estimate: np.ndarray,
    error: np.ndarray,
    *,
    site: str = "phi",
    component: int = 0,
    shared: Shared | None = None,
    mean: str = "mu",
    label: str = "effect",
) -> Figure:
    """A meta-analysis: each study's own estimate, its posterior, and the mean of all studies.

    Args:
        posterior: Of the studies.
        estimate: Their own estimates `(task,)`.
        error: Their standard errors `(task,)`.
        site: Task parameter.
        component: Which component of it.
        shared: `fit.shared`, for the last line.
        mean: Shared parameter that is the mean of all studies.
        label: Of the axis, with units.

    Returns:
        One panel, a line a study: own estimates and posterior medians, both with 90 % intervals.
    """
    count = len(posterior.names)
    figure, axes = panels(1, width=8.0, height=1.8 + 0.45 * (count + 1))
    axis = axes[0]
    line = np.arange(count, 0, -1.0)
    half = 1.6449 * np.asarray(error)
    style: dict[str, Any] = {"linestyle": "none", "capsize": 3, "markersize": 6}
    axis.errorbar(
        estimate, line + 0.13, xerr=half, marker="o", color=GREY, label="own estimate, 90 % interval", **style
    )
    low, middle, high = _component(posterior.quantile(site, (OUTER[0], 0.5, OUTER[1])), component, lead=2)
    ends = (middle - low, high - middle)
    axis.errorbar(middle, line - 0.13, xerr=ends, marker="s", color=BLUE, label="posterior, 90 % interval", **style)
    ticks, names = list(line), list(posterior.names)
    if shared is not None:
        low, middle, high = shared.quantile(mean, (OUTER[0], 0.5, OUTER[1])).reshape(3, -1)[:, component]
        axis.errorbar(middle, 0, xerr=[[middle - low], [high - middle]], marker="D", color=ORANGE, **style)
        ticks, names = [*ticks, 0.0], [*names, "mean of all"]
        axis.axhline(0.5, color="black", linewidth=0.6)
    axis.axvline(0, color="black", linewidth=0.6, linestyle=":")
    axis.set_yticks(ticks, names)
    axis.set(xlabel=label)
    figure.legend(loc="outside upper center", ncols=2, fontsize=FONT - 2, frameon=False)
    return figure


def panels(count: int, *, width: float, height: float, per_row: int | None = None) -> tuple[Figure, list[Any]]:
    """A figure with panels in rows of `per_row` (all in one), in letters that stay readable at half size.

    Args:
        count: Number of panels.
        width: Of one panel, in inches.
        height: Of one panel, in inches.
        per_row: Panels a row at most.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install 'bayesmeta[plots]'") from error
    columns = min(count, per_row or count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=110)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    for axis in axes[:count]:
        axis.xaxis.label.set_size(FONT)
        axis.yaxis.label.set_size(FONT)
        axis.title.set_size(FONT)
        axis.tick_params(labelsize=FONT - 1)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[:count]


def legend(axis: Any) -> None:
    """The legend of a panel where it hides least."""
    axis.legend(fontsize=FONT - 2, framealpha=0.85, loc="best")


def _joint(axis: Any, draws: np.ndarray, means: np.ndarray | None, names: Sequence[str]) -> None:
    limits = np.quantile(draws, [0.002, 0.998], axis=0).T
    axis.hist2d(draws[:, 0], draws[:, 1], bins=35, range=limits, cmap="Blues")
    if means is not None:
        axis.plot(means[:, 0], means[:, 1], "o", color="black", markersize=3)
    axis.set(xlabel=names[0], ylabel=names[1], xlim=limits[0], ylim=limits[1])


def _inside(pits: list[np.ndarray], level: float) -> float:
    """Share of all rows within the central interval of a probability."""
    values = np.concatenate([pit[~np.isnan(pit)] for pit in pits])
    return float((np.abs(values - 0.5) <= level / 2).mean())


def _spread(sizes: np.ndarray) -> np.ndarray:
    """Small shifts that keep tasks of one size apart."""
    shift = np.zeros(len(sizes))
    for size in np.unique(sizes):
        same = np.flatnonzero(sizes == size)
        shift[same] = np.linspace(-0.12, 0.12, len(same) + 2)[1:-1] * min(1.0, len(same) / 6)
    return shift


def _flat(values: np.ndarray) -> np.ndarray:
    """`(n, *event)` -> `(n, d)`."""
    return values.reshape(len(values), -1)


def _component(values: np.ndarray, component: int, *, lead: int = 1) -> np.ndarray:
    """One component of an event, after `lead` leading dimensions."""
    return values.reshape(*values.shape[:lead], -1)[..., component]


def _names(site: str, count: int, labels: Sequence[str] | None) -> Sequence[str]:
    if labels is None:
        return [site] if count == 1 else [f"{site}[{i}]" for i in range(count)]
    if len(labels) != count:
        raise ValueError(f"labels: expected {count}, one a component of {site!r}, got {list(labels)}")
    return labels
