"""Moments, quantiles and intervals are those of the draws, with the labels' shape, and NaN where there is no row."""

from __future__ import annotations

import numpy as np
import pytest

from bayesmeta.results.row_draws import RowDraws


def drawn() -> RowDraws:
    """Draws 0 … 100 of the first of two tasks, ten times as much of the second, which has one row less."""
    found = RowDraws()
    some = np.random.default_rng(0).permutation(np.arange(101.0))
    some = some[:, None, None, None] * np.array([1.0, 10.0])[:, None, None]
    found.draws = np.broadcast_to(some, (101, 2, 3, 2)).copy()
    found.draws[:, 1, 2] = np.nan
    return found


def test_they_are_those_of_the_draws() -> None:
    found = drawn()
    assert found.mean.shape == found.sd.shape == (2, 3, 2)
    np.testing.assert_allclose(found.mean[:, 0, 1], [50, 500])
    np.testing.assert_allclose(found.sd[:, 0, 1], np.sqrt((101**2 - 1) / 12) * np.array([1, 10]))
    lower, upper = found.interval(0.8)
    np.testing.assert_allclose((lower[:, 0, 0], upper[:, 0, 0]), [[10, 100], [90, 900]])
    assert found.quantile([0.25, 0.5, 0.75]).shape == (3, 2, 3, 2)
    np.testing.assert_allclose(found.quantile(0.25)[0], 25)


def test_no_row_is_no_number() -> None:
    found = drawn()
    for values in (found.mean, found.sd, found.quantile(0.5), *found.interval()):
        assert np.isnan(values).sum() == 2 and np.isnan(values[1, 2]).all()


@pytest.mark.parametrize("prob", [0.0, 1.0, 90, np.nan])
def test_a_probability_is_between_0_and_1(prob: float) -> None:
    with pytest.raises(ValueError, match=r"prob must lie in \(0, 1\), got"):
        drawn().interval(prob)
