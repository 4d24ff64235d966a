"""Clusters of tasks against numpy: density, membership and draws of the mixture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp
from torch import Tensor

from bayesmeta.models.sharing import Block, Blocks, Clusters
from bayesmeta.models.sharing.blocks import off_centre


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


BLOCKS = Blocks((Block("weight", (2,)), Block("gate", (1,), 1.0)))
WEIGHTS, SD = np.array([0.5, 0.3, 0.2]), np.array([0.3, 0.3, 0.8])
SHIFTS = np.array([[0.0, 1.0, -1.0], [0.5, 0.0, 0.3], [-2.0, 0.1, 0.0]])
CENTRES = np.array([0.4, -2.0, 1.0]) + SHIFTS
PRIOR = Clusters(3, 2.0, sd_scale=0.7).over(BLOCKS)


def point() -> dict[str, Tensor]:
    return {
        "mu": torch.tensor([0.4, -2.0]),
        "tau": torch.tensor([0.3, 0.8]),
        "weights": torch.as_tensor(WEIGHTS),
        "shifts": torch.as_tensor(SHIFTS),
    }


def joint(phi: Tensor) -> np.ndarray:
    """Log w_k N(φ; centre_k, diag(SD²)) `(T, 1, 3)`."""
    each = [stats.norm(centre, SD).logpdf(phi.numpy()).sum(-1) for centre in CENTRES]
    return np.stack(each, -1) + np.log(WEIGHTS)


def mixture() -> Any:
    return PRIOR.distribution(point(), None)  # type: ignore[arg-type]


def test_density() -> None:
    phi = torch.as_tensor(CENTRES).unsqueeze(1) + 0.5 * torch.randn(3, 1, 3)
    assert (mixture().batch_shape, mixture().event_shape) == ((), (3,))
    np.testing.assert_allclose(mixture().log_prob(phi).numpy(), logsumexp(joint(phi), -1), rtol=1e-10)


def test_membership() -> None:
    phi = torch.as_tensor(CENTRES).unsqueeze(1) + 0.5 * torch.randn(3, 1, 3)
    terms = joint(phi)
    want = np.exp(terms - logsumexp(terms, -1, keepdims=True))
    np.testing.assert_allclose(PRIOR.membership(phi, point()).numpy(), want, atol=1e-12)
    far = PRIOR.membership(torch.tensor([-300.0, -2.0, 1.0]), point())
    assert far.tolist() == [0.0, 0.0, 1.0]


def test_similarity_is_the_probability_to_be_of_one_cluster() -> None:
    """Averaged over draws, and 1 for a task and itself."""
    phi = torch.as_tensor(CENTRES) + 0.5 * torch.randn(4, 3, 3)
    want = np.zeros((3, 3))
    for draw in phi:
        terms = joint(draw.unsqueeze(1))[:, 0]
        member = np.exp(terms - logsumexp(terms, -1, keepdims=True))
        want += member @ member.T / 4
    np.fill_diagonal(want, 1.0)
    shared = {name: value.expand(4, *value.shape) for name, value in point().items()}
    np.testing.assert_allclose(PRIOR.similarity(phi, shared).numpy(), want, atol=1e-12)


def test_draws_come_from_clusters_by_their_weights() -> None:
    """Mean and sd of each number within 5 standard errors of those of the mixture."""
    draws = 20_000
    sample = mixture().sample((draws,)).numpy()
    mean = WEIGHTS @ CENTRES
    variance = SD**2 + WEIGHTS @ (CENTRES - mean) ** 2
    fourth = WEIGHTS @ ((CENTRES - mean) ** 4 + 6 * (CENTRES - mean) ** 2 * SD**2 + 3 * SD**4)
    assert (np.abs(sample.mean(0) - mean) < 5 * np.sqrt(variance / draws)).all()
    np.testing.assert_allclose(PRIOR.variance(point()).numpy(), variance)
    assert (np.abs(sample.var(0) - variance) < 5 * np.sqrt((fourth - variance**2) / draws)).all()


def test_shared_sites() -> None:
    sites: Any = PRIOR.shared
    shapes = {name: tuple(fn.event_shape) for name, fn in sites.items()}
    assert shapes == {"mu": (2,), "tau": (2,), "weights": (3,), "shifts": (3, 3)}
    found = {name: fn.log_prob(point()[name]).item() for name, fn in sites.items()}
    assert found["weights"] == pytest.approx(stats.dirichlet([2.0] * 3).logpdf(WEIGHTS))
    assert found["shifts"] == pytest.approx(stats.norm(0.7 * off_centre(3, 3).numpy(), 0.7).logpdf(SHIFTS).sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 1}, "Clusters: expected count ≥ 2, got 1; one cluster is the Gaussian prior"),
        ({"count": 0}, "Clusters: expected count as a whole number ≥ 1, got 0"),
        ({"count": 2.0}, "Clusters: expected count as a whole number ≥ 1, got 2.0"),
        ({"concentration": 0.0}, "Clusters: expected concentration as a finite number > 0, got 0.0"),
        ({"sd_scale": -1.0}, "Clusters: expected sd_scale as a finite number > 0, got -1.0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Clusters(**options)
