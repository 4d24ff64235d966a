"""The guide of sites that hang together: invertible, normalised, the prior without rows, better than one Gaussian."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import bayesmeta as bm
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.amortized import Amortized, build_guides, fit_amortized
from bayesmeta.inference.guides import NaturalGuide
from bayesmeta.inference.objectives import Step, elbo
from bayesmeta.inference.staged import StagedGuide, StagedTasks
from bayesmeta.inference.weighing import resample_theta, weigh_known

GROUPS = 3


def noisy_mean(batch: bm.Batch) -> None:
    """A mean and a noise of each task, around shared ones."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with batch.tasks():
        m = pyro.sample("m", dist.Normal(mu, 1.0))
        s = pyro.sample("s", dist.HalfNormal(1.0))
        with batch.observations():
            pyro.sample("y", dist.Normal(m, s), obs=batch.y)


def grouped(batch: bm.Batch) -> None:
    """Groups in a task around a mean of the task, with a scale of the task."""
    with batch.tasks():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        group = pyro.sample(
            "group", dist.Normal(mu.unsqueeze(-1).expand(-1, -1, GROUPS), tau.unsqueeze(-1)).to_event(1)
        )
        with batch.observations():
            pyro.sample("y", dist.Normal(group.squeeze(-2).gather(-1, batch["group"]), 0.5), obs=batch.y)


def grouped_tasks(sizes: list[int], *, seed: int = 0) -> bm.Tasks:
    rng = np.random.default_rng(seed)
    index = [np.arange(n) % GROUPS for n in sizes]
    y = [rng.normal() + rng.normal(size=GROUPS)[i] + 0.5 * rng.normal(size=len(i)) for i in index]
    return bm.Tasks.from_arrays(None, y, columns={"group": index})


def shaken(model: Any, tasks: bm.Tasks, dtype: torch.dtype = torch.float64) -> tuple[StagedGuide, TaskDensity]:
    density = TaskDensity(model, tasks, dtype=dtype)
    guide = StagedGuide(density.stages)
    torch.manual_seed(0)
    guide.attach(density, tasks)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter) / max(1, parameter.shape[-1]) ** 0.5)
    return guide, density


def conditioned(guide: StagedGuide, density: TaskDensity, tasks: bm.Tasks, theta: Tensor) -> StagedTasks:
    batch = tasks.batch(range(len(tasks)))
    return guide.condition(theta, guide.prepare(batch, density.tensors(batch)))


def test_models_whose_sites_hang_together_have_it_and_others_do_not() -> None:
    def apart(batch: bm.Batch) -> None:
        with batch.tasks():
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            with batch.observations():
                pyro.sample("y", dist.Normal(a + b, 1.0), obs=batch.y)

    tasks = grouped_tasks([3, 5])
    kinds = {grouped: StagedGuide, noisy_mean: StagedGuide, apart: NaturalGuide}
    for model, kind in kinds.items():
        density = TaskDensity(model, tasks)
        assert type(build_guides(density, tasks, Amortized()).task) is kind
        assert type(build_guides(density, tasks, Amortized(encoder="deepset")).task) is not StagedGuide


def test_without_rows_it_is_the_prior_whatever_the_networks_hold() -> None:
    tasks = grouped_tasks([3, 0, 5])
    guide, density = shaken(grouped, tasks)
    white = torch.randn(4, 3, 5, dtype=torch.float64)
    found = conditioned(guide, density, tasks, torch.zeros(4, 0, dtype=torch.float64))
    torch.testing.assert_close(found.push(white)[:, 1], white[:, 1][..., guide.order.argsort()], rtol=1e-12, atol=0)
    assert not torch.allclose(found.push(white)[:, 0], white[:, 0][..., guide.order.argsort()], atol=1e-2)


@pytest.mark.parametrize("model", [noisy_mean, grouped])
def test_maps_are_inverse_and_densities_are_those_of_the_map(model: Any) -> None:
    tasks = grouped_tasks([3, 7])
    guide, density = shaken(model, tasks)
    dim, shared = density.structure.task_size, density.structure.shared_size
    found = conditioned(guide, density, tasks, torch.randn(2, shared, dtype=torch.float64))
    white = torch.randn(2, 2, dim, dtype=torch.float64)
    noise = found.push(white)
    square, log_det = found.pull(noise)
    torch.testing.assert_close(square, white.square().sum(-1))
    jacobian = torch.autograd.functional.jacobian(lambda w: found.push(w), white)
    for s in range(2):
        for t in range(2):
            own = jacobian[s, t, :, s, t]
            torch.testing.assert_close(log_det.expand(2, 2)[s, t], -torch.linalg.slogdet(own)[1])


