"""Newton's steps from far away, where there is no mode, and where some starts of a search take long."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bayesmeta.hierarchy.derivatives import curvature
from bayesmeta.inference.newton import MAX_STEPS, PATIENCE, find_modes

FAR = (-15.0, -6.0, 0.0, 3.0, 12.0)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def design() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs `(5, 12, 3)`, labels 0/1 and counts `(5, 12)` of five tasks."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(5, 12, 3, generator=generator, dtype=torch.float64)
    binary = (torch.rand(5, 12, generator=generator) < 0.5).double()
    return x, binary, torch.poisson(torch.full((5, 12), 3.0, dtype=torch.float64), generator=generator)


def joint(kind: str) -> object:
    x, binary, counts = design()

    def log_joint(z: Tensor) -> Tensor:
        linear = (x @ z.unsqueeze(-1)).squeeze(-1)
        rows = {
            "logistic": lambda: binary * linear - torch.nn.functional.softplus(linear),
            "poisson": lambda: counts * linear - linear.exp(),
            "student": lambda: -2.5 * torch.log1p((counts - linear).square() / 4),
        }[kind]()
        return rows.sum(-1) - 0.5 * z.square().sum(-1)

    return log_joint


def curved(function: object) -> object:
    return lambda z: tuple(part.detach() for part in curvature(function, 0, z))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["logistic", "poisson", "student"])
def test_newton_arrives_from_far_away(kind: str) -> None:
    """At the end the gradient vanishes and the curvature is that of the log joint."""
    starts = torch.tensor(FAR, dtype=torch.float64)[:, None, None].expand(-1, 5, 3)
    found = find_modes(curved(joint(kind)), starts)  # type: ignore[arg-type]
    assert bool(found.converged.all())
    value, gradient, hessian = curved(joint(kind))(found.loc)  # type: ignore[operator]
    white = torch.linalg.solve_triangular(found.factor, gradient.unsqueeze(-1), upper=False)
    assert float(white.abs().max()) < 1e-6
    torch.testing.assert_close(found.factor @ found.factor.mT, -hessian)
    torch.testing.assert_close(found.value, value)
    if kind != "student":
        torch.testing.assert_close(found.loc, found.loc[:1].expand_as(found.loc), atol=1e-6, rtol=0)


def test_what_has_not_arrived_says_so() -> None:
    starts = torch.full((1, 5, 3), 25.0, dtype=torch.float64)
    short = find_modes(curved(joint("poisson")), starts, steps=3)  # type: ignore[arg-type]
    _, gradient, _ = curved(joint("poisson"))(short.loc)  # type: ignore[operator]
    assert float(gradient.abs().max()) > 1 and not bool(short.converged.any())


@pytest.mark.parametrize(
    "endless",
    [
        lambda z: z.sum(-1),  # no mode
        lambda z: -z.abs().sum(-1).sqrt(),  # a cusp
        lambda z: torch.where(z.sum(-1) > 5, -math.inf, z.sum(-1)),  # ends at a wall
        lambda z: (z - 1).sum(-1).log(),  # not a number at the start
        lambda z: -0.5 * z.square().sum(-1) + math.nan,
    ],
)
def test_where_there_is_no_mode_none_is_reported(endless: object) -> None:
    found = find_modes(curved(endless), torch.zeros(1, 2, 2, dtype=torch.float64))  # type: ignore[arg-type]
    assert not bool(found.converged.any()) and bool(torch.isfinite(found.loc).all())
    assert bool(torch.isfinite(torch.linalg.inv(found.factor)).all())


def test_a_saddle_is_left() -> None:
    found = find_modes(curved(lambda z: -(z.square() - 1).square().sum(-1)), torch.full((1, 1, 2), 1e-3).double())  # type: ignore[arg-type]
    torch.testing.assert_close(found.loc.abs(), torch.ones(1, 1, 2, dtype=torch.float64))


def test_single_precision_arrives_too() -> None:
    """Its last steps are rounding errors of a few thousandths of a posterior sd."""
    x, binary, _ = (part.float() for part in design())
    x = torch.cat([30 * x, x], 1)
    labels = torch.cat([binary, 1 - binary], 1)

    def log_joint(z: Tensor) -> Tensor:
        linear = (x @ z.unsqueeze(-1)).squeeze(-1)
        return (labels * linear - torch.nn.functional.softplus(linear)).sum(-1) - 0.5 * z.square().sum(-1) - 1e4

    found = find_modes(curved(log_joint), torch.ones(1, 5, 3))  # type: ignore[arg-type]
    assert bool(found.converged.all()) and found.loc.dtype == torch.float32
    _, gradient, _ = curved(log_joint)(found.loc)  # type: ignore[operator]
    white = torch.linalg.solve_triangular(found.factor, gradient.unsqueeze(-1), upper=False)
    assert float(white.abs().max()) < 0.02


def test_starts_that_take_long_are_given_up_where_another_has_arrived() -> None:
    """Two starts of each of two tasks: one in a bowl, one on a slope without an end; alone it is followed for long."""
    calls: list[int] = []

    def endless(z: Tensor) -> Tensor:
        calls.append(1)
        return torch.where(z > 0, -0.5 * (z - 1).square(), z.neg().log1p()).sum(-1)

    starts = torch.tensor([2.0, -3.0], dtype=torch.float64)[:, None, None].expand(2, 2, 1)
    found = find_modes(curved(endless), starts, several=True)
    assert found.converged.tolist() == [[True, True], [False, False]] and len(calls) <= PATIENCE + 2
    calls.clear()
    find_modes(curved(endless), starts)
    assert len(calls) > PATIENCE + 2
    calls.clear()
    find_modes(curved(endless), starts[1:], several=True)
    assert PATIENCE + 2 < len(calls) <= MAX_STEPS + 1
