"""ALPaCA against the paper's equations, its training against the evidence, and sinusoids learned in seconds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bayesmeta as bm
from bayesmeta.models import alpaca

SHARED = {"mu": [0.5, -1.0], "tau": [2.0, 0.7], "sigma": 0.3}


class Features(nn.Module):
    """(1, sin x), nothing to learn."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.ones_like(x), x.sin()], -1)


def lines(count: int = 6, seed: int = 0) -> bm.Tasks:
    rng = np.random.default_rng(seed)
    x = [rng.uniform(-3, 3, (n, 1)) for n in np.resize([1, 3, 5, 8], count)]
    phi = np.array(SHARED["mu"]) + np.array(SHARED["tau"]) * rng.normal(size=(count, 2))
    y = [a + b * np.sin(v[:, 0]) + 0.3 * rng.normal(size=len(v)) for v, (a, b) in zip(x, phi, strict=True)]
    return bm.Tasks.from_arrays(x, y, names=[f"{seed}.{i}" for i in range(count)])


@pytest.fixture(scope="module")
def fit() -> bm.Fit:
    model = alpaca.build(Features(), features=2)
    return bm.fit(model, lines(), method=bm.Marginal(shared="map", chains=1), progress=False)


def closed_form(h: np.ndarray, y: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean and covariance of φ, mean and variance of new labels: equations 5 to 7 of the paper, S = Λ₀⁻¹ σ²."""
    first = SHARED["sigma"] ** 2 * np.diag(1 / np.square(SHARED["tau"]))
    precision = h.T @ h + first
    mean = np.linalg.solve(precision, h.T @ y + first @ SHARED["mu"])
    spread = SHARED["sigma"] ** 2 * np.linalg.inv(precision)
    variance = SHARED["sigma"] ** 2 * (1 + np.einsum("md,de,me->m", new, np.linalg.inv(precision), new))
    return mean, spread, new @ mean, variance


def test_the_posterior_is_the_papers(fit: bm.Fit) -> None:
    """Draws are exact: means within four standard errors, log scores of new labels likewise."""
    tasks, draws = lines(4, seed=1), 20_000
    post = fit.posterior(tasks, draws=draws, shared=SHARED)
    assert set(post.method) == {"exact"} and set(post.flag) == {""}
    at = np.array([[-2.0], [0.1], [2.5]])
    h = np.concatenate([np.ones_like(at), np.sin(at)], 1)
    answers = []
    for task in tasks:
        x = task.x.numpy()
        answers.append(closed_form(np.concatenate([np.ones_like(x), np.sin(x)], 1), task.y.numpy(), h))
    labels = np.stack([loc + 0.5 * np.sqrt(variance) for *_, loc, variance in answers])
    score = post.predict(at).log_prob(labels)
    for i, (mean, spread, loc, variance) in enumerate(answers):
        sd = np.sqrt(np.diag(spread))
        assert (np.abs(post.mean("phi")[i] - mean) < 4 * sd / np.sqrt(draws)).all()
        assert (np.abs(post.sd("phi")[i] / sd - 1) < 4 / np.sqrt(2 * draws)).all()
        given = h @ post.draws("phi")[:, i].T
        density = np.exp(-0.5 * ((labels[i][:, None] - given) / 0.3) ** 2) / (0.3 * np.sqrt(2 * np.pi))
        error = density.std(1) / density.mean(1) / np.sqrt(draws)
        exact = -0.5 * ((labels[i] - loc) ** 2 / variance + np.log(2 * np.pi * variance))
        assert (np.abs(score[i] - exact) < 4 * error).all()


def test_batches_of_tasks_reach_the_mode_that_all_together_reach() -> None:
    """A batch's gradient is the evidence's but for the choice of tasks: in the end a tenth of an sd is left."""
    tasks = lines(64, seed=2)
    optimizer = bm.Optimizer(steps=600, batch_tasks=32, lr=0.01)
    ends = []
    for method in (
        bm.Marginal(shared="map", chains=1),
        bm.Amortized(shared="map", guide=bm.guides.Exact(), optimizer=optimizer),
    ):
        found = bm.fit(alpaca.build(Features(), features=2), tasks, method=method, progress=False).shared
        ends.append(np.concatenate([np.atleast_1d(found.mean(name)) for name in ("mu", "tau", "sigma")]))
    sd = np.array([2 / 8, 0.7 / 8, 2 / 11, 0.7 / 11, 0.3 / 21])
    np.testing.assert_array_less(np.abs(ends[0] - ends[1]), 0.1 * sd)
    truth = np.array([*SHARED["mu"], *SHARED["tau"], SHARED["sigma"]])
    np.testing.assert_array_less(np.abs(ends[0] - truth), 4 * sd)


def test_weights_are_learned() -> None:
    """Sinusoids from 200 tasks: features that know them; five rows beat none, which beat nothing."""
    family = bm.families.Sinusoids(target_rows=20)
    train, _ = family.simulate(200, rows=10, seed=0)
    model = alpaca.build(features=6, hidden=(24, 24))
    optimizer = bm.Optimizer(steps=400, batch_tasks=50, lr=0.02)
    method = bm.Amortized(shared="map", guide=bm.guides.Exact(), optimizer=optimizer)
    fit = bm.fit(model, train, method=method, progress=False)
    assert not torch.equal(fit.modules["predictor"].network[0].weight, model.predictor.network[0].weight)
    context, target = family.episodes(40, seed=1)
    errors = []
    for given in (context.without_rows(), context):
        mean = fit.posterior(given, draws=200).predict(target, kind="mean").mean
        errors.append(np.mean((mean - target.batch(slice(None)).y.numpy()) ** 2))
    assert errors[1] < 0.3 * errors[0] and errors[0] < 1.3 * float(target.y.var())


def test_several_outputs_have_a_column_each() -> None:
    """Output k of the last layer is that of k-th column alone."""
    layer = alpaca.LastLayer(Features(), 2, 3)
    phi, x = (
        torch.randn(4, 1, 6, generator=torch.Generator().manual_seed(0)),
        torch.linspace(-1, 1, 20).reshape(4, 5, 1),
    )
    one = alpaca.LastLayer(Features(), 2, 1)
    torch.testing.assert_close(layer(phi, x), torch.stack([one(phi[..., 2 * k : 2 * k + 2], x) for k in range(3)], -1))


def test_another_likelihood_is_inferred_too() -> None:
    rng = np.random.default_rng(0)
    x = [rng.uniform(-3, 3, (8, 1)) for _ in range(8)]
    y = [(np.sin(v[:, 0]) + rng.normal() > 0).astype(float) for v in x]
    model = alpaca.build(Features(), features=2, likelihood=bm.likelihoods.Bernoulli())
    tasks = bm.Tasks.from_arrays(x, y)
    fit = bm.fit(model, tasks, method=bm.Marginal(shared="map", chains=1), progress=False)
    post = fit.posterior(tasks, draws=200)
    assert set(post.method) == {"laplace"} and set(post.flag) == {""}


def test_the_same_seed_gives_the_same_weights() -> None:
    weights = [alpaca.build(seed=seed).predictor.network[0].weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"features": 0}, "features as whole numbers"),
        ({"hidden": (8, 2.5)}, "hidden as whole numbers"),
        ({"network": 3}, "network as a module"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        alpaca.build(**options)


def test_a_network_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="say features=2"):
        bm.fit(alpaca.build(Features(), features=3), lines(), progress=False)
