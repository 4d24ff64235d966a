"""The contracts hold with the least one may write: one gradient step, a pass-through, a Gaussian process."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import ROWS, Normals, centre, close, exact, make_tasks, setting
from scipy.stats import multivariate_normal
from torch import Tensor, nn

import bayesmeta as bm
from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.protocols import Context, Predictive, SharedPosterior, TaskGuide

DRAWS = 4000


class OneStep(TaskGuide):
    """One MAML step: from a learned start, along the gradient of the log density, with a learned rate and width."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.log_rate, self.log_scale = (nn.Parameter(torch.zeros(1)) for _ in range(3))

    def attach(self, density: TaskDensity, tasks: Tasks) -> None:
        self._log_task = density.log_task

    def condition(self, theta: Tensor, context: Context) -> Normals:
        start = self.start.double().expand(len(theta), len(context.batch.names), 1)
        with torch.enable_grad():
            noise = start.detach().requires_grad_()
            log_p = self._log_task.mapped(theta.detach(), noise, context.data, {}, in_dims=(0, 0, None, None))
            gradient = torch.autograd.grad(log_p.sum(), noise)[0].detach()
        count = context.batch.n.double().reshape(1, -1, 1)
        rate = self.log_rate.exp() / (1 + count)
        return Normals(start + rate * gradient, self.log_scale.exp() / (1 + count).sqrt() + 0 * start)


def test_a_gradient_step_learner_is_a_guide() -> None:
    tasks = make_tasks(ROWS)
    method = bm.Amortized(guide=OneStep(), optimizer=bm.Optimizer(steps=250, lr=2e-2))
    fit = bm.fit(centre, tasks, method=method, progress=False)
    post = fit.posterior(tasks, draws=DRAWS)
    mean, covariance = exact(ROWS)
    answer = mean[:-1], np.sqrt(np.diag(covariance))[:-1]
    assert fit.shared.status == "corrected" and set(post.flag) == {""}
    assert close(post.mean("a"), post.sd("a"), answer, DRAWS * fit.shared.ess * float(post.ess.min()) / 2)
    unchecked = fit.posterior(tasks, draws=DRAWS, refine="none")
    assert (np.abs(unchecked.mean("a") - answer[0]) < 0.3 * answer[1]).all()


def kernel(a: Any, b: Any) -> Any:
    return torch.exp(-0.5 * (a.unsqueeze(-1) - b.unsqueeze(-2)).square())


class ExactProcess(nn.Module):
    """A Gaussian process with its function integrated out: a `Predictive` that never looks at φ."""

    def __init__(self) -> None:
        super().__init__()
        self.log_noise = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, context: Batch, x: Tensor) -> dist.TorchDistribution:
        return self.predict(None, None, context, x)

    def predict(self, theta: Any, phi: Any, context: Batch, x: Tensor) -> dist.TorchDistribution:
        if phi is not None:
            raise ValueError("φ is integrated out")
        old, new, kept = context.x[..., 0], x[..., 0], context.mask.to(x.dtype)
        noise = (2 * self.log_noise).exp()
        # Padded rows are cut loose: no covariance with anything.
        covariance = kernel(old, old) * kept.unsqueeze(-1) * kept.unsqueeze(-2) + noise * torch.eye(old.shape[-1])
        gain = torch.linalg.solve(covariance, kernel(old, new) * kept.unsqueeze(-1)).mT
        loc = (gain @ (context.y * kept).unsqueeze(-1)).squeeze(-1)
        rest = 1 + noise - (gain * (kernel(new, old) * kept.unsqueeze(-2))).sum(-1)
        return dist.Normal(loc, rest.sqrt())


def test_a_gaussian_process_is_a_predictive_with_phi_integrated_out() -> None:
    """Learned by predicting targets from contexts; its predictions are those of NumPy's Gaussian process."""
    rng = np.random.default_rng(0)
    x = [rng.uniform(-3, 3, (12, 1)) for _ in range(40)]
    gap = [np.exp(-0.5 * (v - v.T) ** 2) + 0.09 * np.eye(12) for v in x]
    tasks = bm.Tasks.from_arrays(x, [rng.multivariate_normal(np.zeros(12), c) for c in gap])
    process = ExactProcess()
    predictive: Predictive = process.predict
    batch = tasks.batch([0, 1])
    assert predictive(None, None, batch, batch.x).batch_shape == (2, 12)
    options = bm.Amortized(optimizer=bm.Optimizer(steps=120, lr=5e-2))
    fit = bm.fit(bm.ConditionalModel(process, context=(0, 8)), tasks, method=options, progress=False)
    noise = float(fit.modules["module"].log_noise.exp())
    assert 0.2 < noise < 0.4
    new, labels = np.array([[0.1], [2.0]]), np.array([0.3, -0.2])
    context = bm.Tasks.from_arrays([x[0][:5], x[1][:2]], [tasks[0].y[:5], tasks[1].y[:2]])
    found = fit.predict(context, new).log_prob(labels)
    for task, rows in enumerate((5, 2)):
        points = np.concatenate([x[task][:rows], new])
        whole = np.exp(-0.5 * (points - points.T) ** 2) + noise**2 * np.eye(len(points))
        for k, label in enumerate(labels):
            keep = [*range(rows), rows + k]
            y = np.append(tasks[task].y[:rows], label)
            truth = multivariate_normal(cov=whole[np.ix_(keep, keep)]).logpdf(y)
            truth -= multivariate_normal(cov=whole[:rows, :rows]).logpdf(y[:-1])
            assert found[task, k] == pytest.approx(truth, abs=1e-6)


class Least(TaskGuide):
    """What one must write, and no more."""

    def condition(self, theta: Tensor, context: Context) -> Normals:
        zero = theta.new_zeros(len(theta), len(context.batch.names), 1)
        return Normals(zero, zero + 1.0)


def test_defaults_of_a_guide() -> None:
    density, _, tasks = setting(ROWS)
    guide, batch = Least(), tasks.batch([0, 1])
    data = density.tensors(batch)
    guide.attach(density, tasks)
    guide.follow(torch.zeros(1), torch.ones(1))
    context = guide.prepare(batch, data)
    assert context.batch is batch and context.data is data and context.summary == {}
    theta = torch.zeros(3, 1, dtype=torch.float64)
    assert guide(theta, context).sample().shape == (3, 2, 1)


def test_what_must_be_written_is_asked_for() -> None:
    assert inspect.isabstract(TaskGuide) and inspect.isabstract(SharedPosterior)
    with pytest.raises(TypeError, match="condition"):
        TaskGuide()  # type: ignore[abstract]
    with pytest.raises(TypeError, match="centre"):
        SharedPosterior()  # type: ignore[abstract]


def test_a_detached_context_is_cut_off_from_the_graph() -> None:
    batch = make_tasks(ROWS).batch([0])
    weight = torch.ones(2, requires_grad=True)
    context = Context(batch, {}, {"sums": 2 * weight})
    cut = context.detached()
    assert context.summary["sums"].requires_grad and not cut.summary["sums"].requires_grad
    assert torch.equal(cut.summary["sums"], context.summary["sums"].detach()) and cut.batch is batch


def test_pyro_is_left_alone() -> None:
    density, guides, tasks = setting(ROWS)
    context = guides.task.prepare(tasks.batch([0]), density.tensors(tasks.batch([0])))
    guides.task.condition(torch.zeros(2, 1, dtype=torch.float64), context).sample()
    assert len(pyro.get_param_store()) == 0
