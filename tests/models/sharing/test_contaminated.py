"""A share of odd tasks against numpy: density and membership of the mixture; fits in which odd tasks cost nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp
from torch import Tensor

import bayesmeta as bm
from bayesmeta.models.sharing import Block, Blocks, Clusters, Contaminated, Factors, Gaussian, Laplace, Sharing


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


BLOCKS = Blocks((Block("weight", (2,)), Block("gate", (1,), 1.0)))
CENTRE, TAU, WIDE, ODD = np.array([0.4, -2.0, 1.0]), np.array([0.3, 0.3, 0.8]), np.array([2.0, 2.0, 0.5]), 0.2
FACTORS = np.array([[1.0, -0.5, 0.2]])
SHIFTS, WEIGHTS = np.array([[0.5, 0.0, -1.0], [-1.0, 1.0, 0.3]]), np.array([0.7, 0.3])


def point() -> dict[str, Tensor]:
    return {
        "mu": torch.tensor([0.4, -2.0]),
        "tau": torch.tensor([0.3, 0.8]),
        "factors": torch.as_tensor(FACTORS),
        "weights": torch.as_tensor(WEIGHTS),
        "shifts": torch.as_tensor(SHIFTS),
        "wide": torch.tensor([2.0, 0.5]),
        "odd": torch.tensor(ODD),
    }


def clusters() -> tuple[list[Any], np.ndarray]:
    normals = [stats.multivariate_normal(CENTRE + shift, np.diag(TAU**2)) for shift in SHIFTS]
    middle = WEIGHTS @ SHIFTS
    return normals, TAU**2 + WEIGHTS @ (SHIFTS - middle) ** 2


CASES: list[tuple[Sharing, list[Any], np.ndarray, np.ndarray]] = [
    (Gaussian(), [stats.multivariate_normal(CENTRE, np.diag(TAU**2))], np.ones(1), TAU**2),
    (
        Factors(),
        [stats.multivariate_normal(CENTRE, FACTORS.T @ FACTORS + np.diag(TAU**2))],
        np.ones(1),
        TAU**2 + FACTORS[0] ** 2,
    ),
    (Clusters(2), clusters()[0], WEIGHTS, clusters()[1]),
]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("inner", "normals", "weights", "variance"), CASES, ids=["gaussian", "factors", "clusters"])
def test_density_and_membership(inner: Sharing, normals: list[Any], weights: np.ndarray, variance: np.ndarray) -> None:
    prior = Contaminated(inner).over(BLOCKS)
    phi = torch.as_tensor(CENTRE + np.random.default_rng(0).normal(size=(6, 1, 3)))
    odd = stats.multivariate_normal(CENTRE, np.diag(variance + WIDE**2)).logpdf(phi.numpy()[:, 0]) + np.log(ODD)
    terms = [n.logpdf(phi.numpy()[:, 0]) + np.log((1 - ODD) * w) for n, w in zip(normals, weights, strict=True)]
    total = logsumexp([*terms, odd], 0)
    mixture = prior.distribution(point(), None)  # type: ignore[arg-type]
    assert (mixture.batch_shape, mixture.event_shape) == ((), (3,))
    np.testing.assert_allclose(mixture.log_prob(phi).numpy()[:, 0], total, rtol=1e-10)
    np.testing.assert_allclose(prior.following(phi[:, 0], point()).numpy(), 1 - np.exp(odd - total), atol=1e-10)
    middle = sum((1 - ODD) * w * n.mean for n, w in zip(normals, weights, strict=True)) + ODD * CENTRE
    second = sum(
        (1 - ODD) * w * (np.diag(n.cov) + (n.mean - middle) ** 2) for n, w in zip(normals, weights, strict=True)
    )
    second = second + ODD * (variance + WIDE**2 + (CENTRE - middle) ** 2)
    np.testing.assert_allclose(prior.variance(point()).numpy(), second)
    assert set(prior.shared) == {*prior.inner.shared, "odd", "wide"} and prior.inner.blocks == BLOCKS


@pytest.mark.usefixtures("float64")
def test_similarity_is_that_of_tasks_that_follow() -> None:
    prior = Contaminated(Factors()).over(BLOCKS)
    phi = torch.as_tensor(CENTRE) + torch.tensor([[2.0, -1.0, 0.4], [2.2, -1.1, 0.5], [5.0, 9.0, 0.0]]).expand(4, 3, 3)
    shared = {name: value.expand(4, *value.shape) for name, value in point().items()}
    alike = prior.similarity(phi, shared)
    assert alike[0, 1] > 0.7 and alike[0, 2].abs() < 1e-3 and torch.equal(alike.diagonal(), torch.ones(3))
    follows = prior.following(phi[0], point())
    inner = prior.inner.similarity(phi, shared)
    np.testing.assert_allclose(alike[0, 1], inner[0, 1] * follows[0] * follows[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": "factors"}, "expected Gaussian, Factors or Clusters of bm.models.sharing inside, got 'factors'"),
        ({"inner": Contaminated()}, "Gaussian, Factors or Clusters of bm.models.sharing inside, got Contaminated"),
        ({"inner": Laplace()}, "Gaussian, Factors or Clusters of bm.models.sharing inside, got Laplace"),
        ({"inner": Gaussian(0.0)}, "expected tasks that differ inside, got hard sharing; use a small scale"),
        ({"loc_scale": 1.0}, "expected loc_scale of the inner prior, got 1.0; give it there"),
    ],
)
def test_what_cannot_be_contaminated_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Contaminated(**options)


def test_odd_tasks_do_not_widen_the_others() -> None:
    """Levels of 12 tasks within .1 of each other, and 4 anywhere: the scale of the 12 is found, and who is odd."""
    rng = np.random.default_rng(0)
    levels = np.append(1 + 0.1 * rng.normal(size=12), [-6.0, 5.0, 8.0, -3.0])
    tasks = bm.Tasks.from_arrays(None, [level + 0.3 * rng.normal(size=6) for level in levels])
    level, found = Blocks((Block("level", (1,)),)), {}
    for name, prior in {"plain": Gaussian(), "odd": Contaminated(Gaussian())}.items():
        model = bm.HierarchicalModel(
            prior.over(level), lambda phi, x: phi[..., 0].expand(*x.shape[:2]), bm.likelihoods.Normal(0.3)
        )
        fit = bm.fit(model, tasks, method=bm.Marginal("map", chains=1, draws=200, starts=4), progress=False)
        post = fit.posterior(tasks, draws=200)
        assert not any(post.flag)
        found[name] = float(fit.shared.mean("tau")[0])
    odd = {site: torch.as_tensor(values) for site, values in post.shared.items()}
    alike = prior.over(level).similarity(torch.as_tensor(post["phi"]), odd).numpy()
    assert found["plain"] > 2 and found["odd"] < 0.35
    assert prior.over(level).scaled == ["level"]
    assert np.abs(alike[12:] - np.eye(16)[12:]).max() < 0.05
