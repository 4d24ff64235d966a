"""The forest plot of a meta-analysis: own estimates as squares by weight, posteriors, the mean, and a new study."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#7F7F7F"
FONT = 13
NORMAL = 1.959963984540054
LIMITS = (0.025, 0.5, 0.975)


class Analysis(Protocol):
    """What the picture reads of `MetaAnalysis`."""

    names: tuple[str, ...]
    coefficients: tuple[str, ...]
    effects: np.ndarray
    standard_errors: np.ndarray
    weights: np.ndarray

    def quantile(self, name: str, q: tuple[float, ...]) -> np.ndarray:
        """Posterior quantiles."""


def draw_forest(analysis: Any, where: str | pathlib.Path | Axes | None, *, label: str) -> Figure:
    """Draws on an axis, or on a figure of its own, which a path writes to a file; see `MetaAnalysis.forest_plot`."""
    try:
        from matplotlib.axes import Axes as Axis
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install 'bayesmeta[plots]'") from error
    if isinstance(where, Axis):
        _draw(analysis, where, label)
        return cast("Figure", where.get_figure(root=True))
    height = min(2.0 + 0.45 * (len(analysis.names) + 2), 80.0)
    figure = Canvas(figsize=(9.5, height), layout="constrained", dpi=110)
    _draw(analysis, figure.subplots(), label)
    if where is not None:
        figure.savefig(where)
    return figure


def _draw(analysis: Analysis, axis: Axes, label: str) -> None:
    line = np.arange(len(analysis.names), 0, -1.0)
    style: dict[str, Any] = {"linestyle": "none", "capsize": 3}
    axis.errorbar(
        analysis.effects, line + 0.15, xerr=NORMAL * analysis.standard_errors, color=GREY, label="own estimate", **style
    )
    share = np.clip(analysis.weights, 0, None)
    axis.scatter(analysis.effects, line + 0.15, s=20 + 150 * share / max(share.max(), 1e-300), marker="s", color=GREY)
    _interval(axis, analysis.quantile("phi", LIMITS), line - 0.15, BLUE, "posterior of its true effect", **style)
    low, middle, high = analysis.quantile("mu", LIMITS)
    axis.fill([low, middle, high, middle], [0, 0.25, 0, -0.25], color=ORANGE, label="mean of true effects")
    rows = [*((y, name) for y, name in zip(line, analysis.names, strict=True)), (0.0, "mean, mu")]
    values = [*analysis.quantile("phi", LIMITS).T, (low, middle, high)]
    if len(analysis.coefficients) == 1:
        new = analysis.quantile("new", LIMITS)
        _interval(axis, new[:, None], np.array([-1.0]), ORANGE, "true effect of a new study", **style)
        rows, values = [*rows, (-1.0, "new study")], [*values, new]
    else:
        rows[-1] = (0.0, "mean, covariates 0")
    _finish(axis, rows, values, label)


def _interval(axis: Axes, limits: np.ndarray, line: np.ndarray, color: str, label: str, **style: Any) -> None:
    low, middle, high = limits
    axis.errorbar(middle, line, xerr=(middle - low, high - middle), marker="o", color=color, label=label, **style)


def _finish(axis: Axes, rows: list[tuple[float, str]], values: list[Any], label: str) -> None:
    places, names = zip(*rows, strict=True)
    axis.set_yticks(places, names, fontsize=FONT - 1)
    axis.axhline(0.5, color="black", linewidth=0.6)
    axis.axvline(0, color="black", linewidth=0.6, linestyle=":")
    axis.set_xlabel(f"{label} (95 % intervals)", fontsize=FONT)
    axis.tick_params(axis="x", labelsize=FONT - 1)
    axis.spines[["top", "right"]].set_visible(False)
    for place, (low, middle, high) in zip(places, values, strict=True):
        text = f"{middle:.3g} [{low:.3g}, {high:.3g}]"
        axis.text(1.02, place, text, transform=axis.get_yaxis_transform(), va="center", fontsize=FONT - 2)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=FONT - 2, frameon=False)
