from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bayesmeta.data.families.boxed import Boxed, BoxedRows, Coefficient, log_between

CASES = [(0.0, 0.0), (1e-9, 1e-4), (2.0, 3.0), (4.0, -30.0), (4.0, 60.0), (400.0, 900.0), (1e4, 9e4), (0.01, -0.2)]


def boxed(case: tuple[float, float]) -> Boxed:
    return Boxed(*(torch.tensor(value, dtype=torch.float64) for value in (*case, -1.0, 4.0)))


def by_quadrature(case: tuple[float, float]) -> tuple[float, float, float]:
    """Log integral, mean and variance by a midpoint rule, on the part of the interval where the density is."""
    (precision, shift), count = case, 400_000
    share, low, high = (torch.arange(count, dtype=torch.float64) + 0.5) / count, -1.0, 4.0
    for _ in range(2):
        c = low + (high - low) * share
        log_density = shift * c - 0.5 * precision * c.square()
        inside = c[log_density > log_density.max() - 60]
        width, low, high = high - low, max(-1.0, float(inside.min()) - 1e-3), min(4.0, float(inside.max()) + 1e-3)
    weight = log_density.softmax(0)
    mean = (weight * c).sum()
    log_integral = log_density.logsumexp(0) + math.log(width / count)
    return float(log_integral), float(mean), float((weight * (c - mean).square()).sum())


@pytest.mark.parametrize("case", CASES)
def test_integral_and_moments_against_quadrature(case: tuple[float, float]) -> None:
    log_integral, mean, variance = by_quadrature(case)
    found = boxed(case)
    assert float(found.log_integral()) == pytest.approx(log_integral, abs=1e-6)
    got = found.moments()
    assert float(got[0]) == pytest.approx(mean, abs=1e-4 * math.sqrt(variance))
    assert float(got[1]) == pytest.approx(variance, rel=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_draws_have_these_moments(case: tuple[float, float]) -> None:
    found = boxed(case)
    mean, variance = found.moments()
    many = Boxed(*(value.expand(20_000) for value in (found.precision, found.shift, found.low, found.high)))
    draws = many.draw()
    if abs(case[1]) > 1e4:
        assert bool((draws == 4.0).all()), "beyond 30 sds a draw lies at the end"
        return
    assert bool(((draws >= -1) & (draws <= 4)).all())
    assert abs(float((draws.mean() - mean) / (draws.std() / math.sqrt(20_000)))) < 4
    squared = (draws - mean).square()
    assert abs(float((squared.mean() - variance) / (squared.std() / math.sqrt(20_000)))) < 4


def test_a_peak_far_outside_is_drawn_at_the_nearest_end() -> None:
    assert boxed((1e6, 8e6)).draw() == 4.0 and boxed((1e6, -8e6)).draw() == -1.0


def test_log_between_keeps_its_digits_in_the_tails() -> None:
    lower = torch.tensor([50.0, -60.0, -1.0], dtype=torch.float64)
    upper = torch.tensor([60.0, -50.0, 1.0], dtype=torch.float64)
    tail = float(torch.special.log_ndtr(torch.tensor(-50.0, dtype=torch.float64)))
    expected = torch.tensor([tail, tail, math.log(0.6826894921370859)], dtype=torch.float64)
    torch.testing.assert_close(log_between(lower, upper), expected, rtol=1e-12, atol=0)


def rows() -> tuple[BoxedRows, Tensor]:
    """Two tasks, three rows, two nodes and two features."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    ends = torch.tensor([-1.0, 0.0], dtype=torch.float64), torch.tensor([1.0, 3.0], dtype=torch.float64)
    c = Coefficient(draw(2, 2, 2), draw(2, 2, 2), Boxed(draw(2, 2).exp(), draw(2, 2), *ends))
    return BoxedRows(draw(2, 3), draw(2, 3, 2), draw(2, 3).exp(), c), draw(2, 3, 1)


def test_rows_against_quadrature_over_the_coefficient() -> None:
    found, y = rows()
    boxed, count = found.coefficient.boxed, 20_000
    share = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    c = boxed.low.unsqueeze(-1) + (boxed.high - boxed.low).unsqueeze(-1) * share
    posterior = (boxed.shift.unsqueeze(-1) * c - 0.5 * boxed.precision.unsqueeze(-1) * c.square()).softmax(-1)
    for task in range(2):
        for node in range(2):
            load = found.coefficient.offset[task, node] + c[node, :, None] * found.coefficient.slope[task, node]
            mean = found.base[task, :, None] + found.features[task] @ load.T
            density = torch.distributions.Normal(mean, found.sd[task, :, None]).log_prob(y[task]).exp()
            expected = (density * posterior[task, node]).sum(-1).log()
            torch.testing.assert_close(found.log_prob(y)[task, :, node], expected, atol=1e-7, rtol=0)
            centre = (mean * posterior[task, node]).sum(-1)
            torch.testing.assert_close(found.moments()[0][task, :, node], centre, atol=1e-6, rtol=0)


def test_parts_draws_and_joined_nodes() -> None:
    found, y = rows()
    torch.testing.assert_close(found.part(slice(1, 2)).log_prob(y[1:]), found.log_prob(y)[1:])
    node = torch.tensor([[0, 1, 0], [1, 1, 0]]).expand(20_000, 2, 3)
    draws = found.draw(node)
    mean, variance = (moment.gather(-1, node[0].unsqueeze(-1)).squeeze(-1) for moment in found.moments())
    assert ((draws.mean(0) - mean) / (variance / 20_000).sqrt()).abs().max() < 4
    squared = (draws - mean).square()
    assert ((squared.mean(0) - variance) / (squared.std(0) / math.sqrt(20_000))).abs().max() < 4
    twice = BoxedRows(found.base, found.features, found.sd, found.coefficient.joined(found.coefficient))
    torch.testing.assert_close(twice.log_prob(y), found.log_prob(y).repeat(1, 1, 2))
