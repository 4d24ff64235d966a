"""What the pictures of sharing show: the numbers they were given, in the order they promise."""

from __future__ import annotations

import numpy as np
import pytest

from bayesmeta.checks.folds import SharingScores
from bayesmeta.checks.sharing_pictures import NAMED, scales, similarity


def scores(tasks: int = 4) -> SharingScores:
    rng = np.random.default_rng(0)
    plain = rng.normal(size=(tasks, 6))
    gain = np.linspace(-1, 1, tasks)[:, None]
    rows = {"learned prior": plain + gain, "no pooling": plain, "complete pooling": plain - 2 + 0.1 * gain}
    return SharingScores(tuple(f"t{i}" for i in range(tasks))[::-1], rows, {}, 0, {}, {})


def test_differences_are_in_the_order_of_the_best_candidate() -> None:
    (axis,) = scores().plot().axes
    learned, complete = axis.lines[0], axis.lines[1]
    np.testing.assert_allclose(learned.get_xdata(), np.linspace(-1, 1, 4))
    np.testing.assert_allclose(complete.get_xdata(), -2 + 0.1 * np.linspace(-1, 1, 4))
    assert [label.get_text() for label in axis.get_yticklabels()] == ["t3", "t2", "t1", "t0"]
    assert "nats a row" in axis.get_xlabel()


def test_many_tasks_have_no_names() -> None:
    (axis,) = scores(NAMED + 1).plot().axes
    assert not axis.get_yticks().size and f"{NAMED + 1} tasks" in axis.get_ylabel()


@pytest.mark.parametrize("low", [-0.8, 0.0])
def test_tasks_that_are_alike_stand_side_by_side(low: float) -> None:
    group = np.array([0, 1, 0, 1, 1, 0])
    values = np.where(group[:, None] == group, 0.9, low)
    np.fill_diagonal(values, 1.0)
    axis, bar = similarity(values, [f"t{g}" for g in group], label="similarity").axes
    shown = axis.images[0]
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names in (["t0"] * 3 + ["t1"] * 3, ["t1"] * 3 + ["t0"] * 3)
    assert shown.get_array()[:3, 3:].max() == low and shown.get_clim() == (-1 if low < 0 else 0, 1)
    assert bar.get_ylabel() == "similarity"


def test_scales_are_medians_with_intervals() -> None:
    draws = np.geomspace(0.01, 1.0, 1001)[:, None] * [1.0, 10.0]
    (axis,) = scales(["weight", "bias"], draws).axes
    np.testing.assert_allclose(axis.lines[0].get_xdata(), [0.1, 1.0], rtol=1e-3)
    np.testing.assert_allclose(axis.collections[0].get_segments()[1][:, 0], np.quantile(draws[:, 1], [0.05, 0.95]))
    assert axis.get_xscale() == "log"


def test_a_point_estimate_of_scales_has_no_interval() -> None:
    figure = scales(["weight", "bias"], np.tile([0.1, 1.0], (5, 1)))
    assert not figure.axes[0].collections
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["point estimate"]
