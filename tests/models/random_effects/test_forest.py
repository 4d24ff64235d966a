"""The picture is read back from its artists."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
from meta_reference import SCHOOLS

import bayesmeta as bm


def test_the_forest_plot_shows_the_numbers(tmp_path: Any) -> None:
    found = bm.models.meta_analysis(*SCHOOLS, tau_prior=dist.HalfNormal(8.0), names=list("ABCDEFGH"))
    figure = found.forest_plot(tmp_path / "forest.png", label="points")
    assert (tmp_path / "forest.png").stat().st_size > 5000
    axis = figure.axes[0]
    assert [text.get_text() for text in axis.get_yticklabels()] == [*"ABCDEFGH", "mean, mu", "new study"]
    own, posterior, new = (container.lines[0] for container in axis.containers)
    np.testing.assert_array_equal(own.get_xdata(), SCHOOLS[0])
    np.testing.assert_allclose(posterior.get_xdata(), found.phi.quantile(0.5))
    np.testing.assert_allclose(new.get_xdata(), found.new.quantile(0.5))
    assert found.forest_plot(axis, label="again") is figure
    assert axis.get_xlabel().startswith("again")


def test_without_matplotlib_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = bm.models.meta_analysis([0.8], [0.2], tau_prior=dist.HalfNormal(1.0))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'bayesmeta\[plots\]'"):
        found.forest_plot()
