from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import ROWS, SIGMA, TAU, centre, conditional, known_mean, make_tasks
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

import bayesmeta as bm
from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.guides import QUADRATIC_INPUTS, NaturalGuide

SLOPE_SIGMA = 0.7


def lines(batch: Batch) -> None:
    """Intercept and slope around shared means."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(mu, torch.tensor([1.0, 0.5])).to_event(1))
        with batch.observations():
            mean = phi[..., 0] + phi[..., 1] * batch.x[..., 0]
            pyro.sample("y", dist.Normal(mean, SLOPE_SIGMA), obs=batch.y)


def line_tasks(sizes: list[int], inputs: int = 1, **options: Any) -> Tasks:
    generator = np.random.default_rng(1)
    x = [generator.standard_normal((n, inputs)) for n in sizes]
    return Tasks.from_arrays(x, [1 + a[:, 0] + generator.standard_normal(len(a)) for a in x], **options)


def attached(model: Any, tasks: Tasks, *, shake: float = 0.3) -> tuple[NaturalGuide, TaskDensity]:
    density = TaskDensity(model, tasks)
    guide = NaturalGuide()
    guide.attach(density, tasks)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(shake * torch.randn_like(parameter))
    return guide, density


def posterior_of(guide: NaturalGuide, density: TaskDensity, batch: Batch, theta: Tensor) -> MultivariateNormal:
    with torch.no_grad():
        tasks = guide.condition(theta, guide.prepare(batch, density.tensors(batch)))
        return MultivariateNormal(tasks.loc, precision_matrix=tasks.factor @ tasks.factor.mT)


def test_without_rows_it_is_the_prior_whatever_the_networks_hold() -> None:
    tasks = line_tasks([0, 4, 0])
    guide, density = attached(lines, tasks)
    theta = 3 * torch.randn(6, 2, dtype=torch.float64)
    q = posterior_of(guide, density, tasks.batch([0, 1, 2]), theta)
    eye = torch.eye(2, dtype=torch.float64)
    for task in (0, 2):
        torch.testing.assert_close(q.loc[:, task], torch.zeros(6, 2, dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(q.covariance_matrix[:, task], eye.expand(6, 2, 2), rtol=0, atol=1e-12)
    assert q.loc[:, 1].abs().min() > 1e-3


def test_the_order_of_rows_and_padding_change_nothing() -> None:
    tasks = line_tasks([5, 2])
    guide, density = attached(lines, tasks)
    theta = torch.randn(3, 2, dtype=torch.float64)
    batch = tasks.batch([0, 1])
    plain = posterior_of(guide, density, batch, theta)
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = {k: t[:, order] if k in ("x", "y", "observed", "mask") else t for k, t in batch.tensors.items()}
    for other in (batch.replace(shuffled), tasks.batch([0, 1], rows=9)):
        q = posterior_of(guide, density, other, theta)
        torch.testing.assert_close(q.loc, plain.loc, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(q.covariance_matrix, plain.covariance_matrix, rtol=1e-4, atol=1e-4)


def test_a_row_of_weight_two_is_two_rows() -> None:
    x, y = np.array([[0.3], [1.1], [-0.4]]), np.array([0.2, 1.0, 2.0])
    twice = Tasks.from_arrays([x[[0, 1, 1, 2]]], [y[[0, 1, 1, 2]]])
    weighted = Tasks.from_arrays([x], [y], weight=[np.array([1.0, 2.0, 1.0])])
    guide, density = attached(lines, twice)
    sums = [guide.prepare(t.batch([0]), density.tensors(t.batch([0]))).summary["sums"] for t in (twice, weighted)]
    torch.testing.assert_close(*sums)


def exactly(guide: NaturalGuide, tasks: Tasks) -> None:
    """Sets the parameters to the exact posterior of a task's mean with a known prior, standardisation undone."""
    y = guide.inputs.parts["y"]
    loc, scale = float(y.loc[0]), float(y.scale[0])
    pairs = [tuple(pair) for pair in guide.pairs.mT.tolist()]
    last = len(guide.row_net) - 1
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.zero_()
        gate = float(torch.nn.functional.softplus(guide.row_net[last].bias[-1]))
        sums, directions, _ = guide.loadings._cols
        features = sums - len(pairs)
        width = guide.inputs.width + 1
        eta = guide.loadings.constant[0, features:sums]
        eta[pairs.index((0, 0))] = guide.typical * TAU / SIGMA**2 * loc
        eta[pairs.index((0, width - 1))] = guide.typical * TAU / SIGMA**2 * scale
        guide.loadings.constant[0, sums + directions] = TAU / SIGMA * (guide.typical / gate) ** 0.5


