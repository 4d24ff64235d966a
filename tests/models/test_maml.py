"""MAML against its formula, step by step for each task alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lines import lines
from neural_tasks import ragged

from bayesmeta.models import maml
from bayesmeta.models.neural_processes import outputs


def test_it_is_the_network_after_gradient_steps_on_the_mean_loss_of_the_context() -> None:
    tasks = ragged()
    module: Any = maml.build(tasks, hidden=(5,), steps=2).module
    with torch.no_grad():
        for number, rate in enumerate(module.log_rate.values()):
            rate.copy_(torch.tensor([0.02 * (1 + number), 0.05]).log())
    x = torch.tensor([[0.3], [-1.0]])
    labels = module(tasks.batch(slice(None)), x.expand(4, 2, 1))
    for place, task in enumerate(tasks):
        rows = module.reader.inputs(task.x[None])
        weights = {name: value[None, None].detach().requires_grad_() for name, value in module.first.items()}
        for k in range(2 if len(task.y) else 0):
            found = module.reader.distribution(module.network.evaluate(weights, rows))
            loss = -found.log_prob(task.y[None]).mean()
            slopes = torch.autograd.grad(loss, list(weights.values()))
            weights = {
                name: (w - torch.tanh(module.log_rate[name][k].exp() * g)).detach().requires_grad_()
                for (name, w), g in zip(weights.items(), slopes, strict=True)
            }
        alone = module.reader.distribution(module.network.evaluate(weights, module.reader.inputs(x[None])))
        torch.testing.assert_close(labels.mean[place], alone.mean[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(labels.stddev[place], alone.stddev[0], rtol=1e-4, atol=1e-5)


def test_the_steps_are_differentiated_through() -> None:
    """The slope for the first weights is that of a difference quotient: of second order, not of first."""
    tasks = lines(3, 0)
    module: Any = maml.build(tasks, hidden=(5,), steps=2).module
    module.double()
    context, target = (
        part.batch(slice(None)).to(dtype=torch.float64) for part in tasks.context_target(context=3, seed=0)
    )

    def loss() -> torch.Tensor:
        result: torch.Tensor = -module(context, target.x).log_prob(target.y).mean()
        return result

    weight, step = module.first["weight_1"], 1e-5
    loss().backward()
    for i in (0, 3):
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                weight[0, i] += sign * step
                ends.append(float(loss()))
                weight[0, i] -= sign * step
        assert float(weight.grad[0, i]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4)


def test_large_steps_stay_finite() -> None:
    tasks = lines(3, 0)
    module: Any = maml.build(tasks, output=outputs.StudentT()).module
    with torch.no_grad():
        for rate in module.log_rate.values():
            rate.fill_(3.0)
        labels = module(tasks.batch(slice(None)), torch.zeros(3, 1, 1))
    assert labels.log_prob(torch.zeros(3, 1)).isfinite().all()


def test_errors() -> None:
    with pytest.raises(ValueError, match="maml: expected steps as a whole number ≥ 1, got 0"):
        maml.build(ragged(), steps=0)
    with pytest.raises(ValueError, match=r"maml: expected hidden\[1\] as a whole number ≥ 1, got 0"):
        maml.build(ragged(), hidden=(4, 0))
