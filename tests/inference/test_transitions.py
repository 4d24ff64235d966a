"""Moments after transitions, chains that drift are seen, and tempering finds evidence and weights of modes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from torch import Tensor

from bayesmeta.inference.transitions import LOWEST, Chains, settle, spread, standard_errors, temper, transition, tune

CHAINS = 4000


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def gaussian(noise: Tensor) -> tuple[Tensor, Tensor]:
    """Two tasks of three dimensions: correlated with unequal scales, and standard."""
    precision = torch.linalg.inv(torch.stack([covariance(), torch.eye(3, dtype=torch.float64)]))
    gradient = -(precision @ noise.unsqueeze(-1)).squeeze(-1)
    return 0.5 * (noise * gradient).sum(-1), gradient


def covariance() -> Tensor:
    root = torch.tensor([[2.0, 0.0, 0.0], [0.9, 0.3, 0.0], [-0.02, 0.0, 0.05]], dtype=torch.float64)
    return root @ root.mT


def drawn() -> Tensor:
    """Draws of both tasks, `(CHAINS, 2, 3)`."""
    noise = torch.randn(CHAINS, 2, 3, dtype=torch.float64)
    root = torch.linalg.cholesky(torch.stack([covariance(), torch.eye(3, dtype=torch.float64)]))
    return (root @ noise.unsqueeze(-1)).squeeze(-1)


def test_a_stationary_distribution_stays() -> None:
    chains = Chains.at(drawn())
    start = chains.noise
    tune(gaussian, chains)
    for _ in range(20):
        transition(gaussian, chains)
    assert not torch.equal(start, chains.noise) and bool((chains.acceptance > 0.6).all())
    for task, right in enumerate((covariance(), torch.eye(3, dtype=torch.float64))):
        found, sd = chains.noise[:, task], right.diagonal().sqrt()
        assert bool((found.mean(0).abs() < 4 * sd / math.sqrt(CHAINS)).all())
        assert bool((found.std(0) / sd - 1).abs().max() < 4 / math.sqrt(2 * CHAINS))
        scale = sd[:, None] * sd
        assert bool(((found.mT @ found / CHAINS - right).abs() < 4 * math.sqrt(2 / CHAINS) * scale).all())


def test_chains_come_in_from_the_wrong_place() -> None:
    """Shifted by a sd and half as wide: `settle` moves on until the moments are right."""
    chains = Chains.at(0.5 * drawn() + covariance().diagonal().sqrt())
    tune(gaussian, chains)
    assert settle(gaussian, chains).all()
    sd = torch.stack([covariance().diagonal().sqrt(), torch.ones(3, dtype=torch.float64)])
    assert bool((chains.noise.mean(0).abs() < 5 * sd / math.sqrt(CHAINS)).all())
    assert bool((chains.noise.std(0) / sd - 1).abs().max() < 5 / math.sqrt(2 * CHAINS))


def funnel(noise: Tensor) -> tuple[Tensor, Tensor]:
    """v ~ N(0, 1), w ~ N(0, e^(v/1.5))."""
    v, w = noise[..., 0], noise[..., 1]
    precision = (-v / 1.5).exp()
    value = -0.5 * v.square() - v / 3 - 0.5 * w.square() * precision
    gradient = torch.stack([-v - 1 / 3 + w.square() * precision / 3, -w * precision], -1)
    return value, gradient


def test_a_funnel() -> None:
    v = torch.randn(CHAINS, 1, dtype=torch.float64)
    chains = Chains.at(torch.stack([v, (v / 3).exp() * torch.randn_like(v)], -1))
    tune(funnel, chains)
    assert settle(funnel, chains).all()
    found = chains.noise[:, 0, 0]
    assert abs(float(found.mean())) < 4 / math.sqrt(CHAINS)
    assert abs(float(found.std()) - 1) < 4 / math.sqrt(2 * CHAINS)


def slow(noise: Tensor) -> tuple[Tensor, Tensor]:
    """So wide that chains from the middle are on their way for long; the second task is at home."""
    width = torch.tensor([1e7, 1.0], dtype=torch.float64)[:, None]
    return -0.5 * (noise / width).square().sum(-1), -noise / width.square()


def test_chains_that_drift_are_seen() -> None:
    """Tiny steps leave moments where they are, which looks settled: the acceptance of one gives them away."""
    chains = Chains.at(torch.randn(CHAINS, 2, 1, dtype=torch.float64))
    tune(slow, chains)
    chains.step[0] = 1e-4
    assert settle(slow, chains).tolist() == [False, True]


def test_a_rough_density_is_not_trusted() -> None:
    def rough(noise: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = gaussian(noise)
        return value + torch.where((noise * 1e6).sin().sum(-1) > 0, 0.0, -6.0), gradient

    chains = Chains.at(drawn())
    tune(rough, chains)
    assert not settle(rough, chains).any() and bool((chains.acceptance < LOWEST).all())


def test_moves_into_nothing_are_refused() -> None:
    def walled(noise: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = gaussian(noise)
        outside = noise[..., 0] > 0.5
        return torch.where(outside, math.nan, value), torch.where(outside.unsqueeze(-1), math.nan, gradient)

    start = drawn()
    start = torch.where(start[..., :1] > 0.5, -start, start)
    start = start.clone()
    start[..., 0].clamp_(max=0.5)
    chains = Chains.at(start)
    tune(walled, chains)
    for _ in range(10):
        transition(walled, chains)
    assert bool(torch.isfinite(chains.noise).all()) and bool((chains.noise[..., 0] <= 0.5).all())


def test_one_chain_cannot_be_judged() -> None:
    chains = Chains.at(drawn()[:1])
    assert settle(gaussian, chains).tolist() == [False, False]
    assert bool(torch.isfinite(spread(drawn()[:1])).all())


PLACES, HEIGHTS, WIDTH = (-2.0, 2.5), (0.8, 0.2), 0.15


def two_bumps(pairs: Tensor, noise: Tensor) -> Tensor:
    """Log likelihood: narrow bumps of unequal height around each task's own places; θ shifts them a little."""
    shift = 0.1 * (pairs.double() / CHAINS - 0.5) + torch.tensor([0.0, 0.4], dtype=torch.float64)
    terms = [
        math.log(h) - 0.5 * ((noise[..., 0] - m - shift) / WIDTH).square() for m, h in zip(PLACES, HEIGHTS, strict=True)
    ]
    return torch.stack(terms).logsumexp(0)


