"""Adaptive importance sampling of densities whose moments are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bayesmeta.checks.adaptive import adaptive_draws
from bayesmeta.hierarchy.recording import seeded

LOC = torch.tensor([3.0, -20.0], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.01, 0.018], [0.018, 0.04]], dtype=torch.float64)


def log_normal(theta: torch.Tensor) -> torch.Tensor:
    """A narrow, correlated Gaussian far from the start."""
    centred = theta - LOC
    return -0.5 * (centred * torch.linalg.solve(COVARIANCE, centred.mT).mT).sum(-1)


def test_a_narrow_gaussian_far_away_is_found() -> None:
    with seeded(0):
        found = adaptive_draws(log_normal, torch.zeros(2).double(), torch.full((2,), 10.0).double(), draws=4000)
    weight = np.exp(found.log_weight)
    effective = found.ess * 4000
    assert found.status == "corrected"
    assert found.ess > 0.5
    mean = weight @ found.theta.numpy()
    sd = COVARIANCE.diagonal().sqrt().numpy()
    assert (np.abs(mean - LOC.numpy()) < 4 * sd / math.sqrt(effective)).all()
    covariance = np.cov(found.theta.numpy().T, aweights=weight)
    assert covariance == pytest.approx(COVARIANCE.numpy(), rel=4 * math.sqrt(2 / effective) * 1.5)


def test_nothing_to_sample() -> None:
    empty = torch.zeros(0, dtype=torch.float64)
    found = adaptive_draws(lambda theta: theta.sum(-1), empty, empty, draws=10)
    assert found.theta.shape == (10, 0)
    assert np.exp(found.log_weight).sum() == pytest.approx(1.0)


def test_a_density_that_is_nowhere_finite_is_refused() -> None:
    one = torch.ones(1, dtype=torch.float64)
    with seeded(0), pytest.raises(ValueError, match="nowhere finite"):
        adaptive_draws(lambda theta: theta.sum(-1) * math.nan, one, one, draws=10)
