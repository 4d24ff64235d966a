from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import ROWS, SIGMA, TAU, WIDE, centre, evidence, exact, frozen, known_mean, make_tasks
from torch import Tensor, nn

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference import objectives
from bayesmeta.inference.chunks import like_sizes
from bayesmeta.inference.exact import ExactGuide
from bayesmeta.inference.gaussian import GaussianTasks
from bayesmeta.inference.guides import NaturalGuide
from bayesmeta.inference.objectives import Guides, Step, elbo, importance_weighted
from bayesmeta.inference.protocols import Context, TaskGuide
from bayesmeta.inference.shared import NormalShared, PointShared


class Formula(TaskGuide):
    """The exact conditional of `conjugate.centre`, moved and stretched by parameters that are zero at first."""

    def __init__(self) -> None:
        super().__init__()
        self.move = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.stretch = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def condition(self, theta: Tensor, context: Context) -> GaussianTasks:
        """q(a | mu, y) in whitened coordinates."""
        mask, y = context.data["mask"], context.data["y"]
        count = mask.sum(1).double()
        precision = 1 + count * TAU**2 / SIGMA**2
        mu = theta if theta.shape[1] else theta.new_zeros(len(theta), 1)
        total = torch.where(mask, y, 0.0).sum(1) - count * mu
        loc = total * TAU / SIGMA**2 / precision + self.move[0] + self.move[1] * mu
        factor = (precision.sqrt() * self.stretch.exp()).expand(len(theta), -1)
        return GaussianTasks(loc.unsqueeze(-1), factor[..., None, None])


def exact_shared() -> NormalShared:
    mean, covariance = exact(ROWS)
    shared = NormalShared(torch.zeros(1, dtype=torch.float64), torch.full((1,), WIDE, dtype=torch.float64))
    with torch.no_grad():
        shared.mean.fill_(mean[-1] / WIDE)
        shared.log_diagonal.fill_(0.5 * np.log(covariance[-1, -1]) - np.log(WIDE))
    return shared


def log_evidence() -> float:
    """Of all tasks, by the multivariate normal that the observations have."""
    y = np.concatenate([np.array(v) for v in ROWS.values()])
    task = np.repeat(np.arange(len(ROWS)), [len(v) for v in ROWS.values()])
    covariance = WIDE**2 + TAU**2 * (task[:, None] == task) + SIGMA**2 * np.eye(len(y))
    mean = torch.zeros(len(y), dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal(mean, torch.as_tensor(covariance))
    return float(normal.log_prob(torch.as_tensor(y)))


def setting(guide: TaskGuide, model: object = centre) -> tuple[TaskDensity, Tasks, Guides, Batch, dict[str, Tensor]]:
    tasks = make_tasks(ROWS)
    density = TaskDensity(model, tasks)
    guide.attach(density, tasks)
    batch = tasks.batch(range(len(tasks)))
    shared = exact_shared() if model is centre else NormalShared(*density.prior_scale())
    values = {k: v.clone().requires_grad_() for k, v in density.learned.values.items()}
    return density, tasks, Guides(shared, guide, values), batch, density.tensors(batch)


def parameters(guides: Guides) -> list[Tensor]:
    return [*guides.shared.parameters(), *guides.task.parameters(), *guides.values.values()]


def gradients(loss: Tensor, guides: Guides) -> list[Tensor]:
    return list(torch.autograd.grad(loss, parameters(guides), materialize_grads=True))


def written_out(density: TaskDensity, guides: Guides, step: Step) -> Tensor:
    """The bound as its docstring says it, by plain autograd."""
    theta = guides.shared.sample(step.draws)
    seen = theta if step.tasks == len(step.context.batch.names) else theta.detach()
    noise = guides.task.condition(seen, step.context).sample()
    log_q = frozen(guides.task, seen, step.context).log_prob(noise)
    log_p = torch.stack(
        [density.log_task(t, z, step.context.data, guides.values) for t, z in zip(theta, noise, strict=True)]
    )
    shared = torch.stack([density.log_prior(t, guides.values) for t in theta]) - guides.shared.log_prob(theta)
    value = shared + step.tasks / noise.shape[1] * (log_p - log_q).sum(1)
    return -value.mean() / step.tasks


def with_scale(batch: Batch) -> None:
    """A point estimate beside shared and task parameters."""
    scale = pyro.param("scale", torch.tensor(0.8), constraint=dist.constraints.positive)
    mu = pyro.sample("mu", dist.Normal(0.0, WIDE))
    with batch.tasks():
        a = pyro.sample("a", dist.Normal(mu, TAU))
        with batch.observations():
            pyro.sample("y", dist.Normal(a, scale), obs=batch.y)


@pytest.mark.parametrize("draws", [1, 8])
def test_at_the_exact_posterior_the_bound_is_the_evidence_and_no_gradient_varies(draws: int) -> None:
    density, tasks, guides, batch, data = setting(Formula())
    for _ in range(3):
        loss, _ = elbo(density, guides, Step(guides.task.prepare(batch, data), len(tasks), draws))
        assert -float(loss.detach()) * len(tasks) == pytest.approx(log_evidence(), abs=1e-9)
        assert all(g.abs().max() < 1e-9 for g in gradients(loss, guides))


def test_away_from_it_the_bound_is_lower_and_the_gradient_leads_back() -> None:
    density, tasks, guides, batch, data = setting(Formula())
    assert isinstance(guides.task, Formula)
    with torch.no_grad():
        guides.task.move[0] = 0.4
    loss, _ = elbo(density, guides, Step(guides.task.prepare(batch, data), len(tasks), 500))
    assert -float(loss.detach()) * len(tasks) < log_evidence() - 0.2
    assert torch.autograd.grad(loss, guides.task.move)[0][0] > 0.1


@pytest.mark.parametrize("model", [centre, known_mean, with_scale])
@pytest.mark.parametrize("count", [5, 50])
def test_value_and_gradient_are_those_of_the_formula(
    model: object, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objectives, "FARTHEST", math.inf)
    guide = NaturalGuide()
    density, _, guides, batch, data = setting(guide, model)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    found = []
    for objective in (lambda *a: elbo(*a)[0], written_out):
        torch.manual_seed(4)
        loss = objective(density, guides, Step(guide.prepare(batch, data), count, 4))
        found.append([loss.detach(), *gradients(loss, guides)])
    for ours, right in zip(*found, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-6)
    assert len(found[0]) == 1 + len(parameters(guides))


def test_a_draw_moves_its_posterior_by_a_bounded_number_of_sds() -> None:
    """Of three tasks one is far away: its slope is cut to the bound, in sds of its own posterior, and no other."""
    sd = torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)
    white = torch.tensor([[0.3, -0.2, 0.1]], dtype=torch.float64).unsqueeze(-1).requires_grad_()
    noise = white * sd.unsqueeze(-1)
    slope = torch.tensor([[2.0, -1e4, 300.0]], dtype=torch.float64).unsqueeze(-1)
    found = objectives._bounded(7 * slope, noise, white, 7.0) / 7
    expected = torch.tensor([[2.0, -objectives.FARTHEST / 0.1, 300.0]], dtype=torch.float64).unsqueeze(-1)
    torch.testing.assert_close(found, expected)


