"""Gaussian processes as weighted basis functions: their covariances, and any likelihood on top."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from lines import code_lines

import bayesmeta as bm
from bayesmeta.models import latent_gp

SPAN = 2.0


def covariance(function: Any, x: torch.Tensor, length: float, scale: float) -> torch.Tensor:
    """Of f at rows `(N, dim)`: the sum over weights of what each alone does."""
    own = torch.tensor([math.log(length / SPAN), math.log(scale), 0.0], dtype=torch.float64).expand(function.weights, 3)
    phi = torch.cat([own, torch.eye(function.weights, dtype=torch.float64)], 1).unsqueeze(1)
    each = function(phi, x.expand(function.weights, *x.shape))
    return each.mT @ each


@pytest.mark.parametrize("kernel", ["rbf", "matern52"])
@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("length", [0.5, 1.0])
def test_covariances_are_those_of_the_kernel(kernel: str, dim: int, length: float) -> None:
    ends = bm.Tasks.from_arrays([np.stack([np.full(dim, -SPAN), np.full(dim, SPAN)])], [np.zeros(2)])
    function = latent_gp.build(ends, bm.likelihoods.Normal(), kernel=kernel, basis=24).predictor
    generator = torch.Generator().manual_seed(0)
    x = SPAN * (2 * torch.rand(40, dim, generator=generator, dtype=torch.float64) - 1)
    difference = (x.unsqueeze(1) - x).norm(dim=-1, keepdim=True) / length
    one = torch.ones((), dtype=torch.float64)
    exact = 1.5**2 * bm.families.KERNELS[kernel](difference, one, one)
    found = covariance(function, x, length, 1.5)
    assert float((found - exact).abs().max()) < 0.03 * 1.5**2


def counts(tasks: int, rows: int, seed: int) -> tuple[bm.Tasks, np.ndarray]:
    """Poisson counts around exp of waves with a phase of each task's own, and the log rates."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-SPAN, SPAN, (tasks, rows, 1))
    rate = 1 + np.sin(2 * x[..., 0] + rng.uniform(0, 2 * np.pi, (tasks, 1)))
    names = [f"{seed}-{i}" for i in range(tasks)]
    return bm.Tasks.from_arrays(list(x), list(rng.poisson(np.exp(rate)).astype(float)), names=names), rate


def test_counts_are_learned_and_their_rates_covered() -> None:
    tasks, _ = counts(30, 30, seed=0)
    model = latent_gp.build(tasks, bm.likelihoods.Poisson(), basis=12)
    fit = bm.fit(model, tasks, method=bm.Marginal(shared="map", chains=1), progress=False)
    new, rate = counts(20, 30, seed=1)
    context, target = new.split_rows(torch.arange(len(new.y)) % 30 < 20)
    post = fit.posterior(context, draws=400)
    found = post.predict(target)
    flat = float(torch.distributions.Poisson(float(tasks.y.mean())).log_prob(target.y).mean())
    best = float(torch.distributions.Poisson(torch.as_tensor(np.exp(rate[:, 20:])).flatten()).log_prob(target.y).mean())
    score = float(np.mean(found.log_prob()))
    assert score > flat + 0.5 * (best - flat)
    drawn = post.predict(target, kind="mean").draws
    inside = (np.quantile(drawn, 0.05, 0) < np.exp(rate[:, 20:])) & (np.exp(rate[:, 20:]) < np.quantile(drawn, 0.95, 0))
    assert 0.75 < inside.mean() <= 1.0


def test_the_file_is_read_in_one_sitting() -> None:
    assert code_lines(pathlib.Path(str(latent_gp.__file__))) <= 150


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kernel": "periodic"}, 'kernel="rbf" or "matern52"'),
        ({"basis": 0}, "basis as a whole number"),
        ({"basis": 1001}, "at most 1000 basis functions"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        latent_gp.build(counts(3, 5, seed=0)[0], bm.likelihoods.Poisson(), **options)


@pytest.mark.parametrize(
    ("x", "said"),
    [(np.zeros((4, 4)), "one to three inputs"), (np.array([[0.0, 1.0], [1.0, 1.0]]), "1.0 alone in input 1")],
)
def test_inputs_that_it_cannot_take_are_refused(x: np.ndarray, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        latent_gp.build(bm.Tasks.from_arrays([x], [np.zeros(len(x))]), bm.likelihoods.Normal())


def test_units_of_inputs_do_not_matter() -> None:
    """Years in place of [-2, 2]."""
    tasks, _ = counts(3, 5, seed=0)
    years = bm.Tasks.from_arrays([5 * t.x.numpy() + 2000 for t in tasks], [t.y.numpy() for t in tasks])
    here, there = (latent_gp.build(some, bm.likelihoods.Poisson()).predictor for some in (tasks, years))
    phi = torch.randn(3, 1, here.weights + 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = tasks.batch(slice(None)).x
    torch.testing.assert_close(here(phi, x), there(phi, 5 * x + 2000))
