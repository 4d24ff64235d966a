from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bayesmeta.data.families.kernels import KERNELS, PERIODIC, differences

ONE = torch.tensor(1.0, dtype=torch.float64)
BY_HAND = {
    "rbf": math.exp(-0.5 * 0.25 / 0.16),
    "matern52": (1 + math.sqrt(5) * 1.25 + 5 * 1.5625 / 3) * math.exp(-math.sqrt(5) * 1.25),
    "periodic": math.exp(-2 * (math.sin(math.pi * 0.3 / 0.7) ** 2 + math.sin(math.pi * 0.4 / 0.7) ** 2) / 0.16),
    "weakly_periodic": math.exp(
        -0.5 * 0.25 / 0.16 - 2 * (math.sin(math.pi * 0.3 / 0.7) ** 2 + math.sin(math.pi * 0.4 / 0.7) ** 2)
    ),
}


def at(kernel: str, first: Tensor, second: Tensor, *, length: float, period: float) -> Tensor:
    return KERNELS[kernel](differences(first, second), length * ONE, period * ONE)


@pytest.mark.parametrize("kernel", KERNELS)
def test_values_by_hand(kernel: str) -> None:
    here, there = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[0.3, 0.4], [0.0, 0.0]], dtype=torch.float64)
    values = at(kernel, here, there, length=0.4, period=0.7)
    torch.testing.assert_close(values, torch.tensor([[BY_HAND[kernel], 1.0]], dtype=torch.float64))


@pytest.mark.parametrize("kernel", KERNELS)
def test_they_are_positive_definite_in_three_dimensions(kernel: str) -> None:
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = at(kernel, x, x, length=0.8, period=0.7)
    assert torch.equal(matrix, matrix.T) and float(torch.linalg.eigvalsh(matrix).min()) > -1e-12


@pytest.mark.parametrize("kernel", PERIODIC)
def test_periods_recur(kernel: str) -> None:
    x = torch.tensor([[0.0], [0.7]], dtype=torch.float64)
    value = float(at(kernel, x, x, length=0.4, period=0.7)[0, 1])
    assert value == pytest.approx(1.0 if kernel == "periodic" else math.exp(-0.5 * 0.49 / 0.16))


def test_matern_has_derivatives_where_inputs_coincide() -> None:
    """Distance 0 has a root with an infinite slope; a learned input goes through it."""
    x = torch.tensor([[0.3], [0.3]], dtype=torch.float64, requires_grad=True)
    length = torch.ones((), dtype=torch.float64)
    (slope,) = torch.autograd.grad(KERNELS["matern52"](differences(x, x), length, length).sum(), x)
    assert bool(slope.isfinite().all())
