"""Priors of tau as the quadrature sees them."""

from __future__ import annotations

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from bayesmeta.models.random_effects.tau_prior import TauPrior


def test_log_densities_are_in_float64_and_end_with_the_support() -> None:
    tau = np.array([0.0, 1e-9, 0.1, 30.0, 1e30])
    found = TauPrior(dist.HalfCauchy(5.0)).log_density(tau)
    np.testing.assert_allclose(found, stats.halfcauchy(0, 5).logpdf(tau), rtol=1e-13)
    bounded = TauPrior(dist.Uniform(0.5, 2.0))
    assert (bounded.low, bounded.high) == (0.5, 2.0)
    np.testing.assert_array_equal(np.isfinite(bounded.log_density([0.4, 0.6, 3.0])), [False, True, False])


def test_marks_are_the_same_whatever_the_random_state() -> None:
    first = TauPrior(dist.HalfNormal(1.0)).marks
    torch.manual_seed(17)
    np.testing.assert_array_equal(first, TauPrior(dist.HalfNormal(1.0)).marks)


def test_first_panels_span_the_support() -> None:
    edges = TauPrior(dist.Uniform(0.5, 2.0)).edges((0.1, 10.0))
    assert (edges[0], edges[-1]) == (math.log(0.5), math.log(2.0))
    edges = TauPrior(dist.HalfNormal(1.0)).edges((0.1, 10.0))
    assert edges[-1] - edges[0] == pytest.approx(600 + math.log(100))
    inside = edges[(edges >= math.log(0.1)) & (edges <= math.log(10.0))]
    assert np.diff(inside).max() <= 1