def test_it_can_be_the_exact_posterior_of_linear_gaussian_tasks() -> None:
    tasks = make_tasks(ROWS | {"empty": []})
    guide, density = attached(known_mean, tasks)
    exactly(guide, tasks)
    q = posterior_of(guide, density, tasks.batch(range(6)), torch.zeros(1, 0, dtype=torch.float64))
    mean, sd = conditional(ROWS | {"empty": []}, 0.0)
    torch.testing.assert_close(q.loc[0, :, 0] * TAU, torch.as_tensor(mean), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(q.stddev[0, :, 0] * TAU, torch.as_tensor(sd), rtol=1e-5, atol=1e-6)


def test_more_rows_than_it_has_seen_stay_exact_where_it_is_exact() -> None:
    tasks = make_tasks(ROWS)
    guide, density = attached(known_mean, tasks)
    exactly(guide, tasks)
    many = {"many": list(np.random.default_rng(0).standard_normal(500))}
    batch = make_tasks(many).batch([0])
    q = posterior_of(guide, density, batch, torch.zeros(1, 0, dtype=torch.float64))
    mean, sd = conditional(many, 0.0)
    assert abs(float(q.loc) - mean[0]) < 0.02 * sd[0]
    assert float(q.stddev) == pytest.approx(sd[0], rel=1e-3)


def test_the_precision_is_the_formula_of_the_module() -> None:
    tasks = line_tasks([3, 5])
    guide, density = attached(lines, tasks)
    batch = tasks.batch([0, 1])
    theta = torch.randn(2, 2, dtype=torch.float64)
    with torch.no_grad():
        context = guide.prepare(batch, density.tensors(batch))
        weights, directions, linear = guide.loadings(guide.theta(theta))
        rows = guide.inputs(batch)
        inputs = torch.cat([torch.ones(8, 1), rows.inputs], -1)
        learned = guide.row_net(inputs)
        gates = torch.nn.functional.softplus(learned[:, -guide.loadings._cols[1] - 1 :])
        tasks_q = guide.condition(theta, context)
        dense = tasks_q.lower.dense()
        for s, t in ((0, 0), (1, 1)):
            own = rows.segment == t
            outer = torch.einsum("j,jk,jl->kl", gates[own, -1], inputs[own], inputs[own])
            rank = torch.einsum("dm,jm,em->de", directions[:, s], gates[own, :-1], directions[:, s])
            precision = torch.eye(2) + (rank + linear[:, s] @ outer @ linear[:, s].mT) / guide.typical
            torch.testing.assert_close((dense @ dense.mT)[s, t].float(), precision, rtol=1e-4, atol=1e-4)
            eta = weights[:, s] @ context.summary["sums"][t]
            torch.testing.assert_close((dense[s, t] @ tasks_q.half[:, s, t]).float(), eta, rtol=1e-4, atol=1e-4)


def test_theta_is_standardised_with_the_given_location_and_scale() -> None:
    tasks = line_tasks([3, 5])
    guide, density = attached(lines, tasks)
    batch = tasks.batch([0, 1])
    theta = torch.randn(2, 2, dtype=torch.float64)
    before = posterior_of(guide, density, batch, theta)
    loc, scale = torch.tensor([3.0, -1.0], dtype=torch.float64), torch.tensor([0.5, 2.0], dtype=torch.float64)
    guide.follow(loc, scale)
    after = posterior_of(guide, density, batch, loc + scale * theta)
    torch.testing.assert_close(after.loc, before.loc)


def test_wide_rows_go_without_products_and_train_all_parameters() -> None:
    tasks = line_tasks([4, 6, 3], inputs=QUADRATIC_INPUTS)
    guide, density = attached(lines, tasks)
    batch = tasks.batch([0, 1, 2])
    context = guide.prepare(batch, density.tensors(batch))
    theta = torch.randn(2, 2, dtype=torch.float64)
    posterior = guide.condition(theta, context)
    assert context.summary["sums"].shape[1] < len(guide.pairs[0])
    posterior.log_prob(posterior.sample().detach()).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in guide.parameters())


def test_float32_runs_in_float32() -> None:
    tasks = make_tasks(ROWS)
    density = TaskDensity(centre, tasks, dtype=torch.float32)
    guide = NaturalGuide()
    guide.attach(density, tasks)
    batch = tasks.batch(range(5))
    posterior = guide.condition(torch.zeros(3, 1), guide.prepare(batch, density.tensors(batch)))
    assert posterior.sample().dtype is torch.float32
    q = MultivariateNormal(posterior.loc, precision_matrix=posterior.factor @ posterior.factor.mT)
    prior = MultivariateNormal(torch.zeros(1), torch.eye(1))
    assert torch.isfinite(kl_divergence(q, prior)).all()


@pytest.mark.parametrize("encoder", ["natural", "deepset", "attention"])
@pytest.mark.parametrize("kind", ["column", "task column", "several a row"])
def test_places_in_a_vector_are_read_whatever_they_are(kind: str, encoder: str, tmp_path: Any) -> None:
    """Places that no training task has, counted from the end, of a task, several a row; stored without data."""

    def model(batch: Batch) -> None:
        effects = pyro.sample("effects", dist.Normal(0.0, 1.0).expand([5]).to_event(1))
        with batch.tasks():
            chosen = effects[batch["place"]]
            a = pyro.sample("a", dist.Normal(chosen if kind == "task column" else 0.0, 1.0))
            with batch.observations():
                rows = {"column": chosen, "several a row": chosen.sum(-1), "task column": 0.0}[kind]
                pyro.sample("y", dist.Normal(a + rows, 1.0), obs=batch.y)

    def tasks(places: list[int], name: str) -> Tasks:
        given = {
            "column": {"columns": {"place": [np.array([p, p]) for p in places]}},
            "task column": {"task_columns": {"place": places}},
            "several a row": {"columns": {"place": [np.array([[p, 0], [p, 1]]) for p in places]}},
        }[kind]
        names = [f"{name}{i}" for i in range(len(places))]
        return Tasks.from_arrays(None, [np.array([0.1 * p, 0.3]) for p in places], names=names, **given)

    method = bm.Amortized(encoder=encoder, optimizer=bm.Optimizer(steps=3))
    fit = bm.fit(model, tasks([0, 1, 2, -2, 1], "old"), method=method, progress=False)
    fit.save(tmp_path / "fit", data=False)
    new = tasks([4, -1, 2], "new")
    draws = fit.posterior(new, draws=50, refine="none").draws("a")
    assert np.isfinite(draws).all()
    np.testing.assert_array_equal(
        bm.load(tmp_path / "fit", model).posterior(new, draws=50, refine="none").draws("a"), draws
    )
