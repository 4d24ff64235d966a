"""Draws of new rows and their moments, whatever predicted them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class RowDraws:
    """What all predictions have in common: draws of new rows of T tasks.

    Attributes:
        draws: `(draw, task, M, *dy)`; NaN where a task has fewer than M rows.
    """

    draws: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """Predictive means `(task, M, *dy)`."""
        return self.draws.mean(0)

    @property
    def sd(self) -> np.ndarray:
        """Predictive standard deviations `(task, M, *dy)`."""
        return self.draws.std(0)

    def quantile(self, q: float | Sequence[float]) -> np.ndarray:
        """Predictive quantiles `(*q, task, M, *dy)`."""
        return np.quantile(self.draws, q, axis=0)

    def interval(self, prob: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """The central interval of probability `prob`: lower and upper ends, `(task, M, *dy)` each.

        Raises:
            ValueError: `prob` is not between 0 and 1.
        """
        if not 0 < prob < 1:
            raise ValueError(f"prob must lie in (0, 1), got {prob}")
        lower, upper = self.quantile([(1 - prob) / 2, (1 + prob) / 2])
        return lower, upper
