"""Simulated tasks follow their model, and refusals say why."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import SIGMA, centre

import bayesmeta as bm


def test_simulation_recovers_its_truth() -> None:
    like = bm.Tasks.from_arrays(None, [np.zeros(400), np.zeros(300)])
    simulated, truth = bm.simulate(centre, like=like, n=5, seed=3)
    again, _ = bm.simulate(centre, like=like, n=5, seed=3)
    assert len(simulated) == 5 and simulated.sizes.tolist() == [400, 300, 400, 300, 400]
    assert truth["mu"].shape == () and truth["a"].shape == (5,)
    means = [float(part.y.mean()) for part in simulated]
    assert np.abs((means - truth["a"]) * np.sqrt(simulated.sizes)).max() < 4 * SIGMA
    assert torch.equal(simulated.y, again.y)


def test_several_sites_are_several_outputs() -> None:
    def both(batch: bm.Batch) -> None:
        with batch.tasks():
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with batch.observations():
                pyro.sample("low", dist.Normal(a, 0.01), obs=batch.y[..., 0])
                pyro.sample("high", dist.Normal(a + 100.0, 0.01), obs=batch.y[..., 1])

    like = bm.Tasks.from_arrays(None, [np.zeros((3, 2)), np.zeros((2, 2))])
    simulated, truth = bm.simulate(both, like=like, seed=1)
    assert simulated.y.shape == (5, 2)
    np.testing.assert_allclose(simulated[0].y[:, 1] - 100.0, truth["a"][0] * np.ones(3), atol=0.1)


def test_flat_priors_cannot_be_simulated() -> None:
    def flat(batch: bm.Batch) -> None:
        mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        with batch.tasks(), batch.observations():
            pass
        with batch.tasks():
            a = pyro.sample("a", dist.Normal(mu, 1.0))
            with batch.observations():
                pyro.sample("y", dist.Normal(a, 1.0), obs=batch.y)

    with pytest.raises(ValueError, match="'mu' has a flat"):
        bm.simulate(flat, like=bm.Tasks.from_arrays(None, [np.zeros(3), np.zeros(2)]))
