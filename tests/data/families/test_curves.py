"""Curves against brute force: a fine grid over both unknowns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bayesmeta.data.families.curves import Curves, features
from bayesmeta.data.families.rows import Rows

NOISE = 0.2


def bent(u: Tensor) -> tuple[Tensor, Tensor]:
    """y = c sin(x − u) + u x."""
    none = torch.zeros_like(u)
    return torch.stack([u.cos(), -u.sin(), none, none], -1), torch.stack([none, none, u, none], -1)


PLAIN = Curves(loadings=bent, unknown=(-0.5, 2.0), coefficient=(0.5, 3.0), noise=NOISE)
SPREAD = Curves(
    loadings=bent,
    unknown=(-0.5, 2.0),
    coefficient=(0.5, 3.0),
    noise=NOISE,
    log_prior=lambda u: -(u + 0.5) - math.log(1 - math.exp(-2.5)),
    spread=(0.0, 0.0, 0.3, 0.7),
)


def rows_of(n: int) -> Rows:
    generator = torch.Generator().manual_seed(n)
    x = 6 * torch.rand(1, max(n, 1), 1, generator=generator, dtype=torch.float64) - 3
    y = 1.3 * (x[..., 0] - 0.8).sin() + 0.8 * x[..., 0] + NOISE * torch.randn(x.shape[:2], generator=generator)
    return Rows(x, y, torch.full((1, max(n, 1)), n > 0))


def brute_force(curves: Curves, rows: Rows) -> float:
    """The evidence by a grid of 800 × 800 over u and c, w integrated out by its covariance."""
    n = int(rows.n)
    x, y = rows.x[0, :n], rows.y[0, :n]
    u, c = (
        low + (high - low) * (torch.arange(800, dtype=torch.float64) + 0.5) / 800
        for low, high in (curves.unknown, curves.coefficient)
    )
    psi = features(x, curves.frequency)
    spread = torch.tensor(curves.spread, dtype=torch.float64)
    covariance = (psi * spread.square()) @ psi.T + NOISE**2 * torch.eye(n, dtype=torch.float64)
    slope, offset = curves.loadings(u)
    residual = y - (c[:, None, None] * slope + offset) @ psi.T
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), residual.flatten(0, 1).T, upper=False)
    prior = torch.zeros_like(u) - math.log(2.5) if curves.log_prior is None else curves.log_prior(u)
    log_density = -0.5 * white.square().sum(0).unflatten(0, residual.shape[:2]) + prior
    constant = -0.5 * n * math.log(2 * math.pi) - 0.5 * torch.logdet(covariance) + math.log(2.5 / 800**2)
    return float(log_density.flatten().logsumexp(0) + constant)


@pytest.mark.parametrize("n", [0, 1, 2, 5, 40])
@pytest.mark.parametrize("curves", [PLAIN, SPREAD], ids=["plain", "spread"])
def test_the_evidence(curves: Curves, n: int) -> None:
    rows = rows_of(n)
    expected = brute_force(curves, rows) if n else 0.0
    assert float(curves.log_evidence(rows)) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("curves", [PLAIN, SPREAD], ids=["plain", "spread"])
def test_the_predictive_of_a_row_is_a_ratio_of_evidences(curves: Curves, n: int) -> None:
    rows, new = rows_of(n), rows_of(4)
    mixture = curves.mixture(curves.nodes(rows, curves.count(rows.x, new.x)), rows, new.x)
    before = brute_force(curves, rows) if n else 0.0
    expected = [brute_force(curves, rows.joined(Rows(x, y, torch.ones(1, 1) > 0))) - before for x, y in single(new)]
    torch.testing.assert_close(
        mixture.log_prob(new.y), torch.tensor([expected], dtype=torch.float64), atol=2e-3, rtol=0
    )


def single(rows: Rows) -> list[tuple[Tensor, Tensor]]:
    return [(rows.x[:, row : row + 1], rows.y[:, row : row + 1]) for row in range(rows.x.shape[1])]


def test_narrow_posteriors_are_resolved() -> None:
    """With 2,000 rows the sd of u is about .003, a fifth of the first cells' width."""
    rows = rows_of(2000)
    nodes = PLAIN.nodes(rows, PLAIN.count(rows.x))
    weight = nodes.log_weight.softmax(-1)
    assert float(weight.max()) < 0.2 and int((weight > 1e-3).sum()) > 15


def test_two_kinds_are_weighed_by_their_shares() -> None:
    rows = rows_of(3)
    first, second = (curves.nodes(rows, curves.count(rows.x)) for curves in (PLAIN, SPREAD))
    expected = torch.logaddexp(first.log_evidence() + math.log(0.2), second.log_evidence() + math.log(0.8))
    torch.testing.assert_close(first.joined(second, 0.2).log_evidence(), expected)


def test_nodes_grow_with_the_reach_of_inputs_up_to_a_limit() -> None:
    near, far = torch.full((1, 1, 1), 2.0, dtype=torch.float64), torch.full((1, 1, 1), 40.0, dtype=torch.float64)
    assert 64 <= PLAIN.count(near) < PLAIN.count(near, far)
    with pytest.raises(ValueError, match=r"more than 20000 nodes .* inputs up to 4e\+04 with noise 0.2"):
        PLAIN.count(1000 * far)
