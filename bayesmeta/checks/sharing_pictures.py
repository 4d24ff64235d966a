"""Pictures of sharing: what it does for each task, and which tasks the learned prior holds for alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bayesmeta.checks.plots import BLUE, FONT, GREY, ORANGE, legend, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMED = 40
"""More tasks than this have no names on an axis."""
COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", GREY)
MARKERS = "o^sDvPX"


def differences(names: Sequence[str], found: Mapping[str, tuple[np.ndarray, np.ndarray]], *, best: str) -> Figure:
    """For each task and candidate the mean log score of its rows above that of no pooling, with ± 2 standard errors.

    Args:
        names: Tasks.
        found: For each candidate the differences and their standard errors `(task,)`.
        best: The candidate in whose order the tasks are; left of 0 sharing hurts.
    """
    order = np.argsort(found[best][0])
    names = [names[i] for i in order]
    figure, (axis,) = panels(1, width=8.5, height=float(np.clip(0.28 * len(names) + 1.5, 4.0, 12.0)))
    shifts = np.linspace(-0.25, 0.25, len(found)) if len(found) > 1 else [0.0]
    for (name, pair), shift, colour, marker in zip(found.items(), shifts, COLOURS, MARKERS, strict=False):
        mean, error = (values[order] for values in pair)
        style = {"color": colour, "markersize": 6 if name == best else 4, "capsize": 0, "linewidth": 1.2}
        axis.errorbar(mean, np.arange(len(names)) + shift, xerr=2 * error, fmt=marker, label=name, **style)
    axis.axvline(0, color="black", linewidth=0.8, linestyle=":")
    _name_tasks(axis.set_yticks, names)
    axis.set(
        xlabel="held-out log score above no pooling (nats a row, ± 2 standard errors)",
        ylabel="task" if len(names) <= NAMED else f"{len(names)} tasks, in the order of {best!r}",
    )
    legend(axis)
    return figure


def similarity(values: np.ndarray, names: Sequence[str], *, order: np.ndarray | None = None, label: str) -> Figure:
    """A matrix of tasks `(T, T)` with entries from -1 to 1, or probabilities, tasks that are alike side by side.

    Args:
        values: The matrix, 1 on its diagonal.
        names: Tasks.
        order: Positions of the tasks; None orders them by the leading eigenvector.
        label: Of the colours.
    """
    order = np.argsort(np.linalg.eigh(values)[1][:, -1]) if order is None else order
    shown = [names[i] for i in order]
    figure, (axis,) = panels(1, width=float(np.clip(0.3 * len(names) + 3.0, 5.5, 12.0)), height=5.5)
    lowest, colours = (-1, "RdBu_r") if values.min() < 0 else (0, "Blues")
    image = axis.imshow(values[np.ix_(order, order)], vmin=lowest, vmax=1, cmap=colours, interpolation="nearest")
    _name_tasks(axis.set_yticks, shown)
    _name_tasks(axis.set_xticks, shown, rotation=90)
    bar = figure.colorbar(image, ax=axis)
    bar.set_label(label, fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT - 1)
    axis.set(xlabel="task", ylabel="task")
    return figure


def scales(names: Sequence[str], draws: np.ndarray, *, label: str = "prior sd between tasks") -> Figure:
    """Posterior of the scale of each block of task parameters, on a log axis: the dial from hard to no sharing.

    Args:
        names: Of the blocks.
        draws: `(draw, block)`, positive.
        label: Of the axis, with units.
    """
    figure, (axis,) = panels(1, width=8.0, height=float(np.clip(0.5 * len(names) + 1.5, 2.8, 12.0)))
    low, middle, high = np.quantile(draws, [0.05, 0.5, 0.95], axis=0)
    place = np.arange(len(names))
    point = bool((low == high).all())
    if not point:
        axis.hlines(place, low, high, color=BLUE, linewidth=2.5, label="90 % interval")
    axis.plot(middle, place, "o", color=BLUE, markersize=7, label="point estimate" if point else "posterior median")
    _log_axis(axis)
    axis.set_yticks(place, names)
    axis.set(xlabel=f"{label}  (left: shared by all, right: each its own)", ylim=(-0.6, len(names) - 0.4))
    figure.legend(loc="outside upper center", ncols=2, fontsize=FONT - 2, frameon=False)
    return figure


def _log_axis(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _name_tasks(set_ticks: Any, names: Sequence[str], **style: Any) -> None:
    if len(names) <= NAMED:
        set_ticks(np.arange(len(names)), names, fontsize=FONT - 3, **style)
    else:
        set_ticks([])
