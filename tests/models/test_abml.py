"""ABML: variational steps on the task's own bound, the ELBO, and more steps that come closer."""

from __future__ import annotations

import numpy as np
import pytest
from lines import lines

import bayesmeta as bm
from bayesmeta.models import abml


def test_it_is_the_elbo_of_variational_steps() -> None:
    method = abml.method(steps=3, draws=4)
    assert (method.shared, method.objective) == ("map", "elbo")
    assert isinstance(method.guide, bm.guides.Variational)
    assert abml.method(shared="svgd").shared == "svgd"


def test_phi_is_all_weights_of_a_network_of_independent_coordinates() -> None:
    tasks = lines(6, 0)
    options = abml.method(steps=2, draws=4, optimizer=bm.Optimizer(steps=2))
    fit = bm.fit(abml.build(tasks, hidden=(3,)), tasks, method=options, progress=False)
    draws = fit.posterior(lines(1, 1), draws=4000, refine="none").draws("phi")[:, 0]
    assert draws.shape == (4000, 10)
    correlations = np.corrcoef(draws.T)[np.triu_indices(10, 1)]
    assert np.abs(correlations).max() < 5 / np.sqrt(4000), "a diagonal Gaussian given the point θ"
    assert (draws.std(0) < fit.prior(4000).draws("phi")[:, 0].std(0) * 1.1).all()


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValueError, match="Variational: steps must be a whole number of at least 1, got 0"):
        abml.method(steps=0)
