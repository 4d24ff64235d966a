"""The hierarchical network against a network written out, its hyper-prior, and its units."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lines import lines

import bayesmeta as bm
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.models import bayesian_network
from bayesmeta.models.bayesian_network import Network


def test_a_network_of_given_weights_is_that_of_torch() -> None:
    network = Network([2, 3, 4, 1])
    weights = network.blocks.split(torch.randn(5, 1, network.blocks.d))
    x = torch.randn(5, 7, 2)
    found = network.evaluate(weights, x)
    for task in range(5):
        h = x[task]
        for k in range(3):
            h = torch.nn.functional.linear(
                h if k == 0 else h.tanh(), *(weights[f"{n}_{k}"][task, 0] for n in ("weight", "bias"))
            )
        torch.testing.assert_close(found[task], h)
    assert network.blocks.d == 2 * 3 + 3 + 3 * 4 + 4 + 4 + 1


def test_first_weights_have_variance_one_over_the_inputs_of_their_layer() -> None:
    network = Network([4, 200, 9, 1])
    parts = network.blocks.split(network.first(0))
    for k, fan_in in enumerate((4, 200)):
        w = parts[f"weight_{k}"]
        assert abs(float(w.square().mean()) * fan_in - 1) < 4 * (2 / w.numel()) ** 0.5
    assert torch.equal(network.first(0), network.first(0)) and not torch.equal(network.first(0), network.first(1))


def test_the_hyper_prior_lies_around_the_first_weights() -> None:
    tasks = lines(4, 0)
    model: Any = bayesian_network.build(tasks, hidden=(3,), centre_scale=0.2, tau=0.4, tau_spread=0.3, seed=7)
    sites = model.prior.shared
    mu, tau = sites["mu"].base_dist, sites["tau"].base_dist
    torch.testing.assert_close(mu.mean, Network([1, 3, 1]).first(7))
    assert (mu.stddev == 0.2).all()
    torch.testing.assert_close(tau.base_dist.loc.exp(), torch.full((10,), 0.4))
    assert (tau.base_dist.scale == 0.3).all()
    phi = model.prior.distribution({"mu": torch.zeros(10), "tau": torch.full((10,), 2.0)}, tasks.batch([0]))
    assert phi.event_shape == (10,) and (phi.stddev == 2.0).all()


def test_labels_and_inputs_in_other_units_are_the_same_problem() -> None:
    """Log joints differ by the Jacobian of the labels alone."""
    tasks, noise = lines(5, 0), torch.randn(5, 10, dtype=torch.float64)
    moved = bm.Tasks.from_arrays([1e3 + 50 * t.x.numpy() for t in tasks], [7 + 20 * t.y.numpy() for t in tasks])
    found = []
    for data, unit in ((tasks, 1.0), (moved, 20.0)):
        density = TaskDensity(bayesian_network.build(data, hidden=(3,)), data)
        theta = torch.cat([density.prior_scale()[0][:-1], torch.tensor([0.4 * unit], dtype=torch.float64).log()])
        data_of = density.tensors(data.batch(slice(None)))
        found.append(density.log_task(theta, noise, data_of, dict(density.learned.values)))
    torch.testing.assert_close(found[0] - found[1], torch.full((5,), 6 * np.log(20.0), dtype=torch.float64))


def gumbel(f: torch.Tensor) -> torch.distributions.Distribution:
    """Its log scale is predicted too."""
    return torch.distributions.Gumbel(f[..., 0], f[..., 1].exp())


def test_a_function_as_the_likelihood_gets_numbers_of_order_one_as_many_as_asked_for() -> None:
    """The same whatever the units of the labels."""
    tasks = lines(5, 0)
    moved = bm.Tasks.from_arrays([t.x.numpy() for t in tasks], [7 + 20 * t.y.numpy() for t in tasks])
    for outputs, shape in ((1, (5, 6)), (2, (5, 6, 2))):
        network = Network([1, 3, outputs])
        phi, x = network.first(0).double().expand(5, 1, -1), tasks.batch(slice(None)).x.double()
        expected = network(phi, (x - tasks.x.mean()) / tasks.x.std(correction=0)).reshape(shape)
        for data in (tasks, moved):
            model: Any = bayesian_network.build(data, hidden=(3,), likelihood=gumbel, outputs=outputs)
            torch.testing.assert_close(model.predictor(phi, x), expected)


def test_as_many_outputs_as_the_likelihood_takes() -> None:
    tasks = lines(4, 0)
    alone = bayesian_network.build(tasks, hidden=(3,), likelihood=gumbel)
    with pytest.raises(
        ValueError, match=r"expected a distribution of batch shape \(\d, 6\) .* got batch shape \(\d,\)"
    ):
        TaskDensity(alone, tasks)
    with pytest.raises(ValueError, match=r"expected f = predictor\(phi, x\) of shape \(\d, 6\).* got \(\d, 6, 2\)"):
        TaskDensity(bayesian_network.build(tasks, likelihood=bm.likelihoods.Normal(), outputs=2), tasks)
    with pytest.raises(ValueError, match=r"expected outputs=2, the numbers that LocationScale\(\) takes .* got 3"):
        bayesian_network.build(tasks, likelihood=bm.likelihoods.LocationScale(), outputs=3)
    with pytest.raises(ValueError, match="bayesian_network: expected outputs as a whole number ≥ 1, got 0"):
        bayesian_network.build(tasks, outputs=0)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"bayesian_network: expected hidden as whole numbers ≥ 1, got \(0,\)"):
        bayesian_network.build(lines(4, 0), hidden=(0,))
    with pytest.raises(ValueError, match="bayesian_network: expected tau as a finite number > 0, got 0"):
        bayesian_network.build(lines(4, 0), tau=0)
