"""Stacking weights against the best of a grid, and what cannot be stacked."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from bayesmeta.checks.stacking import stacking_weights


def test_weights_are_the_best_of_a_grid() -> None:
    """Data from .3 N(0, 1) + .7 N(3, 1): the components get their shares, a third candidate nothing."""
    rng = np.random.default_rng(0)
    y = np.where(rng.random(4000) < 0.3, rng.normal(0, 1, 4000), rng.normal(3, 1, 4000))
    scores = np.stack([norm.logpdf(y, 0, 1), norm.logpdf(y, 3, 1), norm.logpdf(y, 10, 1)])
    found = stacking_weights(scores)
    assert found.sum() == pytest.approx(1.0) and found[2] < 1e-3
    grid = np.linspace(0.001, 0.999, 999)
    totals = [np.log(w * np.exp(scores[0]) + (1 - w) * np.exp(scores[1])).sum() for w in grid]
    assert found[0] == pytest.approx(grid[int(np.argmax(totals))], abs=2e-3)


def test_rows_that_some_candidate_lacks_are_left_out() -> None:
    scores = np.array([[0.0, -1.0, np.nan], [-9.0, -9.0, 50.0]])
    np.testing.assert_allclose(stacking_weights(scores), [1.0, 0.0], atol=1e-3)


def test_far_rows_do_not_underflow() -> None:
    """Log densities of -5000 are compared with each other."""
    np.testing.assert_allclose(stacking_weights(np.array([[-5000.0], [-5010.0]])), [1.0, 0.0], atol=1e-3)


@pytest.mark.parametrize("scores", [np.full((2, 3), np.nan), np.full((2, 3), -np.inf)])
def test_nothing_to_stack_is_said(scores: np.ndarray) -> None:
    with pytest.raises(ValueError, match="to which some candidate gives a density"):
        stacking_weights(scores)
