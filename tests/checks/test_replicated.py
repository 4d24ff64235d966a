"""Posterior predictive checks: a model that produces such data, and one that does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conjugate import SIGMA, drawn_rows, fitted, make_tasks

from bayesmeta import checks
from bayesmeta.checks.replicated import Replicated
from bayesmeta.data.tasks import Tasks

ROWS = drawn_rows(40, seed=1, sizes=(6, 12))


@pytest.fixture(scope="module")
def post() -> Any:
    return fitted(ROWS).posterior(make_tasks(ROWS))


def test_a_right_model_produces_such_data(post: Any) -> None:
    for statistic in ("mean", "sd", "min", "max", "median"):
        found = checks.posterior_predictive(post, statistic)
        assert 0.002 < found.overall < 0.998
        assert 0.3 < found.p.mean() < 0.7
    sizes = np.array([len(y) for y in ROWS.values()])
    found = checks.posterior_predictive(post, lambda y: float(y.var(ddof=1)))
    np.testing.assert_allclose(found.drawn.mean(0), SIGMA**2, atol=4 * SIGMA**2 * np.sqrt(2 / (sizes.min() - 1) / 1000))
    np.testing.assert_allclose(found.observed, [np.var(y, ddof=1) for y in ROWS.values()])


def test_noise_that_is_too_wide_shows_in_the_sd_of_tasks_and_not_in_their_mean() -> None:
    rows = {name: [m + 3 * (v - m) for v in y for m in [np.mean(y)]] for name, y in ROWS.items()}
    wide = fitted(rows).posterior(make_tasks(rows))
    assert checks.posterior_predictive(wide, "sd").overall < 0.005
    assert 0.05 < checks.posterior_predictive(wide, "mean").overall < 0.95


def test_p_counts_ties_half_and_names_tasks() -> None:
    drawn = np.array([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0], [3.0, 1.0]])
    found = Replicated(("a", "b"), "zeros", np.array([1.0, 1.0]), drawn)
    np.testing.assert_allclose(found.p, [0.625, 0.5])
    assert found.overall == 0.625
    assert [line.split()[0] for line in found.table().splitlines()[1:]] == ["a", "b", "mean"]


def test_tasks_without_rows_are_left_out_and_missing_labels_masked() -> None:
    fit = fitted(ROWS)
    found = checks.posterior_predictive(fit.posterior(make_tasks({"empty": [], "one": [1.0, 2.0]})), "max")
    assert found.names == ("one",)
    assert found.observed.tolist() == [2.0]
    gaps = Tasks.from_arrays(None, [[1.0, np.nan, 2.0]], names=["holed"], missing="mask")
    rows = checks.posterior_predictive(fit.posterior(gaps), lambda y: float(len(y)))
    assert (rows.observed.tolist(), set(rows.drawn[:, 0])) == ([2.0], {2.0})
    with pytest.raises(ValueError, match="expected tasks with rows, got none"):
        checks.posterior_predictive(fit.posterior(make_tasks({"empty": []})))


def test_wrong_statistics_are_named(post: Any) -> None:
    with pytest.raises(ValueError, match=r"expected one of \['mean'.*got 'mode'"):
        checks.posterior_predictive(post, "mode")
    with pytest.raises(ValueError, match="statistic 'log' of task '1-"):
        checks.posterior_predictive(post, np.log)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a Posterior, got str"):
        checks.posterior_predictive("post")  # type: ignore[arg-type]


def test_the_picture_is_drawn(post: Any, tmp_path: Any) -> None:
    checks.posterior_predictive(post, "sd").plot(tmp_path / "pp.png")
    assert (tmp_path / "pp.png").stat().st_size > 10_000