def tempered(pairs: Tensor, power: Tensor) -> object:
    def at(noise: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            point = noise.detach().requires_grad_()
            value = power * two_bumps(pairs, point) - 0.5 * point.square().sum(-1)
            (gradient,) = torch.autograd.grad(value.sum(), point)
        return value.detach(), gradient

    return at


def test_tempering_finds_evidence_and_both_modes() -> None:
    noise = torch.randn(CHAINS, 2, 1, dtype=torch.float64)
    even = torch.full((CHAINS, 2), -math.log(CHAINS), dtype=torch.float64)
    chains, pairs, evidence = temper(two_bumps, tempered, noise, even, np.random.default_rng(0))  # type: ignore[arg-type]
    grid = torch.linspace(-6, 6, 4801, dtype=torch.float64)
    theta = torch.linspace(0, CHAINS - 1, 41)
    for task in range(2):
        value = two_bumps(theta[:, None, None].expand(41, 4801, 2), grid[None, :, None, None].expand(41, 4801, 2, 1))
        log_joint = value[..., task].numpy() - 0.5 * grid.numpy() ** 2 - 0.5 * math.log(2 * math.pi)
        total = logsumexp(log_joint) + math.log(12 / 4800 / 41)
        share = np.exp(logsumexp(log_joint[:, grid.numpy() > 0]) - logsumexp(log_joint))
        assert abs(float(evidence[task]) - total) < 4 * 3 / math.sqrt(CHAINS)
        found = float((chains.noise[:, task, 0] > 0).double().mean())
        assert abs(found - share) < 4 * 3 * math.sqrt(share * (1 - share) / CHAINS)
        assert 0.01 < share < 0.99 and int(pairs.max()) < CHAINS


def test_weights_that_theta_has_from_the_start_count() -> None:
    """No data at all: the θ are resampled by their weights, the evidence is one."""
    log_weight = torch.linspace(-4, 0, CHAINS, dtype=torch.float64)[:, None].expand(-1, 2).log_softmax(0)
    flat = lambda pairs, noise: torch.zeros(pairs.shape, dtype=torch.float64)  # noqa: E731
    normal = lambda pairs, power: lambda z: (-0.5 * z.square().sum(-1), -z)  # noqa: E731
    noise = torch.randn(CHAINS, 2, 1, dtype=torch.float64)
    _, pairs, evidence = temper(flat, normal, noise, log_weight, np.random.default_rng(0))
    np.testing.assert_allclose(evidence, 0.0, atol=1e-12)
    right = float((log_weight[:, 0].exp() * torch.arange(CHAINS)).sum())
    assert abs(float(pairs.double().mean()) - right) < 0.02 * CHAINS


def test_a_likelihood_that_is_nowhere_finite_is_reported() -> None:
    nowhere = lambda pairs, noise: torch.where(noise[..., 0] > 40, 0.0, -math.inf)  # noqa: E731
    normal = lambda pairs, power: lambda z: (-0.5 * z.square().sum(-1), -z)  # noqa: E731
    noise = torch.randn(200, 1, 1, dtype=torch.float64)
    even = torch.full((200, 1), -math.log(200), dtype=torch.float64)
    _, _, evidence = temper(nowhere, normal, noise, even, np.random.default_rng(0))
    assert not float(evidence[0]) > -1e20


def test_what_is_alike_within_a_family_counts_once() -> None:
    """Families of ten: the same particle ten times has the error of a tenth of them, ten of their own that of all."""
    family = torch.arange(400).repeat_interleave(10).unsqueeze(1)
    alike = torch.randn(400, 1, 3, dtype=torch.float64).repeat_interleave(10, 0)
    own = torch.randn(4000, 1, 3, dtype=torch.float64)
    for noise, count in ((alike, 400), (own, 4000)):
        mean, sd = standard_errors(noise, family)[:, 0]
        torch.testing.assert_close(mean, torch.full((3,), count**-0.5).double(), rtol=0.2, atol=0)
        torch.testing.assert_close(sd, torch.full((3,), (2 * count) ** -0.5).double(), rtol=0.3, atol=0)