def test_pieces_of_like_size_give_the_same_as_all_tasks_at_once() -> None:
    density, tasks, guides, batch, data = setting(NaturalGuide(), with_scale)
    groups = like_sizes(np.asarray(tasks.sizes), draws=100_000)
    assert len(groups) == len(set(tasks.sizes.tolist()))
    pieces = [(torch.as_tensor(g), density.tensors(tasks.batch(g))) for g in groups[::-1]]
    results = []
    for given in ((), pieces):
        torch.manual_seed(4)
        step = Step(guides.task.prepare(batch, data), len(tasks), 3, given)
        loss, info = elbo(density, guides, step)
        results.append([loss.detach(), info["log_p"], *gradients(loss, guides)])
    for whole, cut in zip(results[0], results[1], strict=True):
        torch.testing.assert_close(cut, whole)


def test_info_names_densities_theta_and_noise() -> None:
    density, tasks, guides, batch, data = setting(Formula())
    for objective, shape in ((elbo, (3, 5)), (importance_weighted, (3, 5))):
        _, info = objective(density, guides, Step(guides.task.prepare(batch, data), len(tasks), 3))
        assert info["log_p"].shape == shape and info["noise"].shape == (*shape, 1)
        theta = info["theta"].expand(3, -1)
        right = torch.stack([density.log_task(t, z, data, {}) for t, z in zip(theta, info["noise"], strict=True)])
        torch.testing.assert_close(info["log_p"], right)


def test_works_without_gradients_and_with_a_point() -> None:
    density, tasks, guides, batch, data = setting(Formula())
    step = Step(guides.task.prepare(batch, data), len(tasks), 2)
    with torch.no_grad():
        loss, _ = elbo(density, guides, step)
    assert not loss.requires_grad and -float(loss) * len(tasks) == pytest.approx(log_evidence(), abs=1e-9)
    point = replace(guides, shared=PointShared(*density.prior_scale()))
    loss, _ = elbo(density, point, replace(step, draws=1))
    by_mean = torch.autograd.grad(loss, next(iter(point.shared.parameters())))[0]
    total = float(sum(sum(y) / (SIGMA**2 + len(y) * TAU**2) for y in ROWS.values()))
    assert float(by_mean) == pytest.approx(-total * WIDE / len(tasks), rel=1e-9)


