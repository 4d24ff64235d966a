"""Shared factors: the covariance against scipy, loadings against conditioning in the joint Gaussian."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from bayesmeta.models.sharing import Block, Blocks, Factors
from bayesmeta.models.sharing.blocks import off_centre


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


BLOCKS = Blocks((Block("weight", (1, 2)), Block("gate", (2,), 1.0)))
CENTRE, SD = np.array([0.4, -2.0, 1.0, 1.0]), np.array([0.3, 0.3, 0.8, 0.8])


def point(rank: int) -> dict[str, Tensor]:
    return {"mu": torch.tensor([0.4, -2.0]), "tau": torch.tensor([0.3, 0.8]), "factors": torch.randn(rank, 4)}


@pytest.mark.parametrize("rank", [1, 2, 6])
def test_density_with_loadings_integrated_out(rank: int) -> None:
    prior, shared, phi = Factors(rank).over(BLOCKS), point(rank), torch.randn(3, 1, 4)
    f = shared["factors"].numpy()
    fn: Any = prior.distribution(shared, None)  # type: ignore[arg-type]
    want = stats.multivariate_normal(CENTRE, f.T @ f + np.diag(SD**2)).logpdf(phi.numpy()).reshape(3, 1)
    np.testing.assert_allclose(fn.log_prob(phi).numpy(), want, rtol=1e-10)
    np.testing.assert_allclose(prior.variance(shared).numpy(), np.diag(f.T @ f) + SD**2)


def test_draws_are_loadings_times_factors() -> None:
    """The covariance of 20000 draws, each entry within 5 standard errors."""
    shared, draws = point(1), 20_000
    fn: Any = Factors(1).over(BLOCKS).distribution(shared, None)  # type: ignore[arg-type]
    f = shared["factors"].numpy()
    want = f.T @ f + np.diag(SD**2)
    error = np.sqrt((want**2 + np.outer(want.diagonal(), want.diagonal())) / draws)
    assert (np.abs(np.cov(fn.sample((draws,)).numpy().T) - want) < 5 * error).all()


@pytest.mark.parametrize("rank", [1, 2, 6])
def test_loadings_are_conditioned_in_the_joint_gaussian(rank: int) -> None:
    prior, shared, phi = Factors(rank).over(BLOCKS), point(rank), torch.randn(3, 1, 4)
    f = shared["factors"].numpy()
    gain = np.linalg.solve(f.T @ f + np.diag(SD**2), f.T).T
    mean, covariance = prior.loadings(phi, shared)
    np.testing.assert_allclose(mean.numpy(), (phi.numpy() - CENTRE) @ gain.T, atol=1e-10)
    np.testing.assert_allclose(covariance.numpy(), np.eye(rank) - gain @ f.T, atol=1e-10)


def test_similarity_is_that_of_what_factors_explain() -> None:
    """φ = centre + a F without noise: the correlation of a F; a turn of the factors changes nothing."""
    prior, draws = Factors(2).over(BLOCKS), 40
    a, f = torch.randn(draws, 3, 2), torch.randn(draws, 2, 4)
    shared = {"mu": torch.randn(draws, 2), "tau": torch.full((draws, 2), 1e-6), "factors": f}
    explained = torch.einsum("stk,skd->std", a, f)
    phi = torch.cat([shared["mu"], torch.ones(draws, 2)], -1).unsqueeze(1) + explained
    product = np.einsum("std,sud->tu", explained.numpy(), explained.numpy())
    want = product / np.sqrt(np.outer(product.diagonal(), product.diagonal()))
    np.testing.assert_allclose(prior.similarity(phi, shared).numpy(), want, atol=1e-5)
    turn = torch.linalg.qr(torch.randn(2, 2)).Q
    np.testing.assert_allclose(prior.similarity(phi, shared | {"factors": turn @ f}).numpy(), want, atol=1e-5)


def test_shared_sites() -> None:
    prior, shared = Factors(2, sd_scale=0.7).over(BLOCKS), point(2)
    sites: Any = prior.shared
    assert {name: tuple(fn.event_shape) for name, fn in sites.items()} == {"mu": (2,), "tau": (2,), "factors": (2, 4)}
    want = stats.norm(0.7 * off_centre(2, 4).numpy(), 0.7).logpdf(shared["factors"].numpy()).sum()
    assert sites["factors"].log_prob(shared["factors"]).item() == pytest.approx(want)


@pytest.mark.parametrize("rank", [0, 1.0, True])
def test_ranks_are_whole_numbers(rank: Any) -> None:
    with pytest.raises(ValueError, match=rf"Factors: expected rank as a whole number ≥ 1, got {rank!r}"):
        Factors(rank)
