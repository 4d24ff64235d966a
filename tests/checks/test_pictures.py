"""Pictures of checks: what they show is read back from their artists."""

from __future__ import annotations

import numpy as np
import pytest

from bayesmeta.checks import pictures
from bayesmeta.checks.bands import band, below
from bayesmeta.checks.plots import BLUE, ORANGE


def test_ranks_that_leave_the_band_have_another_colour() -> None:
    rng = np.random.default_rng(0)
    ranks = {"good": rng.integers(0, 20, 200), "bad": np.zeros(200, dtype=int)}
    counts = {name: below(values, 19) for name, values in ranks.items()}
    figure = pictures.rank_ecdfs(counts, 200, probs=(0.95, 0.975), p={"good": 0.4, "bad": 0.0})
    good, bad = figure.axes
    assert [axis.get_title() for axis in figure.axes] == ["good   p = 0.4", "bad   p < 0.0001"]
    assert (good.get_lines()[0].get_color(), bad.get_lines()[0].get_color()) == (BLUE, ORANGE)
    np.testing.assert_allclose(good.get_lines()[0].get_ydata(), counts["good"] / 200 - np.arange(1, 20) / 20)
    low, high = band(200, 19, 0.975)
    outline = good.collections[0].get_paths()[0].vertices[:, 1]
    assert outline.min() == pytest.approx((low / 200 - np.arange(1, 20) / 20).min())
    assert outline.max() == pytest.approx((high / 200 - np.arange(1, 20) / 20).max())


def test_panels_fill_rows() -> None:
    counts = {str(k): below(np.arange(20), 19) for k in range(4)}
    figure = pictures.rank_ecdfs(counts, 20, probs=(0.9, 0.95), p=dict.fromkeys(counts, 1.0))
    assert len(figure.axes) == 4
    assert len({round(axis.get_position().y0, 3) for axis in figure.axes}) == 2


def test_coverage_shows_differences_in_points() -> None:
    probs = np.array([0.5, 0.9])
    figure = pictures.coverages({"a": probs + 0.02, "b": probs}, {"a": probs * 0 + 0.01, "b": probs * 0 + 0.01}, probs)
    first = figure.axes[0].containers[0].lines[0]
    np.testing.assert_allclose(first.get_ydata(), [2.0, 2.0])
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["50 %", "90 %"]


def test_misfits_put_the_most_unlike_task_on_top() -> None:
    z, p = np.array([0.5, -8.0, 1.0]), np.array([0.6, 1e-3, 0.3])
    figure = pictures.misfits(("a", "b", "c"), z, p, ("b",), statistic="mean")
    axis = figure.axes[0]
    assert [t.get_text().split()[0] for t in axis.get_yticklabels()] == ["b", "c", "a"]
    unlike = next(line for line in axis.get_lines() if line.get_label() == "unlike the others")
    assert unlike.get_xdata().tolist() == [-8.0]
    assert axis.get_xscale() == "linear"
    far = pictures.misfits(("a", "b"), np.array([0.0, -80.0]), p[:2], (), statistic="mean")
    assert far.axes[0].get_xscale() == "symlog"


def test_left_out_puts_the_least_expected_task_on_top_and_marks_what_is_not_reliable() -> None:
    figure = pictures.left_out(
        ("a", "b", "c"), np.array([-1.0, -3.0, -2.0]), np.array([0.1, 0.9, 0.2]), 0.7, what="row"
    )
    left, right = figure.axes
    assert [t.get_text() for t in left.get_yticklabels()] == ["b", "c", "a"]
    bad = next(line for line in right.get_lines() if line.get_label() == "k̂ above 0.7")
    assert bad.get_xdata().tolist() == [0.9]
    mean = next(line for line in left.get_lines() if line.get_label() == "mean of all tasks")
    assert mean.get_xdata() == [-2.0, -2.0]


def test_replicated_shows_the_observed_value_and_ordered_p_values() -> None:
    figure = pictures.replicated(1.5, np.arange(10.0), np.array([0.7, 0.2]), statistic="sd", overall=0.25)
    left, right = figure.axes
    assert left.get_lines()[0].get_xdata() == [1.5, 1.5]
    assert left.get_title() == "p = 0.25"
    assert right.get_lines()[1].get_xdata().tolist() == [0.2, 0.7]
