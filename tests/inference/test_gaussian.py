from __future__ import annotations

import pytest
import torch
from scipy.stats import multivariate_t
from torch import Tensor
from torch.distributions import MultivariateNormal

from bayesmeta.inference.gaussian import (
    HEAVY_DF,
    DiagonalTasks,
    GaussianTasks,
    Lower,
    NaturalTasks,
    SkewedTasks,
    cholesky,
    heavy_scale,
    solve_factored,
    solve_lower,
    solve_upper,
)

DIMS = [1, 2, 4, 8, 9]


def matrices(dim: int, *batch: int) -> Tensor:
    """Well-conditioned positive definite matrices `(*batch, d, d)`."""
    root = torch.randn(*batch, dim, dim, dtype=torch.float64)
    return root @ root.mT / dim + torch.eye(dim, dtype=torch.float64)


def natural(dim: int, draws: int = 3, tasks: int = 5) -> NaturalTasks:
    lower = Lower.cholesky(matrices(dim, draws, tasks).movedim((-2, -1), (0, 1)))
    numbers = 0.4 * torch.randn(dim * (dim + 1) // 2, draws, tasks, dtype=torch.float64)
    half, shift = torch.randn(2, dim, draws, tasks, dtype=torch.float64)
    return NaturalTasks(half, shift, lower, Lower.identity_at_zero(numbers, bound=5.0))


@pytest.mark.parametrize("dim", DIMS)
def test_columns_do_what_dense_algebra_does(dim: int) -> None:
    matrix = matrices(dim, 3, 5)
    dense = torch.linalg.cholesky(matrix)
    lower = Lower.cholesky(matrix.movedim((-2, -1), (0, 1)))
    right = torch.randn(3, 5, dim, dtype=torch.float64)
    first = right.movedim(-1, 0)
    torch.testing.assert_close(lower.dense(), dense)
    torch.testing.assert_close(lower.log_det(), dense.diagonal(dim1=-2, dim2=-1).log().sum(-1))
    torch.testing.assert_close(lower.solve(first).movedim(0, -1), solve_lower(dense, right))
    torch.testing.assert_close(lower.solve_transposed(first).movedim(0, -1), solve_upper(dense.mT, right))
    torch.testing.assert_close(lower.transposed_times(first).movedim(0, -1), (dense.mT @ right.unsqueeze(-1))[..., 0])
    torch.testing.assert_close(cholesky(matrix), dense)
    torch.testing.assert_close((dense @ solve_lower(dense, right).unsqueeze(-1))[..., 0], right)


@pytest.mark.parametrize("dim", DIMS)
def test_a_factor_is_the_identity_at_zero_and_lower_triangular_elsewhere(dim: int) -> None:
    count = dim * (dim + 1) // 2
    at_zero = Lower.identity_at_zero(torch.zeros(count, 2), bound=5.0).dense()
    torch.testing.assert_close(at_zero, torch.eye(dim).expand(2, dim, dim))
    numbers = torch.arange(1.0, count + 1)
    dense = Lower.identity_at_zero(numbers.unsqueeze(-1), bound=2.0).dense()[0]
    assert torch.equal(dense, dense.tril())
    torch.testing.assert_close(dense.diagonal(), numbers[:dim].clamp(max=2.0).exp())
    assert sorted(dense[tuple(torch.tril_indices(dim, dim, -1))].tolist()) == numbers[dim:].tolist()


@pytest.mark.parametrize("dim", DIMS)
def test_log_density_is_that_of_the_normal_and_of_the_t_distribution(dim: int) -> None:
    posterior = natural(dim)
    dense = GaussianTasks(posterior.loc, posterior.factor)
    precision = dense.factor @ dense.factor.mT
    points = torch.randn(3, 5, dim, dtype=torch.float64)
    normal = MultivariateNormal(dense.loc, precision_matrix=precision).log_prob(points)
    heavy = torch.stack(
        [
            torch.tensor(multivariate_t(m.numpy(), torch.linalg.inv(p).numpy(), df=HEAVY_DF).logpdf(x.numpy()))
            for m, p, x in zip(dense.loc.flatten(0, 1), precision.flatten(0, 1), points.flatten(0, 1), strict=True)
        ]
    ).reshape(3, 5)
    for tasks in (posterior, dense):
        torch.testing.assert_close(tasks.log_prob(points), normal)
        torch.testing.assert_close(tasks.log_prob(points, heavy=True), heavy)


@pytest.mark.parametrize("dim", DIMS)
def test_a_draw_is_the_noise_that_whitening_gives_back(dim: int) -> None:
    posterior = natural(dim)
    noise = torch.randn(3, 5, dim, dtype=torch.float64)
    for tasks in (posterior, GaussianTasks(posterior.loc, posterior.factor)):
        drawn = tasks.push(noise)
        white = ((drawn - posterior.loc).unsqueeze(-2) @ posterior.factor).squeeze(-2)
        torch.testing.assert_close(white, noise)
        assert tasks.sample().shape == noise.shape


def test_heavy_draws_have_the_variance_of_a_t_distribution() -> None:
    draws = 200_000
    zero, one = torch.zeros(1, draws, 1, dtype=torch.float64), torch.ones(1, 1, draws, 1, dtype=torch.float64)
    dense = GaussianTasks(zero, one.movedim(2, 1))
    lower = Lower([torch.ones(1, 1, draws, dtype=torch.float64)])
    component_first = torch.zeros(1, 1, draws, dtype=torch.float64)
    for tasks in (dense, NaturalTasks(component_first, component_first, lower, lower)):
        quantile = tasks.sample(heavy=True).abs().flatten().quantile(0.95)
        assert abs(float(quantile) - 2.5706) < 0.04
    assert abs(float(heavy_scale((draws,), zero).pow(-2).mean()) - 1) < 4.5 * (2 / HEAVY_DF / draws) ** 0.5


@pytest.mark.parametrize("dim", [1, 2, 3, 9])
def test_gradients_pass_through_factor_draw_and_density(dim: int) -> None:
    def both(precision: Tensor, half: Tensor, numbers: Tensor, noise: Tensor) -> Tensor:
        precision = precision + precision.transpose(0, 1)
        lower, bend = Lower.cholesky(precision), Lower.identity_at_zero(numbers, bound=5.0)
        tasks = NaturalTasks(lower.solve(half), half, lower, bend)
        return tasks.log_prob(noise).sum() + tasks.loc.square().sum() + bend.solve_transposed(half).sum()

    arguments = (
        0.5 * matrices(dim, 1, 2).movedim((-2, -1), (0, 1)),
        torch.randn(dim, 1, 2, dtype=torch.float64),
        0.3 * torch.randn(dim * (dim + 1) // 2, 1, 2, dtype=torch.float64),
        torch.randn(1, 2, dim, dtype=torch.float64),
    )
    assert torch.autograd.gradcheck(both, [a.requires_grad_() for a in arguments])


def test_skewed_noise_is_invertible_and_normalised_and_nothing_without_skewness() -> None:
    torch.manual_seed(0)
    lower = Lower([torch.rand(2, 3, 4, dtype=torch.float64) + 0.5, torch.rand(1, 3, 4, dtype=torch.float64) + 0.5])
    half, shift, skew = torch.randn(3, 2, 3, 4, dtype=torch.float64)
    base = NaturalTasks(half, shift, lower, Lower.identity_at_zero(0.1 * half.new_ones(3, 3, 4), bound=8.0))
    skewed = SkewedTasks(base, 0.5 * skew)
    white = torch.randn(3, 4, 2, dtype=torch.float64)
    noise = skewed.push(white)
    squares, log_det = skewed.pull(noise)
    torch.testing.assert_close(squares, white.square().sum(-1))
    jacobian = torch.func.vmap(torch.func.jacrev(lambda w: skewed.push(w.expand(3, 4, 2))))(white.reshape(12, 2))
    own = torch.stack([jacobian[k, k // 4, k % 4] for k in range(12)]).reshape(3, 4, 2, 2)
    torch.testing.assert_close(log_det, -torch.linalg.slogdet(own).logabsdet)
    plain = SkewedTasks(base, torch.zeros_like(skew))
    torch.testing.assert_close(plain.push(white), base.push(white), rtol=1e-12, atol=1e-12)
    for one, other in zip(plain.pull(noise), base.pull(noise), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_independent_coordinates_are_gaussians_with_a_diagonal_factor() -> None:
    loc, sd, points = torch.randn(3, 2, 4, 5, dtype=torch.float64)
    found, dense = DiagonalTasks(loc, sd.exp()), GaussianTasks(loc, torch.diag_embed((-sd).exp()))
    for one, two in zip(found.log_probs(points), dense.log_probs(points), strict=True):
        torch.testing.assert_close(one, two)
    torch.testing.assert_close(found.push(points), dense.push(points))
    assert found.example.shape == found.sample().shape == (2, 4, 5)


@pytest.mark.parametrize("dim", DIMS)
def test_a_factor_solves_for_its_product(dim: int) -> None:
    matrix, right = matrices(dim, 3), torch.randn(3, dim, dtype=torch.float64)
    found = solve_factored(torch.linalg.cholesky(matrix), right)
    torch.testing.assert_close((matrix @ found.unsqueeze(-1)).squeeze(-1), right)