def test_the_order_of_rows_padding_and_further_tasks_change_nothing() -> None:
    tasks = grouped_tasks([3, 7])
    guide, density = shaken(grouped, tasks)
    theta, white = torch.zeros(1, 0, dtype=torch.float64), torch.randn(1, 1, 5, dtype=torch.float64)
    alone = conditioned(guide, density, tasks[[0]], theta).push(white)
    together = conditioned(guide, density, tasks, theta).push(white.expand(-1, 2, -1))[:, :1]
    task = tasks[0]
    turned = bm.Tasks.from_arrays(
        None, [task.y.numpy()[::-1]], columns={"group": [task.columns["group"].numpy()[::-1]]}
    )
    for other in (together, conditioned(guide, density, turned, theta).push(white)):
        torch.testing.assert_close(other, alone, rtol=1e-5, atol=1e-5)


def test_parameters_are_those_at_the_time_of_conditioning() -> None:
    tasks = grouped_tasks([3, 7])
    guide, density = shaken(grouped, tasks)
    found = conditioned(guide, density, tasks, torch.zeros(1, 0, dtype=torch.float64))
    white = torch.randn(1, 2, 5, dtype=torch.float64)
    held = StagedTasks(guide, {k: p.detach().clone() for k, p in found.parameters.items()}, found.theta, found.summary)
    before = held.push(white)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.zero_()
    torch.testing.assert_close(held.push(white), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_parameter_is_trained(dtype: torch.dtype) -> None:
    tasks = grouped_tasks([3, 7, 4])
    guide, density = shaken(grouped, tasks, dtype)
    guides = build_guides(density, tasks, Amortized())
    guides.task = guide
    batch = tasks.batch(range(3))
    loss, _ = elbo(density, guides, Step(guide.prepare(batch, density.tensors(batch)), 3, 4))
    loss.backward()
    idle = [name for name, p in guide.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert idle == ["stages.0.scales.weight", "stages.0.known.weight"]  # nothing comes before the first stage
    assert all(bool(p.grad.isfinite().all()) for p in guide.parameters() if p.grad is not None)


@pytest.mark.parametrize("far", [1e3, 1e6, 1e9])
def test_rows_far_from_all_others_are_no_reason_to_fail(far: float) -> None:
    def lines(batch: bm.Batch) -> None:
        with batch.tasks():
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            s = pyro.sample("s", dist.HalfNormal(1.0))
            with batch.observations():
                pyro.sample("y", dist.Normal(a + 0.0 * batch.x.sum(-1), s), obs=batch.y)

    rng = np.random.default_rng(0)
    tasks = bm.Tasks.from_arrays(list(rng.normal(size=(4, 6, 2))), list(rng.normal(size=(4, 6))))
    guide, density = shaken(lines, tasks)
    x = far * np.ones((6, 2)) + rng.normal(size=(6, 2))
    there = bm.Tasks.from_arrays([x, rng.normal(size=(6, 2))], list(rng.normal(size=(2, 6))))
    batch = there.batch(range(2))
    summary = guide.prepare(batch, density.tensors(batch)).summary
    assert all(bool(part.isfinite().all()) for part in summary.values())


def test_an_unknown_noise_is_inferred_where_one_gaussian_fails() -> None:
    """Means and noises of known tasks: most are accepted as the guide gives them."""
    rng = np.random.default_rng(0)
    y = [rng.normal() + abs(rng.normal()) * rng.normal(size=n) for n in rng.integers(3, 12, size=40)]
    tasks = bm.Tasks.from_arrays(None, y)
    density = TaskDensity(noisy_mean, tasks)
    shares = []
    for guide in (StagedGuide(density.stages), NaturalGuide()):
        options = Amortized(guide=guide, optimizer=bm.Optimizer(steps=250))
        torch.manual_seed(0)
        guides, shared, _ = fit_amortized(density.again(), tasks, options, progress=False)
        with torch.no_grad():
            drawn = weigh_known(density, guides, resample_theta(shared, 60), tasks)
        shares.append(sum(not flag for flag in drawn.flag) / len(tasks))
    assert shares[0] > 0.8 and shares[0] > shares[1] + 0.1, shares