def test_the_importance_weighted_bound_is_the_evidence_at_the_exact_posterior() -> None:
    density, tasks, guides, batch, data = setting(Formula())
    loss, _ = importance_weighted(density, guides, Step(guides.task.prepare(batch, data), len(tasks), 4))
    assert -float(loss.detach()) * len(tasks) == pytest.approx(log_evidence(), abs=1e-9)
    assert isinstance(guides.task, Formula)
    with torch.no_grad():
        guides.task.stretch.fill_(0.5)
    losses = []
    for objective in (elbo, importance_weighted):
        torch.manual_seed(0)
        step = Step(guides.task.prepare(batch, data), len(tasks), 8)
        with torch.no_grad():
            losses.append(sum(float(objective(density, guides, step)[0]) for _ in range(200)) / 200)
    assert -losses[0] < -losses[1] - 0.01
    assert -losses[1] * len(tasks) < log_evidence() + 0.02


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3, 4], [0, 2]])
def test_with_an_exact_guide_the_elbo_is_the_evidence_and_its_gradient_has_no_noise(chosen: list[int]) -> None:
    """At one θ, against central differences of the evidence by multivariate normals; a batch stands for all tasks."""
    tasks = make_tasks(ROWS)
    density = TaskDensity(centre, tasks)
    guide = ExactGuide()
    guide.attach(density, tasks)
    batch = tasks.batch(chosen)
    context = guide.prepare(batch, density.tensors(batch))

    def exactly(mu: float) -> float:
        return len(ROWS) / len(chosen) * evidence(ROWS, mu)[chosen].sum() - 0.5 * (mu / WIDE) ** 2

    for mu in (-1.0, 2.5):
        shared = PointShared(torch.full((1,), mu, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
        loss, _ = elbo(density, Guides(shared, guide), Step(context, len(tasks), 1))
        loss.backward()
        constant = 0.5 * np.log(2 * np.pi * WIDE**2)
        assert -5 * float(loss.detach()) == pytest.approx(exactly(mu) - constant, rel=1e-9)
        slope = (exactly(mu + 1e-5) - exactly(mu - 1e-5)) / 2e-5
        (parameter,) = shared.parameters()
        assert -5 * float(parameter.grad) == pytest.approx(slope, rel=1e-6)


def test_with_an_exact_guide_the_slope_of_q_counts_too() -> None:
    """q(θ) at the exact posterior: the bound is the evidence of all tasks, and its gradient vanishes without noise."""
    tasks = make_tasks(ROWS)
    density = TaskDensity(centre, tasks)
    guide = ExactGuide()
    guide.attach(density, tasks)
    batch = tasks.batch(np.arange(len(tasks)))
    shared = exact_shared()
    step = Step(guide.prepare(batch, density.tensors(batch)), len(tasks), 8)
    loss, _ = elbo(density, Guides(shared, guide), step)
    loss.backward()
    assert -5 * float(loss.detach()) == pytest.approx(log_evidence(), rel=1e-9)
    assert all(float(p.grad.abs().max()) < 1e-9 for p in shared.parameters() if p.grad is not None)
    assert shared.mean.grad is not None


def test_with_an_exact_guide_learned_values_follow_the_evidence() -> None:
    """A noise that is a trained parameter: its slope needs second moments of φ, against central differences."""

    def model(batch: Batch) -> None:
        noise = pyro.param("noise", torch.tensor(0.5, dtype=torch.float64), dist.constraints.positive)
        with batch.tasks():
            a = pyro.sample("a", dist.Normal(torch.zeros(2), TAU).to_event(1))
            with batch.observations():
                pyro.sample("y", dist.Normal(a[..., 0] + 0.5 * a[..., 1], noise), obs=batch.y)

    tasks = make_tasks(ROWS)
    density = TaskDensity(model, tasks)
    guide = ExactGuide()
    guide.attach(density, tasks)
    batch = tasks.batch(np.arange(len(tasks)))
    values = {"noise": torch.tensor(-0.4, dtype=torch.float64).requires_grad_()}
    density.learned.values.update(values)
    shared = PointShared(*density.prior_scale())
    step = Step(guide.prepare(batch, density.tensors(batch)), len(tasks), 1)
    elbo(density, Guides(shared, guide, values), step)[0].backward()

    def exactly(log_noise: float) -> float:
        found = 0.0
        for y in map(np.array, ROWS.values()):
            covariance = np.exp(2 * log_noise) * np.eye(len(y)) + 1.25 * TAU**2
            found -= 0.5 * (y @ np.linalg.solve(covariance, y) + np.linalg.slogdet(2 * np.pi * covariance)[1])
        return found

    slope = (exactly(-0.4 + 1e-5) - exactly(-0.4 - 1e-5)) / 2e-5
    assert -5 * float(values["noise"].grad) == pytest.approx(slope, rel=1e-6)
