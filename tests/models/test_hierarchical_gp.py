"""The hierarchical Gaussian process against grids over its hyper-parameters, and deep kernels against NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import nn

import bayesmeta as bm
from bayesmeta.models import hierarchical_gp

SHARED = {"mu": [-1.0, -0.7], "tau": [0.5, 0.6], "sigma": 0.1}
DOUBLE: Any = {"dtype": torch.float64}
MAP = bm.Marginal(shared="map", chains=1)


def waves(count: int, rows: int, seed: int = 0) -> bm.Tasks:
    family = bm.families.GaussianProcesses(noise=0.1)
    return family.simulate(count, rows=rows, seed=seed)[0]


@pytest.fixture(scope="module")
def fit() -> bm.Fit:
    return bm.fit(hierarchical_gp.build(), waves(6, 6), method=MAP, progress=False)


def covariance(x: np.ndarray, length: float, scale: float, noise: float) -> np.ndarray:
    distance = (x - x.T) / length
    return scale**2 * np.exp(-0.5 * distance**2) + noise**2 * np.eye(len(x))


def grid(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nodes `(K, 2)` of φ, and posterior weights `(K,)`."""
    axes = [m + t * np.linspace(-4, 4, 33) for m, t in zip(SHARED["mu"], SHARED["tau"], strict=True)]
    nodes = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    log_prior = -0.5 * np.square((nodes - SHARED["mu"]) / SHARED["tau"]).sum(1)
    log_likelihood = [multivariate_normal.logpdf(y, cov=covariance(x, *np.exp(phi), SHARED["sigma"])) for phi in nodes]
    log_weight = log_prior + np.array(log_likelihood)
    weight = np.exp(log_weight - log_weight.max())
    return nodes, weight / weight.sum()


def test_posteriors_and_predictions_are_those_of_a_grid(fit: bm.Fit) -> None:
    """Two tasks; moments of φ, and joint and single log scores of two more rows, within four standard errors."""
    tasks, draws = waves(2, 8, seed=1), 4000
    context, target = tasks.context_target(context=6, seed=0)
    post = fit.posterior(context, draws=draws, shared=SHARED)
    assert set(post.flag) == {""}
    predicted = post.predict(target)
    single, joint = predicted.log_prob(), predicted.log_prob(joint=True)
    for i, (task, new) in enumerate(zip(context, target, strict=True)):
        x, y = task.x.numpy(), task.y.numpy()
        nodes, weight = grid(x, y)
        mean = weight @ nodes
        sd = np.sqrt(weight @ (nodes - mean) ** 2)
        effective = draws * post.ess[i] / 2
        assert (np.abs(post.mean("phi")[i] - mean) < 4 * sd / math.sqrt(effective)).all()
        assert (np.abs(post.sd("phi")[i] / sd - 1) < 4 / math.sqrt(2 * effective)).all()
        both, labels = np.concatenate([x, new.x.numpy()]), np.concatenate([y, new.y.numpy()])
        given = []
        for phi in nodes:
            whole = covariance(both, *np.exp(phi), SHARED["sigma"])
            gain = np.linalg.solve(whole[:6, :6], whole[:6, 6:]).T
            loc, spread = gain @ y, whole[6:, 6:] - gain @ whole[:6, 6:]
            rows = [multivariate_normal.logpdf(labels[6 + k], loc[k], spread[k, k]) for k in range(2)]
            given.append([*rows, multivariate_normal.logpdf(labels[6:], loc, spread)])
        density = np.exp(given)
        exact = weight @ density
        error = np.sqrt(weight @ (density - exact) ** 2) / exact / math.sqrt(effective)
        assert (np.abs(np.append(single[i], joint[i]) - np.log(exact)) < 4 * error).all()


@pytest.mark.parametrize("kernel", ["rbf", "matern52", "periodic", "weakly_periodic"])
def test_covariances_are_the_families(kernel: str) -> None:
    """Scale, length and period stand where they belong; two lengths are two units of x."""
    model = hierarchical_gp.build(kernel)
    values = {"log_length": 0.3, "log_period": 0.4, "log_scale": 2.0}
    phi = torch.tensor([math.log(values[block.name]) for block in model.predictor.blocks.all], **DOUBLE).reshape(
        1, 1, -1
    )
    x = torch.tensor([0.0, 0.1, 0.7, 0.7], **DOUBLE).reshape(1, 4, 1)
    found = model.predictor(phi, x)
    delta = x.unsqueeze(-2) - x.unsqueeze(-3)
    length, period = torch.tensor(0.3, **DOUBLE), torch.full((1, 1, 1), 0.4, **DOUBLE)
    expected = 4 * bm.families.KERNELS[kernel](delta, length, period)
    torch.testing.assert_close(found[..., :-1], expected + 4e-9 * torch.eye(4).double(), atol=1e-12, rtol=1e-12)
    assert not found[..., -1].any()


