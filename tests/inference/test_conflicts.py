"""Worst cases and gradient surgery against what they are defined to be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bayesmeta as bm
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference import conflicts
from bayesmeta.inference.amortized import build_guides
from bayesmeta.inference.conflicts import minimax, pcgrad, projected, task_bounds
from bayesmeta.inference.objectives import Guides, Step, elbo


def test_conflicts_are_projected_out() -> None:
    """Two gradients at 120°: each loses its part along the other; at 60° both stay."""
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([-0.5, 0.75**0.5])
    both = projected(torch.stack([one, other]))
    torch.testing.assert_close(both, one + 0.5 * other + other + 0.5 * one)
    agree = torch.stack([one, -other])
    torch.testing.assert_close(projected(agree), agree.sum(0))


def setting() -> tuple[TaskDensity, Guides, Step]:
    """Three tasks on one trained slope, which pull it different ways."""
    x = np.linspace(-1, 1, 6)[:, None]
    tasks = bm.Tasks.from_arrays([x] * 3, [8 * x[:, 0], -8 * x[:, 0], 4 * x[:, 0]])
    trunk = nn.Linear(1, 2)
    nn.init.constant_(trunk.weight, 0.5)
    nn.init.zeros_(trunk.bias)
    alike = bm.models.sharing.Gaussian(scale=0.05)
    model = bm.models.multitask(trunk, conditioning="film", sharing=alike, likelihood=bm.likelihoods.Normal(0.5))
    nn.init.zeros_(model.function.head.bias)
    density = TaskDensity(model, tasks)
    torch.manual_seed(0)
    guides = build_guides(density, tasks, bm.Amortized())
    batch = tasks.batch(np.arange(3))
    return density, guides, Step(guides.task.prepare(batch, density.tensors(batch)), 3, draws=4)


def gradients(objective: Any, *args: Any) -> dict[str, Tensor]:
    density, guides, step = args
    torch.manual_seed(1)
    loss, _ = objective(density, guides, step)
    values = list(guides.values.values())
    parameters = [p for p in (*guides.shared.parameters(), *guides.task.parameters()) if p.requires_grad]
    inputs = [*values, *parameters]
    found = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
    flat = [torch.cat([g.double().flatten() for g in some]) for some in (found[: len(values)], found[len(values) :])]
    return {"loss": loss.detach(), "values": flat[0], "q": flat[1]}


def mean_bound(density: TaskDensity, guides: Guides, step: Step) -> tuple[Tensor, Any]:
    shared, bounds, info = task_bounds(density, guides, step)
    return -(shared.mean() + bounds.mean(0).sum()) / step.tasks, info


def test_the_bound_of_all_tasks_is_the_elbo() -> None:
    args = setting()
    right, found = gradients(elbo, *args), gradients(mean_bound, *args)
    torch.testing.assert_close(found["loss"], right["loss"])
    torch.testing.assert_close(found["values"], right["values"], rtol=1e-6, atol=1e-8)


def test_gradient_surgery_changes_the_trained_weights_alone() -> None:
    """Value and gradients of q are those of the bound, those of the weights the projected ones."""
    args = setting()
    plain, found = gradients(mean_bound, *args), gradients(pcgrad, *args)
    torch.testing.assert_close(found["loss"], plain["loss"])
    torch.testing.assert_close(found["q"], plain["q"])
    assert (found["values"] - plain["values"]).abs().max() > 1e-3
    density, guides, step = args
    torch.manual_seed(1)
    _, bounds, _ = task_bounds(density, guides, step)
    each = torch.stack([conflicts._flat_gradient(b, list(guides.values.values())) for b in bounds.mean(0)])
    apart = -(projected(each) - each.sum(0)) / 3
    torch.testing.assert_close(found["values"] - plain["values"], apart.double(), rtol=1e-6, atol=1e-8)


def test_the_worst_case_is_the_softmax_of_losses() -> None:
    """Of all weights near the uniform ones those of the objective make Σ w L − KL / sharpness the largest."""
    args = setting()
    torch.manual_seed(1)
    _, bounds, _ = task_bounds(*args)
    loss = -bounds.detach().mean(0) / 6

    def worst(w: Tensor) -> float:
        return float((w * loss).sum() - (w * (3 * w).log()).sum() / conflicts.SHARPNESS)

    chosen = torch.softmax(conflicts.SHARPNESS * loss, 0)
    others = torch.distributions.Dirichlet(torch.ones(3, dtype=loss.dtype)).sample((500,))
    assert worst(chosen) >= max(worst(w) for w in others)
    torch.manual_seed(1)
    shared, bounds, _ = task_bounds(*args)
    right = -(shared.mean() + 3 * (chosen * bounds.mean(0)).sum()) / 3
    torch.testing.assert_close(gradients(minimax, *args)["loss"], right.detach())


@pytest.mark.parametrize("objective", ["minimax", "pcgrad"])
def test_both_train(objective: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 8, 1))
    tasks = bm.Tasks.from_arrays(list(x), list(np.sin(x[..., 0]) + 0.1 * rng.normal(size=(4, 8))))
    model = bm.models.multitask(nn.Sequential(nn.Linear(1, 4), nn.Tanh()))
    options = bm.Amortized(objective=objective, optimizer=bm.Optimizer(steps=60))
    fit = bm.fit(model, tasks, method=options, progress=False)
    assert fit.history.steps[-1]["elbo"] > fit.history.steps[0]["elbo"]
