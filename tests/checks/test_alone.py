"""One data set alone, θ integrated out: against the closed form, whatever the guide."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conjugate import ROWS, SIGMA, TAU, WIDE, ExactGuide, close, density, known_mean, make_tasks

from bayesmeta.checks.alone import infer_alone
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.objectives import Guides
from bayesmeta.inference.shared import PriorShared

DRAWS = 2000


def alone(y: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Exact means and sds of (mu, a) given one task."""
    precision = np.array([[WIDE**-2 + TAU**-2, -(TAU**-2)], [-(TAU**-2), TAU**-2 + len(y) / SIGMA**2]])
    covariance = np.linalg.inv(precision)
    return covariance @ [0.0, sum(y) / SIGMA**2], np.sqrt(np.diag(covariance))


@pytest.mark.parametrize("guide", [{}, {"shift": 0.5, "width": 1.3}])
def test_the_posterior_of_each_data_set_is_exact(guide: dict[str, Any]) -> None:
    rows = ROWS | {"far": [9.0] * 30}  # three prior sds of mu away: few prior draws count
    torch.manual_seed(1)
    guides = Guides(PriorShared(density()), ExactGuide(**guide))
    found = infer_alone(density(), guides, make_tasks(rows), draws=DRAWS, pool=4 * DRAWS)
    assert list(found.flag) == [""] * len(rows)
    mu, a = found.theta[..., 0], found.theta[..., 0] + TAU * found.noise[..., 0]
    for i, y in enumerate(rows.values()):
        mean, sd = alone(y)
        drawn = torch.stack([mu[:, i], a[:, i]])
        assert close(drawn.mean(1), drawn.std(1), (mean, sd), 0.4 * DRAWS)


def test_a_guide_that_misses_is_flagged() -> None:
    guides = Guides(PriorShared(density()), ExactGuide(shift=40.0, width=0.02))
    found = infer_alone(density(), guides, make_tasks({"a": [1.0] * 200, "b": [0.0] * 200}), draws=50, pool=200)
    assert all("importance sampling failed" in flag for flag in found.flag)


def test_without_shared_sites_there_is_only_phi() -> None:
    model = TaskDensity(known_mean, make_tasks(ROWS))
    guides = Guides(PriorShared(density()), _Centred())
    found = infer_alone(model, guides, make_tasks(ROWS), draws=DRAWS, pool=4 * DRAWS)
    assert found.theta.shape == (DRAWS, len(ROWS), 0)
    precision = np.array([TAU**-2 + len(y) / SIGMA**2 for y in ROWS.values()])
    mean = np.array([sum(y) for y in ROWS.values()]) / SIGMA**2 / precision
    assert close(found.noise[..., 0].mean(0), found.noise[..., 0].std(0), (mean, precision**-0.5), 0.4 * DRAWS)


class _Centred(ExactGuide):
    """The exact guide at mu = 0."""

    def condition(self, theta: torch.Tensor, context: Any) -> Any:
        return super().condition(theta.new_zeros(len(theta), 1), context)