def test_each_input_has_a_length() -> None:
    predictor = hierarchical_gp.build(dim=2).predictor
    phi = torch.tensor([2.0, 0.5, 1.0], **DOUBLE).log().reshape(1, 1, 3)
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 0.5]], **DOUBLE).unsqueeze(0)
    near = math.exp(-0.5)
    np.testing.assert_allclose(predictor(phi, x)[0, 0, :3], [1 + 1e-9, near, near], rtol=1e-12)


@pytest.mark.parametrize("kernel", ["rbf", "matern52"])
def test_rows_that_coincide_have_derivatives(kernel: str) -> None:
    """Features of equal rows are equal: the root of their distance is differentiated at 0, once and twice."""
    net = nn.Linear(1, 1).double()
    predictor = hierarchical_gp.build(kernel, features=net).predictor
    phi = torch.zeros(1, 1, 2).double().requires_grad_()
    total = predictor(phi, torch.tensor([0.2, 0.2, 1.0], **DOUBLE).reshape(1, 3, 1)).sum()
    first = torch.autograd.grad(total, [phi, net.weight], create_graph=True)
    second = torch.autograd.grad(first[0].sum(), [phi, net.weight])
    assert all(bool(part.isfinite().all()) and bool(part.any()) for part in (*first, *second))


def test_a_deep_kernel_and_a_mean_are_shared_by_all_tasks() -> None:
    """Deep-kernel transfer: φ is one for all, the tasks are Gaussian, predictions are those of one Gaussian process."""
    rng = np.random.default_rng(0)
    x = [rng.uniform(-2, 2, (8, 1)) for _ in range(12)]
    y = [3.0 + np.sin(np.sign(v[:, 0]) * v[:, 0] ** 2 + rng.normal()) + 0.1 * rng.normal(size=8) for v in x]
    tasks = bm.Tasks.from_arrays(x, y)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net, mean = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 2)), nn.Linear(1, 1)
    model = hierarchical_gp.build(dim=2, hyper="shared", features=net, mean=mean)
    fit = bm.fit(model, tasks, method=MAP, progress=False)
    assert fit.history.stages[-1]["kind"] == "closed form"
    learned = fit.modules["predictor"]
    assert not torch.equal(learned.features[0].weight, net[0].weight) and not torch.equal(learned.mean.bias, mean.bias)
    context, target = waves(1, 9, seed=3).context_target(context=5, seed=0)
    post = fit.posterior(context, draws=200)
    assert set(post.method) == {"exact"} and float(post.sd("phi").max()) < 1e-9
    both = torch.cat([context.x, target.x]).reshape(1, 9, 1)
    phi = torch.as_tensor(fit.shared.mean("mu")).reshape(1, 1, 3)
    found = learned.double()(phi, both.double())[0].detach().numpy()
    whole, level = found[:, :-1] + float(fit.shared.mean("sigma")) ** 2 * np.eye(9), found[:, -1]
    expected = level[5:] + whole[5:, :5] @ np.linalg.solve(whole[:5, :5], context.y.double().numpy() - level[:5])
    np.testing.assert_allclose(post.predict(target, kind="mean").mean[0], expected, atol=1e-6)


def test_the_prior_is_learned() -> None:
    """Twenty tasks whose lengths are .3 exactly: less spread than the prior of τ expects, and the right place."""
    family = bm.families.GaussianProcesses(noise=0.1, length=0.3, scale=1.0)
    fit = bm.fit(hierarchical_gp.build(), family.simulate(20, rows=12, seed=0)[0], method=MAP, progress=False)
    mu, tau = fit.shared.mean("mu"), fit.shared.mean("tau")
    assert abs(mu[0] - math.log(0.3)) < 0.25 and abs(mu[1]) < 0.35 and (tau < 0.5).all()
    assert fit.history.stages[-1]["kind"] == "quadrature"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kernel": "cosine"}, "expected kernel as one of"),
        ({"hyper": "none"}, 'hyper="task" or'),
        ({"dim": 0}, "whole number"),
        ({"noise": 0.0}, "noise as a positive number"),
        ({"mean": 3}, "mean as a module"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        hierarchical_gp.build(**options)


def test_inputs_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="say dim=1"):
        bm.fit(hierarchical_gp.build(dim=2), waves(3, 4), progress=False)
