"""Pictures: what they show is read back from their artists; nothing global is touched."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest

from bayesmeta.checks import plots
from bayesmeta.checks.sharing import SCHEMES, Comparison, HeldOut


class Known:
    """Three tasks whose φ (two components) is normal with known moments, with what plots read of a posterior."""

    names = ("a", "b", "c")

    def __init__(self, sizes: tuple[int, ...] = (0, 2, 40)) -> None:
        self.tasks = type("Sizes", (), {"sizes": np.array(sizes)})()
        self._draws = np.random.default_rng(0).normal([[0.0, 5.0], [1.0, 6.0], [2.0, 7.0]], 0.5, (4000, 3, 2))

    def mean(self, site: str) -> np.ndarray:
        return self._draws.mean(0)

    def draws(self, site: str) -> np.ndarray:
        return self._draws

    def quantile(self, site: str, q: Any) -> np.ndarray:
        return np.quantile(self._draws, q, axis=0)


def known(sizes: tuple[int, ...] = (0, 2, 40)) -> Any:
    return Known(sizes)


def labelled(axis: Any, label: str) -> Any:
    return next(line for line in axis.get_lines() if line.get_label() == label)


def test_shrinkage_shows_own_estimates_and_posterior_means() -> None:
    raw = np.array([math.nan, 9.0, 7.1])
    figure = plots.shrinkage(known(), raw, component=1, centre=6.0, labels=("homes", "level"))
    axis = figure.axes[0]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("homes", "level")
    np.testing.assert_array_equal(labelled(axis, "the task's own estimate").get_ydata(), raw)
    np.testing.assert_allclose(labelled(axis, "posterior mean").get_ydata(), [5, 6, 7], atol=0.05)
    assert {t.get_text() for t in axis.get_legend().get_texts()} >= {"mean of the learned prior"}


def test_arrival_has_a_panel_a_component() -> None:
    figure = plots.arrival(
        known((0, 1, 5)), labels=("level", "slope"), rows="homes", title="here", reference=np.ones(2)
    )
    assert [axis.get_ylabel() for axis in figure.axes] == ["level", "slope"]
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["0", "1", "5"]
    np.testing.assert_allclose(labelled(figure.axes[1], "median").get_ydata(), [5, 6, 7], atol=0.05)
    assert figure.get_suptitle() == "here"


def test_the_learned_prior_of_two_components_is_also_shown_jointly() -> None:
    figure = plots.learned_prior(known(), known(), labels=("level", "slope"))
    assert len(figure.axes) == 3
    assert (figure.axes[2].get_xlabel(), figure.axes[2].get_ylabel()) == ("level", "slope")
    np.testing.assert_allclose(labelled(figure.axes[0], "task means").get_xdata(), [0, 1, 2], atol=0.05)
    with pytest.raises(ValueError, match=r"labels: expected 2, one a component of 'phi', got \['level'\]"):
        plots.learned_prior(known(), labels=["level"])


def test_calibration_of_uniform_pits_lies_on_the_diagonal() -> None:
    pit = np.tile((np.arange(1000) + 0.5) / 1000, (4, 1))
    inside = np.abs(pit - 0.5) < 0.45
    y = np.where(inside, 0.0, 2.0)
    one = HeldOut(tuple("abcd"), y, y, y, y * 0 - 1, y * 0 + 1, pit, y, ("",) * 4)
    figure = plots.calibration(Comparison({(scheme, k): [one] for scheme in SCHEMES for k in (0, 3)}), rows="homes")
    left, right = figure.axes
    np.testing.assert_allclose(labelled(left, "learned prior").get_ydata(), plots.LEVELS, atol=2e-3)
    assert [t.get_text() for t in right.get_xticklabels()] == ["0", "3"]
    shares = [container.lines[0].get_ydata() for container in right.containers]
    np.testing.assert_allclose(shares, 0.9, atol=2e-3)


def test_forest_has_a_line_a_study_and_one_for_all() -> None:
    shared: Any = type("Shared", (), {"quantile": lambda self, name, q: np.array([[3.0], [4.0], [6.0]])})()
    figure = plots.forest(known(), np.arange(3.0), np.ones(3), component=0, shared=shared, label="points")
    axis = figure.axes[0]
    assert [t.get_text() for t in axis.get_yticklabels()] == ["a", "b", "c", "mean of all"]
    own, posterior, mean = (container.lines[0] for container in axis.containers)
    np.testing.assert_array_equal(own.get_xdata(), [0, 1, 2])
    np.testing.assert_allclose(posterior.get_xdata(), [0, 1, 2], atol=0.05)
    assert mean.get_xdata() == [4.0]


def test_figures_leave_no_global_state_and_can_be_saved(tmp_path: Any) -> None:
    before = dict(__import__("matplotlib").rcParams)
    plots.learned_prior(known()).savefig(tmp_path / "prior.png")
    assert (tmp_path / "prior.png").stat().st_size > 5000
    assert dict(__import__("matplotlib").rcParams) == before


def test_without_matplotlib_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'bayesmeta\[plots\]'"):
        plots.learned_prior(known())


def test_panels_stand_in_rows() -> None:
    figure, axes = plots.panels(5, width=2.0, height=1.5, per_row=3)
    assert (len(axes), len(figure.axes)) == (5, 5)
    assert figure.get_size_inches().tolist() == [6.0, 3.0]
    assert plots.panels(2, width=2.0, height=1.5)[0].get_size_inches().tolist() == [4.0, 1.5]
